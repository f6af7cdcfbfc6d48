"""One shard's pass over its chunks: slice the cells, solve or measure the rows, write the slots.

Pure functions for one device. Trip counts and offsets are traced, so that one program serves a
rung of either side, of any data and of any parameter values.

Axis letters: S slots of the shard, R rows of a chunk, L padded length, K factors, J long rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from tpu_als import solve
from tpu_als.solve import Block, Fixed, Objective


class Own(NamedTuple):
    """What a shard owns of one orientation (`layout.Cells`, without the shard axis)."""

    ids: Array
    values: Array
    lengths: Array
    long_cells: Array


class Span(NamedTuple):
    """Where a rung, or the long rows, lie: first cell, first slot, chunks or rows; traced."""

    first_cell: Any
    first_slot: Any
    count: Any


class Shape(NamedTuple):
    """What is compiled in; hashable.

    The solver and its numbers, the shape of a chunk, whether no weight w is negative, and whether
    rows are long.
    """

    solver: str
    steps: int
    block_size: int
    dtype: str
    rows: int
    length: int
    positive: bool
    long: bool = False


class Shared(NamedTuple):
    """What all shards read; a span for each of the program's shapes."""

    fixed: Fixed
    objective: Objective
    spans: tuple[Span, ...]


def _cells(shape: Shape, own: Own, first: Any, rows: int) -> tuple[Array, Array]:
    size = (rows, shape.length)
    ids = lax.dynamic_slice(own.ids, (first,), (rows * shape.length,)).reshape(size)
    values = lax.dynamic_slice(own.values, (first,), (rows * shape.length,)).reshape(size)
    return ids, values.astype(shape.dtype)


def _chunk(
    shape: Shape, span: Span, own: Own, shared: Shared, step: Any
) -> tuple[Any, Array, Block]:
    """First slot, lengths (R,) and gathered block of chunk `step` of the rung."""
    first = span.first_cell + step * shape.rows * shape.length
    slot = span.first_slot + step * shape.rows
    lengths = lax.dynamic_slice(own.lengths, (slot,), (shape.rows,))
    ids, values = _cells(shape, own, first, shape.rows)
    dtype = jnp.dtype(shape.dtype)
    block = solve.gather(shared.fixed, shared.objective, ids, values, lengths, dtype)
    return slot, lengths, block


def solve_block(
    shape: Shape, fixed: Fixed, objective: Objective, block: Block, lengths: Array, z: Array
) -> Array:
    """Solve rows (R, K) whose entries are in one block.

    `z` is where the iterative solvers start, in the eigenbasis; the result is in the caller's.
    """
    d = solve.diagonal(fixed, objective, lengths)
    if shape.solver == "cholesky":
        z = solve.rows_exact(block, d, shape.positive)
    elif shape.solver == "subspace":
        z = solve.rows_subspace(block, d, z, shape.block_size)
    else:
        z = solve.rows_cg(
            lambda p: solve.normal(block, p),
            lambda p: solve.curvature(block, p),
            solve.residual(block, z), z, d, shape.steps,
        )  # fmt: skip
    return finish(fixed, lengths, z)


def finish(fixed: Fixed, lengths: Array, z: Array) -> Array:
    """Bring solved rows (R, K) back to the caller's basis; rows without entries are zero."""
    return solve.zero_empty(solve.rotate(z, fixed.rotation.T), lengths)


def solve_rungs(shapes: tuple[Shape, ...], out: Array, own: Own, shared: Shared) -> Array:
    """Solve all rows of some rungs into the shard's table `out` (S, K)."""
    for shape, span in zip(shapes, shared.spans, strict=True):
        out = (_solve_long if shape.long else _solve_rung)(shape, span, out, own, shared)
    return out


def _solve_rung(shape: Shape, span: Span, out: Array, own: Own, shared: Shared) -> Array:

    def body(step: Any, out: Array) -> Array:
        slot, lengths, block = _chunk(shape, span, own, shared, step)
        z = lax.dynamic_slice_in_dim(out, slot, shape.rows).astype(shape.dtype)
        z = solve_block(shape, shared.fixed, shared.objective, block, lengths, z)
        return lax.dynamic_update_slice_in_dim(out, z.astype(out.dtype), slot, 0)

    return lax.fori_loop(0, span.count, body, out)


