"""Compiled programs over the shards of a mesh, the collectives they use, and their cache.

A program depends only on static arguments, on the mesh and on shapes of arrays. So a cached program
saves a later fit the compilation, and does not change its result.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_als.engine import compilation_cache
from tpu_als.host import give_back_memory

# With several devices, one array with a leading axis of shards. On a single device, a list of one
# array per shard.
Shards = Array | list[Array]
PyTree = Any  # arrays in any structure of tuples, lists and named tuples
Program = jax.stages.Wrapped  # a compiled program
Call = tuple[Program, tuple[PyTree, ...]]  # a program and its arguments
_Tree = TypeVar("_Tree")
_Arguments = ParamSpec("_Arguments")

AXIS = "shards"  # name of the mesh axis
# Specs of inputs and outputs: each device has its part of a leading axis of shards, or all of it.
SHARDED, REPLICATED = PartitionSpec(AXIS), PartitionSpec()
_PIECE_ROWS = 1 << 13  # rows of a table that `concatenate` changes at once

compilation_cache.apply_to_jax()


@dataclass(frozen=True)
class Collectives:
    """Operations of a compiled program across shards. A single device has all shards.

    Attributes
    ----------
    axis : str or None
        Name of the mesh axis, None on a single device.
    is_sharded : bool
        Whether each device keeps only its own part of the source table.
    """

    axis: str | None = None
    is_sharded: bool = False

    @property
    def source_spec(self) -> PartitionSpec:
        """Spec of the source table of a half-epoch (`source_table`)."""
        return SHARDED if self.is_sharded else REPLICATED

    def sum(self, value: _Tree) -> _Tree:
        """Sum over the shards."""
        return value if self.axis is None else jax.lax.psum(value, self.axis)

    def local_parts(self, shards: Shards) -> list[Array]:
        """The parts of an array that this program has: all shards, or only the device's own."""
        return shards if isinstance(shards, list) else [shards]

    def concatenate(
        self, shards: Shards, change: Callable[[Array], Array] = lambda rows: rows
    ) -> Array:
        """Apply `change` to the rows of this program's shards, and concatenate the results.

        On a single device this is done in pieces, into one array: a concatenation of whole changed
        shards would need twice the memory.
        """
        parts = self.local_parts(shards)
        if len(parts) == 1:
            return change(parts[0])
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        rows, low = jnp.zeros(shape, parts[0].dtype), 0
        for part in parts:
            rows = _write_changed(rows, part, low, change)
            low += len(part)
        return rows

    def source_table(self, rows: Array) -> Array:
        """The rows of a source table that a half-epoch reads: all rows, or only the device's."""
        if self.axis is None or self.is_sharded:
            return rows
        return jax.lax.all_gather(rows, self.axis, tiled=True)


