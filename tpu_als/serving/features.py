"""Features in a fitted model: their weights, those of its rows, and what new rows are drawn to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
from scipy import sparse

from tpu_als.validation import features


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


class Prior(NamedTuple):
    """What m rows are drawn to.

    Attributes
    ----------
    rows : ndarray of shape (m, factors)
        W^T f of each row.
    features : csr_matrix of shape (m, n_features)
        Their features f.
    """

    rows: np.ndarray
    features: sparse.csr_matrix

    def some(self, at: np.ndarray) -> Prior:
        """The prior of some of the rows."""
        return Prior(self.rows[at], self.features[at])


def prior_for(
    known: FittedFeatures | None,
    side: str,
    given: Any,
    n_rows: int,
    ids: np.ndarray | None = None,
) -> Prior | None:
    """What rows of a side are drawn to; None if the side was fitted without features.

    Parameters
    ----------
    known : FittedFeatures or None
        The features of the side in the model.
    side : {"user", "item"}
        The side of the rows.
    given : array-like or None
        The features that the caller passed.
    n_rows : int
        Number of rows m.
    ids : ndarray of int, optional
        Ids of the rows, for calls that store them. If nothing is given, the features that the model
        has of these rows are used. Other calls ignore ids, as implicit does, and need features.

    Raises
    ------
    ValueError
        If features are given to a model that was fitted without; if none are given and those of a
        row are not known; as `validation.features.rows_for`.
    """
    name = f"{side}_features"
    if known is None:
        if given is not None:
            raise ValueError(
                f"{name} was given, but the model has none: pass {name} to fit too, or leave it "
                f"out. Assigning another array to {side}_factors removes those of fit"
            )
        return None
    if given is not None:
        rows = features.rows_for(given, n_rows, known.names, len(known.weights), name)
        rows = features.in_dtype(rows, known.weights.dtype, name)
        return Prior(features.finite_products(known.prior(rows), name), rows)
    if ids is None:
        raise ValueError(
            f"the model was fitted with {name}: pass {name} with a row for each of the {n_rows} "
            f"rows, such as model.{name}_[ids] for rows of fit; zeros stand for unknown features. "
            "In a search, scikit-learn's metadata routing passes them on"
        )
    unknown = np.flatnonzero(ids >= known.rows.shape[0])
    if len(unknown):
        raise ValueError(
            f"the model was fitted with {name}, and does not know those of {side} "
            f"{ids[unknown[0]]}: pass {name} with a row for each id"
        )
    rows = known.rows[ids]
    return Prior(known.prior(rows), rows)
