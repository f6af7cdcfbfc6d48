"""Watching the ranking of held-out entries during a fit, and keeping the best tables."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from . import holdout, ranking
from .mesh import Workplace


class EarlyStopping:
    """Stops a fit whose NDCG@10 on held-out entries no longer rises.

    Parameters
    ----------
    train, hidden : csr_matrix of shape (n_users, n_items)
        What the fit sees, and the entries held out of it.
    patience : int
        Iterations without improvement after which to stop.
    tol : float
        Least gain in NDCG that counts as improvement.

    Attributes
    ----------
    best : tuple of ndarray or None
        User and item table of the best iteration so far.
    """

    def __init__(
        self, train: sparse.csr_matrix, hidden: sparse.csr_matrix, patience: int, tol: float
    ) -> None:
        self._users = np.flatnonzero(np.diff(hidden.indptr))
        if not len(self._users):
            raise ValueError(
                "early_stopping found no entries to hold out: got no user with two positive "
                "entries or more. Set early_stopping=False, or raise validation_fraction"
            )
        self._train, self._hidden = train[self._users], hidden[self._users]
        self._patience, self._tol = patience, tol
        self._best_score, self._stale = -np.inf, 0
        self.best: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self._stale >= self._patience

    def measure(
        self, user_factors: np.ndarray, item_factors: np.ndarray, place: Workplace
    ) -> float:
        """NDCG@10 of the held-out entries among all items not trained on; notes the best."""
        catalog = ranking.catalog(item_factors, place)
        k = min(holdout.CUTOFF, len(item_factors))
        ids, _ = ranking.top_k(user_factors[self._users], catalog, k, seen=self._train)
        score = holdout.mean_ndcg(ids, self._hidden)
        if self._note(score):
            self.best = user_factors, item_factors
        return score

    def resume(self, scores: list[float], best: tuple[np.ndarray, np.ndarray]) -> None:
        """Take up what was measured before, and the tables of the best of it."""
        for score in scores:
            self._note(score)
        self.best = best

    def _note(self, score: float) -> bool:
        """Count a score; whether it is the best so far."""
        self._stale = 0 if score > self._best_score + self._tol else self._stale + 1
        is_best = score > self._best_score
        self._best_score = max(score, self._best_score)
        return is_best
