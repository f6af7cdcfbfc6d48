"""`RecommenderPipeline` weights before the model's methods; `set_output` with sparse weights."""

from __future__ import annotations

import doctest
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_counts
from models import make
from scipy import sparse
from sklearn.base import clone
from sklearn.decomposition import TruncatedSVD
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import VarianceThreshold
from sklearn.metrics import check_scoring
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Binarizer, MaxAbsScaler
from sklearn.utils.metadata_routing import MetadataRequest

import tpu_als
from tpu_als import RecommenderPipeline, TPUAlternatingLeastSquares, pipelines
from tpu_als.baselines import PopularityRecommender
from tpu_als.evaluation import compare, make_ranking_scorer, ranking_metrics_at_k, train_test_split
from tpu_als.weighting import BM25Weighting, LogWeighting, TfidfWeighting

WEIGHTINGS = [LogWeighting(0.5), TfidfWeighting(), BM25Weighting(1.2)]


def pipeline_of(*steps: Any, model: Any = None) -> RecommenderPipeline:
    """Steps with names, and a small model."""
    model = make(TPUAlternatingLeastSquares, iterations=3) if model is None else model
    return RecommenderPipeline([*((f"step{i}", s) for i, s in enumerate(steps)), ("als", model)])


@pytest.fixture(scope="module", params=WEIGHTINGS, ids=repr)
def fitted(request: Any, counts: sparse.csr_matrix) -> RecommenderPipeline:
    """A pipeline with each of the weightings."""
    return pipeline_of(clone(request.param)).fit(counts)


def equal(got: Any, expected: Any) -> bool:
    """Whether two results are the same, arrays included."""
    if isinstance(got, tuple | list):
        return len(got) == len(expected) and all(map(equal, got, expected))
    return bool(np.array_equal(got, expected))


def test_examples() -> None:
    results = doctest.testmod(pipelines)
    assert results.failed == 0 and results.attempted > 2
    assert "RecommenderPipeline" in dir(tpu_als)


