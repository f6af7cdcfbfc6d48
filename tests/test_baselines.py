"""`PopularityRecommender`, compared with a slow reference, and with the estimator's behaviour."""

from __future__ import annotations

import doctest
import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_counts
from models import make
from proof import counted, examples
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

import tpu_als
from tpu_als import TPUAlternatingLeastSquares, baselines
from tpu_als.baselines import PopularityRecommender
from tpu_als.evaluation import make_ranking_scorer, ranking_metrics_at_k, train_test_split
from tpu_als.exceptions import ParameterWarning

LEAST = np.finfo(np.float32).min


@parametrize_with_checks([PopularityRecommender()])
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_examples() -> None:
    results = doctest.testmod(baselines)
    assert results.failed == 0 and results.attempted > 2
    assert tpu_als.baselines is baselines and "baselines" in dir(tpu_als)


def reference(
    popularity: Any, seen: Any, n: int, filter_items: Any = (), items: Any = None
) -> tuple[list[int], list[float]]:
    """Rank with a sort and a loop: the results for one user."""
    n = n if items is None else min(n, len(set(items)))
    wanted = range(len(popularity)) if items is None else set(items)
    best = sorted(set(wanted) - set(seen) - set(filter_items), key=lambda i: (-popularity[i], i))
    ids = [*best[:n], *[-1] * (n - len(best))]
    return ids, [popularity[i] if i >= 0 else LEAST for i in ids]


class TestRecommend:
    @settings(max_examples=examples(100, 5000))
    @given(st.data())
    @counted
    def test_equals_the_reference(self, data: st.DataObject) -> None:
        draw = data.draw
        n_users, n_items = draw(st.integers(0, 6)), draw(st.integers(1, 8))
        rng = np.random.default_rng(draw(st.integers(0, 10_000)))
        dense = rng.integers(-1, 3, (n_users, n_items)) * (rng.random((n_users, n_items)) < 0.6)
        matrix = sparse.csr_matrix(dense.astype(np.float32))
        model = PopularityRecommender().fit(matrix)
        popularity = (dense > 0).sum(axis=0)
        which = draw(st.sampled_from(["all", "items", "filter_items"]))
        ids = draw(st.lists(st.integers(0, n_items - 1), max_size=n_items))
        limits: dict[str, Any] = {} if which == "all" else {which: ids}
        users = np.array(draw(st.lists(st.integers(0, max(n_users - 1, 0)), max_size=5)), int)
        users = users[:0] if n_users == 0 else users
        n, drops_liked = draw(st.integers(0, 10)), draw(st.booleans())
        got = model.recommend(
            users, matrix[users], N=n, filter_already_liked_items=drops_liked, **limits
        )
        assert got[0].dtype == np.int32 and got[1].dtype == np.float32
        assert got[0].shape == got[1].shape and len(got[0]) == len(users)
        for user, row, scores in zip(users, *got, strict=True):
            seen = np.flatnonzero(dense[user]) if drops_liked else ()
            assert (row.tolist(), scores.tolist()) == reference(popularity, seen, n, **limits)
            one = model.recommend(
                int(user), matrix[user], N=n, filter_already_liked_items=drops_liked, **limits
            )
            assert one[0].tolist() == row.tolist() and one[1].tolist() == scores.tolist()

    def test_blocks_of_users(self, monkeypatch: pytest.MonkeyPatch) -> None:
        matrix = random_counts(40, 15, density=0.5)
        model = PopularityRecommender().fit(matrix)
        expected = model.recommend(np.arange(40), matrix, N=5)
        monkeypatch.setattr(baselines, "_RESULTS_AT_ONCE", 15)
        got = model.recommend(np.arange(40), matrix, N=5)
        np.testing.assert_array_equal(got, expected)

    def test_results_are_writeable(self, counts: sparse.csr_matrix) -> None:
        model = PopularityRecommender().fit(counts)
        for filters in (True, False):
            ids, scores = model.recommend([3, 4], counts[[3, 4]], 4, filters)
            ids[0] = 0
            scores[0] = 0
            assert ids[1].any() and scores[1].any()  # rows do not share memory
        assert model.ranking_[1] != model.ranking_[0]

    def test_stored_zeros_are_filtered_but_not_counted(self) -> None:
        matrix = sparse.csr_matrix(([0.0, 1.0], ([0, 1], [0, 1])), shape=(2, 3))
        model = PopularityRecommender().fit(matrix)
        assert model.popularity_.tolist() == [0, 1, 0]
        assert model.recommend(0, matrix[0], N=3)[0].tolist() == [1, 2, -1]

    def test_new_users_and_forms_of_ids(self, counts: sparse.csr_matrix) -> None:
        model = PopularityRecommender().fit(counts)
        new = sparse.csr_array(np.eye(2, 20, dtype=np.float32))
        ids, _ = model.recommend([500, 501], new, N=20, recalculate_user=True)
        assert ids[0, -1] == -1 and set(ids[1, :-1]) == set(range(20)) - {1}
        mask = np.zeros(30, bool)
        mask[[2, 7]] = True
        by_mask = model.recommend(mask, counts)
        np.testing.assert_array_equal(by_mask, model.recommend([2, 7], counts[[2, 7]]))
        narrow = model.recommend(0, sparse.csr_matrix((1, 3), dtype=np.float32))[0]
        assert narrow.tolist() == model.ranking_[:10].tolist()

    @pytest.mark.parametrize(
        "call",
        [
            lambda model, rows: model.recommend(30, rows[0]),
            lambda model, rows: model.recommend(-1, rows[0]),
            lambda model, rows: model.recommend("ann", rows[0]),
            lambda model, rows: model.recommend([0, 1], rows[0]),
            lambda model, rows: model.recommend(0, None),
            lambda model, rows: model.recommend(0, rows[0].tocoo()),
            lambda model, rows: model.recommend(0, rows[0].toarray()),
            lambda model, rows: model.recommend(0, sparse.csr_matrix(np.ones((1, 21)))),
            lambda model, rows: model.recommend(0, rows[0], N=-1),
            lambda model, rows: model.recommend(0, rows[0], N=2.5),
            lambda model, rows: model.recommend(0, rows[0], items=[20]),
            lambda model, rows: model.recommend(0, rows[0], items=[1], filter_items=[2]),
            lambda model, rows: model.recommend(0, rows[0], filter_already_liked_items="no"),
            lambda model, rows: model.recommend([0], None, 10, False, None, True),
            lambda model, rows: model.recommend(np.arange(30), rows, N=1 << 28),
        ],
    )
    def test_errors_equal_the_estimators(self, counts: sparse.csr_matrix, call: Any) -> None:
        messages = []
        for model in (make(TPUAlternatingLeastSquares, iterations=1), PopularityRecommender()):
            model.fit(counts, show_progress=False)
            with pytest.raises((IndexError, ValueError, TypeError, MemoryError)) as error:
                call(model, counts)
            messages.append((error.type, str(error.value).split("GB")[0]))
        assert messages[0] == messages[1]

    def test_not_fitted(self, counts: sparse.csr_matrix) -> None:
        with pytest.raises(NotFittedError):
            PopularityRecommender().recommend(0, counts[0])


