"""Splits and metrics, compared with implicit's or with plain loops."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matrices import random_counts
from scipy import sparse
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline

from tpu_als import TPUAlternatingLeastSquares, evaluation
from tpu_als.weighting import LogWeighting

reference = pytest.importorskip("implicit.evaluation")
SHARED = {
    "precision_at_k": evaluation.precision_at_k,
    "mean_average_precision_at_k": evaluation.mean_average_precision_at_k,
    "ndcg_at_k": evaluation.ndcg_at_k,
    "AUC_at_k": evaluation.AUC_at_k,
}


@pytest.fixture(scope="module")
def split() -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    return evaluation.train_test_split(random_counts(60, 40, density=0.3, seed=1), random_state=0)


@pytest.fixture(scope="module", params=["implicit", "tpu_als"])
def model(request: pytest.FixtureRequest, split: Any) -> Any:
    from implicit.cpu.als import AlternatingLeastSquares

    cls = {"implicit": AlternatingLeastSquares, "tpu_als": TPUAlternatingLeastSquares}
    fitted = cls[request.param](factors=6, iterations=3, random_state=0)
    fitted.fit(split[0], show_progress=False)
    return fitted


class Ranker:
    """Recommends given ids, with a given dtype."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def recommend(self, userid: np.ndarray, user_items: Any, N: int) -> tuple[np.ndarray, None]:
        assert user_items.shape[0] == len(userid)
        return self.ids[userid, :N], None


