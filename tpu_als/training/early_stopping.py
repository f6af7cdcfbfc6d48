"""Early stopping: rank held-out entries after each iteration, and keep the best tables."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.engine.backends import Backend, Catalog
from tpu_als.evaluation import holdout

log = logging.getLogger("tpu_als")
_BATCH = 1 << 14  # users whose rows are fetched at once
# An array; or a table on the devices (`xla.resident.Table`) that may be too large for one host.
Factors = Any


class EarlyStopping:
    """Stops a fit if NDCG@10 on held-out entries no longer rises.

    Parameters
    ----------
    train, hidden : csr_matrix of shape (n_users, n_items)
        The entries to train on, and the held-out entries.
    patience : int
        Iterations without improvement before stopping.
    tol : float
        Smallest gain in NDCG that counts as improvement.
    fraction : float, optional
        The fraction of each user's entries to hold out, for the error message.

    Attributes
    ----------
    best : tuple of ndarray or Table, or None
        User and item table of the best iteration so far. Tables on the devices are kept without a
        copy, because JAX's arrays are immutable.

    Raises
    ------
    ValueError
        If no entry is held out.
    """

    def __init__(
        self,
        train: sparse.csr_matrix,
        hidden: sparse.csr_matrix,
        patience: int,
        tol: float,
        fraction: float | None = None,
    ) -> None:
        self._users = np.flatnonzero(np.diff(hidden.indptr))
        if not len(self._users):
            raise ValueError(
                f"early_stopping found no entries to hold out: {_reason(train, fraction)}, or set "
                "early_stopping=False"
            )
        log.info(
            "early_stopping: %d entries of %d of %d users are held out",
            hidden.nnz, len(self._users), hidden.shape[0],
        )  # fmt: skip
        self._train, self._hidden = train[self._users], hidden[self._users]
        self._patience, self._tol = patience, tol
        self._best_score, self._stale = -np.inf, 0
        self.best: tuple[Factors, Factors] | None = None

    @property
    def is_over(self) -> bool:
        """Whether there were `patience` iterations without improvement."""
        return self._stale >= self._patience

    def measure(self, user_factors: Factors, item_factors: Factors, backend: Backend) -> float:
        """Compute NDCG@10 of the held-out entries; keep the tables if it is the best so far.

        Items of the training entries are not ranked. Tables on the host are ranked by `backend`.
        Tables on the devices are ranked there, with users in batches; if there are several
        processes, all must make this call.
        """
        if isinstance(item_factors, np.ndarray):
            catalog = backend.catalog(item_factors)
        else:
            catalog = item_factors.catalog()
        ids = self._ranked(user_factors, catalog, min(holdout.CUTOFF, item_factors.shape[0]))
        score = holdout.mean_ndcg(ids, self._hidden)
        if self._note(score):
            self.best = user_factors, item_factors
        return score

    def resume(self, scores: list[float], best: tuple[Factors, Factors]) -> None:
        """Restore earlier scores, and the tables of the best of them."""
        for score in scores:
            self._note(score)
        self.best = best

    def _ranked(self, users: Factors, catalog: Catalog, k: int) -> np.ndarray:
        """Best items (n, k) of the users that have held-out entries."""
        if isinstance(users, np.ndarray):
            return catalog.top_k(users[self._users], k, seen=self._train)[0]
        found = []
        for low in range(0, len(self._users), _BATCH):
            at = slice(low, low + _BATCH)
            rows = users.take(self._users[at])
            found.append(catalog.top_k(rows, k, seen=self._train[at])[0])
        return np.concatenate(found)

    def _note(self, score: float) -> bool:
        """Record a score; return whether it is the best so far."""
        self._stale = 0 if score > self._best_score + self._tol else self._stale + 1
        is_best = score > self._best_score
        self._best_score = max(score, self._best_score)
        return is_best


def _reason(rows: sparse.csr_matrix, fraction: float | None) -> str:
    """Why no entry of a matrix is held out, and how to change that."""
    n_able = np.count_nonzero(holdout.positive_counts(rows) >= 2)
    if not n_able:
        return (
            f"none of the {rows.shape[0]} users has two positive entries or more, of which one "
            "could be. Fit a matrix with such users"
        )
    which = "" if fraction is None else f"={fraction:g}"
    least = holdout.least_fraction(rows)
    grain = 10.0 ** (math.floor(math.log10(least)) - 1)
    return (
        f"{n_able} of {rows.shape[0]} users have two positive entries or more, of which some could "
        f"be, but validation_fraction{which} is too small for any. Raise it to "
        f"{math.ceil(least / grain) * grain:.2g} or more"
    )
