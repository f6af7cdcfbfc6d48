"""Fold-in: solve one or more new rows against a fixed table.

Chunks have one fixed shape for each rung, whatever else is in the batch. So a row's result depends
on that row alone, and serving compiles only a few programs.

Axis letters: M rows to solve, N source rows, K factors, R rows of a chunk, L padded length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import sparse

from tpu_als.engine import cells, layout
from tpu_als.engine.data import DTYPES, AlsParams
from tpu_als.engine.layout import Plan, Rung
from tpu_als.engine.objective import Objective, typed
from tpu_als.engine.xla import solve, sweep
from tpu_als.engine.xla.data import shape_of
from tpu_als.engine.xla.mesh import Workplace, precision
from tpu_als.engine.xla.placing import backend_kind, chunk_sizes
from tpu_als.engine.xla.solve import Basis
from tpu_als.engine.xla.sweep import Shape
from tpu_als.validation import structure

_ROWS = {"cpu": 16, "other": 256}  # rows solved at once; few, so that one row is quick


@dataclass(frozen=True)
class Source:
    """A table (N, K) placed for `solve_rows`.

    Attributes
    ----------
    table : array (N', K)
        The rows, and zero rows, of which pad cells use the first.
    rotated : array (N', K)
        The same in the eigenbasis of the table's gramian.
    basis : Basis
        That basis.
    n_rows : int
        N.
    params : AlsParams
        The solver; with "cholesky" the rows are solved exactly.
    place : Workplace
        The first of its devices does the work, with all its threads.
    """

    table: Array
    rotated: Array
    basis: Basis
    n_rows: int
    params: AlsParams
    place: Workplace
    wants_gramian: ClassVar[bool] = False

    def solve(
        self,
        rows: sparse.csr_matrix,
        objective: Objective,
        *,
        start: np.ndarray | None = None,
        gram: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `solve_rows`."""
        return solve_rows(rows, self, objective, start=start, gramian=gram)


def source(table: np.ndarray, params: AlsParams, place: Workplace) -> Source:
    """Place a fixed table (N, K), in the caller's order, to solve rows against."""
    n_rows, factors = table.shape
    padded = np.zeros((layout.round_up(n_rows + 1), factors), DTYPES[params.dtype])
    padded[:n_rows] = table
    with precision(params.dtype):
        placed = jax.device_put(padded, place.devices[0])
        count = np.dtype(params.compute_dtype).type(n_rows)
        rotated, basis = _rotated(placed, None, count, params.compute_dtype)
        return Source(placed, rotated, basis, n_rows, params, place)


@functools.partial(jax.jit, static_argnums=3)
def _rotated(table: Array, gramian: Array | None, n_source: Any, dtype: str) -> tuple[Array, Basis]:
    gramian = solve.gramian(table, dtype) if gramian is None else gramian
    basis = solve.basis(gramian, n_source)
    return solve.rotate(table, basis.rotation), basis


def solve_rows(
    rows: sparse.csr_matrix,
    source: Source,
    objective: Objective,
    *,
    start: np.ndarray | None = None,
    gramian: np.ndarray | None = None,
) -> np.ndarray:
    """Solve equation (1) for the rows of a matrix against a fixed table.

    A row's result depends on that row alone, not on what else is in the batch.

    Parameters
    ----------
    rows : CSR matrix (M, N) or (M, N + 1)
        Stored entries of each row. Column N stands for a row of zeros: entries there count in (2)
        and change nothing else.
    source : Source
        The fixed table.
    objective : Objective
        Equations (1)-(2).
    start : array (M, K), optional
        Start of the iterative solvers; zero by default.
    gramian : array (K, K), optional
        Used in place of the table's own.

    Returns
    -------
    array (M, K)
        float32 or float64. A row that could not be solved is NaN.
    """
    params = source.params
    structure.check_compressed(rows, "rows")
    if rows.shape[1] > source.n_rows + 1:
        raise ValueError(f"rows have {rows.shape[1]} columns for a table of {source.n_rows} rows")
    dtype = np.dtype(params.compute_dtype)
    lengths = np.diff(rows.indptr)
    where = layout.map_rows(lengths, _plan(lengths, params, source.place))
    blocks = [(np.arange(len(lengths)), rows)]
    pad, one = source.n_rows, range(1)
    all_ids, all_values = cells.fill(blocks, where, np.arange(pad + 1), pad, one, dtype)
    assert all_values is not None
    counts = layout.to_slots(lengths.astype(np.int32), where, one)[0]
    begin = np.zeros((rows.shape[0], params.factors), dtype) if start is None else start
    table = layout.to_slots(begin.astype(dtype), where, one)[0]
    objective = typed(objective, params.compute_dtype)
    held, basis = source.rotated, source.basis
    with precision(params.dtype):
        if gramian is not None:
            held, basis = _rotated(
                source.table, gramian.astype(dtype), basis.n_source, params.compute_dtype
            )

    def shape(rung: Rung) -> Shape:
        return shape_of(params, rung.rows, rung.length)

    def args(rung: Rung, number: int) -> tuple[slice, tuple[Any, ...]]:
        at = slice(rung.first_slot + number * rung.rows, rung.first_slot + (number + 1) * rung.rows)
        cell = rung.first_cell + number * rung.rows * rung.length
        part = slice(cell, cell + rung.rows * rung.length)
        ids, values = (
            each[0, part].reshape(rung.rows, rung.length) for each in (all_ids, all_values)
        )
        return at, (held, basis, objective, ids, values, counts[at], table[at])

    def work(job: tuple[Rung, int]) -> None:
        at, given = args(*job)
        with precision(params.dtype):
            table[at] = _program(shape(job[0]))(*given)

    calls = [(_program(shape(rung)), args(rung, 0)[1]) for rung in where.rungs]
    source.place.compile(calls, params.dtype)
    source.place.threads(work, [(r, number) for r in where.rungs for number in range(r.n_chunks)])
    return layout.from_slots(table[None], where)


def _plan(lengths: np.ndarray, params: AlsParams, place: Workplace) -> Plan:
    """Rungs that are the same for every batch; they grow fourfold for as long as there are rows."""
    chunk, most_rows = chunk_sizes(params, place)
    longest = max(int(lengths.max(initial=0)), layout.SHORTEST)
    n_rungs = int(np.ceil(np.log(longest / layout.SHORTEST) / np.log(4))) + 1
    rungs = tuple(layout.SHORTEST * 4**rung for rung in range(n_rungs))
    return Plan(rungs, chunk, min(most_rows, _ROWS[backend_kind(place)]), 1)


@functools.cache
def _program(shape: Shape) -> Callable[..., Any]:
    def chunk(
        held: Array, basis: Basis, objective: Objective,
        ids: Array, values: Array, lengths: Array, z: Array,
    ) -> Array:  # fmt: skip
        block = solve.gather(held, objective, ids, values, lengths, jnp.dtype(shape.dtype))
        z = solve.rotate(z, basis.rotation)
        return sweep.solve_block(shape, basis, objective, block, lengths, z)

    return jax.jit(chunk)
