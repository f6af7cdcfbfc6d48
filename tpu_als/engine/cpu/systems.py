"""The system of equation (1) for one row, in float64, and its solution by LAPACK.

Axis letters: N source rows, K factors, E entries.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg

from tpu_als.engine.objective import Objective, confidence

_BLOCK = 1 << 14  # entries of a row gathered at once


def system(
    table: np.ndarray,
    ids: np.ndarray,
    values: np.ndarray,
    gram: np.ndarray,
    objective: Objective,
    lam: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (K, K) and right side (K,) of equation (1) for one row, in float64.

    Parameters
    ----------
    table : array (N, K)
        Source rows.
    ids, values : array (E,)
        The row's entries.
    gram : float64 array (K, K)
        Gramian of the source rows.
    objective : Objective
        Equations (1)-(2).
    lam : float
        The ridge of equation (2).
    """
    matrix, rhs = objective.unobserved_weight * gram, np.zeros(len(gram))
    matrix.flat[:: len(matrix) + 1] += lam
    for low in range(0, len(ids), _BLOCK):
        at = slice(low, low + _BLOCK)
        w, v = confidence(objective, values[at].astype(np.float64))
        rows = table[ids[at]].astype(np.float64)
        matrix += (rows.T * w) @ rows
        rhs += v @ rows
    return matrix, rhs


def factorize(matrix: np.ndarray) -> tuple[np.ndarray, bool]:
    """Cholesky factor of a system (K, K), as `scipy.linalg.cho_factor` gives it."""
    try:
        return linalg.cho_factor(matrix, check_finite=False)
    except linalg.LinAlgError:
        # Rank-deficient and without a ridge: add a few rounding errors of the trace, as in `fit`.
        # If all weights are 0, the matrix and the right side are zero: any number may be added.
        jitter = 4 * np.finfo(np.float32).eps * np.trace(matrix) or 1.0
        return linalg.cho_factor(matrix + jitter * np.eye(len(matrix)), check_finite=False)


def solved_row(
    table: np.ndarray,
    entries: tuple[np.ndarray, np.ndarray],
    gram: np.ndarray,
    objective: Objective,
    lam: float,
    prior: np.ndarray | None = None,
) -> np.ndarray:
    """Solution (K,) of equation (1) for one row: `system` with ids and values, drawn to a prior."""
    matrix, rhs = system(table, *entries, gram, objective, lam)
    if prior is not None:
        rhs += lam * prior
    return solution(matrix, rhs)


def solution(matrix: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """Solution (K,) of a system; NaN if it is not finite."""
    _, found, failed = linalg.lapack.dposv(matrix, rhs)
    if not failed:
        return found
    try:
        return linalg.cho_solve(factorize(matrix), rhs, check_finite=False)
    except linalg.LinAlgError:
        # Negative weights may cancel the gramian up to rounding: leave those directions out.
        try:
            spectrum, basis = linalg.eigh(matrix)
        except (linalg.LinAlgError, ValueError):  # not finite
            return np.full_like(rhs, np.nan)
        at = spectrum > len(rhs) * np.finfo(np.float64).eps * np.abs(spectrum).max()
        return basis[:, at] @ (basis[:, at].T @ rhs / spectrum[at])
