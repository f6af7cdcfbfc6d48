"""Interactions whose factors are partly explained by features."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest

from tpu_als.datasets import planted, planted_features


def explained_part(features: Any, factors: np.ndarray) -> float:
    """R squared of least squares of factors on features."""
    dense = features.toarray()
    rest = factors - dense @ np.linalg.lstsq(dense, factors, rcond=None)[0]
    return float(1 - (rest**2).sum() / (factors**2).sum())


def test_example() -> None:
    results = doctest.testmod(planted)
    assert results.failed == 0 and results.attempted == 2


def test_shapes_and_values() -> None:
    made = planted_features(30, 20, 101, factors=3, n_features=10)
    matrix, user_features, item_features, users, items = made
    assert matrix.shape == (30, 20) and matrix.nnz == 101 and matrix.dtype == np.float32
    assert matrix.has_canonical_format and (matrix.data == 1).all()
    assert set(np.diff(matrix.indptr)) == {3, 4}
    assert users.shape == (30, 3) and items.shape == (20, 3)
    for features, factors in ((user_features, users), (item_features, items)):
        assert features.shape == (len(factors), 10) and (features.data == 1).all()
        groups = [features.toarray()[:, group] for group in np.array_split(np.arange(10), 4)]
        assert all((group.sum(axis=1) == 1).all() for group in groups)
        np.testing.assert_allclose(factors.mean(axis=0), 0, atol=1e-12)


@pytest.mark.parametrize("explained", [0, 0.25, 0.75, 1])
def test_features_explain_the_part(explained: float) -> None:
    made = planted_features(4000, 3000, 4000, explained=explained)
    for features, factors in (
        (made.user_features, made.user_factors),
        (made.item_features, made.item_factors),
    ):
        assert explained_part(features, factors) == pytest.approx(explained, abs=0.02)
        np.testing.assert_allclose(factors.std(axis=0), 1, atol=0.05)


def test_entries_follow_the_factors() -> None:
    made = planted_features(300, 200, 6000)
    scores = made.user_factors @ made.item_factors.T
    chosen = scores[made.matrix.nonzero()]
    assert chosen.mean() > scores.mean() + scores.std()


def test_the_law_of_the_first_item() -> None:
    """With one entry for each user, items are drawn with the probabilities of the docstring."""
    made = planted_features(60_000, 4, 60_000, factors=1, n_features=8)
    logits = 2 * made.user_factors @ made.item_factors.T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = np.bincount(made.matrix.indices, minlength=4) / 60_000
    np.testing.assert_allclose(found, expected.mean(axis=0), atol=0.01)


def test_seeded() -> None:
    first, again, other = (planted_features(40, 30, 300, random_state=seed) for seed in (1, 1, 2))
    for one, two in zip(first, again, strict=True):
        assert abs(one - two).max() == 0
    assert abs(first.matrix - other.matrix).max() == 1


def test_small_and_full() -> None:
    assert planted_features(2, 2, 1, factors=1, n_features=8).matrix.nnz == 1
    assert planted_features(9, 9, 27).matrix.nnz == 27


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_users": 1}, "n_users must be an integer of at least 2, got 1"),
        ({"n_items": 2.0}, "n_items must be an integer of at least 2, got 2.0"),
        ({"n_entries": 0}, "n_entries must be an integer of at least 1, got 0"),
        ({"n_entries": 201}, "at most a third of the 30 x 20 cells, 200, got 201"),
        ({"factors": 0}, "factors must be an integer of at least 1"),
        ({"n_features": 7}, "n_features must be an integer of at least 8, got 7"),
        ({"explained": -0.1}, "explained must be from 0 to 1, got -0.1"),
        ({"explained": np.nan}, "explained must be from 0 to 1, got nan"),
        ({"explained": True}, "explained must be from 0 to 1, got True"),
        ({"random_state": "a"}, "random_state|seed"),
    ],
)
def test_errors(wrong: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"n_users": 30, "n_items": 20, "n_entries": 100, **wrong}
    with pytest.raises(ValueError, match=message):
        planted_features(**given)


def test_a_size_that_does_not_fit() -> None:
    with pytest.raises(MemoryError, match="ask for a smaller matrix"):
        planted_features(10**9, 10**6, 10**14, factors=1000)
