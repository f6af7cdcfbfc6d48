"""One trial: weight, fit, rank the held-out entries, and note what it took."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.base import clone

from tpu_als.estimator import TPUAlternatingLeastSquares
from tpu_als.evaluation.metrics import metrics_of_rankings
from tpu_als.exceptions import ModelFitError
from tpu_als.tuning import budget, scales
from tpu_als.tuning.space import Settings, Size
from tpu_als.tuning.split import Problem
from tpu_als.validation.features import FeatureTable

log = logging.getLogger("tpu_als")
Tables = tuple[np.ndarray, np.ndarray]


class Ranking(NamedTuple):
    """The metric to maximise, and the length of the rankings."""

    metric: str
    k: int


@dataclass(frozen=True)
class Trial:
    """A candidate that was fitted and scored.

    Attributes
    ----------
    rung : int
        Round of the search, from 0.
    settings : Settings
        The candidate.
    epsilon : float or None
        Of `LogWeighting`.
    n_rows : int
        Rows that were trained on.
    parameters : dict
        Parameters of the estimator on the part that was trained on, without the size.
    size : Size
        Factors, and the iterations that were run.
    score : float
        The metric; NaN if the fit failed.
    seconds : float
        Time of weighting, fit and ranking.
    """

    rung: int
    settings: Settings
    epsilon: float | None
    n_rows: int
    parameters: dict[str, Any] = field(default_factory=dict)
    size: Size = Size(0, 0)  # noqa: RUF009  (a tuple)
    score: float = math.nan
    seconds: float = 0.0


class _Deadline(Exception):  # noqa: N818  (it ends a fit, and is not an error)
    """Raised in a fit's callback to end it."""


def fit_until(
    model: TPUAlternatingLeastSquares,
    weighted: sparse.csr_matrix,
    end: float,
    features: Mapping[str, FeatureTable],
) -> int:
    """Run at least one iteration, and stop before one that is predicted to end after `end`.

    Parameters
    ----------
    model : TPUAlternatingLeastSquares
        It starts from its tables, if they were assigned.
    weighted : csr_matrix of shape (n_users, n_items)
        The data.
    end : float
        A time of `budget.clock`.
    features : dict of str to FeatureTable
        `user_features` and `item_features`, where there are any.

    Returns
    -------
    int
        The number of iterations run; at least one.
    """
    done, before = 0, math.inf

    def count(iteration: int, seconds: float, loss: float | None) -> None:
        nonlocal done, before
        del seconds, loss
        done, now = iteration + 1, budget.clock()
        # The first iteration is preceded by the layout, so the second may be the first to count.
        if done < model.iterations and now + max(now - before, 0.0) > end:
            raise _Deadline
        before = now

    with contextlib.suppress(_Deadline):
        model.fit(weighted, show_progress=False, callback=count, **features)
    return done


class Runner:
    """Runs trials on one part of the data.

    Parameters
    ----------
    problem : Problem
        The data.
    model : TPUAlternatingLeastSquares
        All trials have its parameters, except for those that are tuned.
    ranking : Ranking
        How trials are scored.
    costs : Costs
        Receives how long trials take.

    Attributes
    ----------
    costs : Costs
        As passed.
    n_rows : int
        Rows of the data.
    """

    def __init__(
        self,
        problem: Problem,
        model: TPUAlternatingLeastSquares,
        ranking: Ranking,
        costs: budget.Costs,
    ) -> None:
        self._train, self._users, self._model = problem.train, problem.users, model
        self._hidden, self._features = problem.hidden[problem.users], problem.features
        self._ranking, self.costs = ranking, costs
        self.n_rows = problem.train.shape[0]

    def predicted(self, size: Size) -> float:
        """Seconds that a trial will take."""
        return self.costs.trial(self._train, *size)

    def run(
        self, rung: int, settings: Settings, size: Size, end: float
    ) -> tuple[Trial, Tables | None]:
        """Fit and score a candidate.

        Parameters
        ----------
        rung : int
            Round of the search.
        settings : Settings
            The candidate.
        size : Size
            Factors and iterations.
        end : float
            Time of the clock after which no iteration starts.

        Returns
        -------
        Trial
            Its score is NaN if the fit failed.
        tuple of ndarray, or None
            The tables.
        """
        started, weighting = budget.clock(), scales.weighting_of(settings, self._train)
        trial = Trial(rung, settings, getattr(weighting, "epsilon", None), n_rows=self.n_rows)
        try:
            weighted = scales.weighted(weighting, self._train)
            trial = replace(trial, parameters=scales.parameters_of(settings, weighted))
            return self._fitted(trial, weighted, None, size, (started, end))
        except (scales.UselessWeights, ModelFitError, MemoryError) as error:
            log.info("tune: %s with %d factors failed: %s", settings, size.factors, error)
        return replace(trial, size=size, seconds=budget.clock() - started), None

    def resume(
        self, trial: Trial, tables: Tables, iterations: int, end: float
    ) -> tuple[Trial, Tables]:
        """Run more iterations of a trial, from its tables.

        Parameters
        ----------
        trial : Trial
            The trial.
        tables : tuple of ndarray
            What it returned.
        iterations : int
            Additional iterations.
        end : float
            As in `run`.
        """
        started = budget.clock()
        weighted = scales.weighted(scales.weighting_of(trial.settings, self._train), self._train)
        size = Size(trial.size.factors, iterations)
        return self._fitted(trial, weighted, tables, size, (started, end))

    def _fitted(
        self,
        trial: Trial,
        weighted: sparse.csr_matrix,
        tables: Tables | None,
        size: Size,
        times: tuple[float, float],
    ) -> tuple[Trial, Tables]:
        """Fit from new tables, or from those of the trial, and score."""
        model = clone(self._model).set_params(**trial.parameters, **size._asdict())
        before = 0
        if tables is not None:
            model.user_factors, model.item_factors = tables
            before = trial.size.iterations
        started, (begin, end) = budget.clock(), times
        done = fit_until(model, weighted, end, self._features)
        fit_seconds = budget.clock() - started
        score = self._score(model, weighted)
        seconds = budget.clock() - begin
        work = budget.work_of(self._train, size.factors, done)
        other = (seconds - fit_seconds) / max(self._train.nnz, 1)
        self.costs.record(size.factors, work, fit_seconds, other)
        ran = Size(size.factors, before + done)
        return (
            replace(trial, size=ran, score=score, seconds=seconds),
            (model.user_factors, model.item_factors),
        )

    def _score(self, model: TPUAlternatingLeastSquares, weighted: sparse.csr_matrix) -> float:
        """The metric of the held-out entries, ranked among all items that are not kept."""
        ids, _ = model.recommend(self._users, weighted[self._users], N=self._ranking.k)
        return metrics_of_rankings(ids, self._hidden)[self._ranking.metric]
