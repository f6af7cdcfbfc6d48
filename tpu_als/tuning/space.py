"""The search space, in numbers that do not depend on the size and the scale of the data.

Settings transfer from a part of the data to all of them, from few factors to many, and from one
data set to another, if they are relative to what the data define:

* `balance`: total weight of the cells without an entry, relative to the total confidence of the
  entries. It replaces `alpha` ("implicit") and `unobserved_weight` ("ials").
* `ridge`: regularization, relative to the smallest one with which all factors are zero.
* `epsilon`: of `LogWeighting`, relative to the median of the positive values.

`scales` converts them to the estimator's parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.stats import qmc

# Ranges of the search.
BALANCE, RIDGE, EPSILON = (0.3, 300.0), (3e-3, 0.7), (0.03, 10.0)
_IALS = 0.75  # part of the drawn candidates with this objective
_SWITCH = 0.15  # probability that a neighbour has another weighting, or another objective
_STEP = 0.15  # deviation of a neighbour, relative to the range


@dataclass(frozen=True)
class Settings:
    """One candidate, without the number of factors and iterations.

    Attributes
    ----------
    objective : {"implicit", "ials"}
        As in the estimator.
    weighting : {"none", "log", "tfidf"}
        What turns the values into confidences.
    balance, ridge : float
        See the module.
    exponent : float
        `regularization_exponent`, from 0 to 1, for "ials". It is 0 for "implicit", in which the
        ridge hardly depends on the number of entries, because the weight of a cell without an
        entry is 1.
    epsilon : float
        See the module; for "log" only.
    """

    objective: str = "ials"
    weighting: str = "none"
    balance: float = 15.0
    ridge: float = 0.03
    exponent: float = 1.0
    epsilon: float = 1.0

    def canonical(self) -> Settings:
        """The same settings, with constants in place of numbers that have no effect."""
        return replace(
            self,
            exponent=0.0 if self.objective == "implicit" else self.exponent,
            epsilon=self.epsilon if self.weighting == "log" else 1.0,
        )

    def for_all(self, shrinkage: float) -> Settings:
        """The settings for all data, if these are the best for the part that was trained on.

        Parameters
        ----------
        shrinkage : float
            See `split.Problem`.
        """
        return replace(self, ridge=self.ridge * shrinkage)


class Size(NamedTuple):
    """Factors and iterations of a fit."""

    factors: int
    iterations: int


# Evaluated first, in this order: settings that were among the best on several data sets.
STARTS = (
    Settings("ials", "tfidf", 10.0, 0.05, 0.8),
    Settings("ials", "log", 60.0, 0.06, 0.5, 0.3),
    Settings("ials", "none", 10.0, 0.05, 1.0),
    Settings("ials", "none", 30.0, 0.5, 0.0),  # few components, as where only popularity counts
    Settings("ials", "tfidf", 60.0, 0.05, 0.5),
    Settings("ials", "tfidf", 2.0, 0.05, 0.0),
    Settings("ials", "log", 15.0, 0.04, 1.0, 0.3),
    Settings("implicit", "log", 10.0, 0.05, 0.0, 0.3),
    Settings("implicit", "none", 10.0, 0.05, 0.0),
)


class Space:
    """Candidates for a matrix.

    Parameters
    ----------
    rows : csr_matrix
        The data. Weightings that would have no effect, or that refuse the values, are left out:
        "log" if all values are equal, and "tfidf" if there are negative ones.
    rng : Generator
        Draws the candidates.
    """

    def __init__(self, rows: sparse.csr_matrix, rng: np.random.Generator) -> None:
        values = rows.data
        self.weightings = ["none"]
        if len(values) and values.min() != values.max():
            self.weightings.append("log")
        if not len(values) or values.min() >= 0:
            self.weightings.append("tfidf")
        self._rng = rng
        self._points = qmc.Halton(6, seed=rng)

    def first(self) -> Iterator[Settings]:
        """The starting candidates, and then points that fill the space evenly; endless."""
        yield from (start for start in STARTS if start.weighting in self.weightings)
        while True:
            yield self._at(self._points.random(1)[0])

    def near(self, centres: list[Settings], width: float) -> Settings:
        """A random neighbour of one of some settings.

        Parameters
        ----------
        centres : list of Settings
            One of them is drawn.
        width : float
            Relative size of the step; 1 for the first round.
        """
        rng, step = self._rng, _STEP * width
        settings = centres[rng.integers(len(centres))]
        objective, weighting = settings.objective, settings.weighting
        if rng.random() < _SWITCH * width:
            weighting = self.weightings[rng.integers(len(self.weightings))]
        if rng.random() < _SWITCH * width:
            objective = "implicit" if objective == "ials" else "ials"
        steps = step * rng.standard_normal(4)
        return Settings(
            objective,
            weighting,
            _moved(settings.balance, BALANCE, steps[0]),
            _moved(settings.ridge, RIDGE, steps[1]),
            round(float(np.clip(settings.exponent + 2 * steps[2], 0, 1)), 2),
            _moved(settings.epsilon, EPSILON, steps[3]),
        ).canonical()

    def _at(self, point: np.ndarray) -> Settings:
        """The settings at a point of the unit cube (6,)."""
        names = self.weightings
        return Settings(
            "ials" if point[0] < _IALS else "implicit",
            names[int(point[1] * len(names))],
            _scaled(BALANCE, point[2]),
            _scaled(RIDGE, point[3]),
            round(float(point[4]), 2),
            _scaled(EPSILON, point[5]),
        ).canonical()


def _scaled(bounds: tuple[float, float], share: float) -> float:
    """The number at a share of a range, on a logarithmic scale."""
    low, high = bounds
    return float(low * (high / low) ** share)


def _moved(value: float, bounds: tuple[float, float], step: float) -> float:
    """A number of a range, moved by a part of the range, on a logarithmic scale."""
    low, high = bounds
    return float(np.clip(value * (high / low) ** step, low, high))
