"""Methods that solve rows against fitted tables: fold-in, `explain` and the callable `solver`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg, sparse

from tpu_als import engine_options
from tpu_als.engine.cpu import exact
from tpu_als.engine.objective import Objective, confidence, ridge
from tpu_als.implicit_api.holder import ModelHolder
from tpu_als.implicit_api.priors import Prior, prior_for
from tpu_als.serving import fold_in
from tpu_als.serving.fitted import FactorTable, FittedModel
from tpu_als.validation import arguments, matrices
from tpu_als.validation.structure import SparseMatrix


class NewRows(ModelHolder):
    """Methods for new rows. Every fold-in is exact, whichever solver `fit` uses."""

    def recalculate_user(
        self, userid: ArrayLike, user_items: SparseMatrix, *, user_features: Any = None
    ) -> np.ndarray:
        """Compute factors of users from their items, without storing them.

        Parameters
        ----------
        userid : int or array-like of int
            Only the number of users matters here; they need not be in the model.
        user_items : csr_matrix or csr_array of shape (n, n_items)
            One row for each user. Other sparse formats are converted, with a ParameterWarning.
        user_features : array-like of shape (n, n_features), optional
            Features of the users. Needed if `fit` got user features; for users of `fit`,
            ``model.user_features_[ids]``.

        Returns
        -------
        ndarray of shape (factors,), or (n, factors) for several users
            Exact up to rounding. On a CPU a row has the same bits whatever else is in the batch;
            docs/math.md states what holds on other devices.

        Raises
        ------
        ValueError
            If the numbers of rows and users differ, or an entry lies beyond the items; if
            `user_features` is missing, or was not given to `fit`.
        """
        arguments.warn_if_converted(user_items)
        fitted = self._fitted.require(self, "item")
        return recalculated(self, fitted, "user", userid, user_items, user_features)

    def recalculate_item(
        self, itemid: ArrayLike, item_users: SparseMatrix, *, item_features: Any = None
    ) -> np.ndarray:
        """Compute factors of items from their users, without storing them.

        Parameters
        ----------
        itemid : int or array-like of int
            Only the number of items matters here; they need not be in the model.
        item_users : csr_matrix or csr_array of shape (n, n_users)
            One row for each item. Other sparse formats are converted, with a ParameterWarning.
        item_features : array-like of shape (n, n_features), optional
            Features of the items. Needed if `fit` got item features; for items of `fit`,
            ``model.item_features_[ids]``.

        Returns
        -------
        ndarray of shape (factors,), or (n, factors) for several items
            Exact up to rounding, as in `recalculate_user`.

        Raises
        ------
        ValueError
            If the numbers of rows and items differ, or an entry lies beyond the users; if
            `item_features` is missing, or was not given to `fit`.
        """
        arguments.warn_if_converted(item_users)
        fitted = self._fitted.require(self, "user")
        return recalculated(self, fitted, "item", itemid, item_users, item_features)

    def partial_fit_users(
        self, userids: ArrayLike, user_items: SparseMatrix, *, user_features: Any = None
    ) -> None:
        """Recompute and store the factors of some users; new ids grow the table.

        Parameters
        ----------
        userids : array-like of int
            Users to update. Ids past the end are added; rows in between, and their features, are
            zero. If an id repeats, its last row is stored.
        user_items : csr_matrix or csr_array of shape (n, n_items)
            One row for each user. Entries of items that the model does not have yet are accepted.
            They count as items with zero factors, and their number is logged.
        user_features : array-like of shape (n, n_features), optional
            For a model with user features: those of the users, which are stored too. By default
            those stored already.

        Raises
        ------
        ValueError
            If the numbers of rows and users differ; if the model was fitted with user features,
            and does not know those of a user.
        IndexError
            For negative ids, and for ids that would grow the table beyond twice its size and
            1,000,000 rows. Assign `user_factors` to grow it further.
        """
        arguments.warn_if_converted(user_items)
        self._partial_fit("user", userids, user_items, user_features)

    def partial_fit_items(
        self, itemids: ArrayLike, item_users: SparseMatrix, *, item_features: Any = None
    ) -> None:
        """Recompute and store the factors of some items; new ids grow the table.

        Parameters
        ----------
        itemids : array-like of int
            Items to update. Ids past the end are added; rows in between, and their features, are
            zero. If an id repeats, its last row is stored.
        item_users : csr_matrix or csr_array of shape (n, n_users)
            One row for each item. Entries of users that the model does not have yet are accepted.
            They count as users with zero factors, and their number is logged.
        item_features : array-like of shape (n, n_features), optional
            For a model with item features: those of the items, which are stored too. By default
            those stored already.

        Raises
        ------
        ValueError
            If the numbers of rows and items differ; if the model was fitted with item features,
            and does not know those of an item.
        IndexError
            For negative ids, and for ids that would grow the table beyond twice its size and
            1,000,000 rows. Assign `item_factors` to grow it further.
        """
        arguments.warn_if_converted(item_users)
        self._partial_fit("item", itemids, item_users, item_features)

    def explain(
        self,
        userid: int,
        user_items: SparseMatrix,
        itemid: int,
        user_weights: tuple[np.ndarray, bool] | None = None,
        N: int = 10,
        *,
        user_features: Any = None,
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
        user_features : array-like of shape (1, n_features), optional
            Features of the user. Needed if `fit` got user features.

        Returns
        -------
        total_score : float
            Score of the item from the user's exact factors. It includes the contribution of the
            user's features, which `explain_features` splits.
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
        n, fitted = arguments.result_count(N), self._fitted.require(self, "item")
        arguments.warn_if_converted(user_items)
        pair = pair_of(self, fitted, (userid, itemid), user_items, user_features)
        if user_weights is not None:
            user_weights = arguments.user_weights(user_weights, fitted.item.shape[1])
        else:
            factor, lower = exact.factorize(pair.system(fitted.item)[0])
            user_weights = factor, bool(lower)  # some versions of SciPy return an array
        direction = linalg.cho_solve(user_weights, pair.wanted)
        scores, of_features = (pair.liked @ direction) * pair.targets, 0.0
        if pair.prior is not None:
            drawn_to = pair.prior.rows[0].astype(np.float64)
            of_features = drawn_to @ (pair.lam * direction if pair.row.nnz else pair.wanted)
        return np.float64(scores.sum() + of_features), pair.top(scores, n), user_weights

    @property
    def solver(self) -> Callable[..., None]:
        """Callable `(Cui, X, Y, regularization, num_threads=0)` that solves X in place, given Y.

        As in implicit, `Cui` holds confidences, and `alpha` is not applied. The parameters
        `linear_solver`, `use_cg` and `cg_steps` choose the solver; "cg" starts from X.
        """
        return self._solve_in_place

    def _solve_in_place(
        self,
        Cui: SparseMatrix,
        X: np.ndarray,
        Y: np.ndarray,
        regularization: float,
        num_threads: int | None = 0,
    ) -> None:
        arguments.solver_arguments(X, Y, regularization, num_threads)
        Y = np.asarray(Y)
        rows = arguments.rows_for(Cui, len(X), len(Y), "Cui", strict=False)
        own = engine_options.objective_of(self)
        objective = own._replace(alpha=1.0, regularization=regularization)
        linear_solver = engine_options.linear_solver_of(self, objective)
        is_exact = linear_solver in ("exact", "cholesky")
        params = engine_options.params_against(self, Y, "cholesky" if is_exact else linear_solver)
        # The caller's tables change from call to call, so nothing is cached.
        chosen = engine_options.backend_of(self, None if is_exact else params, num_threads)
        backend = chosen.alone
        solved = backend.source(Y, params).solve(rows, objective, start=X)
        X[...] = arguments.finite_rows(solved, "X, which stays as it was")

    def _partial_fit(
        self, side: str, given: ArrayLike, matrix: SparseMatrix, features: Any
    ) -> None:
        """Solve rows of a side against the other one, and store them; all is checked first."""
        name = "user_items" if side == "user" else "item_users"
        stored = False
        while not stored:
            fitted = self._fitted.require(self)
            source = fitted.item if side == "user" else fitted.user
            n_rows, width = fitted.table(side).shape
            arguments.same_width(width, source.shape[1])
            ids, mask = arguments.ids_to_store(given, n_rows, f"{side}ids")
            rows = arguments.rows_for(
                matrix, len(ids), source.shape[0], name,
                strict=False, mask=mask, allow_unknown=True,
            )  # fmt: skip
            prior = prior_for(fitted, side, features, len(ids), ids)
            solved = folded_in(self, source, rows, prior)
            new = None if prior is None or features is None else prior.features
            with fitted.lock:
                # If a fit or an assignment came in between, the rows belong to the previous model.
                now = self._fitted
                stored = now.origin is fitted.origin and (
                    prior is None or now.features(side) is fitted.features(side)
                )
                if stored:
                    self._fitted = self._fitted.with_rows(side, ids, solved, new)


class ExplainedPair(NamedTuple):
    """What the explanation of a user's score of an item needs.

    Attributes
    ----------
    row : csr_matrix (1, N)
        The user's row.
    item : int
        The item.
    prior : Prior or None
        What the user is drawn to.
    objective : Objective
        Equations (1)-(2) of users.
    lam : float
        The user's ridge (2).
    liked : array (E, K)
        Factors of the user's items.
    wanted : float64 array (K,)
        Factors of the item.
    """

    row: sparse.csr_matrix
    item: int
    prior: Prior | None
    objective: Objective
    lam: float
    liked: np.ndarray
    wanted: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """Weighted targets v (E,) of the user's entries, in float64."""
        return confidence(self.objective, self.row.data.astype(np.float64))[1]

    def system(self, table: FactorTable) -> tuple[np.ndarray, np.ndarray]:
        """Matrix and right side of equation (1) for the user, without the prior."""
        gram, at = table.gramian().astype(np.float64), np.arange(self.row.nnz)
        return exact.system(self.liked, at, self.row.data, gram, self.objective, self.lam)

    def top(self, scores: np.ndarray, n: int) -> list[tuple[int, float]]:
        """The n items with the largest contributions (E,); disliked items are omitted."""
        row = self.row
        order = [i for i in np.argsort(-scores, kind="stable") if row.data[i] >= 0][:n]
        return [(int(row.indices[i]), float(scores[i])) for i in order]


