"""Alternating least squares over a workplace: gramian, half-epoch, epoch, loss, fold-in.

One `half_epoch` serves both sides: *target* is the table being solved, *source* the one held
fixed. Tables stay in the layout's slot order on the devices; `user_factors` and `item_factors`
bring them back to the caller's order.

Axis letters: W work shards, S slots of a shard, K factors, M target rows, N source rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
_SCRATCH = {
    "cpu": 1 << 20,
    "other": 1 << 26,
}  # bytes of a gathered chunk; a core's own cache on CPU
_SYSTEMS = {"cpu": 1 << 22, "other": 1 << 28}  # bytes of the K x K systems of a chunk
# Factors times cells that take as long, over a fit or a few, as compiling one more rung.
_RUNG_CELLS = {"cpu": 4e6, "other": 1e8}
_RUNGS_A_PROGRAM = 4
_LADDER_SLACK = 1.1  # padding accepted, against the best ladder's, for a ladder compiled before
_SHARED_WASTE = 1 << 26  # bytes of unused slots that sharing programs between the sides may cost


# Bytes a second that gathered entries are re-read with, and flops of batched products and solves.
_SPEEDS = {"cpu": (1e11, 4e10), "other": (2e12, 2e13)}
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
    linear_solver : {"cg", "cholesky", "subspace", "auto"}
        How the rows' systems (1) are solved; "auto" takes the cheapest by `cheapest_solver`.
    cg_steps : int
        Steps of "cg".
    block_size : int
        Factors solved at once by "subspace".
    positive : bool
        No weight w will be negative, as with the objective "ials": "cholesky" may then solve short
        rows through a system of their own length.
    """

    factors: int
    dtype: str = "float32"
    linear_solver: str = "cg"
    cg_steps: int = 3
    block_size: int = 64
    positive: bool = False

    @property
    def compute_dtype(self) -> str:
        """What sums and solves are done in."""
        return "float64" if self.dtype == "float64" else "float32"

    def shape(self, rows: int, length: int) -> Shape:
        """The static part of a rung's program."""
        return Shape(
            self.linear_solver,
            self.cg_steps,
            self.block_size,
            self.compute_dtype,
            rows,
            length,
            self.positive and self.linear_solver == "cholesky",
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
    chunk, most_rows = chunk_sizes(params, place)
    rung_cells = _RUNG_CELLS[backend_kind(place)] / params.factors
    best = layout.ladder(lengths, rung_cells)
    known = _ladders.setdefault((params, place), [])
    bound = _LADDER_SLACK * layout.padded_cells(lengths, best) + rung_cells
    for ladder in known:
        if layout.padded_cells(lengths, ladder) <= bound:
            return Plan(ladder, chunk, most_rows, place.n_shards)
    known.append(best)
    return Plan(best, chunk, most_rows, place.n_shards)


def backend_kind(place: Workplace) -> str:
    """Which of the measured constants hold: "cpu", or "other" for accelerators."""
    return "cpu" if place.platform == "cpu" else "other"


def chunk_sizes(params: AlsParams, place: Workplace) -> tuple[int, int]:
    """Cells of a chunk, a power of two, and the most rows that its scratch allows."""
    kind, size = backend_kind(place), np.dtype(params.compute_dtype).itemsize
    chunk = max(_SCRATCH[kind] // (params.factors * size), 256)
    system = {"cg": 0, "cholesky": params.factors, "subspace": params.block_size}
    system_bytes = system[params.linear_solver] ** 2 * size
    most_rows = max(_SYSTEMS[kind] // system_bytes, 1) if system_bytes else 1 << 30
    return 1 << (chunk.bit_length() - 1), most_rows


def cheapest_solver(
    lengths: tuple[np.ndarray, np.ndarray], params: AlsParams, place: Workplace
) -> str:
    """Name the solver with the least predicted time for one iteration.

    "cg" and "subspace" read each gathered entry a few times, at the speed of memory; "cholesky" and
    "subspace" multiply, at the speed of the matrix units. The two speeds of a CPU are measured
    (docs/performance.md); those of accelerators are of the order that their makers state.
    """
    entries, rows = (float(sum(f(each) for each in lengths)) for f in (np.sum, len))
    read, multiply = _SPEEDS[backend_kind(place)]
    factors, block = params.factors, min(params.block_size, params.factors)
    passes = 2 * (params.cg_steps + 1)
    seconds = {
        "cg": entries * factors * 4 * passes / read,
        "cholesky": (2 * entries * factors**2 + rows * factors**3 / 3) / multiply,
        "subspace": entries * factors * 4 * 3 / read
        + (2 * entries * factors * block + rows * factors * block**2 / 3) / multiply,
    }
    return min(seconds, key=lambda name: seconds[name])


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
    if params.linear_solver == "auto":
        params = replace(params, linear_solver=cheapest_solver(lengths, params, place))
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
        failed = (
            int(count(users, data.users.own.lengths)[0]),
            int(count(items, data.items.own.lengths)[0]),
        )
    return AlsState(users, items), failed


def half_epoch(
    target_table: Shards, source_table: Shards, data: Data, objective: Objective, *, target: str
) -> Shards:
    """Solve all rows of the target table against the source table, which is held fixed."""
    params, where = data.params, data.place
    side, source = (data.users, data.items)[:: 1 if target == "users" else -1]
    with precision(params.dtype):
        objective = typed(objective, params)
        prepare = where.whole(_prepare, params.compute_dtype)
        fixed, begin = prepare(
            source_table, target_table, side.own.lengths, np.int32(source.n_rows)
        )
        programs = _programs(sweep.solve_rungs, side, data, fixed, objective)
        return where.run(programs, begin, side.own, params.dtype)


def _prepare(
    dtype: str, table: Array, target: Shards, lengths: Shards, n_source: Array
) -> tuple[Fixed, Shards]:
    """Rotate the source table, and a copy of the target table to start from."""
    fixed = solve.fix(table, solve.gramian(table, dtype), n_source.astype(dtype))

    def begin(rows: Array, lengths: Array) -> Array:
        return solve.zero_empty(solve.rotate(rows, fixed.rotation), lengths)

    return fixed, jax.tree.map(begin, target, lengths)


def _count_failed(_: None, table: Array, lengths: Shards) -> tuple[Array, None]:
    """Rows with entries that are not finite; a failed basis also spoils slots that no row uses."""
    return jnp.sum(~solve.finite_rows(table) & (jnp.concatenate(lengths) > 0)), None


def _programs(
    rungs_pass: Any, side: Side, data: Data, fixed: Fixed, objective: Objective
) -> list[tuple[Any, Shared]]:
    """Programs, with what they read, that together pass over all rungs and the long rows.

    A few rungs share a program: each program is a dispatch in every half-epoch, while rungs in
    programs of their own compile side by side.
    """
    params, rows = data.params, side.rows
    parts = [
        (
            params.shape(rung.rows, rung.length),
            (rung.first_cell, rung.first_slot, rung.n_chunks),
        )
        for rung in rows.rungs
    ]
    if rows.n_long:
        shape = params.shape(1, data.plan.lengths[-1])._replace(long=True)
        parts.append((shape, (rows.long_cell, rows.long_slot, rows.n_long)))
    programs = []
    for low in range(0, len(parts), _RUNGS_A_PROGRAM):
        shapes, spans = zip(*parts[low : low + _RUNGS_A_PROGRAM], strict=True)
        traced = tuple(Span(*np.array(span, np.int32)) for span in spans)
        program = data.place.each(rungs_pass, shapes)
        programs.append((program, Shared(fixed, objective, traced)))
    return programs


def typed(objective: Objective, params: AlsParams) -> Objective:
    """The objective's numbers in the dtype that sums are done in."""
    return Objective(*(np.dtype(params.compute_dtype).type(number) for number in objective))


def loss(state: AlsState, data: Data, objective: Objective) -> float:
    """Loss at the tables, in implicit's normalisation: over the sum of all cells' weights.

    The sum over all cells is a0 tr(X^T X Y^T Y); the stored cells add what differs.
    """
    params, where = data.params, data.place
    with precision(params.dtype):
        given = typed(objective, params)
        dtype = np.dtype(params.compute_dtype)
        count = np.int32(data.items.n_rows)
        fixed, _ = where.whole(_plain, params.compute_dtype)(state.items, count)
        measured = Measured(data.users.own, state.users)
        programs = _programs(sweep.loss_rungs, data.users, data, fixed, given)
        rows = data.users.rows
        out = where.zeros((rows.n_shards, rows.n_slots), dtype)
        cells = where.get(where.run(programs, out, measured, params.dtype)).sum(dtype=np.float64)
        gram = where.whole(_gramian_of, params.compute_dtype)
        squares = where.whole(_squares, params.compute_dtype)
        users, items = (np.asarray(gram(table)[0], np.float64) for table in state)
        norms = [np.asarray(squares(table)[0], np.float64) for table in state]
    every = np.sum(users * items)
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


def _plain(dtype: str, table: Array, n_source: Array) -> tuple[Fixed, None]:
    return solve.unrotated(table, n_source.astype(dtype)), None


def _gramian_of(dtype: str, table: Array) -> tuple[Array, None]:
    return solve.gramian(table, dtype), None


def _squares(dtype: str, table: Array) -> tuple[Array, None]:
    return jnp.sum(jnp.square(table.astype(dtype)), axis=1), None
