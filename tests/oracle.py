"""An independent dense float64 reference, written from equations (1) and (2) alone.

It shares no code with the package. Every normal matrix is built from all cells of its row, stored
or not.
For a target row u with stored entries S_u, source table Y (N x K) and G = Y^T Y::

    (a0 G + lam_u I + sum_i w_ui y_i y_i^T) z_u = sum_i v_ui y_i                        (1)
    lam_u = lam * (n_u + a0 N)^nu                                                       (2)

With c = alpha x, a stored cell has target 1 where c > 0 and 0 elsewhere (a negative x is a disliked
item), and

* ``"implicit"``: weight |c| in place of the unobserved one: w = |c| - a0, v = max(c, 0), nu = 0;
* ``"ials"``: weight |c| on top of the unobserved one: w = |c|, v = max(c, 0), nu = 1.

A stored zero is a stored entry: it counts in n_u, and for "implicit" its cell has no weight.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse


class Objective(NamedTuple):
    """The objective. ``exponent`` None means the default nu."""

    name: str = "implicit"
    regularization: float = 0.01
    alpha: float = 1.0
    unobserved_weight: float = 1.0
    exponent: float | None = None

    @property
    def nu(self) -> float:
        """The exponent of (2)."""
        if self.exponent is not None:
            return self.exponent
        return {"implicit": 0.0, "ials": 1.0}[self.name]


IMPLICIT = Objective()


def _dense(matrix: sparse.spmatrix) -> tuple[np.ndarray, np.ndarray]:
    """Values and stored mask, both dense; duplicate entries are summed."""
    coo = sparse.coo_matrix(matrix)
    values, stored = np.zeros(coo.shape), np.zeros(coo.shape, dtype=bool)
    np.add.at(values, (coo.row, coo.col), coo.data.astype(np.float64))
    stored[coo.row, coo.col] = True
    return values, stored


def ridge(n_entries: np.ndarray, n_source: int, objective: Objective) -> np.ndarray:
    """lam_u of (2) for rows with given numbers of entries, and a table of ``n_source`` rows."""
    cells = np.asarray(n_entries, dtype=np.float64) + objective.unobserved_weight * n_source
    return objective.regularization * cells**objective.nu


def _cell_weights(
    matrix: sparse.spmatrix, objective: Objective
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per cell: total weight, target, and the stored mask."""
    values, stored = _dense(matrix)
    confidence = objective.alpha * values
    observed = np.abs(confidence)
    if objective.name == "ials":
        # an observed cell has two terms: as unobserved (target 0) and as observed
        total = objective.unobserved_weight + np.where(stored, observed, 0.0)
    else:
        total = np.where(stored, observed, objective.unobserved_weight)
    return total, np.maximum(confidence, 0.0), stored


def systems(
    matrix: sparse.spmatrix,
    source: np.ndarray,
    objective: Objective = IMPLICIT,
    n_source: int | None = None,
) -> np.ndarray:
    """The matrices of (1), one for each row: (M, K, K)."""
    source = np.asarray(source, dtype=np.float64)
    total, _, stored = _cell_weights(matrix, objective)
    lam = ridge(stored.sum(axis=1), n_source or len(source), objective)
    eye = np.eye(source.shape[1])
    return np.stack([(source.T * total[row]) @ source + lam[row] * eye for row in range(len(lam))])


def half_epoch(
    matrix: sparse.spmatrix,
    source: np.ndarray,
    objective: Objective = IMPLICIT,
    n_source: int | None = None,
) -> np.ndarray:
    """Solve (1) exactly for every row of ``matrix`` (M, N) against ``source`` (N, K): (M, K).

    ``n_source`` is the N of (2); by default the rows of the table.
    """
    source = np.asarray(source, dtype=np.float64)
    _, positive, stored = _cell_weights(matrix, objective)
    normals = systems(matrix, source, objective, n_source) if len(positive) else ()
    target = np.zeros((matrix.shape[0], source.shape[1]))
    for row in range(matrix.shape[0]):
        if not stored[row].any():
            continue  # the right-hand side is zero
        right = source.T @ positive[row]
        target[row] = np.linalg.lstsq(normals[row], right, rcond=None)[0]
    return target


