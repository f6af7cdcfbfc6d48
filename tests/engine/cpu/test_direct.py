"""Rows solved by a factorisation on a CPU, against a dense float64 oracle and XLA's programs."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import ModelFitError, TPUAlternatingLeastSquares
from tpu_als.engine import als
from tpu_als.engine.cpu import compiled
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.data import AlsParams, Data
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend
from tpu_als.engine.xla.mesh import device_mesh

# Imported in this way, the compiled code of the module is that of all other tests.
BLOCK = compiled.loops().BLOCK
BOUNDS = {"float32": 2e-5, "float64": 1e-11}
OBJECTIVES = {
    "implicit": oracle.Objective("implicit", 1.0, 40.0),
    "small weights": oracle.Objective("implicit", 0.5, 0.1),
    "ials": oracle.Objective("ials", 0.01, 1.0, 0.1),
    "large numbers": oracle.Objective("ials", 1e23, 1e25, 1e24, 0.0),
}
COUNTS = random_counts(60, 150, density=0.3, negatives=True, seed=2)
COUNTS.data[::17] = 0  # stored zeros
COUNTS = sparse.vstack([COUNTS, sparse.csr_matrix((2, 150), dtype=np.float32)], "csr")


def _half_epoch(
    data: Data, items: np.ndarray, objective: Any, before: np.ndarray, relaxation: float = 1.0
) -> np.ndarray:
    state = als.start(data, before, items)
    found = als.half_epoch(*state, data, Objective.of(*objective), relaxation, target="users")
    return als.user_factors(als.AlsState(found, state.items), data)


def _tables(factors: int, dtype: str, counts: Any = COUNTS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    users, items = (rng.normal(size=(n, factors)).astype(dtype) for n in counts.shape)
    return users, items


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("factors", [1, 7, 50])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_solutions_are_accurate(name: str, factors: int, dtype: str) -> None:
    objective, (before, items) = OBJECTIVES[name], _tables(factors, dtype)
    data = CpuBackend(2).place(COUNTS, AlsParams(factors, dtype, "cholesky"))
    found = _half_epoch(data, items, objective, before)
    expected = oracle.half_epoch(COUNTS, items.astype(np.float64), objective)
    assert found.dtype == dtype
    assert not found[-2:].any()
    errors = np.linalg.norm(found - expected, axis=1)
    assert (errors <= BOUNDS[dtype] * np.linalg.norm(expected, axis=1)).all()


@pytest.mark.parametrize("relaxation", [1.0, 1.5])
def test_results_are_those_of_xla(relaxation: float) -> None:
    objective, (before, items) = OBJECTIVES["implicit"], _tables(20, "float32")
    params = AlsParams(20, linear_solver="cholesky")
    ours, theirs = (
        _half_epoch(data, items, objective, before, relaxation)
        for data in (
            CpuBackend(3).place(COUNTS, params),
            backend.place(COUNTS, params, device_mesh(1, num_threads=2)),
        )
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("dtype", BOUNDS)
def test_rows_of_several_blocks(dtype: str) -> None:
    rng = np.random.default_rng(4)
    dense = rng.integers(0, 3, (3, 3 * BLOCK)).astype(np.float32)
    dense[1, BLOCK // 2 :] = 0
    counts = sparse.csr_matrix(dense)
    before, items = _tables(12, dtype, counts)
    data = CpuBackend(1).place(counts, AlsParams(12, dtype, "cholesky"))
    found = _half_epoch(data, items, OBJECTIVES["ials"], before)
    expected = oracle.half_epoch(counts, items.astype(np.float64), OBJECTIVES["ials"])
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert (errors < BOUNDS[dtype]).all()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_singular_systems_have_nearly_the_least_norm_solution(dtype: str) -> None:
    objective = oracle.Objective("ials", 0.0, 1.0, 0.0)
    before, items = _tables(200, dtype)  # more factors than a row has entries
    data = CpuBackend(2).place(COUNTS, AlsParams(200, dtype, "cholesky"))
    found, wide = _half_epoch(data, items, objective, before), items.astype(np.float64)
    for row in range(60):
        own = slice(COUNTS.indptr[row], COUNTS.indptr[row + 1])
        counted = own.start + np.flatnonzero(COUNTS.data[own])
        known, targets = wide[COUNTS.indices[counted]], COUNTS.data[counted] > 0
        expected = np.linalg.lstsq(known, targets.astype(np.float64))[0]
        error = np.linalg.norm(found[row] - expected)
        assert error < 0.02 * np.linalg.norm(expected)  # XLA's programs err by 0.012


def test_indefinite_systems_fail() -> None:
    """Weights of -1 that exceed the gramian's own, as no table's does."""
    data = CpuBackend(1).place(COUNTS, AlsParams(4, linear_solver="cholesky"))
    objective = Objective(0.0, 1e-3, 0.5, 0.0, 1.0)  # offset 1, unobserved weight .5
    before, items = _tables(4, "float32")
    items[:100] *= 1e-3  # some rows are nearly all of the gramian
    found = als.half_epoch(before, items, data, objective, target="users")
    failed = np.isnan(found).all(axis=1)
    assert 0 < data.backend.count_failed(found, data.users, data) == failed.sum()


def test_threads_change_nothing() -> None:
    found = [
        TPUAlternatingLeastSquares(
            10, 0.1, 3.0, linear_solver="cholesky", iterations=3, random_state=0, num_threads=n
        ).fit(COUNTS, show_progress=False)
        for n in (1, 3)
    ]
    np.testing.assert_allclose(found[0].item_factors, found[1].item_factors, rtol=0, atol=1e-5)


def test_confidences_beyond_the_dtype_are_an_error() -> None:
    counts = COUNTS.copy()
    counts.data[0] = 3e38
    model = TPUAlternatingLeastSquares(4, alpha=1e3, linear_solver="cholesky", iterations=1)
    with pytest.raises(ModelFitError):
        model.fit(counts, show_progress=False)
