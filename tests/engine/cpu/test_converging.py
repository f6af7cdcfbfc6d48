"""Rows solved to convergence on a CPU: fold-in and exact fits, against a dense float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.engine import als
from tpu_als.engine.cpu import compiled, eigenbasis, exact, half_epoch
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective, confidence, ridge

N_ROWS, N_SOURCE = 60, 150
BOUNDS = {"float32": 1e-5, "float64": 1e-10}
OBJECTIVES = {
    "implicit": Objective.of("implicit", 1.0, 40.0),
    "no ridge": Objective.of("implicit", 0.0, 10.0),
    "alpha 1": Objective.of("implicit", 0.1, 1.0),
    "large weights": Objective.of("implicit", 0.01, 1e4),
    "ials": Objective.of("ials", 0.01, 1.0, 0.1),
    "ials, nu 0": Objective.of("ials", 5.0, 2.0, 0.02, 0.0),
    "implicit, nu 1": Objective.of("implicit", 1e-3, 20.0, 0.5, 1.0),
}


def _rows(seed: int = 0, is_signed: bool = False) -> sparse.csr_matrix:
    """Rows (60, 150) of up to 150 entries, of which the first is empty."""
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0, 1, (N_ROWS, 1)) ** 3
    dense = (rng.random((N_ROWS, N_SOURCE)) < shares) * rng.integers(1, 6, (N_ROWS, N_SOURCE))
    if is_signed:
        dense *= rng.choice([-1, 1], dense.shape, p=[0.2, 0.8])
    dense[0] = 0
    return sparse.csr_matrix(dense.astype(np.float32))


def _table(factors: int, dtype: Any) -> np.ndarray:
    """A table (150, K) with factors of different sizes, as ALS finds them."""
    rng = np.random.default_rng(1)
    sizes = 2.0 ** -np.linspace(0, 5, factors)
    mixed = np.linalg.qr(rng.normal(size=(factors, factors)))[0]
    return ((rng.normal(size=(N_SOURCE, factors)) + 1) * sizes @ mixed).astype(dtype)


def _systems(
    table: np.ndarray, rows: sparse.csr_matrix, objective: Objective
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Row, matrix and right side of equation (1) in float64, for rows with entries."""
    wide = table.astype(np.float64)
    for row in np.flatnonzero(np.diff(rows.indptr)):
        at = slice(rows.indptr[row], rows.indptr[row + 1])
        w, v = confidence(objective, rows.data[at].astype(np.float64))
        known, lam = wide[rows.indices[at]], ridge(objective, float(len(w)), float(len(wide)))
        matrix = objective.unobserved_weight * wide.T @ wide + lam * np.eye(table.shape[1])
        yield row, matrix + (known.T * w) @ known, known.T @ v


def _solved(table: np.ndarray, rows: sparse.csr_matrix, objective: Objective) -> np.ndarray:
    """Solutions of equation (1) by dense float64 matrices."""
    out = np.zeros((rows.shape[0], table.shape[1]))
    for row, matrix, rhs in _systems(table, rows, objective):
        out[row] = np.linalg.solve(matrix, rhs)
    return out


def _source(table: np.ndarray, n_threads: int = 2) -> exact.Source:
    params = AlsParams(table.shape[1], table.dtype.name, "cholesky")
    return exact.Source(table, params, n_threads)


