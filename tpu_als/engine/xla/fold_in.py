"""Fold-in: solve one or more new rows against a fixed table.

Chunks have one fixed shape for each rung, whatever the batch. So a row's result depends on that row
alone, and serving compiles only a few programs.

Axis letters: M rows to solve, N source rows, K factors, R rows of a chunk, L padded length.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import sparse

from tpu_als.engine import cells, layout
from tpu_als.engine.data import AlsParams, dtype_named
from tpu_als.engine.layout import Plan, Rung
from tpu_als.engine.objective import Objective, typed
from tpu_als.engine.xla import solve, sweep
from tpu_als.engine.xla.data import static_of
from tpu_als.engine.xla.mesh import DeviceMesh, precision
from tpu_als.engine.xla.placing import backend_kind, chunk_sizes
from tpu_als.engine.xla.programs import CACHE, Program, PyTree
from tpu_als.engine.xla.solve import Basis, Cells
from tpu_als.engine.xla.sweep import Rows, Static
from tpu_als.validation import structure

_ROWS = {"cpu": 16, "other": 256}  # rows solved at once; few, so that one row is quick


@dataclass(frozen=True)
class Source:
    """A table (N, K) placed for `solve_rows`.

    Attributes
    ----------
    table : array (N', K)
        The rows, followed by rows of zeros; pad cells refer to the first of these.
    rotated : array (N', K)
        The same in the eigenbasis of the table's gramian.
    basis : Basis
        That basis.
    n_rows : int
        N.
    params : AlsParams
        The solver; with "cholesky" the rows are solved exactly.
    mesh : DeviceMesh
        Only its first device is used, with all its threads.
    """

    table: Array
    rotated: Array
    basis: Basis
    n_rows: int
    params: AlsParams
    mesh: DeviceMesh
    wants_gramian: ClassVar[bool] = False

    def solve(
        self,
        rows: sparse.csr_matrix,
        objective: Objective,
        *,
        start: np.ndarray | None = None,
        gram: np.ndarray | None = None,
        prior: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `solve_rows`."""
        return solve_rows(rows, self, objective, start=start, gramian=gram, prior=prior)


def source(table: np.ndarray, params: AlsParams, mesh: DeviceMesh) -> Source:
    """Place a fixed table (N, K), in the caller's order, to solve rows against."""
    n_rows, factors = table.shape
    padded = np.zeros((layout.round_up(n_rows + 1), factors), dtype_named(params.dtype))
    padded[:n_rows] = table
    with precision(params.dtype):
        placed = jax.device_put(padded, mesh.devices[0])
        count = np.dtype(params.compute_dtype).type(n_rows)
        rotated, basis = _rotated(placed, None, count, params.compute_dtype)
        return Source(placed, rotated, basis, n_rows, params, mesh)


@functools.partial(jax.jit, static_argnums=3)
def _rotated(
    table: Array, gramian: Array | None, n_source: Array | np.floating, dtype: str
) -> tuple[Array, Basis]:
    """The table in the eigenbasis of a gramian, by default its own, and that basis."""
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
    prior: np.ndarray | None = None,
) -> np.ndarray:
    """Solve equation (1) for the rows of a matrix against a fixed table.

    A row's result depends on that row alone, not on the other rows of the batch.

    Parameters
    ----------
    rows : CSR matrix (M, N) or (M, N + 1)
        Stored entries of each row. Column N means a row of zeros: its entries count in (2) and
        change nothing else.
    source : Source
        The fixed table.
    objective : Objective
        Equations (1)-(2).
    start : array (M, K), optional
        Start of the iterative solvers; zero by default.
    gramian : array (K, K), optional
        Replaces the table's gramian.
    prior : array (M, K), optional
        What each row is drawn to; zero by default.

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
    row_map = layout.map_rows(lengths, _plan(lengths, params, source.mesh))
    blocks = [(np.arange(len(lengths)), rows)]
    pad, shards = source.n_rows, range(1)
    ids, values = cells.fill(blocks, row_map, np.arange(pad + 1), pad, shards, dtype)
    assert values is not None
    counts = layout.to_slots(lengths.astype(np.int32), row_map, shards)[0]
    if start is None:
        start = np.zeros((rows.shape[0], params.factors), dtype)
    table = layout.to_slots(start.astype(dtype), row_map, shards)[0]
    priors = None
    if prior is not None:
        priors = layout.to_slots(prior.astype(dtype), row_map, shards)[0]
    objective = typed(objective, params.compute_dtype)
    source_table, basis = source.rotated, source.basis
    with precision(params.dtype):
        if gramian is not None:
            source_table, basis = _rotated(
                source.table, gramian.astype(dtype), basis.n_source, params.compute_dtype
            )

    programs = {r: _program(static_of(params, r.rows, r.length)) for r in row_map.rungs}

    def slots(rung: Rung, number: int) -> slice:
        first = rung.first_slot + number * rung.rows
        return slice(first, first + rung.rows)

    def arguments(rung: Rung, number: int) -> tuple[PyTree, ...]:
        at, size = slots(rung, number), rung.rows * rung.length
        first = rung.first_cell + number * size
        chunk = (array[0, first : first + size] for array in (ids, values))
        chunk_ids, chunk_values = (array.reshape(rung.rows, rung.length) for array in chunk)
        chunk_cells = Cells(chunk_ids, chunk_values, counts[at])
        drawn_to = None if priors is None else priors[at]
        return source_table, basis, objective, chunk_cells, (table[at], drawn_to)

    def work(job: tuple[Rung, int]) -> None:
        with precision(params.dtype):
            table[slots(*job)] = programs[job[0]](*arguments(*job))

    calls = [(program, arguments(rung, 0)) for rung, program in programs.items()]
    source.mesh.compile(calls, params.dtype)
    source.mesh.threads(work, [(r, number) for r in row_map.rungs for number in range(r.n_chunks)])
    return layout.from_slots(table[None], row_map)


def _plan(lengths: np.ndarray, params: AlsParams, mesh: DeviceMesh) -> Plan:
    """Rungs that are the same for every batch: each is four times as long as the one before."""
    chunk, most_rows = chunk_sizes(params, mesh)
    longest = max(int(lengths.max(initial=0)), layout.SHORTEST)
    n_rungs = int(np.ceil(np.log(longest / layout.SHORTEST) / np.log(4))) + 1
    rungs = tuple(layout.SHORTEST * 4**rung for rung in range(n_rungs))
    return Plan(rungs, chunk, min(most_rows, _ROWS[backend_kind(mesh)]), 1)


@CACHE.keep
def _program(static: Static) -> Program:
    """Compiled program that solves the rows of one chunk."""

    def chunk(
        source_table: Array,
        basis: Basis,
        objective: Objective,
        chunk_cells: Cells,
        given: tuple[Array, Array | None],
    ) -> Array:
        block = solve.gather(source_table, objective, chunk_cells, jnp.dtype(static.dtype))
        start, prior = jax.tree.map(lambda rows: solve.rotate(rows, basis.rotation), given)
        rows = Rows(block, chunk_cells.n_entries, start, prior)
        return sweep.solve_block(static, basis, objective, rows)

    return jax.jit(chunk)
