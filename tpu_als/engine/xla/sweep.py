"""One shard's pass over its chunks: slice the cells, solve or measure the rows, write the slots.

Pure functions for one device. Trip counts and offsets are traced, so that the same program works
for a rung of either side, for any data and any parameter values.

Axis letters: S slots of the shard, R rows of a chunk, L padded length, K factors, J long rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from tpu_als.engine.cells import LONG_ROWS, Long
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import exchange, solve
from tpu_als.engine.xla.exchange import Route
from tpu_als.engine.xla.mesh import Together
from tpu_als.engine.xla.solve import Basis, Block


class Own(NamedTuple):
    """The cells of a shard in one orientation, without long rows.

    Attributes
    ----------
    ids : int32 array (cells,)
        Source row of each cell; with an exchange, its position among the rows received for its
        group.
    values : array (cells,) or None
        Stored values; None where all are 1.
    lengths : int32 array (S,)
        Entries of each slot's row.
    sends : int32 array
        The rows to send to each shard; empty without an exchange.
    """

    ids: Any
    values: Any
    lengths: Any
    sends: Any


class Span(NamedTuple):
    """A rung's first cell, first slot, first send, and number of chunks; traced.

    For long rows only the count is used: the number of batches.
    """

    first_cell: Any
    first_slot: Any
    first_send: Any
    count: Any


class Shape(NamedTuple):
    """The static arguments of a program; hashable.

    The solver and its numbers, the shape of a chunk, whether all weights w are nonnegative, the
    operations across shards, and the route by which source rows are received, if any.
    """

    solver: str
    steps: int
    dtype: str
    rows: int
    length: int
    positive: bool
    together: Together = Together()
    route: Route | None = None


class Shared(NamedTuple):
    """Inputs shared by all shards: `weight` bounds all weights w; one span for each shape."""

    basis: Basis
    objective: Objective
    relaxation: Any
    weight: Any
    spans: tuple[Span, ...]


Body = Callable[[Any, Array, Array], Array]


def _over_chunks(shape: Shape, span: Span, own: Own, held: Array, body: Body, out: Array) -> Array:
    """Fold body(step, source, out) over a rung's chunks; source rows are received per group."""
    route, axis = shape.route, shape.together.axis
    if route is None:
        return lax.fori_loop(0, span.count, lambda step, out: body(step, held, out), out)
    assert axis is not None

    def group(number: Any, out: Array) -> Array:
        first = span.first_send + number * route.rows * lax.axis_size(axis)
        source = exchange.receive(held, own.sends, first, route.rows, axis)
        low = number * route.chunks
        high = jnp.minimum(low + route.chunks, span.count)
        return lax.fori_loop(low, high, lambda step, out: body(step, source, out), out)

    groups = (span.count + route.chunks - 1) // route.chunks
    return lax.fori_loop(0, groups, group, out)


def _chunk(
    shape: Shape, span: Span, own: Own, source: Array, objective: Objective, step: Any
) -> tuple[Any, Array, Block]:
    """First slot, lengths (R,) and gathered block of chunk `step` of the rung."""
    size = shape.rows * shape.length
    first = span.first_cell + step * size
    slot = span.first_slot + step * shape.rows
    lengths = lax.dynamic_slice(own.lengths, (slot,), (shape.rows,))
    ids, values = jax.tree.map(
        lambda each: lax.dynamic_slice(each, (first,), (size,)).reshape(shape.rows, shape.length),
        (own.ids, own.values),
    )
    dtype = jnp.dtype(shape.dtype)
    return slot, lengths, solve.gather(source, objective, ids, values, lengths, dtype)


