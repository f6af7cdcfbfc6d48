"""What rows are drawn to: the features passed to a call, or those known from `fit`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from tpu_als.serving.fitted import FittedModel
from tpu_als.validation import features


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
    fitted: FittedModel, side: str, given: Any, n_rows: int, ids: np.ndarray | None = None
) -> Prior | None:
    """What rows of a side are drawn to; None if the side was fitted without features.

    Parameters
    ----------
    fitted : FittedModel
        The model.
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
    known, name = fitted.features(side), f"{side}_features"
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
