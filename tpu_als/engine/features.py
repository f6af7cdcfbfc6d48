"""Features of a side's rows, which say where the rows' factors are drawn to.

The ridge lam_u |z_u|^2 of a row becomes lam_u |z_u - W^T f_u|^2, for its features f_u, and W is the
ridge regression of the factors on the features (docs/math.md, "Features"). W is a function of the
table, so a state does not hold it.

Axis letters: M rows of a side, P features, K factors.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import linalg, sparse

from tpu_als.engine.objective import Objective, ridge
from tpu_als.exceptions import DataWarning
from tpu_als.host import single_blas_thread

_MOST_DIRECT = 4096  # features up to which the regression is solved by a factorisation
_DENSE = 0.05  # share of nonzero features from which products of dense blocks are faster
_BLOCK = 1 << 12  # rows of a dense block
_TOLERANCE, _MOST_STEPS = 1e-9, 1000  # of conjugate gradients
# Least ridge of a feature, relative to its sum of squares. Where features depend on each other, the
# rounding errors of the sums are divided by it, and would make huge weights that cancel.
_LEAST_RIDGE = {"float32": 1e-8, "float64": 1e-12}


@dataclass(frozen=True)
class Features:
    """The features of a side's rows, and how strongly they draw.

    Attributes
    ----------
    matrix : CSR matrix (M, P)
        One row of features for each row of the side; float32 or float64.
    regularization : float
        gamma, the ridge of W.
    weight : float
        Factor for lam on this side.
    placed : object
        The features in the backend's form.
    """

    matrix: sparse.csr_matrix
    regularization: float
    weight: float
    placed: Any = None
    _kept: dict[Objective, Regression] = field(default_factory=dict, repr=False, compare=False)

    def objective(self, objective: Objective) -> Objective:
        """Equations (1)-(2) of this side: lam is multiplied by the weight."""
        return objective._replace(regularization=objective.regularization * self.weight)

    def regression(self, objective: Objective, lengths: np.ndarray, n_source: int) -> Regression:
        """The regression of the side's factors on these features.

        Parameters
        ----------
        objective : Objective
            As `objective` returns it.
        lengths : int array (M,)
            Numbers of entries. Rows without entries do not count.
        n_source : int
            Rows of the other table.
        """
        if objective not in self._kept:
            self._kept.clear()
            ridges = row_ridges(objective, lengths, n_source)
            self._kept[objective] = Regression(self.matrix, ridges, self.regularization)
        return self._kept[objective]


def row_ridges(objective: Objective, lengths: np.ndarray, n_source: int) -> np.ndarray:
    """Ridges lam_u (M,) of equation (2) in float64; 0 for rows without entries."""
    with np.errstate(over="ignore", invalid="ignore"):
        ridges = ridge(objective, lengths.astype(np.float64), float(n_source))
    most = float(np.finfo(np.float32).max)
    is_used = (lengths > 0) & (objective.regularization != 0)
    return np.where(is_used, np.minimum(ridges, most), 0.0)


class Regression:
    """Ridge regression of factors on features: (F^T L F + gamma I) W = F^T L Z.

    Parameters
    ----------
    matrix : CSR matrix (M, P)
        The features F.
    ridges : float64 array (M,)
        The diagonal of L.
    regularization : float
        gamma. A small multiple of the system's diagonal is added to it, which decides between
        weights with the same products if features depend on each other.
    """

    def __init__(
        self, matrix: sparse.csr_matrix, ridges: np.ndarray, regularization: float
    ) -> None:
        self._matrix, self._ridges = matrix, ridges
        squares = matrix.astype(np.float64).power(2).T @ ridges
        least = _LEAST_RIDGE[matrix.dtype.name] * squares
        # A feature that no row has gets the weight 0.
        self._gamma = np.where(squares + regularization > 0, regularization + least, 1.0)
        self._scale = np.sqrt(squares + self._gamma)
        self._factor = self._factorised() if matrix.shape[1] <= _MOST_DIRECT else None

    def weights(self, sums: np.ndarray) -> np.ndarray:
        """W (P, K) in float64 for the sums F^T L Z (P, K). Not finite if the sums are not."""
        if not np.isfinite(sums).all():
            return np.full(sums.shape, np.nan)
        if self._factor is None:
            return self._by_cg(sums)
        scale = self._scale[:, None]
        with single_blas_thread():
            return linalg.cho_solve(self._factor, sums / scale, check_finite=False) / scale

    def _factorised(self) -> tuple[np.ndarray, bool]:
        """Cholesky factor of the system, scaled to a diagonal of ones."""
        system = self._gramian() / self._scale / self._scale[:, None]
        system.flat[:: len(system) + 1] += self._gamma / self._scale**2
        with single_blas_thread():
            return linalg.cho_factor(system, check_finite=False)

    def _gramian(self) -> np.ndarray:
        """F^T L F (P, P)."""
        n_rows, n_features = self._matrix.shape
        if self._matrix.nnz < _DENSE * n_rows * n_features:
            roots = sparse.diags_array(np.sqrt(self._ridges))
            scaled = sparse.csr_matrix(roots @ self._matrix.astype(np.float64))
            return np.asarray((scaled.T @ scaled).toarray())
        total = np.zeros((n_features, n_features))
        for low in range(0, n_rows, _BLOCK):
            rows = self._matrix[low : low + _BLOCK].toarray().astype(np.float64)
            total += (rows.T * self._ridges[low : low + _BLOCK]) @ rows
        return total

    def _by_cg(self, sums: np.ndarray) -> np.ndarray:
        """Conjugate gradients, preconditioned by the diagonal; all columns take the same steps."""
        F, ridges = self._matrix.astype(np.float64), self._ridges[:, None]
        transposed = F.T.tocsr()
        diagonal, gamma = self._scale[:, None] ** 2, self._gamma[:, None]
        found, r = np.zeros_like(sums), sums.copy()
        p = r / diagonal
        size = np.sum(r * p, axis=0)
        goal = _TOLERANCE**2 * size
        for _ in range(_MOST_STEPS):
            if (size <= goal).all():
                return found
            image = transposed @ (ridges * (F @ p)) + gamma * p
            bend = np.sum(p * image, axis=0)
            step = np.divide(size, bend, out=np.zeros_like(size), where=bend > 0)
            found += step * p
            r -= step * image
            y = r / diagonal
            last, size = size, np.sum(r * y, axis=0)
            p = y + np.divide(size, last, out=np.zeros_like(size), where=last > 0) * p
        left = float(np.sqrt((size / np.maximum(goal, np.finfo(float).tiny)).max()) * _TOLERANCE)
        warnings.warn(
            f"the regression of the factors on {F.shape[1]} features stopped after {_MOST_STEPS} "
            f"steps with a relative residual of {left:.0e}: a larger feature_regularization makes "
            "it easier to solve",
            DataWarning,
            stacklevel=2,
        )
        return found
