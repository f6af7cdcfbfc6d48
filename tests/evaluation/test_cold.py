"""Cold items and users: whole columns or rows are held out, and metrics of chosen candidates."""

from __future__ import annotations

import doctest
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares, evaluation
from tpu_als.baselines import PopularityRecommender
from tpu_als.datasets import planted_features
from tpu_als.evaluation import cold

MATRICES = st.lists(
    st.lists(st.sampled_from([0, 0, 0, 1, 2, -1]), min_size=6, max_size=6), min_size=1, max_size=8
)


def oracle(matrix: np.ndarray, is_cold: Any) -> tuple[np.ndarray, np.ndarray]:
    """Train and test part, cell by cell, where `is_cold(row, column)`."""
    train, test = np.zeros_like(matrix), np.zeros_like(matrix)
    for (row, column), value in np.ndenumerate(matrix):
        (test if is_cold(row, column) else train)[row, column] = value
    return train, test


def check(rows: list[list[int]], fraction: float, seed: int, of_users: bool) -> None:
    """Compare a split with the oracle, for items; or for users, which are the items' transpose."""
    matrix = np.array(rows)
    split = evaluation.cold_user_split if of_users else evaluation.cold_item_split
    counts = (matrix > 0).sum(axis=1 if of_users else 0)
    n_known = int((counts > 0).sum())
    n_cold = max(round(fraction * n_known), 1)
    if n_known < 2 or n_cold == n_known:
        message = "at least two" if n_known < 2 else "leaves none to train on"
        with pytest.raises(ValueError, match=message):
            split(matrix, fraction, random_state=seed)
        return
    train, test, ids = split(sparse.coo_matrix(matrix), fraction, random_state=seed)
    assert len(ids) == n_cold and ids.dtype == np.int64
    assert (np.diff(ids) > 0).all() and (counts[ids] > 0).all()
    expected = oracle(matrix, lambda row, column: (row if of_users else column) in ids)
    for part, of_oracle in zip((train, test), expected, strict=True):
        np.testing.assert_array_equal(part.toarray(), of_oracle)
        assert isinstance(part, sparse.csr_matrix) and part.has_canonical_format
        assert part.nnz == (of_oracle != 0).sum() and part.dtype == matrix.dtype
    again = split(matrix, fraction, random_state=seed)
    np.testing.assert_array_equal(again[2], ids)


@given(MATRICES, st.floats(0.01, 0.99), st.integers(0, 100))
def test_items_are_held_out_whole(rows: list[list[int]], fraction: float, seed: int) -> None:
    check(rows, fraction, seed, of_users=False)


@given(MATRICES, st.floats(0.01, 0.99), st.integers(0, 100))
def test_users_are_held_out_whole(rows: list[list[int]], fraction: float, seed: int) -> None:
    check(rows, fraction, seed, of_users=True)


def test_parts_are_named() -> None:
    items = evaluation.cold_item_split(random_counts(9, 8, density=0.8), random_state=0)
    assert items.train.nnz + items.test.nnz and len(items.items) == 2
    users = evaluation.cold_user_split(random_counts(9, 8, density=0.8), random_state=0)
    assert users.train.nnz + users.test.nnz and len(users.users) == 2


def test_every_item_with_entries_may_be_drawn() -> None:
    matrix = sparse.csr_matrix([[5, 0, -1, 2, 3], [5, 0, -1, 2, 0]])
    drawn = [evaluation.cold_item_split(matrix, 0.3, random_state=seed).items for seed in range(40)]
    assert set(np.concatenate(drawn)) == {0, 3, 4}


@pytest.mark.parametrize("split", [evaluation.cold_item_split, evaluation.cold_user_split])
@pytest.mark.parametrize("matrix", [np.zeros((4, 4)), np.zeros((0, 3)), -np.ones((3, 3))])
def test_a_matrix_without_positive_entries(split: Any, matrix: np.ndarray) -> None:
    with pytest.raises(ValueError, match="at least two (items|users) with positive .* got 0"):
        split(matrix)


