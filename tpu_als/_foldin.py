"""Methods that solve rows against fitted tables: fold-in, `explain` and the callable `solver`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import linalg, sparse
from sklearn.utils import check_array

from tpu_als import parameters
from tpu_als._tables import FactorTables
from tpu_als.engine.xla import fold_in, mesh, placing, solve
from tpu_als.host import require_memory
from tpu_als.serving.fitted import FactorTable
from tpu_als.validation import arguments, matrices

# Up to these numbers of rows and entries, solving on the host is faster than a dispatch.
_HOST_ROWS, _HOST_ENTRIES = 4, 1 << 14


class FoldIn(FactorTables):
    """Methods for new rows. Every fold-in is exact, whichever solver `fit` uses."""

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
            Only the number of users matters here; they need not be in the model.
        user_items : csr_matrix or csr_array of shape (n, n_items)
            One row for each user. Other sparse formats are converted, with a ParameterWarning.

        Returns
        -------
        ndarray of shape (factors,), or (n, factors) for several users
            Up to 4 rows are solved on the host in float64, more rows on the devices. The results
            agree within rounding, not bit for bit; docs/math.md states the bound.

        Raises
        ------
        ValueError
            If the numbers of rows and users differ, or an entry lies beyond the items.
        """
        arguments.warn_if_converted(user_items)
        return self._recalculate(self._complete("item").item, userid, user_items, "user")

    def recalculate_item(self, itemid: Any, item_users: Any) -> np.ndarray:
        """Compute factors of items from their users, without storing them.

        Parameters
        ----------
        itemid : int or array-like of int
            Only the number of items matters here; they need not be in the model.
        item_users : csr_matrix or csr_array of shape (n, n_users)
            One row for each item. Other sparse formats are converted, with a ParameterWarning.

        Returns
        -------
        ndarray of shape (factors,), or (n, factors) for several items
            Exact up to rounding, as in `recalculate_user`.

        Raises
        ------
        ValueError
            If the numbers of rows and items differ, or an entry lies beyond the users.
        """
        arguments.warn_if_converted(item_users)
        return self._recalculate(self._complete("user").user, itemid, item_users, "item")

    def partial_fit_users(self, userids: Any, user_items: Any) -> None:
        """Recompute and store the factors of some users; new ids grow the table.

        Parameters
        ----------
        userids : array-like of int
            Users to update. Ids past the end are added; rows in between are zero. If an id repeats,
            its last row is stored.
        user_items : csr_matrix or csr_array of shape (n, n_items)
            One row for each user. Entries of items that the model does not have yet are accepted.
            They count as items with zero factors, and their number is logged.

        Raises
        ------
        ValueError
            If the numbers of rows and users differ.
        IndexError
            For negative ids, and for ids that would grow the table beyond twice its size and
            1,000,000 rows. Assign `user_factors` to grow it further.
        """
        arguments.warn_if_converted(user_items)
        self._partial_fit("user", userids, user_items)

    def partial_fit_items(self, itemids: Any, item_users: Any) -> None:
        """Recompute and store the factors of some items; new ids grow the table.

        Parameters
        ----------
        itemids : array-like of int
            Items to update. Ids past the end are added; rows in between are zero. If an id repeats,
            its last row is stored.
        item_users : csr_matrix or csr_array of shape (n, n_users)
            One row for each item. Entries of users that the model does not have yet are accepted.
            They count as users with zero factors, and their number is logged.

        Raises
        ------
        ValueError
            If the numbers of rows and items differ.
        IndexError
            For negative ids, and for ids that would grow the table beyond twice its size and
            1,000,000 rows. Assign `item_factors` to grow it further.
        """
        arguments.warn_if_converted(item_users)
        self._partial_fit("item", itemids, item_users)

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
        user_items : csr_matrix or csr_array of shape (n_users, n_items) or (1, n_items)
            The whole matrix, as in implicit, or only the row of the user, as in `recommend`. It
            must hold the values that were passed to `fit`: if those were weighted, the same
            weighted values and not the raw counts.
        itemid : int
            The item whose score is to be explained.
        user_weights : tuple, optional
            The value returned by an earlier call for this user; saves the factorisation.
        N : int, default=10
            Number of contributions.

        Returns
        -------
        total_score : float
            Score of the item from the user's exact factors.
        top_contributions : list of (itemid, score)
            Largest first. Disliked items (negative entries) contribute nothing and are omitted.
        user_weights : tuple
            Cholesky factor of the user's system, as `scipy.linalg.cho_factor` gives it.

        Raises
        ------
        IndexError
            For anything but one id each, and for ids beyond the matrix or the items.
        ValueError
            If an entry lies beyond the items.
        """
        n, table = arguments.result_count(N), self._complete("item").item
        n_items = table.shape[0]
        arguments.warn_if_converted(user_items)
        user = arguments.one_id(userid, None, "userid")
        item = arguments.one_id(itemid, n_items, "itemid")
        row = matrices.explained_row(user_items, user, n_items)
        objective = self._objective()
        w, v = solve.confidence(objective, row.data.astype(np.float64))
        liked = table.rows(row.indices)
        if user_weights is not None:
            user_weights = arguments.user_weights(user_weights, table.shape[1])
        else:
            system = _system(table, liked.astype(np.float64), w, row.nnz, objective)
            factor, lower = _factorize(system)
            user_weights = factor, bool(lower)  # some versions of SciPy return an array
        wanted = table.rows(np.array([item]))[0].astype(np.float64)
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
        table = self._complete("item").item.read()
        factors = check_array(X, dtype=[np.float64, np.float32], ensure_min_samples=0)
        if factors.shape[1] != table.shape[1]:
            raise ValueError(
                f"X has {factors.shape[1]} columns, expected {table.shape[1]} factors: "
                "inverse_transform takes what transform returns"
            )
        size = len(factors) * len(table) * table.itemsize
        require_memory({"scores": size}, "pass fewer rows, or use recommend for the best items")
        return factors.astype(table.dtype, copy=False) @ table.T

    @property
    def solver(self) -> Callable[..., None]:
        """Callable `(Cui, X, Y, regularization, num_threads=0)` that solves X in place, given Y.

        As in implicit, `Cui` holds confidences, and `alpha` is not applied. The parameters
        `linear_solver`, `use_cg` and `cg_steps` choose the solver; "cg" starts from X.
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
        arguments.solver_arguments(X, Y, regularization, num_threads)
        rows = arguments.rows_for(Cui, len(X), len(Y), "Cui", strict=False)
        objective = self._objective()._replace(alpha=1.0, regularization=regularization)
        linear_solver = solve.solver_for(self._own_solver(), objective)
        params = self._params_of(Y.shape[1], Y.dtype, linear_solver)
        parameters.check(self, parameters.PLACE)
        # The caller's tables change from call to call, so nothing is cached.
        place = mesh.workplace(
            self.devices, num_threads or self.num_threads, self.use_gpu, self.table_layout
        )
        source = fold_in.source(np.asarray(Y), params, place)
        solved = fold_in.solve_rows(rows, source, objective, params, start=np.asarray(X))
        X[...] = arguments.finite_rows(solved, "X, which stays as it was")

    def _recalculate(self, table: FactorTable, ids: Any, matrix: Any, side: str) -> np.ndarray:
        """Solve rows of a side against the table of the other side."""
        name = "user_items" if side == "user" else "item_users"
        ids, is_scalar, mask = arguments.ids_of(ids, None, f"{side}id")
        rows = arguments.rows_for(matrix, len(ids), table.shape[0], name, strict=False, mask=mask)
        solved = self._fold_in_fast(table, rows)
        return solved[0] if is_scalar else solved

    def _fold_in(self, table: FactorTable, rows: sparse.csr_matrix) -> np.ndarray:
        """Solve equation (1) exactly for canonical rows against a table."""
        params = self._params(table, "cholesky")
        objective = self._objective()
        solved = table.solve(rows, objective, params, self._own_place())
        failed = np.flatnonzero(~np.isfinite(solved).all(axis=1))
        if failed.size and np.isfinite(table.gramian()).all():
            # Weights beyond float32: solve in float64, as for small batches.
            solved = np.array(solved)
            solved[failed] = _solved_here(table, rows[failed], objective)
        return arguments.finite_rows(solved, "the given rows")

    def _fold_in_fast(self, table: FactorTable, rows: sparse.csr_matrix) -> np.ndarray:
        """`_fold_in`, but a few rows are solved on the host; the same except for rounding."""
        objective = self._objective()  # checked, whatever the rows hold
        few = rows.shape[0] <= _HOST_ROWS and rows.nnz <= _HOST_ENTRIES
        if table.resident is not None or not few:
            return self._fold_in(table, rows)
        return arguments.finite_rows(_solved_here(table, rows, objective), "the given rows")

    def _partial_fit(self, side: str, given: Any, matrix: Any) -> None:
        """Solve rows of a side against the other one, and store them; all is checked first."""
        name = "user_items" if side == "user" else "item_users"
        stored = False
        while not stored:
            fitted = self._complete()
            source = fitted.item if side == "user" else fitted.user
            n_rows, width = fitted.table(side).shape
            arguments.same_width(width, source.shape[1])
            ids, mask = arguments.ids_to_store(given, n_rows, f"{side}ids")
            rows = arguments.rows_for(
                matrix, len(ids), source.shape[0], name,
                strict=False, mask=mask, allow_unknown=True,
            )  # fmt: skip
            solved = self._fold_in_fast(source, rows)
            with fitted.lock:
                # If a fit or an assignment came in between, the rows belong to the previous model.
                stored = self._fitted.origin is fitted.origin
                if stored:
                    self._fitted = self._fitted.with_rows(side, ids, solved)

    def _objective(self) -> solve.Objective:
        parameters.check(self, parameters.OBJECTIVE)
        return solve.objective(
            self.objective,
            self.regularization,
            self.alpha,
            self.unobserved_weight,
            self.regularization_exponent,
        )

    def _linear_solver(self) -> str:
        return solve.solver_for(self._own_solver(), self._objective())

    def _own_solver(self) -> str:
        parameters.check(self, ("linear_solver", "use_cg"))
        return self.linear_solver or ("cg" if self.use_cg else "cholesky")

    def _params(self, table: FactorTable, linear_solver: str) -> placing.AlsParams:
        """Engine parameters for solves against a table, with its width and dtype."""
        return self._params_of(table.shape[1], table.dtype, linear_solver)

    def _params_of(self, factors: int, dtype: Any, linear_solver: str) -> placing.AlsParams:
        parameters.check(self, ("cg_steps", "block_size"))
        # bfloat16 is how tables are stored in `fit`; a fold-in does not round its results to it.
        return placing.AlsParams(
            factors=factors,
            dtype="float64" if dtype == np.float64 else "float32",
            linear_solver="cg" if linear_solver == "auto" else linear_solver,
            cg_steps=self.cg_steps,
            block_size=self.block_size,
            positive=self.objective == "ials",
        )


