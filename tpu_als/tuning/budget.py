"""Time: the budget of a search, and predictions of how long fits take."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import defaultdict
from typing import Any

from scipy import sparse

from tpu_als.validation import fractions

clock = time.perf_counter  # tests replace it

_UNITS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.IGNORECASE)
_GRAMIAN = 0.2  # cost of a multiplication in a gramian or a rotation, relative to one in a CG step
_RECENT = 5  # fits that a prediction depends on


def seconds_of(budget: Any) -> float | None:
    """Seconds of a budget such as 600, "10min", "90s" or "1.5h"; None for no limit.

    Raises
    ------
    ValueError
        For anything else.
    """
    if budget is None:
        return None
    found = None
    if isinstance(budget, str):
        match = _TEXT.fullmatch(budget)
        if match and match[2].lower() in _UNITS:
            found = float(match[1]) * _UNITS[match[2].lower()]
    elif fractions.is_number(budget):
        found = float(budget)
    if found is None or not 0 < found < math.inf:
        raise ValueError(
            'budget must be a number of seconds above 0, a text such as "90s", "10min" or "1h", '
            f"or None for no limit, got {budget!r:.200}"
        )
    return found


class Budget:
    """Seconds left of a search that has just started.

    Parameters
    ----------
    seconds : float or None
        Length of the search, with the final fit. None for no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = math.inf if seconds is None else seconds
        self.started = clock()

    @property
    def end(self) -> float:
        """Time of the clock at which the budget ends; infinity without a limit."""
        return self.started + self.seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return clock() - self.started

    @property
    def left(self) -> float:
        """Seconds until the end; infinity without a limit."""
        return self.end - clock()


def work_of(rows: sparse.csr_matrix, factors: int, iterations: int) -> float:
    """Products that a fit computes, up to a constant: CG steps, gramians and rotations.

    Parameters
    ----------
    rows : csr_matrix of shape (n_users, n_items)
        The data.
    factors, iterations : int
        Parameters of the fit.
    """
    entries, sides = float(rows.nnz), float(sum(rows.shape))
    # The layout costs about one iteration of the data.
    return (iterations + 1) * (entries * factors + _GRAMIAN * sides * factors**2 + factors**3)


class Costs:
    """Predicts seconds of fits, and of weighting and ranking, from those of earlier trials.

    Seconds per unit of work depend on the number of factors, above all because small fits have
    overheads. A prediction uses the latest fits with the nearest number of factors.
    """

    def __init__(self) -> None:
        self._rates: dict[int, list[float]] = defaultdict(list)
        self._others: list[float] = []

    def forget(self) -> None:
        """Drop all records."""
        self._rates.clear()
        self._others.clear()

    def record(self, factors: int, work: float, seconds: float, other: float) -> None:
        """Note the seconds of a fit, and those of weighting and ranking per entry."""
        self._rates[factors].append(seconds / work)
        self._others.append(other)

    def fit(self, rows: sparse.csr_matrix, factors: int, iterations: int) -> float:
        """Seconds that a fit will take; 0 before the first record."""
        if not self._rates:
            return 0.0
        nearest = min(self._rates, key=lambda other: (abs(math.log(other / factors)), other))
        rate = statistics.median(self._rates[nearest][-_RECENT:])
        return rate * work_of(rows, factors, iterations)

    def trial(self, rows: sparse.csr_matrix, factors: int, iterations: int) -> float:
        """Seconds that a trial will take; 0 before the first record."""
        other = statistics.median(self._others[-_RECENT:]) if self._others else 0.0
        return self.fit(rows, factors, iterations) + other * rows.nnz
