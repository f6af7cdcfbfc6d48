"""Compiled programs of one shard or of all of them, and the caches that keep them.

A program depends on static arguments, on the mesh and on shapes of arrays alone. What is kept of
one fit saves a later one the compilation, and changes no result.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tpu_als._private import private_directory
from tpu_als.host import give_back_memory

AXIS = "shards"  # name of the mesh axis
_PIECE_ROWS = 1 << 13  # of a table changed at once
_compiled: set[Any] = set()  # programs with the shapes of arguments that they were compiled for
compilation_cache: str | None = None  # the directory that `enable_compilation_cache` was given


@dataclass(frozen=True)
class Together:
    """What a compiled program does across shards; on a single device it sees all of them.

    Attributes
    ----------
    axis : str or None
        Name of the mesh axis, None on a single device.
    sharded : bool
        Whether each device keeps only its own part of the source table.
    """

    axis: str | None = None
    sharded: bool = False

    def total(self, value: Any) -> Any:
        """Sum over the shards."""
        return value if self.axis is None else jax.lax.psum(value, self.axis)

    def parts(self, own: Any) -> list[jax.Array]:
        """What this program has of an array, shard by shard: all of it, or a device's own."""
        return own if self.axis is None else [own]

    def join(self, own: Any, change: Callable[[jax.Array], jax.Array] = lambda rows: rows) -> Any:
        """Rows of the shards that this program has, one below the other, each first changed.

        On a single device piece by piece into one array: whole changed shards, or a concatenation
        of them, would take as much memory again.
        """
        if self.axis is not None or len(own) == 1:
            return change(own[0] if self.axis is None else own)
        rows = jnp.zeros((sum(len(part) for part in own), *own[0].shape[1:]), own[0].dtype)
        low = 0
        for part in own:
            rows = _write(rows, part, low, change)
            low += len(part)
        return rows

    def hold(self, rows: jax.Array) -> jax.Array:
        """What a half-epoch is to read of a source table: all rows, or a device's own."""
        if self.axis is None or self.sharded:
            return rows
        return jax.lax.all_gather(rows, self.axis, tiled=True)


def _write(
    rows: jax.Array, part: jax.Array, low: int, change: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Write a part, changed piece by piece, into the rows from `low` on."""
    # Sizes are rounded so that they have such a divisor (`layout.round_up`).
    size = min(len(part) & -len(part), _PIECE_ROWS)

    def piece(step: Any, rows: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(part, step * size, size)
        return jax.lax.dynamic_update_slice_in_dim(rows, change(own), low + step * size, 0)

    return jax.lax.fori_loop(0, len(part) // size, piece, rows)


@functools.cache
def whole(
    fn: Callable[..., Any], static: Any, mesh: Mesh | None, together: Together
) -> Callable[..., Any]:
    """As `Workplace.whole` describes it."""
    if mesh is None:
        return jax.jit(functools.partial(fn, static, together))

    def local(own: Any, shared: Any) -> Any:
        everywhere, held, own = fn(static, together, _first(own), shared)
        held = held[None] if together.sharded and held is not None else held
        return everywhere, held, jax.tree.map(lambda part: part[None], own)

    own, everywhere = PartitionSpec(AXIS), PartitionSpec()
    held = own if together.sharded else everywhere
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(own, everywhere),
            out_specs=(everywhere, held, own),
            check_vma=False,
        )
    )


@functools.cache
def each(
    fn: Callable[..., Any], static: Any, mesh: Mesh | None, together: Together, platform: str
) -> Callable[..., Any]:
    """As `Workplace.each` describes it."""
    options = _compiler_options(platform)
    if mesh is None:
        return jax.jit(functools.partial(fn, static), donate_argnums=0, compiler_options=options)

    def local(out: Any, own: Any, held: Any, shared: Any) -> Any:
        held = held[0] if together.sharded else held
        return fn(static, out[0], _first(own), held, shared)[None]

    own, everywhere = PartitionSpec(AXIS), PartitionSpec()
    held = own if together.sharded else everywhere
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(own, own, held, everywhere), out_specs=own, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0, compiler_options=options)


def compile_new(
    calls: Iterable[tuple[Any, tuple[Any, ...]]],
    dtype: str,
    run_all: Callable[[Callable[[Any], Any], Sequence[Any]], Any],
) -> None:
    """Compile the programs that are new for these arguments; `run_all` maps over them."""
    new = {}
    for program, args in calls:
        leaves, structure = jax.tree.flatten(args)
        key = (program, structure, tuple((a.shape, a.dtype) for a in leaves))
        if key not in _compiled:
            new[key] = (program, args)

    def work(key: Any) -> None:
        with precision(dtype):
            program, args = new[key]
            program.lower(*args).compile()
        _compiled.add(key)

    run_all(work, list(new))
    if new:
        give_back_memory()


def _first(own: Any) -> Any:
    """A device's part of each array, without the axis of shards."""
    return jax.tree.map(lambda part: part[0], own)


def _compiler_options(platform: str) -> dict[str, Any] | None:
    """Options for the loops over chunks on CPU, where LLVM's level 3 makes slower code than 2."""
    return {"xla_backend_optimization_level": 2} if platform == "cpu" else None


def precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Scope in which arrays of this dtype exist: 64-bit types are off in JAX by default."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


def enable_compilation_cache(path: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a directory, so that later processes need not compile them again.

    Sets JAX's own options for the whole process, and so for all JAX code in it; the package never
    does this by itself. Call it before the first fit. A file is read again only by the same
    version of JAX on the same kind of device. What numba compiles is kept beside them.

    Parameters
    ----------
    path : path-like
        The directory; made, for this user alone, where it does not exist. What is in it is run as
        code, so nobody else may be able to write there.

    Raises
    ------
    PermissionError
        On POSIX, where the directory or anything in it belongs to another user or can be written
        by others, or where anybody can replace one of its parents. Nothing is set then.
    """
    global compilation_cache
    compilation_cache = os.fspath(private_directory(path))
    jax.config.update("jax_compilation_cache_dir", compilation_cache)
    # Ours are many small programs; by default only slow and large ones are kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
