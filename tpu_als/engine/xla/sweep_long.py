"""Process the long rows of one shard: their entries are in blocks, whose sums are added.

Pure functions for one device. Axis letters: R blocks that are in memory together, L cells of a
block, K factors, J long rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from tpu_als.engine.cells import LongRows
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import solve
from tpu_als.engine.xla.programs import PyTree
from tpu_als.engine.xla.solve import Cells, Operator
from tpu_als.engine.xla.sweep import Index, SharedInputs, Static, finish, shifted

_Sums = TypeVar("_Sums")  # arrays with a leading axis of long rows


class LongInputs(NamedTuple):
    """What long rows are solved from: the rows, and the shard's priors (S, K) or None."""

    long: Any
    priors: Any = None


class LongBatch(NamedTuple):
    """A batch of long rows: its number, all long rows, and the source table."""

    number: Index
    long: LongRows
    source_table: Array


class LongBlocks(NamedTuple):
    """Several blocks of a batch of long rows.

    Attributes
    ----------
    block : Block, or that of the device's products
        Their entries, R blocks of L cells.
    rows : int32 array (R,)
        Row of each block, counted within the batch.
    n_entries : int32 array (R,)
        Entries of each block; 0 if the block is of another batch or was already added.
    """

    block: Any
    rows: Array
    n_entries: Array


def sum_over_blocks(
    static: Static,
    batch: LongBatch,
    objective: Objective,
    function: Callable[[LongBlocks], _Sums],
    zero: _Sums,
) -> _Sums:
    """Sum function(blocks) over the blocks of each row of a batch, and the shards.

    Only `static.rows` blocks are in memory at a time. function(blocks) returns arrays with a
    leading axis of blocks; `zero` and the returned sums have a leading axis of rows. Sums over
    steps are compensated (Knuth's two-sum), so that their error does not grow with their length.
    """
    dtype, long = jnp.dtype(static.dtype), batch.long
    size = min(static.rows, long.ids.shape[0])
    first, last = long.starts[batch.number], long.starts[batch.number + 1]

    def body(step: int, sums: PyTree) -> PyTree:
        start = first + step * size
        low = jnp.minimum(start, long.ids.shape[0] - size)  # a slice does not cross the end
        at = low + jnp.arange(size, dtype=jnp.int32)
        sliced = (
            lax.dynamic_slice_in_dim(array, low, size)
            for array in (long.ids, long.values, long.n_entries, long.rows)
            if array is not None
        )
        *cells, n_entries, rows = sliced
        n_entries = jnp.where((at >= start) & (at < last), n_entries, 0)
        read = Cells(cells[0], cells[1] if len(cells) > 1 else None, n_entries)
        block = static.products.gather(batch.source_table, objective, read, dtype)
        found = function(LongBlocks(block, rows, n_entries))
        return jax.tree.map(lambda total, more: _add_to_rows(total, more, rows), sums, found)

    pairs = jax.tree.map(lambda array: jnp.zeros((2, *array.shape), array.dtype), zero)
    pairs = lax.fori_loop(0, (last - first + size - 1) // size, body, pairs)
    return static.collectives.sum(jax.tree.map(lambda pair: pair[0] + pair[1], pairs))


def _add_to_rows(total: Array, more: Array, rows: Array) -> Array:
    """Add values (R, ...) to rows of a sum total[0]; total[1] has the sum of rounding errors."""
    old, lost = total
    values = more.reshape(len(rows), -1)
    is_row = (rows[None, :] == jnp.arange(len(old), dtype=jnp.int32)[:, None]).astype(more.dtype)
    # In a product, a value that is not finite would make the sums of all rows NaN.
    is_finite = jnp.isfinite(values)
    added = jnp.matmul(is_row, jnp.where(is_finite, values, 0), precision=solve.PRECISION)
    fails = is_row @ jnp.any(~is_finite, axis=1, keepdims=True).astype(more.dtype) > 0
    more = jnp.where(fails, jnp.nan, added).reshape(old.shape)
    new = old + more
    rounded = new - old
    return jnp.stack([new, lost + ((old - (new - rounded)) + (more - rounded))])


def batch_rows(
    static: Static, long: LongRows, table: Array, batch: Index
) -> tuple[Array, Array, Array]:
    """Slots and lengths of a batch of J long rows, and their rows (J, K) of a table."""
    slots, lengths = (
        lax.dynamic_slice_in_dim(array, batch * long.batch_rows, long.batch_rows)
        for array in (long.slots, long.lengths)
    )
    rows = table.at[slots].get(mode="fill", fill_value=0).astype(static.dtype)
    return slots, lengths, static.collectives.sum(rows)


def solve_long(
    static: Static, out: Array, inputs: LongInputs, source_table: Array, shared: SharedInputs
) -> Array:
    """Solve the long rows, a batch at a time; the shards' sums over their entries are added."""
    objective, basis, products = shared.objective, shared.basis, static.products
    long, priors = inputs

    def body(number: int, out: Array) -> Array:
        slots, lengths, before = batch_rows(static, long, out, number)
        batch, vector = LongBatch(number, long, source_table), jnp.zeros_like(before)

        def take(p: Array, rows: Array) -> Array:
            return p.at[rows].get(mode="promise_in_bounds")

        def summed(function: Callable[[Any, Array], _Sums], zero: _Sums) -> _Sums:
            def scaled(blocks: LongBlocks) -> _Sums:
                block = solve.scale_weights(blocks.block, take(scale, blocks.rows))
                if drawn is not None:
                    block = shifted(static, block, take(drawn, blocks.rows))
                return function(block, blocks.rows)

            return sum_over_blocks(static, batch, objective, scaled, zero)

        d = solve.diagonal(basis, objective, lengths)
        z, drawn = solve.initial_rows(before, d, shared.weight, basis), None
        if priors is not None:
            prior = batch_rows(static, long, priors, number)[2]
            drawn = solve.drawn_to(prior, d, objective, lengths, basis)
            z = z - drawn
        scale = solve.equation_scale(d, shared.weight)
        d = d * scale
        if static.solver == "diagonal":
            z = solve.rows_diagonal(summed(lambda b, _: products.project(b, b.v), vector), d)
        elif static.solver == "cholesky":
            matrix = jnp.zeros((*z.shape, z.shape[1]), static.dtype)
            parts = summed(lambda b, _: solve.accumulate(b), (matrix, vector))
            z = solve.rows_direct(parts, d)
        else:
            r = summed(lambda b, rows: products.residual(b, take(z, rows)), vector)
            operator = Operator(
                lambda p: summed(lambda b, rows: products.normal(b, take(p, rows)), vector),
                lambda p: summed(
                    lambda b, rows: products.curvature(b, take(p, rows))[:, :1], vector[:, :1]
                ),
            )
            z = solve.rows_cg(operator, r, z, d, static.steps)
        z = z if drawn is None else z + drawn
        z = finish(basis, lengths, solve.relax(before, z, shared.relaxation))
        return out.at[slots].set(solve.rounded(z, out.dtype), mode="drop")

    return lax.fori_loop(0, shared.spans[0].n_chunks, body, out)