def backward_errors(
    rows: np.ndarray,
    matrix: sparse.spmatrix,
    source: np.ndarray,
    objective: Objective = IMPLICIT,
    n_source: int | None = None,
    begun: np.ndarray | None = None,
) -> np.ndarray:
    """Backward errors of solved rows (M, K) in (1), relative to its terms: (M,).

    If the right-hand side is zero, so is the solution; the error is relative to the largest row.
    CG keeps the rounding error of the rows `begun` from which it starts, so the size of a solution
    counts as at least 3% of theirs.
    """
    if not matrix.shape[0]:
        return np.zeros(0)
    rows, source = np.asarray(rows, dtype=np.float64), np.asarray(source, dtype=np.float64)
    normals = systems(matrix, source, objective, n_source)
    right = _cell_weights(matrix, objective)[1] @ source
    missed = np.linalg.norm(np.einsum("mkl,ml->mk", normals, rows) - right, axis=1)
    sizes = np.linalg.norm(rows, axis=1)
    sizes[~right.any(axis=1)] = sizes.max()
    if begun is not None:
        sizes = np.maximum(sizes, 0.03 * np.linalg.norm(begun, axis=1))
    size = np.linalg.norm(normals, axis=(1, 2)) * sizes
    return missed / np.maximum(size + np.linalg.norm(right, axis=1), 1e-30)


def fold_in(
    rows: sparse.spmatrix,
    source: np.ndarray,
    objective: Objective = IMPLICIT,
    n_source: int | None = None,
) -> np.ndarray:
    """Factors of new rows for a fixed table, by the same equation."""
    return half_epoch(rows, source, objective, n_source)


def epoch(
    matrix: sparse.spmatrix,
    user_factors: np.ndarray,
    item_factors: np.ndarray,
    objective: Objective = IMPLICIT,
) -> tuple[np.ndarray, np.ndarray]:
    """One iteration, users first. An exact solve does not depend on its start."""
    del user_factors
    users = half_epoch(matrix, item_factors, objective)
    return users, half_epoch(sparse.csr_matrix(matrix).T, users, objective)


def fit(
    matrix: sparse.spmatrix,
    user_factors: np.ndarray,
    item_factors: np.ndarray,
    iterations: int,
    objective: Objective = IMPLICIT,
) -> tuple[np.ndarray, np.ndarray]:
    """``iterations`` exact epochs from the given tables."""
    for _ in range(iterations):
        user_factors, item_factors = epoch(matrix, user_factors, item_factors, objective)
    return user_factors, item_factors


def total_loss(
    matrix: sparse.spmatrix,
    user_factors: np.ndarray,
    item_factors: np.ndarray,
    objective: Objective = IMPLICIT,
) -> float:
    """The sum over all cells plus both ridge terms, which the half-epochs of (1) minimise."""
    users = np.asarray(user_factors, dtype=np.float64)
    items = np.asarray(item_factors, dtype=np.float64)
    values, stored = _dense(matrix)
    confidence = objective.alpha * values
    predicted = users @ items.T
    observed = np.abs(confidence) * ((confidence > 0) - predicted) ** 2
    # implicit adds the constant |c| for a disliked cell, and so does this package
    observed += np.where(confidence < 0, np.abs(confidence), 0.0)
    unobserved = objective.unobserved_weight * predicted**2
    both = observed + unobserved if objective.name == "ials" else observed
    cells = np.where(stored, both, unobserved).sum()
    for table, axis, other in ((users, 1, items), (items, 0, users)):
        cells += ridge(stored.sum(axis=axis), len(other), objective) @ (table**2).sum(axis=1)
    return float(cells)


def loss(
    matrix: sparse.spmatrix,
    user_factors: np.ndarray,
    item_factors: np.ndarray,
    objective: Objective = IMPLICIT,
) -> float:
    """``total_loss`` over the sum of all cells' weights, which is implicit's normaliser."""
    weight = _cell_weights(matrix, objective)[0].sum()
    return total_loss(matrix, user_factors, item_factors, objective) / float(weight or 1.0)


def initial_tables(
    n_users: int, n_items: int, factors: int, seed: int, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """implicit's initial tables for an integer seed: users, then items, uniform in [0, 0.01)."""
    rng = np.random.default_rng(seed)
    users = rng.random((n_users, factors), dtype=dtype) * 0.01
    return users, rng.random((n_items, factors), dtype=dtype) * 0.01
