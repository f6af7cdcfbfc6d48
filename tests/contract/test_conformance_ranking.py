"""Behaviour of implicit that users rely on, tested on its class and on ours: ids and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from matrices import withheld
from models import OBJECTIVE, make
from scipy import sparse


class TestRecommend:
    def test_one_user(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        for userid in (3, np.int64(3)):
            ids, scores = fitted.recommend(userid, groups[3], N=5)
            assert ids.shape == scores.shape == (5,)
            assert ids.dtype == np.int32 and scores.dtype == np.float32
            expected = fitted.item_factors[ids] @ fitted.user_factors[3]
            np.testing.assert_allclose(scores, expected, atol=1e-5)
            assert (np.diff(scores) <= 0).all()
            assert not set(ids) & set(groups[3].indices)

    @pytest.mark.parametrize("users", [[5, 2, 3], np.array([5, 2, 3]), range(2, 6)], ids=repr)
    def test_several_users(self, fitted: Any, groups: sparse.csr_matrix, users: Any) -> None:
        ids, scores = fitted.recommend(users, groups[list(users)], N=4)
        assert ids.shape == scores.shape == (len(users), 4)
        assert ids.dtype == np.int32 and ids.flags.c_contiguous and ids.flags.writeable
        for row, user in enumerate(users):
            _, alone = fitted.recommend(user, groups[user], N=4)
            np.testing.assert_allclose(scores[row], alone, atol=1e-5)
            expected = fitted.item_factors[ids[row]] @ fitted.user_factors[user]
            np.testing.assert_allclose(scores[row], expected, atol=1e-5)

    def test_a_mask_of_users(self, fitted: Any) -> None:
        mask = np.arange(24) % 7 == 1
        ids, scores = fitted.recommend(mask, None, N=4, filter_already_liked_items=False)
        users = np.flatnonzero(mask)
        _, expected = fitted.recommend(users, None, N=4, filter_already_liked_items=False)
        assert ids.shape == (4, 4)
        np.testing.assert_allclose(scores, expected, atol=1e-5)

    def test_no_users(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        ids, scores = fitted.recommend([], groups[:0], N=4)
        assert ids.shape == scores.shape == (0, 4)

    def test_liked_items_are_not_filtered_on_request(
        self, fitted: Any, groups: sparse.csr_matrix
    ) -> None:
        ids, _ = fitted.recommend(0, None, N=6, filter_already_liked_items=False)
        assert set(ids) == set(range(6))

    def test_filter_items(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        for given in ([0, 7], np.array([0, 7])):
            ids, _ = fitted.recommend([0, 9], groups[[0, 9]], N=8, filter_items=given)
            assert not np.isin(ids, [0, 7]).any()

    def test_items_whitelist(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        items = [17, 2, 9, 4]
        ids, scores = fitted.recommend(
            0, groups[0], N=10, items=items, filter_already_liked_items=False
        )
        assert sorted(ids) == sorted(items) and (np.diff(scores) <= 0).all()
        assert (fitted.recommend([0, 1], groups[:2], N=3, items=items)[0]).shape == (2, 3)

    def test_liked_items_of_a_whitelist_come_last(
        self, fitted: Any, groups: sparse.csr_matrix
    ) -> None:
        ids, scores = fitted.recommend(0, groups[0], N=4, items=[1, 2, 10, 12])
        assert set(ids[:2]) == {10, 12}
        assert (scores[2:] == -np.finfo(np.float32).max).all()

    def test_fewer_unseen_items_than_n(self, fitted: Any) -> None:
        row = sparse.csr_matrix(np.ones((1, 18), dtype=np.float32))
        row[0, 5] = 0
        row.eliminate_zeros()
        ids, scores = fitted.recommend(0, row, N=4)
        assert ids.shape == (4,) and ids[0] == 5
        assert (scores[1:] == -np.finfo(np.float32).max).all()

    def test_a_stored_zero_is_a_liked_item(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        best = fitted.recommend(0, groups[0], N=1)[0][0]
        indices = np.sort(np.append(groups[0].indices, best))
        data = np.where(indices == best, 0.0, 1.0).astype(np.float32)
        row = sparse.csr_matrix((data, indices, [0, len(indices)]), shape=(1, 18))
        assert best not in fitted.recommend(0, row, N=5)[0]

    def test_recalculate_user(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        ids, scores = fitted.recommend(999, groups[4], N=5, recalculate_user=True)
        factors = oracle.fold_in(groups[4], fitted.item_factors, OBJECTIVE)[0]
        np.testing.assert_allclose(scores, fitted.item_factors[ids] @ factors, atol=1e-4)
        assert ids[0] == 4

    def test_user_items_may_be_narrower(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        ids, _ = fitted.recommend([0, 1], groups[:2, :6].tocsr(), N=3)
        assert not np.isin(ids[0], groups[0].indices).any()

    @pytest.mark.parametrize("rows", [None, "csc", "coo"])
    def test_user_items_must_be_csr(
        self, fitted: Any, groups: sparse.csr_matrix, rows: str | None
    ) -> None:
        given = None if rows is None else groups[:1].asformat(rows)
        with pytest.raises(ValueError, match="(?i)csr"):
            fitted.recommend([0], given)
        with pytest.raises(ValueError, match="(?i)csr"):
            fitted.recommend([0], given, filter_already_liked_items=False, recalculate_user=True)

    def test_one_row_per_user(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        for users in (0, [0, 1]):
            with pytest.raises(ValueError, match="user_items must contain 1 row for every user"):
                fitted.recommend(users, groups)

    @pytest.mark.parametrize("userid", [24, 10**9, 1.5, "a", [0, 24], [0.5, 1.5]])
    def test_a_bad_userid_is_an_index_error(self, fitted: Any, userid: Any) -> None:
        with pytest.raises(IndexError):
            fitted.recommend(userid, None, filter_already_liked_items=False)

    def test_bad_items(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        for items in ([0, 18], [-1, 3]):
            with pytest.raises(IndexError):
                fitted.recommend(0, groups[0], items=items)
        with pytest.raises(IndexError):
            fitted.recommend(0, groups[0], filter_items=[18])
        with pytest.raises(ValueError, match="items and filter_items"):
            fitted.recommend(0, groups[0], items=[1, 2], filter_items=[3])
        with pytest.raises(ValueError):
            fitted.recommend(0, groups[0], N=-1)

    def test_deprecated_names(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        with pytest.warns(DeprecationWarning):
            every = fitted.recommend_all(groups, N=3)
        np.testing.assert_array_equal(every, fitted.recommend(range(24), groups, N=3)[0])
        with pytest.warns(DeprecationWarning):
            ids, _ = fitted.rank_items(0, groups[0], [3, 9, 15])
        assert ids[0] == 3 and sorted(ids) == [3, 9, 15]


class TestSimilar:
    @pytest.mark.parametrize("side", ["items", "users"])
    def test_cosine_with_itself_first(self, fitted: Any, side: str) -> None:
        table = getattr(fitted, f"{side[:-1]}_factors").astype(np.float64)
        unit = table / np.linalg.norm(table, axis=1, keepdims=True)
        ids, scores = getattr(fitted, f"similar_{side}")(5, N=4)
        assert ids.shape == scores.shape == (4,) and ids.dtype == np.int32
        assert scores[0] == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(scores, unit[ids] @ unit[5], atol=1e-5)
        np.testing.assert_allclose(scores, np.sort(unit @ unit[5])[::-1][:4], atol=1e-5)

    @pytest.mark.parametrize("side", ["items", "users"])
    def test_several(self, fitted: Any, side: str) -> None:
        similar = getattr(fitted, f"similar_{side}")
        ids, scores = similar(np.array([1, 8]), N=3)
        assert ids.shape == scores.shape == (2, 3)
        for row, one in enumerate((1, 8)):
            np.testing.assert_allclose(scores[row], similar(one, N=3)[1], atol=1e-5)

    @pytest.mark.parametrize("side", ["items", "users"])
    def test_filter_and_whitelist(self, fitted: Any, side: str) -> None:
        similar = getattr(fitted, f"similar_{side}")
        assert not set(similar(0, N=5, **{f"filter_{side}": [0, 1]})[0]) & {0, 1}
        assert set(similar(0, N=3, **{side: [7, 0, 9]})[0]) == {7, 0, 9}
        with pytest.raises(ValueError, match=f"{side} and filter_{side}"):
            similar(0, **{side: [1, 2], f"filter_{side}": [1]})
        for bad in ([0, 100], [-100, 1]):
            with pytest.raises(IndexError):
                similar(0, **{side: bad})

    def test_recalculate_item(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        columns = groups.T.tocsr()
        factors = oracle.fold_in(columns[2:4], fitted.user_factors, OBJECTIVE)
        ids, scores = fitted.similar_items(
            [2, 3], N=3, recalculate_item=True, item_users=columns[2:4]
        )
        for row in range(2):
            table = fitted.item_factors[ids[row]]
            cosine = table @ factors[row] / np.linalg.norm(table, axis=1)
            cosine /= np.linalg.norm(factors[row])
            np.testing.assert_allclose(scores[row], cosine, atol=1e-4)

    def test_bad_itemid(self, fitted: Any) -> None:
        for itemid in (18, [0, 18], "a"):
            with pytest.raises(IndexError):
                fitted.similar_items(itemid)


def test_evaluation_of_implicit_accepts_the_model(cls: Any, groups: sparse.csr_matrix) -> None:
    evaluation = pytest.importorskip("implicit.evaluation")
    model = make(cls, factors=3)
    model.fit(groups, show_progress=False)
    users = np.arange(24)
    held_out = (np.ones(24, dtype=np.float32), (users, withheld(users)))
    test = sparse.csr_matrix(held_out, shape=groups.shape)
    metrics = evaluation.ranking_metrics_at_k(
        model, groups, test, K=5, show_progress=False, num_threads=1
    )
    assert metrics["ndcg"] == metrics["map"] == pytest.approx(1.0)
