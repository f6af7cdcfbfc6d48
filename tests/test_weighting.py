"""Confidence weighting, compared with implicit's functions and scikit-learn's checks."""

from __future__ import annotations

import doctest
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matrices import random_counts
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from tpu_als import TPUAlternatingLeastSquares, weighting
from tpu_als.weighting import BM25Weighting, LogWeighting, TfidfWeighting

ALL = [LogWeighting(), TfidfWeighting(), BM25Weighting(), LogWeighting(10.0), BM25Weighting(1.2, 1)]


@parametrize_with_checks(ALL)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_examples() -> None:
    assert doctest.testmod(weighting).failed == 0


class TestEqualsImplicit:
    """In implicit items are documents and users are terms, so it weights the transpose."""

    @pytest.mark.parametrize(("K1", "B"), [(100, 0.8), (1.2, 0.5), (0, 1)])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_bm25(self, counts: sparse.csr_matrix, K1: float, B: float, dtype: Any) -> None:
        nearest = pytest.importorskip("implicit.nearest_neighbours")
        expected = nearest.bm25_weight(counts.T.astype(dtype), K1=K1, B=B).T.toarray()
        got = BM25Weighting(K1, B).fit_transform(counts.astype(dtype))
        assert got.dtype == dtype
        np.testing.assert_allclose(got.toarray(), expected, rtol=1e-5)

    def test_tfidf(self, counts: sparse.csr_matrix) -> None:
        nearest = pytest.importorskip("implicit.nearest_neighbours")
        expected = nearest.tfidf_weight(counts.T).T.toarray()
        got = TfidfWeighting().fit_transform(counts)
        np.testing.assert_allclose(got.toarray(), expected, rtol=1e-5)

    def test_equals_implicits_recommenders(self, counts: sparse.csr_matrix) -> None:
        nearest = pytest.importorskip("implicit.nearest_neighbours")
        theirs = nearest.BM25Recommender(K=5, K1=1.2, B=0.5)
        theirs.fit(counts, show_progress=False)
        weighted = BM25Weighting(1.2, 0.5).fit_transform(counts.astype(np.float64))
        ours = nearest.ItemItemRecommender(K=5)
        ours.fit(weighted, show_progress=False)
        difference = ours.similarity - theirs.similarity
        assert np.abs(difference.toarray()).max() < 1e-4


class TestState:
    @pytest.mark.parametrize("transformer", ALL, ids=repr)
    def test_rows_do_not_depend_on_each_other(
        self, transformer: Any, counts: sparse.csr_matrix
    ) -> None:
        fitted = clone(transformer).fit(counts)
        some = np.array([7, 3])
        expected = fitted.transform(counts)[some].toarray()
        np.testing.assert_allclose(fitted.transform(counts[some]).toarray(), expected)

    def test_lengths_are_learnt(self, counts: sparse.csr_matrix) -> None:
        fitted = BM25Weighting(1.2).fit(counts)
        sums = counts.toarray().sum(axis=0)
        np.testing.assert_allclose(fitted.length_, 0.2 + 0.8 * sums / sums.mean(), rtol=1e-6)
        other = clone(fitted).fit(counts[:10])
        assert np.abs((fitted.transform(counts) - other.transform(counts)).data).max() > 0.01

    def test_items_without_entries(self) -> None:
        counts = sparse.csr_matrix(np.array([[1, 2, 0], [3, 0, 0]], np.float32))
        later = sparse.csr_matrix(np.array([[0, 0, 5]], np.float32))
        for transformer in ALL:
            assert np.all(clone(transformer).fit(counts).transform(later).data > 0)

    def test_a_matrix_without_entries(self) -> None:
        empty = sparse.csr_matrix((3, 4), dtype=np.float32)
        for transformer in ALL:
            assert clone(transformer).fit_transform(empty).shape == (3, 4)


