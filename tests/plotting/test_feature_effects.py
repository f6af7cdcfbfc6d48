"""The display of features shows what `feature_effects` finds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import NotFittedError

from tpu_als import RecommenderPipeline, TPUAlternatingLeastSquares
from tpu_als.baselines import PopularityRecommender
from tpu_als.datasets import power_law
from tpu_als.plotting import FeatureEffectsDisplay
from tpu_als.weighting import LogWeighting

mpl.use("agg")
from matplotlib import pyplot as plt

MATRIX = power_law(80, 50, 900, random_state=0)
RNG = np.random.default_rng(0)
NAMES = ["rare", "often", "never", "_hidden", "costs $5", "x" * 90]
ITEMS = pd.DataFrame(RNG.random((50, 6)) < [0.1, 0.9, 0, 0.5, 0.5, 0.5], columns=NAMES)
USERS = RNG.random((80, 3))
SETTINGS: dict[str, Any] = {"factors": 4, "iterations": 2, "random_state": 0, "verbose": False}


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def model() -> TPUAlternatingLeastSquares:
    als = TPUAlternatingLeastSquares(**SETTINGS)
    return als.fit(MATRIX, item_features=ITEMS, user_features=USERS)


def ticks(display: FeatureEffectsDisplay) -> list[str]:
    return [text.get_text() for text in display.ax_.get_yticklabels()]


def test_draws_the_nearest_items(model: Any) -> None:
    labels = pd.Series({item: f"item {item}" for item in range(49)})
    display = FeatureEffectsDisplay.from_estimator(
        model, features=["rare", "often"], n_items=3, labels=labels
    )
    effects = model.feature_effects(N=3).set_index("feature")
    texts = ticks(display)
    assert [texts[at] for at in (0, 4)] == ["rare", "often"]
    for line, name, at in zip(display.lines_, ("rare", "often"), (1, 5), strict=True):
        expected = effects.loc[name]
        np.testing.assert_allclose(line.get_xdata(), expected["score"])
        named = [labels.get(item, str(item)) for item in expected["item"]]
        assert texts[at : at + 3] == named
        places = display.ax_.get_yticks()[at : at + 3]
        np.testing.assert_array_equal(line.get_ydata(), places)
    weights = [text.get_fontweight() for text in display.ax_.get_yticklabels()]
    assert [at for at, weight in enumerate(weights) if weight == "bold"] == [0, 4]
    assert len({line.get_marker() for line in display.lines_}) == 2
    assert "cosine" in display.ax_.get_xlabel()
    low, high = display.ax_.get_ylim()
    assert low > high  # the best item is on top


def test_features_that_move_most_come_first(model: Any) -> None:
    display = FeatureEffectsDisplay.from_estimator(model, n_features=6, n_items=1)
    moved = [
        np.linalg.norm(np.outer(ITEMS[name], model.item_feature_weights_[at]))
        for at, name in enumerate(NAMES)
    ]
    shown = display.effects["feature"].tolist()
    assert shown == [NAMES[at] for at in np.argsort(-np.array(moved), kind="stable")]
    assert shown[-1] == "never"
    few = FeatureEffectsDisplay.from_estimator(model)
    assert few.effects["feature"].unique().tolist() == shown[:5] and len(few.effects) == 20


def test_users_features_without_names(model: Any) -> None:
    display = FeatureEffectsDisplay.from_estimator(model, side="user", features=[2], n_items=2)
    assert ticks(display)[0] == "2"
    expected = np.sort(model.user_feature_weights_[2] @ model.item_factors.T)[::-1][:2]
    np.testing.assert_allclose(display.lines_[0].get_xdata(), expected, rtol=1e-5)
    assert "adds" in display.ax_.get_xlabel()


def test_texts_that_matplotlib_would_read_otherwise(model: Any) -> None:
    display = FeatureEffectsDisplay.from_estimator(model, features=NAMES[3:], n_items=1)
    headings = ticks(display)[::2]
    assert headings[:2] == [" _hidden", r"costs \$5"] and headings[2] == "x" * 47 + "…"
    display.figure_.canvas.draw()


def test_given_axes_and_looks(model: Any) -> None:
    axes = plt.subplots()[1]
    display = FeatureEffectsDisplay.from_estimator(model, features="rare", ax=axes)
    assert display.ax_ is axes
    again = display.plot(marker="*")
    assert again.lines_[0].get_marker() == "*" and again.ax_ is not axes


def test_models_of_pipelines_and_ids_of_recommenders(model: Any) -> None:
    steps = [("weight", LogWeighting()), ("als", model)]
    display = FeatureEffectsDisplay.from_estimator(RecommenderPipeline(steps))
    assert len(display.lines_) == 5

    class Named:
        model_ = model
        items_ = np.array([f"sku {at}" for at in range(50)])

    shown = FeatureEffectsDisplay.from_estimator(
        Named(), features=["rare"], n_items=50, labels={"sku 7": "tea"}
    )
    texts = ticks(shown)
    assert "tea" in texts and "sku 8" in texts and "sku 7" not in texts


def test_refusals(model: Any) -> None:
    draw = FeatureEffectsDisplay.from_estimator
    with pytest.raises(TypeError, match="PopularityRecommender, which has no features"):
        draw(PopularityRecommender().fit(MATRIX))
    with pytest.raises(NotFittedError):
        draw(TPUAlternatingLeastSquares())
    plain = TPUAlternatingLeastSquares(**SETTINGS).fit(MATRIX)
    with pytest.raises(ValueError, match="the model has no item_features"):
        draw(plain)
    with pytest.raises(ValueError, match="side must be 'item' or 'user', got 'items'"):
        draw(model, side="items")
    with pytest.raises(ValueError, match=r"the model's 6, such as 'rare', got \['absent'\]"):
        draw(model, features=["rare", "absent"])
    with pytest.raises(ValueError, match="n_items must be at least 1, got 0"):
        draw(model, n_items=0)