class TestRecent:
    def test_half_life(self) -> None:
        stored = np.array([[1, 0, 2, 0], [1, 3, 0, -1], [0, 1, 1, 0]], np.float32)
        matrix = sparse.csr_matrix(stored)
        days = sparse.csr_matrix([[1.0, 0, 9, 0], [5, 7, 0, 99], [0, 8, 1, 0]])
        model = PopularityRecommender(half_life=2.0).fit(matrix, timestamps=days)
        # the latest positive entry is of day 9; the dislike of day 99 does not count
        expected = [0.5**4 + 0.5**2, 0.5**1 + 0.5**0.5, 1 + 0.5**4, 0]
        np.testing.assert_allclose(model.popularity_, expected, rtol=1e-6)
        assert model.ranking_.tolist() == [1, 2, 0, 3]
        again = PopularityRecommender(2).fit(matrix, timestamps=days * 1.0)
        np.testing.assert_array_equal(again.popularity_, model.popularity_)

    def test_later_time_of_repeats(self) -> None:
        at = ([0, 0, 0], [0, 0, 1])
        matrix = sparse.coo_matrix((np.ones(3), at)).tocsr()
        times = sparse.coo_matrix(([3.0, 10.0, 8.0], at))
        model = PopularityRecommender(2).fit(matrix, timestamps=times)
        assert model.popularity_.tolist() == [1.0, 0.5]

    def test_extreme_times(self, counts: sparse.csr_matrix) -> None:
        times = counts.copy()
        times.data = np.linspace(-1, 1, counts.nnz) * 1e308
        model = PopularityRecommender(1e-300).fit(counts, timestamps=times)
        assert model.popularity_.sum() == 1.0
        empty = sparse.csr_matrix((2, 3), dtype=np.float32)
        assert not PopularityRecommender(1).fit(empty, timestamps=empty).popularity_.any()

    def test_no_half_life_ignores_times(self, counts: sparse.csr_matrix) -> None:
        model = PopularityRecommender().fit(counts, timestamps=counts)
        np.testing.assert_array_equal(model.popularity_, np.diff(counts.tocsc().indptr))

    @pytest.mark.parametrize(
        ("half_life", "change", "message"),
        [
            (0, None, "half_life must be None or a finite number above 0, got 0"),
            (np.nan, None, "half_life must be"),
            ("week", None, "got 'week'"),
            (True, None, "got True"),
            (2, lambda times: None, "half_life=2 needs the time of each entry: pass fit"),
            (2, lambda times: times[:-1], "with the entries of user_items"),
            (2, lambda times: times * np.nan, "no missing values"),
            (2, lambda times: times * np.inf, "timestamps must be finite"),
        ],
    )
    def test_errors_lose_nothing(
        self, counts: sparse.csr_matrix, half_life: Any, change: Any, message: str
    ) -> None:
        model = PopularityRecommender(2.0).fit(counts, timestamps=counts)
        before = pickle.dumps(vars(model))
        times = counts if change is None else change(counts)
        with pytest.raises(ValueError, match=message):
            model.set_params(half_life=half_life).fit(counts[:, :-1] if change is None else counts,
                                                      timestamps=times)  # fmt: skip
        assert pickle.dumps(vars(model.set_params(half_life=2.0))) == before

    def test_search_of_the_half_life(self) -> None:
        matrix = random_counts(40, 12, density=0.4)
        search = GridSearchCV(PopularityRecommender(), {"half_life": [None, 1.0, 3.0]}, cv=2)
        search.fit(matrix, timestamps=matrix)
        assert np.isfinite(search.cv_results_["mean_test_score"]).all()