class TestMethods:
    def test_equal_the_models_on_weights(
        self, fitted: RecommenderPipeline, counts: sparse.csr_matrix
    ) -> None:
        weights, model, users = fitted[:-1].transform(counts), fitted[-1], [3, 11]
        some, of_some = counts[users], weights[users]
        calls = [
            ("recommend", (users, some), (users, of_some), {}),
            ("recommend", (users, some), (users, of_some), {"recalculate_user": True, "N": 30}),
            ("recommend", (users, some), (users, of_some), {"items": [1, 2, 3]}),
            ("recommend", (3, None), (3, None), {"filter_already_liked_items": False}),
            ("recalculate_user", (3, counts[3]), (3, weights[3]), {}),
            ("explain", (3, counts, 7), (3, weights, 7), {}),
            ("explain", (3, counts[3], 7, None, 2), (3, weights[3], 7, None, 2), {}),
            ("similar_items", (2, 4), (2, 4), {"filter_items": [1]}),
            ("similar_users", (2, 4), (2, 4), {"users": [1, 2, 3, 4, 5]}),
        ]
        for name, of_counts, of_weights, options in calls:
            got = getattr(fitted, name)(*of_counts, **options)
            expected = getattr(model, name)(*of_weights, **options)
            assert equal(got, expected), name

    def test_explanation_is_of_the_score(
        self, fitted: RecommenderPipeline, counts: sparse.csr_matrix
    ) -> None:
        ids, scores = fitted.recommend(4, counts[4], N=1, recalculate_user=True)
        total, *_ = fitted.explain(4, counts, int(ids[0]))
        assert total == pytest.approx(float(scores[0]), rel=1e-4)
        raw, *_ = fitted[-1].explain(4, counts, int(ids[0]))
        assert abs(raw - total) > 1e-3 * abs(total)  # raw counts are another user

    def test_partial_fit(self, fitted: RecommenderPipeline, counts: sparse.csr_matrix) -> None:
        pipeline = pickle.loads(pickle.dumps(fitted))
        new = random_counts(2, 20, seed=5)
        assert pipeline.partial_fit_users([1, 30], new) is None
        expected = fitted.recalculate_user([1, 30], new)
        np.testing.assert_array_equal(pipeline[-1].user_factors[[1, 30]], expected)
        assert len(fitted[-1].user_factors) == 30

    @pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array])
    def test_shapes_of_rows(self, fitted: RecommenderPipeline, kind: Any) -> None:
        rows = kind(
            sparse.hstack([random_counts(3, 15, seed=2), sparse.csr_matrix((3, 5))]).tocsr()
        )
        users = np.arange(3)
        expected = fitted.recommend(users, rows)
        one = fitted.recommend(1, rows[1])  # 1-D for an array
        assert equal(one, (expected[0][1], expected[1][1]))
        narrow = fitted.recommend(users, rows[:, :15], recalculate_user=True)
        assert equal(narrow, fitted.recommend(users, rows, recalculate_user=True))
        mask = np.zeros(30, bool)
        mask[:3] = True
        assert equal(fitted.recommend(mask, rows), fitted.recommend(users, rows))
        assert fitted.recommend([], rows[:0])[0].shape == (0, 10)
        factors = fitted.recalculate_user(users, rows)
        assert equal(fitted.recalculate_user(users, rows.tocoo()), factors)

    def test_filters_what_the_model_was_trained_on(self, counts: sparse.csr_matrix) -> None:
        counts = counts.copy()
        pipeline = pipeline_of(Binarizer(threshold=2.0)).fit(counts)  # drops counts up to 2
        ids, scores = pipeline.recommend(np.arange(30), counts, N=20)
        for user in range(30):
            shown = set(ids[user][scores[user] > -1e30].tolist())
            assert shown == set(range(20)) - set(np.flatnonzero(counts[user].toarray() > 2))

    def test_steps_left_out(self, counts: sparse.csr_matrix) -> None:
        model = make(TPUAlternatingLeastSquares, iterations=3)
        expected = model.fit(counts).recommend([1, 2], counts[[1, 2]])
        for steps in ((), ("passthrough",), (None, "passthrough")):
            pipeline = pipeline_of(*steps).fit(counts)
            assert equal(pipeline.recommend([1, 2], counts[[1, 2]]), expected)

    def test_several_steps(self, counts: sparse.csr_matrix) -> None:
        pipeline = pipeline_of(LogWeighting(), MaxAbsScaler()).fit(counts)
        weights = MaxAbsScaler().fit_transform(LogWeighting().fit_transform(counts))
        expected = pipeline[-1].recommend(2, weights[2], recalculate_user=True)
        assert equal(pipeline.recommend(2, counts[2], recalculate_user=True), expected)

    def test_the_input_is_not_modified(
        self, fitted: RecommenderPipeline, counts: sparse.csr_matrix
    ) -> None:
        before = counts.copy()
        fitted.recommend(1, counts[1])
        fitted.explain(1, counts, 2)
        assert equal(before.data, counts.data) and (before != counts).nnz == 0

    @settings(max_examples=20)
    @given(seed=st.integers(0, 1000))
    def test_any_rows(self, fitted: RecommenderPipeline, seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows = random_counts(int(rng.integers(1, 5)), 20, density=rng.random(), seed=seed)
        users = rng.integers(0, 30, rows.shape[0])
        options = {"recalculate_user": bool(rng.integers(2)), "N": int(rng.integers(1, 25))}
        got = fitted.recommend(users, rows, **options)
        expected = fitted[-1].recommend(users, fitted[:-1].transform(rows), **options)
        assert equal(got, expected)


class TestScikitLearn:
    def test_in_a_search(self) -> None:
        counts = random_counts(60, 25, density=0.3)
        pipeline = pipeline_of(LogWeighting())
        grid = {"step0": WEIGHTINGS[:2], "als__alpha": [1.0, 5.0]}
        search = GridSearchCV(pipeline, grid, cv=2, error_score="raise")
        search.fit(counts, als__show_progress=False)
        best = search.best_estimator_
        assert type(best) is RecommenderPipeline
        ids, _ = best.recommend(np.arange(60), counts, N=5)
        weights = best[:-1].transform(counts)
        assert equal(ids, best[-1].recommend(np.arange(60), weights, N=5)[0])
        assert search.best_score_ == pytest.approx(np.max(search.cv_results_["mean_test_score"]))

    def test_clone_and_parameters(self, counts: sparse.csr_matrix) -> None:
        pipeline = pipeline_of(LogWeighting(3.0)).fit(counts)
        other = clone(pipeline)
        assert type(other) is RecommenderPipeline
        assert other.get_params()["step0__epsilon"] == 3.0
        assert repr(other) == repr(clone(pipeline)) and "RecommenderPipeline(steps=[" in repr(other)
        with pytest.raises(NotFittedError):
            other.recommend(0, counts[0])

    def test_methods_are_those_of_the_model(self, counts: sparse.csr_matrix) -> None:
        popular = pipeline_of(LogWeighting(), model=PopularityRecommender()).fit(counts)
        expected = PopularityRecommender().fit(counts).recommend([1, 2], counts[[1, 2]])
        assert equal(popular.recommend([1, 2], counts[[1, 2]]), expected)
        for name in ("explain", "similar_items", "recalculate_user", "partial_fit_users"):
            assert not hasattr(popular, name)
        assert not hasattr(pipeline_of(model=MaxAbsScaler()), "recommend")

    def test_metrics(self) -> None:
        train, test = train_test_split(random_counts(60, 20, density=0.4), random_state=0)
        pipeline = pipeline_of(TfidfWeighting()).fit(train)
        weights = pipeline[:-1].transform(train)
        expected = ranking_metrics_at_k(pipeline[-1], weights, test, K=5)
        assert ranking_metrics_at_k(pipeline, train, test, K=5)["ndcg"] == expected["ndcg"]
        table = compare({"pipeline": pipeline}, train, test, 5, ["ndcg"], n_resamples=3)
        assert table.loc["pipeline", "ndcg@5"] == pytest.approx(expected["ndcg"])
        assert 0 < make_ranking_scorer("ndcg")(pipeline, train) <= 1


class TestFeatures:
    USERS = np.random.default_rng(0).normal(size=(40, 3))
    ITEMS = np.random.default_rng(1).normal(size=(25, 4))

    @pytest.fixture
    def parts(self) -> tuple[RecommenderPipeline, Any, sparse.csr_matrix]:
        """A pipeline, its model, and the counts."""
        counts = random_counts(40, 25, density=0.3)
        model = TPUAlternatingLeastSquares(factors=3, iterations=2, random_state=0, verbose=False)
        with sklearn.config_context(enable_metadata_routing=True):
            model.set_fit_request(user_features=True, item_features=True)
            model.set_score_request(user_features=True)
        return pipeline_of(LogWeighting(), model=model), model, counts

    def test_methods_pass_features_on(self, parts: Any) -> None:
        pipeline, model, counts = parts
        with sklearn.config_context(enable_metadata_routing=True):
            pipeline.fit(counts, user_features=self.USERS, item_features=self.ITEMS)
        weighted, users = LogWeighting().fit_transform(counts), self.USERS[:2]
        given = {"user_features": users}
        for got, expected in (
            (pipeline.recommend([50, 51], counts[:2], recalculate_user=True, **given),
             model.recommend([50, 51], weighted[:2], recalculate_user=True, **given)),
            (pipeline.recalculate_user([50, 51], counts[:2], **given),
             model.recalculate_user([50, 51], weighted[:2], **given)),
            (pipeline.explain(50, counts[0], 3, user_features=users[:1])[:2],
             model.explain(50, weighted[0], 3, user_features=users[:1])[:2]),
            (pipeline.explain_features(4, counts, 3, user_features=users[:1]),
             model.explain_features(4, weighted, 3, user_features=users[:1])),
        ):  # fmt: skip
            assert equal(got, expected)
        pipeline.partial_fit_users([40, 41], counts[:2], **given)
        np.testing.assert_array_equal(
            model.user_factors[40:], model.recalculate_user([50, 51], weighted[:2], **given)
        )

    def test_a_search_routes_features(self, parts: Any) -> None:
        pipeline, _, counts = parts
        name = pipeline.steps[-1][0]
        with sklearn.config_context(enable_metadata_routing=True):
            if isinstance(check_scoring(pipeline).get_metadata_routing(), MetadataRequest):
                pytest.skip("this scikit-learn does not route to the score of a Pipeline")
            search = GridSearchCV(
                pipeline, {f"{name}__feature_weight": [0.5, 2]}, cv=KFold(2), error_score="raise"
            ).fit(counts, user_features=self.USERS, item_features=self.ITEMS)
            fold = clone(pipeline).set_params(**{f"{name}__feature_weight": 0.5})
            given = {"user_features": self.USERS[20:], "item_features": self.ITEMS}
            fold.fit(counts[20:], **given)
            expected = fold.score(counts[:20], user_features=self.USERS[:20])
        assert search.cv_results_["split0_test_score"][0] == expected
        weighted = LogWeighting().fit_transform(counts)
        model = fold.steps[-1][1]
        assert expected == model.score(weighted[:20], user_features=self.USERS[:20])


class TestErrors:
    @pytest.mark.parametrize(
        "call",
        [
            lambda model, rows: model.recommend(30, rows[0]),
            lambda model, rows: model.recommend(0, None),
            lambda model, rows: model.recommend(0, rows[0].tocoo()),
            lambda model, rows: model.recommend(0, rows[0].toarray()),
            lambda model, rows: model.recommend([0, 1], rows[0]),
            lambda model, rows: model.recommend(0, rows[0], filter_already_liked_items="no"),
            lambda model, rows: model.recalculate_user([0], rows[0].toarray()),
            lambda model, rows: model.explain(30, rows, 0),
            lambda model, rows: model.explain([0, 1], rows, 0),
            lambda model, rows: model.explain(0, rows.toarray(), 0),
            lambda model, rows: model.explain(0, rows, 20),
            lambda model, rows: model.partial_fit_users([-1], rows[0]),
            lambda model, rows: model.similar_items(20),
            lambda model, rows: model.similar_users(30),
        ],
    )
    def test_equal_the_models(
        self, fitted: RecommenderPipeline, counts: sparse.csr_matrix, call: Any
    ) -> None:
        found = []
        for model in (fitted[-1], fitted):
            with pytest.raises((ValueError, IndexError, TypeError)) as error:
                call(model, counts)
            found.append((error.type, str(error.value)))
        assert found[0] == found[1]

    def test_items_cannot_be_weighted_alone(
        self, fitted: RecommenderPipeline, counts: sparse.csr_matrix
    ) -> None:
        with pytest.raises(ValueError, match="recalculate_item must be False"):
            fitted.similar_items(0, recalculate_item=True, item_users=counts.T.tocsr()[0])

    def test_steps_that_select_columns(self) -> None:
        parts = [random_counts(40, 11, density=0.5), sparse.csr_matrix((40, 1))]
        counts = sparse.hstack(parts).tocsr()
        for step in (VarianceThreshold(), TruncatedSVD(3)):
            pipeline = pipeline_of(step).fit(counts)
            for call in (
                lambda found: found.recommend(0, counts[0]),
                lambda found: found.similar_items(0),
            ):
                with pytest.raises(ValueError, match="must keep the columns.*columns of 12"):
                    call(pipeline)

    def test_new_items(self, counts: sparse.csr_matrix) -> None:
        wide = random_counts(1, 25, density=0.9)
        for weighting in (LogWeighting(), TfidfWeighting()):
            pipeline = pipeline_of(weighting).fit(counts)
            pipeline.partial_fit_users([0], wide)  # as the model, which logs their number
        with pytest.raises(ValueError, match="fit again on a matrix with the new items"):
            pipeline_of(BM25Weighting()).fit(counts).partial_fit_users([0], wide)

    def test_damaged_rows(self, fitted: RecommenderPipeline, counts: sparse.csr_matrix) -> None:
        damaged = counts[:2].copy()
        damaged.indices[0] = 1 << 20
        for call in (
            lambda: fitted.recommend([0, 1], damaged),
            lambda: fitted.explain(0, damaged, 0),
            lambda: fitted.recalculate_user([0, 1], damaged),
        ):
            with pytest.raises(ValueError, match="column"):
                call()


class TestSetOutput:
    @pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
    def test_weightings_refuse_sparse(self, weighting: Any, counts: sparse.csr_matrix) -> None:
        transformer = clone(weighting).set_output(transform="pandas")
        message = r'Pandas output does not support sparse .*set_output\(transform="default"\)'
        with pytest.raises(ValueError, match=message):
            transformer.fit_transform(counts)
        plain = Pipeline([("weight", transformer), ("als", make(TPUAlternatingLeastSquares))])
        with pytest.raises(ValueError, match="use a tpu_als.RecommenderPipeline"):
            plain.fit(counts)
        frame = transformer.fit_transform(counts.toarray())
        assert isinstance(frame, pd.DataFrame)
        expected = transformer.set_output(transform="default").transform(counts)
        assert sparse.issparse(expected)
        np.testing.assert_array_equal(frame, expected.toarray())

    def test_global_configuration(self, counts: sparse.csr_matrix) -> None:
        with sklearn.config_context(transform_output="pandas"):
            with pytest.raises(ValueError, match="Pandas output does not support sparse"):
                LogWeighting().fit_transform(counts)
            own = LogWeighting().set_output(transform="default").fit_transform(counts)
        assert sparse.issparse(own)

    def test_pipeline_gives_frames_of_factors(self, counts: sparse.csr_matrix) -> None:
        pipeline = pipeline_of(LogWeighting()).set_output(transform="pandas")
        found = clone(pipeline).fit(counts).transform(counts)
        assert isinstance(found, pd.DataFrame) and found.shape == (30, 6)
        expected = pipeline.fit(counts).set_output(transform="default").transform(counts)
        np.testing.assert_array_equal(found, expected)
        assert pipeline.set_output() is pipeline
        popular = pipeline_of(LogWeighting(), model=PopularityRecommender())
        assert popular.set_output(transform="pandas").fit(counts).score(counts) > 0