def test_examples() -> None:
    results = doctest.testmod(cold)
    assert results.failed == 0 and results.attempted > 5


class OfScores:
    """Ranks by a table of scores, with implicit's parameters."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores

    def recommend(
        self, userid: np.ndarray, user_items: sparse.csr_matrix, N: int, items: Any = None
    ) -> tuple[np.ndarray, None]:
        scores = np.full((len(userid), self.scores.shape[1]), -np.inf)
        chosen = slice(None) if items is None else items
        scores[:, chosen] = self.scores[userid][:, chosen]
        scores[user_items.nonzero()] = -np.inf
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :N]
        return np.where(np.isinf(np.take_along_axis(scores, ids, 1)), -1, ids), None


@given(
    seed=st.integers(0, 1000),
    chosen=st.sets(st.integers(0, 11), min_size=1),
    k=st.integers(1, 14),
    density=st.floats(0.05, 0.6),
)
def test_metrics_of_candidates_equal_plain_loops(
    seed: int, chosen: set[int], k: int, density: float
) -> None:
    matrix = random_counts(9, 12, density=density, seed=seed)
    train, test = evaluation.train_test_split(matrix, 0.5, random_state=seed)
    scores = np.random.default_rng(seed).random((9, 12))
    got = evaluation.ranking_metrics_at_k(OfScores(scores), train, test, k, items=chosen)
    recalls, ndcgs, shown = [], [], set()
    for user in range(9):
        known, wanted = set(train[user].indices), set(test[user].indices) & chosen
        if not wanted:
            continue
        ranked = sorted(chosen - known, key=lambda item: -scores[user, item])[:k]
        gains = [1 / math.log2(2 + rank) for rank, item in enumerate(ranked) if item in wanted]
        best = sum(1 / math.log2(2 + rank) for rank in range(min(k, len(wanted))))
        recalls.append(len(gains) / min(k, len(wanted)))
        ndcgs.append(sum(gains) / best)
        shown |= set(ranked)
    if not recalls:
        assert all(math.isnan(value) for value in got.values())
        return
    assert got["recall"] == pytest.approx(np.mean(recalls))
    assert got["ndcg"] == pytest.approx(np.mean(ndcgs))
    assert got["coverage"] == pytest.approx(len(shown) / len(chosen))
    columns = np.array(sorted(chosen))
    only = OfScores(scores[:, columns])
    alone = evaluation.ranking_metrics_at_k(only, train[:, columns], test[:, columns], k)
    assert got == pytest.approx(alone, nan_ok=True)


@pytest.fixture(scope="module")
def split() -> cold.ColdItemSplit:
    return evaluation.cold_item_split(random_counts(30, 20, density=0.4), random_state=0)


def found(explained: float, of_users: bool, given: bool) -> tuple[float, float]:
    """NDCG among held-out items (or of held-out users), and among (or of) the others."""
    made = planted_features(400, 300, 12_000, explained=explained, factors=4)
    side = ("user" if of_users else "item") + "_features"
    split = evaluation.cold_user_split if of_users else evaluation.cold_item_split
    rest, test, ids = split(made.matrix, random_state=0)
    train, known = evaluation.train_test_split(rest, 0.9, random_state=0)
    features = {side: getattr(made, side)} if given else {}
    model = TPUAlternatingLeastSquares(8, iterations=5, regularization=5.0, random_state=0)
    model.fit(train, show_progress=False, **features)
    others = np.setdiff1d(np.arange(300), ids)
    of_cold, of_others = (
        evaluation.ranking_metrics_at_k(model, train, part, 20, items=None if of_users else items)
        for part, items in ((test, ids), (known, others))
    )
    return of_cold["ndcg"], of_others["ndcg"]


@pytest.mark.parametrize("of_users", [False, True])
def test_recovery_rises_with_the_explained_part(of_users: bool) -> None:
    recovered = [found(explained, of_users, True)[0] for explained in (0, 0.3, 0.6, 1)]
    assert (np.diff(recovered) > 0.03).all(), recovered


@pytest.mark.parametrize("of_users", [False, True])
def test_features_that_explain_nothing_do_not_harm(of_users: bool) -> None:
    with_features, without = (found(0, of_users, given)[1] for given in (True, False))
    assert with_features == pytest.approx(without, rel=0.05)


class TestCandidates:
    @pytest.mark.parametrize("kind", ["tpu_als", "implicit", "popularity"])
    def test_models(self, split: cold.ColdItemSplit, kind: str) -> None:
        model: Any = PopularityRecommender()
        if kind == "tpu_als":
            model = TPUAlternatingLeastSquares(4, iterations=2, random_state=0)
        if kind == "implicit":
            model = pytest.importorskip("implicit.als").AlternatingLeastSquares(4, iterations=2)
        model.fit(split.train, show_progress=False)
        warm = np.setdiff1d(np.arange(20), split.items)
        got = evaluation.ranking_metrics_at_k(model, split.train, split.test, 9, items=split.items)
        assert got["recall"] == 1 and 0 < got["ndcg"] <= 1  # all four are ranked
        none = evaluation.ranking_metrics_at_k(model, split.train, split.test, 9, items=warm)
        assert math.isnan(none["ndcg"])

    def test_compare_has_the_same_values(self, split: cold.ColdItemSplit) -> None:
        rng = np.random.default_rng(0)
        models = {name: OfScores(rng.random((30, 20))) for name in "ab"}
        given: Any = {"items": split.items, "n_resamples": 10}
        table = evaluation.compare(
            models, split.train, split.test, [2, 9], ["recall", "coverage"], **given
        )
        for name, model in models.items():
            for k in (2, 9):
                found = evaluation.ranking_metrics_at_k(
                    model, split.train, split.test, k, items=split.items
                )
                assert table.loc[name, f"recall@{k}"] == found["recall"]
                assert table.loc[name, f"coverage@{k}"] == found["coverage"]

    def test_a_mask_and_repeats(self, split: cold.ColdItemSplit) -> None:
        model, (train, test, items) = OfScores(np.random.default_rng(0).random((30, 20))), split
        mask = np.isin(np.arange(20), items)
        expected = evaluation.ranking_metrics_at_k(model, train, test, 2, items=items)
        for given_items in (mask, [*items, *items], items[::-1], set(items.tolist())):
            got = evaluation.ranking_metrics_at_k(model, train, test, 2, items=given_items)
            assert got == expected

    @pytest.mark.parametrize(
        ("items", "error", "message"),
        [
            ([], ValueError, "items must hold at least one id, got none: pass None"),
            ([3, 20], IndexError, "items must be columns of the matrices, 0 to 19, got 20"),
            ([-1], IndexError, "0 to 19, got -1"),
            ([0.5], IndexError, "items must hold integers"),
            (np.ones(3, bool), IndexError, "mask with 20 values, got 3"),
        ],
    )
    def test_items_are_columns(
        self, split: cold.ColdItemSplit, items: Any, error: type, message: str
    ) -> None:
        model = OfScores(np.ones((30, 20)))
        with pytest.raises(error, match=message):
            evaluation.ranking_metrics_at_k(model, split.train, split.test, items=items)
        with pytest.raises(error, match=message):
            evaluation.compare({"a": model}, split.train, split.test, items=items)

    def test_a_model_must_keep_to_the_items(self, split: cold.ColdItemSplit) -> None:
        class Ignores(OfScores):
            def recommend(self, userid: Any, user_items: Any, N: int, items: Any = None) -> Any:
                return super().recommend(userid, user_items, N)

        model = Ignores(np.random.default_rng(0).random((30, 20)))
        with pytest.raises(ValueError, match=r"must return ids that are in items, got \d+ \("):
            evaluation.ranking_metrics_at_k(model, split.train, split.test, items=split.items)

    def test_compare_without_entries_of_the_items(self, split: cold.ColdItemSplit) -> None:
        warm = np.setdiff1d(np.arange(20), split.items)
        models = {"a": OfScores(np.ones((30, 20)))}
        with pytest.raises(ValueError, match="no positive entries of these items"):
            evaluation.compare(models, split.train, split.test, items=warm)
