"""Alternating least squares over a workplace: gramian, half-epoch, epoch, loss, fold-in.

One `half_epoch` serves both sides: *target* is the table being solved, *source* the one held
fixed. Tables stay in the layout's slot order on the devices; `user_factors` and `item_factors`
bring them back to the caller's order.

On a mesh either every device has the whole source table for a half-epoch, or each device keeps its
part and the chunks receive the rows that they need (`exchange`). Long rows are solved by all
devices together: each has the entries whose source rows it owns, and their sums are added.

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

from tpu_als.engine import cells, layout
from tpu_als.engine.cpu import native
from tpu_als.engine.xla import solve, sweep
from tpu_als.engine.xla.mesh import Shards, Together, precision
from tpu_als.engine.xla.placing import DTYPES, AlsParams, Data, Side
from tpu_als.engine.xla.solve import Basis, Objective
from tpu_als.engine.xla.sweep import Measured, Shared, Span
from tpu_als.host import give_back_memory, single_blas_thread

_RUNGS_A_PROGRAM = 4
_LARGE = 1 << 24  # bytes of a table; returning its copies to the system takes milliseconds
_DRAWN = 1 << 14  # rows drawn at once, which bounds the generator's scratch


class AlsState(NamedTuple):
    """Both tables, in slot order on the devices."""

    users: Shards
    items: Shards


def start(data: Data, user_factors: np.ndarray, item_factors: np.ndarray) -> AlsState:
    """Place initial tables (M, K) and (N, K), given in the caller's order."""
    tables = []
    for table, side in ((user_factors, data.users), (item_factors, data.items)):
        expected = (side.n_rows, data.params.factors)
        if table.shape != expected:
            raise ValueError(f"an initial table has shape {table.shape}, expected {expected}")
        table = table.astype(DTYPES[data.params.dtype])
        slots = layout.to_slots(table, side.rows, data.place.local)
        with precision(data.params.dtype):
            tables.append(data.place.put(slots))
    return AlsState(*tables)


def draw(data: Data, seed: int, scale: float, *, normal: bool) -> AlsState:
    """Draw initial tables on the devices: a row's values depend on the seed and its number alone.

    Uniform from [0, scale), or normal with that deviation. No host ever holds a table.
    """
    params, tables = data.params, []
    with precision(params.dtype):
        program = data.place.whole(_draw, (params.factors, params.dtype, normal))
        for number, side in enumerate((data.users, data.items)):
            rows = layout.rows_of_slots(side.rows, data.place.local).astype(np.int32)
            given = np.uint32(seed), np.uint32(number), np.dtype(params.compute_dtype).type(scale)
            tables.append(program(data.place.put(rows), given)[2])
    return AlsState(*tables)


def _draw(
    static: tuple[int, str, bool], _: Together, rows: Shards, given: tuple[Array, Array, Array]
) -> tuple[None, None, Shards]:
    factors, dtype, normal = static
    seed, side, scale = given
    key, kind = jax.random.fold_in(jax.random.key(seed), side), scale.dtype

    def one(row: Array) -> Array:
        own = jax.random.fold_in(key, row)
        values = (jax.random.normal if normal else jax.random.uniform)(own, (factors,), kind)
        return jnp.where(row < 0, 0, values * scale).astype(DTYPES[dtype])

    return None, None, jax.tree.map(lambda part: lax.map(one, part, batch_size=_DRAWN), rows)


def user_factors(state: AlsState, data: Data) -> np.ndarray:
    """User table (M, K) in the caller's order: a writeable float32 or float64 copy."""
    return _fetch(state.users, data.users, data)


def item_factors(state: AlsState, data: Data) -> np.ndarray:
    """Item table (N, K) in the caller's order: a writeable float32 or float64 copy."""
    return _fetch(state.items, data.items, data)


def _fetch(table: Shards, side: Side, data: Data) -> np.ndarray:
    rows = layout.from_slots(data.place.get(table), side.rows)
    return rows.astype(data.params.compute_dtype, copy=False)


