"""The oracle itself, against implicit's Cholesky fit and against the calculus of the loss."""

from __future__ import annotations

import hypothesis
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st
from matrices import random_counts
from scipy import sparse

OBJECTIVES = [
    oracle.Objective("implicit", 0.3, 2.0),
    oracle.Objective("implicit", 0.3, 2.0, unobserved_weight=0.4),
    oracle.Objective("ials", 0.05, 1.5, unobserved_weight=0.3),
    oracle.Objective("ials", 0.05, 1.5, unobserved_weight=0.3, exponent=0.4),
]


def _tables(matrix: sparse.csr_matrix, factors: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return rng.normal(size=(matrix.shape[0], factors)), rng.normal(size=(matrix.shape[1], factors))


def test_fit_equals_implicits_cholesky_fit(signed_counts: sparse.csr_matrix) -> None:
    als = pytest.importorskip("implicit.cpu.als")
    model = als.AlternatingLeastSquares(
        4, 0.3, 2.0, use_cg=False, iterations=5, num_threads=1, random_state=3
    )
    model.fit(signed_counts, show_progress=False)
    start = oracle.initial_tables(*signed_counts.shape, 4, seed=3)
    users, items = oracle.fit(signed_counts, *start, 5, oracle.Objective("implicit", 0.3, 2.0))
    np.testing.assert_allclose(model.user_factors, users, atol=2e-4)
    np.testing.assert_allclose(model.item_factors, items, atol=2e-4)


@pytest.mark.parametrize("stored_zero", [False, True])
def test_loss_equals_implicits(signed_counts: sparse.csr_matrix, stored_zero: bool) -> None:
    als = pytest.importorskip("implicit.cpu.als")
    matrix = signed_counts.copy()
    if stored_zero:
        matrix.data[:3] = 0
    users, items = (table.astype(np.float32) for table in _tables(matrix))
    theirs = als.calculate_loss(2.0 * matrix, users, items, 0.3, 1)
    ours = oracle.loss(matrix, users, items, oracle.Objective("implicit", 0.3, 2.0))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_half_epoch_is_the_minimum_of_the_loss(
    signed_counts: sparse.csr_matrix, objective: oracle.Objective
) -> None:
    start, items = _tables(signed_counts)
    users = oracle.half_epoch(signed_counts, items, objective)
    users[np.diff(signed_counts.indptr) == 0] = 0
    best = oracle.total_loss(signed_counts, users, items, objective)
    step = 1e-4 * start
    for moved in (users + step, users - step):
        assert oracle.total_loss(signed_counts, moved, items, objective) > best
    sides = [
        oracle.total_loss(signed_counts, users + s * step, items, objective) for s in (1.0, -1.0)
    ]
    # the gradient along any direction is zero, so both sides rise alike
    assert sides[0] - best == pytest.approx(sides[1] - best, rel=1e-3)


@hypothesis.given(
    seed=st.integers(0, 10_000),
    negatives=st.booleans(),
    objective=st.sampled_from(OBJECTIVES),
)
def test_exact_half_epochs_never_raise_the_loss(
    seed: int, negatives: bool, objective: oracle.Objective
) -> None:
    matrix = random_counts(7, 5, density=0.5, negatives=negatives, seed=seed)
    users, items = _tables(matrix, 3)
    before = oracle.total_loss(matrix, users, items, objective)
    for _ in range(3):
        users = oracle.half_epoch(matrix, items, objective)
        middle = oracle.total_loss(matrix, users, items, objective)
        items = oracle.half_epoch(matrix.T, users, objective)
        after = oracle.total_loss(matrix, users, items, objective)
        assert after <= middle * (1 + 1e-9) <= before * (1 + 1e-9) ** 2
        before = after


def test_a_stored_zero_is_an_entry() -> None:
    source = np.array([[1.0], [1.0]])
    plain = sparse.csr_matrix(np.array([[2.0, 0.0]]))
    zero = sparse.csr_matrix((np.array([2.0, 0.0]), np.array([0, 1]), np.array([0, 2])), (1, 2))
    objective = oracle.Objective("implicit", 1.0)
    # 2 / (2 + 1 + 1) without the zero, 2 / (2 + 0 + 1) with it
    assert oracle.fold_in(plain, source, objective)[0, 0] == pytest.approx(0.5)
    assert oracle.fold_in(zero, source, objective)[0, 0] == pytest.approx(2 / 3)
