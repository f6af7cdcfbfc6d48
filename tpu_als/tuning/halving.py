"""Successive halving: many candidates with few factors, then fewer with more.

A rung trains with a number of factors and iterations, on a part of the rows or on all. It starts
with the best candidates of the rung before it, and then tries neighbours of its own best ones,
because the best ridge depends on the number of factors. The first rung starts with the candidates
of `space.Space.first`. At the end the best trial is continued from its tables while more iterations
help.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tpu_als.tuning import budget
from tpu_als.tuning.plan import Rung
from tpu_als.tuning.space import Settings, Size, Space
from tpu_als.tuning.trials import Runner, Tables, Trial

log = logging.getLogger("tpu_als")

_TOLERANCE = 1e-3  # relative gain that is worth more iterations
_STEP, _MOST_ITERATIONS = 4, 40  # of the last phase
_PATIENCE = 10  # a rung ends after that many neighbours that are no better
_PARENTS = 4  # a neighbour is drawn from one of that many best trials


@dataclass
class Found:
    """What a search has found so far.

    Attributes
    ----------
    trials : list of Trial
        All trials, in order.
    is_interrupted : bool
        Whether a KeyboardInterrupt ended the search.
    tables : tuple of ndarray, or None
        The tables of the best trial.
    """

    trials: list[Trial] = field(default_factory=list)
    is_interrupted: bool = False
    tables: Tables | None = None

    @property
    def best(self) -> Trial:
        """The best trial on all rows; if there is none, on the largest part of the rows."""
        return max(self.trials, key=_value)

    def add(self, trial: Trial, tables: Tables | None) -> None:
        """Add a trial; keep its tables if it is the best one."""
        self.trials.append(trial)
        if self.best is trial:
            self.tables = tables


class Halving:
    """Runs the rungs of a search.

    Parameters
    ----------
    found : Found
        Receives the trials.
    space : Space
        Draws candidates.
    runner_of : callable
        Takes a part of the rows, from 0 to 1, and returns its Runner.
    report : callable
        Called with each trial and the best trial so far.
    """

    def __init__(
        self,
        found: Found,
        space: Space,
        runner_of: Callable[[float], Runner],
        report: Callable[[Trial, Trial], None],
    ) -> None:
        self._found, self._space, self._runner_of, self._report = found, space, runner_of, report

    def run(self, plan: list[Rung], end_of: Callable[[Size], float]) -> None:
        """Run the rungs, and continue the best trial.

        Parameters
        ----------
        plan : list of Rung
            The rounds.
        end_of : callable
            Takes the size of the final fit, and returns the time of `budget.clock` at which the
            search has to end; infinity without a limit. It is asked again in each rung, because
            predictions improve.
        """
        found: list[Settings] = []
        started = budget.clock()
        for number, rung in enumerate(plan):
            # Time is kept for a final fit of this size: larger ones may never be reached.
            until = started + rung.until * (end_of(rung.size) - started)
            first = self._space.first() if number == 0 else iter(found)
            # If there is no time for a trial, the next rung gets the same candidates.
            found = self._rung(number, rung, first, until) or found
        self._continue(self._runner_of(1.0), end_of)

    def _rung(
        self, number: int, rung: Rung, first: Iterator[Settings], until: float
    ) -> list[Settings]:
        """Run a rung; return its settings, best first."""
        runner, here = self._runner_of(rung.share), list[Trial]()
        candidates = itertools.chain(
            itertools.islice(first, rung.n_kept),
            (self._near(here, rung.width) for _ in range(rung.n_near)),
        )
        for settings in candidates:
            # The first trial of a search is always run: it is the least that can be returned.
            if self._found.trials and budget.clock() + runner.predicted(rung.size) > until:
                break
            if all(settings != trial.settings for trial in here):
                trial, tables = runner.run(number, settings, rung.size, until)
                here.append(trial)
                self._add(trial, tables)
            if len(here) >= rung.n_kept + _PATIENCE and _is_stale(here):
                break
        return [trial.settings for trial in _ranked(here)]

    def _near(self, here: list[Trial], width: float) -> Settings:
        """A neighbour of one of a rung's best trials."""
        return self._space.near([trial.settings for trial in _ranked(here)[:_PARENTS]], width)

    def _continue(self, runner: Runner, end_of: Callable[[Size], float]) -> None:
        """Run more iterations of the best trial, while they help and there is time."""
        while True:
            best, tables = self._found.best, self._found.tables
            if tables is None or best.n_rows != runner.n_rows:
                return
            size = Size(best.size.factors, _STEP)
            longer = Size(best.size.factors, best.size.iterations + _STEP)
            is_over, end = longer.iterations > _MOST_ITERATIONS, end_of(longer)
            if is_over or budget.clock() + runner.predicted(size) > end:
                return
            trial, tables = runner.resume(best, tables, _STEP, end)
            self._add(trial, tables)
            if trial.score <= best.score * (1 + _TOLERANCE):
                return

    def _add(self, trial: Trial, tables: Tables | None) -> None:
        self._found.add(trial, tables)
        self._report(trial, self._found.best)


def _value(trial: Trial) -> tuple[int, float]:
    """What trials are compared by: rows first, because scores of parts are not comparable."""
    return (-1, 0.0) if math.isnan(trial.score) else (trial.n_rows, trial.score)


def _ranked(trials: list[Trial]) -> list[Trial]:
    """Best first, in a stable order."""
    return sorted(trials, key=_value, reverse=True)


def _is_stale(here: list[Trial]) -> bool:
    """Whether the last trials of a rung are no better than those before them."""
    before, last = (max(map(_value, part)) for part in (here[:-_PATIENCE], here[-_PATIENCE:]))
    return last[1] <= before[1] * (1 + _TOLERANCE)