def solve_block(
    shape: Shape,
    basis: Basis,
    objective: Objective,
    block: Block,
    lengths: Array,
    z: Array,
    relaxation: Any = None,
) -> Array:
    """Solve rows (R, K) whose entries are in one block.

    `z` is the start of the iterative solvers, in the eigenbasis; the result is in the caller's.
    """
    d, before, weight = solve.diagonal(basis, objective, lengths), z, solve.largest_weight(block)
    z = solve.begin(z, d, weight, basis)
    scale = solve.scale(d, weight)
    d, block = d * scale, solve.times(block, scale)
    if shape.solver == "diagonal":
        z = solve.rows_diagonal(solve.project(block, block.v), d)
    elif shape.solver == "cholesky":
        z = solve.rows_exact(block, d, shape.positive)
    else:
        z = solve.rows_cg(
            lambda p: solve.normal(block, p),
            lambda p: solve.curvature(block, p),
            solve.residual(block, z), z, d, shape.steps,
        )  # fmt: skip
    return finish(basis, lengths, z if relaxation is None else solve.relax(before, z, relaxation))


def finish(basis: Basis, lengths: Array, z: Array) -> Array:
    """Bring solved rows (R, K) back to the caller's basis; rows without entries are zero."""
    return solve.zero_empty(solve.rotate(z, basis.rotation.T), lengths)


def solve_rungs(
    shapes: tuple[Shape, ...], out: Array, own: Own, held: Array, shared: Shared
) -> Array:
    """Solve all rows of some rungs into the shard's table `out` (S, K)."""
    for shape, span in zip(shapes, shared.spans, strict=True):
        out = _solve_rung(shape, span, out, own, held, shared)
    return out


def _solve_rung(
    shape: Shape, span: Span, out: Array, own: Own, held: Array, shared: Shared
) -> Array:
    def body(step: Any, source: Array, out: Array) -> Array:
        slot, lengths, block = _chunk(shape, span, own, source, shared.objective, step)
        z = lax.dynamic_slice_in_dim(out, slot, shape.rows).astype(shape.dtype)
        z = solve_block(shape, shared.basis, shared.objective, block, lengths, z, shared.relaxation)
        return lax.dynamic_update_slice_in_dim(out, solve.rounded(z, out.dtype), slot, 0)

    return _over_chunks(shape, span, own, held, body, out)


def _over_blocks(
    shape: Shape,
    long: Long,
    held: Array,
    objective: Objective,
    batch: Any,
    part: Callable[[Block, Any, Array], Any],
    zero: Any,
) -> Any:
    """Sum part(block, row, left) of each row of a batch over its blocks, and over the shards.

    Only one block is in memory at a time. `zero` and the result have a leading axis of rows. Sums
    are compensated (Knuth's two-sum), so that their error does not grow with their length.
    """
    dtype = jnp.dtype(shape.dtype)

    def body(step: Any, sums: Any) -> Any:
        ids, values, left = jax.tree.map(
            lambda each: lax.dynamic_slice_in_dim(each, step, 1),
            (long.ids, long.values, long.left),
        )
        block = solve.gather(held, objective, ids, values, left, dtype)
        row = long.rows[step]

        def add(total: Array, more: Array) -> Array:
            """Add to a row of total[0]; total[1] has the sum of the rounding errors."""
            old, lost = lax.dynamic_slice_in_dim(total, row, 1, 1)
            new = old + more
            added = new - old
            lost = lost + ((old - (new - added)) + (more - added))
            return lax.dynamic_update_slice_in_dim(total, jnp.stack([new, lost]), row, 1)

        return jax.tree.map(add, sums, part(block, row, left))

    pairs = jax.tree.map(lambda each: jnp.zeros((2, *each.shape), each.dtype), zero)
    pairs = lax.fori_loop(long.starts[batch], long.starts[batch + 1], body, pairs)
    return shape.together.total(jax.tree.map(lambda pair: pair[0] + pair[1], pairs))


def _batch(shape: Shape, long: Long, table: Array, batch: Any) -> tuple[Array, Array, Array]:
    """Slots and lengths of a batch of long rows, and their rows (LONG_ROWS, K) of a table."""
    slots, lengths = (
        lax.dynamic_slice_in_dim(each, batch * LONG_ROWS, LONG_ROWS)
        for each in (long.slots, long.lengths)
    )
    rows = table.at[slots].get(mode="fill", fill_value=0).astype(shape.dtype)
    return slots, lengths, shape.together.total(rows)


