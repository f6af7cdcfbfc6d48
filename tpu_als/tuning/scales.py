"""Weights and parameters of the estimator, from settings that do not depend on the data's scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.engine.objective import Objective, ridge
from tpu_als.tuning.space import Settings
from tpu_als.weighting import LogWeighting, TfidfWeighting

_POWER_ITERATIONS = 30
_PRECISION = 1e-4


class UselessWeights(Exception):  # noqa: N818  (it excludes a candidate, and is not an error)
    """A weighting leaves nothing to learn, or exceeds the range of the dtype."""


def weighting_of(settings: Settings, rows: sparse.csr_matrix) -> Any:
    """A new transformer for the settings; None for no weighting.

    Parameters
    ----------
    settings : Settings
        A candidate.
    rows : csr_matrix of shape (n_users, n_items)
        The data to weight. Their median positive value is the unit of `epsilon`.
    """
    if settings.weighting == "log":
        positive = rows.data[rows.data > 0]
        unit = float(np.median(positive)) if len(positive) else 1.0
        return LogWeighting(_rounded(settings.epsilon * unit))
    return TfidfWeighting() if settings.weighting == "tfidf" else None


def weighted(weighting: Any, rows: sparse.csr_matrix) -> sparse.csr_matrix:
    """Fit a weighting and weight the rows.

    Parameters
    ----------
    weighting : transformer or None
        What `weighting_of` returned.
    rows : csr_matrix of shape (n_users, n_items)
        The data.

    Raises
    ------
    UselessWeights
        If the weights exceed the range of the dtype.
    """
    if weighting is None:
        return rows
    try:
        return weighting.fit_transform(rows)
    except ValueError as error:
        raise UselessWeights(str(error)) from error


def parameters_of(settings: Settings, weighted: sparse.csr_matrix) -> dict[str, Any]:
    """Parameters of the estimator, without factors and iterations, for weighted data.

    "implicit" keeps the weight of a cell without an entry at 1, as in implicit; "ials" scales
    confidences to a mean of 1, so that its unobserved weight and regularization have the usual
    size. Numbers are rounded to three digits, so that they can be written down.

    Parameters
    ----------
    settings : Settings
        A candidate.
    weighted : csr_matrix of shape (n_users, n_items)
        The data after the weighting.

    Raises
    ------
    UselessWeights
        If there is no positive weight.
    """
    n_users, n_items = weighted.shape
    total = float(np.maximum(weighted.data, 0).sum(dtype=np.float64))
    if not total > 0:
        raise UselessWeights("no entry has a positive weight")
    cells, is_implicit = float(n_users) * n_items, settings.objective == "implicit"
    if is_implicit:
        alpha, unobserved = _rounded(cells / (settings.balance * total)), 1.0
    else:
        alpha = _rounded(weighted.nnz / total)
        unobserved = _rounded(settings.balance * weighted.nnz / cells)
    largest = largest_ridge(weighted, alpha, unobserved, settings.exponent)
    found: dict[str, Any] = {
        "objective": settings.objective,
        "regularization": _rounded(settings.ridge * largest),
        "alpha": alpha,
    }
    if not is_implicit:
        found["unobserved_weight"] = unobserved
        found["regularization_exponent"] = settings.exponent
    return found


def largest_ridge(
    weighted: sparse.csr_matrix, alpha: float, unobserved: float, exponent: float
) -> float:
    """The smallest regularization for which all factors are zero at the minimum of the loss.

    At zero tables X and Y the loss has no gradient. Its second-order part is ``sum_u d_u |x_u|^2 +
    sum_i d_i |y_i|^2 - 2 sum v_ui x_u . y_i``, with the ridges d of equation (2). It is positive
    if and only if the largest singular value of the matrix ``v_ui / sqrt(d_u d_i)`` is below 1. As
    d is proportional to the regularization, that is the singular value for a regularization of 1.
    It does not depend on the number of factors.

    Parameters
    ----------
    weighted : csr_matrix of shape (n_users, n_items)
        The data after the weighting.
    alpha, unobserved, exponent : float
        Parameters of the objective.
    """
    n_users, n_items = weighted.shape
    unit = Objective.of("ials", 1.0, alpha, unobserved, exponent)
    users = ridge(unit, np.diff(weighted.indptr), n_items)
    items = ridge(unit, np.bincount(weighted.indices, minlength=n_items), n_users)
    matrix = sparse.csr_matrix(
        (np.maximum(weighted.data, 0).astype(np.float32), weighted.indices, weighted.indptr),
        shape=weighted.shape,
    )
    by_user, by_item = (np.sqrt(np.float64(alpha) / side) for side in (users, items))
    return _largest_singular_value(matrix, by_user, by_item)


def _largest_singular_value(
    matrix: sparse.csr_matrix, by_row: np.ndarray, by_column: np.ndarray
) -> float:
    """Of a nonnegative matrix with scaled rows and columns, by power iteration.

    The singular vector has no negative number, so a vector of ones is a good start.
    """
    vector = np.ones(matrix.shape[1]) / np.sqrt(matrix.shape[1])
    transposed, before = matrix.T, 0.0
    for _ in range(_POWER_ITERATIONS):
        rows = by_row * (matrix @ (by_column * vector))
        vector = by_column * (transposed @ (by_row * rows))
        length = float(np.linalg.norm(vector))
        value = np.sqrt(length)
        if value <= before * (1 + _PRECISION) or not length:
            break
        vector, before = vector / length, value
    return float(value)


def _rounded(value: float) -> float:
    """The number, rounded to three digits."""
    return float(f"{value:.3g}")
