"""`Interactions`: unpacking, equality, and recommendations as a table with item ids."""

from __future__ import annotations

import doctest
import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import make
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.datasets import Interactions, interactions, interactions_from_frame

LEAST = np.finfo(np.float32).min


@pytest.fixture
def purchases() -> Interactions:
    """Four users and three items, by name."""
    frame = pd.DataFrame(
        {
            "who": ["ann", "ann", "bob", "cy", "cy", "cy", "dan"],
            "what": ["jam", "tea", "tea", "jam", "rye", "tea", "rye"],
        }
    )
    return interactions_from_frame(frame, "who", "what")


def test_examples() -> None:
    results = doctest.testmod(interactions)
    assert results.failed == 0 and results.attempted > 2


def test_unpacks(purchases: Interactions) -> None:
    matrix, users, items = purchases
    assert matrix is purchases.matrix and users is purchases.users and items is purchases.items


def test_equality_is_identity(purchases: Interactions) -> None:
    other = Interactions(*purchases)
    assert purchases == purchases and purchases != other
    assert len({purchases, other, purchases}) == 2
    again = pickle.loads(pickle.dumps(purchases))
    assert again.users.equals(purchases.users) and (again.matrix != purchases.matrix).nnz == 0


class TestDecode:
    def test_fillers_are_dropped(self, purchases: Interactions) -> None:
        model = make(TPUAlternatingLeastSquares, factors=2).fit(purchases.matrix)
        users = np.array([1, 2, 0])
        found = model.recommend(users, purchases.matrix[users], N=5)
        assert found[0].shape == (3, 5)
        table = purchases.decode(*found, users)
        assert table.columns.tolist() == ["user", "item", "rank", "score"]
        # cy has all items; bob lacks two, and ann one
        assert table["user"].tolist() == ["bob", "bob", "ann"]
        assert set(table["item"][:2]) == {"jam", "rye"} and table["item"][2] == "rye"
        assert table["rank"].tolist() == [1, 2, 1]
        assert table["score"].dtype == np.float32 and (table["score"] > -1).all()
        assert table.index.equals(pd.RangeIndex(3))

    def test_columns_of_one_and_of_several_queries(self, purchases: Interactions) -> None:
        ids, scores = np.array([2, 0, -1], np.int32), np.array([0.5, 0.25, LEAST], np.float32)
        one = purchases.decode(ids, scores)
        expected = {"item": ["tea", "jam"], "rank": [1, 2], "score": [0.5, 0.25]}
        assert one.to_dict("list") == expected
        named = purchases.decode(ids, scores, 3)
        assert named.to_dict("list") == {"user": ["dan", "dan"], **expected}
        several = purchases.decode([ids, ids[::-1]], [scores, scores[::-1]])
        assert several["query"].tolist() == [0, 0, 1, 1]
        assert several["rank"].tolist() == [1, 2, 1, 2]

    def test_mask_of_users(self, purchases: Interactions) -> None:
        table = purchases.decode([[0], [1]], [[1.0], [2.0]], np.array([0, 1, 0, 1], bool))
        assert table["user"].tolist() == ["bob", "dan"]

    def test_no_results(self, purchases: Interactions) -> None:
        for ids in ([], np.empty((0, 3), np.int32), np.empty((2, 0), np.int32), [[-1], [-1]]):
            table = purchases.decode(ids, np.full(np.shape(ids), LEAST))
            assert len(table) == 0 and table.columns.tolist()[-3:] == ["item", "rank", "score"]

    def test_types_of_ids_are_kept(self) -> None:
        frame = pd.DataFrame({"who": [1, 2], "when": pd.date_range("2020", periods=2)})
        found = interactions_from_frame(frame, "who", "when").decode([[1]], [[1.0]], [1])
        assert found["user"].dtype == np.int64 and found["item"].dtype.kind == "M"

    @pytest.mark.parametrize(
        ("ids", "scores", "error", "message"),
        [
            ([0, 3], [1.0, 1.0], IndexError, r"id 3 is not an item .* ids 0 to 2 \(1 of 2 ids"),
            ([0, -2], [1.0, 1.0], IndexError, "id -2 is not an item"),
            ([0, 1], [1.0], ValueError, r"got shapes \(2,\) and \(1,\)"),
            (0, 1.0, ValueError, r"shape \(N,\) or \(n, N\), got shapes \(\) and \(\)"),
            ([0.5, 1.0], [1, 2], ValueError, "got dtypes float64 and int64. Is the order"),
            ([0, 1], ["a", "b"], ValueError, "scores must hold numbers"),
            ([0, 1], [np.nan, 1.0], ValueError, "must not be NaN: 1 of 2 are"),
            (np.ma.array([0, 1], mask=[1, 0]), [1.0, 1.0], ValueError, "without masked values"),
        ],
    )
    def test_bad_results(
        self, purchases: Interactions, ids: Any, scores: Any, error: Any, message: str
    ) -> None:
        with pytest.raises(error, match=message):
            purchases.decode(ids, scores)

    @pytest.mark.parametrize(
        ("userid", "error", "message"),
        [
            ([0, 1, 2], ValueError, r"got 3 for ids of shape \(2, 1\)"),
            (0, ValueError, r"got 1 for ids of shape \(2, 1\)"),
            ([0, 4], IndexError, "userid 4 is not in"),
            (["ann", "bob"], IndexError, "userid must hold integers"),
        ],
    )
    def test_bad_users(
        self, purchases: Interactions, userid: Any, error: Any, message: str
    ) -> None:
        with pytest.raises(error, match=message):
            purchases.decode([[0], [1]], [[1.0], [1.0]], userid)

    @settings(max_examples=50)
    @given(st.data())
    def test_equals_a_loop(self, data: st.DataObject) -> None:
        n, k, n_items = (data.draw(st.integers(low, 5)) for low in (0, 0, 1))
        shape = (n, k) if data.draw(st.booleans()) else (k,)
        rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
        ids = rng.integers(-1, n_items, size=shape)
        scores = rng.choice([-1.0, 0.0, 2.5, LEAST], size=shape).astype(np.float32)
        names = pd.Index([f"item {i}" for i in range(n_items)])
        matrix = sparse.csr_matrix((1, n_items), dtype=np.float32)
        expected = []
        for query, (row, values) in enumerate(
            zip(np.atleast_2d(ids), np.atleast_2d(scores), strict=True)
        ):
            rank = 0
            for i, score in zip(row, values, strict=True):
                if i >= 0 and score > LEAST:
                    rank += 1
                    expected.append((query, names[i], rank, score)[len(shape) == 1 :])
        got = Interactions(matrix, pd.Index(["ann"]), names).decode(ids, scores)
        assert list(got.itertuples(index=False, name=None)) == expected