def epoch(
    state: AlsState, data: Data, objective: Objective, relaxation: float = 1.0
) -> tuple[AlsState, tuple[int, int]]:
    """One iteration: users against items, then items against the new users.

    Parameters
    ----------
    state : AlsState
        The tables; they stay valid.
    data : Data
        The matrix.
    objective : Objective
        Equations (1)-(2).
    relaxation : float, default=1.0
        How far to go towards the solved rows, between 0 and 2; 1 is ALS.

    Returns
    -------
    state : AlsState
        The new tables.
    failed : (int, int)
        Rows of the new user and item tables with a non-finite value.
    """
    users = half_epoch(state.users, state.items, data, objective, relaxation, target="users")
    _tidy(data)
    items = half_epoch(state.items, users, data, objective, relaxation, target="items")
    _tidy(data)
    with precision(data.params.dtype):
        count = data.place.whole(_count_failed, None)
        failed = (
            int(count((users, data.users.own.lengths), None)[0]),
            int(count((items, data.items.own.lengths), None)[0]),
        )
    return AlsState(users, items), failed


def _tidy(data: Data) -> None:
    """Return the host memory of copies of large tables that XLA's half-epoch made."""
    if data.params.native:  # it reuses its memory
        return
    rows = max(side.rows.n_slots * side.rows.n_shards for side in (data.users, data.items))
    row_bytes = data.params.factors * np.dtype(DTYPES[data.params.dtype]).itemsize
    if data.place.platform == "cpu" and rows * row_bytes > _LARGE:
        give_back_memory()


def half_epoch(
    target_table: Shards,
    source_table: Shards,
    data: Data,
    objective: Objective,
    relaxation: float = 1.0,
    *,
    target: str,
) -> Shards:
    """Solve all rows of the target table against the source table, which is held fixed."""
    params, where = data.params, data.place
    side, source = (data.users, data.items)[:: 1 if target == "users" else -1]
    # On an accelerator the host's BLAS is not used.
    scope = single_blas_thread() if where.platform == "cpu" else contextlib.nullcontext()
    with precision(params.dtype), scope:
        if params.native:
            steps = 0 if _weights_vanish(data, objective) else params.cg_steps
            solved = native.solve_side(
                target_table[0], source_table[0], source.n_rows, side.in_order, where, data.memory,
                typed(objective, params), _typed(relaxation, params), steps,
                _largest_weight(data, objective),
            )  # fmt: skip
            return [solved]
        given = source_table, target_table, side.own.lengths
        basis, held, begin = preparing(data)(given, np.int32(source.n_rows))
        programs = passes(side, data, basis, objective, relaxation)
        return where.run(programs, begin, held, params.dtype)


def passes(
    side: Side, data: Data, basis: Basis, objective: Objective, relaxation: float = 1.0
) -> list[tuple[Any, Any, Shared]]:
    """Programs with their inputs that together solve all rows of a side (`Workplace.run`)."""
    given = _shared(basis, objective, data, relaxation)
    if _weights_vanish(data, objective):
        data = replace(data, params=replace(data.params, linear_solver="diagonal"))
    programs = _programs(sweep.solve_rungs, side, side.own, data, given)
    if side.long is not None:
        programs.append(_long_program(sweep.solve_long, side, side.long, data, given))
    return programs


def _weights_vanish(data: Data, objective: Objective) -> bool:
    """Whether every weight w of (1) is 0, as for binary data with alpha 1 and "implicit"."""
    if data.magnitudes is None or data.magnitudes[0] != data.magnitudes[1]:
        return False
    value = np.asarray(data.magnitudes[0], data.params.compute_dtype)
    return bool(solve.confidence(typed(objective, data.params), value)[0] == 0)


def preparing(data: Data) -> Callable[..., Any]:
    """Program ((source, target, lengths), n_source) -> (basis, held, begin) of a half-epoch."""
    return data.place.whole(_prepare, data.params.compute_dtype)


