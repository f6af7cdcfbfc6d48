"""Rows solved against a fixed table, alone or among others, equal the dense oracle's."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from tpu_als.engine.xla import fold_in, solve
from tpu_als.engine.xla.mesh import workplace
from tpu_als.engine.xla.placing import AlsParams

EXACT = {
    "cg": AlsParams(4, cg_steps=7),
    "cholesky": AlsParams(16, linear_solver="cholesky"),
    "subspace": AlsParams(4, linear_solver="subspace", block_size=4),
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
        *(pytest.param(solver, "float32", marks=pytest.mark.slow) for solver in ("cg", "subspace")),
        pytest.param("cholesky", "float64", marks=pytest.mark.slow),
    ],
)
def test_rows_equal_the_oracles(solver: str, dtype: str, devices: int, threads: int) -> None:
    params = dataclasses.replace(EXACT[solver], dtype=dtype)
    table = _table(params.factors)
    source = fold_in.source(table, params, workplace(devices, num_threads=threads))
    for seed, objective in enumerate(OBJECTIVES):
        rows = _rows(seed)
        ours = fold_in.solve_rows(rows, source, solve.objective(*objective), params)
        exact = oracle.fold_in(rows, table, objective)
        assert ours.dtype == dtype and ours.shape == (20, params.factors)
        atol = (2e-3 if dtype == "float32" else 1e-8) * np.abs(exact).max()
        np.testing.assert_allclose(ours, exact, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("solver", EXACT)
@given(seed=st.integers(0, 1 << 32))
def test_a_row_does_not_depend_on_its_batch(solver: str, seed: int) -> None:
    params = EXACT[solver]
    source = fold_in.source(_table(params.factors), params, workplace(1, num_threads=2))
    objective = solve.objective("implicit", 0.5, 2.0)
    rows = _rows(seed)
    together = fold_in.solve_rows(rows, source, objective, params)
    order = np.random.default_rng(seed).permutation(20)
    other = fold_in.solve_rows(rows[order], source, objective, params)
    np.testing.assert_array_equal(other, together[order])
    for row in (0, 7, 19):
        alone = fold_in.solve_rows(rows[row], source, objective, params)
        np.testing.assert_array_equal(alone[0], together[row])


def test_a_row_of_thousands_of_entries() -> None:
    table = np.random.default_rng(0).normal(size=(6000, 4)).astype(np.float32)
    rows = sparse.csr_matrix(np.ones((2, 6000), np.float32))
    params = EXACT["cholesky"]
    params = dataclasses.replace(params, factors=4)
    source = fold_in.source(table, params, workplace(1, num_threads=2))
    ours = fold_in.solve_rows(rows, source, solve.objective("ials", 0.1, 2.0), params)
    exact = oracle.fold_in(rows, table, oracle.Objective("ials", 0.1, 2.0))
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-3 * np.abs(exact).max())


def test_a_start_near_the_solution_needs_no_step_more() -> None:
    params = AlsParams(4, "float64", cg_steps=1)
    table, rows, objective = _table(4), _rows(3), OBJECTIVES[1]
    source = fold_in.source(table, params, workplace(1, num_threads=1))
    exact = oracle.fold_in(rows, table, objective)
    ours = solve.objective(*objective)
    warm = fold_in.solve_rows(rows, source, ours, params, start=exact)
    np.testing.assert_allclose(warm, exact, atol=1e-9)
    cold = fold_in.solve_rows(rows, source, ours, params)
    assert np.abs(cold - exact).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("solver", EXACT)
def test_a_given_gramian_takes_the_place_of_the_tables_own(solver: str) -> None:
    """Of a table with one more block of rows, whose items no row has met."""
    params = dataclasses.replace(EXACT[solver], dtype="float64")
    rng = np.random.default_rng(0)
    table = _table(params.factors).astype(np.float64)
    more = np.vstack([table, rng.normal(size=(30, params.factors))])
    rows, objective = _rows(4), oracle.Objective("implicit", 0.5, 2.0)
    wide = sparse.csr_matrix((rows.data, rows.indices, rows.indptr), (20, N + 30))
    source = fold_in.source(table, params, workplace(1, num_threads=1))
    ours = fold_in.solve_rows(
        rows, source, solve.objective(*objective), params, gramian=more.T @ more
    )
    np.testing.assert_allclose(ours, oracle.fold_in(wide, more, objective), atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("solver", EXACT)
def test_a_row_that_failed_is_not_finite_and_spoils_no_other(solver: str) -> None:
    params = EXACT[solver]
    rows = _rows(0)
    bad = int(np.argmax(np.diff(rows.indptr) > 3))
    source = fold_in.source(_table(params.factors), params, workplace(1, num_threads=2))
    objective = solve.objective("implicit", 0.5, 100.0)
    good = fold_in.solve_rows(rows, source, objective, params)
    rows.data[rows.indptr[bad]] = 3e38
    ours = fold_in.solve_rows(rows, source, objective, params)
    assert not np.isfinite(ours[bad]).any()
    others = np.arange(20) != bad
    np.testing.assert_array_equal(ours[others], good[others])


@pytest.mark.parametrize("count", [0, 3])
def test_rows_without_entries_are_zero(count: int) -> None:
    params = EXACT["cholesky"]
    source = fold_in.source(_table(16), params, workplace(1, num_threads=1))
    rows = sparse.csr_matrix((count, N), dtype=np.float32)
    start = np.ones((count, 16), np.float32)
    objective = solve.objective("implicit", 0.5, 2.0)
    ours = fold_in.solve_rows(rows, source, objective, params, start=start)
    assert ours.shape == (count, 16) and not ours.any()


def test_other_rows_and_numbers_compile_nothing(new_compilations) -> None:
    params = EXACT["cg"]
    where = workplace(1, num_threads=2)
    objective = solve.objective("implicit", 0.5, 2.0)
    fold_in.solve_rows(_rows(0), fold_in.source(_table(4), params, where), objective, params)
    with new_compilations() as count:
        source = fold_in.source(-_table(4)[::-1], params, where)
        fold_in.solve_rows(_rows(1)[:7], source, solve.objective("ials", 1, 3, 0.1, 0.2), params)
    assert count.programs == 0


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
    source = fold_in.source(table, params, workplace(1, num_threads=1))
    ours = fold_in.solve_rows(clipped, source, solve.objective(*objective), params)
    grown = np.vstack([table, np.zeros((9, params.factors))])
    exact = oracle.fold_in(spread, grown, objective, N)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-7 * np.abs(exact).max())


def test_rows_that_do_not_fit_the_table() -> None:
    params = EXACT["cg"]
    source = fold_in.source(_table(4), params, workplace(1, num_threads=1))
    objective, rows = solve.objective("implicit", 0.5, 2.0), _rows(0)
    wide = sparse.csr_matrix((rows.data, rows.indices, rows.indptr), (20, N + 2))
    with pytest.raises(ValueError, match="rows have 52 columns for a table of 50 rows"):
        fold_in.solve_rows(wide, source, objective, params)
    rows.indices[0] = -1
    with pytest.raises(ValueError, match="outside its shape"):
        fold_in.solve_rows(rows, source, objective, params)