def _errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(expected, axis=1)
    return np.linalg.norm(found - expected, axis=1)[lengths > 0] / lengths[lengths > 0]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("factors", [1, 7, 16, 50])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_solutions_are_accurate(name: str, factors: int, dtype: str) -> None:
    objective, table = OBJECTIVES[name], _table(factors, dtype)
    rows = _rows(is_signed=objective.offset > 0)
    found = _source(table).solve(rows, objective)
    assert found.dtype == dtype
    assert not found[0].any()
    errors = _errors(found, _solved(table, rows, objective))
    # The oracle itself is only as accurate as its matrices allow in float64.
    conditions = [np.linalg.cond(matrix) for _, matrix, _ in _systems(table, rows, objective)]
    own = np.finfo(np.float64).eps * np.array(conditions)
    assert (errors < np.maximum(BOUNDS[dtype], own)).all()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_bits_of_a_row_depend_on_no_other_row(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, rows = OBJECTIVES["implicit"], _rows()
    source = _source(_table(50, dtype))
    rows.data[rows.indptr[5] : rows.indptr[6]] *= 1e3  # changes the bound on the weights
    everything = source.solve(rows, objective)
    for n_threads in (1, 3):
        for at in ([7], [7, 5], list(range(3, 20)), [20, 7, 7]):
            found = source.on(n_threads).solve(rows[at], objective)
            np.testing.assert_array_equal(found, everything[at])
    np.testing.assert_array_equal(_source(source.table, 1).solve(rows, objective), everything)
    monkeypatch.setattr(eigenbasis, "_KEPT_BYTES", 0)  # rows are rotated in each call
    source = _source(source.table)
    for at in ([7], [7], list(range(N_ROWS)), [20, 7, 7]):
        np.testing.assert_array_equal(source.solve(rows[at], objective), everything[at])


HARD = {
    "small weights": Objective.of("implicit", 0.1, 1e-2),
    "nearly no weight": Objective.of("implicit", 0.1, 1e-8),
    "huge ridge": Objective.of("implicit", 1e12, 1e-4),
    "weights cancel the gramian": Objective.of("implicit", 0.1, 1e-4, 10.0),
    "small ridge": Objective.of("ials", 1e-6, 1.0, 0.1),
}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rank", [2, 30])
@pytest.mark.parametrize("name", HARD)
def test_ill_conditioned_rows_are_nearly_as_accurate(name: str, rank: int, dtype: str) -> None:
    objective, rng = HARD[name], np.random.default_rng(2)
    table = (rng.normal(size=(N_SOURCE, rank)) @ rng.normal(size=(rank, 30))).astype(dtype)
    rows = _rows()
    expected = _solved(table, rows, objective)
    conditions = [np.linalg.cond(matrix) for _, matrix, _ in _systems(table, rows, objective)]
    is_known = np.array(conditions) < 1e9  # of others the oracle knows nothing
    errors = _errors(_source(table).solve(rows, objective), expected)
    own = 256 * np.finfo(np.float64).eps * np.array(conditions)
    assert (errors < np.maximum(2 * BOUNDS[dtype], own))[is_known].all()


def test_weights_that_nearly_cancel_the_gramian_are_solved_accurately() -> None:
    """With few source rows and small values, as the condition of the system is small."""
    objective = Objective.of("implicit", 0.01, 1.0)
    table = np.array([[1.973761796951294, 0.7091234922409058]], np.float32)
    row = sparse.csr_matrix(np.array([[0.0029609515]], np.float32))
    assert _errors(_source(table).solve(row, objective), _solved(table, row, objective)) < 1e-6


@given(st.integers(0, 10**6))
def test_small_tables_and_values_are_solved_accurately(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_source, factors = int(rng.integers(1, 7)), int(rng.choice([1, 2, 3, 8, 32]))
    objective = Objective.of("implicit", 10.0 ** rng.uniform(-3, 1), rng.choice([0.5, 1, 5]))
    table = rng.standard_normal((n_source, factors)).astype(np.float32)
    dense = (rng.random((4, n_source)) < 0.7) * 10.0 ** rng.uniform(-4, 1, (4, n_source))
    rows = sparse.csr_matrix(dense.astype(np.float32))
    found, lengths = _source(table).solve(rows, objective), np.linalg.norm(table, axis=1)
    for row, matrix, rhs in _systems(table, rows, objective):
        # Targets are rounded to float32, and their sum may be much smaller than they are.
        sizes = objective.alpha * rows[row].data * lengths[rows[row].indices]
        rounding = np.finfo(np.float32).eps * sizes.sum() * np.linalg.norm(np.linalg.inv(matrix), 2)
        expected = np.linalg.solve(matrix, rhs)
        error = np.linalg.norm(found[row] - expected)
        assert error <= 1e-5 * np.linalg.norm(expected) + rounding


def test_a_huge_value_in_another_row_changes_nothing() -> None:
    objective, table, rows = OBJECTIVES["ials"], _table(16, "float32"), _rows()
    source = _source(table)
    alone = source.solve(rows[10:], objective)
    rows.data[rows.indptr[3]] = 1e34
    np.testing.assert_array_equal(source.solve(rows, objective)[10:], alone)


def test_weights_that_cancel_the_gramian_up_to_rounding_have_a_solution() -> None:
    table = np.random.default_rng(0).normal(size=(N_SOURCE, 17)).astype(np.float32)
    rows = sparse.csr_matrix(np.full((1, N_SOURCE), 1e-12, np.float32))
    found = _source(table).solve(rows, Objective.of("implicit", 0.0, 1e-2, 10.0))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gramians_do_not_depend_on_the_order_of_memory(dtype: str) -> None:
    wide = np.random.default_rng(0).normal(size=(300, 2 * 33)).astype(dtype)
    table = np.ascontiguousarray(wide[:, ::2])
    expected = half_epoch.gramian(table, 1, np.float64)
    for other in (wide[:, ::2], np.asfortranarray(table)):
        np.testing.assert_array_equal(half_epoch.gramian(other, 1, np.float64), expected)


def test_rows_that_do_not_converge_are_solved_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, table, rows = OBJECTIVES["implicit"], _table(16, "float32"), _rows()
    direct, solved = exact.Source.directly, []

    def counted(self: Any, some: Any, objective: Any, **options: Any) -> np.ndarray:
        solved.append(some.shape[0])
        return direct(self, some, objective, **options)

    monkeypatch.setattr(exact.Source, "directly", counted)
    monkeypatch.setattr(half_epoch, "most_steps", lambda factors: 2)
    found = _source(table).solve(rows, objective)
    assert 0 < solved[0] < N_ROWS  # rows of few entries need few steps
    assert _errors(found, _solved(table, rows, objective)).max() < 1e-5


def test_source_rows_that_are_missing_count_in_the_ridge_only() -> None:
    objective, table, rows = OBJECTIVES["ials"], _table(16, "float32"), _rows()
    wider = sparse.hstack([rows, sparse.csr_matrix(np.ones((N_ROWS, 1), np.float32))], "csr")
    found = _source(table).solve(wider, objective)
    # Of the entries of a row, one more counts in n_u, which is as if the ridge were larger.
    for row in (0, 1, 30):
        n_entries = float(np.diff(wider.indptr)[row])
        lam = ridge(objective, n_entries, float(N_SOURCE))
        scale = lam / ridge(objective, n_entries - 1, float(N_SOURCE))
        larger = objective._replace(regularization=objective.regularization * scale)
        expected = _solved(table, rows[row], larger)
        np.testing.assert_allclose(found[[row]], expected, rtol=1e-4, atol=1e-6)
    alone = _source(table).solve(wider[3], objective)
    np.testing.assert_array_equal(alone[0], found[3])


def test_a_table_is_read_in_each_call() -> None:
    objective, table, rows = OBJECTIVES["implicit"], _table(16, "float32"), _rows()
    source = _source(table)
    before = source.solve(rows, objective)
    table[:] = table[::-1].copy()  # the same gramian
    found = source.solve(rows, objective)
    assert not np.allclose(found, before)
    np.testing.assert_array_equal(source.solve(rows, objective), found)
    assert _errors(found, _solved(table, rows, objective)).max() < 1e-5


def test_without_numba_rows_are_solved_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, table, rows = OBJECTIVES["implicit"], _table(16, "float32"), _rows()
    monkeypatch.setattr(compiled, "is_available", lambda: False)
    found = _source(table).solve(rows, objective)
    assert _errors(found, _solved(table, rows, objective)).max() < 1e-5


@pytest.mark.parametrize("relaxation", [1.0, 1.5])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("steps", [None, 2])
def test_a_half_epoch_solves_every_row(
    dtype: str, relaxation: float, steps: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if steps:  # most rows are then solved by LAPACK
        monkeypatch.setattr(half_epoch, "most_steps", lambda factors: steps)
    rows, objective = _rows(is_signed=True), OBJECTIVES["implicit"]
    items = _table(16, dtype)
    before = np.random.default_rng(2).normal(size=(N_ROWS, 16)).astype(dtype)
    backend = CpuBackend(2)
    data = backend.place(rows, AlsParams(16, dtype, "exact"))
    after = als.half_epoch(before, items, data, objective, relaxation, target="users")
    expected = before + relaxation * (_solved(items, rows, objective) - before)
    used = np.diff(rows.indptr) > 0
    assert _errors(after[used], expected[used]).max() < 2 * BOUNDS[dtype]
    assert not after[0].any()


def test_an_exact_fit_ends_with_solutions_of_the_users_last_update() -> None:
    rows = _rows(is_signed=True)
    before, after = (
        TPUAlternatingLeastSquares(16, 1.0, 40.0, use_cg=False, iterations=n, random_state=0).fit(
            rows, show_progress=False
        )
        for n in (2, 3)
    )
    expected = _solved(before.item_factors, rows, OBJECTIVES["implicit"])
    assert _errors(after.user_factors, expected).max() < 1e-5
