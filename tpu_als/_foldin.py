"""Solving rows against fitted tables: fold-in, partial fits, explanations, the callable solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import linalg, sparse
from sklearn.utils import check_array

from . import fold_in, mesh, placing, solve, validation
from ._tables import FactorTables

# Up to so many rows and entries, a dispatch to the devices takes longer than solving them here.
_HOST_ROWS, _HOST_ENTRIES = 4, 1 << 14


class FoldIn(FactorTables):
    """What an estimator does with new rows. Every fold-in is exact, whatever solver `fit` uses."""

    regularization: float
    alpha: float
    unobserved_weight: float
    regularization_exponent: float | None
    use_cg: bool
    linear_solver: str | None
    cg_steps: int
    block_size: int

    def recalculate_user(self, userid: Any, user_items: Any) -> np.ndarray:
        """Compute factors of users from their items, without storing them.

        Parameters
        ----------
        userid : int or array-like of int
            Only their number matters here; the users need not be in the model.
        user_items : csr_matrix or csr_array of shape (n, n_items)
            One row for each user. Other sparse formats are converted, with a ParameterWarning.

        Returns
        -------
        ndarray of shape (factors,), or (n, factors) for several users

        Raises
        ------
        ValueError
            Where the numbers of rows and users differ, or an entry lies beyond the items.
        """
        validation.warn_if_converted(user_items)
        return self._recalculate(userid, user_items, "user_items", "item")

    def recalculate_item(self, itemid: Any, item_users: Any) -> np.ndarray:
        """Compute factors of items from their users, without storing them.

        Parameters
        ----------
        itemid : int or array-like of int
            Only their number matters here; the items need not be in the model.
        item_users : csr_matrix or csr_array of shape (n, n_users)
            One row for each item. Other sparse formats are converted, with a ParameterWarning.

        Returns
        -------
        ndarray of shape (factors,), or (n, factors) for several items

        Raises
        ------
        ValueError
            Where the numbers of rows and items differ, or an entry lies beyond the users.
        """
        validation.warn_if_converted(item_users)
        return self._recalculate(itemid, item_users, "item_users", "user")

    def partial_fit_users(self, userids: Any, user_items: Any) -> None:
        """Recompute and store the factors of some users; new ids grow the table.

        Parameters
        ----------
        userids : array-like of int
            Users to update. Ids past the end are added; rows in between are zero.
        user_items : csr_matrix or csr_array of shape (n, n_items)
            One row for each user.

        Raises
        ------
        ValueError
            Where the numbers of rows and users differ.
        IndexError
            For negative ids.
        """
        self._store_rows("user", userids, self.recalculate_user(userids, user_items))

    def partial_fit_items(self, itemids: Any, item_users: Any) -> None:
        """Recompute and store the factors of some items; new ids grow the table.

        Parameters
        ----------
        itemids : array-like of int
            Items to update. Ids past the end are added; rows in between are zero.
        item_users : csr_matrix or csr_array of shape (n, n_users)
            One row for each item.

        Raises
        ------
        ValueError
            Where the numbers of rows and items differ.
        IndexError
            For negative ids.
        """
        self._store_rows("item", itemids, self.recalculate_item(itemids, item_users))

    def explain(
        self,
        userid: int,
        user_items: Any,
        itemid: int,
        user_weights: tuple[np.ndarray, bool] | None = None,
        N: int = 10,
    ) -> tuple[float, list[tuple[int, float]], tuple[np.ndarray, bool]]:
        """Split a user's score of an item into contributions of the user's own items.

        Parameters
        ----------
        userid : int
            The user.
        user_items : csr_matrix or csr_array of shape (n_users, n_items)
            The whole matrix, unlike in `recommend`: its row `userid` is used.
        itemid : int
            The item whose score is to be explained.
        user_weights : tuple, optional
            What an earlier call for this user returned; saves the factorisation.
        N : int, default=10
            Number of contributions.

        Returns
        -------
        total_score : float
            Score of the item from the user's exact factors.
        top_contributions : list of (itemid, score)
            Largest first. Disliked items (negative entries) contribute nothing and are left out.
        user_weights : tuple
            Cholesky factor of the user's system, as `scipy.linalg.cho_factor` gives it.
        """
        n_items, n = self._shape("item")[0], validation.result_count(N)
        validation.warn_if_converted(user_items)
        rows = validation.rows_for(user_items, None, n_items, strict=False)
        user = validation.ids_of(userid, rows.shape[0], "userid (a row of the whole user_items)")
        item = validation.ids_of(itemid, n_items, "itemid")
        row = rows[user[0][0]]
        w, v = solve.confidence(self._objective(), row.data.astype(np.float64))
        liked = self._rows("item", row.indices)
        if user_weights is None:
            user_weights = _factorize(self._system(liked.astype(np.float64), w, "item"))
        wanted = self._rows("item", item[0][:1])[0].astype(np.float64)
        scores = (liked @ linalg.cho_solve(user_weights, wanted)) * v
        order = [i for i in np.argsort(-scores, kind="stable") if row.data[i] >= 0][:n]
        top = [(int(row.indices[i]), float(scores[i])) for i in order]
        return np.float64(scores.sum()), top, user_weights

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Score all items for given factors.

        Parameters
        ----------
        X : array-like of shape (n_rows, factors)
            Factors, such as `transform` gives.

        Returns
        -------
        ndarray of shape (n_rows, n_items)
            A dense array: mind the memory, and use `recommend` for the best items.
        """
        table = self._fitted_table("item")
        factors = check_array(X, dtype=[np.float64, np.float32], ensure_min_samples=0)
        if factors.shape[1] != table.shape[1]:
            raise ValueError(
                f"X has {factors.shape[1]} columns, expected {table.shape[1]} factors: "
                "inverse_transform takes what transform returns"
            )
        return factors.astype(table.dtype, copy=False) @ table.T

    @property
    def solver(self) -> Callable[..., None]:
        """Callable `(Cui, X, Y, regularization, num_threads=0)` that solves X in place, given Y.

        As in implicit, `Cui` already holds confidences: `alpha` is not applied. The solver is that
        of the parameters `linear_solver`, `use_cg` and `cg_steps`, with X as the start of "cg".
        """
        return self._solve_in_place

    def _solve_in_place(
        self,
        Cui: Any,
        X: np.ndarray,
        Y: np.ndarray,
        regularization: float,
        num_threads: int | None = 0,
    ) -> None:
        rows = validation.rows_for(Cui, len(X), len(Y), "Cui", strict=False)
        objective = self._objective()._replace(alpha=1.0, regularization=regularization)
        params = self._params(Y, solve.solver_for(self._linear_solver(), objective))
        # The caller's tables come and go, so nothing is kept of them.
        place = mesh.workplace(
            self.devices, num_threads or self.num_threads, self.use_gpu, self.table_layout
        )
        source = fold_in.source(np.asarray(Y), params, place)
        X[...] = fold_in.solve_rows(rows, source, objective, params, start=np.asarray(X))

    def _recalculate(self, ids: Any, matrix: Any, name: str, source: str) -> np.ndarray:
        which = "userid" if source == "item" else "itemid"
        ids, is_scalar, mask = validation.ids_of(ids, None, which)
        n_columns = self._shape(source)[0]
        rows = validation.rows_for(matrix, len(ids), n_columns, name, strict=False, mask=mask)
        solved = self._fold_in_fast(rows, source)
        return solved[0] if is_scalar else solved

    def _fold_in(self, rows: sparse.csr_matrix, side: str) -> np.ndarray:
        """Solve equation (1) exactly for canonical rows against the table of a side."""
        # Only one that was assigned: a result must not depend on what was computed before it.
        gramian = self._YtY if side == "item" else self._XtX
        on_devices = self._resident(side)
        if on_devices is not None and gramian is None:
            solved = on_devices.solve(rows, self._objective())
            return validation.finite_rows(solved, "the given rows")
        # Before the table has a name here: see `_is_ours_alone`.
        stamp, table, place = self._stamp(side), self._fitted_table(side), self._own_place()
        params = self._params(table, "cholesky")
        source = self._kept(
            f"{side} source",
            (stamp, place, params),
            lambda: fold_in.source(table, params, place),
        )
        solved = fold_in.solve_rows(rows, source, self._objective(), params, gramian=gramian)
        failed = np.flatnonzero(~np.isfinite(solved).all(axis=1))
        if failed.size and np.isfinite(self.YtY if side == "item" else self.XtX).all():
            # Weights that float32 cannot hold; the same rows one by one would be solved in float64.
            solved[failed] = self._fold_in_here(rows[failed], side)
        return validation.finite_rows(solved.astype(table.dtype, copy=False), "the given rows")

    def _fold_in_fast(self, rows: sparse.csr_matrix, side: str) -> np.ndarray:
        """`_fold_in`, but a few rows are solved on the host; the same except for rounding."""
        few = rows.shape[0] <= _HOST_ROWS and rows.nnz <= _HOST_ENTRIES
        if self._resident(side) is not None or not few:
            return self._fold_in(rows, side)
        return validation.finite_rows(self._fold_in_here(rows, side), "the given rows")

    def _fold_in_here(self, rows: sparse.csr_matrix, side: str) -> np.ndarray:
        """Solve rows on the host, in float64; NaN where that fails."""
        solved = np.zeros((rows.shape[0], self._shape(side)[1]), self._fitted_table(side).dtype)
        for row in np.flatnonzero(np.diff(rows.indptr)):
            at = slice(rows.indptr[row], rows.indptr[row + 1])
            w, v = solve.confidence(self._objective(), rows.data[at].astype(np.float64))
            source = self._rows(side, rows.indices[at]).astype(np.float64)
            solved[row] = _solve(self._system(source, w, side), v @ source)
        return solved

    def _store_rows(self, side: str, ids: Any, rows: np.ndarray) -> None:
        table = self._fitted_table(side)
        ids = validation.ids_of(ids, None, f"{side}ids")[0]
        if ids.size and ids.min() < 0:
            raise IndexError(f"{side}ids must not be negative, got {ids.min()}")
        grown = np.zeros((max(len(table), ids.max(initial=-1) + 1), table.shape[1]), table.dtype)
        grown[: len(table)] = table
        grown[ids] = rows
        self._store(side, grown)

    def _system(self, rows: np.ndarray, w: np.ndarray, side: str) -> np.ndarray:
        """The matrix of equation (1) for one row's entries, in float64."""
        objective, gramian = self._objective(), self.YtY if side == "item" else self.XtX
        matrix = objective.unobserved_weight * gramian.astype(np.float64) + (rows.T * w) @ rows
        lam = solve.ridge(objective, float(len(rows)), float(self._shape(side)[0]))
        matrix.flat[:: len(matrix) + 1] += lam
        return matrix

    def _objective(self) -> solve.Objective:
        return solve.objective(
            self.objective,
            self.regularization,
            self.alpha,
            self.unobserved_weight,
            self.regularization_exponent,
        )

    def _linear_solver(self) -> str:
        name = self.linear_solver or ("cg" if self.use_cg else "cholesky")
        return solve.solver_for(name, self._objective())

    def _params(self, table: np.ndarray, linear_solver: str) -> placing.AlsParams:
        """Engine parameters for solves against a table as it is: its own width and dtype."""
        # bfloat16 is how tables are stored in `fit`; a fold-in does not round its results to it.
        return placing.AlsParams(
            factors=table.shape[1],
            dtype="float64" if table.dtype == np.float64 else "float32",
            linear_solver="cg" if linear_solver == "auto" else linear_solver,
            cg_steps=self.cg_steps,
            block_size=self.block_size,
            positive=self.objective == "ials",
        )


def _factorize(matrix: np.ndarray) -> tuple[np.ndarray, bool]:
    """Cholesky factor of a system (K, K), as `scipy.linalg.cho_factor` gives it."""
    try:
        return linalg.cho_factor(matrix, check_finite=False)
    except linalg.LinAlgError:
        # Rank-deficient and no ridge: a few rounding errors of the gramian, as in `fit`.
        jitter = 4 * np.finfo(np.float32).eps * np.trace(matrix)
        return linalg.cho_factor(matrix + jitter * np.eye(len(matrix)), check_finite=False)


def _solve(matrix: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """Solution (K,) of a system; NaN where it is not positive definite, give or take rounding."""
    _, solution, failed = linalg.lapack.dposv(matrix, rhs)
    if not failed:
        return solution
    try:
        return linalg.cho_solve(_factorize(matrix), rhs, check_finite=False)
    except linalg.LinAlgError:
        return np.full_like(rhs, np.nan)