def _write_changed(rows: Array, shard: Array, low: int, change: Callable[[Array], Array]) -> Array:
    """Change a shard piece by piece, and write it into `rows`, starting at row `low`."""
    # The largest power of two that divides the length. `layout.round_up` makes sure it is large.
    size = min(len(shard) & -len(shard), _PIECE_ROWS)

    def write(step: int, rows: Array) -> Array:
        piece = jax.lax.dynamic_slice_in_dim(shard, step * size, size)
        return jax.lax.dynamic_update_slice_in_dim(rows, change(piece), low + step * size, 0)

    return jax.lax.fori_loop(0, len(shard) // size, write, rows)


class ProgramCache:
    """Programs that later fits and calls use again, with a bound on their compiled versions.

    A program is compiled once for each set of argument shapes. Each matrix of a new shape needs new
    versions; without a bound they would fill the memory.

    Attributes
    ----------
    most : int
        Compiled versions to keep. If `compile_new` would exceed it, all programs are dropped; one
        that is running stays until it has finished.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._programs: dict[Hashable, Program] = {}
        self._compiled: set[Hashable] = set()  # programs with the shapes of their arguments

    def keep(self, make: Callable[_Arguments, Program]) -> Callable[_Arguments, Program]:
        """Decorate a function that makes programs: one is kept for each set of arguments."""

        @functools.wraps(make)
        def kept(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Program:
            key = (make, args, tuple(kwargs.items()))
            program = self._programs.get(key)
            if program is None:  # `setdefault`, because another thread may have made it since
                program = self._programs.setdefault(key, make(*args, **kwargs))
            return program

        return kept

    def compile_new(
        self,
        calls: Iterable[Call],
        dtype: str,
        run_all: Callable[[Callable[[Hashable], None], Sequence[Hashable]], object],
    ) -> None:
        """Compile programs that were not compiled for arguments of these shapes before.

        Parameters
        ----------
        calls : iterable of (program, arguments)
            The programs.
        dtype : str
            That of the tables (`precision`).
        run_all : callable
            Maps a function over a sequence, with several threads.
        """
        new: dict[Hashable, Call] = {}
        for program, args in calls:
            leaves, structure = jax.tree.flatten(args)
            key = (program, structure, tuple((a.shape, a.dtype) for a in leaves))
            if key not in self._compiled:
                new[key] = (program, args)

        def work(key: Hashable) -> None:
            with precision(dtype):
                program, args = new[key]
                program.lower(*args).compile()
            self._compiled.add(key)

        if new and self.n_compiled() + len(new) > self.most:
            self.clear()
        run_all(work, list(new))
        if new:
            give_back_memory()

    def n_compiled(self) -> int:
        """Number of compiled versions in memory."""
        programs = list(self._programs.values())
        return sum(program._cache_size() for program in programs)  # type: ignore[attr-defined]

    def clear(self) -> None:
        """Drop all programs."""
        self._programs.clear()
        self._compiled.clear()


_IN_BACKGROUND: dict[str, int | bool] = {"xla_tpu_enable_async_all_to_all": True}

CACHE = ProgramCache(200)  # a fit has up to 40 versions, each of about 4 MB


@CACHE.keep
def all_shards_program(
    fn: Callable[..., PyTree],
    static: Hashable,
    out_specs: PyTree,
    mesh: Mesh | None,
    collectives: Collectives,
) -> Program:
    """See `DeviceMesh.all_shards_program`."""
    if mesh is None:
        return jax.jit(functools.partial(fn, static, collectives))

    def on_device(sharded: PyTree, replicated: PyTree) -> PyTree:
        outputs = fn(static, collectives, _without_axis(sharded), replicated)
        return jax.tree.map(
            lambda spec, output: _with_axis(output) if spec == SHARDED else output,
            out_specs,
            outputs,
        )

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(SHARDED, REPLICATED),
        out_specs=out_specs,
        check_vma=False,
    )
    return jax.jit(mapped)


@CACHE.keep
def per_shard_program(
    fn: Callable[..., PyTree],
    static: Hashable,
    mesh: Mesh | None,
    collectives: Collectives,
    platform: str,
) -> Program:
    """See `DeviceMesh.per_shard_program`."""
    options = _compiler_options(platform, mesh)
    if mesh is None:
        on_shard = functools.partial(fn, static)
        return jax.jit(on_shard, donate_argnums=0, compiler_options=options)

    def on_device(out: Array, sharded: PyTree, source: Array, replicated: PyTree) -> Array:
        source = source[0] if collectives.is_sharded else source
        return fn(static, out[0], _without_axis(sharded), source, replicated)[None]

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(SHARDED, SHARDED, collectives.source_spec, REPLICATED),
        out_specs=SHARDED,
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=0, compiler_options=options)


class ShardPass(NamedTuple):
    """A program of `per_shard_program` with its inputs, for `DeviceMesh.run`.

    Attributes
    ----------
    program : callable
        The program.
    sharded : pytree of Shards
        Inputs of which each shard has its part.
    replicated : pytree of array
        Inputs that all shards share.
    """

    program: Program
    sharded: PyTree
    replicated: PyTree


def _without_axis(sharded: _Tree) -> _Tree:
    """A device's part of each array, without the axis of shards."""
    return jax.tree.map(lambda part: part[0], sharded)


def _with_axis(parts: _Tree) -> _Tree:
    """A device's part of each array, with an axis of shards of length 1."""
    return jax.tree.map(lambda part: part[None], parts)


def _compiler_options(platform: str, mesh: Mesh | None) -> dict[str, int | bool] | None:
    """Options for loops over chunks.

    On CPU, LLVM's level 2 gives faster code than level 3. On TPU, all-to-alls run in the background
    where that compiles.
    """
    if platform == "cpu":
        return {"xla_backend_optimization_level": 2}
    return _IN_BACKGROUND if exchanges_in_background(mesh) else None


@functools.cache
def exchanges_in_background(mesh: Mesh | None) -> bool:
    """Whether the compiler can run an all-to-all in a loop while a device computes.

    TPUs support this, except slices of v5e with more than 16 chips. A small program is compiled to
    find out.
    """
    if mesh is None or mesh.devices.flat[0].platform != "tpu":
        return False

    def exchanges(part: Array, trips: Array) -> Array:
        return jax.lax.fori_loop(
            0, trips, lambda _, part: jax.lax.all_to_all(part, AXIS, 0, 0, tiled=True), part
        )

    program = jax.shard_map(
        exchanges, mesh=mesh, in_specs=(SHARDED, REPLICATED), out_specs=SHARDED, check_vma=False
    )
    rows, trips = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((mesh.size**2 * 8, 128), jnp.bfloat16, SHARDED),
            ((), jnp.int32, REPLICATED),
        )
    )
    try:
        jax.jit(program, compiler_options=_IN_BACKGROUND).lower(rows, trips).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def precision(dtype: str) -> contextlib.AbstractContextManager[object]:
    """Context that enables this dtype: 64-bit types are disabled in JAX by default."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
