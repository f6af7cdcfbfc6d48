"""The loss of the stored cells of one shard, row by row: chunks are read as in `sweep`.

Axis letters: S slots of the shard, R rows of a chunk, L padded length, K factors.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from tpu_als.engine.cells import LongRows
from tpu_als.engine.objective import without_offset
from tpu_als.engine.xla import solve
from tpu_als.engine.xla.sweep import (
    ShardCells,
    SharedInputs,
    Span,
    Static,
    gather_chunk,
    over_chunks,
)
from tpu_als.engine.xla.sweep_long import LongBatch, LongBlocks, batch_rows, sum_over_blocks


class LossInputs(NamedTuple):
    """Inputs of a shard's loss: its cells, and its part (S, K) of the target table."""

    cells: ShardCells
    table: Array


class LongLossInputs(NamedTuple):
    """Inputs of the loss of long rows: the rows, and the shard's part of the target table."""

    long: LongRows
    table: Array


def loss_rungs(
    statics: tuple[Static, ...],
    out: Array,
    inputs: LossInputs,
    source_table: Array,
    shared: SharedInputs,
) -> Array:
    """Write the loss of the stored cells of each row of some rungs into `out` (S,)."""
    objective, offset = without_offset(shared.objective), shared.objective.offset

    def body(rung: tuple[Static, Span], step: int, source_rows: Array, out: Array) -> Array:
        static, span = rung
        slot, lengths, block = gather_chunk(
            static, span, inputs.cells, source_rows, objective, step
        )
        z = lax.dynamic_slice_in_dim(inputs.table, slot, static.rows).astype(static.dtype)
        is_entry = solve.entry_mask(block.w.shape, lengths)
        loss = solve.cells_loss(block, static.products.predict(block, z), is_entry, offset)
        return lax.dynamic_update_slice(out, loss, (slot,))

    rungs = tuple(zip(statics, shared.spans, strict=True))
    return over_chunks(rungs, inputs.cells, source_table, body, out)


def loss_long(
    static: Static, out: Array, inputs: LongLossInputs, source_table: Array, shared: SharedInputs
) -> Array:
    """Write the loss of the stored cells of each long row into `out` (S,)."""
    objective, offset = without_offset(shared.objective), shared.objective.offset

    def body(number: int, out: Array) -> Array:
        batch = LongBatch(number, inputs.long, source_table)
        slots, _, z = batch_rows(static, batch.long, inputs.table, number)

        def loss(blocks: LongBlocks) -> Array:
            block, rows, n_entries = blocks
            is_entry = solve.entry_mask(block.w.shape, n_entries)
            t = static.products.predict(block, z.at[rows].get(mode="promise_in_bounds"))
            return solve.cells_loss(block, t, is_entry, offset)

        zero = jnp.zeros(len(z), static.dtype)
        sums = sum_over_blocks(static, batch, objective, loss, zero)
        return out.at[slots].set(sums, mode="drop")

    return lax.fori_loop(0, shared.spans[0].n_chunks, body, out)
