"""`tune`: what it finds, keeps, reports and refuses."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matrices import random_counts
from scipy import sparse
from sklearn.pipeline import Pipeline

import tpu_als
from tpu_als import (
    RecommenderPipeline,
    TPUAlternatingLeastSquares,
    TuneResult,
    tune,
)
from tpu_als.evaluation import ndcg_at_k, train_test_split
from tpu_als.exceptions import ModelFitError
from tpu_als.tuning import budget
from tpu_als.weighting import LogWeighting, TfidfWeighting

SMALL: dict[str, Any] = dict(budget=None, n_candidates=6, max_factors=16, k=5, random_state=0)
CLASSES = ("Recommender", "RecommenderPipeline", "TPUAlternatingLeastSquares")
original = TPUAlternatingLeastSquares.fit


def groups(n_groups: int = 8, users: int = 10, items: int = 10, seed: int = 0) -> sparse.csr_matrix:
    """Users who have most items of their group. The few others have the largest counts."""
    rng = np.random.default_rng(seed)
    within = np.kron(np.eye(n_groups), np.ones((users, items)))
    stored = rng.random(within.shape) < np.where(within > 0, 0.6, 0.03)
    counts = np.where(stored, rng.geometric(np.where(within > 0, 0.5, 0.01)), 0)
    return sparse.csr_matrix(counts.astype(np.float32))


def ndcg_of(estimator: Any, train: sparse.csr_matrix, test: sparse.csr_matrix) -> float:
    """NDCG@5 of an estimator that may be a Pipeline."""
    if isinstance(estimator, Pipeline):
        return ndcg_at_k(estimator[-1], estimator[:-1].transform(train), test, K=5)
    return ndcg_at_k(estimator, train, test, K=5)


def evaluated(code: str) -> Any:
    """The estimator that a line of code makes."""
    return eval(code, {name: getattr(tpu_als, name) for name in CLASSES} | vars(tpu_als.weighting))


def model_of(found: TuneResult) -> TPUAlternatingLeastSquares:
    """The fitted model."""
    return (
        found.estimator[-1] if isinstance(found.estimator, RecommenderPipeline) else found.estimator
    )


def times_of(rows: sparse.csr_matrix) -> sparse.csr_matrix:
    """Distinct times of the entries."""
    times = np.random.default_rng(5).permutation(rows.nnz) + 1.0
    return sparse.csr_matrix((times, rows.indices, rows.indptr), shape=rows.shape)


class Clock:
    """A clock that only fits advance: a second for each iteration, times factors / 16."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.fits = 0
        monkeypatch.setattr(budget, "clock", lambda: self.now)

        def fit(model: Any, rows: Any, *, show_progress: bool, callback: Any) -> Any:
            self.fits += 1

            def tick(*report: Any) -> None:
                self.now += model.factors / 16
                callback(*report)

            return original(model, rows, show_progress=show_progress, callback=tick)

        monkeypatch.setattr(TPUAlternatingLeastSquares, "fit", fit)


def test_finds_the_planted_groups() -> None:
    train, test = train_test_split(groups(), random_state=0)
    found = tune(train, **{**SMALL, "n_candidates": 12})
    default = TPUAlternatingLeastSquares(16, random_state=0).fit(train, show_progress=False)
    assert ndcg_of(found.estimator, train, test) > ndcg_of(default, train, test) + 0.05
    assert found.score == found.trials["score"].max()
    assert found.score > found.trials["score"].median() + 0.02


def test_the_estimator_is_fitted_on_all_data() -> None:
    rows = groups()
    found = tune(rows, **SMALL)
    weighted = rows
    if isinstance(found.estimator, RecommenderPipeline):
        weighted = found.estimator[:-1].transform(rows)
    model = model_of(found)
    again = TPUAlternatingLeastSquares(**model.get_params()).fit(weighted, show_progress=False)
    np.testing.assert_array_equal(model.item_factors, again.item_factors)


@pytest.mark.parametrize("data", [groups(), groups().sign(), random_counts(40, 30)])
def test_code_gives_the_same_settings(data: sparse.csr_matrix) -> None:
    found = tune(data, **SMALL)
    assert "\n" not in found.code
    made = evaluated(found.code)
    if isinstance(made, RecommenderPipeline):
        assert made[0].get_params() == found.estimator[0].get_params()
        made = made[-1]
    assert made.get_params() == model_of(found).get_params()


def test_code_keeps_the_parameters_of_model() -> None:
    template = TPUAlternatingLeastSquares(dtype=np.float64, num_threads=1, cg_steps=4)
    found = tune(groups().sign(), model=template, **SMALL)
    assert "dtype='float64'" in found.code
    assert "num_threads=1" in found.code
    assert "cg_steps=4" in found.code
    assert model_of(found).item_factors.dtype == np.float64