def _prepare(
    dtype: str, together: Together, own: tuple[Shards, Shards, Shards], n_source: Array
) -> tuple[Basis, Array, Shards]:
    """Rotate the source table, and a copy of the target table to start from."""
    source, target, lengths = own
    gram = together.total(sum(solve.gramian(part, dtype) for part in together.parts(source)))
    basis = solve.basis(gram, n_source.astype(dtype))

    def rotated(rows: Array) -> Array:
        return solve.rotate(rows, basis.rotation)

    def begin(rows: Array, lengths: Array) -> Array:
        return solve.zero_empty(rotated(rows), lengths)

    held = together.hold(together.join(source, rotated))
    return basis, held, jax.tree.map(begin, target, lengths)


def _count_failed(
    _: None, together: Together, own: tuple[Shards, Shards], __: None
) -> tuple[Array, None, None]:
    """Number of rows that are not finite. Unused slots are ignored; a failed basis spoils them."""
    parts = zip(*(together.parts(each) for each in own), strict=True)
    failed = sum(jnp.sum(~solve.finite_rows(table) & (lengths > 0)) for table, lengths in parts)
    return together.total(failed), None, None


def _shared(basis: Basis, objective: Objective, data: Data, relaxation: float) -> Shared:
    numbers = _typed(relaxation, data.params), _typed(_largest_weight(data, objective), data.params)
    return Shared(basis, typed(objective, data.params), *numbers, ())


def _largest_weight(data: Data, objective: Objective) -> float:
    """Bound on the absolute weights w of (1). If the values are unknown, they count as 1."""
    largest = 1.0 if data.magnitudes is None else max(float(data.magnitudes[1]), 0.0)
    weight = float(objective.alpha) * largest + float(objective.offset)
    return min(weight, float(np.finfo(data.params.compute_dtype).max) / 4)


def _programs(
    rungs_pass: Callable[..., Array], side: Side, own: Any, data: Data, shared: Shared
) -> list[tuple[Any, Any, Shared]]:
    """Programs with their inputs that together pass over all rungs.

    A few rungs share a program. Fewer programs need fewer dispatches in a half-epoch; more programs
    can be compiled in parallel.
    """
    parts, first_send = [], 0
    for number, rung in enumerate(side.rows.rungs):
        route = side.routes[number] if side.routes is not None else None
        shape = data.params.shape(rung.rows, rung.length)
        shape = shape._replace(together=data.place.together, route=route)
        parts.append((shape, (rung.first_cell, rung.first_slot, first_send, rung.n_chunks)))
        if route is not None:
            first_send += route.groups(rung.n_chunks) * route.rows * data.place.n_shards
    programs = []
    for low in range(0, len(parts), _RUNGS_A_PROGRAM):
        shapes, spans = zip(*parts[low : low + _RUNGS_A_PROGRAM], strict=True)
        traced = tuple(Span(*np.array(span, np.int32)) for span in spans)
        program = data.place.each(rungs_pass, shapes)
        programs.append((program, own, shared._replace(spans=traced)))
    return programs


