"""Parts of `tune`: budgets, scales, splits, candidates."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import FeatureTable, Recommender, TPUAlternatingLeastSquares, evaluation
from tpu_als.datasets import split_by_time
from tpu_als.tuning import budget, events, plan, scales, split
from tpu_als.tuning.halving import Found, Halving
from tpu_als.tuning.space import BALANCE, EPSILON, RIDGE, STARTS, Settings, Size, Space
from tpu_als.tuning.trials import Trial


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(None, None), (90, 90.0), (0.5, 0.5), ("90s", 90.0), ("10min", 600.0), ("1.5 h", 5400.0),
     (np.float32(3), 3.0), (" 2 MIN ", 120.0), ("5m", 300.0)],
)  # fmt: skip
def test_budgets(given: Any, seconds: float | None) -> None:
    assert budget.seconds_of(given) == seconds


@pytest.mark.parametrize("given", [0, -1, True, float("nan"), float("inf"), "10", "min", "0s", []])
def test_refuses_budgets(given: Any) -> None:
    with pytest.raises(ValueError, match='budget must be .*"10min".*, got '):
        budget.seconds_of(given)


def test_costs_follow_the_nearest_number_of_factors() -> None:
    rows, costs = random_counts(20, 10), budget.Costs()
    assert costs.trial(rows, 8, 3) == 0
    for factors, seconds in ((8, 1.0), (64, 2.0)):
        costs.record(factors, budget.work_of(rows, factors, 3), seconds, 1.0)
    assert costs.fit(rows, 8, 3) == pytest.approx(1)
    assert costs.fit(rows, 64, 3) == pytest.approx(2)
    assert costs.fit(rows, 64, 7) == pytest.approx(4)  # 8 passes of 4, with the layout
    assert costs.fit(rows, 16, 3) == pytest.approx(
        budget.work_of(rows, 16, 3) / budget.work_of(rows, 8, 3)
    )
    assert costs.trial(rows, 8, 3) == pytest.approx(1 + rows.nnz)
    costs.forget()
    assert costs.trial(rows, 8, 3) == 0


@pytest.mark.parametrize("objective", ["implicit", "ials"])
@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("balance", [0.5, 20.0])
def test_factors_vanish_at_the_largest_ridge(
    objective: str, exponent: float, balance: float
) -> None:
    rows = random_counts(30, 20)
    sizes = []
    for ridge in (0.9, 1.1):
        settings = Settings(objective, "none", balance, ridge, exponent).canonical()
        values = scales.parameters_of(settings, rows)
        model = TPUAlternatingLeastSquares(
            4, iterations=200, random_state=0, dtype=np.float64, linear_solver="exact", **values
        ).fit(rows, show_progress=False)
        sizes.append(np.abs(model.inverse_transform(model.user_factors)).max())
    assert sizes[0] > 1e-2
    assert sizes[1] < 1e-6


@pytest.mark.parametrize("objective", ["implicit", "ials"])
@pytest.mark.parametrize("weighting", ["none", "log", "tfidf"])
def test_settings_do_not_depend_on_the_unit_of_the_values(objective: str, weighting: str) -> None:
    settings = Settings(objective, weighting, 5.0, 0.1, 0.5, 0.3).canonical()
    found = []
    for unit in (1, 1024):
        rows = random_counts(30, 20) * unit
        weighted = scales.weighted(scales.weighting_of(settings, rows), rows)
        values = scales.parameters_of(settings, weighted)
        model = TPUAlternatingLeastSquares(4, random_state=0, dtype=np.float64, **values)
        model.fit(weighted, show_progress=False)
        found.append(model.inverse_transform(model.user_factors))
    # parameters are rounded to three digits
    np.testing.assert_allclose(found[0], found[1], atol=0.01 * np.abs(found[0]).max())


def test_balance_is_the_ratio_of_total_weights() -> None:
    rows = random_counts(30, 20)
    ials = scales.parameters_of(Settings("ials", balance=7.0), rows)
    unobserved = ials["unobserved_weight"] * 600
    assert unobserved / (ials["alpha"] * rows.sum()) == pytest.approx(7, rel=0.01)
    implicit = scales.parameters_of(Settings("implicit", balance=7.0).canonical(), rows)
    assert 600 / (implicit["alpha"] * rows.sum()) == pytest.approx(7, rel=0.01)
    assert "unobserved_weight" not in implicit


def test_no_positive_weight_is_refused() -> None:
    with pytest.raises(scales.UselessWeights, match="no entry has a positive weight"):
        scales.parameters_of(Settings(), -random_counts(5, 4))


def test_rows_are_split_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_counts(60, 20, density=0.1, negatives=True)
    problem = split.split(rows, None, 0.3, np.random.default_rng(0))
    positive = np.diff(sparse.csr_matrix(rows > 0).indptr)
    assert (problem.train + problem.hidden != rows).nnz == 0
    assert problem.train.multiply(problem.hidden).nnz == 0
    assert problem.hidden.data.min() > 0
    n_hidden = np.diff(problem.hidden.indptr)
    np.testing.assert_array_equal(n_hidden > 0, positive >= 2)
    np.testing.assert_array_equal(problem.users, np.flatnonzero(positive >= 2))
    assert (n_hidden < np.maximum(positive, 1)).all()
    assert problem.shrinkage == problem.train.nnz / rows.nnz
    monkeypatch.setattr(split, "_MOST_USERS", 5)
    few = split.split(rows, None, 0.3, np.random.default_rng(0))
    assert len(few.users) == 5
    # Rows that are not scored keep all entries.
    np.testing.assert_array_equal(np.flatnonzero(np.diff(few.hidden.indptr)), few.users)


def test_times_split_earlier_from_later(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_counts(40, 20)
    times = sparse.csr_matrix(
        (np.random.default_rng(0).permutation(rows.nnz) + 1.0, rows.indices, rows.indptr),
        shape=rows.shape,
    )
    problem = split.split(rows, times, 0.25, np.random.default_rng(0))
    latest = times.multiply(problem.train != 0).max()
    hidden = sparse.csr_matrix(times.multiply(problem.hidden != 0)).data
    assert hidden.min() > latest
    assert problem.hidden.nnz == pytest.approx(rows.nnz / 4, abs=1)
    assert set(problem.users) <= set(np.flatnonzero(np.diff(problem.train.indptr)))
    assert problem.shrinkage == pytest.approx(np.sqrt(0.75), abs=0.01)
    monkeypatch.setattr(split, "_MOST_USERS", 5)
    assert len(split.split(rows, times, 0.25, np.random.default_rng(0)).users) == 5


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_all_splits_by_time_agree(fraction: float) -> None:
    """Matrices and frames, in `evaluation`, `datasets` and `tune`; many times are equal."""
    rows = random_counts(12, 10, density=0.8)
    days = np.random.default_rng(0).integers(1, 9, rows.nnz)
    times = sparse.csr_matrix((days, rows.indices, rows.indptr), shape=rows.shape)
    users = np.repeat(np.arange(12), np.diff(rows.indptr))
    columns = {"user": users, "item": rows.indices, "value": rows.data, "day": days}
    frame = pd.DataFrame(columns).sample(frac=1, random_state=0)
    train, test = evaluation.time_split(rows, times, fraction)
    for part, same in zip(split_by_time(frame, "day", fraction), (train, test), strict=True):
        cells = sparse.csr_matrix((part["value"], (part["user"], part["item"])), shape=rows.shape)
        assert (cells != same).nnz == 0
    rng = np.random.default_rng(0)
    of_matrix = split.split(rows, times, fraction, rng)
    shop = Recommender("user", "item", "value", "day")
    of_events, _ = events.problem_of(frame, shop, fraction, rng)
    for problem in (of_matrix, of_events):
        assert (problem.train != train).nnz == 0 and (problem.hidden != test).nnz == 0


def test_a_part_of_the_rows_holds_the_scored_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_MOST_USERS", 8)
    rows = random_counts(100, 30, density=0.05)
    problem = split.split(rows, None, 0.3, np.random.default_rng(0))
    assert problem.sample(1.0, np.random.default_rng(0)) is problem
    part = problem.sample(0.3, np.random.default_rng(0))
    assert part.train.shape[0] == 30
    assert np.bincount(part.train.indices, minlength=part.train.shape[1]).min() > 0
    assert part.train.shape == part.hidden.shape
    # A user whose hidden items are not in the part cannot be scored.
    assert 0 < len(part.users) <= 8
    assert (np.diff(part.hidden.indptr)[part.users] > 0).all()
    again = problem.sample(0.3, np.random.default_rng(0))
    assert (part.train != again.train).nnz == 0


def test_a_part_has_the_features_of_its_rows_and_columns() -> None:
    rows = random_counts(100, 30, density=0.02, seed=1)
    rows.data[:] = np.arange(rows.nnz) + 1  # each entry says where it is from
    # The features of users and items are their own entries, so they can be found in the part.
    features = {"user_features": FeatureTable(rows), "item_features": FeatureTable(rows.T)}
    problem = replace(split.split(rows, None, 0.3, np.random.default_rng(0)), features=features)
    part = problem.sample(0.3, np.random.default_rng(0))
    assert part.train.shape[0] == 30 and part.train.shape[1] < 30
    users, items = (part.features[name].matrix for name in ("user_features", "item_features"))
    assert users.shape == (30, 30) and items.shape == (part.train.shape[1], 100)
    for user, item, value in zip(*sparse.find(part.train), strict=True):
        assert value in users[[user]].data and value in items[[item]].data


def test_candidates_are_within_the_ranges() -> None:
    space = Space(random_counts(20, 10), np.random.default_rng(0))
    drawn = list(itertools.islice(space.first(), 100))
    assert drawn[: len(STARTS)] == list(STARTS)
    drawn += [space.near(drawn[:4], 1.0) for _ in range(100)]
    for settings in drawn:
        assert settings == settings.canonical()
        assert BALANCE[0] <= settings.balance <= BALANCE[1]
        assert RIDGE[0] <= settings.ridge <= RIDGE[1]
        assert EPSILON[0] <= settings.epsilon <= EPSILON[1]
        assert 0 <= settings.exponent <= 1
    assert {settings.weighting for settings in drawn} == {"none", "log", "tfidf"}
    assert {settings.objective for settings in drawn} == {"implicit", "ials"}
    assert all(start == start.canonical() for start in STARTS)


def test_the_ridge_for_all_data_is_smaller() -> None:
    settings = Settings(ridge=0.1)
    assert settings.for_all(0.8) == replace(settings, ridge=pytest.approx(0.08))


def test_rungs_have_fewer_candidates_with_more_factors() -> None:
    rungs = plan.rungs(64, 256, 0.1)
    assert [rung.size.factors for rung in rungs] == [32, 64, 128, 256]
    assert [rung.n_kept for rung in rungs] == [64, 21, 7, 2]
    assert [rung.share for rung in rungs] == [0.1, pytest.approx(0.1**0.5), 1, 1]
    assert rungs[-1].until == 1
    assert [rung.size.factors for rung in plan.rungs(4, 5, 1.0)] == [5]
    assert [rung.size.factors for rung in plan.rungs(4, 40, 1.0)] == [20, 40]


def test_large_data_start_with_a_part_of_the_rows() -> None:
    rows, costs = random_counts(2000, 500, density=0.5), budget.Costs()
    costs.record(32, budget.work_of(rows, 32, 6), 1.0, 0.0)
    assert plan.first_share(rows, 256, costs, np.inf) == 1
    assert plan.first_share(rows, 256, costs, 24 * 4) == pytest.approx(1, rel=0.01)
    assert plan.first_share(rows, 256, costs, 24 * 2) == pytest.approx(0.5, rel=0.01)
    # never fewer than 200,000 entries
    assert plan.first_share(rows, 256, costs, 1) == pytest.approx(200_000 / rows.nnz)


class OneSecondPerFactor:
    """A runner that predicts a second for each factor, and scores by the balance."""

    n_rows = 10

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def predicted(self, size: Size) -> float:
        return size.factors

    def run(self, rung: int, settings: Settings, size: Size, end: float) -> tuple[Trial, None]:
        self.sizes.append(size.factors)
        return Trial(rung, settings, None, 10, {}, size, settings.balance, 1.0), None


def test_a_rung_without_time_leaves_its_candidates_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "clock", lambda: 0.0)
    space, found = Space(random_counts(20, 10), np.random.default_rng(0)), Found()
    runner, first = OneSecondPerFactor(), plan.rungs(4, 8, 1.0)[0]
    rungs = [replace(first, size=Size(factors, 1), until=1.0) for factors in (1, 100, 2)]
    Halving(found, space, lambda _: runner, lambda *_: None).run(rungs, lambda _: 50.0)
    assert set(runner.sizes) == {1, 2}
    best = max(trial.settings.balance for trial in found.trials if trial.rung == 0)
    assert next(t for t in found.trials if t.rung == 2).settings.balance == best


def test_time_is_kept_for_the_size_of_the_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "clock", lambda: 0.0)
    space, found = Space(random_counts(20, 10), np.random.default_rng(0)), Found()
    runner, first = OneSecondPerFactor(), plan.rungs(4, 8, 1.0)[0]
    rungs = [replace(first, size=Size(factors, 1), until=1.0) for factors in (1, 2, 64)]
    # A final fit with 64 factors would take longer than the budget; one with 2 does not.
    Halving(found, space, lambda _: runner, lambda *_: None).run(
        rungs, lambda size: 50.0 - size.factors
    )
    assert set(runner.sizes) == {1, 2}