class TestMetrics:
    @pytest.mark.parametrize("k", [1, 5, 10])
    @pytest.mark.parametrize("name", SHARED)
    def test_equal_implicits(self, model: Any, split: Any, name: str, k: int) -> None:
        theirs = getattr(reference, name)(model, *split, K=k, show_progress=False)
        assert SHARED[name](model, *split, K=k) == pytest.approx(theirs, abs=1e-6)

    def test_ours_equal_plain_loops(self) -> None:
        rng = np.random.default_rng(0)
        held_out = random_counts(20, 15, density=0.2, seed=3)
        ids = np.array([rng.permutation(15)[:5] for _ in range(20)])
        got = evaluation.metrics_of_rankings(ids, held_out, np.full(15, 5), n_users=40)
        recall, hit, first = [], [], []
        for row, ranked in enumerate(ids):
            likes = set(held_out[row].indices)
            if not likes:
                continue
            hits = [item in likes for item in ranked]
            recall.append(sum(hits) / min(5, len(likes)))
            hit.append(any(hits))
            first.append(1 / (hits.index(True) + 1) if any(hits) else 0)
        assert got["recall"] == pytest.approx(np.mean(recall))
        assert got["hit_rate"] == pytest.approx(np.mean(hit))
        assert got["mrr"] == pytest.approx(np.mean(first))
        shown = ids[np.diff(held_out.indptr) > 0]
        assert got["coverage"] == pytest.approx(len(np.unique(shown)) / 15)
        assert got["novelty"] == pytest.approx(np.log2(40 / 5))

    def test_novelty_counts_all_train_users(self) -> None:
        train = sparse.lil_matrix((1000, 20))
        train[:50] = 1  # only these users like the first ten items
        train[50:, 10:] = 1
        train[100:200, :10] = -1
        test = sparse.csr_matrix((np.ones(5), (np.arange(5), np.arange(5))), shape=train.shape)
        ids = np.tile(np.arange(3), (1000, 1))
        got = evaluation.ranking_metrics_at_k(Ranker(ids), train.tocsr(), test, K=3)
        assert got["novelty"] == pytest.approx(np.log2(1000 / 50))
        unseen = evaluation.metrics_of_rankings(ids, test, np.zeros(20, int), 1000)
        assert unseen["novelty"] == pytest.approx(np.log2(2000))

    @pytest.mark.parametrize("n_users", [None, 3])
    def test_popularity_requires_n_users(self, n_users: int | None) -> None:
        ones = sparse.csr_matrix(np.ones((2, 2)))
        with pytest.raises(ValueError, match=f"n_users must be .* at least .* 4, got {n_users}"):
            evaluation.metrics_of_rankings(np.zeros((2, 1), int), ones, np.array([4, 1]), n_users)

    def test_an_entry_stored_twice_is_one(self) -> None:
        twice = sparse.csr_matrix((np.ones(3), [1, 1, 0], [0, 2, 3]), shape=(2, 3))
        ids = np.array([[1, 2], [0, 1]])
        got = evaluation.ranking_metrics_at_k(Ranker(ids), twice * 0, twice, K=2)
        assert got["recall"] == got["ndcg"] == 1

    @pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
    def test_any_dtype_of_ids(self, dtype: type) -> None:
        test = sparse.csr_matrix([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
        ids = np.array([[1, 0], [0, 1], [2, 3]], dtype)
        got = evaluation.ranking_metrics_at_k(Ranker(ids), test * 0, test, K=2)
        assert got["precision"] == pytest.approx(1 / 3)
        assert got["hit_rate"] == 0.5

    def test_negative_ids_are_misses(self) -> None:
        test = sparse.csr_matrix([[1, 1, 1, 1]])
        ids = np.array([[2, -1, -1]])
        got = evaluation.metrics_of_rankings(ids, test)
        assert got["recall"] == pytest.approx(1 / 3)
        assert got["coverage"] == 0.25

    def test_no_relevant_entry_is_nan(self, model: Any, split: Any) -> None:
        nothing = split[1] * 0
        nothing.eliminate_zeros()
        got = evaluation.ranking_metrics_at_k(model, split[0], nothing)
        assert all(np.isnan(value) for value in got.values())

    def test_shapes_are_checked(self, model: Any, split: Any) -> None:
        with pytest.raises(ValueError, match="train has shape"):
            evaluation.ndcg_at_k(model, split[0], split[1][:5])


class TestSplits:
    @pytest.mark.parametrize("part", [0.0, 0.7, 1.0])
    def test_random_split_is_implicits(self, part: float) -> None:
        counts = random_counts(30, 20, density=0.4, seed=2)
        for ours, theirs in zip(
            evaluation.train_test_split(counts, part, random_state=5),
            reference.train_test_split(counts, part, random_state=5),
            strict=True,
        ):
            assert ours.nnz == theirs.nnz
            np.testing.assert_array_equal(ours.toarray(), theirs.toarray())

    @pytest.mark.parametrize("part", [0.0, 0.7, 1.0])
    def test_random_split_keeps_negatives_that_implicit_drops(self, part: float) -> None:
        counts = random_counts(30, 20, density=0.4, negatives=True, seed=2)
        train, test = evaluation.train_test_split(counts, part, random_state=5)
        theirs = reference.train_test_split(counts, part, random_state=5)[1]
        np.testing.assert_array_equal(test.toarray(), theirs.toarray())
        np.testing.assert_array_equal((train + test).toarray(), counts.toarray())

    @pytest.mark.parametrize("k", [1, 3])
    def test_leave_k_out(self, k: int) -> None:
        counts = random_counts(40, 20, density=0.2, seed=4)
        train, test = evaluation.leave_k_out_split(counts, k, random_state=0)
        np.testing.assert_array_equal((train + test).toarray(), counts.toarray())
        assert train.nnz + test.nnz == counts.nnz
        enough = np.diff(counts.indptr) > k + 1
        np.testing.assert_array_equal(np.diff(test.indptr), np.where(enough, k, 0))
        again = evaluation.leave_k_out_split(counts, k, random_state=0)[1]
        other = evaluation.leave_k_out_split(counts, k, random_state=1)[1]
        assert (again != test).nnz == 0
        assert (other != test).nnz > 0

    def test_leave_k_out_train_only_size(self) -> None:
        counts = random_counts(200, 20, density=0.4, seed=4)
        test = evaluation.leave_k_out_split(counts, 1, train_only_size=0.5, random_state=0)[1]
        assert 60 < test.nnz < 140

    def test_strong_generalization(self) -> None:
        counts = random_counts(50, 30, density=0.3, seed=6)
        train, visible, held_out = evaluation.strong_generalization_split(
            counts, 0.2, random_state=np.random.RandomState(0)
        )
        assert train.shape == (40, 30)
        assert visible.shape == held_out.shape == (10, 30)
        assert train.nnz + visible.nnz + held_out.nnz == counts.nnz
        assert (np.diff(held_out.indptr) >= 1).all()
        assert (np.diff(visible.indptr) >= 1).all()
        assert visible.multiply(held_out).nnz == 0

    def test_strong_generalization_of_entries_stored_twice(self) -> None:
        twice = sparse.csr_matrix((np.ones(160), np.tile([0, 1, 1, 0], 40), np.arange(41) * 4))
        _, visible, held_out = evaluation.strong_generalization_split(twice, 0.9, random_state=0)
        assert visible.multiply(held_out).nnz == 0
        np.testing.assert_array_equal((visible + held_out).toarray(), np.full((36, 2), 2))

    def test_strong_generalization_holds_out_entries_of_each_user(self) -> None:
        rows = sparse.csr_matrix(np.tile([[1, -1, 0], [1, 1, -1]], (20, 1)))
        train, visible, held_out = evaluation.strong_generalization_split(rows, 0.4, random_state=0)
        assert train.shape == (24, 3)
        np.testing.assert_array_equal(np.diff(held_out.indptr), np.ones(16))
        assert (held_out.data > 0).all()
        np.testing.assert_array_equal(np.diff(visible.indptr), np.full(16, 2))
        with pytest.raises(ValueError, match="no user has two positive entries"):
            evaluation.strong_generalization_split(rows[::2])

    def test_by_time(self) -> None:
        counts = random_counts(30, 20, density=0.3, seed=7)
        times = counts.copy()
        times.data = np.random.default_rng(0).permutation(counts.nnz).astype(np.float64)
        train, test = evaluation.time_split(counts, times, 0.25)
        np.testing.assert_array_equal((train + test).toarray(), counts.toarray())
        assert test.nnz == pytest.approx(counts.nnz / 4, abs=1)
        late, early = times.multiply(test > 0), times.multiply(train > 0)
        assert late.data.min() > early.data.max()
        with pytest.raises(ValueError, match="entries of user_items"):
            evaluation.time_split(counts, times.T)

    def test_by_time_of_unsorted_entries_that_share_their_indices(self) -> None:
        rows = sparse.csr_matrix((np.ones(4), [3, 0, 2, 1], [0, 2, 4]), shape=(2, 4))
        times = sparse.csr_matrix((np.array([10, 1, 2, 3]), rows.indices, rows.indptr), (2, 4))
        train, test = evaluation.time_split(rows, times, 0.25)
        np.testing.assert_array_equal(test.toarray(), [[0, 0, 0, 1], [0, 0, 0, 0]])
        np.testing.assert_array_equal(train.toarray(), [[1, 0, 0, 0], [0, 1, 1, 0]])

    def test_by_time_refuses_missing_times(self) -> None:
        counts = random_counts(5, 5, density=0.5, seed=0)
        times = counts.copy()
        times.data[2] = np.nan
        with pytest.raises(ValueError, match="timestamps must have no missing values"):
            evaluation.time_split(counts, times)

    @pytest.mark.parametrize("value", [0, 1, -0.1, 2])
    def test_fractions_are_checked(self, value: float) -> None:
        counts = random_counts(5, 5, density=0.5, seed=0)
        for split in (
            lambda: evaluation.strong_generalization_split(counts, value),
            lambda: evaluation.strong_generalization_split(counts, 0.5, value),
            lambda: evaluation.time_split(counts, counts, value),
        ):
            with pytest.raises(ValueError, match="between 0 and 1"):
                split()

    @pytest.mark.parametrize("value", [-0.1, 1.1, 80, np.nan])
    def test_train_percentage_is_checked(self, value: float) -> None:
        with pytest.raises(ValueError, match="train_percentage must be from 0 to 1, got"):
            evaluation.train_test_split(random_counts(5, 5, density=0.5, seed=0), value)


class FirstItems:
    """Recommends the first items to all users."""

    def recommend(
        self, userid: np.ndarray, user_items: Any, N: int, recalculate_user: bool = False
    ) -> tuple[np.ndarray, None]:
        return np.tile(np.arange(N), (len(userid), 1)), None


@pytest.mark.parametrize(
    "call",
    [
        lambda rows, times: evaluation.train_test_split(rows, random_state=0),
        lambda rows, times: evaluation.leave_k_out_split(rows, random_state=0),
        lambda rows, times: evaluation.strong_generalization_split(rows, random_state=0),
        lambda rows, times: evaluation.time_split(rows, times),
        lambda rows, times: evaluation.ranking_metrics_at_k(FirstItems(), rows, times, K=3),
        lambda rows, times: evaluation.metrics_of_rankings(np.zeros((3, 2), int), rows),
        lambda rows, times: evaluation.make_ranking_scorer("ndcg", k=2)(FirstItems(), rows),
    ],
    ids=["random", "leave-k-out", "strong", "time", "ranking", "metrics", "scorer"],
)
def test_the_input_is_not_modified(call: Any) -> None:
    indices, indptr = np.array([5, 0, 3, 1, 4, 4, 2, 0, 3], np.int32), np.array([0, 3, 6, 9])
    rows = sparse.csr_matrix((np.arange(1.0, 10), indices, indptr), shape=(3, 6))
    times = sparse.csr_matrix((np.arange(9.0, 0, -1), rows.indices, rows.indptr), shape=(3, 6))
    before = [(part, part.copy()) for part in (rows.data, times.data, rows.indices, rows.indptr)]
    call(rows, times)
    for part, copy in before:
        np.testing.assert_array_equal(part, copy)
    assert rows.indices is before[2][0] and rows.data is before[0][0]


class TestScorer:
    def test_ndcg_is_the_estimators_own_score(self) -> None:
        counts = random_counts(60, 40, density=0.3, seed=1)
        model = TPUAlternatingLeastSquares(factors=6, iterations=3, random_state=0)
        model.fit(counts, show_progress=False)
        scorer = evaluation.make_ranking_scorer("ndcg", k=10)
        assert scorer(model, counts) == pytest.approx(model.score(counts))

    @pytest.mark.parametrize("metric", evaluation.METRICS)
    def test_every_metric_scores(self, metric: str) -> None:
        counts = random_counts(60, 40, density=0.3, seed=1)
        model = TPUAlternatingLeastSquares(factors=6, iterations=3, random_state=0)
        model.fit(counts, show_progress=False)
        assert np.isfinite(evaluation.make_ranking_scorer(metric, k=5)(model, counts))

    def test_in_a_search_over_a_pipeline(self) -> None:
        counts = random_counts(60, 40, density=0.3, seed=1)
        model = TPUAlternatingLeastSquares(factors=6, iterations=2, random_state=0)
        pipeline = make_pipeline(LogWeighting(), model)
        scorer = pickle.loads(pickle.dumps(evaluation.make_ranking_scorer("recall", k=5)))
        name = "tpualternatingleastsquares"
        search = GridSearchCV(pipeline, {f"{name}__alpha": [1.0, 10.0]}, scoring=scorer, cv=2)
        search.fit(counts, **{f"{name}__show_progress": False})
        assert 0 < search.best_score_ <= 1

    @pytest.mark.parametrize("weighting", ["none", "array", "frame"])
    def test_columns_of_a_frame_keep_their_names(self, weighting: str) -> None:
        counts = random_counts(60, 40, density=0.3, seed=1).toarray()
        frame = pd.DataFrame(counts, columns=[f"item {i}" for i in range(40)])
        model = TPUAlternatingLeastSquares(factors=6, iterations=2, random_state=0)
        step = LogWeighting()
        if weighting == "frame":
            step.set_output(transform="pandas")
        pipeline = Pipeline(
            [("model", model)] if weighting == "none" else [("w", step), ("m", model)]
        )
        scorer = evaluation.make_ranking_scorer("recall", k=5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipeline.fit(frame)
            for estimator in (pipeline, model) if weighting == "none" else (pipeline,):
                got = scorer(estimator, frame)
                with pytest.raises(ValueError, match="feature names"):
                    scorer(estimator, frame[frame.columns[::-1]])
        plain = Pipeline(pipeline.steps).set_output(transform="default").fit(counts)
        assert got == scorer(plain, counts)

    def test_names_are_checked(self) -> None:
        with pytest.raises(ValueError, match="metric must be one of"):
            evaluation.make_ranking_scorer("accuracy")
        with pytest.raises(ValueError, match="k must be"):
            evaluation.make_ranking_scorer("ndcg", k=0)
