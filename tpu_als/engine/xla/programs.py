"""Compiled programs for one shard or for all shards, and their caches.

A program depends only on static arguments, on the mesh and on shapes of arrays. So a cached program
saves a later fit the compilation, and does not change its result.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tpu_als.engine import compilation_cache
from tpu_als.host import give_back_memory

AXIS = "shards"  # name of the mesh axis
_PIECE_ROWS = 1 << 13  # rows of a table that `join` changes at once
_compiled: set[Any] = set()  # compiled programs with the shapes of their arguments
_jitted: list[Any] = []  # what `whole` and `each` have made
# Bound on compiled programs, one for each set of shapes. Each has about 4 MB; a fit has up to 40.
MOST_PROGRAMS = 200


compilation_cache.apply_to_jax()


@dataclass(frozen=True)
class Together:
    """Operations of a compiled program across shards; on a single device it has all shards.

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
        """The parts of an array that this program has: all shards, or only the device's own."""
        return own if self.axis is None else [own]

    def join(self, own: Any, change: Callable[[jax.Array], jax.Array] = lambda rows: rows) -> Any:
        """Apply `change` to the rows of this program's shards, and concatenate the results.

        On a single device this is done in pieces, into one array: a concatenation of whole changed
        shards would need twice the memory.
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
        """The rows of a source table that a half-epoch reads: all rows, or only the device's."""
        if self.axis is None or self.sharded:
            return rows
        return jax.lax.all_gather(rows, self.axis, tiled=True)


def _write(
    rows: jax.Array, part: jax.Array, low: int, change: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Change a part piece by piece, and write it into `rows`, starting at row `low`."""
    # The largest power of two that divides the length. `layout.round_up` makes sure it is large.
    size = min(len(part) & -len(part), _PIECE_ROWS)

    def piece(step: Any, rows: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_slice_in_dim(part, step * size, size)
        return jax.lax.dynamic_update_slice_in_dim(rows, change(own), low + step * size, 0)

    return jax.lax.fori_loop(0, len(part) // size, piece, rows)


@functools.cache
def whole(
    fn: Callable[..., Any], static: Any, mesh: Mesh | None, together: Together
) -> Callable[..., Any]:
    """See `Workplace.whole`."""
    if mesh is None:
        return _known(jax.jit(functools.partial(fn, static, together)))

    def local(own: Any, shared: Any) -> Any:
        everywhere, held, own = fn(static, together, _first(own), shared)
        held = held[None] if together.sharded and held is not None else held
        return everywhere, held, jax.tree.map(lambda part: part[None], own)

    own, everywhere = PartitionSpec(AXIS), PartitionSpec()
    held = own if together.sharded else everywhere
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(own, everywhere),
        out_specs=(everywhere, held, own),
        check_vma=False,
    )
    return _known(jax.jit(mapped))


@functools.cache
def each(
    fn: Callable[..., Any], static: Any, mesh: Mesh | None, together: Together, platform: str
) -> Callable[..., Any]:
    """See `Workplace.each`."""
    options = _compiler_options(platform)
    if mesh is None:
        alone = functools.partial(fn, static)
        return _known(jax.jit(alone, donate_argnums=0, compiler_options=options))

    def local(out: Any, own: Any, held: Any, shared: Any) -> Any:
        held = held[0] if together.sharded else held
        return fn(static, out[0], _first(own), held, shared)[None]

    own, everywhere = PartitionSpec(AXIS), PartitionSpec()
    held = own if together.sharded else everywhere
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(own, own, held, everywhere), out_specs=own, check_vma=False
    )
    return _known(jax.jit(mapped, donate_argnums=0, compiler_options=options))


def compile_new(
    calls: Iterable[tuple[Any, tuple[Any, ...]]],
    dtype: str,
    run_all: Callable[[Callable[[Any], Any], Sequence[Any]], Any],
) -> None:
    """Compile programs that were not compiled for such arguments yet; `run_all` maps over them."""
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

    if new and count() + len(new) > MOST_PROGRAMS:
        forget()
    run_all(work, list(new))
    if new:
        give_back_memory()


def _known(program: Callable[..., Any]) -> Callable[..., Any]:
    _jitted.append(program)
    return program


def count() -> int:
    """How many compiled programs are kept, counted with the shapes of their arguments."""
    return sum(program._cache_size() for program in _jitted)


def forget() -> None:
    """Drop all compiled programs. A program that is running stays until it has finished.

    Matrices of ever new shapes would otherwise fill the memory: each has programs of its own.
    """
    whole.cache_clear()
    each.cache_clear()
    _jitted.clear()
    _compiled.clear()


def _first(own: Any) -> Any:
    """A device's part of each array, without the axis of shards."""
    return jax.tree.map(lambda part: part[0], own)


def _compiler_options(platform: str) -> dict[str, Any] | None:
    """Options for loops over chunks on CPU, where LLVM's level 2 gives faster code than level 3."""
    return {"xla_backend_optimization_level": 2} if platform == "cpu" else None


def precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Context that enables this dtype: 64-bit types are disabled in JAX by default."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
