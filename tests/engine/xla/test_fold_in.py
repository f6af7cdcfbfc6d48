"""Rows solved against a fixed table, alone or among others, equal the dense oracle's."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import fold_in
from tpu_als.engine.xla.mesh import device_mesh

EXACT = {
    "cg": AlsParams(4, cg_steps=7),
    "cholesky": AlsParams(16, linear_solver="cholesky"),
}
OBJECTIVES = [
    oracle.Objective("implicit", 0.5, 2.0, 0.3, 0.5),
    oracle.Objective("ials", 0.05, 1.5, 0.4, 0.3),
]
N = 50


def _rows(seed: int, count: int = 20) -> sparse.csr_matrix:
    """Rows of 0 to 50 entries; a quarter negative, a few stored zeros."""
    rng = np.random.default_rng(seed)
    stored = rng.random((count, N)) < rng.choice([0, 0.05, 0.4, 1], (count, 1))
    rows, columns = np.nonzero(stored)
    values = rng.integers(0, 5, len(rows)) * np.where(rng.random(len(rows)) < 0.25, -1, 1)
    return sparse.csr_matrix((values.astype(np.float32), (rows, columns)), (count, N))


def _table(factors: int) -> np.ndarray:
    return (0.5 * np.random.default_rng(1).normal(size=(N, factors))).astype(np.float32)


@pytest.mark.parametrize(("devices", "threads"), [(1, 1), (1, 2), (4, 0)])
@pytest.mark.parametrize(
    ("solver", "dtype"),
    [
        ("cholesky", "float32"),
        pytest.param("cg", "float32", marks=pytest.mark.slow),
        pytest.param("cholesky", "float64", marks=pytest.mark.slow),
    ],
)
def test_rows_equal_the_oracles(solver: str, dtype: str, devices: int, threads: int) -> None:
    params = dataclasses.replace(EXACT[solver], dtype=dtype)
    table = _table(params.factors)
    source = fold_in.source(table, params, device_mesh(devices, num_threads=threads))
    for seed, objective in enumerate(OBJECTIVES):
        rows = _rows(seed)
        ours = source.solve(rows, Objective.of(*objective))
        exact = oracle.fold_in(rows, table, objective)
        assert ours.dtype == dtype and ours.shape == (20, params.factors)
        atol = (2e-3 if dtype == "float32" else 1e-8) * np.abs(exact).max()
        np.testing.assert_allclose(ours, exact, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("solver", EXACT)
@given(seed=st.integers(0, 1 << 32))
def test_a_row_does_not_depend_on_its_batch(solver: str, seed: int) -> None:
    params = EXACT[solver]
    source = fold_in.source(_table(params.factors), params, device_mesh(1, num_threads=2))
    objective = Objective.of("implicit", 0.5, 2.0)
    rows = _rows(seed)
    together = source.solve(rows, objective)
    order = np.random.default_rng(seed).permutation(20)
    other = source.solve(rows[order], objective)
    np.testing.assert_array_equal(other, together[order])
    for row in (0, 7, 19):
        alone = source.solve(rows[row], objective)
        np.testing.assert_array_equal(alone[0], together[row])


def test_a_row_of_thousands_of_entries() -> None:
    table = np.random.default_rng(0).normal(size=(6000, 4)).astype(np.float32)
    rows = sparse.csr_matrix(np.ones((2, 6000), np.float32))
    params = EXACT["cholesky"]
    params = dataclasses.replace(params, factors=4)
    source = fold_in.source(table, params, device_mesh(1, num_threads=2))
    ours = source.solve(rows, Objective.of("ials", 0.1, 2.0))
    exact = oracle.fold_in(rows, table, oracle.Objective("ials", 0.1, 2.0))
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-3 * np.abs(exact).max())


def test_cg_starts_from_the_given_rows() -> None:
    params = AlsParams(4, "float64", cg_steps=1)
    table, rows, objective = _table(4), _rows(3), OBJECTIVES[1]
    source = fold_in.source(table, params, device_mesh(1, num_threads=1))
    exact = oracle.fold_in(rows, table, objective)
    ours = Objective.of(*objective)
    warm = source.solve(rows, ours, start=exact)
    np.testing.assert_allclose(warm, exact, atol=1e-9)
    cold = source.solve(rows, ours)
    assert np.abs(cold - exact).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("solver", EXACT)
def test_a_given_gramian_replaces_the_tables_own(solver: str) -> None:
    """Of a table with one more block of rows, whose items no row has met."""
    params = dataclasses.replace(EXACT[solver], dtype="float64")
    rng = np.random.default_rng(0)
    table = _table(params.factors).astype(np.float64)
    more = np.vstack([table, rng.normal(size=(30, params.factors))])
    rows, objective = _rows(4), oracle.Objective("implicit", 0.5, 2.0)
    wide = sparse.csr_matrix((rows.data, rows.indices, rows.indptr), (20, N + 30))
    source = fold_in.source(table, params, device_mesh(1, num_threads=1))
    ours = source.solve(rows, Objective.of(*objective), gram=more.T @ more)
    np.testing.assert_allclose(ours, oracle.fold_in(wide, more, objective), atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("solver", EXACT)
def test_a_failed_row_does_not_change_other_rows(solver: str) -> None:
    params = EXACT[solver]
    rows = _rows(0)
    bad = int(np.argmax(np.diff(rows.indptr) > 3))
    source = fold_in.source(_table(params.factors), params, device_mesh(1, num_threads=2))
    objective = Objective.of("implicit", 0.5, 100.0)
    good = source.solve(rows, objective)
    rows.data[rows.indptr[bad]] = 3e38
    ours = source.solve(rows, objective)
    assert not np.isfinite(ours[bad]).any()
    others = np.arange(20) != bad
    np.testing.assert_array_equal(ours[others], good[others])


@pytest.mark.parametrize("count", [0, 3])
def test_rows_without_entries_are_zero(count: int) -> None:
    params = EXACT["cholesky"]
    source = fold_in.source(_table(16), params, device_mesh(1, num_threads=1))
    rows = sparse.csr_matrix((count, N), dtype=np.float32)
    start = np.ones((count, 16), np.float32)
    objective = Objective.of("implicit", 0.5, 2.0)
    ours = source.solve(rows, objective, start=start)
    assert ours.shape == (count, 16) and not ours.any()


def test_other_rows_and_numbers_compile_nothing(new_compilations) -> None:
    params = EXACT["cg"]
    mesh = device_mesh(1, num_threads=2)
    objective = Objective.of("implicit", 0.5, 2.0)
    fold_in.source(_table(4), params, mesh).solve(_rows(0), objective)
    with new_compilations() as count:
        source = fold_in.source(-_table(4)[::-1], params, mesh)
        source.solve(_rows(1)[:7], Objective.of("ials", 1, 3, 0.1, 0.2))
    assert count.programs == 0


def test_its_programs_are_in_the_bounded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_in.CACHE, "most", 1)
    fold_in.CACHE.clear()
    objective = Objective.of("implicit", 0.5, 2.0)
    for factors in (3, 4, 5):
        source = fold_in.source(_table(factors), AlsParams(factors), device_mesh(1))
        source.solve(_rows(0)[:3, :4], objective)
        assert fold_in.CACHE.n_compiled() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["implicit", "ials"])
def test_one_more_column_stands_for_a_row_of_zeros(
    solver: str, objective: oracle.Objective
) -> None:
    """Entries there count in (2), as often as they are stored, and change nothing else."""
    params = dataclasses.replace(EXACT[solver], dtype="float64")
    table, rows = _table(params.factors).astype(np.float64), _rows(5)
    spread = sparse.hstack([rows, _rows(6)[:, :9]], "csr")
    clipped = sparse.csr_matrix(
        (spread.data, np.minimum(spread.indices, N), spread.indptr), (20, N + 1)
    )
    source = fold_in.source(table, params, device_mesh(1, num_threads=1))
    ours = source.solve(clipped, Objective.of(*objective))
    grown = np.vstack([table, np.zeros((9, params.factors))])
    exact = oracle.fold_in(spread, grown, objective, N)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-7 * np.abs(exact).max())


def test_rows_that_do_not_fit_the_table() -> None:
    params = EXACT["cg"]
    source = fold_in.source(_table(4), params, device_mesh(1, num_threads=1))
    objective, rows = Objective.of("implicit", 0.5, 2.0), _rows(0)
    wide = sparse.csr_matrix((rows.data, rows.indices, rows.indptr), (20, N + 2))
    with pytest.raises(ValueError, match="rows have 52 columns for a table of 50 rows"):
        source.solve(wide, objective)
    rows.indices[0] = -1
    with pytest.raises(ValueError, match="outside its shape"):
        source.solve(rows, objective)
