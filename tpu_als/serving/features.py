"""The features of a fitted model's side: their weights, and those of its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from scipy import sparse


@dataclass(frozen=True, eq=False)
class FittedFeatures:
    """What is known of a side's features after a fit.

    Attributes
    ----------
    weights : ndarray of shape (n_features, factors)
        W: a row with features f is drawn to W^T f.
    rows : csr_matrix of shape (n, n_features)
        Features of the side's rows.
    names : ndarray of str and shape (n_features,), or None
        Names of the features.
    """

    weights: np.ndarray
    rows: sparse.csr_matrix
    names: np.ndarray | None = None

    def prior(self, rows: sparse.csr_matrix) -> np.ndarray:
        """W^T f (m, factors) of rows of features (m, n_features)."""
        return np.asarray(rows.astype(self.weights.dtype) @ self.weights)

    def with_rows(self, ids: np.ndarray, rows: sparse.csr_matrix) -> Self:
        """Replace the features of some rows; ids past the end add rows; rows in the gaps are zero.

        If an id repeats, its last row counts.
        """
        if not len(ids):
            return self
        n_rows = max(self.rows.shape[0], int(ids.max()) + 1)
        before = self.rows.copy()
        before.resize((n_rows, self.rows.shape[1]))
        both = sparse.vstack([before, rows.astype(before.dtype)], format="csr")
        chosen = np.arange(n_rows)
        for at, row in zip(ids.tolist(), range(n_rows, both.shape[0]), strict=True):
            chosen[at] = row
        return replace(self, rows=sparse.csr_matrix(both[chosen]))

    def label(self, number: int) -> object:
        """The name of a feature, or its number."""
        return number if self.names is None else self.names[number]