class TestProtocol:
    def test_clone_and_repr(self, counts: sparse.csr_matrix) -> None:
        model = PopularityRecommender(half_life=3.5)
        assert repr(model) == "PopularityRecommender(half_life=3.5)"
        other = clone(model.fit(counts, timestamps=counts))
        assert other.get_params() == {"half_life": 3.5} and not hasattr(other, "popularity_")

    def test_failed_fit_keeps_the_state(self, counts: sparse.csr_matrix) -> None:
        model = PopularityRecommender().fit(counts)
        bad = sparse.csr_matrix(np.full((2, 5), np.nan))
        with pytest.raises(ValueError, match="NaN"):
            model.fit(bad)
        assert model.n_features_in_ == 20 and model.n_users_ == 30

    def test_frames_and_other_formats(self, counts: sparse.csr_matrix) -> None:
        names = [f"item {i}" for i in range(20)]
        frame = pd.DataFrame(counts.toarray(), columns=names)
        model = PopularityRecommender().fit(frame)
        assert model.feature_names_in_.tolist() == names
        assert model.score(frame) > 0
        with pytest.raises(ValueError, match="feature names"):
            model.score(frame[names[::-1]])
        with pytest.warns(ParameterWarning, match="expects CSR"):
            other = PopularityRecommender().fit(counts.tocsc())
        np.testing.assert_array_equal(other.popularity_, model.popularity_)
        events = pd.DataFrame({"user": ["a"], "item": ["b"]})
        with pytest.raises(TypeError, match="interactions_from_frame"):
            model.fit(events)

    def test_score_equals_the_scorer(self, counts: sparse.csr_matrix) -> None:
        model = PopularityRecommender().fit(counts)
        assert model.score(counts) == pytest.approx(make_ranking_scorer("ndcg")(model, counts))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert make_ranking_scorer("novelty")(model, counts) > 0

    def test_metrics(self) -> None:
        train, test = train_test_split(random_counts(60, 20, density=0.4), random_state=0)
        found = ranking_metrics_at_k(PopularityRecommender().fit(train), train, test, K=5)
        assert 0 < found["ndcg"] < 1 and found["precision"] > 0
