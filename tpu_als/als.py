"""Alternating least squares over a workplace: gramian, half-epoch, epoch, loss, fold-in.

One `half_epoch` serves both sides: *target* is the table being solved, *source* the one held
fixed. Tables stay in the layout's slot order on the devices; `user_factors` and `item_factors`
bring them back to the caller's order.

Axis letters: W work shards, S slots of a shard, K factors, M target rows, N source rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from scipy import sparse

from tpu_als import layout, solve, sweep
from tpu_als.layout import Plan, RowMap
from tpu_als.mesh import Shards, Workplace, precision
from tpu_als.solve import Fixed, Objective
from tpu_als.sweep import Measured, Own, Shape, Shared, Span

DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}
_SCRATCH = {"cpu": 1 << 20, "other": 1 << 26}  # bytes of a gathered chunk; a core's own cache on CPU
_SYSTEMS = {"cpu": 1 << 22, "other": 1 << 28}  # bytes of the K x K systems of a chunk
# Factors times cells that take as long, over a fit or a few, as compiling one more rung.
_RUNG_CELLS = {"cpu": 4e6, "other": 1e8}
_LADDER_SLACK = 1.1  # padding accepted, against the best ladder's, for a ladder compiled before
_SHARED_WASTE = 1 << 26  # bytes of unused slots that sharing programs between the sides may cost


_FOLD_IN_ROWS = {"cpu": 16, "other": 256}  # rows solved at once; few, so that one row is quick
_ladders: dict[Any, list[tuple[int, ...]]] = {}


@dataclass(frozen=True)
class AlsParams:
    """What may recompile; everything else is traced.

    Attributes
    ----------
    factors : int
        K.
    dtype : {"float32", "float64", "bfloat16"}
        Storage of the tables. Sums are float32, or float64 with "float64".
    linear_solver : {"cg", "cholesky"}
        How the rows' systems (1) are solved.
    cg_steps : int
        Steps of "cg".
    block_size : int
        Factors solved at once by "subspace".
    """

    factors: int
    dtype: str = "float32"
    linear_solver: str = "cg"
    cg_steps: int = 3
    block_size: int = 64

    @property
    def compute_dtype(self) -> str:
        """What sums and solves are done in."""
        return "float64" if self.dtype == "float64" else "float32"

    def shape(self, rows: int, length: int) -> Shape:
        """The static part of a rung's program."""
        return Shape(
            self.linear_solver, self.cg_steps, self.block_size, self.compute_dtype, rows, length
        )


