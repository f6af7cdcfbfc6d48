"""Methods for features of users and items: new rows, explanations, and what features mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import linalg, sparse

from tpu_als import engine_options
from tpu_als.engine.cpu import systems
from tpu_als.implicit_api.explained import pair_of
from tpu_als.serving.features import FittedFeatures
from tpu_als.serving.fitted import ModelHolder
from tpu_als.validation import arguments, features
from tpu_als.validation.structure import SparseMatrix

if TYPE_CHECKING:
    import pandas as pd


class Explanation(NamedTuple):
    """A score of a user and an item, split in two ways.

    The contributions of all of the user's items and features add up to `score`. So do those of all
    of the item's features, and `item_entries`. Each list has at most N contributions.

    Attributes
    ----------
    score : float
        The score, from the user's exact factors.
    items : list of (int, float)
        Contributions of the user's own items, largest first.
    user_features : list of (name, float)
        Contributions of the user's features, largest first; empty without user features.
    item_features : list of (name, float)
        Contributions of the item's features, largest first; empty without item features.
    item_entries : float
        What the item's own entries add: 0, up to rounding, for an item without any, whose factors
        are what its features say.
    """

    score: float
    items: list[tuple[int, float]]
    user_features: list[tuple[Any, float]]
    item_features: list[tuple[Any, float]]
    item_entries: float


class SideFeatures(ModelHolder):
    """Methods that need `user_features` or `item_features` in `fit`."""

    def embed_users(self, user_features: Any) -> np.ndarray:
        """Compute factors of users from their features alone.

        Parameters
        ----------
        user_features : sparse matrix, array-like, DataFrame or FeatureTable, (n, n_features)
            One row for each user, with the columns of `fit`. The users need not be in the model.

        Returns
        -------
        ndarray of shape (n, factors)
            W^T f of each row. `fit` gives a user without entries these factors.

        Raises
        ------
        ValueError
            If the model was fitted without user features, or for other columns.
        """
        return self._embedded("user", user_features)

    def embed_items(self, item_features: Any) -> np.ndarray:
        """Compute factors of items from their features alone.

        Parameters
        ----------
        item_features : sparse matrix, array-like, DataFrame or FeatureTable, (n, n_features)
            One row for each item, with the columns of `fit`. The items need not be in the model.

        Returns
        -------
        ndarray of shape (n, factors)
            W^T f of each row. `fit` gives an item without entries these factors.

        Raises
        ------
        ValueError
            If the model was fitted without item features, or for other columns.
        """
        return self._embedded("item", item_features)

    def explain_features(
        self,
        userid: int,
        user_items: SparseMatrix,
        itemid: int,
        N: int = 10,
        *,
        user_features: Any = None,
    ) -> Explanation:
        """Split a user's score of an item into contributions of history and features.

        Parameters
        ----------
        userid : int
            The user.
        user_items : csr_matrix or csr_array of shape (n_users, n_items) or (1, n_items)
            As in `explain`.
        itemid : int
            The item.
        N : int, default=10
            Number of contributions in each list.
        user_features : array-like of shape (1, n_features), optional
            Features of the user. Needed if `fit` got user features.

        Returns
        -------
        Explanation

        Raises
        ------
        IndexError
            As `explain`.
        ValueError
            If an entry lies beyond the items; if `user_features` is missing, or was not given to
            `fit`.
        """
        n, fitted = arguments.result_count(N), self._fitted.require(self, "item")
        arguments.warn_if_converted(user_items)
        pair = pair_of(self, fitted, (userid, itemid), user_items, user_features)
        prior, lam, direction = pair.prior, pair.lam, pair.wanted
        drawn_to = np.zeros(len(pair.wanted))
        if prior is not None:
            drawn_to = prior.rows[0].astype(np.float64)
        if pair.row.nnz:
            matrix, right = pair.system(fitted.item)
            both = np.column_stack([pair.wanted, right + lam * drawn_to])
            direction, factors = linalg.cho_solve(systems.factorize(matrix), both).T
        else:  # the user's factors are those that the features predict
            lam, factors = 1.0, drawn_to
        mine, of_user = fitted.features("user"), []
        if prior is not None and mine is not None:
            row = prior.features
            of_user = _contributions(mine, row.indices, row.data * lam, direction)
        of_item, own = self._of_item(pair.item, factors)
        score = float(pair.wanted @ factors)
        items = pair.top((pair.liked @ direction) * pair.targets, n)
        entries = score - own if of_item else score
        return Explanation(score, items, of_user[:n], of_item[:n], entries)

    def feature_effects(self, side: str = "item", N: int = 5) -> pd.DataFrame:
        """List the best items of each feature, to see what the features mean.

        Parameters
        ----------
        side : {"item", "user"}, default="item"
            Whose features.
        N : int, default=5
            Items for each feature.

        Returns
        -------
        DataFrame
            Columns "feature" (name or number), "rank", "item" (id) and "score": for a feature of
            items, the cosine of its weights and the item's factors; for a feature of users, what a
            value of 1 adds to the score of the item.

        Raises
        ------
        ValueError
            If the model was fitted without features of this side.
        """
        import pandas as pd

        if side not in ("item", "user"):
            raise ValueError(f"side must be 'item' or 'user', got {side!r}")
        known, table = self._known(side), self._fitted.require(self, "item").item
        weights, n = known.weights, min(arguments.result_count(N), table.shape[0])
        backend = engine_options.backend_of(self).alone
        if side == "item":
            lengths = np.linalg.norm(weights, axis=1, keepdims=True)
            weights = weights / np.where(lengths == 0, 1, lengths)
        found = table.catalog(backend, cosine=side == "item").top_k(weights, n)
        ids, scores = (np.asarray(part) for part in found)
        numbers = np.arange(len(weights))
        labels = numbers if known.names is None else known.names
        return pd.DataFrame(
            {
                "feature": np.repeat(labels, n),
                "rank": np.tile(np.arange(1, n + 1), len(weights)),
                "item": ids.ravel(),
                "score": scores.ravel(),
            }
        )

    @property
    def user_feature_weights_(self) -> np.ndarray:
        """Weights of user features, ndarray of shape (n_features, factors), if `fit` got any."""
        return self._fitted_features("user", "user_feature_weights_").weights

    @property
    def item_feature_weights_(self) -> np.ndarray:
        """Weights of item features, ndarray of shape (n_features, factors), if `fit` got any."""
        return self._fitted_features("item", "item_feature_weights_").weights

    @property
    def user_features_(self) -> sparse.csr_matrix:
        """Features of the users of the model, csr_matrix (n_users, n_features), if `fit` got any.

        `partial_fit_users` adds those of new users.
        """
        return self._fitted_features("user", "user_features_").rows.copy()

    @property
    def item_features_(self) -> sparse.csr_matrix:
        """Features of the items of the model, csr_matrix (n_items, n_features), if `fit` got any.

        `partial_fit_items` adds those of new items.
        """
        return self._fitted_features("item", "item_features_").rows.copy()

    @property
    def user_feature_names_in_(self) -> np.ndarray:
        """Names of user features, ndarray of str, if `fit` got names."""
        return self._names("user")

    @property
    def item_feature_names_in_(self) -> np.ndarray:
        """Names of item features, ndarray of str, if `fit` got names."""
        return self._names("item")

    def _names(self, side: str) -> np.ndarray:
        name = f"{side}_feature_names_in_"
        names = self._fitted_features(side, name).names
        if names is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return names

    def _fitted_features(self, side: str, name: str) -> FittedFeatures:
        known = self._fitted.features(side)
        if known is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return known

    def _known(self, side: str) -> FittedFeatures:
        known = self._fitted.require(self, side).features(side)
        if known is None:
            raise ValueError(
                f"the model has no {side}_features: pass {side}_features to fit. Assigning another "
                f"array to {side}_factors removes them"
            )
        return known

    def _embedded(self, side: str, given: Any) -> np.ndarray:
        known = self._known(side)
        rows = features.rows_for(given, None, known.names, len(known.weights), f"{side}_features")
        name = f"{side}_features"
        rows = features.in_dtype(rows, known.weights.dtype, name)
        return features.finite_products(known.prior(rows), name)

    def _of_item(self, item: int, factors: np.ndarray) -> tuple[list[tuple[Any, float]], float]:
        """Contributions of an item's features to a score, and their sum."""
        known = self._fitted.features("item")
        if known is None or item >= known.rows.shape[0]:
            return [], 0.0
        row = known.rows[[item]]
        found = _contributions(known, row.indices, row.data, factors)
        return found, sum(value for _, value in found)


def _contributions(
    known: FittedFeatures, numbers: np.ndarray, values: np.ndarray, direction: ArrayLike
) -> list[tuple[Any, float]]:
    """Label and contribution f_j W_j . direction of each feature of a row, largest first."""
    parts = values * (known.weights[numbers].astype(np.float64) @ direction)
    order = np.argsort(-parts, kind="stable")
    return [(known.label(int(numbers[i])), float(parts[i])) for i in order]
