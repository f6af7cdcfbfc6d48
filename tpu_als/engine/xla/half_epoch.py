"""Half-epochs and losses by compiled programs, over the shards of a workplace.

Tables stay in the layout's slot order on the devices. On a mesh either every device has the whole
source table for a half-epoch, or each device keeps its part and the chunks receive the rows that
they need (`exchange`). Long rows are solved by all devices together: each has the entries whose
source rows it owns, and their sums are added.

Axis letters: W work shards, S slots of a shard, K factors, M target rows, N source rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpu_als.engine import cells, layout
from tpu_als.engine.als import AlsState
from tpu_als.engine.data import DTYPES, LossParts
from tpu_als.engine.objective import Objective, largest_weight, typed, weights_vanish
from tpu_als.engine.xla import solve, sweep
from tpu_als.engine.xla.data import XlaData, XlaSide, shape_of
from tpu_als.engine.xla.mesh import Shards, Together, precision
from tpu_als.engine.xla.solve import Basis
from tpu_als.engine.xla.sweep import Measured, Shared, Span
from tpu_als.host import give_back_memory, single_blas_thread

_RUNGS_A_PROGRAM = 4
_LARGE = 1 << 24  # bytes of a table; returning its copies to the system takes milliseconds
_DRAWN = 1 << 14  # rows drawn at once, which bounds the generator's scratch


def draw(data: XlaData, seed: int, scale: float, normal: bool) -> list[Shards]:
    """See `als.draw`."""
    params, tables = data.params, []
    with precision(params.dtype):
        program = data.place.whole(_draw, (params.factors, params.dtype, normal))
        for number, side in enumerate((data.users, data.items)):
            rows = layout.rows_of_slots(side.rows, data.place.local).astype(np.int32)
            given = np.uint32(seed), np.uint32(number), np.dtype(params.compute_dtype).type(scale)
            tables.append(program(data.place.put(rows), given)[2])
    return tables


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


def half_epoch(
    target_table: Shards,
    source_table: Shards,
    data: XlaData,
    objective: Objective,
    relaxation: float,
    *,
    target: str,
) -> Shards:
    """See `als.half_epoch`."""
    params, where = data.params, data.place
    side, source = (data.users, data.items)[:: 1 if target == "users" else -1]
    # On an accelerator the host's BLAS is not used.
    scope = single_blas_thread() if where.platform == "cpu" else contextlib.nullcontext()
    with precision(params.dtype), scope:
        given = source_table, target_table, side.own.lengths
        basis, held, begin = preparing(data)(given, np.int32(source.n_rows))
        programs = passes(side, data, basis, objective, relaxation)
        solved = where.run(programs, begin, held, params.dtype)
    _tidy(data)
    return solved


def _tidy(data: XlaData) -> None:
    """Return the host memory of copies of large tables that XLA's half-epoch made."""
    rows = max(side.rows.n_slots * side.rows.n_shards for side in (data.users, data.items))
    row_bytes = data.params.factors * np.dtype(DTYPES[data.params.dtype]).itemsize
    if data.place.platform == "cpu" and rows * row_bytes > _LARGE:
        give_back_memory()


def passes(
    side: XlaSide, data: XlaData, basis: Basis, objective: Objective, relaxation: float = 1.0
) -> list[tuple[Any, Any, Shared]]:
    """Programs with their inputs that together solve all rows of a side (`Workplace.run`)."""
    given = _shared(basis, objective, data, relaxation)
    if weights_vanish(objective, data.magnitudes, data.params.compute_dtype):
        data = replace(data, params=replace(data.params, linear_solver="diagonal"))
    programs = _programs(sweep.solve_rungs, side, side.own, data, given)
    if side.long is not None:
        programs.append(_long_program(sweep.solve_long, side, side.long, data, given))
    return programs


def preparing(data: XlaData) -> Callable[..., Any]:
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


def count_failed(table: Shards, side: XlaSide, data: XlaData) -> int:
    """Number of rows of a table that are not finite."""
    with precision(data.params.dtype):
        program = data.place.whole(_count_failed, None)
        return int(program((table, side.own.lengths), None)[0])


def _count_failed(
    _: None, together: Together, own: tuple[Shards, Shards], __: None
) -> tuple[Array, None, None]:
    """Number of rows that are not finite. Unused slots are ignored; a failed basis spoils them."""
    parts = zip(*(together.parts(each) for each in own), strict=True)
    failed = sum(jnp.sum(~solve.finite_rows(table) & (lengths > 0)) for table, lengths in parts)
    return together.total(failed), None, None


def _shared(basis: Basis, objective: Objective, data: XlaData, relaxation: float) -> Shared:
    dtype = data.params.compute_dtype
    kind = np.dtype(dtype).type
    weight = kind(largest_weight(objective, data.magnitudes, dtype))
    return Shared(basis, typed(objective, dtype), kind(relaxation), weight, ())


def _programs(
    rungs_pass: Callable[..., Array], side: XlaSide, own: Any, data: XlaData, shared: Shared
) -> list[tuple[Any, Any, Shared]]:
    """Programs with their inputs that together pass over all rungs.

    A few rungs share a program. Fewer programs need fewer dispatches in a half-epoch; more programs
    can be compiled in parallel.
    """
    parts, first_send = [], 0
    for number, rung in enumerate(side.rows.rungs):
        route = side.routes[number] if side.routes is not None else None
        shape = shape_of(data.params, rung.rows, rung.length)
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
    long_pass: Callable[..., Array], side: XlaSide, own: Any, data: XlaData, shared: Shared
) -> tuple[Any, Any, Shared]:
    """The program of the long rows, with its inputs."""
    shape = shape_of(data.params, 1, data.plan.lengths[-1])._replace(together=data.place.together)
    n_batches = -(-len(side.rows.long) // cells.LONG_ROWS)
    span = Span(*np.array([0, 0, 0, n_batches], np.int32))
    return data.place.each(long_pass, shape), own, shared._replace(spans=(span,))


def loss_parts(state: AlsState, data: XlaData, objective: Objective) -> LossParts:
    """What `als.loss` adds up."""
    params, where, users = data.params, data.place, data.users
    with precision(params.dtype):
        summary = where.whole(_summary, params.compute_dtype)
        (basis, gram), held, squares = summary(state.items, np.int32(data.items.n_rows))
        (_, user_gram), _, user_squares = summary(state.users, np.int32(users.n_rows))
        per_row = _cells_loss(state, data, objective, basis, held)
        norms = [where.get(each).ravel() for each in (user_squares, squares)]
    return LossParts(
        float(per_row.sum(dtype=np.float64)),
        (np.asarray(user_gram), np.asarray(gram)),
        (norms[0][users.rows.slots], norms[1][data.items.rows.slots]),
    )


def _cells_loss(
    state: AlsState, data: XlaData, objective: Objective, basis: Basis, held: Any
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
