"""Solve new rows against a fitted table, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from tpu_als import engine_options
from tpu_als.engine.backends import Backend
from tpu_als.engine.cpu import systems
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective, ridge
from tpu_als.serving.factor_table import ONE_THREAD, FactorTable
from tpu_als.serving.features import Prior, prior_for
from tpu_als.serving.fitted import FittedModel
from tpu_als.validation import arguments, matrices, tables
from tpu_als.validation.refusals import all_finite
from tpu_als.validation.structure import SparseMatrix

# Up to these numbers of rows and entries, a dispatch to a device takes longer than the work.
_FEW_ROWS, _FEW_ENTRIES = 4, 1 << 14


def recalculated(
    estimator: Any,
    fitted: FittedModel,
    side: str,
    given: ArrayLike,
    matrix: SparseMatrix,
    features: Any = None,
) -> np.ndarray:
    """Factors of rows of a side, solved against the table of the other side."""
    table = fitted.item if side == "user" else fitted.user
    name = "user_items" if side == "user" else "item_users"
    ids, is_scalar, mask = arguments.ids_of(given, None, f"{side}id")
    rows = arguments.rows_for(matrix, len(ids), table.shape[0], name, strict=False, mask=mask)
    prior = prior_for(fitted.features(side), side, features, len(ids))
    solved = folded_in(estimator, table, rows, prior)
    return solved[0] if is_scalar else solved


def folded_in(
    estimator: Any, table: FactorTable, rows: sparse.csr_matrix, prior: Prior | None = None
) -> np.ndarray:
    """Exact factors (m, factors) of canonical rows (m, n), by an estimator's parameters."""
    params = engine_options.params_against(estimator, table)
    return solve(
        table,
        rows,
        engine_options.objective_for(estimator, prior is not None),
        params,
        lambda: engine_options.backend_of(estimator).alone,
        None if prior is None else prior.rows,
    )


def prepare(estimator: Any, side: str, rows: sparse.csr_matrix) -> None:
    """On a CPU, compute once what exact solves of a side's rows need.

    That is the gramian of the other side's table, and loading compiled loops. Other backends
    compile for the shapes of the rows, so they have nothing to prepare.

    Parameters
    ----------
    estimator : TPUAlternatingLeastSquares
        Fitted.
    side : {"user", "item"}
        Whose rows are solved later.
    rows : csr_matrix (m, n)
        Some canonical rows of this side. Their solutions are dropped.
    """
    backend = engine_options.backend_of(estimator).alone
    if backend.accepts_part:
        table = estimator._fitted.table("item" if side == "user" else "user")
        params = engine_options.params_against(estimator, table)
        table.solve(rows, engine_options.objective_of(estimator), params, backend)


def solve(
    table: FactorTable,
    rows: sparse.csr_matrix,
    objective: Objective,
    params: AlsParams,
    backend: Callable[[], Backend],
    prior: np.ndarray | None = None,
) -> np.ndarray:
    """Solve equation (1) for canonical rows (m, n) against a table: (m, factors).

    Rows are drawn to those of `prior` (m, factors), and rows without entries are equal to them; by
    default both are zero.

    Raises
    ------
    ValueError
        If a row could not be solved, or NaN was written into the table.
    """
    is_few = rows.shape[0] <= _FEW_ROWS and rows.nnz <= _FEW_ENTRIES
    solved = table.solve(rows, objective, params, ONE_THREAD if is_few else backend(), prior)
    if prior is not None:
        solved = np.where(np.diff(rows.indptr)[:, None] == 0, prior, solved)
    if all_finite(solved):
        return solved
    table.require_finite()
    failed, solved = np.flatnonzero(~np.isfinite(solved).all(axis=1)), np.array(solved)
    of_failed = None if prior is None else prior[failed]
    solved[failed] = _in_float64(table, rows[failed], objective, of_failed)
    return tables.finite_rows(solved, "the given rows")


def _in_float64(
    table: FactorTable, rows: sparse.csr_matrix, objective: Objective, prior: np.ndarray | None
) -> np.ndarray:
    """`solve` for rows whose confidences are beyond the dtype of a device."""
    solved = np.zeros((rows.shape[0], table.shape[1]), table.dtype)
    gram, n_source = table.gramian().astype(np.float64), table.shape[0]
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for non-finite rows
        for row in np.flatnonzero(np.diff(rows.indptr)):
            ids, values, n_entries = matrices.known_entries(rows, row, n_source)
            lam = ridge(objective, float(n_entries), float(n_source))
            entries, drawn_to = (np.arange(len(ids)), values), None if prior is None else prior[row]
            solved[row] = systems.solved_row(
                table.rows(ids), entries, gram, objective, lam, drawn_to
            )
    return solved
