"""`compare`: values of `ranking_metrics_at_k`, bootstrap intervals, paired differences, errors."""

from __future__ import annotations

import doctest
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import random_counts
from models import load_class, make
from scipy import sparse
from sklearn.pipeline import make_pipeline

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.baselines import PopularityRecommender
from tpu_als.evaluation import (
    METRICS,
    compare,
    comparison,
    ranking_metrics_at_k,
    train_test_split,
)
from tpu_als.exceptions import DataWarning
from tpu_als.weighting import LogWeighting

PER_USER = [name for name in METRICS if name != "coverage"]


class Fixed:
    """A model with constant rankings that counts its calls."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids, self.lengths = ids, []

    def recommend(self, userid: Any, user_items: Any, N: int) -> tuple[np.ndarray, None]:
        self.lengths.append(N)
        return self.ids[userid, :N], None


def random_ids(n: int, n_items: int, k: int, seed: int) -> np.ndarray:
    """Random rankings (n, k) without repeats."""
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(n_items)[:k] for _ in range(n)])


@pytest.fixture(scope="module")
def split() -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Train and test part of 60 users by 30 items; some users have no test entry."""
    return train_test_split(random_counts(60, 30, density=0.2), 0.85, random_state=0)


@pytest.fixture(scope="module")
def models(split: Any) -> dict[str, Any]:
    """Our model, implicit's, and popularity, fitted to the train part."""
    found = {
        "ours": make(TPUAlternatingLeastSquares),
        "implicit": make(load_class("implicit")),
        "popular": PopularityRecommender(),
    }
    for model in found.values():
        model.fit(split[0], show_progress=False)
    return found


def test_examples() -> None:
    results = doctest.testmod(comparison)
    assert results.failed == 0 and results.attempted > 2


