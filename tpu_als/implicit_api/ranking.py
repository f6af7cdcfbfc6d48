"""Recommendations, neighbours and scores from fitted tables."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tpu_als import engine_options, parameters
from tpu_als.serving.derived import norms
from tpu_als.serving.factor_table import FactorTable
from tpu_als.serving.features import prior_for
from tpu_als.serving.fitted import ModelHolder
from tpu_als.serving.fold_in import folded_in, recalculated
from tpu_als.serving.ranking import How, Limits, rank, rank_one
from tpu_als.validation import arguments, tables
from tpu_als.validation.refusals import require_matrix
from tpu_als.validation.structure import SparseMatrix


class Ranking(ModelHolder):
    """implicit's ranking methods."""

    approximate_recall: float | None

    def recommend(
        self,
        userid: ArrayLike,
        user_items: SparseMatrix | None,
        N: int = 10,
        filter_already_liked_items: bool = True,
        filter_items: ArrayLike | None = None,
        recalculate_user: bool = False,
        items: ArrayLike | None = None,
        *,
        user_features: Any = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Recommend the best items for a user or for several.

        Parameters
        ----------
        userid : int or array-like of int
            A user or users; also a mask, a range, or any sequence.
        user_items : csr_matrix, csr_array or None
            One row for each user in `userid`, of shape (n, n_items): `user_items[userid]`. May be
            None if neither filtering nor recalculation needs it.
        N : int, default=10
            Number of results.
        filter_already_liked_items : bool, default=True
            Exclude the items stored in the user's row, whatever their value.
        filter_items : array-like of int, optional
            Further items to exclude, for all users.
        recalculate_user : bool, default=False
            Solve the users' factors from `user_items` rather than use the stored ones.
        items : array-like of int, optional
            Rank these items only; N is then at most their number. Excludes `filter_items`.
        user_features : array-like of shape (n, n_features), optional
            With `recalculate_user`: features of the users. Needed if `fit` got user features.

        Returns
        -------
        ids : ndarray of int32 and shape (N,), or (n, N) for several users
            Best first. If a user has fewer than N candidates, excluded items follow with score
            -3.4e38. If there are fewer than N items, the result is padded with -1 and the same
            score. Equal scores are ordered by id on a CPU without JAX; elsewhere their order is
            unspecified. In a call for many users, scores of items with equal factors may differ
            in the last digits.
        scores : ndarray of the factors' dtype and the same shape

        Raises
        ------
        ValueError
            If the matrix is not CSR, does not have one row per user, or has entries of unknown
            items; if `user_features` is given without `recalculate_user`.
        IndexError
            For ids that are not in the model.
        MemoryError
            If the results would not fit into the free memory; raised before any work.
        """
        n = arguments.result_count(N)
        arguments.flags(
            filter_already_liked_items=filter_already_liked_items,
            recalculate_user=recalculate_user,
        )
        _require_recalculation(user_features, recalculate_user, "user")
        fitted = self._fitted.require(self, "item", *(() if recalculate_user else ("user",)))
        n_items = fitted.item.shape[0]
        n_users = None if recalculate_user else fitted.user.shape[0]
        ids, is_scalar, mask = arguments.ids_of(userid, n_users)
        rows = None
        if filter_already_liked_items or recalculate_user:
            rows = arguments.rows_for(user_items, len(ids), n_items, mask=mask)
        names = ("items", "filter_items")
        selection = arguments.selection(items, filter_items, n_items, names)
        if recalculate_user:
            prior = prior_for(fitted.features("user"), "user", user_features, len(ids))
            queries = folded_in(self, fitted.item, rows, prior)
        else:
            queries = fitted.user.rows(ids)
        limits, how = Limits(rows if filter_already_liked_items else None, *selection), self._how()
        if is_scalar:
            return rank_one(fitted.item, queries[0], n, limits, how)
        return rank(fitted.item, queries, n, limits, how)

    def similar_items(
        self,
        itemid: ArrayLike,
        N: int = 10,
        recalculate_item: bool = False,
        item_users: SparseMatrix | None = None,
        filter_items: ArrayLike | None = None,
        items: ArrayLike | None = None,
        *,
        item_features: Any = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the items whose factors have the largest cosine similarity.

        Parameters
        ----------
        itemid : int or array-like of int
            An item or items.
        N : int, default=10
            Number of results; the item itself is the first.
        recalculate_item : bool, default=False
            Solve the items' factors from `item_users` rather than use the stored ones.
        item_users : csr_matrix or csr_array, optional
            With `recalculate_item`, one row for each item, of shape (n, n_users).
        filter_items : array-like of int, optional
            Items to exclude.
        items : array-like of int, optional
            Rank these items only. Excludes `filter_items`.
        item_features : array-like of shape (n, n_features), optional
            With `recalculate_item`: features of the items. Needed if `fit` got item features.

        Returns
        -------
        ids : ndarray of int32 and shape (N,), or (n, N) for several items
            Best first; places without a result as in `recommend`.
        scores : ndarray of the factors' dtype and the same shape
            Cosines.
        """
        n, factors = arguments.result_count(N), None
        arguments.flags(recalculate_item=recalculate_item)
        fitted = self._fitted.require(self, "item", *(("user",) if recalculate_item else ()))
        _require_recalculation(item_features, recalculate_item, "item")
        if recalculate_item:
            arguments.warn_if_converted(item_users)
            factors = recalculated(self, fitted, "item", itemid, item_users, item_features)
        chosen = arguments.selection(
            items, filter_items, fitted.item.shape[0], ("items", "filter_items")
        )
        return self._similar(fitted.item, "itemid", itemid, n, factors, chosen)

    def similar_users(
        self,
        userid: ArrayLike,
        N: int = 10,
        filter_users: ArrayLike | None = None,
        users: ArrayLike | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the users whose factors have the largest cosine similarity.

        Parameters
        ----------
        userid : int or array-like of int
            A user or users.
        N : int, default=10
            Number of results; the user is the first.
        filter_users : array-like of int, optional
            Users to exclude.
        users : array-like of int, optional
            Rank these users only. Excludes `filter_users`.

        Returns
        -------
        ids : ndarray of int32 and shape (N,), or (n, N) for several users
            Best first; places without a result as in `recommend`.
        scores : ndarray of the factors' dtype and the same shape
            Cosines.
        """
        n, table = arguments.result_count(N), self._fitted.require(self, "user").user
        chosen = arguments.selection(users, filter_users, table.shape[0], ("users", "filter_users"))
        return self._similar(table, "userid", userid, n, None, chosen)

    def score_pairs(self, userids: ArrayLike, itemids: ArrayLike) -> np.ndarray:
        """Score given pairs of a user and an item.

        Parameters
        ----------
        userids, itemids : array-like of int, of equal length
            Either may be a single id, which is then paired with all ids of the other.

        Returns
        -------
        ndarray of the factors' dtype and shape (n,)
            Inner products, the scores that `recommend` ranks by; 0-d for two single ids.
        """
        fitted = self._fitted.require(self)
        users_at, one_user, _ = arguments.ids_of(userids, fitted.user.shape[0], "userids")
        items_at, one_item, _ = arguments.ids_of(itemids, fitted.item.shape[0], "itemids")
        if len(users_at) != len(items_at) and not (one_user or one_item):
            raise ValueError(
                f"userids and itemids must be of equal length, got {len(users_at)} and "
                f"{len(items_at)}: pairs are scored, not every combination"
            )
        users, items = fitted.user.rows(users_at), fitted.item.rows(items_at)
        tables.same_width(users.shape[-1], items.shape[-1])
        scores = np.einsum("...k,...k->...", users, items)
        return scores[0] if one_user and one_item else scores

    def recommend_all(
        self,
        user_items: SparseMatrix,
        N: int = 10,
        recalculate_user: bool = False,
        filter_already_liked_items: bool = True,
        filter_items: ArrayLike | None = None,
        users_items_offset: int = 0,
        *,
        user_features: Any = None,
    ) -> np.ndarray:
        """Recommend items for all rows of a matrix; deprecated, use `recommend` with many users.

        Returns
        -------
        ids : ndarray of int32 and shape (n, N)
        """
        warnings.warn(
            "recommend_all is deprecated. Use recommend with an array of userids instead",
            DeprecationWarning,
            stacklevel=2,
        )
        require_matrix(user_items, "user_items")
        if not hasattr(user_items, "shape"):
            got = type(user_items).__name__
            raise TypeError(f"user_items must be a CSR matrix of users by items, got {got}")
        return self.recommend(
            np.arange(user_items.shape[0]) + users_items_offset,
            user_items,
            N=N,
            filter_already_liked_items=filter_already_liked_items,
            filter_items=filter_items,
            recalculate_user=recalculate_user,
            user_features=user_features,
        )[0]

    def rank_items(
        self,
        userid: ArrayLike,
        user_items: SparseMatrix,
        selected_items: ArrayLike,
        recalculate_user: bool = False,
        *,
        user_features: Any = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rank given items for a user; deprecated, use `recommend` with `items`."""
        warnings.warn(
            "rank_items is deprecated. Use recommend with the 'items' parameter instead",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.recommend(
            userid,
            user_items,
            recalculate_user=recalculate_user,
            items=selected_items,
            filter_already_liked_items=False,
            user_features=user_features,
        )

    def _how(self, cosine: bool = False) -> How:
        if self.approximate_recall is not None:
            parameters.check(self, ("approximate_recall",))
        return How(lambda: engine_options.backend_of(self).alone, self.approximate_recall, cosine)

    # implicit's approximate-neighbour wrappers call these methods. They normalise the result in
    # place, so it must be a copy.
    def _user_factor(
        self, userid: ArrayLike, user_items: SparseMatrix, recalculate_user: bool = False
    ) -> np.ndarray:
        if recalculate_user:
            fitted = self._fitted.require(self, "item")
            return recalculated(self, fitted, "user", userid, user_items)
        return self._rows_of("user", userid)

    def _item_factor(
        self, itemid: ArrayLike, item_users: SparseMatrix, recalculate_item: bool = False
    ) -> np.ndarray:
        if recalculate_item:
            fitted = self._fitted.require(self, "user")
            return recalculated(self, fitted, "item", itemid, item_users)
        return self._rows_of("item", itemid)

    def _rows_of(self, side: str, ids: ArrayLike) -> np.ndarray:
        table = self._fitted.require(self, side).table(side)
        at, is_scalar, _ = arguments.ids_of(ids, table.shape[0], f"{side}id")
        rows = table.rows(at)
        return rows[0] if is_scalar else rows

    def _similar(
        self,
        table: FactorTable,
        name: str,
        ids: ArrayLike,
        n: int,
        factors: np.ndarray | None,
        selection: tuple[np.ndarray | None, np.ndarray | None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of some rows of a table, or of `factors` if given."""
        lengths = table.norms()
        if factors is None:
            at, is_scalar, _ = arguments.ids_of(ids, len(lengths), name)
            # A division by a number takes half the time of one by an array.
            divisors = lengths[at[0]] if is_scalar else lengths.take(at)[:, None]
            queries = table.rows(at) / divisors
        else:
            is_scalar = factors.ndim == 1
            queries = np.atleast_2d(factors / norms(factors)[..., None])
        limits, how = Limits(None, *selection), self._how(cosine=True)
        if is_scalar:
            return rank_one(table, queries[0], n, limits, how)
        return rank(table, queries, n, limits, how)


def _require_recalculation(features: object, is_recalculated: bool, side: str) -> None:
    """Raise ValueError for features that would not be used."""
    if features is not None and not is_recalculated:
        raise ValueError(
            f"{side}_features is used with recalculate_{side}=True only: the stored factors "
            f"include the features of {side}s already"
        )
