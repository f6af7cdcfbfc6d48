"""Intended differences from implicit: conflicts with scikit-learn, and errors of implicit.

The conformance tests have the behaviour that both share, ``test_consumers.py`` the use by other
libraries, and ``test_contract_state.py`` files.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import oracle
import pytest
from matrices import random_counts
from models import FACTORS, OBJECTIVE, load_class, make
from scipy import sparse
from sklearn.exceptions import NotFittedError

from tpu_als import TPUAlternatingLeastSquares

LEAST = -np.finfo(np.float32).max


@pytest.fixture(scope="module")
def fitted(groups: sparse.csr_matrix) -> TPUAlternatingLeastSquares:
    """A model fitted to the planted groups; tests that change it take a copy."""
    return make(TPUAlternatingLeastSquares).fit(groups, show_progress=False)


def quick(**changes: Any) -> TPUAlternatingLeastSquares:
    """A small unfitted model of one iteration."""
    return make(TPUAlternatingLeastSquares, **{"iterations": 1, **changes})


class TestFitArguments:
    def test_returns_itself(self, counts: sparse.csr_matrix) -> None:
        model = quick()
        assert model.fit(counts, show_progress=False) is model

    def test_scikit_learns_y_and_implicits_positions(
        self, counts: sparse.csr_matrix, capfd: pytest.CaptureFixture[str]
    ) -> None:
        seen: list[int] = []

        def callback(iteration: int, *_: Any) -> None:
            seen.append(iteration)

        quick().fit(counts, False, callback)  # implicit: show_progress, callback
        quick().fit(counts, np.zeros(30), False, callback)  # scikit-learn: y
        quick().fit(counts, None, show_progress=False, callback=callback)
        quick().fit(user_items=counts, show_progress=False, callback=callback)
        assert seen == [0, 0, 0, 0]
        assert capfd.readouterr() == ("", "")

    def test_progress_bar_on_a_terminal_only(
        self, counts: sparse.csr_matrix, capfd: pytest.CaptureFixture[str]
    ) -> None:
        quick(iterations=3, calculate_training_loss=True).fit(counts, True)
        out, err = capfd.readouterr()
        assert out == "" and "3/3" in err and "loss" in err
        quick(iterations=3, verbose=True).fit(counts)
        assert "3/3" in capfd.readouterr().err
        quick(iterations=3).fit(counts)  # the output is not a terminal
        assert capfd.readouterr().err == ""

    def test_dense_and_sparse_array_equal_csr(self, counts: sparse.csr_matrix) -> None:
        reference = quick().fit(counts, show_progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for given in (counts.toarray(), sparse.csr_array(counts)):
                model = quick().fit(given, show_progress=False)
                np.testing.assert_allclose(model.item_factors, reference.item_factors, atol=1e-6)

    @pytest.mark.parametrize("pair", [("int64", "int32"), ("int32", "int64"), ("int64", "int64")])
    def test_any_index_types(self, counts: sparse.csr_matrix, pair: tuple[str, str]) -> None:
        mixed = counts.copy()
        mixed.indptr, mixed.indices = counts.indptr.astype(pair[0]), counts.indices.astype(pair[1])
        model, reference = (quick().fit(m, show_progress=False) for m in (mixed, counts))
        np.testing.assert_array_equal(model.item_factors, reference.item_factors)
        ids = [m.recommend([0, 1], mixed[:2], N=3)[0] for m in (model, reference)]
        np.testing.assert_array_equal(*ids)

    def test_duplicates_are_summed_in_any_order(self, counts: sparse.csr_matrix) -> None:
        coo = counts.tocoo()
        order = np.random.default_rng(0).permutation(np.repeat(np.arange(coo.nnz), 2))
        rows, columns, data = coo.row[order], coo.col[order], coo.data[order] / 2
        by_row = np.argsort(rows, kind="stable")
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=counts.shape[0]))])
        twice = sparse.csr_matrix((data[by_row], columns[by_row], indptr), shape=counts.shape)
        assert twice.nnz == 2 * counts.nnz
        model, reference = (quick().fit(m, show_progress=False) for m in (twice, counts))
        np.testing.assert_allclose(model.item_factors, reference.item_factors, atol=1e-5)
        assert twice.nnz == 2 * counts.nnz and not twice.has_sorted_indices

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_values_that_are_not_finite(self, counts: sparse.csr_matrix, value: float) -> None:
        model = quick().fit(counts, show_progress=False)
        before, bad = model.item_factors.copy(), counts.copy()
        bad.data[5] = value
        with pytest.raises(ValueError, match="(?i)nan|inf"):
            model.fit(bad, show_progress=False)
        np.testing.assert_array_equal(model.item_factors, before)
        for call in (model.transform, model.score, lambda x: model.recalculate_user(range(30), x)):
            with pytest.raises(ValueError, match="(?i)nan|inf"):
                call(bad)

    @pytest.mark.parametrize("seed", ["state", "generator", None, 3])
    def test_random_states(self, counts: sparse.csr_matrix, seed: Any) -> None:
        def fit() -> np.ndarray:
            given = {
                "state": np.random.RandomState(3),
                "generator": np.random.default_rng(3),
            }.get(seed, seed)
            return quick(random_state=given).fit(counts, show_progress=False).item_factors

        first, second = fit(), fit()
        assert np.array_equal(first, second) == (seed is not None)

    def test_fit_does_not_replace_a_generator(self, counts: sparse.csr_matrix) -> None:
        model = quick(random_state=0, dtype="float32", devices=None)
        before = model.get_params()
        model.fit(counts, show_progress=False)
        assert model.get_params() == before

    @pytest.mark.parametrize(
        "bad",
        [
            {"factors": 0},
            {"factors": 2.5},
            {"regularization": -1.0},
            {"regularization": np.nan},
            {"alpha": -1.0},
            {"iterations": -1},
            {"dtype": "float16"},
            {"dtype": -1},
            {"objective": "warp"},
            {"unobserved_weight": -0.1},
            {"linear_solver": "lu"},
            {"cg_steps": 0},
            {"devices": 0},
            {"devices": 99},
            {"table_layout": "scattered"},
        ],
        ids=str,
    )
    def test_a_bad_parameter_is_named_at_fit(
        self, counts: sparse.csr_matrix, bad: dict[str, Any]
    ) -> None:
        model = quick(**bad)  # the constructor only stores parameters
        with pytest.raises(ValueError, match=next(iter(bad))):
            model.fit(counts, show_progress=False)

    def test_use_gpu(self, counts: sparse.csr_matrix) -> None:
        for flag in (None, False):
            quick(use_gpu=flag).fit(counts, show_progress=False)
        with pytest.raises((ValueError, RuntimeError), match="(?i)gpu"):
            quick(use_gpu=True, devices=None).fit(counts, show_progress=False)


class TestRefit:
    def test_fit_starts_from_new_tables_by_default(self, counts: sparse.csr_matrix) -> None:
        model = quick(iterations=2).fit(counts, show_progress=False)
        first = model.item_factors.copy()
        np.testing.assert_array_equal(model.fit(counts, show_progress=False).item_factors, first)

    def test_warm_start_continues(self, counts: sparse.csr_matrix) -> None:
        once = quick(iterations=3, use_cg=True).fit(counts, show_progress=False)
        model = quick(warm_start=True, use_cg=True)
        for _ in range(3):
            model.fit(counts, show_progress=False)
        np.testing.assert_allclose(model.item_factors, once.item_factors, atol=1e-5)

    def test_assigned_tables_start_the_next_fit_only(self, counts: sparse.csr_matrix) -> None:
        rng = np.random.default_rng(8)
        users = rng.normal(size=(30, FACTORS)).astype(np.float32)
        items = rng.normal(size=(20, FACTORS)).astype(np.float32)
        fresh = quick().fit(counts, show_progress=False)
        model = quick().fit(counts, show_progress=False)
        model.user_factors, model.item_factors = users.copy(), items.copy()
        model.fit(counts, show_progress=False)
        expected = oracle.epoch(counts, users, items, OBJECTIVE)
        np.testing.assert_allclose(model.user_factors, expected[0], atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(model.item_factors, expected[1], atol=2e-3, rtol=1e-3)
        model.fit(counts, show_progress=False)
        np.testing.assert_array_equal(model.item_factors, fresh.item_factors)

    @pytest.mark.parametrize("shape", [(12, 9), (40, 28)])
    def test_refit_on_another_shape(self, fitted: Any, shape: tuple[int, int]) -> None:
        other = random_counts(*shape, seed=5)
        model = copy.deepcopy(fitted).fit(other, show_progress=False)
        fresh = make(TPUAlternatingLeastSquares).fit(other, show_progress=False)
        np.testing.assert_array_equal(model.item_factors, fresh.item_factors)
        assert model.user_factors.shape[0] == shape[0] and model.n_features_in_ == shape[1]

    def test_warm_start_on_another_shape(self, fitted: Any) -> None:
        model = copy.deepcopy(fitted).set_params(warm_start=True)
        with pytest.raises(ValueError, match="shape"):
            model.fit(random_counts(12, 9), show_progress=False)
        np.testing.assert_array_equal(model.item_factors, fitted.item_factors)

    def test_an_exception_in_the_first_callback(self, counts: sparse.csr_matrix) -> None:
        def stop(*_: Any) -> None:
            raise RuntimeError("enough")

        model, one = quick(iterations=5), quick().fit(counts, show_progress=False)
        with pytest.raises(RuntimeError, match="enough"):
            model.fit(counts, show_progress=False, callback=stop)
        np.testing.assert_array_equal(model.item_factors, one.item_factors)
        assert model.n_iter_ == 1 and model.transform(counts).shape == (30, FACTORS)


class TestIds:
    @pytest.mark.parametrize(
        "ids", [(3, 4), memoryview(np.array([3, 4], dtype=np.int32)), np.array([3, 4], np.uint8)]
    )
    def test_kinds_of_ids(self, fitted: Any, groups: sparse.csr_matrix, ids: Any) -> None:
        expected = fitted.recommend([3, 4], groups[3:5], N=4)
        np.testing.assert_array_equal(fitted.recommend(ids, groups[3:5], N=4)[0], expected[0])
        assert fitted.similar_items(ids, N=3)[0].shape == (2, 3)

    def test_a_0d_array_is_one_id(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        assert fitted.recommend(np.array(3), groups[3], N=4)[0].shape == (4,)
        assert fitted.similar_users(np.array(3), N=4)[0].shape == (4,)

    @pytest.mark.parametrize("bad", [-1, [0, -1], 24, [3, 24], 2**40])
    def test_ids_outside_the_table(self, fitted: Any, bad: Any) -> None:
        with pytest.raises(IndexError, match="user"):
            fitted.recommend(bad, None, filter_already_liked_items=False)
        with pytest.raises(IndexError, match="user"):
            fitted.similar_users(bad)
        with pytest.raises(IndexError, match="item"):
            fitted.similar_items(bad)

    def test_partial_fit_refuses_negative_ids(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        model = copy.deepcopy(fitted)
        with pytest.raises((IndexError, ValueError)):
            model.partial_fit_users([-1], groups[:1])
        with pytest.raises((IndexError, ValueError)):
            model.partial_fit_items([-1], groups.T.tocsr()[:1])
        np.testing.assert_array_equal(model.user_factors, fitted.user_factors)


class TestRecommend:
    def test_n_above_the_number_of_items(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        ids, scores = fitted.recommend([0, 9], groups[[0, 9]], N=25)
        assert ids.shape == scores.shape == (2, 25)
        for row in range(2):
            assert sorted(ids[row, :18]) == list(range(18))
        assert (ids[:, 18:] == -1).all() and (scores[:, 13:] == LEAST).all()
        ids, scores = fitted.similar_items(0, N=25)
        assert sorted(ids[:18]) == list(range(18))
        assert (ids[18:] == -1).all() and (scores[18:] < -1e30).all()

    def test_filtered_items_pad_the_result(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        liked = groups[0].indices
        ids, scores = fitted.recommend(0, groups[0], N=18)
        assert set(ids[13:]) == set(liked) and (scores[13:] == LEAST).all()
        ids, scores = fitted.recommend(0, groups[0], N=4, items=[liked[0], 9, liked[1], 14])
        assert set(ids[:2]) == {9, 14} and set(ids[2:]) == set(liked[:2])
        assert (scores[2:] == LEAST).all()

    def test_whitelist_kinds(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        for given in ([2, 9, 4], (2, 9, 4), {2, 9, 4}, np.array([2, 9, 4]), [2, 9, 4, 4]):
            ids, _ = fitted.recommend(
                9, groups[9], N=3, items=given, filter_already_liked_items=False
            )
            assert ids.dtype == np.int32 and set(ids) == {2, 9, 4}
        assert fitted.recommend(9, groups[9], items=[])[0].shape == (0,)
        assert fitted.recommend([9, 1], groups[[9, 1]], items=[])[0].shape == (2, 0)

    @pytest.mark.parametrize("kind", [list, np.array])
    def test_items_and_filter_items(
        self, fitted: Any, groups: sparse.csr_matrix, kind: Any
    ) -> None:
        with pytest.raises(ValueError, match="items and filter_items"):
            fitted.recommend(0, groups[0], items=kind([1, 2, 3]), filter_items=kind([4, 5]))
        assert len(fitted.recommend(0, groups[0], items=[7, 8], filter_items=kind([]))[0]) == 2

    @pytest.mark.parametrize("kind", [list, np.array, set])
    def test_filter_items_kinds(self, fitted: Any, groups: sparse.csr_matrix, kind: Any) -> None:
        plain = fitted.recommend(0, groups[0], N=5)
        none = fitted.recommend(0, groups[0], N=5, filter_items=kind([]))
        np.testing.assert_array_equal(none[0], plain[0])
        first = fitted.recommend(0, groups[0], N=4, filter_items=kind([int(plain[0][0])]))
        np.testing.assert_array_equal(first[0], plain[0][1:])
        for bad in ([18], [-1]):
            with pytest.raises(IndexError, match="filter_items"):
                fitted.recommend(0, groups[0], filter_items=kind(bad))

    def test_numbers_of_results(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        assert fitted.recommend([0, 1], groups[:2], N=0)[0].shape == (2, 0)
        assert fitted.recommend(0, groups[0], N=0)[1].shape == (0,)
        assert fitted.similar_items(0, N=0)[0].shape == (0,)
        for call in (
            lambda: fitted.recommend(0, groups[0], N=-1),
            lambda: fitted.similar_users(0, -1),
        ):
            with pytest.raises(ValueError, match="N"):
                call()

    def test_sparse_arrays_and_their_rows(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        array = sparse.csr_array(groups)
        expected = fitted.recommend(range(3), groups[:3], N=4)
        np.testing.assert_array_equal(fitted.recommend(range(3), array[:3], N=4)[0], expected[0])
        row = array[1]
        assert row.ndim == 1  # a row of a csr_array is a 1-D array
        ids, _ = fitted.recommend(1, row, N=4)
        np.testing.assert_array_equal(ids, expected[0][1])
        np.testing.assert_allclose(
            fitted.recalculate_user(1, row), fitted.recalculate_user(1, groups[1]), atol=1e-6
        )

    def test_errors_say_got_expected_and_remedy(
        self, fitted: Any, groups: sparse.csr_matrix
    ) -> None:
        with pytest.raises(ValueError, match=r"24.*user_items\[userids?\]"):
            fitted.recommend(0, groups)
        wide = sparse.csr_matrix((np.ones(1, np.float32), [20], [0, 1]), shape=(1, 30))
        with pytest.raises(ValueError, match="20.*18"):
            fitted.recommend(0, wide)
        with pytest.raises(ValueError, match="tocsr"):
            fitted.recommend([0], groups[:1].tocoo())
        wide = sparse.csr_matrix((1, 30), dtype=np.float32)
        assert fitted.recommend(0, wide, N=3)[0].shape == (3,)  # no entry is beyond the items

    def test_ties_do_not_repeat_an_item(self) -> None:
        model = quick()
        model.user_factors = np.ones((2, 2), dtype=np.float32)
        model.item_factors = np.ones((150, 2), dtype=np.float32)
        ids, _ = model.recommend([0, 1], None, N=100, filter_already_liked_items=False)
        assert all(len(set(row)) == 100 for row in ids)

    def test_recommend_all_uses_the_row_numbers(
        self, fitted: Any, groups: sparse.csr_matrix
    ) -> None:
        with pytest.warns(DeprecationWarning):
            ids = fitted.recommend_all(groups[4:8], N=3, users_items_offset=4)
        np.testing.assert_array_equal(ids, fitted.recommend(range(4, 8), groups[4:8], N=3)[0])

    def test_results_may_be_modified(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        results = [*fitted.recommend([0, 1], groups[:2]), *fitted.recommend(0, groups[0])]
        results += [*fitted.similar_items([0, 1]), *fitted.similar_users(0)]
        results += [fitted.recalculate_user([0], groups[0]), fitted.transform(groups)]
        for array in results:
            assert type(array) is np.ndarray and array.flags.writeable
            assert array.dtype in (np.int32, np.float32)
        assert all(a.flags.c_contiguous for a in results)


class TestSimilar:
    def test_a_short_whitelist(self, fitted: Any) -> None:
        for similar, name in ((fitted.similar_items, "items"), (fitted.similar_users, "users")):
            ids, scores = similar(0, N=5, **{name: [4, 2]})
            assert sorted(ids[:2]) == [2, 4] and (ids[2:] == -1).all()
            assert (np.diff(scores) <= 0).all()
            assert set(similar(0, N=2, **{name: {4, 2}})[0]) == {2, 4}

    def test_more_results_than_a_whitelist_has(self, groups: sparse.csr_matrix) -> None:
        """implicit shortens the results of `recommend`, and pads those of the other two methods."""
        for name, fills in (("tpu_als", 0), ("implicit", 3)):
            model = make(load_class(name))
            model.fit(groups, show_progress=False)
            for given in (0, [0, 5]):
                ids, scores = model.recommend(given, groups[given], N=5, items=[4, 2])
                assert ids.shape[-1] == scores.shape[-1] == 2
                for similar, side in (
                    (model.similar_items, "items"),
                    (model.similar_users, "users"),
                ):
                    ids, scores = similar(given, N=5, **{side: [4, 2]})
                    assert ids.shape[-1] == scores.shape[-1] == 2 + fills
                    assert (ids[..., 2:] == 4).all() and (scores[..., 2:] == 0).all()

    def test_recalculation_needs_rows(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        with pytest.raises(ValueError, match="item_users"):
            fitted.similar_items(0, recalculate_item=True)
        with pytest.raises(ValueError, match="user_items"):
            fitted.recommend(0, None, recalculate_user=True, filter_already_liked_items=False)

    def test_lists_of_both_kinds(self, fitted: Any) -> None:
        with pytest.raises(ValueError, match="items and filter_items"):
            fitted.similar_items(0, items=np.array([1, 2]), filter_items=np.array([3, 4]))
        with pytest.raises(IndexError):
            fitted.similar_items(0, filter_items=[-1])

    @pytest.mark.parametrize("rows", [1, 3])
    def test_recalculate_item_checks_the_rows(
        self, fitted: Any, groups: sparse.csr_matrix, rows: int
    ) -> None:
        with pytest.raises(ValueError, match="row"):
            fitted.recalculate_item([0, 1], groups.T.tocsr()[:rows])


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.recommend(0, x[0]),
        lambda m, x: m.similar_items(0),
        lambda m, x: m.similar_users(0),
        lambda m, x: m.recalculate_user(0, x[0]),
        lambda m, x: m.recalculate_item(0, x.T.tocsr()[0]),
        lambda m, x: m.partial_fit_users([0], x[0]),
        lambda m, x: m.partial_fit_items([0], x.T.tocsr()[0]),
        lambda m, x: m.explain(0, x, 0),
        lambda m, x: m.score_pairs([0], [0]),
        lambda m, x: m.transform(x),
        lambda m, x: m.inverse_transform(np.ones((1, FACTORS), np.float32)),
        lambda m, x: m.score(x),
        lambda m, x: m.get_feature_names_out(),
    ],
)
def test_unfitted_use(call: Any, groups: sparse.csr_matrix) -> None:
    with pytest.raises(NotFittedError):
        call(quick(), groups)