def _over_blocks(
    shape: Shape,
    span: Span,
    own: Own,
    shared: Shared,
    row: Any,
    part: Callable[[Block], Any],
    zero: Any,
) -> Any:
    """Sum `part` over the blocks of one long row, which never stand in memory together."""
    slot = span.first_slot + row
    length = lax.dynamic_slice(own.lengths, (slot,), (1,))
    first = own.long_cells[row]

    def body(step: Any, total: Any) -> Any:
        ids, values = _cells(shape, own, first + step * shape.length, 1)
        left = length - step * shape.length
        block = solve.gather(
            shared.fixed, shared.objective, ids, values, left, jnp.dtype(shape.dtype)
        )
        more = part(block)
        if isinstance(total, tuple):
            return tuple(a + b for a, b in zip(total, more, strict=True))
        return total + more

    blocks = (length[0] + shape.length - 1) // shape.length
    return lax.fori_loop(0, blocks, body, zero)


def _solve_long(shape: Shape, span: Span, out: Array, own: Own, shared: Shared) -> Array:
    """Solve the shard's long rows, one by one."""
    factors = out.shape[1]
    vector = jnp.zeros((1, factors), shape.dtype)

    def body(row: Any, out: Array) -> Array:
        slot = span.first_slot + row
        lengths = lax.dynamic_slice(own.lengths, (slot,), (1,))
        z = lax.dynamic_slice_in_dim(out, slot, 1).astype(shape.dtype)

        def over(part: Callable[[Block], Any], zero: Any) -> Any:
            return _over_blocks(shape, span, own, shared, row, part, zero)

        d = solve.diagonal(shared.fixed, shared.objective, lengths)
        if shape.solver == "cholesky":
            zero = jnp.zeros((1, factors, factors), shape.dtype)
            z = solve.rows_direct(over(solve.accumulate, (zero, vector)), d)
        else:
            # Also for "subspace": its predictions of a row of any length would have to be kept.
            r = over(lambda block: solve.residual(block, z), vector)
            z = solve.rows_cg(
                lambda p: over(lambda block: solve.normal(block, p), vector),
                lambda p: over(lambda block: solve.curvature(block, p), vector[:, :1]),
                r, z, d, shape.steps,
            )  # fmt: skip
        z = finish(shared.fixed, lengths, z).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, z, slot, 0)

    return lax.fori_loop(0, span.count, body, out)


class Measured(NamedTuple):
    """What a shard reads to measure its loss: its entries and its own table (S, K)."""

    own: Own
    table: Array


def loss_rungs(shapes: tuple[Shape, ...], out: Array, own: Measured, shared: Shared) -> Array:
    """Write what the stored cells of each row of some rungs add to the loss into `out` (S,)."""
    for shape, span in zip(shapes, shared.spans, strict=True):
        out = (_loss_long if shape.long else _loss_rung)(shape, span, out, own, shared)
    return out


def _loss_rung(shape: Shape, span: Span, out: Array, measured: Measured, shared: Shared) -> Array:

    def body(step: Any, out: Array) -> Array:
        slot, _, block = _chunk(shape, span, measured.own, shared, step)
        z = lax.dynamic_slice_in_dim(measured.table, slot, shape.rows)
        part = solve.cells_loss(block, z.astype(shape.dtype))
        return lax.dynamic_update_slice(out, part, (slot,))

    return lax.fori_loop(0, span.count, body, out)


def _loss_long(shape: Shape, span: Span, out: Array, measured: Measured, shared: Shared) -> Array:

    def body(row: Any, out: Array) -> Array:
        slot = span.first_slot + row
        z = lax.dynamic_slice_in_dim(measured.table, slot, 1)
        z = z.astype(shape.dtype)
        part = _over_blocks(
            shape, span, measured.own, shared, row,
            lambda block: solve.cells_loss(block, z), jnp.zeros(1, shape.dtype),
        )  # fmt: skip
        return lax.dynamic_update_slice(out, part, (slot,))

    return lax.fori_loop(0, span.count, body, out)