def test_no_trial_is_trained_on_held_out_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = groups()
    times, seen = times_of(rows), []

    def fit(model: Any, rows: Any, **options: Any) -> Any:
        seen.append(rows)
        return original(model, rows, **options)

    monkeypatch.setattr(TPUAlternatingLeastSquares, "fit", fit)
    tune(rows, timestamps=times, validation_fraction=0.2, **SMALL)
    limit = np.quantile(times.data, 0.8)
    for trained in seen[:-1]:
        assert times.multiply(trained != 0).max() <= limit
    assert times.multiply(seen[-1] != 0).max() == rows.nnz


@pytest.mark.parametrize("timed", [False, True])
def test_repeats_for_a_seed(timed: bool) -> None:
    rows = groups()
    options = {**SMALL, "timestamps": times_of(rows) if timed else None}
    first, second = tune(rows, **options), tune(rows, **options)
    pd.testing.assert_frame_equal(
        first.trials.drop(columns="seconds"), second.trials.drop(columns="seconds")
    )
    assert first.code == second.code
    np.testing.assert_array_equal(model_of(first).item_factors, model_of(second).item_factors)
    other = tune(rows, **{**options, "random_state": 1})
    assert first.code != other.code


def test_trials_describe_what_was_fitted() -> None:
    trials = tune(groups(), **SMALL).trials
    assert set(trials["weighting"]) == {"none", "log", "tfidf"}
    assert set(trials["objective"]) == {"implicit", "ials"}
    assert trials["rung"].is_monotonic_increasing
    assert trials["factors"].max() <= 16
    assert trials.loc[trials["weighting"] == "log", "epsilon"].notna().all()
    assert trials[["alpha", "regularization", "seconds"]].gt(0).all().all()


def test_weightings_that_cannot_help_are_not_tried() -> None:
    assert "log" not in set(tune(groups().sign(), **SMALL).trials["weighting"])
    disliked = random_counts(40, 30, negatives=True)
    assert "tfidf" not in set(tune(disliked, **SMALL).trials["weighting"])


@pytest.mark.parametrize(
    "metric", ["ndcg", "recall", "map", "precision", "hit_rate", "mrr", "recall_full", "map_full"]
)
def test_metrics(metric: str) -> None:
    found = tune(groups(), **{**SMALL, "n_candidates": 2}, metric=metric)
    assert 0 < found.score <= 1
    assert (found.metric, found.k) == (metric, 5)