def solve_long(shape: Shape, out: Array, long: Long, held: Array, shared: Shared) -> Array:
    """Solve the long rows, a batch at a time; the shards' sums over their entries are added."""
    rows = LONG_ROWS
    objective, basis = shared.objective, shared.basis

    def body(batch: Any, out: Array) -> Array:
        slots, lengths, z = _batch(shape, long, out, batch)
        vector = jnp.zeros_like(z)

        def of(p: Array, row: Any) -> Array:
            return lax.dynamic_slice_in_dim(p, row, 1)

        def over(part: Callable[[Block, Any], Any], zero: Any) -> Any:
            each = lambda block, row, _: part(solve.times(block, of(scale, row)), row)  # noqa: E731
            return _over_blocks(shape, long, held, objective, batch, each, zero)

        d, before = solve.diagonal(basis, objective, lengths), z
        z = solve.begin(z, d, shared.weight, basis)
        scale = solve.scale(d, shared.weight)
        d = d * scale
        if shape.solver == "diagonal":
            z = solve.rows_diagonal(over(lambda b, _: solve.project(b, b.v), vector), d)
        elif shape.solver == "cholesky":
            zero = jnp.zeros((rows, z.shape[1], z.shape[1]), shape.dtype)
            z = solve.rows_direct(over(lambda b, _: solve.accumulate(b), (zero, vector)), d)
        else:
            r = over(lambda b, row: solve.residual(b, of(z, row)), vector)
            z = solve.rows_cg(
                lambda p: over(lambda b, row: solve.normal(b, of(p, row)), vector),
                lambda p: over(lambda b, row: solve.curvature(b, of(p, row)), vector[:, :1]),
                r, z, d, shape.steps,
            )  # fmt: skip
        z = finish(basis, lengths, solve.relax(before, z, shared.relaxation))
        return out.at[slots].set(solve.rounded(z, out.dtype), mode="drop")

    return lax.fori_loop(0, shared.spans[0].count, body, out)


class Measured(NamedTuple):
    """Inputs of a shard's loss: its entries and its own table (S, K)."""

    own: Any
    table: Array


def _without_offset(objective: Objective) -> tuple[Objective, Any]:
    """The objective with weights w = abs(c), for `solve.cells_loss`, and its original offset."""
    return objective._replace(offset=jnp.zeros_like(objective.offset)), objective.offset


def loss_rungs(
    shapes: tuple[Shape, ...], out: Array, measured: Measured, held: Array, shared: Shared
) -> Array:
    """Write the loss of the stored cells of each row of some rungs into `out` (S,)."""
    for shape, span in zip(shapes, shared.spans, strict=True):
        out = _loss_rung(shape, span, out, measured, held, shared)
    return out


def _loss_rung(
    shape: Shape, span: Span, out: Array, measured: Measured, held: Array, shared: Shared
) -> Array:
    objective, offset = _without_offset(shared.objective)

    def body(step: Any, source: Array, out: Array) -> Array:
        slot, lengths, block = _chunk(shape, span, measured.own, source, objective, step)
        z = lax.dynamic_slice_in_dim(measured.table, slot, shape.rows).astype(shape.dtype)
        live = solve.entries_of(block.w.shape, lengths)
        part = solve.cells_loss(block, z, live, offset)
        return lax.dynamic_update_slice(out, part, (slot,))

    return _over_chunks(shape, span, measured.own, held, body, out)


def loss_long(shape: Shape, out: Array, measured: Measured, held: Array, shared: Shared) -> Array:
    """Likewise for the long rows."""
    long = measured.own
    objective, offset = _without_offset(shared.objective)

    def body(batch: Any, out: Array) -> Array:
        slots, _, z = _batch(shape, long, measured.table, batch)

        def part(block: Block, row: Any, left: Array) -> Array:
            live = solve.entries_of(block.w.shape, left)
            return solve.cells_loss(block, lax.dynamic_slice_in_dim(z, row, 1), live, offset)

        sums = _over_blocks(
            shape, long, held, objective, batch, part, jnp.zeros(LONG_ROWS, shape.dtype)
        )
        return out.at[slots].set(sums, mode="drop")

    return lax.fori_loop(0, shared.spans[0].count, body, out)
