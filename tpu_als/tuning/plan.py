"""Which rounds a search has: sizes, parts of the data, numbers of candidates, times."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import sparse

from tpu_als.tuning.budget import Budget, Costs
from tpu_als.tuning.space import Size

_ITERATIONS = (6, 8, 12, 16)  # of the rungs; the last are those of the last rung
_LEAST_FACTORS = 16
_ETA = 3  # a rung takes over one of that many candidates
_REFIT = 0.25  # the final fit may take at most this part of the budget
_MARGIN = 1.3  # the final fit may take that much longer than predicted
_ENOUGH = 24  # candidates that the first rung should have time for; else it gets fewer rows
_ENTRIES = 200_000  # a part of the rows has at least as many entries
_UNTIL = {1: (1.0,), 2: (0.5, 1.0), 3: (0.35, 0.65, 1.0), 4: (0.25, 0.5, 0.75, 1.0)}


@dataclass(frozen=True)
class Rung:
    """A round of the search.

    Attributes
    ----------
    size : Size
        Factors and iterations.
    share : float
        Part of the rows to train on.
    n_kept : int
        Candidates to take over; for the first rung, candidates to draw.
    n_near : int
        Neighbours of this rung's best candidates to try.
    until : float
        Part of the search's time at which the rung ends.
    width : float
        Relative distance of the neighbours.
    """

    size: Size
    share: float
    n_kept: int
    n_near: int
    until: float
    width: float


def rungs(n_candidates: int, largest: int, share: float) -> list[Rung]:
    """The rounds, from few factors to many.

    Parameters
    ----------
    n_candidates : int
        Candidates of the first rung.
    largest : int
        Factors of the last rung.
    share : float
        Part of the rows for the first rung. The others are in between; the last has all rows.
    """
    ladder = [largest]
    while len(ladder) < len(_ITERATIONS) and ladder[0] // 2 >= _LEAST_FACTORS:
        ladder.insert(0, ladder[0] // 2)
    n, found = len(ladder), []
    for number, factors in enumerate(ladder):
        n_kept = max(n_candidates // _ETA**number, min(n_candidates, 2))
        part = 1.0 if number >= n - 2 else share ** (1 - number / max(n - 2, 1))
        found.append(
            Rung(
                size=Size(factors, _ITERATIONS[number - n]),
                share=part,
                n_kept=n_kept,
                n_near=n_kept // 2 if number == 0 else n_candidates // 2,
                until=_UNTIL[n][number],
                width=0.7**number,
            )
        )
    return found


def largest_factors(
    train: sparse.csr_matrix, data: sparse.csr_matrix, most: int, costs: Costs, budget: Budget
) -> int:
    """Most factors for which the final fit takes a bounded part of the budget.

    Parameters
    ----------
    train, data : csr_matrix of shape (n_users, n_items)
        The data to train on, and all data.
    most : int
        Upper bound.
    costs : Costs
        Predicts the time.
    budget : Budget
        The budget.
    """
    factors = max(min(most, *train.shape), 1)
    while (
        factors > _LEAST_FACTORS
        and reserve(data, Size(factors, _ITERATIONS[-1]), costs) > _REFIT * budget.seconds
    ):
        factors = max(factors // 2, _LEAST_FACTORS)
    return factors


def reserve(data: sparse.csr_matrix, size: Size, costs: Costs) -> float:
    """Seconds to keep for the final fit on all data."""
    return _MARGIN * costs.fit(data, *size)


def first_share(train: sparse.csr_matrix, largest: int, costs: Costs, seconds: float) -> float:
    """Part of the rows with which the first rung has time for enough candidates.

    Parameters
    ----------
    train : csr_matrix of shape (n_users, n_items)
        The data to train on.
    largest : int
        Factors of the last rung.
    costs : Costs
        Predicts the time.
    seconds : float
        Time of the search; infinity without a limit.
    """
    first = rungs(1, largest, 1.0)[0]
    one = costs.trial(train, *first.size)
    wanted = one * _ENOUGH
    if wanted <= first.until * seconds:
        return 1.0
    least = min(_ENTRIES / max(train.nnz, 1), 1.0)
    return max(first.until * seconds / wanted, least)