@pytest.mark.parametrize("seconds", [40.0, 200.0])
def test_ends_within_the_budget(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    clock = Clock(monkeypatch)
    found = tune(groups(), **{**SMALL, "budget": seconds, "n_candidates": 500})
    assert clock.now - 100 <= seconds + 1
    assert clock.now - 100 >= seconds * 0.7
    assert found.seconds == clock.now - 100
    # A part of the time was kept for the final fit.
    assert model_of(found).n_iter_ == found.trials.loc[found.trials["score"].idxmax(), "iterations"]


@pytest.mark.parametrize("seconds", [1, 10, 15, 20, 30, 40, 60, 90, 120])
def test_any_budget_gives_a_model(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    clock = Clock(monkeypatch)
    options = {**SMALL, "max_factors": 64, "budget": seconds}
    found = tune(groups(), **options)
    # The two fits that measure take 8 s; at least one iteration of a trial and of the final fit
    # follow, each of which takes a second for 16 factors.
    assert clock.now - 100 <= max(seconds, 8) + 2 * found.trials["factors"].max() / 16
    assert np.isfinite(found.score)
    assert model_of(found).item_factors is not None


def test_more_factors_than_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    options = {**SMALL, "max_factors": 64, "budget": 150}
    found = tune(groups(n_groups=8), **options)
    assert clock.now - 100 <= 150 + 4
    assert found.trials["factors"].max() < 64


def test_a_budget_that_is_too_small_still_gives_a_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    found = tune(groups(), **{**SMALL, "budget": "1s"})
    assert len(found.trials) == 1
    assert model_of(found).n_iter_ == model_of(found).iterations == 1
    assert clock.fits == 4  # two to measure, one trial, the final fit
    assert np.isfinite(found.score)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, iteration: int) -> None:
    """Raise KeyboardInterrupt after an iteration of a fit, both counted from 0."""
    fits = iter(range(10**6))

    def fit(model: Any, rows: Any, *, show_progress: bool, callback: Any) -> Any:
        fit_number = next(fits)

        def stop(done: int, *report: Any) -> None:
            if fit_number == number and done == iteration:
                raise KeyboardInterrupt
            callback(done, *report)

        return original(model, rows, show_progress=show_progress, callback=stop)

    monkeypatch.setattr(TPUAlternatingLeastSquares, "fit", fit)


def test_an_interrupt_keeps_the_best_so_far(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    complete = tune(groups(), **SMALL)
    interrupt_at(monkeypatch, 7, 2)  # after two fits to measure, and five trials
    found = tune(groups(), **SMALL)
    assert found.interrupted
    assert not complete.interrupted
    assert len(found.trials) == 5
    assert found.score == complete.trials["score"][:5].max()
    assert model_of(found).item_factors is not None
    assert "the best of 5 trials" in caplog.text


def test_an_interrupt_of_the_final_fit_keeps_its_last_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_trials = len(tune(groups(), **SMALL).trials)
    interrupt_at(monkeypatch, n_trials + 2, 3)
    found = tune(groups(), **SMALL)
    assert found.interrupted
    assert model_of(found).n_iter_ == model_of(found).iterations == 4
    assert len(found.trials) == n_trials


def test_an_interrupt_before_the_first_trial_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 2, 0)
    with pytest.raises(KeyboardInterrupt):
        tune(groups(), **SMALL)


def test_trials_that_fail_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(model: Any, rows: Any, **options: Any) -> Any:
        if model.objective == "ials":
            raise ModelFitError("diverged")
        return original(model, rows, **options)

    monkeypatch.setattr(TPUAlternatingLeastSquares, "fit", fit)
    found = tune(groups().sign(), **{**SMALL, "n_candidates": 20})
    failed = found.trials["objective"] == "ials"
    assert failed.any()
    assert found.trials["score"].isna().equals(failed)
    assert model_of(found).objective == "implicit"


def test_all_trials_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(model: Any, rows: Any, **options: Any) -> Any:
        raise ModelFitError("diverged")

    monkeypatch.setattr(TPUAlternatingLeastSquares, "fit", fit)
    with pytest.raises(ModelFitError, match="all 9 trials failed.*logger"):
        tune(groups(), **SMALL)


def test_is_quiet_unless_verbose(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tune(groups(), **SMALL)
    output = capsys.readouterr()
    assert output.out == output.err == ""
    caplog.set_level(logging.INFO, "tpu_als")
    tune(groups(), **SMALL, verbose=True)
    assert f"{len(found.trials)} trials" in capsys.readouterr().err
    assert caplog.text.count("factors,") == len(found.trials)


def test_data_are_not_modified() -> None:
    rows = groups()
    before = rows.copy()
    tune(rows, **SMALL)
    assert (rows != before).nnz == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "auc"}, "metric must be one of .*'mrr'.*, got 'auc'"),
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"n_candidates": 2.5}, "n_candidates must be an integer of at least 1, got 2.5"),
        ({"max_factors": 0}, "max_factors must be an integer of at least 1, got 0"),
        ({"validation_fraction": 1}, "validation_fraction must be between 0 and 1, got 1"),
        ({"random_state": "x"}, "random_state must be .*, got 'x'"),
        ({"budget": "soon"}, "budget must be .*, got 'soon'"),
        ({"model": TPUAlternatingLeastSquares(early_stopping=True)}, "early_stopping=False"),
        ({"model": TPUAlternatingLeastSquares(checkpoint_dir="x")}, "checkpoint_dir=None"),
        ({"model": TPUAlternatingLeastSquares(cg_steps=0)}, "cg_steps must be"),
        ({"timestamps": np.ones((80, 80))}, "timestamps must be a sparse matrix of the shape"),
        ({"timestamps": groups()[:5]}, r"shape of data, \(80, 80\), .* got \(5, 80\)"),
    ],
)
def test_refuses_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tune(groups(), **{**SMALL, **options})


def test_refuses_other_models() -> None:
    with pytest.raises(TypeError, match="model must be a TPUAlternatingLeastSquares.*got Log"):
        tune(groups(), model=LogWeighting(), **SMALL)


def test_refuses_events() -> None:
    events = pd.DataFrame({"user": ["a", "b"], "item": ["x", "y"]})
    with pytest.raises(TypeError, match="data must be a matrix.*interactions_from_frame"):
        tune(events, **SMALL)


def test_refuses_data_without_pairs() -> None:
    with pytest.raises(ValueError, match="none of the 4 rows of data has two positive entries"):
        tune(sparse.eye(4, format="csr"), **SMALL)
    rows = groups()
    with pytest.raises(ValueError, match="pass another validation_fraction, or no times"):
        tune(rows, timestamps=sparse.csr_matrix(rows > 0).astype(float), **SMALL)


def test_weighting_of_the_pipeline_is_fitted() -> None:
    found = next(
        result
        for seed in range(20)
        if isinstance(
            (result := tune(groups(), **{**SMALL, "random_state": seed})).estimator, Pipeline
        )
    )
    assert isinstance(found.estimator["weighting"], (LogWeighting, TfidfWeighting))
    rows = groups()
    ids, scores = found.estimator.recommend([3, 4], rows[[3, 4]], N=5)
    weighted = found.estimator["weighting"].transform(rows)
    expected = model_of(found).recommend([3, 4], weighted[[3, 4]], N=5)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_allclose(scores, expected[1])
