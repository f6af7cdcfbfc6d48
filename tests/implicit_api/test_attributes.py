"""Writing into tables: scores use the array itself; derived values follow implicit's rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from implicit.cpu.als import AlternatingLeastSquares
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares

USERS = np.arange(30)
EMPTY = sparse.csr_matrix((30, 80), dtype=np.float32)
ONE = sparse.csr_matrix(([1.0], ([0], [4])), shape=(1, 80))


def _model() -> TPUAlternatingLeastSquares:
    rng = np.random.default_rng(0)
    model = TPUAlternatingLeastSquares(8)
    model.user_factors = rng.normal(size=(30, 8)).astype(np.float32)
    model.item_factors = rng.normal(size=(80, 8)).astype(np.float32)
    return model


def _recommended(model: Any) -> np.ndarray:
    """In a batch; a few users are ranked by other code."""
    return model.recommend(USERS, EMPTY, N=5)[1]


def _swap(table: np.ndarray) -> None:
    table[[3, 7]] = table[[7, 3]] + 1


def _turn(table: np.ndarray) -> None:
    table[:] = table[::-1, ::-1].copy()


def _flip(table: np.ndarray) -> None:
    table[:, [0, 3]] *= -1


CHANGES: dict[str, Callable[[np.ndarray], Any]] = {
    "all signs": lambda table: np.negative(table, out=table),
    "signs of two columns": _flip,
    "one number everywhere": lambda table: table.fill(2),
    "two rows": _swap,
    "numbers in other places": _turn,
}


@pytest.mark.parametrize("change", CHANGES)
def test_writing_into_a_table_is_seen(change: str) -> None:
    model = _model()
    assert _recommended(model).shape == (30, 5) and model.YtY.shape == (8, 8)
    CHANGES[change](model.item_factors)
    expected = np.sort(model.user_factors @ model.item_factors.T, axis=1)[:, :-6:-1]
    np.testing.assert_allclose(_recommended(model), expected, rtol=1e-4, atol=1e-5)
    single = model.recommend(3, None, N=5, filter_already_liked_items=False)[1]
    np.testing.assert_allclose(single, expected[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("calls", [1, 3])
def test_writing_into_what_a_table_is_a_view_of_is_seen(calls: int) -> None:
    model, rng = _model(), np.random.default_rng(1)
    large = rng.normal(size=(200, 8)).astype(np.float32)
    model.item_factors = large[:80]
    for _ in range(calls):
        model.similar_items(3)
        _recommended(model)
    large[:50] = 5
    expected = np.sort(model.user_factors @ large[:80].T, axis=1)[:, :-6:-1]
    np.testing.assert_allclose(_recommended(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", ["implicit", "tpu_als"])
def test_derived_values_are_computed_again_when_set_to_none(library: str) -> None:
    """Not when the array is written into, which nobody notices; an assigned table drops them."""
    ours = _model()
    model: Any = ours
    if library == "implicit":
        model = AlternatingLeastSquares(8)
        model.user_factors, model.item_factors = ours.user_factors, ours.item_factors
    before, norms = model.YtY.copy(), model.item_norms.copy()
    model.item_factors[:] *= 2
    np.testing.assert_array_equal(model.YtY, before)
    np.testing.assert_array_equal(model.item_norms, norms)
    model._YtY = model._item_norms = None
    np.testing.assert_allclose(model.YtY, 4 * before, rtol=1e-5)
    np.testing.assert_allclose(model.item_norms, 2 * norms, rtol=1e-5)


def test_an_assigned_table_drops_derived_values() -> None:
    model = _model()
    before = model.YtY.copy()
    model.item_factors[:] *= 2
    model.item_factors = model.item_factors
    np.testing.assert_allclose(model.YtY, 4 * before, rtol=1e-5)


@pytest.mark.parametrize("side", ["user", "item"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_written_in_place_must_be_finite(side: str, value: float) -> None:
    counts = random_counts(12, 9, density=0.5)
    model = TPUAlternatingLeastSquares(3, iterations=1, random_state=0, use_native=False)
    model.fit(counts, show_progress=False)
    getattr(model, f"{side}_factors")[2, 0] = value
    users = np.arange(12)
    calls = [
        lambda: model.recommend(2, None, N=4, filter_already_liked_items=False),
        lambda: model.recommend(users, counts, N=4),
        lambda: model.score_pairs([2], [2]),
        lambda: getattr(model, f"similar_{side}s")(0),
        lambda: getattr(model, f"similar_{side}s")(np.arange(9)),
        lambda: copy.copy(model).set_params(warm_start=True).fit(counts, show_progress=False),
    ]
    if side == "item":
        calls += [
            lambda: model.transform(counts),
            lambda: model.recalculate_user(0, counts[0]),
            lambda: model.inverse_transform(np.ones((1, 3))),
        ]
    if side == "item" and value == np.inf:
        del calls[0]  # the item's score may be -inf for a user, and it is last then
    for call in calls:
        with pytest.raises(ValueError, match="factors must be finite, but row 2 holds"):
            call()