class TestKinds:
    @pytest.mark.parametrize("transformer", ALL, ids=repr)
    @pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array, np.asarray])
    def test_kind_is_kept(self, transformer: Any, kind: Any, counts: sparse.csr_matrix) -> None:
        given = counts.toarray() if kind is np.asarray else kind(counts)
        before = given.copy()
        got = clone(transformer).fit_transform(given)
        assert type(got) is type(given)
        assert got.dtype == np.float32
        assert abs(given - before).max() == 0
        expected = clone(transformer).fit_transform(counts).toarray()
        dense = got if kind is np.asarray else got.toarray()
        np.testing.assert_array_equal(dense, expected)

    def test_other_formats_and_types(self, counts: sparse.csr_matrix) -> None:
        got = LogWeighting(2.0).fit_transform(counts.tocsc().astype(np.int64))
        assert isinstance(got, sparse.csr_matrix)
        np.testing.assert_allclose(got.toarray(), np.log1p(counts.toarray() / 2), rtol=1e-6)

    def test_duplicates_are_summed_and_zeros_kept(self) -> None:
        parts = (np.array([1.0, 2.0, 0.0]), np.array([1, 1, 2]), np.array([0, 3]))
        got = LogWeighting().fit_transform(sparse.csr_array(parts, shape=(1, 3)))
        assert got.nnz == 2
        np.testing.assert_allclose(got.toarray(), [[0, np.log(4), 0]])
        for transformer in (BM25Weighting(B=1), TfidfWeighting()):
            got = transformer.fit_transform(sparse.csr_array(parts, shape=(1, 3)))
            assert got.nnz == 2 and np.isfinite(got.data).all()

    def test_dislikes_stay_dislikes(self, signed_counts: sparse.csr_matrix) -> None:
        got = LogWeighting().fit_transform(signed_counts)
        assert np.array_equal(np.sign(got.data), np.sign(signed_counts.data))


@pytest.mark.parametrize(
    ("transformer", "message"),
    [
        (LogWeighting(0.0), "epsilon must be a finite number above 0, got 0.0"),
        (LogWeighting(np.inf), "epsilon must be"),
        (BM25Weighting(-1), "K1 must be a finite number of at least 0, got -1"),
        (BM25Weighting(B=1.5), "B must be a finite number of at least 0 and at most 1, got 1.5"),
        (BM25Weighting(B="0.5"), "B must be"),
    ],
)
def test_parameters_out_of_range(transformer: Any, message: str, counts: sparse.csr_matrix) -> None:
    with pytest.raises(ValueError, match=message):
        transformer.fit(counts)


