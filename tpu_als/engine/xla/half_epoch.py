"""Half-epochs and losses by compiled programs, over the shards of a mesh.

Tables stay in the layout's slot order on the devices. If there are several devices, either each has
the whole source table for a half-epoch, or each keeps its part and the chunks receive the rows that
they need (`exchange`). All devices solve long rows together: each has the entries whose source rows
it owns, and their sums are added.

Axis letters: W work shards, S slots of a shard, K factors, M target rows, N source rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpu_als.engine import layout
from tpu_als.engine.als import AlsState, Step
from tpu_als.engine.data import LossParts, dtype_named
from tpu_als.engine.objective import Objective, largest_weight, typed, weights_vanish
from tpu_als.engine.xla import exchange, solve, sweep, sweep_long, sweep_loss
from tpu_als.engine.xla.data import XlaData, XlaSide, long_shape, static_of
from tpu_als.engine.xla.mesh import Collectives, ShardPass, Shards, precision
from tpu_als.engine.xla.programs import REPLICATED, SHARDED, PyTree
from tpu_als.engine.xla.solve import Basis
from tpu_als.engine.xla.sweep import RungInputs, SharedInputs, Span
from tpu_als.engine.xla.sweep_long import LongInputs
from tpu_als.engine.xla.sweep_loss import LongLossInputs, LossInputs
from tpu_als.host import give_back_memory, single_blas_thread

_LARGE = 1 << 24  # bytes of a table; returning its copies to the system takes milliseconds
_DRAWN_ROWS = 1 << 14  # rows drawn at once, which bounds the generator's scratch


class DrawInputs(NamedTuple):
    """Inputs of `_draw` that all shards share.

    Attributes
    ----------
    seed : uint32
        The caller's seed.
    side : uint32
        0 for users, 1 for items; each has its own random numbers.
    scale : float
        Factor for the numbers, in the dtype they are drawn in.
    """

    seed: Array | np.uint32
    side: Array | np.uint32
    scale: Array | np.floating


def draw(data: XlaData, seed: int, scale: float, normal: bool) -> list[Shards]:
    """See `als.draw`."""
    params, mesh, tables = data.params, data.mesh, []
    with precision(params.dtype):
        static = params.factors, params.dtype, normal
        program = mesh.all_shards_program(_draw, static, SHARDED)
        for number, side in enumerate((data.users, data.items)):
            rows = layout.rows_of_slots(side.rows, mesh.local_shards).astype(np.int32)
            kind = np.dtype(params.compute_dtype).type
            inputs = DrawInputs(np.uint32(seed), np.uint32(number), kind(scale))
            tables.append(program(mesh.put(rows), inputs))
    return tables


def _draw(
    static: tuple[int, str, bool], _: Collectives, row_numbers: Shards, inputs: DrawInputs
) -> Shards:
    """Draw the rows with these numbers; -1 gives a row of zeros."""
    factors, dtype, normal = static
    key = jax.random.fold_in(jax.random.key(inputs.seed), inputs.side)
    kind = inputs.scale.dtype

    def draw_row(number: Array) -> Array:
        row_key = jax.random.fold_in(key, number)
        values = (jax.random.normal if normal else jax.random.uniform)(row_key, (factors,), kind)
        return jnp.where(number < 0, 0, values * inputs.scale).astype(dtype_named(dtype))

    return jax.tree.map(lambda part: lax.map(draw_row, part, batch_size=_DRAWN_ROWS), row_numbers)


def half_epoch(
    target_table: Shards,
    source_table: Shards,
    data: XlaData,
    step: Step,
) -> Shards:
    """See `als.half_epoch`."""
    params, mesh = data.params, data.mesh
    side, source = (data.users, data.items)[:: 1 if step.target == "users" else -1]
    # On an accelerator the host's BLAS is not used.
    scope = single_blas_thread() if mesh.platform == "cpu" else contextlib.nullcontext()
    with precision(params.dtype), scope:
        tables = Tables(source_table, target_table, side.cells.lengths, step.prior)
        prepared = prepare_program(data)(tables, np.int32(source.n_rows))
        solve_passes = passes(side, data, prepared, step.objective, step.relaxation)
        solved = mesh.run(solve_passes, prepared.start, prepared.source_table, params.dtype)
    _give_back_copies(data)
    return solved


def _give_back_copies(data: XlaData) -> None:
    """Return the host memory of copies of large tables that XLA's half-epoch made."""
    n_slots = max(side.rows.n_slots * side.rows.n_shards for side in (data.users, data.items))
    row_bytes = data.params.factors * dtype_named(data.params.dtype).itemsize
    if data.mesh.platform == "cpu" and n_slots * row_bytes > _LARGE:
        give_back_memory()


