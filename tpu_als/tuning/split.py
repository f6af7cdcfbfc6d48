"""The data of a search: a part to train on, a part to find, and everything for the final fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.evaluation import holdout
from tpu_als.evaluation.splits import time_split
from tpu_als.validation.features import FeatureTable

_MOST_USERS = 4000  # of which candidates are scored
_LATER = 0.5  # exponent of the part of earlier entries, in `Problem.shrinkage`


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
    shrinkage : float
        The best ridge for all data, relative to the best one for `train`. docs/math.md has the
        measurements.
    features : dict of str to FeatureTable
        `user_features` and `item_features` of a fit to `train`, where there are any.
    """

    train: sparse.csr_matrix
    hidden: sparse.csr_matrix
    users: np.ndarray
    shrinkage: float
    features: Mapping[str, FeatureTable] = field(default_factory=dict)

    def sample(self, share: float, rng: np.random.Generator) -> Problem:
        """A sample of the rows that prefers scored rows; columns without entries are dropped.

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
        users = _drawn(_scorable(train, hidden), rng)
        kept = {"user_features": chosen, "item_features": columns}
        features = {
            name: FeatureTable(table.matrix[kept[name]], table.names)
            for name, table in self.features.items()
        }
        return Problem(train, hidden, users, self.shrinkage, features)


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
    if timestamps is not None:
        train, hidden = _latest(rows, timestamps, fraction)
        return of_parts(train, hidden, train.nnz / max(rows.nnz, 1), fraction, rng)
    n_able = np.count_nonzero(holdout.positive_counts(rows) >= 2)
    if not n_able:
        raise ValueError(
            f"none of the {rows.shape[0]} rows of data has two positive entries or more, of which "
            "one is held out to score candidates: pass data with such rows"
        )
    users = _drawn(np.flatnonzero(holdout.positive_counts(rows) >= 2), rng)
    train, hidden = _hidden(rows, users, fraction, rng)
    return Problem(train, hidden, users, train.nnz / rows.nnz)


def of_parts(
    train: sparse.csr_matrix,
    hidden: sparse.csr_matrix,
    kept: float,
    fraction: float,
    rng: np.random.Generator,
) -> Problem:
    """Make a problem of earlier and later entries.

    Entries of `hidden` that are in `train` too, as of repeated events, are not to be found.

    Parameters
    ----------
    train, hidden : csr_matrix of shape (n_users, n_items)
        Earlier entries, and the later positive ones.
    kept : float
        Part of all entries that is in `train`.
    fraction : float
        Fraction that was to be held out, for the message.
    rng : Generator
        Draws users.

    Raises
    ------
    ValueError
        If no row has entries in both parts.
    """
    pattern = train.copy()
    pattern.data = np.ones_like(pattern.data)
    new = sparse.csr_matrix(hidden - hidden.multiply(pattern))
    new.eliminate_zeros()
    users = _drawn(_scorable(train, new), rng)
    if not len(users):
        raise ValueError(
            f"none of the {train.shape[0]} users has positive entries before the latest "
            f"{fraction:g} of data, and new ones in it: pass another validation_fraction, or no "
            "times, so that a part of each user's entries is held out"
        )
    return Problem(train, new, users, kept**_LATER)


def _hidden(
    rows: sparse.csr_matrix, users: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Kept and hidden entries; a fraction of the positive entries of some rows is hidden.

    Other rows keep all entries, so that the part to train on is as similar to all data as it can.
    """
    counts = holdout.positive_counts(rows)[users]
    # Round at random, so that the fraction is right on average for short rows too.
    wanted = np.floor(counts * fraction + rng.random(len(users))).astype(np.int64)
    n_hidden = np.zeros(rows.shape[0], np.int64)
    n_hidden[users] = np.clip(wanted, 1, counts - 1)
    return holdout.parts(rows, holdout.drawn(rows, n_hidden, rng))


def _latest(
    rows: sparse.csr_matrix, timestamps: Any, fraction: float
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Earlier entries, and the latest positive ones."""
    if not sparse.issparse(timestamps) or timestamps.shape != rows.shape:
        got = getattr(timestamps, "shape", type(timestamps).__name__)
        raise ValueError(
            f"timestamps must be a sparse matrix of the shape of data, {rows.shape}, with the time "
            f"of each of its {rows.nnz} entries, got {got}"
        )
    train, late = time_split(rows, timestamps, fraction)
    return train, holdout.relevant(late, "data")


def _scorable(train: sparse.csr_matrix, hidden: sparse.csr_matrix) -> np.ndarray:
    """Rows that have something to learn from and something to find."""
    return np.flatnonzero((holdout.positive_counts(train) > 0) & (np.diff(hidden.indptr) > 0))


def _drawn(users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At most `_MOST_USERS` of some users, in order."""
    if len(users) <= _MOST_USERS:
        return users
    return np.sort(rng.choice(users, _MOST_USERS, replace=False))
