"""Process the chunks of one shard: slice the cells, solve the rows, write the slots.

Pure functions for one device. Trip counts and offsets are traced, so that the same program works
for a rung of either side, for any data and any parameter values.

Axis letters: S slots of the shard, R rows of a chunk, L padded length, K factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import exchange, solve
from tpu_als.engine.xla.exchange import Route
from tpu_als.engine.xla.programs import Collectives
from tpu_als.engine.xla.row_kernels import RowKernels
from tpu_als.engine.xla.solve import Basis, Cells
from tpu_als.engine.xla.tile_products import TileProducts

Index = int | Array  # a counter of a loop
DeviceProducts: TypeAlias = RowKernels | TileProducts


class ShardCells(NamedTuple):
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

    For long rows only the last is used: their number of batches.
    """

    first_cell: Array
    first_slot: Array
    first_send: Array
    n_chunks: Array


class Static(NamedTuple):
    """The static arguments of a program; hashable.

    Attributes
    ----------
    solver : {"cg", "cholesky", "diagonal"}
        The solver.
    steps : int
        Steps of "cg".
    dtype : str
        Dtype of sums.
    rows, length : int
        Shape (R, L) of a chunk.
    positive : bool
        Whether all weights w are nonnegative.
    collectives : Collectives
        The operations across shards.
    route : Route or None
        How source rows are received; None if the shard has all of them.
    device_products : DeviceProducts or None
        Products for the kind of device; None for the functions of `solve`.
    in_advance : bool
        Whether the rows for a group are received while the group before is solved.
    """

    solver: str
    steps: int
    dtype: str
    rows: int
    length: int
    positive: bool
    collectives: Collectives = Collectives()
    route: Route | None = None
    device_products: DeviceProducts | None = None
    in_advance: bool = False

    @property
    def products(self) -> Any:
        """The functions that read blocks and multiply by them."""
        return self.device_products or solve


class SharedInputs(NamedTuple):
    """Inputs that all shards share.

    Attributes
    ----------
    basis : Basis
        The eigenbasis of the source table's gramian.
    objective : Objective
        Equations (1)-(2).
    relaxation : scalar
        As in `solve.relax`.
    weight : scalar
        Bound on all weights w.
    spans : tuple of Span
        One for each `Static`.
    """

    basis: Basis
    objective: Objective
    relaxation: Array | np.floating
    weight: Array | np.floating
    spans: tuple[Span, ...]


class Rows(NamedTuple):
    """Rows of one block, to be solved: their entries, lengths (R,), start and prior (R, K).

    The start and the prior are in the eigenbasis. Only iterative solvers use the start. The ridge
    draws the rows to the prior, or to zero if it is None.
    """

    block: Any  # Block, or that of the device's products
    lengths: Array | np.ndarray
    start: Array
    prior: Array | None = None


class RungInputs(NamedTuple):
    """What a shard's rungs are solved from: its cells, and its rows' priors (S, K) or None."""

    cells: Any
    priors: Any = None


Body = Callable[[tuple[Static, Span], int, Array, Array], Array]


def over_chunks(
    rungs: tuple[tuple[Static, Span], ...],
    cells: ShardCells,
    source_table: Array,
    body: Body,
    out: Array,
) -> Array:
    """Fold body(rung, step, source_rows, out) over the chunks of some rungs.

    `source_rows` is the source table, or the rows received for the chunk's group.
    """
    received = None
    for rung in rungs:
        if rung[0].route is None:
            out = _fold(body, rung, (0, rung[1].n_chunks), source_table, out)
        else:
            out, received = _over_groups(rung, cells, source_table, body, (out, received))
    return out


def _over_groups(
    rung: tuple[Static, Span],
    cells: ShardCells,
    source_table: Array,
    body: Body,
    carried: tuple[Array, Array | None],
) -> tuple[Array, Array | None]:
    """Fold over the groups of a rung; return the result, and rows that are received in advance.

    These are the rows of the next group in the order of `sends`, which may be of the next rung.
    """
    static, span = rung
    route, axis = static.route, static.collectives.axis
    assert route is not None and axis is not None
    groups = (span.n_chunks + route.chunks - 1) // route.chunks

    def receive(number: Index) -> Array:
        first = span.first_send + number * route.rows * lax.axis_size(axis)
        return exchange.receive(source_table, cells.sends, first, route.rows, axis)

    def chunks(number: Index, received: Array, out: Array) -> Array:
        low = number * route.chunks
        high = jnp.minimum(low + route.chunks, span.n_chunks)
        return _fold(body, rung, (low, high), received, out)

    def group(number: int, out: Array) -> Array:
        return chunks(number, receive(number), out)

    def group_in_advance(number: int, carried: tuple[Array, Array]) -> tuple[Array, Array]:
        out, received = carried
        following = receive(number + 1)  # does not depend on the chunks of this group
        return chunks(number, received, out), following

    out, received = carried
    if not static.in_advance:
        return lax.fori_loop(0, groups, group, out), None
    return lax.fori_loop(
        0, groups, group_in_advance, (out, receive(0) if received is None else received)
    )


