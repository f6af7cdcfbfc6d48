"""Stopping a fit by held-out entries."""

from __future__ import annotations

import numpy as np
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares, mesh
from tpu_als.early_stopping import EarlyStopping

TRAIN = sparse.csr_matrix(np.array([[1, 0, 0], [0, 1, 0]], np.float32))
HIDDEN = sparse.csr_matrix(np.array([[0, 1, 0], [0, 0, 1]], np.float32))
USERS = np.eye(2, dtype=np.float32)


def items_that_rank(first: int) -> np.ndarray:
    """Item factors by which user 0 has its hidden item at place `first`."""
    scores = np.array([[9, 2, 1], [0, 9, 1]], np.float32)
    if first:
        scores[0] = [9, 1, 2]
    return np.ascontiguousarray(scores.T)


def test_patience_counts_from_the_last_gain() -> None:
    place = mesh.workplace(1, 1)
    watch = EarlyStopping(TRAIN, HIDDEN, patience=2, tol=1e-4)
    bad, good = items_that_rank(1), items_that_rank(0)
    assert watch.measure(USERS, bad, place) < 1
    assert watch.measure(USERS, good, place) == pytest.approx(1)
    assert not watch.is_over
    watch.measure(USERS, bad, place)
    assert not watch.is_over
    watch.measure(USERS, good.copy(), place)
    assert watch.is_over
    assert watch.best is not None
    assert watch.best[1] is good


def test_nothing_to_hold_out() -> None:
    with pytest.raises(ValueError, match="no entries to hold out.*early_stopping=False"):
        EarlyStopping(TRAIN, sparse.csr_matrix((2, 3)), patience=1, tol=0.0)


def test_a_fit_stops_and_keeps_its_best_tables() -> None:
    counts = random_counts(60, 25, density=0.3)
    tables = []
    model = TPUAlternatingLeastSquares(
        4, iterations=40, random_state=0, early_stopping=True, n_iter_no_change=2, tol=0.05
    )
    model.fit(counts, show_progress=False, callback=lambda *_: tables.append(model.item_factors))
    ndcg = model.history_["ndcg"]
    assert len(ndcg) == model.n_iter_ == len(tables) < 40
    assert len(model.history_["seconds"]) == model.n_iter_
    np.testing.assert_array_equal(model.item_factors, tables[int(np.argmax(ndcg))])