class TestNewItems:
    """More columns in `transform` than in `fit`."""

    @pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array, np.asarray])
    def test_new_items_without_learnt_values(self, counts: sparse.csr_matrix, kind: Any) -> None:
        wide = np.hstack([counts.toarray(), np.arange(30, dtype=np.float32)[:, None]])
        given = wide if kind is np.asarray else kind(wide)
        got = LogWeighting(2.0).fit(counts).transform(given)
        assert type(got) is type(given)
        dense = got if kind is np.asarray else got.toarray()
        np.testing.assert_allclose(dense, np.log1p(wide / 2), rtol=1e-6)
        got = TfidfWeighting().fit(counts).transform(given)
        idf = np.log(20) - np.log1p((wide > 0).sum(axis=1, keepdims=True))
        dense = got if kind is np.asarray else got.toarray()
        np.testing.assert_allclose(dense, np.sqrt(wide) * idf, rtol=1e-5)

    @pytest.mark.parametrize("transformer", [LogWeighting(), TfidfWeighting()], ids=repr)
    def test_weights_do_not_change_with_the_catalogue(
        self, counts: sparse.csr_matrix, transformer: Any
    ) -> None:
        wide = sparse.csr_matrix((counts.data, counts.indices, counts.indptr), shape=(30, 500))
        fitted = clone(transformer).fit(counts)
        np.testing.assert_array_equal(fitted.transform(wide).data, fitted.transform(counts).data)

    def test_bm25_refuses_new_items(self, counts: sparse.csr_matrix) -> None:
        wide = sparse.hstack([counts, counts[:, :1]], format="csr")
        message = r"X has 21 features, .* expecting 20 .* fit again .* or pass X\[:, :20\]"
        fitted = BM25Weighting().fit(counts)
        with pytest.raises(ValueError, match=message):
            fitted.transform(wide)
        assert fitted.transform(wide[:, :20]).nnz == counts.nnz
        assert fitted.fit(wide).transform(wide).nnz == wide.nnz

    @pytest.mark.parametrize("transformer", ALL, ids=repr)
    def test_fewer_columns(self, counts: sparse.csr_matrix, transformer: Any) -> None:
        fitted = clone(transformer).fit(counts)
        with pytest.raises(ValueError, match="X has 19 features, but .* is expecting 20 features"):
            fitted.transform(counts[:, :19])

    def test_column_names_are_checked(self, counts: sparse.csr_matrix) -> None:
        frame = pd.DataFrame(counts.toarray(), columns=[f"item {i}" for i in range(20)])
        fitted = LogWeighting().fit(frame)
        with pytest.raises(ValueError, match="Feature names unseen at fit time"):
            fitted.transform(frame.assign(more=1.0))

    def test_without_a_fit(self, counts: sparse.csr_matrix) -> None:
        """`LogWeighting` does not need one."""
        got = LogWeighting().transform(counts)
        np.testing.assert_allclose(got.data, np.log1p(counts.data), rtol=1e-6)


class TestRange:
    @pytest.mark.parametrize(
        ("transformer", "weight"),
        [
            (LogWeighting(1e-50), "epsilon=1e-50 gives a weight of inf to a count of"),
            (LogWeighting(1e-320), "epsilon=1e-320 gives a weight of inf"),
            (LogWeighting(1e50), r"epsilon=1e\+50 gives a weight of 0.0 to a count of"),
            (BM25Weighting(1.7e308), r"K1=1.7e\+308, B=0.8 gives a weight of inf"),
        ],
        ids=repr,
    )
    def test_beyond_float32(self, counts: sparse.csr_matrix, transformer: Any, weight: str) -> None:
        with pytest.raises(ValueError, match=weight + ".* in float32.* counts as float64"):
            clone(transformer).fit_transform(counts)

    def test_float64_represents_the_weights(self, counts: sparse.csr_matrix) -> None:
        got = LogWeighting(1e-50).fit_transform(counts.astype(np.float64))
        np.testing.assert_allclose(got.data, np.log(counts.data) + np.log(1e50))
        with pytest.raises(ValueError, match="epsilon=1e-320 .* in float64: choose [a-z ]*$"):
            LogWeighting(1e-320).fit_transform(counts.astype(np.float64))

    def test_zeros_have_no_weight(self) -> None:
        zero = sparse.csr_matrix(([0.0, 1.0], [0, 1], [0, 2]), shape=(1, 2))
        assert LogWeighting().fit_transform(zero).data.tolist() == [0, np.log(2)]

    def test_values_that_are_not_finite(self) -> None:
        counts = sparse.csr_matrix(np.array([[1, 2], [0, np.nan]]))
        for transformer in ALL:
            with pytest.raises(ValueError, match="X contains NaN: 1 of 3 .* row 1, column 1"):
                clone(transformer).fit(counts)
        sums = (np.full(2, 3e38, np.float32), np.array([1, 1]), np.array([0, 0, 2]))
        twice = sparse.csr_matrix(sums, shape=(2, 2))
        with pytest.raises(ValueError, match="X contains infinity.* in row 1, column 1"):
            LogWeighting().fit(twice)


def test_parameters_are_checked_again(counts: sparse.csr_matrix) -> None:
    for transformer, name in ((LogWeighting(), "epsilon"), (BM25Weighting(), "K1")):
        transformer.fit(counts)
        setattr(transformer, name, -1.0)
        with pytest.raises(ValueError, match=f"{name} must be a finite number"):
            transformer.transform(counts)