def _fold(
    body: Body, rung: tuple[Static, Span], steps: tuple[Index, Index], rows: Array, out: Array
) -> Array:
    """Fold over the chunks low..high of a rung."""
    return lax.fori_loop(*steps, lambda step, out: body(rung, step, rows, out), out)


class Chunk(NamedTuple):
    """First slot, lengths (R,) and block of a chunk of a rung."""

    slot: Array
    lengths: Array
    block: Any


def gather_chunk(
    static: Static, span: Span, cells: ShardCells, source_rows: Array, objective: Objective,
    step: Index,
) -> Chunk:  # fmt: skip
    """Gather chunk `step` of the rung."""
    size = static.rows * static.length
    first = span.first_cell + step * size
    slot = span.first_slot + step * static.rows
    lengths = lax.dynamic_slice(cells.lengths, (slot,), (static.rows,))
    ids, values = jax.tree.map(
        lambda array: lax.dynamic_slice(array, (first,), (size,)).reshape(
            static.rows, static.length
        ),
        (cells.ids, cells.values),
    )
    dtype = jnp.dtype(static.dtype)
    block = static.products.gather(source_rows, objective, Cells(ids, values, lengths), dtype)
    return Chunk(slot, lengths, block)


def solve_block(
    static: Static,
    basis: Basis,
    objective: Objective,
    rows: Rows,
    relaxation: Array | np.floating | None = None,
) -> Array:
    """Solve rows whose entries are in one block: (R, K), in the caller's basis."""
    block, lengths, before, _ = rows
    d, weight = solve.diagonal(basis, objective, lengths), solve.largest_weight(block)
    z, drawn = solve.initial_rows(before, d, weight, basis), None
    if rows.prior is not None:
        drawn = solve.drawn_to(rows.prior, d, objective, lengths, basis)
        z = z - drawn
    scale = solve.equation_scale(d, weight)
    d, block = d * scale, solve.scale_weights(block, scale)
    if drawn is not None:
        block = shifted(static, block, drawn)
    if static.solver == "diagonal":
        z = solve.rows_diagonal(static.products.project(block, block.v), d)
    elif static.solver == "cholesky":
        z = solve.rows_exact(block, d, static.positive)
    else:
        z = static.products.cg(block, z, d, static.steps)
    if drawn is not None:
        z = z + drawn
    return finish(basis, lengths, z if relaxation is None else solve.relax(before, z, relaxation))


def shifted(static: Static, block: Any, drawn: Array) -> Any:
    """The block of the equation for e = z - q (`solve.drawn_to`): v - w t in place of v."""
    return block._replace(v=block.v - block.w * static.products.predict(block, drawn))


def finish(basis: Basis, lengths: Array | np.ndarray, z: Array) -> Array:
    """Rotate solved rows (R, K) back to the caller's basis; rows without entries become zero."""
    return solve.zero_empty(solve.rotate(z, basis.rotation.T), lengths)


def solve_rungs(
    statics: tuple[Static, ...],
    out: Array,
    inputs: RungInputs,
    source_table: Array,
    shared: SharedInputs,
) -> Array:
    """Solve all rows of some rungs, and write them into the shard's table `out` (S, K)."""
    cells, priors = inputs

    def body(rung: tuple[Static, Span], step: int, source_rows: Array, out: Array) -> Array:
        static, span = rung
        slot, lengths, block = gather_chunk(
            static, span, cells, source_rows, shared.objective, step
        )
        z = lax.dynamic_slice_in_dim(out, slot, static.rows).astype(static.dtype)
        prior = None if priors is None else lax.dynamic_slice_in_dim(priors, slot, static.rows)
        rows = Rows(block, lengths, z, prior)
        z = solve_block(static, shared.basis, shared.objective, rows, shared.relaxation)
        return lax.dynamic_update_slice_in_dim(out, solve.rounded(z, out.dtype), slot, 0)

    rungs = tuple(zip(statics, shared.spans, strict=True))
    return over_chunks(rungs, cells, source_table, body, out)