def _solved_here(
    table: FactorTable, rows: sparse.csr_matrix, objective: solve.Objective
) -> np.ndarray:
    """Solutions (R, K) on the host, in float64; NaN for rows where that fails."""
    solved = np.zeros((rows.shape[0], table.shape[1]), table.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what is not finite
        for row in np.flatnonzero(np.diff(rows.indptr)):
            ids, values, count = matrices.known_entries(rows, row, table.shape[0])
            w, v = solve.confidence(objective, values.astype(np.float64))
            source = table.rows(ids).astype(np.float64)
            solved[row] = _solve(_system(table, source, w, count, objective), v @ source)
    return solved


def _system(
    table: FactorTable, rows: np.ndarray, w: np.ndarray, count: int, objective: solve.Objective
) -> np.ndarray:
    """The matrix of equation (1) for one row's entries, in float64; n_u of (2) is `count`."""
    gramian = table.gramian().astype(np.float64)
    matrix = objective.unobserved_weight * gramian + (rows.T * w) @ rows
    lam = solve.ridge(objective, float(count), float(table.shape[0]))
    matrix.flat[:: len(matrix) + 1] += lam
    return matrix


def _factorize(matrix: np.ndarray) -> tuple[np.ndarray, bool]:
    """Cholesky factor of a system (K, K), as `scipy.linalg.cho_factor` gives it."""
    try:
        return linalg.cho_factor(matrix, check_finite=False)
    except linalg.LinAlgError:
        # Rank-deficient and no ridge: a few rounding errors of the gramian, as in `fit`.
        # One without any entry or weight is zero, and so is its right side, whatever is added.
        jitter = 4 * np.finfo(np.float32).eps * np.trace(matrix) or 1.0
        return linalg.cho_factor(matrix + jitter * np.eye(len(matrix)), check_finite=False)


def _solve(matrix: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """Solution (K,) of a system; NaN if it is not positive definite up to rounding."""
    _, solution, failed = linalg.lapack.dposv(matrix, rhs)
    if not failed:
        return solution
    try:
        return linalg.cho_solve(_factorize(matrix), rhs, check_finite=False)
    except linalg.LinAlgError:
        return np.full_like(rhs, np.nan)
