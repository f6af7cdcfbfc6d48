"""Metrics of rankings, compared with plain loops, ranx and implicit; misses and errors."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import random_counts
from scipy import sparse
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.pipeline import make_pipeline

from tpu_als import TPUAlternatingLeastSquares, evaluation
from tpu_als.evaluation import holdout
from tpu_als.exceptions import DataWarning
from tpu_als.shards import write_shards
from tpu_als.weighting import BM25Weighting, LogWeighting

RANX = {
    "precision_full": "precision",
    "recall_full": "recall",
    "ndcg": "ndcg",
    "hit_rate": "hit_rate",
    "mrr": "mrr",
    "map_full": "map",
    "map": "map",
}
IN_RANX = """
import json, sys
import ranx
found = []
for qrels, run, names in json.load(sys.stdin):
    values = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), [*names.values()])
    found.append({ours: float(values[theirs]) for ours, theirs in names.items()})
print(json.dumps(found))
"""


def case(seed: int) -> tuple[np.ndarray, Any, Any]:
    """Rankings with -1 and ids beyond the matrices; disjoint test and train matrices."""
    rng = np.random.default_rng(seed)
    n, width, k = (int(rng.integers(low, high)) for low, high in ((1, 9), (2, 12), (1, 14)))
    n_items = width + int(rng.integers(0, 6))
    values = rng.integers(-2, 4, (n, width)) * (rng.random((n, width)) < rng.random())
    in_test = rng.random((n, width)) < 0.5
    test, train = (sparse.coo_matrix(np.where(part, values, 0.0)) for part in (in_test, ~in_test))
    test.data[rng.random(test.nnz) < 0.1] = 0  # stored
    ids = np.full((n, k), -1)
    for row in ids:
        ranked = rng.permutation(n_items)[: rng.integers(1, k + 1)]
        row[: len(ranked)] = ranked
    return ids, test.tocsr(), train.tocsr()


def pairs_in_order(ranked: list[int], likes: set[int], others: set[int]) -> float:
    """Fraction of the pairs from `likes` and `others` that a ranking has in the right order."""
    place = {item: place for place, item in enumerate(ranked)}
    unranked = len(ranked)
    right = 0.0
    for like in likes:
        for other in others:
            a, b = place.get(like, unranked), place.get(other, unranked)
            right += 1.0 if a < b else 0.5 if a == b else 0.0
    return right / (len(likes) * len(others))


def oracle(ids: np.ndarray, test: Any, train: Any, popularity: list[int], n_users: int) -> dict:
    """The definitions of the metrics, user by user."""
    width, k = test.shape[1], ids.shape[1]
    rows: dict[str, list[float]] = {name: [] for name in evaluation.METRICS}
    shown: list[int] = []
    hits_of_all, most_of_all = 0, 0
    n_items = width
    for row, ranking in enumerate(ids.tolist()):
        likes = {j for j, x in zip(test[row].indices, test[row].data, strict=True) if x > 0}
        if likes:
            n_items = max(n_items, max(ranking) + 1)
    for row, ranking in enumerate(ids.tolist()):
        likes = {j for j, x in zip(test[row].indices, test[row].data, strict=True) if x > 0}
        if not likes:
            continue
        ranked = [item for item in ranking if item >= 0]
        hits = [item in likes for item in ranked]
        m, h = len(likes), sum(hits)
        hits_of_all, most_of_all = hits_of_all + h, most_of_all + min(k, m)
        rows["precision_full"].append(h / k)
        rows["precision_at_k"].append(h / k)
        rows["recall"].append(h / min(k, m))
        rows["recall_full"].append(h / m)
        rows["hit_rate"].append(h > 0)
        rows["mrr"].append(1 / (hits.index(True) + 1) if h else 0)
        precisions = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
        rows["map"].append(sum(precisions) / min(k, m))
        rows["map_full"].append(sum(precisions) / m)
        ideal = sum(1 / math.log2(i + 2) for i in range(min(k, m)))
        rows["ndcg"].append(sum(1 / math.log2(i + 2) for i, hit in enumerate(hits) if hit) / ideal)
        shown += ranked
        seen = set(train[row].indices.tolist())
        unseen = set(range(n_items)) - seen
        if unseen - likes and likes - seen:
            rows["auc_unseen"].append(pairs_in_order(ranked, likes - seen, unseen - likes))
    got = {name: float(np.mean(values)) if values else math.nan for name, values in rows.items()}
    if most_of_all:
        got["precision"] = hits_of_all / most_of_all
        got["coverage"] = len(set(shown)) / n_items
        liked = [popularity[item] if item < len(popularity) else 0 for item in shown]
        got["novelty"] = float(np.mean([-math.log2(max(x, 0.5) / n_users) for x in liked]))
    del got["auc"]  # compared with implicit's below
    return got


@given(seed=st.integers(0, 10**6))
def test_equal_plain_loops(seed: int) -> None:
    ids, test, train = case(seed)
    popularity = np.random.default_rng(seed).integers(0, 9, test.shape[1])
    got = evaluation.metrics_of_rankings(ids, test, popularity, 9, seen=train)
    expected = oracle(ids, test, train, popularity.tolist(), 9)
    assert got.keys() == {*expected, "auc"} == {*evaluation.METRICS}
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name
        assert name == "novelty" or math.isnan(value) or 0 <= got[name] <= 1
    assert math.isnan(got["auc"]) or 0 <= got["auc"] <= 1


@pytest.mark.skipif(importlib.util.find_spec("ranx") is None, reason="ranx is not installed")
def test_equal_ranx() -> None:
    cases = [case(seed) for seed in range(300)]
    asked, ours = [], []
    for ids, test, _ in cases:
        k = ids.shape[1]
        relevant = {u: row.indices[row.data > 0].tolist() for u, row in enumerate(test)}
        relevant = {u: likes for u, likes in relevant.items() if likes}
        if not relevant:
            continue
        names = dict(RANX)
        if max(map(len, relevant.values())) > k:  # ranx divides by m, and implicit by min(K, m)
            del names["map"]
        qrels = {u: dict.fromkeys(likes, 1) for u, likes in relevant.items()}
        run = {u: {int(i): -float(p) for p, i in enumerate(ids[u]) if i >= 0} for u in relevant}
        asked.append([qrels, run, {ours: f"{theirs}@{k}" for ours, theirs in names.items()}])
        ours.append(evaluation.metrics_of_rankings(ids, test))
    done = subprocess.run(
        [sys.executable, "-c", IN_RANX],
        input=json.dumps(asked),
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},  # uncompiled, as compiling takes minutes
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert len(found) == len(ours) > 200
    assert sum("map" in each for each in found) > 100
    for got, theirs in zip(ours, found, strict=True):
        assert {name: got[name] for name in theirs} == pytest.approx(theirs, abs=1e-9)


@given(seed=st.integers(0, 10**6))
def test_equal_implicit_for_positive_entries_and_full_rankings(seed: int) -> None:
    reference = pytest.importorskip("implicit.evaluation")
    rng = np.random.default_rng(seed)
    n, width = int(rng.integers(1, 9)), int(rng.integers(4, 12))
    test = sparse.csr_matrix((rng.random((n, width)) < 0.4).astype(np.float32))
    if not test.nnz or np.diff(test.indptr).max() == width:
        return
    k = int(rng.integers(1, width - np.diff(test.indptr).max() + 1))
    ids = np.array([rng.permutation(width + 3)[:k] for _ in range(n)], np.int32)
    train = sparse.csr_matrix((n, width), dtype=np.float32)
    ours = evaluation.ranking_metrics_at_k(Ranker(ids), train, test, K=k)
    theirs = reference.ranking_metrics_at_k(Ranker(ids), train, test, K=k, show_progress=False)
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-12), name


class Ranker:
    """Recommends given ids. Its attributes describe the data of the fit."""

    def __init__(self, ids: np.ndarray, **attributes: Any) -> None:
        self.ids = ids
        self.__dict__.update(attributes)

    def recommend(self, userid: Any, user_items: Any, N: int, **_: Any) -> tuple[Any, None]:
        return self.ids[np.asarray(userid)][:, :N], None


class TestIdsBeyondTheMatrix:
    def test_are_misses(self) -> None:
        test = sparse.csr_matrix([[0, 0, 1, 0, 0], [1, 0, 0, 0, 0]])
        got = evaluation.metrics_of_rankings(np.array([[5, 0], [7, 1]]), test)
        assert got["precision"] == got["recall"] == got["ndcg"] == got["hit_rate"] == 0
        assert got["coverage"] == 4 / 8

    def test_coverage_uses_the_larger_catalogue(self) -> None:
        rng = np.random.default_rng(0)
        ids = np.array([rng.permutation(200)[:10] for _ in range(50)])
        test = sparse.csr_matrix((rng.random((50, 100)) < 0.1).astype(float))
        measured = ids[np.diff(test.indptr) > 0]
        got = evaluation.metrics_of_rankings(ids, test, n_items=400)
        assert got["coverage"] == len(np.unique(measured)) / 400
        most = evaluation.metrics_of_rankings(np.arange(20).reshape(2, 10), np.ones((2, 3)))
        assert most["coverage"] == 1
        wide = evaluation.metrics_of_rankings(
            np.array([[0]]), np.ones((1, 2)), np.zeros(4), 1, seen=sparse.csr_matrix((1, 8))
        )
        assert wide["coverage"] == 1 / 8

    @pytest.mark.parametrize("cls", ["tpu_als", "implicit"])
    def test_matrices_narrower_than_the_model(self, cls: str, fitted_pair: Any) -> None:
        model, counts = fitted_pair[cls], fitted_pair["counts"]
        train, test = evaluation.train_test_split(counts, random_state=0)
        cut = [part[:, :25] for part in (train, test)]
        got = evaluation.ranking_metrics_at_k(model, *cut, K=5)
        wide = [sparse.csr_matrix((p.data, p.indices, p.indptr), (60, 40)) for p in cut]
        expected = evaluation.ranking_metrics_at_k(model, *wide, K=5)
        for name in set(evaluation.METRICS) - {
            "auc"
        }:  # implicit's AUC, over the items of the test matrix
            assert got[name] == pytest.approx(expected[name], abs=1e-12), name

    @pytest.mark.parametrize("metric", evaluation.METRICS)
    def test_a_scorer_of_a_narrower_matrix(self, metric: str, fitted_pair: Any) -> None:
        model, rows = fitted_pair["tpu_als"], fitted_pair["counts"][:, :25]
        wide = sparse.csr_matrix((rows.data, rows.indices, rows.indptr), (60, 40))
        scorer = evaluation.make_ranking_scorer(metric, k=5)
        if metric == "auc":
            assert 0 < scorer(model, rows) < 1
        else:
            assert scorer(model, rows) == pytest.approx(scorer(model, wide), abs=1e-12)

    def test_a_test_matrix_wider_than_the_model(self, fitted_pair: Any) -> None:
        model, counts = fitted_pair["tpu_als"], fitted_pair["counts"]
        train, test = evaluation.train_test_split(counts, random_state=0)
        known = evaluation.ranking_metrics_at_k(model, train, test, K=5)
        new = sparse.csr_matrix(np.ones((60, 1)))
        wide = [sparse.hstack(p, "csr") for p in ((train, 0 * new), (test, new))]
        wide[0].eliminate_zeros()
        got = evaluation.ranking_metrics_at_k(model, *wide, K=5)
        assert 0 < got["recall_full"] < known["recall_full"]
        with pytest.raises(ValueError, match="new items"):
            evaluation.ranking_metrics_at_k(model, sparse.hstack((train, new), "csr"), wide[1])

    def test_of_any_width(self) -> None:
        width = 1 << 60
        test = sparse.csr_matrix((np.ones(16), np.arange(16) % 4 + width - 4, np.arange(17)))
        ids = (np.arange(16) % 4 + width - 4)[:, None] + np.array([[1, 0]])
        got = evaluation.metrics_of_rankings(ids, test)
        assert got["recall"] == 1 and got["mrr"] == 0.5


@pytest.fixture(scope="module")
def fitted_pair() -> dict[str, Any]:
    """Both models, fitted on 60 users by 40 items."""
    from implicit.cpu.als import AlternatingLeastSquares

    counts = random_counts(60, 40, density=0.3, seed=1)
    pair = {"counts": counts}
    for name, cls in (
        ("implicit", AlternatingLeastSquares),
        ("tpu_als", TPUAlternatingLeastSquares),
    ):
        pair[name] = cls(factors=6, iterations=3, random_state=0)
        pair[name].fit(counts, show_progress=False)
    return pair


class TestMisses:
    def test_a_repeated_id_is_a_miss(self) -> None:
        test = sparse.csr_matrix([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]])
        ids = np.array([[2, 2, 2], [1, 0, 1]])
        with pytest.warns(DataWarning, match="3 of 6 ranked ids repeat") as caught:
            got = evaluation.metrics_of_rankings(ids, test, np.array([1, 2, 1, 1, 1]), 2)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = evaluation.metrics_of_rankings(
                np.array([[2, -1, -1], [1, 0, -1]]), test, np.array([1, 2, 1, 1, 1]), 2
            )
        assert got == pytest.approx(expected, nan_ok=True)
        assert got["recall"] == 0.75

    def test_ndcg_of_a_repeated_id(self) -> None:
        with pytest.warns(DataWarning, match="2 of 3 ranked ids"):
            assert holdout.mean_ndcg(np.array([[2, 2, 2]]), sparse.csr_matrix([[0, 0, 1.0]])) == 1

    def test_negative_ids_are_no_repeats(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluation.metrics_of_rankings(np.array([[0, -1, -1, -7, -7]]), np.ones((1, 2)))

    def test_zeros_and_negatives_are_not_relevant(self) -> None:
        values, columns = np.array([1.0, 0, -1, 2, 0, -2]), np.array([0, 1, 2, 3, 1, 2])
        test = sparse.csr_matrix((values, columns, [0, 4, 6]), shape=(2, 6))
        ids = np.array([[1, 2, 0], [1, 2, 0]])
        got = evaluation.metrics_of_rankings(ids, test)
        assert got == pytest.approx(
            evaluation.metrics_of_rankings(ids[:1], np.array([[1, 0, 0, 1, 0, 0]])), nan_ok=True
        )
        assert got["recall"] == 0.5 and got["mrr"] == 1 / 3
        train = sparse.csr_matrix((2, 6))
        asked = evaluation.ranking_metrics_at_k(Ranker(ids), train, test, K=3)
        assert asked["recall"] == 0.5 and asked["coverage"] == 0.5

    def test_repeated_entries_are_summed_first(self) -> None:
        test = sparse.coo_matrix(([1.0, -1, 1, 1], ([0] * 4, [0, 0, 1, 1])), shape=(1, 3))
        got = evaluation.metrics_of_rankings(np.array([[0, 1]]), test)
        assert got["recall_full"] == 1 and got["mrr"] == 0.5

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("part", ["train", "test"])
    def test_values_must_be_finite(self, value: float, part: str, fitted_pair: Any) -> None:
        split = evaluation.train_test_split(fitted_pair["counts"], random_state=0)
        parts = dict(zip(("train", "test"), split, strict=True))
        parts[part].data[3] = value
        with pytest.raises(ValueError, match=f"{part}_user_items must hold finite .* 1 of"):
            evaluation.ndcg_at_k(fitted_pair["tpu_als"], *parts.values())
        with pytest.raises(ValueError, match="held_out must hold finite values: 1 of"):
            evaluation.metrics_of_rankings(np.zeros((60, 1), int), parts[part])
        with pytest.raises(ValueError, match=r"NaN|infinity"):
            evaluation.make_ranking_scorer("ndcg")(fitted_pair["tpu_als"], parts[part])

    def test_an_overlap_is_counted_in_a_warning(self, fitted_pair: Any) -> None:
        train, test = evaluation.train_test_split(fitted_pair["counts"], random_state=0)
        both = test + train.multiply(train > 3)
        overlap = train.multiply(both > 0).nnz
        said = f"{overlap} of {both.nnz} relevant test entries are stored in the train part"
        with pytest.warns(DataWarning, match=said) as caught:
            evaluation.ranking_metrics_at_k(fitted_pair["tpu_als"], train, both)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluation.ranking_metrics_at_k(fitted_pair["tpu_als"], train, test)
            negative = train * -1  # no relevant entry is left
            evaluation.ranking_metrics_at_k(fitted_pair["tpu_als"], train, test + negative)


class TestAuc:
    def test_over_unseen_items_of_a_random_ranking(self) -> None:
        rng = np.random.default_rng(0)
        likes = rng.random((400, 60)) < 0.5
        in_test = likes & (rng.random(likes.shape) < 0.2)
        parts = (likes & ~in_test, in_test)
        train, test = (sparse.csr_matrix(part.astype(float)) for part in parts)
        ids = np.array([rng.permutation(np.flatnonzero(~row))[:10] for row in likes & ~in_test])
        got = evaluation.metrics_of_rankings(ids, test, seen=train)
        assert got["auc_unseen"] == pytest.approx(0.5, abs=0.02)
        assert got["auc"] > 0.55  # excluded train items raise the value

    def test_a_ranking_longer_than_the_catalogue(self) -> None:
        ids, test = np.array([[1, 2] + [-1] * 8]), sparse.csr_matrix([[1, 0, 0, 0]])
        assert evaluation.metrics_of_rankings(ids, test)["auc"] == 0
        best = np.array([[0] + [-1] * 9])
        assert evaluation.metrics_of_rankings(best, test)["auc"] == 1

    def test_of_many_items(self) -> None:
        test = sparse.csr_matrix((np.ones(1000), np.arange(1000), [0, 1000]), (1, 3_000_000))
        got = evaluation.metrics_of_rankings(np.arange(10)[None], test, seen=test[:, :0])
        assert got["auc"] == got["auc_unseen"] == pytest.approx((10 + 1000) / 2 / 1000)

    def test_without_other_items_is_nan(self) -> None:
        got = evaluation.metrics_of_rankings(np.array([[0, 1]]), np.ones((1, 2)))
        assert np.isnan(got["auc"]) and got["recall"] == 1


class TestArguments:
    @pytest.mark.parametrize(
        ("ids", "said"),
        [
            (np.zeros((2, 2)), "integers .* got dtype float64"),
            (np.array([["a", "b"]] * 2), "integers"),
            (np.zeros((2, 2), bool), "integers"),
            (np.array([[0, 2**64 - 1]] * 2, np.uint64), "fit into int64"),
            (np.zeros((3, 2), int), r"each of the 2 users, .* got shape \(3, 2\)"),
            (np.zeros(2, int), r"got shape \(2,\)"),
        ],
    )
    def test_ids(self, ids: np.ndarray, said: str) -> None:
        with pytest.raises(ValueError, match=said):
            evaluation.metrics_of_rankings(ids, np.eye(2))

    @pytest.mark.parametrize("popularity", [[1, np.nan], [[1, 1]], ["a", "b"]])
    def test_popularity(self, popularity: Any) -> None:
        with pytest.raises(ValueError, match="popularity must be finite numbers"):
            evaluation.metrics_of_rankings(np.zeros((2, 1), int), np.eye(2), popularity, 5)

    def test_rows_of_seen(self) -> None:
        with pytest.raises(ValueError, match=r"seen must have 2 rows, got shape \(3, 3\)"):
            evaluation.metrics_of_rankings(np.zeros((2, 1), int), np.eye(2), seen=np.eye(3))

    @pytest.mark.parametrize("k", [0, -1, 1.5, 2.0, True, "3", None])
    def test_k(self, k: Any, fitted_pair: Any) -> None:
        counts = fitted_pair["counts"]
        with pytest.raises(ValueError, match="K must be an integer of at least 1"):
            evaluation.ranking_metrics_at_k(fitted_pair["tpu_als"], counts, counts, K=k)
        with pytest.raises(ValueError, match="k must be an integer of at least 1"):
            evaluation.make_ranking_scorer("ndcg", k=k)

    def test_a_huge_k(self, fitted_pair: Any) -> None:
        counts = fitted_pair["counts"]
        with pytest.raises(MemoryError, match="lower K"):
            evaluation.ranking_metrics_at_k(fitted_pair["tpu_als"], counts * 0, counts, K=10**10)
        with pytest.raises(MemoryError, match="k of a scorer"):
            evaluation.make_ranking_scorer("ndcg", k=10**10)(fitted_pair["tpu_als"], counts)

    def test_a_ranking_shorter_than_k(self) -> None:
        test = sparse.csr_matrix(np.eye(3))
        got = evaluation.ranking_metrics_at_k(
            Ranker(np.array([[0], [1], [0]])), sparse.csr_matrix((3, 3)), test, K=4
        )
        assert got["precision_at_k"] == pytest.approx(2 / 3 / 4)

    @pytest.mark.parametrize("ids", [np.zeros(3, int), np.zeros((3, 2)), np.zeros((1, 3, 2), int)])
    def test_rankings_of_a_model_are_checked(self, ids: np.ndarray) -> None:
        class Odd:
            def recommend(self, *_: Any, **__: Any) -> tuple[np.ndarray, None]:
                return ids, None

        with pytest.raises(ValueError, match=r"recommend\(.*must return ids .* \(3, 2\)"):
            evaluation.ranking_metrics_at_k(Odd(), sparse.csr_matrix((3, 3)), np.eye(3), K=2)


class TestOtherObjects:
    EVENTS = pd.DataFrame({"user": ["ann", "bob"], "item": ["tea", "tea"]})

    def test_are_refused_by_the_metrics(self, fitted_pair: Any, tmp_path: Any) -> None:
        model, counts = fitted_pair["tpu_als"], fitted_pair["counts"]
        shards = write_shards(counts, tmp_path / "shards", 2)
        for wrong, advice in (
            (self.EVENTS, "interactions_from_frame"),
            (pa.table(self.EVENTS), r"interactions_from_frame\(.*to_pandas\(\)"),
            (shards, r"to_csr\(\)"),
        ):
            with pytest.raises(TypeError, match=f"train_user_items must be .*{advice}"):
                evaluation.ranking_metrics_at_k(model, wrong, counts)
            with pytest.raises(TypeError, match=f"test_user_items must be .*{advice}"):
                evaluation.ndcg_at_k(model, counts, wrong)
            with pytest.raises(TypeError, match=f"held_out must be .*{advice}"):
                evaluation.metrics_of_rankings(np.zeros((60, 1), int), wrong)
            for estimator in (model, make_pipeline(LogWeighting(), model)):
                with pytest.raises(TypeError, match=f"X must be .*{advice}"):
                    evaluation.make_ranking_scorer("ndcg")(estimator, wrong)

    def test_a_frame_of_events_with_numbers(self, fitted_pair: Any) -> None:
        scorer, said = evaluation.make_ranking_scorer("ndcg"), "interactions_from_frame"
        events = pd.DataFrame({"user": [1, 2], "item": [3, 4], "count": [1, 1]})
        with pytest.raises(TypeError, match=f"a frame of events.*{said}"):
            scorer(fitted_pair["tpu_als"], events)
        events.columns = ["who", "what", "times"]
        with pytest.raises(ValueError, match=f"40 items of fit as columns, got 3 columns.*{said}"):
            scorer(fitted_pair["tpu_als"], events)


class TestScorer:
    def test_novelty_uses_the_popularity_of_the_fit(self) -> None:
        rows = random_counts(20, 6, density=0.8, seed=1)
        ids = np.tile([0, 7], (20, 1))
        fitted = Ranker(ids, item_popularity_=np.array([250, 9]), user_factors=np.zeros((1000, 2)))
        scorer = evaluation.make_ranking_scorer("novelty", k=2)
        assert scorer(fitted, rows) == pytest.approx((np.log2(4) + np.log2(2000)) / 2)
        shrunk = Ranker(ids, item_popularity_=np.array([250, 9]), user_factors=np.zeros((3, 2)))
        assert scorer(shrunk, rows) == pytest.approx((0 + np.log2(500)) / 2)

    def test_novelty_of_other_models_uses_the_rows(self) -> None:
        rows = sparse.csr_matrix(np.ones((20, 6)))
        kept, _, _ = holdout.for_scoring(rows)
        expected = -np.log2(kept[:, [0]].nnz / 20)
        scorer = evaluation.make_ranking_scorer("novelty", k=1)
        assert scorer(Ranker(np.zeros((20, 1), int)), rows) == pytest.approx(expected)

    def test_no_row_with_two_entries_is_nan(self, fitted_pair: Any) -> None:
        for rows in (sparse.csr_matrix((3, 40)), sparse.csr_matrix(np.eye(40))):
            with pytest.warns(UndefinedMetricWarning, match="recall is not defined") as caught:
                score = evaluation.make_ranking_scorer("recall")(fitted_pair["tpu_als"], rows)
            assert np.isnan(score) and len(caught) == 1


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("recall_full_at_k", "recall_full"),
        ("precision_full_at_k", "precision_full"),
        ("mean_average_precision_full_at_k", "map_full"),
        ("mean_average_precision_at_k", "map"),
        ("AUC_unseen_at_k", "auc_unseen"),
        ("precision_at_k", "precision"),
    ],
)
def test_functions_and_their_metrics(name: str, metric: str, fitted_pair: Any) -> None:
    train, test = evaluation.train_test_split(fitted_pair["counts"], random_state=0)
    asked = (fitted_pair["tpu_als"], train, test)
    got = getattr(evaluation, name)(*asked, K=5)
    assert got == evaluation.ranking_metrics_at_k(*asked, K=5)[metric]
    assert 0 < got < 1


def test_more_items_than_memory_holds() -> None:
    """As of hashed ids."""
    ids, indptr = np.array([1, 2**44]), np.array([0, 2])
    wide = sparse.csr_matrix((np.ones(2), ids, indptr), shape=(1, 2**44 + 1))
    model = TPUAlternatingLeastSquares(4)
    for call in (lambda: model.fit(wide), lambda: BM25Weighting().fit(wide)):
        with pytest.raises(MemoryError, match="17592186044417 items .*number the items from 0 on"):
            call()
    assert model.item_factors is None
