"""An independent dense float64 reference of ALS with features, from its objective alone.

Rows without entries take no part: they are zero while the tables are fitted. For the other rows of
a side with features F (M x P)::

    ridge of the side = sum_u mu lam_u |z_u - W^T f_u|^2 + gamma |W|^2

where lam_u is that of (2) and mu the feature weight. Each half-epoch first takes the W that is best
for the rows as they are, and then the rows that are best for this W.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracle
from scipy import sparse


@dataclass(frozen=True)
class Features:
    """Features (M, P) of a side's rows, gamma and mu."""

    values: np.ndarray
    gamma: float = 1.0
    weight: float = 1.0


def ridges(matrix: sparse.spmatrix, objective: oracle.Objective, weight: float) -> np.ndarray:
    """mu lam_u for each row; 0 for rows without entries."""
    lengths = np.diff(sparse.csr_matrix(matrix).indptr)
    return weight * oracle.ridge(lengths, matrix.shape[1], objective) * (lengths > 0)


def best_weights(
    matrix: sparse.spmatrix, table: np.ndarray, objective: oracle.Objective, features: Features
) -> np.ndarray:
    """The W (P, K) that minimises the side's ridge."""
    F, lam = features.values, ridges(matrix, objective, features.weight)
    system = (F.T * lam) @ F + features.gamma * np.eye(F.shape[1])
    return np.linalg.solve(system, (F.T * lam) @ table)


def half_epoch(
    matrix: sparse.spmatrix,
    before: np.ndarray,
    source: np.ndarray,
    objective: oracle.Objective,
    features: Features | None = None,
) -> np.ndarray:
    """The best rows of a side, drawn to what the features say for the rows `before`."""
    if features is None:
        return oracle.half_epoch(matrix, source, objective)
    prior = features.values @ best_weights(matrix, before, objective, features)
    return solve(matrix, prior, source, objective, features.weight)


def solve(
    matrix: sparse.spmatrix,
    prior: np.ndarray,
    source: np.ndarray,
    objective: oracle.Objective,
    weight: float = 1.0,
) -> np.ndarray:
    """The best rows of a side for given priors; zero for rows without entries."""
    own = objective._replace(regularization=objective.regularization * weight)
    lam = ridges(matrix, objective, weight)
    right = oracle._cell_weights(matrix, own)[1] @ source + lam[:, None] * prior
    solved = np.linalg.solve(oracle.systems(matrix, source, own), right[:, :, None])[:, :, 0]
    solved[np.diff(sparse.csr_matrix(matrix).indptr) == 0] = 0
    return solved


def total_loss(
    matrix: sparse.csr_matrix,
    users: np.ndarray,
    items: np.ndarray,
    objective: oracle.Objective,
    user_features: Features | None = None,
    item_features: Features | None = None,
) -> float:
    """The sum over cells and ridges that is minimised, at the best W."""
    total = oracle.total_loss(matrix, users, items, objective)
    sides = (matrix, users, user_features), (matrix.T.tocsr(), items, item_features)
    for rows, table, features in sides:
        if features is None:
            continue
        weights = best_weights(rows, table, objective, features)
        lam = ridges(rows, objective, 1.0)
        total -= float(lam @ (table**2).sum(1))
        far = ((table - features.values @ weights) ** 2).sum(1)
        total += float(features.weight * lam @ far + features.gamma * (weights**2).sum())
    return total
