"""Displays show the numbers that the objects have, and refuse what they cannot draw."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV

from tpu_als import DataWarning, Recommender, RecommenderPipeline, TPUAlternatingLeastSquares, tune
from tpu_als.baselines import PopularityRecommender
from tpu_als.datasets import power_law
from tpu_als.evaluation import compare, make_ranking_scorer, train_test_split
from tpu_als.plotting import (
    FactorMapDisplay,
    FitHistoryDisplay,
    RankingCurveDisplay,
    SearchDisplay,
)
from tpu_als.plotting.labels import place_labels
from tpu_als.weighting import LogWeighting

mpl.use("agg")
from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def parts() -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    return train_test_split(power_law(80, 50, 900, random_state=0), random_state=0)


@pytest.fixture(scope="module")
def model(parts: Any) -> TPUAlternatingLeastSquares:
    return TPUAlternatingLeastSquares(
        factors=6, iterations=6, random_state=0, calculate_training_loss=True, early_stopping=True
    ).fit(parts[0], show_progress=False)


class TestFitHistory:
    def test_draws_what_was_measured(self, model: Any) -> None:
        display = FitHistoryDisplay.from_estimator(model, name="small")
        loss, ndcg, seconds = display.lines_
        steps = np.arange(1, model.n_iter_ + 1)
        np.testing.assert_array_equal(loss.get_xdata(), steps)
        np.testing.assert_array_equal(loss.get_ydata(), model.history_["loss"])
        np.testing.assert_array_equal(ndcg.get_ydata(), model.history_["ndcg"])
        np.testing.assert_allclose(seconds.get_ydata()[-1], sum(model.history_["seconds"]))
        assert display.axes_[0].get_title(loc="left") == "small"
        best = max(model.history_["ndcg"])
        assert display.axes_[1].texts[0].get_text() == f"best: {best:.4f}"
        assert len({(line.get_marker(), line.get_linestyle()) for line in display.lines_}) == 3

    def test_on_given_axes(self, model: Any) -> None:
        figure, axes = plt.subplots(1, 2)
        display = FitHistoryDisplay.from_estimator(model, series=["ndcg", "loss"], ax=axes)
        assert display.figure_ is figure
        assert display.axes_.tolist() == axes.tolist()
        assert axes[0].get_ylabel() == "validation NDCG@10"
        one = plt.subplots()[1]
        assert FitHistoryDisplay.from_estimator(model, series="loss", ax=one).axes_.tolist() == [
            one
        ]

    def test_model_of_a_pipeline_and_of_a_recommender(self, parts: Any) -> None:
        als = TPUAlternatingLeastSquares(factors=3, iterations=2, random_state=0)
        pipeline = RecommenderPipeline([("weight", LogWeighting()), ("als", als)]).fit(parts[0])
        assert len(FitHistoryDisplay.from_estimator(pipeline).lines_[0].get_xdata()) == 2
        rows, columns = parts[0].nonzero()
        rec = Recommender(model=als).fit(pd.DataFrame({"user": rows, "item": columns}))
        assert len(FitHistoryDisplay.from_estimator(rec).lines_[0].get_xdata()) == 2

    def test_fits_in_the_same_axes_differ(self, model: Any) -> None:
        axes = plt.subplots()[1]
        axes.set_xscale("log")
        displays = [
            FitHistoryDisplay.from_estimator(model, series="ndcg", ax=axes, name=name)
            for name in ("_one", "costs $5 and $6")
        ]
        looks = [(d.lines_[0].get_marker(), d.lines_[0].get_linestyle()) for d in displays]
        assert looks[0] != looks[1]
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        assert texts == [" _one", r"costs \$5 and \$6"]
        axes.figure.canvas.draw()

    def test_models_without_a_history(self) -> None:
        for other in (PopularityRecommender(), object()):
            with pytest.raises(TypeError, match="which has no history of its fit"):
                FitHistoryDisplay.from_estimator(other)

    def test_values_that_were_not_measured_are_left_out(self) -> None:
        history = {"seconds": [1.0, 2.0, 3.0], "loss": [np.nan, 0.5, 0.4]}
        display = FitHistoryDisplay(history).plot()
        assert display.lines_[0].get_xdata().tolist() == [2, 3]

    def test_refusals(self, model: Any) -> None:
        with pytest.raises(NotFittedError):
            FitHistoryDisplay.from_estimator(TPUAlternatingLeastSquares())
        with pytest.raises(ValueError, match="'rmse'.*calculate_training_loss=True"):
            FitHistoryDisplay.from_estimator(model, series=["rmse"])
        with pytest.raises(ValueError, match="3 Axes, one for each panel, got 1"):
            FitHistoryDisplay.from_estimator(model, ax=plt.subplots()[1])
        with pytest.raises(TypeError, match="Axes or None, got str"):
            FitHistoryDisplay.from_estimator(model, series="loss", ax="here")


class TestRankingCurve:
    def test_draws_the_numbers_of_compare(self, model: Any, parts: Any) -> None:
        models = {"als": model, "popular": PopularityRecommender().fit(parts[0])}
        display = RankingCurveDisplay.from_models(
            models, *parts, K=[1, 5, 10, 1000], metric="recall", baseline="popular"
        )
        table = compare(models, *parts, [1, 5, 10], ["recall"])
        for line, name in zip(display.lines_, models, strict=True):
            columns = [f"recall@{k}" for k in (1, 5, 10)]
            np.testing.assert_array_equal(line.get_xdata(), [1, 5, 10])
            np.testing.assert_allclose(line.get_ydata(), table.loc[name, columns])
            low = display.intervals[name][0]
            np.testing.assert_allclose(low, table.loc[name, [f"{c} low" for c in columns]])
        assert display.ax_.get_ylabel() == "recall@K"
        assert display.lines_[1].get_marker() == "None"  # the baseline
        assert len(display.ax_.collections) == 2

    def test_names_that_are_no_texts(self, model: Any, parts: Any) -> None:
        models = {1: model, 2: PopularityRecommender().fit(parts[0])}
        display = RankingCurveDisplay.from_models(models, *parts, K=10, baseline=2)
        assert [line.get_marker() for line in display.lines_] == ["o", "None"]
        table = pd.DataFrame({"ndcg@5": [0.1, 0.2]}, index=["als", "als"])
        with pytest.raises(ValueError, match="one row for each model"):
            RankingCurveDisplay.from_table(table)

    def test_a_recommender_is_refused(self, model: Any, parts: Any) -> None:
        with pytest.raises(TypeError, match="is a Recommender, which takes events"):
            compare({"events": Recommender()}, *parts)

    def test_many_models_differ_without_colour(self) -> None:
        names = [f"model {at}" for at in range(12)]
        table = pd.DataFrame({"map@5": 0.1, "map@10": 0.2}, index=names)
        display = RankingCurveDisplay.from_table(table, "map")
        markers = [line.get_marker() for line in display.lines_]
        dashes = [str(line._dash_pattern) for line in display.lines_]  # there is no public name
        assert len({*zip(markers, dashes, strict=True)}) == 12
        assert not display.ax_.collections  # there are no intervals

    def test_refusals(self) -> None:
        table = pd.DataFrame({"map@5": [0.1], "users": [3]}, index=["als"])
        with pytest.raises(ValueError, match=r"metrics \['map'\], and no columns of 'ndcg'"):
            RankingCurveDisplay.from_table(table)
        with pytest.raises(ValueError, match=r"one of \['als'\], got 'popular'"):
            RankingCurveDisplay.from_table(table, "map", baseline="popular")


class TestFactorMap:
    def test_directions_of_a_planted_plane(self) -> None:
        """Rows in a plane keep all of their variance, and their distances."""
        rng = np.random.default_rng(0)
        plane = np.linalg.qr(rng.standard_normal((5, 2)))[0]
        angles = rng.uniform(0, 2 * np.pi, 40)
        circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        model = TPUAlternatingLeastSquares(factors=5)
        lengths = rng.uniform(1, 9, (40, 1))
        model.item_factors = (lengths * circle @ plane.T).astype(np.float32)
        model.user_factors = np.zeros((3, 5), dtype=np.float32)
        display = FactorMapDisplay.from_estimator(model, labels={3: "three", 7: "seven"})
        assert display.explained == pytest.approx(1)
        distances = np.linalg.norm(display.points[:, None] - display.points, axis=2)
        expected = np.linalg.norm(circle[:, None] - circle, axis=2)
        np.testing.assert_allclose(distances, expected, atol=1e-6)
        assert display.labels == {3: "three", 7: "seven"}
        assert [text.xy for text in display.texts_] == [tuple(display.points[at]) for at in (3, 7)]

    def test_ids_groups_and_the_most_popular(self, parts: Any) -> None:
        rows, columns = parts[0].nonzero()
        events = pd.DataFrame({"user": rows, "item": [f"item {column}" for column in columns]})
        als = TPUAlternatingLeastSquares(factors=4, iterations=2, random_state=0)
        rec = Recommender(model=als).fit(events)
        rare = rec.items_[np.argmin(rec.model_.item_popularity_)]
        popular = rec.items_[np.argmax(rec.model_.item_popularity_)]
        groups = {popular: "fruit", rare: "bread"}
        display = FactorMapDisplay.from_estimator(
            rec, labels=[rare, popular], groups=groups, max_points=10
        )
        assert len(display.points) == 10
        assert [text.get_text() for text in display.texts_] == [rare, popular]
        assert sorted(display.groups) == ["bread", "fruit"] + 8 * ["unknown"]
        users = FactorMapDisplay.from_estimator(rec, side="users")
        assert len(users.points) == len(rec.users_)

    def test_more_groups_than_markers(self, model: Any) -> None:
        names = [f"g{min(at, 9)}" for at in range(50)]
        display = FactorMapDisplay.from_estimator(model, groups=names)
        texts = [text.get_text() for text in display.ax_.get_legend().get_texts()]
        assert texts[0] == "3 other groups" and len(texts) == 8

    def test_groups_by_id(self, model: Any) -> None:
        names = pd.Series(["bread", 7, "$5"], index=[3, 4, 5])
        with pytest.warns(DataWarning, match="47 of 50 ids have no group"):
            display = FactorMapDisplay.from_estimator(
                model, groups=names, labels=pd.Series({3: "B"})
            )
        assert [display.groups[at] for at in (3, 4, 5, 6)] == ["bread", 7, "$5", "unknown"]
        assert display.labels == {3: "B"}
        display.figure_.canvas.draw()
        with pytest.raises(ValueError, match="groups has none of the 50 ids, such as 0"):
            FactorMapDisplay.from_estimator(model, groups={"tea": "drinks"})
        with pytest.raises(ValueError, match="several values for an id"):
            FactorMapDisplay.from_estimator(model, groups=pd.Series(["a", "b"], index=[1, 1]))

    def test_labels_of_rows_without_a_direction(self) -> None:
        model = TPUAlternatingLeastSquares(factors=3)
        table = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
        table[3] = 0
        model.item_factors, model.user_factors = table, table
        with pytest.warns(DataWarning, match="1 of 2 labelled rows are 0"):
            display = FactorMapDisplay.from_estimator(model, labels=[3, 4])
        assert [text.get_text() for text in display.texts_] == ["4"]

    def test_another_projection(self, model: Any) -> None:
        class FirstTwo:
            def fit_transform(self, X: np.ndarray) -> np.ndarray:
                return X[:, :2]

        display = FactorMapDisplay.from_estimator(model, projection=FirstTwo())
        table = np.asarray(model.item_factors)
        table = table[np.abs(table).sum(axis=1) > 0].astype(float)
        expected = (table / np.linalg.norm(table, axis=1, keepdims=True))[:, :2]
        np.testing.assert_allclose(display.points, expected, rtol=1e-6)
        assert display.explained is None

    def test_refusals(self, model: Any) -> None:
        draw = FactorMapDisplay.from_estimator
        with pytest.raises(NotFittedError, match="no item_factors"):
            draw(TPUAlternatingLeastSquares())
        with pytest.raises(ValueError, match='side must be "items" or "users"'):
            draw(model, side="item")
        with pytest.raises(KeyError, match=r"labels has 1 ids that the model lacks: \[999\]"):
            draw(model, labels=[3, 999])
        with pytest.raises(ValueError, match=r"groups must hold 50 names, got shape \(2,\)"):
            draw(model, groups=["a", "b"])
        with pytest.raises(ValueError, match="max_points must be at least 2"):
            draw(model, max_points=1)

        class Wrong:
            def fit_transform(self, X: np.ndarray) -> np.ndarray:
                return X[:, :3]

        with pytest.raises(ValueError, match=r"must return the shape \(50, 2\)"):
            draw(model, projection=Wrong())

    def test_labels_do_not_cover_each_other(self) -> None:
        axes = plt.subplots(figsize=(6, 5))[1]
        points = np.random.default_rng(0).normal(scale=0.02, size=(15, 2))
        axes.scatter(*points.T)
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        texts = place_labels(axes, points, {at: f"a product {at}" for at in range(15)})
        axes.figure.canvas.draw()
        extents = [text.get_bbox_patch().get_window_extent() for text in texts]
        for at, box in enumerate(extents):
            assert not any(box.overlaps(other) for other in extents[:at])
            assert axes.get_window_extent().contains(*box.min)
            assert axes.get_window_extent().contains(*box.max)


class TestSearch:
    def test_a_grid(self, parts: Any) -> None:
        als = TPUAlternatingLeastSquares(iterations=2, random_state=0)
        grid = {"alpha": [1.0, 5.0], "regularization": [0.1, 1.0, 10.0], "factors": [2, 4]}
        search = GridSearchCV(als, grid, cv=2).fit(parts[0])
        display = SearchDisplay.from_search(search, "regularization", "alpha")
        results = pd.DataFrame(search.cv_results_["params"])
        results["score"] = search.cv_results_["mean_test_score"]
        best = results.groupby(["alpha", "regularization"])["score"].max().unstack()
        shown = {
            (text.get_position()[1], text.get_position()[0]): text.get_text()
            for text in display.ax_.texts
        }
        assert shown == {at: f"{best.iat[at]:.3f}" for at in np.ndindex(2, 3)}
        assert display.best_ == {
            "regularization": search.best_params_["regularization"],
            "alpha": search.best_params_["alpha"],
            "score": search.best_score_,
        }
        bold = [text for text in display.ax_.texts if text.get_weight() == "bold"]
        assert [text.get_text() for text in bold] == [f"{search.best_score_:.3f}"]

    def test_names_of_steps_and_values_that_are_objects(self, parts: Any) -> None:
        als = TPUAlternatingLeastSquares(factors=2, iterations=2, random_state=0)
        steps = RecommenderPipeline([("weight", LogWeighting()), ("als", als)])
        grid = {"weight": [LogWeighting(), "passthrough"], "als__alpha": [1.0, 2.0]}
        search = GridSearchCV(steps, grid, cv=2).fit(parts[0])
        display = SearchDisplay.from_search(search, x="alpha")
        assert (display.x, display.y) == ("als__alpha", "weight")
        ticks = [text.get_text() for text in display.ax_.get_yticklabels()]
        assert ticks == ["LogWeighting()", "passthrough"]

    def test_random_values_are_points(self) -> None:
        rng = np.random.default_rng(0)
        trials = pd.DataFrame({
            "regularization": 10 ** rng.uniform(-3, 2, 30),
            "objective": ["ials", "implicit"] * 15,
            "score": rng.uniform(size=30),
        })  # fmt: skip
        trials.loc[4, "score"] = np.nan  # a fit that failed
        display = SearchDisplay.from_search(trials)
        points = display.ax_.collections[0].get_offsets()
        assert len(points) == 29
        assert display.ax_.get_xscale() == "log"
        best = trials.loc[trials["score"].idxmax()]
        assert points[-1, 0] == pytest.approx(best["regularization"])

    def test_values_without_a_number_are_drawn(self) -> None:
        rng = np.random.default_rng(0)
        values: list[Any] = [None] * 3 + list(rng.uniform(1, 2, 20))
        trials = pd.DataFrame({"a": pd.Series(values, dtype=object), "b": rng.uniform(size=23)})
        trials["score"] = np.linspace(0.9, 0.1, 23)
        display = SearchDisplay.from_search(trials, "a", "b")
        points = display.ax_.collections[0].get_offsets()
        assert len(points) == 23 and np.isfinite(points).all()
        assert display.best_["a"] is None and display.best_["score"] == 0.9
        assert points[-1, 0] < 1
        assert [text.get_text() for text in display.ax_.texts] == ["None"]

    def test_cells_of_other_values(self) -> None:
        values = [2, None, 1, True, 10001, 10002]
        trials = pd.DataFrame({
            "w__a": pd.Series(values * 2, dtype=object),
            "m__a": ["x"] * 6 + ["y"] * 6,
            "score": np.arange(12) * 1e-6 + 1e-4,
        })  # fmt: skip
        display = SearchDisplay.from_search(trials)
        ticks = [text.get_text() for text in display.ax_.get_xticklabels()]
        assert ticks == ["1", "2", "10001", "10002", "None", "True"]
        assert (display.ax_.get_xlabel(), display.ax_.get_ylabel()) == ("w__a", "m__a")
        texts = [text.get_text() for text in display.ax_.texts]
        assert len(set(texts)) == len(texts) == 12

    def test_the_estimators_value_where_a_grid_has_none(self, parts: Any) -> None:
        als = TPUAlternatingLeastSquares(factors=2, iterations=1, alpha=3.0, random_state=0)
        grids = [{"regularization": [0.1, 1.0]}, {"regularization": [0.1], "alpha": [5.0]}]
        search = GridSearchCV(als, grids, cv=2, refit=lambda results: 1).fit(parts[0])
        display = SearchDisplay.from_search(search, "alpha", "regularization")
        assert [text.get_text() for text in display.ax_.get_xticklabels()] == ["3", "5"]
        assert display.best_["regularization"] == 1.0  # what refit chose

    def test_the_last_round_of_halving(self, parts: Any) -> None:
        als = TPUAlternatingLeastSquares(factors=4, random_state=0)
        grid = {"alpha": [0.1, 1.0, 10.0], "regularization": [0.1, 10.0]}
        search = HalvingGridSearchCV(
            als, grid, cv=2, resource="iterations", min_resources=1, max_resources=4, factor=2,
            random_state=0, return_train_score=False, refit=False,
        ).fit(parts[0])  # fmt: skip
        display = SearchDisplay.from_search(search, "alpha", "regularization")
        results = pd.DataFrame(search.cv_results_)
        last = results[results["iter"] == results["iter"].max()]
        assert len(display.trials.frame) == len(last) < len(results)
        assert display.best_["score"] == last["mean_test_score"].max()

    def test_several_metrics(self, parts: Any) -> None:
        als = TPUAlternatingLeastSquares(factors=2, iterations=1, random_state=0)
        scoring = {"ndcg": make_ranking_scorer("ndcg"), "recall": make_ranking_scorer("recall")}
        grid = {"alpha": [1.0, 2.0], "factors": [2, 3]}
        search = GridSearchCV(als, grid, cv=2, scoring=scoring, refit="recall").fit(parts[0])
        assert SearchDisplay.from_search(search).best_["score"] == search.best_score_
        search = GridSearchCV(als, grid, cv=2, scoring=scoring, refit=False).fit(parts[0])
        with pytest.raises(ValueError, match=r"metrics \['ndcg', 'recall'\], and refit=False"):
            SearchDisplay.from_search(search)

    def test_result_of_tune(self, parts: Any) -> None:
        result = tune(parts[0], budget="2s", n_candidates=4, random_state=0)
        display = SearchDisplay.from_search(result, "regularization", "factors")
        assert display.best_["score"] == result.trials["score"].max()

    def test_refusals(self, parts: Any) -> None:
        draw = SearchDisplay.from_search
        trials = pd.DataFrame({"a": [1, 2], "b": [1, 1], "score": [0.1, 0.2]})
        with pytest.raises(
            ValueError, match=r"several values are needed, and the search has \['a'\]"
        ):
            draw(trials)
        assert draw(trials, "a", "b").best_["b"] == 1
        with pytest.raises(ValueError, match=r"'c' is not one of the parameters \['a', 'b'\]"):
            draw(trials, "c")
        with pytest.raises(ValueError, match="two parameters, got 'a' for both"):
            draw(trials, "a", "a")
        with pytest.raises(ValueError, match="all fits failed"):
            draw(trials.assign(b=[1, 2], score=np.nan))
        with pytest.raises(ValueError, match="no column score"):
            draw(trials[["a", "b"]])
        with pytest.raises(TypeError, match="got GridSearchCV: call fit"):
            draw(GridSearchCV(TPUAlternatingLeastSquares(), {"alpha": [1.0]}))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'tpu-als\[plot\]'"):
        FitHistoryDisplay({"seconds": [1.0]}).plot()
