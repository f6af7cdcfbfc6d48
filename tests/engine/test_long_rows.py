"""Sums over millions of entries, and over tables of millions of rows, against float64 NumPy.

A running float32 sum of 1e6 like numbers is off by 1e-3; one over blocks by a few 1e-7.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from scipy import sparse

from tpu_als.engine import als, layout
from tpu_als.engine.cpu import half_epoch as loops
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.data import AlsParams, Data
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend, fold_in, placing, solve
from tpu_als.engine.xla.mesh import device_mesh

N, K = 1_000_000, 8
OBJECTIVE = Objective.of("implicit", 0.01, 40.0)
# devices, layout of the source table, solver, compiled loops
MESHES = {
    "loops": (1, "auto", "cg", True),
    "one device": (1, "auto", "cg", False),
    "replicated": (4, "replicated", "cholesky", False),
    "sharded": (4, "sharded", "cg", False),
}


class Problem(NamedTuple):
    """A matrix of one long row and short ones, both tables, and what must come out."""

    matrix: sparse.csr_matrix
    users: np.ndarray
    items: np.ndarray
    solved: np.ndarray
    loss: float


def _problem(n_columns: int) -> Problem:
    """Predictions are near 1, so that the loss is a thousandth of the weights it comes from."""
    rng = np.random.default_rng(0)
    lengths = [n_columns, 5, 300]
    ids = np.concatenate([np.sort(rng.choice(n_columns, n, replace=False)) for n in lengths])
    values = rng.integers(1, 5, len(ids)).astype(np.float32)
    values[::1000] *= -1
    matrix = sparse.csr_matrix((values, ids, np.cumsum([0, *lengths])), (3, n_columns))
    users = np.ones((3, K), np.float32)
    items = ((1 + 0.1 * rng.normal(size=(n_columns, K))) / K).astype(np.float32)
    return Problem(matrix, users, items, _solved(matrix, items), _loss(matrix, users, items))


def _rows(matrix: sparse.csr_matrix, items: np.ndarray) -> Any:
    """Source rows (n, K) and confidences (n,) of each row, in float64."""
    for low, high in zip(matrix.indptr, matrix.indptr[1:], strict=False):
        at = slice(low, high)
        yield items[matrix.indices[at]].astype(np.float64), 40.0 * matrix.data[at].astype("f8")


def _solved(matrix: sparse.csr_matrix, items: np.ndarray) -> np.ndarray:
    """Equation (1) in float64."""
    wide = items.astype(np.float64)
    common = wide.T @ wide + 0.01 * np.eye(K)
    return np.stack([
        np.linalg.solve(common + (rows.T * (np.abs(c) - 1)) @ rows, rows.T @ np.maximum(c, 0))
        for rows, c in _rows(matrix, items)
    ])  # fmt: skip


def _loss(matrix: sparse.csr_matrix, users: np.ndarray, items: np.ndarray) -> float:
    """The loss in float64, from all cells of each row."""
    total = weights = 0.0
    for user, (rows, c) in zip(users.astype(np.float64), _rows(matrix, items), strict=True):
        t, others = rows @ user, items.astype(np.float64) @ user
        total += (others**2).sum() - (t**2).sum()
        total += np.where(c > 0, c * (1 - t) ** 2, -c * (1 + t**2)).sum()
        weights += np.abs(c).sum() - len(c)
    for table in (users, items):
        total += 0.01 * (table.astype(np.float64) ** 2).sum()
    return total / (weights + matrix.shape[0] * matrix.shape[1])


@pytest.fixture(scope="module")
def problem() -> Problem:
    """One row of a million entries."""
    return _problem(N)


def _check(problem: Problem, data: Data) -> None:
    state = als.start(data, problem.users, problem.items)
    assert als.loss(state, data, OBJECTIVE) == pytest.approx(problem.loss, rel=1e-6)
    users = als.half_epoch(*state, data, OBJECTIVE, target="users")
    found = als.user_factors(als.AlsState(users, state.items), data)
    _close(found, problem)


def _close(users: np.ndarray, problem: Problem) -> None:
    """Of the long row to 1e-5; short ones are worse conditioned."""
    error = np.abs(users - problem.solved).max(axis=1) / np.abs(problem.solved).max(axis=1)
    assert error[0] < 1e-5 and error.max() < 1e-3


@pytest.mark.parametrize(
    "name",
    ["loops", *(pytest.param(name, marks=pytest.mark.slow) for name in MESHES if name != "loops")],
)
def test_rows_of_a_million_entries(name: str, problem: Problem) -> None:
    """Their loss and their solution, which the loops and the devices sum each in its own way."""
    devices, table_layout, solver, is_native = MESHES[name]
    params = AlsParams(K, "float32", solver, cg_steps=8)
    if is_native:
        data: Any = CpuBackend(2).place(problem.matrix, params)
    else:
        mesh = device_mesh(devices, num_threads=2, table_layout=table_layout)
        data = backend.place(problem.matrix, params, mesh)
    _check(problem, data)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_a_long_row_of_very_many_blocks(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a row of a hundred million entries has on a CPU."""
    planned = placing.make_plan

    def small(*args: Any) -> layout.Plan:
        return dataclasses.replace(planned(*args), lengths=(8,), chunk=32)

    monkeypatch.setattr(placing, "make_plan", small)
    problem = _problem(200_000)
    data = backend.place(problem.matrix, AlsParams(K, "float32", solver, 8), device_mesh(1))
    _check(problem, data)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_all_long_rows_are_solved_if_every_weight_vanishes(
    solver: str, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then rows are solved by division, but their batches have the size for the other solver."""
    planned = placing.make_plan
    short = lambda *args: dataclasses.replace(planned(*args), lengths=(8,))  # noqa: E731
    monkeypatch.setattr(placing, "make_plan", short)
    matrix = sparse.csr_matrix(np.ones((80, 300), np.float32))
    data = backend.place(matrix, AlsParams(4, "float32", solver), device_mesh(devices))
    assert len(data.users.rows.long) == 80
    rng = np.random.default_rng(0)
    users, items = (rng.normal(size=(n, 4)).astype(np.float32) for n in matrix.shape)
    state = als.start(data, users, items)
    objective = Objective.of("implicit", 1.0, 1.0)
    solved = als.half_epoch(state.users, state.items, data, objective, target="users")
    found = als.user_factors(als.AlsState(solved, state.items), data)
    expected = np.linalg.solve(items.T @ items + np.eye(4), items.sum(axis=0))
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_fold_in_of_a_million_entries(problem: Problem) -> None:
    params = AlsParams(K, linear_solver="cholesky")
    source = fold_in.source(problem.items, params, device_mesh(1))
    _close(source.solve(problem.matrix, OBJECTIVE), problem)


def test_gramians_of_tall_tables() -> None:
    """By XLA and by BLAS; a product over all rows is off by 1e-6 and more."""
    table = np.random.default_rng(0).random((1 << 20, K), dtype=np.float32)
    wide = table.astype(np.float64)
    by_xla = jax.jit(solve.gramian, static_argnums=1)(table, "float32")
    by_blas = loops.gramian(table, 2, np.float32)
    for found in (by_xla, by_blas):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wide.T @ wide, rtol=4e-7)


@pytest.mark.parametrize("n_rows", [1, 8, 96, 1001, 4096, 9 * 1024, 1 << 15, 1_048_577])
def test_blocks_of_a_gramian_cover_the_table(n_rows: int) -> None:
    for most in (1, 16, 256):
        size = solve._block_rows(n_rows, most)
        assert n_rows % size == 0 and (n_rows // size <= most or size == n_rows)