def passes(
    side: XlaSide,
    data: XlaData,
    prepared: Prepared,
    objective: Objective,
    relaxation: float = 1.0,
) -> list[ShardPass]:
    """Programs with their inputs that together solve all rows of a side."""
    shared = _shared_inputs(prepared.basis, objective, data, relaxation)
    if weights_vanish(objective, data.magnitudes, data.params.compute_dtype):
        data = replace(data, params=replace(data.params, linear_solver="diagonal"))
    inputs = RungInputs(side.cells, prepared.priors)
    found = _rung_passes(sweep.solve_rungs, side, inputs, data, shared)
    if side.long is not None:
        long = LongInputs(side.long, prepared.priors)
        found.append(_long_pass(sweep_long.solve_long, side, long, data, shared))
    return found


class Prepared(NamedTuple):
    """Outputs of the program that prepares a half-epoch.

    Attributes
    ----------
    basis : Basis
        The eigenbasis of the source table's gramian.
    source_table : array
        The source table in that basis (`Collectives.source_table`).
    start : Shards (W, S, K)
        A copy of the target table in that basis, to start from.
    priors : Shards (W, S, K) or None
        What the rows are drawn to, in that basis.
    """

    basis: Basis
    source_table: Array
    start: Shards
    priors: Shards | None = None


class Tables(NamedTuple):
    """Inputs of the program that prepares a half-epoch; each field is `Shards`.

    Attributes
    ----------
    source, target : (W, S, K)
        The fixed table and the one to be solved.
    lengths : (W, S)
        Entries of the target's rows.
    priors : (W, S, K) or None
        What the target's rows are drawn to.
    """

    source: Any
    target: Any
    lengths: Any
    priors: Any = None


def prepare_program(data: XlaData) -> Callable[..., Prepared]:
    """Compile the program (Tables, n_source) -> Prepared of a half-epoch."""
    specs = REPLICATED, data.mesh.collectives.source_spec, SHARDED, SHARDED
    out_specs = Prepared._make(specs)
    return data.mesh.all_shards_program(_prepare, data.params.compute_dtype, out_specs)


def _prepare(dtype: str, collectives: Collectives, tables: Tables, n_source: Array) -> Prepared:
    """Rotate the source table, and a copy of the target table to start from."""
    source, target, lengths, priors = tables
    grams = [solve.gramian(part, dtype) for part in collectives.local_parts(source)]
    gram = collectives.sum(sum(grams[1:], grams[0]))
    basis = solve.basis(gram, n_source.astype(dtype))

    def rotate(rows: Array) -> Array:
        return solve.rotate(rows, basis.rotation)

    def start(rows: Array, lengths: Array) -> Array:
        return solve.zero_empty(rotate(rows), lengths)

    source_table = collectives.source_table(collectives.concatenate(source, rotate))
    rotated = jax.tree.map(rotate, priors)
    return Prepared(basis, source_table, jax.tree.map(start, target, lengths), rotated)


def count_failed(table: Shards, side: XlaSide, data: XlaData) -> int:
    """Number of rows of a table that are not finite."""
    with precision(data.params.dtype):
        program = data.mesh.all_shards_program(_count_failed, None, REPLICATED)
        return int(program((table, side.cells.lengths), None))


def _count_failed(
    _: None, collectives: Collectives, rows: tuple[Shards, Shards], __: None
) -> Array:
    """Number of rows that are not finite.

    Unused slots are ignored: if the basis is not finite, they are not finite either.
    """
    parts = zip(*(collectives.local_parts(shards) for shards in rows), strict=True)
    failed = [jnp.sum(~solve.finite_rows(table) & (lengths > 0)) for table, lengths in parts]
    return collectives.sum(sum(failed[1:], failed[0]))


def _shared_inputs(
    basis: Basis, objective: Objective, data: XlaData, relaxation: float
) -> SharedInputs:
    dtype = data.params.compute_dtype
    kind = np.dtype(dtype).type
    weight = kind(largest_weight(objective, data.magnitudes, dtype))
    return SharedInputs(basis, typed(objective, dtype), kind(relaxation), weight, ())


