"""The data of a search: a part to train on, a part to find, and everything for the final fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.evaluation import holdout
from tpu_als.evaluation.splits import time_split

_MOST_USERS = 4000  # of which candidates are scored


@dataclass(frozen=True)
class Problem:
    """What candidates are trained on and scored with.

    Attributes
    ----------
    train : csr_matrix of shape (n_users, n_items)
        Raw values to train on.
    hidden : csr_matrix of shape (n_users, n_items)
        Positive entries to find.
    users : ndarray of int
        Rows that are scored: a sample of those with kept and with hidden entries.
    """

    train: sparse.csr_matrix
    hidden: sparse.csr_matrix
    users: np.ndarray

    def sample(self, share: float, rng: np.random.Generator) -> Problem:
        """A part of the rows, with the scored ones first; columns without entries are dropped.

        Parameters
        ----------
        share : float
            Part of the rows, up to 1. At least the scored rows are kept, if they fit into it.
        rng : Generator
            Draws the rows.
        """
        if share >= 1:
            return self
        n_rows = max(int(share * self.train.shape[0]), 1)
        others = np.setdiff1d(np.arange(self.train.shape[0]), self.users)
        order = np.concatenate([rng.permutation(self.users), rng.permutation(others)])
        chosen = np.sort(order[:n_rows])
        train, hidden = self.train[chosen], self.hidden[chosen]
        columns = np.flatnonzero(np.bincount(train.indices, minlength=train.shape[1]))
        train, hidden = train[:, columns], hidden[:, columns]
        return Problem(train, hidden, _scored(train, hidden, rng))


def split(
    rows: sparse.csr_matrix,
    timestamps: Any,
    fraction: float,
    rng: np.random.Generator,
) -> Problem:
    """Hold out the latest entries if there are times, else a part of each row's positive entries.

    Parameters
    ----------
    rows : csr_matrix of shape (n_users, n_items)
        Canonical.
    timestamps : sparse matrix of the same entries, or None
        Times.
    fraction : float
        Fraction of the entries to hold out.
    rng : Generator
        Draws entries and users.

    Raises
    ------
    ValueError
        If no row has kept and held-out entries.
    """
    if timestamps is None:
        train, hidden = holdout.hide(rows, fraction, at_least=1, rng=rng)
    else:
        train, late = time_split(rows, timestamps, fraction)
        hidden = holdout.relevant(late, "data")
    users = _scored(train, hidden, rng)
    if not len(users):
        raise ValueError(_problem(rows, timestamps is not None, fraction))
    return Problem(train, hidden, users)


def _scored(
    train: sparse.csr_matrix, hidden: sparse.csr_matrix, rng: np.random.Generator
) -> np.ndarray:
    """A sample of the rows that have something to learn from and something to find."""
    is_known = holdout.positive_counts(train) > 0
    users = np.flatnonzero(is_known & (np.diff(hidden.indptr) > 0))
    if len(users) > _MOST_USERS:
        users = np.sort(rng.choice(users, _MOST_USERS, replace=False))
    return users


def _problem(rows: sparse.csr_matrix, has_times: bool, fraction: float) -> str:
    """Why no row can be scored, and what to do."""
    n_able = int(np.count_nonzero(holdout.positive_counts(rows) >= 2))
    if has_times:
        return (
            f"none of the {rows.shape[0]} rows of data has positive entries both before and in "
            f"the latest {fraction:g} of the entries: pass another validation_fraction, or no "
            "timestamps, so that a part of each row is held out"
        )
    return (
        f"{n_able} of the {rows.shape[0]} rows of data have two positive entries or more, of which "
        "one is held out to score candidates: pass data with such rows"
    )