@dataclass(frozen=True)
class Side:
    """One orientation: the map of its rows and its placed cells."""

    rows: RowMap
    own: Own
    lengths: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows of the table, unused slots not counted."""
        return len(self.lengths)


@dataclass(frozen=True)
class Data:
    """Both orientations of a matrix, laid out and placed; reusable for any parameter values."""

    users: Side
    items: Side
    plan: Plan
    params: AlsParams
    place: Workplace
    n_entries: int
    absolute_sum: float


class AlsState(NamedTuple):
    """Both tables, in slot order on the devices."""

    users: Shards
    items: Shards


def make_plan(lengths: np.ndarray, params: AlsParams, place: Workplace) -> Plan:
    """Choose chunk sizes for the backend's memory, and rungs for the rows of both sides.

    A ladder that this process has compiled is kept where it pads little more than the best one
    for these rows, so that folds, refits and candidates compile nothing new.
    """
    kind = "cpu" if place.platform == "cpu" else "other"
    chunk, most_rows = _chunk_sizes(params, kind)
    best = layout.ladder(lengths, _RUNG_CELLS[kind] / params.factors)
    known = _ladders.setdefault((params, place), [])
    bound = _LADDER_SLACK * layout.padded_cells(lengths, best)
    for ladder in known:
        if layout.padded_cells(lengths, ladder) <= bound:
            return Plan(ladder, chunk, most_rows, place.n_shards)
    known.append(best)
    return Plan(best, chunk, most_rows, place.n_shards)


def _chunk_sizes(params: AlsParams, kind: str) -> tuple[int, int]:
    """Cells of a chunk, a power of two, and the most rows that its scratch allows."""
    size = np.dtype(params.compute_dtype).itemsize
    chunk = max(_SCRATCH[kind] // (params.factors * size), 256)
    most_rows = 1 << 30
    if params.linear_solver != "cg":
        most_rows = max(_SYSTEMS[kind] // (params.factors**2 * size), 1)
    return 1 << (chunk.bit_length() - 1), most_rows


def place(user_items: sparse.csr_matrix, params: AlsParams, place: Workplace) -> Data:
    """Lay out a matrix in both orientations and put it on the devices.

    Parameters
    ----------
    user_items : CSR matrix (M, N)
        Canonical: sorted indices, no duplicates. Stored zeros are entries.
    params : AlsParams
        Decides chunk sizes and dtype.
    place : Workplace
        Where it goes.
    """
    item_users = user_items.T.tocsr()
    lengths = np.diff(user_items.indptr), np.diff(item_users.indptr)
    plan = make_plan(np.concatenate(lengths), params, place)
    users, items = (layout.map_rows(each, plan) for each in lengths)
    row_bytes = params.factors * np.dtype(DTYPES[params.dtype]).itemsize
    users, items = layout.share_shapes(users, items, _SHARED_WASTE // row_bytes)
    return Data(
        _side(user_items, users, items, params, place),
        _side(item_users, items, users, params, place),
        plan,
        params,
        place,
        user_items.nnz,
        float(np.abs(user_items.data).sum(dtype=np.float64)),
    )


def _side(
    matrix: sparse.csr_matrix, rows: RowMap, source: RowMap, params: AlsParams, place: Workplace
) -> Side:
    cells = layout.fill(matrix, rows, source.slots, source.pad_slot)
    with precision(params.dtype):
        values = cells.values.astype(params.compute_dtype, copy=False)
        own = Own(
            place.put(cells.ids),
            place.put(values),
            place.put(cells.lengths),
            place.put(cells.long_cells),
        )
    return Side(rows, own, np.diff(matrix.indptr))


def start(data: Data, user_factors: np.ndarray, item_factors: np.ndarray) -> AlsState:
    """Place initial tables (M, K) and (N, K), given in the caller's order."""
    tables = []
    for table, side in ((user_factors, data.users), (item_factors, data.items)):
        expected = (side.n_rows, data.params.factors)
        if table.shape != expected:
            raise ValueError(f"an initial table has shape {table.shape}, expected {expected}")
        slots = layout.to_slots(table.astype(DTYPES[data.params.dtype]), side.rows)
        with precision(data.params.dtype):
            tables.append(data.place.put(slots))
    return AlsState(*tables)


def user_factors(state: AlsState, data: Data) -> np.ndarray:
    """User table (M, K) in the caller's order: a writeable float32 or float64 copy."""
    return _fetch(state.users, data.users, data)


def item_factors(state: AlsState, data: Data) -> np.ndarray:
    """Item table (N, K) in the caller's order: a writeable float32 or float64 copy."""
    return _fetch(state.items, data.items, data)


def _fetch(table: Shards, side: Side, data: Data) -> np.ndarray:
    rows = layout.from_slots(data.place.get(table), side.rows)
    return rows.astype(data.params.compute_dtype, copy=False)


def epoch(state: AlsState, data: Data, objective: Objective) -> tuple[AlsState, tuple[int, int]]:
    """One iteration: users against items, then items against the new users.

    Returns
    -------
    state : AlsState
        The new tables; the old state stays valid.
    failed : (int, int)
        Rows of the new user and item tables with a non-finite value.
    """
    users = half_epoch(state.users, state.items, data, objective, target="users")
    items = half_epoch(state.items, users, data, objective, target="items")
    with precision(data.params.dtype):
        count = data.place.whole(_count_failed, None)
        failed = int(count(users)[0]), int(count(items)[0])
    return AlsState(users, items), failed


def half_epoch(
    target_table: Shards, source_table: Shards, data: Data, objective: Objective, *, target: str
) -> Shards:
    """Solve all rows of the target table against the source table, which is held fixed."""
    params, where = data.params, data.place
    side, source = (data.users, data.items)[:: 1 if target == "users" else -1]
    with precision(params.dtype):
        objective = _typed(objective, params)
        prepare = where.whole(_prepare, (params.linear_solver, params.compute_dtype))
        fixed, begin = prepare(source_table, target_table, np.int32(source.n_rows), objective)
        programs = _programs(sweep.solve_rung, sweep.solve_long, side, data, fixed, objective)
        return where.run(programs, begin, side.own, params.dtype)