def _rung_passes(
    sweep_rungs: Callable[..., Array],
    side: XlaSide,
    sharded: PyTree,
    data: XlaData,
    shared: SharedInputs,
) -> list[ShardPass]:
    """Programs with their inputs that together process all rungs."""
    rungs, first_send = [], 0
    for number, rung in enumerate(side.rows.rungs):
        route = side.routes[number] if side.routes is not None else None
        static = static_of(data.params, rung.rows, rung.length)
        static = static._replace(
            collectives=data.mesh.collectives,
            route=route,
            device_products=data.products,
            in_advance=data.mesh.exchanges_in_background,
        )
        rungs.append((static, (rung.first_cell, rung.first_slot, first_send, rung.n_chunks)))
        if route is not None:
            first_send += route.groups(rung.n_chunks) * route.rows * data.mesh.n_shards
    found = []
    for part in exchange.in_programs(rungs):
        statics, spans = zip(*part, strict=True)
        traced = tuple(Span(*np.array(span, np.int32)) for span in spans)
        program = data.mesh.per_shard_program(sweep_rungs, statics)
        found.append(ShardPass(program, sharded, shared._replace(spans=traced)))
    return found


def _long_pass(
    sweep_long: Callable[..., Array],
    side: XlaSide,
    sharded: PyTree,
    data: XlaData,
    shared: SharedInputs,
) -> ShardPass:
    """The program of the long rows, with its inputs."""
    assert side.long is not None
    block = long_shape(data.plan, data.params, data.mesh).block
    static = static_of(data.params, data.plan.rows(block), block)
    static = static._replace(collectives=data.mesh.collectives, device_products=data.products)
    # As placed: the solver may have changed since to "diagonal", which has batches of another size.
    n_batches = jax.tree.leaves(side.long.starts)[0].shape[-1] - 1
    span = Span(*np.array([0, 0, 0, n_batches], np.int32))
    program = data.mesh.per_shard_program(sweep_long, static)
    return ShardPass(program, sharded, shared._replace(spans=(span,)))


class Summary(NamedTuple):
    """Gramian (K, K) and squared row norms (W, S) of a table."""

    gramian: Array
    squares: Shards


class LossSource(NamedTuple):
    """A table as the source of the loss, in its own basis, and its summary."""

    basis: Basis
    source_table: Array
    summary: Summary


SUMMARY_SPECS = Summary._make((REPLICATED, SHARDED))


def loss_parts(state: AlsState, data: XlaData, objective: Objective) -> LossParts:
    """Compute the terms of `als.loss`."""
    mesh, users, items = data.mesh, data.users, data.items
    dtype = data.params.compute_dtype
    with precision(data.params.dtype):
        specs = LossSource._make((REPLICATED, mesh.collectives.source_spec, SUMMARY_SPECS))
        program = mesh.all_shards_program(_loss_source, dtype, specs)
        source = program(state.items, np.int32(items.n_rows))
        of_items, of_users = source.summary, program(state.users, np.int32(users.n_rows)).summary
        per_row = _entries_loss(state, data, objective, source)
        user_squares, item_squares = (
            mesh.get(summary.squares).ravel() for summary in (of_users, of_items)
        )
    return LossParts(
        float(per_row.sum(dtype=np.float64)),
        (np.asarray(of_users.gramian), np.asarray(of_items.gramian)),
        (user_squares[users.rows.slots], item_squares[items.rows.slots]),
    )


def _entries_loss(
    state: AlsState, data: XlaData, objective: Objective, source: LossSource
) -> np.ndarray:
    """Contribution of the stored entries of each user slot (W, S) to the loss."""
    params, mesh, users = data.params, data.mesh, data.users
    shared = _shared_inputs(source.basis, objective, data, 1.0)
    inputs = LossInputs(users.cells, state.users)
    loss_passes = _rung_passes(sweep_loss.loss_rungs, users, inputs, data, shared)
    if users.long is not None:
        long_inputs = LongLossInputs(users.long, state.users)
        loss_passes.append(_long_pass(sweep_loss.loss_long, users, long_inputs, data, shared))
    out = mesh.zeros((users.rows.n_slots,), np.dtype(params.compute_dtype))
    return mesh.get(mesh.run(loss_passes, out, source.source_table, params.dtype))


def _loss_source(dtype: str, collectives: Collectives, table: Shards, n_rows: Array) -> LossSource:
    """The table with an identity rotation, and its summary."""
    rows = collectives.concatenate(table)
    eye = jnp.eye(rows.shape[1], dtype=dtype)
    basis = Basis(eye, jnp.diagonal(eye), n_rows.astype(dtype))
    summary = summarise(dtype, collectives, table, None)
    return LossSource(basis, collectives.source_table(rows), summary)


def summarise(dtype: str, collectives: Collectives, table: Shards, _: None) -> Summary:
    """Gramian and squared row norms of a table."""
    gramian = collectives.sum(solve.gramian(collectives.concatenate(table), dtype))
    return Summary(gramian, jax.tree.map(lambda part: _squares(part, dtype), table))


def _squares(rows: Array, dtype: str) -> Array:
    return jnp.sum(jnp.square(rows.astype(dtype)), axis=1)
