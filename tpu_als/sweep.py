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
    """Where a rung lies: first cell, first slot, chunks (or long rows) to work on; traced."""

    first_cell: Any
    first_slot: Any
    count: Any


class Shape(NamedTuple):
    """What is compiled in: the solver and the shape of a chunk. Hashable."""

    solver: str
    steps: int
    block_size: int
    dtype: str
    rows: int
    length: int


class Shared(NamedTuple):
    """What all shards read."""

    fixed: Fixed
    objective: Objective
    span: Span


def _cells(shape: Shape, own: Own, first: Any, rows: int) -> tuple[Array, Array]:
    size = (rows, shape.length)
    ids = lax.dynamic_slice(own.ids, (first,), (rows * shape.length,)).reshape(size)
    values = lax.dynamic_slice(own.values, (first,), (rows * shape.length,)).reshape(size)
    return ids, values.astype(shape.dtype)


def _chunk(shape: Shape, own: Own, shared: Shared, step: Any) -> tuple[Any, Array, Block]:
    """First slot, lengths (R,) and gathered block of chunk `step` of the rung."""
    span = shared.span
    first = span.first_cell + step * shape.rows * shape.length
    slot = span.first_slot + step * shape.rows
    lengths = lax.dynamic_slice(own.lengths, (slot,), (shape.rows,))
    ids, values = _cells(shape, own, first, shape.rows)
    block = solve.gather(shared.fixed, shared.objective, ids, values, lengths, jnp.dtype(shape.dtype))
    return slot, lengths, block


def solve_block(
    shape: Shape, fixed: Fixed, objective: Objective, block: Block, lengths: Array, z: Array
) -> Array:
    """Solve rows (R, K) whose entries are gathered in one block; `z` is where CG starts."""
    if shape.solver == "cholesky":
        z = solve.rows_direct(solve.accumulate(block), fixed, objective, lengths)
    else:
        z = solve.rows_cg(
            lambda p: solve.normal(block, p),
            lambda z: solve.residual(block, z),
            z, fixed, objective, lengths, shape.steps,
        )  # fmt: skip
    return solve.zero_empty(z, lengths)


def solve_rung(shape: Shape, out: Array, own: Own, shared: Shared) -> Array:
    """Solve all rows of a rung into the shard's table `out` (S, K)."""

    def body(step: Any, out: Array) -> Array:
        slot, lengths, block = _chunk(shape, own, shared, step)
        z = lax.dynamic_slice_in_dim(out, slot, shape.rows).astype(shape.dtype)
        z = solve_block(shape, shared.fixed, shared.objective, block, lengths, z)
        return lax.dynamic_update_slice_in_dim(out, z.astype(out.dtype), slot, 0)

    return lax.fori_loop(0, shared.span.count, body, out)


def _over_blocks(
    shape: Shape, own: Own, shared: Shared, row: Any, part: Callable[[Block], Any], zero: Any
) -> Any:
    """Sum `part` over the blocks of one long row, which never stand in memory together."""
    slot = shared.span.first_slot + row
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


def solve_long(shape: Shape, out: Array, own: Own, shared: Shared) -> Array:
    """Solve the shard's long rows, one by one, into its table `out` (S, K)."""
    factors = out.shape[1]
    vector = jnp.zeros((1, factors), shape.dtype)

    def body(row: Any, out: Array) -> Array:
        slot = shared.span.first_slot + row
        lengths = lax.dynamic_slice(own.lengths, (slot,), (1,))
        z = lax.dynamic_slice_in_dim(out, slot, 1).astype(shape.dtype)

        def over(part: Callable[[Block], Any], zero: Any) -> Any:
            return _over_blocks(shape, own, shared, row, part, zero)

        if shape.solver == "cholesky":
            parts = over(solve.accumulate, (jnp.zeros((1, factors, factors), shape.dtype), vector))
            z = solve.rows_direct(parts, shared.fixed, shared.objective, lengths)
        else:
            z = solve.rows_cg(
                lambda p: over(lambda block: solve.normal(block, p), vector),
                lambda z: over(lambda block: solve.residual(block, z), vector),
                z, shared.fixed, shared.objective, lengths, shape.steps,
            )  # fmt: skip
        z = solve.zero_empty(z, lengths).astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(out, z, slot, 0)

    return lax.fori_loop(0, shared.span.count, body, out)


class Measured(NamedTuple):
    """What a shard reads to measure its loss: its entries and its own table (S, K)."""

    own: Own
    table: Array


def loss_rung(shape: Shape, out: Array, measured: Measured, shared: Shared) -> Array:
    """Write the loss of the stored cells of each row of a rung into `out` (S,)."""

    def body(step: Any, out: Array) -> Array:
        slot, _, block = _chunk(shape, measured.own, shared, step)
        z = lax.dynamic_slice_in_dim(measured.table, slot, shape.rows)
        part = solve.cells_loss(block, z.astype(shape.dtype))
        return lax.dynamic_update_slice(out, part, (slot,))

    return lax.fori_loop(0, shared.span.count, body, out)


def loss_long(shape: Shape, out: Array, measured: Measured, shared: Shared) -> Array:
    """Write the loss of the stored cells of each long row into `out` (S,)."""

    def body(row: Any, out: Array) -> Array:
        slot = shared.span.first_slot + row
        z = lax.dynamic_slice_in_dim(measured.table, slot, 1)
        z = z.astype(shape.dtype)
        part = _over_blocks(
            shape, measured.own, shared, row,
            lambda block: solve.cells_loss(block, z), jnp.zeros(1, shape.dtype),
        )  # fmt: skip
        return lax.dynamic_update_slice(out, part, (slot,))

    return lax.fori_loop(0, shared.span.count, body, out)