def _prepare(
    static: tuple[str, str], table: Array, target: Shards, n_source: Array, objective: Objective
) -> tuple[Fixed, Shards]:
    """Fix the source table, and copy the target table into the basis its solver works in."""
    solver, dtype = static
    gram = solve.gramian(table, dtype)
    fixed = solve.fix(table, gram, n_source.astype(dtype), objective, solver, jnp.dtype(dtype))
    return fixed, jax.tree.map(lambda rows: solve.begin(rows, fixed), target)


def _count_failed(static: None, table: Array) -> tuple[Array, None]:
    return jnp.sum(~solve.finite_rows(table)), None


def _programs(
    rung_pass: Any, long_pass: Any, side: Side, data: Data, fixed: Fixed, objective: Objective
) -> list[tuple[Any, Shared]]:
    """One program and its arguments for each rung in use, and one for the long rows."""
    where, params, rows = data.place, data.params, side.rows
    programs = []
    for rung in rows.rungs:
        span = Span(*np.array([rung.first_cell, rung.first_slot, rung.n_chunks], np.int32))
        program = where.each(rung_pass, params.shape(rung.rows, rung.length))
        programs.append((program, Shared(fixed, objective, span)))
    if rows.n_long:
        span = Span(*np.array([rows.long_cell, rows.long_slot, rows.n_long], np.int32))
        program = where.each(long_pass, params.shape(1, data.plan.lengths[-1]))
        programs.append((program, Shared(fixed, objective, span)))
    return programs


def _typed(objective: Objective, params: AlsParams) -> Objective:
    return Objective(*(np.dtype(params.compute_dtype).type(number) for number in objective))


def loss(state: AlsState, data: Data, objective: Objective) -> float:
    """Loss at the tables, in implicit's normalisation: over the sum of all cells' weights.

    The sum over all cells is a0 tr(X^T X Y^T Y); the stored cells add what differs.
    """
    params, where = data.params, data.place
    with precision(params.dtype):
        typed = _typed(objective, params)
        dtype = np.dtype(params.compute_dtype)
        plain = where.whole(_prepare, ("cholesky", params.compute_dtype))
        fixed, _ = plain(state.items, None, np.int32(data.items.n_rows), typed)
        measured = Measured(data.users.own, state.users)
        programs = _programs(
            sweep.loss_rung, sweep.loss_long, data.users, data, fixed, typed
        )
        rows = data.users.rows
        out = where.zeros((rows.n_shards, rows.n_slots), dtype)
        cells = where.get(where.run(programs, out, measured, params.dtype)).sum(dtype=np.float64)
        users = plain(state.users, None, np.int32(data.users.n_rows), typed)[0].gramian
        squares = where.whole(_squares, params.compute_dtype)
        norms = [np.asarray(squares(table)[0], np.float64) for table in state]
    every = np.sum(np.asarray(users, np.float64) * np.asarray(fixed.gramian, np.float64))
    ridges = sum(
        (solve.ridge(objective, side.lengths, source.n_rows) * norm[side.rows.slots]).sum()
        for side, source, norm in (
            (data.users, data.items, norms[0]),
            (data.items, data.users, norms[1]),
        )
    )
    n_cells = data.users.n_rows * data.items.n_rows
    # implicit counts a disliked cell as |c| (1 + t^2), so every stored cell has the constant |c|.
    constant = objective.alpha * data.absolute_sum
    total = cells + constant + objective.unobserved_weight * every + ridges
    weights = constant - objective.offset * data.n_entries
    return float(total / (weights + objective.unobserved_weight * n_cells))


def _squares(dtype: str, table: Array) -> tuple[Array, None]:
    return jnp.sum(jnp.square(table.astype(dtype)), axis=1), None


@dataclass(frozen=True)
class Source:
    """A table (N, K) placed for `solve_rows`, with its gramian."""

    fixed: Fixed
    n_rows: int
    dtype: str
    place: Workplace


def source(table: np.ndarray, params: AlsParams, place: Workplace) -> Source:
    """Place a fixed table (N, K), in the caller's order, to solve rows against."""
    n_rows, factors = table.shape
    # Nearby sizes share programs; the last row stays zero for pad cells.
    padded = np.zeros((layout.round_up(n_rows + 1), factors), DTYPES[params.dtype])
    padded[:n_rows] = table
    with precision(params.dtype):
        placed = jax.device_put(padded, place.devices[0])
        gram = _gramian(placed, params.compute_dtype)
        count = np.dtype(params.compute_dtype).type(n_rows)
    return Source(Fixed(placed, gram, None, None, count), n_rows, params.dtype, place)


