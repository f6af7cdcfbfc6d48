"""One search: measure the machine, plan the rungs, run them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from tqdm.auto import tqdm

from tpu_als.estimator import TPUAlternatingLeastSquares
from tpu_als.exceptions import ModelFitError
from tpu_als.tuning import plan
from tpu_als.tuning.budget import Budget, Costs
from tpu_als.tuning.halving import Found, Halving
from tpu_als.tuning.space import STARTS, Size, Space
from tpu_als.tuning.split import Problem
from tpu_als.tuning.trials import Ranking, Runner, Trial

log = logging.getLogger("tpu_als")

_PROBE, _PROBE_ENTRIES = Size(32, 2), 1_000_000


@dataclass(frozen=True)
class Options:
    """Arguments of `tune`."""

    metric: str
    k: int
    max_factors: int
    n_candidates: int
    seed: int
    verbose: bool


def search(
    problem: Problem,
    everything: sparse.csr_matrix,
    template: TPUAlternatingLeastSquares,
    options: Options,
    limit: Budget,
) -> Found:
    """Search on a problem, and leave time to fit the best settings on everything.

    Parameters
    ----------
    problem : Problem
        What to train on and what to find.
    everything : csr_matrix of shape (n_users, n_items)
        The data of the final fit, whose time is kept in reserve.
    template : TPUAlternatingLeastSquares
        Its parameters that are not tuned are used.
    options : Options
        Arguments of `tune`.
    limit : Budget
        Time of search and final fit together.

    Raises
    ------
    KeyboardInterrupt
        If interrupted before the first trial has ended.
    ModelFitError
        If all trials failed.
    """
    costs, ranking = Costs(), Ranking(options.metric, options.k)

    @functools.cache
    def runner_of(share: float) -> Runner:
        part = problem.sample(share, np.random.default_rng(options.seed))
        return Runner(part, template, ranking, costs)

    found = Found()
    with tqdm(disable=not options.verbose, unit=" trials") as bar:
        space = Space(problem.train, np.random.default_rng(options.seed))
        halving = Halving(found, space, runner_of, functools.partial(_report, bar))
        try:
            rungs = _planned(problem, everything, runner_of, options, limit)
            halving.run(rungs, lambda size: limit.end - plan.reserve(everything, size, costs))
        except KeyboardInterrupt:
            if not found.trials:
                raise
            found.is_interrupted = True
            log.warning("tune: interrupted; the best of %d trials is fitted", len(found.trials))
    if math.isnan(found.best.score):
        raise ModelFitError(
            f"all {len(found.trials)} trials failed. Their reasons are logged by the logger "
            '"tpu_als" at the level INFO'
        )
    return found


def _planned(
    problem: Problem,
    everything: sparse.csr_matrix,
    runner_of: Callable[[float], Runner],
    options: Options,
    limit: Budget,
) -> list[plan.Rung]:
    """Measure how fast fits are, and plan the rungs."""
    train = problem.train
    runner = runner_of(min(_PROBE_ENTRIES / max(train.nnz, 1), 1.0))
    costs = runner.costs
    for _ in range(2):
        costs.forget()  # the first fit of a process may compile
        runner.run(0, STARTS[0], _PROBE, limit.end)
    largest = plan.largest_factors(train, everything, options.max_factors, costs, limit)
    share = plan.first_share(train, largest, costs, limit.left)
    log.info("tune: up to %d factors; the first rung has %.3g of the rows", largest, share)
    return plan.rungs(options.n_candidates, largest, share)


def _report(bar: tqdm, trial: Trial, best: Trial) -> None:
    """Show a trial."""
    bar.set_postfix(best=f"{best.score:.4g}", factors=best.size.factors)
    bar.update()
    log.info(
        "tune: rung %d, %d factors, %d iterations: %.4f in %.3g s; %s",
        trial.rung, *trial.size, trial.score, trial.seconds, trial.settings,
    )  # fmt: skip