def pair_of(
    estimator: Any,
    fitted: FittedModel,
    ids: tuple[int, int],
    user_items: SparseMatrix,
    user_features: Any,
) -> ExplainedPair:
    """Check the arguments of `explain`: the ids of a user and an item, rows, and features."""
    table, n_items = fitted.item, fitted.item.shape[0]
    user = arguments.one_id(ids[0], None, "userid")
    item = arguments.one_id(ids[1], n_items, "itemid")
    row = matrices.explained_row(user_items, user, n_items)
    prior = prior_for(fitted, "user", user_features, 1)
    objective = objective_for(estimator, prior)
    lam = ridge(objective, float(row.nnz), float(n_items))
    wanted = table.rows(np.array([item]))[0].astype(np.float64)
    return ExplainedPair(row, item, prior, objective, lam, table.rows(row.indices), wanted)


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
    prior = prior_for(fitted, side, features, len(ids))
    solved = folded_in(estimator, table, rows, prior)
    return solved[0] if is_scalar else solved


def folded_in(
    estimator: Any, table: FactorTable, rows: sparse.csr_matrix, prior: Prior | None = None
) -> np.ndarray:
    """Exact factors (m, factors) of canonical rows (m, n), by an estimator's parameters."""
    params = engine_options.params_against(estimator, table)
    return fold_in.solve(
        table,
        rows,
        objective_for(estimator, prior),
        params,
        lambda: engine_options.backend_of(estimator).alone,
        None if prior is None else prior.rows,
    )


def prepare(estimator: Any, side: str, rows: sparse.csr_matrix) -> None:
    """Do what the first exact solve for rows of a side has to do once, if this CPU solves them.

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


def objective_for(estimator: Any, prior: Prior | None) -> Objective:
    """Equations (1)-(2) for rows that are drawn to a prior, or to zero if there is none."""
    objective = engine_options.objective_of(estimator)
    return objective if prior is None else engine_options.weighted(estimator, objective)