_gramian = jax.jit(solve.gramian, static_argnums=1)


def solve_rows(
    rows: sparse.csr_matrix,
    source: Source,
    objective: Objective,
    params: AlsParams,
    *,
    start: np.ndarray | None = None,
    gramian: np.ndarray | None = None,
) -> np.ndarray:
    """Solve equation (1) for the rows of a matrix against a fixed table.

    A row's result depends on that row alone, not on what else is in the batch.

    Parameters
    ----------
    rows : CSR matrix (M, N)
        Stored entries of each row.
    source : Source
        The fixed table.
    objective : Objective
        Equations (1)-(2).
    params : AlsParams
        With "cholesky" the rows are solved exactly.
    start : array (M, K), optional
        Where "cg" begins; zero by default.
    gramian : array (K, K), optional
        Used in place of the table's own.

    Returns
    -------
    array (M, K)
        float32 or float64. A row that could not be solved is NaN.
    """
    dtype = np.dtype(params.compute_dtype)
    lengths = np.diff(rows.indptr)
    plan = _fold_in_plan(lengths, params, source.place)
    where = layout.map_rows(lengths, plan)
    cells = layout.fill(rows.astype(dtype), where, np.arange(source.n_rows), source.n_rows)
    begin = np.zeros((rows.shape[0], params.factors), dtype) if start is None else start
    table = layout.to_slots(begin.astype(dtype), where)[0]
    objective = _typed(objective, params)

    def work(job: tuple[int, int, Shape]) -> None:
        slot, cell, shape = job
        at = slice(slot, slot + shape.rows)
        part = slice(cell, cell + shape.rows * shape.length)
        ids = cells.ids[0, part].reshape(shape.rows, shape.length)
        values = cells.values[0, part].reshape(shape.rows, shape.length)
        with precision(params.dtype):
            table[at] = _solve_chunk(
                shape, fixed, objective, ids, values, cells.lengths[0, at], table[at]
            )

    with precision(params.dtype):
        fixed = _fixed(source.fixed, objective, params, gramian)
    jobs = [
        (rung.first_slot + i * rung.rows, rung.first_cell + i * rung.rows * rung.length,
         params.shape(rung.rows, rung.length))
        for rung in where.rungs for i in range(rung.n_chunks)
    ]  # fmt: skip
    source.place.threads(work, jobs)
    return layout.from_slots(table[None], where)


def _fold_in_plan(lengths: np.ndarray, params: AlsParams, place: Workplace) -> Plan:
    """Rungs that are the same for every batch; they double for as long as there are rows."""
    kind = "cpu" if place.platform == "cpu" else "other"
    chunk, most_rows = _chunk_sizes(params, kind)
    longest = max(int(lengths.max(initial=0)), layout.SHORTEST)
    rungs = 2 ** np.arange(int(np.log2(layout.SHORTEST)), longest.bit_length() + 1)
    return Plan(tuple(rungs.tolist()), chunk, min(most_rows, _FOLD_IN_ROWS[kind]), 1)


def _fixed(
    fixed: Fixed, objective: Objective, params: AlsParams, gramian: np.ndarray | None
) -> Fixed:
    if gramian is not None:
        fixed = fixed._replace(gramian=jnp.asarray(gramian, params.compute_dtype))
    if params.linear_solver == "cholesky":
        return fixed
    return _fix(fixed, objective, params.linear_solver, params.compute_dtype)


def _fix_source(fixed: Fixed, objective: Objective, solver: str, dtype: str) -> Fixed:
    assert fixed.gramian is not None
    return solve.fix(
        fixed.table, fixed.gramian, fixed.n_source, objective, solver, jnp.dtype(dtype)
    )


_fix = jax.jit(_fix_source, static_argnums=(2, 3))


def _solve_chunk_of(
    shape: Shape, fixed: Fixed, objective: Objective,
    ids: Array, values: Array, lengths: Array, z: Array,
) -> Array:  # fmt: skip
    block = solve.gather(fixed, objective, ids, values, lengths, jnp.dtype(shape.dtype))
    return sweep.solve_block(shape, fixed, objective, block, lengths, solve.begin(z, fixed))


_solve_chunk = jax.jit(_solve_chunk_of, static_argnums=0)