def _long_program(
    long_pass: Callable[..., Array], side: Side, own: Any, data: Data, shared: Shared
) -> tuple[Any, Any, Shared]:
    """The program of the long rows, with its inputs."""
    shape = data.params.shape(1, data.plan.lengths[-1])._replace(together=data.place.together)
    n_batches = -(-len(side.rows.long) // cells.LONG_ROWS)
    span = Span(*np.array([0, 0, 0, n_batches], np.int32))
    return data.place.each(long_pass, shape), own, shared._replace(spans=(span,))


def typed(objective: Objective, params: AlsParams) -> Objective:
    """The objective's numbers in the dtype that sums are done in."""
    return Objective(*(_typed(number, params) for number in objective))


def _typed(number: float, params: AlsParams) -> Any:
    return np.dtype(params.compute_dtype).type(number)


def loss(state: AlsState, data: Data, objective: Objective) -> float:
    """Loss at the tables, in implicit's normalisation: over the sum of all cells' weights.

    The sum over all cells is a0 tr(X^T X Y^T Y), to which the differences of the stored cells are
    added. Sums over rows are in float64 on the host; docs/math.md bounds the error of sums over the
    entries of a row.
    """
    params, where, users = data.params, data.place, data.users
    with precision(params.dtype):
        summary = where.whole(_summary, params.compute_dtype)
        (basis, gram), held, squares = summary(state.items, np.int32(data.items.n_rows))
        (_, user_gram), _, user_squares = summary(state.users, np.int32(users.n_rows))
        if params.native:
            own = typed(objective, params)
            per_row = native.measure_side(
                state.users[0], state.items[0], users.in_order, where, own
            )
        else:
            per_row = _cells_loss(state, data, objective, basis, held)
        norms = [where.get(each).ravel() for each in (user_squares, squares)]
    every = np.sum(np.asarray(user_gram, np.float64) * np.asarray(gram, np.float64))
    ridges = _ridges(objective, users, data.items.n_rows, norms[0])
    ridges += _ridges(objective, data.items, users.n_rows, norms[1])
    n_cells = users.n_rows * data.items.n_rows
    total = per_row.sum(dtype=np.float64) + objective.unobserved_weight * every + ridges
    weights = objective.alpha * data.absolute_sum - objective.offset * data.n_entries
    weights += objective.unobserved_weight * n_cells
    return float(total / weights) if weights else float(total)  # without a weight there are no sums


def _ridges(objective: Objective, side: Side, n_source: int, squares: np.ndarray) -> float:
    """Sum of lam_u |z_u|^2 over a side's rows, given the squared norms of its slots.

    The power in (2) may overflow; if a row or lam is zero, the term is still 0.
    """
    own = squares[side.rows.slots]
    with np.errstate(over="ignore", invalid="ignore"):
        terms = solve.ridge(objective, side.lengths, n_source) * own
    return float(np.where((own == 0) | (objective.regularization == 0), 0, terms).sum())


def _cells_loss(
    state: AlsState, data: Data, objective: Objective, basis: Basis, held: Any
) -> np.ndarray:
    """Contribution of the stored cells of each user slot (W, S) to the loss."""
    params, where, users = data.params, data.place, data.users
    given = _shared(basis, objective, data, 1.0)
    measured = Measured(users.own, state.users)
    programs = _programs(sweep.loss_rungs, users, measured, data, given)
    if users.long is not None:
        measured = Measured(users.long, state.users)
        programs.append(_long_program(sweep.loss_long, users, measured, data, given))
    out = where.zeros((users.rows.n_slots,), np.dtype(params.compute_dtype))
    return where.get(where.run(programs, out, held, params.dtype))


def _summary(
    dtype: str, together: Together, table: Shards, n_rows: Array
) -> tuple[tuple[Basis, Array], Array, Shards]:
    """The table with an identity rotation; its gramian, and its squared row norms."""
    rows = together.join(table)
    eye = jnp.eye(rows.shape[1], dtype=dtype)
    basis = Basis(eye, jnp.diagonal(eye), n_rows.astype(dtype))

    gram, _, squares = gramian_and_squares(dtype, together, table, None)
    return (basis, gram), together.hold(rows), squares


def gramian_and_squares(
    dtype: str, together: Together, table: Shards, _: None
) -> tuple[Array, None, Shards]:
    """Gramian of a table, and the squared lengths of its rows."""
    gramian = together.total(solve.gramian(together.join(table), dtype))
    return gramian, None, jax.tree.map(lambda part: _squares(part, dtype), table)


def _squares(rows: Array, dtype: str) -> Array:
    return jnp.sum(jnp.square(rows.astype(dtype)), axis=1)