def test_objects_for_other_functions(counts: sparse.csr_matrix) -> None:
    fitted = LogWeighting().fit(counts)
    events = pd.DataFrame({"who": ["ann"], "what": ["tea"]})
    for call in (LogWeighting().fit, fitted.transform):
        with pytest.raises(TypeError, match="X must be a matrix of .* a frame of events"):
            call(events)


def test_negative_values(signed_counts: sparse.csr_matrix) -> None:
    for transformer in (BM25Weighting(), TfidfWeighting()):
        with pytest.raises(ValueError, match="Negative values"):
            transformer.fit(signed_counts)


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array])
def test_in_a_search(kind: Any) -> None:
    counts = kind(random_counts(60, 25, density=0.3))
    model = TPUAlternatingLeastSquares(4, iterations=3, random_state=0)
    pipeline = Pipeline([("weight", LogWeighting()), ("als", model)])
    grid = {"weight": [LogWeighting(), BM25Weighting(), TfidfWeighting()], "als__alpha": [1.0]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise")
    search.fit(counts, als__show_progress=False)
    assert np.all(search.cv_results_["mean_test_score"] > 0)


class TestWithItems:
    """BM25 for a growing catalogue."""

    def test_lengths_are_those_of_the_formula(self, counts: sparse.csr_matrix) -> None:
        fitted = BM25Weighting(B=0.6).fit(counts[:, :15])
        rest = counts.copy()
        made = fitted.with_items(rest, [15, 17])
        sums = np.asarray(counts.sum(axis=0)).ravel()
        mean = sums[:15].mean()
        expected = 0.4 + 0.6 * sums / mean
        expected[[16, 18, 19]] = 0.4  # nothing is learnt of them yet
        np.testing.assert_allclose(made.length_, expected)
        np.testing.assert_array_equal(made.length_[:15], fitted.length_)
        assert len(fitted.length_) == 15 and made.n_features_in_ == 15 and made.mean_ == mean
        later = made.with_items(rest, [16])
        expected[16] = 0.4 + 0.6 * sums[16] / mean
        np.testing.assert_allclose(later.length_, expected)
        assert made.with_items(rest, []) is made

    def test_weights_of_known_items_stay(self, counts: sparse.csr_matrix) -> None:
        fitted = BM25Weighting().fit(counts[:, :15])
        made = fitted.with_items(counts, [15, 16, 17, 18, 19])
        np.testing.assert_array_equal(
            made.transform(counts[:, :15]).toarray(), fitted.transform(counts[:, :15]).toarray()
        )
        assert made.transform(counts).shape == counts.shape
        with pytest.raises(ValueError, match="X has 21 features, .* expecting 20"):
            made.transform(sparse.csr_matrix((1, 21)))
        again = pickle.loads(pickle.dumps(made))
        np.testing.assert_array_equal(again.transform(counts).data, made.transform(counts).data)

    @pytest.mark.parametrize(
        ("items", "width", "message"),
        [
            ([3], 20, "items must be from 15 on"),
            ([20], 20, "items must be below 20, got 20"),
            ([], 14, "at least the 15 known items"),
        ],
    )
    def test_refused(
        self, items: list[int], width: int, message: str, counts: sparse.csr_matrix
    ) -> None:
        fitted = BM25Weighting().fit(counts[:, :15])
        with pytest.raises(ValueError, match=message):
            fitted.with_items(counts[:, :width], items)
        with pytest.raises(NotFittedError):
            BM25Weighting().with_items(counts, [])

    def test_of_an_earlier_version(self, counts: sparse.csr_matrix) -> None:
        fitted = BM25Weighting().fit(counts[:, :15])
        del fitted.mean_
        assert fitted.with_items(counts[:, :15], []) is fitted
        with pytest.raises(ValueError, match="mean_ is missing.* fit again"):
            fitted.with_items(counts, [15])
