"""The matrix that a scikit-learn estimator gets, with its record of the columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from sklearn.utils.validation import validate_data

from tpu_als.validation import arguments, structure
from tpu_als.validation.refusals import require_matrix


def checked_rows(estimator: Any, X: Any, name: str, reset: bool) -> sparse.csr_matrix:
    """Check a matrix as scikit-learn does; return it as canonical CSR.

    Parameters
    ----------
    estimator : estimator
        Gets, or must have, the number and the names of the columns.
    X : matrix or array-like of shape (n_rows, n_columns)
        As given by the caller.
    name : str
        The argument's name, for messages.
    reset : bool
        Whether the columns are those of a new `fit`.

    Raises
    ------
    TypeError, ValueError
        For what is not such a matrix.
    """
    require_matrix(X, name)
    # A sparse matrix may have no rows. An empty array is refused: it is most likely a mistake.
    least = 0 if sparse.issparse(X) else 1
    X = validate_data(
        estimator,
        structure.checked(X, name, widen=True),
        reset=reset,
        accept_sparse="csr",
        dtype=[np.float64, np.float32],
        ensure_min_samples=least,
        ensure_min_features=least,
        ensure_all_finite=False,  # checked below, as scikit-learn suggests other estimators
    )
    return arguments.canonical_csr(X, name)