class TestValues:
    def test_equal_ranking_metrics_at_k(self, models: Any, split: Any) -> None:
        table = compare(models, *split, K=(7, 3), metrics=METRICS, n_resamples=5)
        assert table.index.tolist() == [*models]
        for name, model in models.items():
            for k in (3, 7):
                expected = ranking_metrics_at_k(model, *split, K=k)
                for metric in METRICS:
                    got = table.loc[name, f"{metric}@{k}"]
                    assert got == pytest.approx(expected[metric], rel=1e-12), (name, metric, k)

    def test_columns(self, models: Any, split: Any) -> None:
        table = compare(models, *split, 5, ["recall", "coverage"], n_resamples=5)
        expected = ["recall@5", "recall@5 low", "recall@5 high", "coverage@5", "users", "seconds"]
        assert table.columns.tolist() == expected
        assert (table["seconds"] > 0).all()
        assert (table["users"] == np.count_nonzero(np.diff(split[1].indptr))).all()
        alone = compare({"popular": models["popular"]}, *split, 5, "coverage")
        assert alone.columns.tolist() == ["coverage@5", "users", "seconds"]

    def test_ranks_once_at_the_largest_k(self, split: Any) -> None:
        model = Fixed(random_ids(60, 30, 20, 0))
        compare({"fixed": model}, *split, K=[5, 20, 10], n_resamples=2)
        assert model.lengths == [20]

    def test_ids_beyond_the_matrix(self, split: Any) -> None:
        ids = np.column_stack([random_ids(60, 30, 4, 1), np.full(60, 99), np.full(60, -1)])
        table = compare({"fixed": Fixed(ids)}, *split, (4, 6), METRICS, n_resamples=2)
        for k in (4, 6):
            expected = ranking_metrics_at_k(Fixed(ids), *split, K=k)
            got = {metric: table.loc["fixed", f"{metric}@{k}"] for metric in METRICS}
            assert got == pytest.approx(expected, rel=1e-12)

    @settings(max_examples=30)
    @given(seed=st.integers(0, 10**6))
    def test_per_user_values_give_the_metrics(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        n, n_items, k = int(rng.integers(2, 9)), int(rng.integers(2, 9)), int(rng.integers(1, 6))
        matrix = random_counts(n, n_items, density=0.7, seed=seed)
        train, test = train_test_split(matrix, 0.5, random_state=seed)
        if not test.nnz:
            return
        model = Fixed(random_ids(n, n_items, k, seed))
        table, values = compare(
            {"fixed": model}, train, test, k, METRICS, n_resamples=2, per_user=True
        )
        users = np.flatnonzero(np.diff(test.indptr))
        assert values.index.names == ["model", "user"]
        assert values.loc["fixed"].index.tolist() == users.tolist()
        assert values.columns.tolist() == [f"{name}@{k}" for name in PER_USER]
        weights = np.minimum(np.diff(test.indptr)[users], k)
        for name in PER_USER:
            of_users, got = values[f"{name}@{k}"].to_numpy(), table.loc["fixed", f"{name}@{k}"]
            if name == "precision":
                assert got == pytest.approx(np.average(of_users, weights=weights))
            elif not np.isnan(of_users).all():
                assert got == pytest.approx(np.nanmean(of_users))
            else:
                assert np.isnan(got)
        # a user alone has the same values
        one = int(users[-1])
        only = sparse.csr_matrix(test.multiply((np.arange(n) == one)[:, None]))
        expected = ranking_metrics_at_k(model, train, only, k)
        for name in set(PER_USER) - {"novelty"}:
            got = values.loc[("fixed", one), f"{name}@{k}"]
            assert got == pytest.approx(expected[name], nan_ok=True), name


class TestIntervals:
    def test_equal_a_loop_over_draws(self, models: Any, split: Any) -> None:
        table, values = compare(
            models, *split, 5, ["ndcg", "precision"], baseline="popular", confidence=0.9,
            n_resamples=200, random_state=3, per_user=True,
        )  # fmt: skip
        n = int(table["users"].iloc[0])
        weights = np.minimum(np.diff(split[1].indptr), 5)
        weights = {"ndcg": np.ones(n), "precision": weights[weights > 0]}
        rng, draws = np.random.default_rng(3), {}
        for _ in range(200):
            drawn = rng.integers(0, n, n, dtype=np.uint32)
            for name in models:
                for metric, weight in weights.items():
                    of_users = values.loc[name, f"{metric}@5"].to_numpy()[drawn]
                    value = np.average(of_users, weights=weight[drawn])
                    draws.setdefault((name, metric), []).append(value)
        for (name, metric), of_draws in draws.items():
            row, of = table.loc[name], f"{metric}@5"
            low, high = np.quantile(of_draws, [0.05, 0.95])
            assert (row[f"{of} low"], row[f"{of} high"]) == pytest.approx((low, high))
            assert low < row[of] < high
            paired = np.subtract(of_draws, draws["popular", metric])
            low, high = np.quantile(paired, [0.05, 0.95])
            assert row[f"{of} difference low"] == pytest.approx(low)
            assert row[f"{of} difference high"] == pytest.approx(high)
            popular = table.loc["popular", of]
            assert row[f"{of} difference"] == pytest.approx(row[of] - popular)
        differences = table.loc["popular"].filter(like="difference")
        assert len(differences) == 6 and (differences == 0).all()

    def test_blocks_of_draws(self, models: Any, split: Any, monkeypatch: Any) -> None:
        arguments = (models, *split, 5, ["ndcg"])
        expected = compare(*arguments, n_resamples=30).drop(columns="seconds")
        monkeypatch.setattr(comparison, "_ROWS_AT_ONCE", 200)
        got = compare(*arguments, n_resamples=30).drop(columns="seconds")
        pd.testing.assert_frame_equal(got, expected)
        other = compare(*arguments, n_resamples=30, random_state=1)
        assert (other["ndcg@5 low"] != expected["ndcg@5 low"]).any()

    def test_cover_the_true_value(self) -> None:
        # rankings of one item, which is a hit with probability 0.3
        rng, covered, n = np.random.default_rng(0), 0, 80
        test = sparse.csr_matrix(np.eye(1, 2, dtype=np.float32).repeat(n, axis=0))
        train = sparse.csr_matrix((n, 2), dtype=np.float32)
        for seed in range(100):
            model = Fixed((rng.random((n, 1)) > 0.3).astype(int))
            table = compare(
                {"fixed": model}, train, test, 1, ["recall"], random_state=seed, n_resamples=200
            )
            row = table.loc["fixed"]
            covered += row["recall@1 low"] <= 0.3 <= row["recall@1 high"]
        assert 88 <= covered <= 99

    def test_undefined_metrics_are_nan(self) -> None:
        train = sparse.csr_matrix((2, 2), dtype=np.float32)
        test = sparse.csr_matrix(np.ones((2, 2), np.float32))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = compare({"fixed": Fixed(np.zeros((2, 1), int))}, train, test, 1, ["auc"])
        assert table[["auc@1", "auc@1 low", "auc@1 high"]].isna().all(axis=None)


class TestErrors:
    def test_overlap_is_reported_once(self, models: Any, split: Any) -> None:
        train, test = split
        with pytest.warns(DataWarning, match="are stored in the train part too") as caught:
            compare(models, train + test, test, n_resamples=2)
        assert len(caught) == 1 and caught[0].filename == __file__

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"models": {}}, TypeError, "dict of fitted models by name, got dict without"),
            ({"models": [1]}, TypeError, "got list$"),
            ({"models": {"a": 1}}, TypeError, "'a' of class int has no method recommend$"),
            (
                {"models": {"a": make_pipeline(LogWeighting(), TPUAlternatingLeastSquares())}},
                TypeError,
                "'a' of class Pipeline has no .*: use a tpu_als.RecommenderPipeline",
            ),
            ({"K": 0}, ValueError, "K must be an integer of at least 1, got 0"),
            ({"K": []}, ValueError, "K must be .* got an empty list"),
            ({"K": 2.5}, ValueError, "K must be an integer"),
            ({"metrics": ["ndgc"]}, ValueError, r"metrics must be names of .*, got \['ndgc'\]"),
            ({"metrics": []}, ValueError, "metrics must be names"),
            ({"baseline": "none"}, ValueError, r"one of the models \['fixed'\], got 'none'"),
            ({"confidence": 95}, ValueError, "confidence must be between 0 and 1, got 95"),
            ({"n_resamples": 0}, ValueError, "n_resamples must be an integer of at least 1"),
        ],
    )
    def test_bad_arguments(self, split: Any, change: Any, error: Any, message: str) -> None:
        model = Fixed(random_ids(60, 30, 20, 0))
        given = {"models": {"fixed": model}, **change}
        with pytest.raises(error, match=message):
            compare(given.pop("models"), *split, **given)
        assert not model.lengths

    def test_bad_matrices(self, models: Any, split: Any) -> None:
        train, test = split
        with pytest.raises(ValueError, match=r"train has shape \(59, 30\), but test \(60, 30\)"):
            compare(models, train[:-1], test)
        with pytest.raises(ValueError, match="no positive entries"):
            compare(models, train, test * 0)
        with pytest.raises(TypeError, match="must be a matrix"):
            compare(models, None, test)

    def test_a_failing_model_is_named(self, models: Any, split: Any) -> None:
        small = PopularityRecommender().fit(split[0][:10])
        with pytest.raises(IndexError) as error:
            compare({**models, "small": small}, *split)
        assert error.value.__notes__ == ["while ranking with the model 'small' of compare"]
