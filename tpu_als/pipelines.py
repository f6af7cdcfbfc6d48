"""A scikit-learn Pipeline that recommends: weighting transformers and a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import sklearn
from numpy.typing import ArrayLike
from scipy import sparse
from sklearn.pipeline import Pipeline
from sklearn.utils.metadata_routing import process_routing
from sklearn.utils.metaestimators import available_if

from tpu_als.validation import arguments, structure
from tpu_als.validation.structure import SparseMatrix

__all__ = ["RecommenderPipeline"]


def _if_model_has(name: str) -> Callable[[Any], bool]:
    return lambda pipeline: callable(getattr(pipeline.steps[-1][1], name, None))


class RecommenderPipeline(Pipeline):
    """A Pipeline of weighting transformers and a model, with the model's methods for users.

    All methods take counts, and weight them as `fit` does: the model folds in, filters and explains
    what it was trained on. ``best_estimator_`` of a search can recommend. The methods are those of
    the last step, and exist only if it has them.

    Parameters
    ----------
    steps : list of (str, object)
        Names and transformers, such as those of `tpu_als.weighting`, and at last the model. A
        transformer must give the same columns as it gets, and treat each row by itself.
    transform_input, memory, verbose
        As in `sklearn.pipeline.Pipeline`.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> from sklearn.model_selection import GridSearchCV
    >>> from tpu_als import RecommenderPipeline, TPUAlternatingLeastSquares
    >>> from tpu_als.weighting import LogWeighting
    >>> counts = csr_matrix([[3, 1, 0, 0], [1, 4, 1, 0], [0, 0, 2, 5], [0, 2, 2, 1]])
    >>> model = TPUAlternatingLeastSquares(factors=2, random_state=0)
    >>> pipeline = RecommenderPipeline([("weight", LogWeighting()), ("als", model)])
    >>> search = GridSearchCV(pipeline, {"als__alpha": [1, 10]}, cv=2).fit(counts)
    >>> ids, scores = search.best_estimator_.recommend(0, counts[0], N=2)
    >>> sorted(ids.tolist())
    [2, 3]
    """

    @available_if(_if_model_has("recommend"))
    def recommend(
        self,
        userid: ArrayLike,
        user_items: SparseMatrix,
        N: int = 10,
        filter_already_liked_items: bool = True,
        filter_items: ArrayLike | None = None,
        recalculate_user: bool = False,
        items: ArrayLike | None = None,
        *,
        user_features: Any = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Recommend items to a user or to several; `user_items` is weighted first.

        Parameters, results and errors are those of the model's method, see
        `TPUAlternatingLeastSquares.recommend`.
        """
        needs_rows = filter_already_liked_items or recalculate_user
        return self._model().recommend(
            userid,
            self._weighted(user_items, is_strict=True) if needs_rows else user_items,
            N=N,
            filter_already_liked_items=filter_already_liked_items,
            filter_items=filter_items,
            recalculate_user=recalculate_user,
            items=items,
            **_features(user_features),
        )

    @available_if(_if_model_has("recalculate_user"))
    def recalculate_user(
        self, userid: ArrayLike, user_items: SparseMatrix, *, user_features: Any = None
    ) -> np.ndarray:
        """Compute factors of users from their items; `user_items` is weighted first.

        See `TPUAlternatingLeastSquares.recalculate_user`.
        """
        return self._model().recalculate_user(
            userid, self._weighted(user_items), **_features(user_features)
        )

    @available_if(_if_model_has("partial_fit_users"))
    def partial_fit_users(
        self, userids: ArrayLike, user_items: SparseMatrix, *, user_features: Any = None
    ) -> None:
        """Recompute and store the factors of some users; `user_items` is weighted first.

        The transformers stay as they are. See `TPUAlternatingLeastSquares.partial_fit_users`.
        """
        self._model().partial_fit_users(
            userids, self._weighted(user_items), **_features(user_features)
        )

    @available_if(_if_model_has("explain"))
    def explain(
        self,
        userid: ArrayLike,
        user_items: SparseMatrix,
        itemid: ArrayLike,
        user_weights: Any = None,
        N: int = 10,
        *,
        user_features: Any = None,
    ) -> tuple[float, list[tuple[int, float]], tuple[np.ndarray, bool]]:
        """Split a user's score into contributions of the user's items; they are weighted first.

        See `TPUAlternatingLeastSquares.explain`. Only the user's row is weighted.
        """
        rows = self._weighted_row(userid, user_items)
        given = _features(user_features)
        return self._model().explain(userid, rows, itemid, user_weights, N, **given)

    @available_if(_if_model_has("explain_features"))
    def explain_features(
        self,
        userid: int,
        user_items: SparseMatrix,
        itemid: int,
        N: int = 10,
        *,
        user_features: Any = None,
    ) -> Any:
        """Split a user's score into contributions of items and features; items are weighted first.

        See `TPUAlternatingLeastSquares.explain_features`. Only the user's row is weighted.
        """
        rows = self._weighted_row(userid, user_items)
        return self._model().explain_features(userid, rows, itemid, N, **_features(user_features))

    @available_if(_if_model_has("similar_items"))
    def similar_items(
        self,
        itemid: ArrayLike,
        N: int = 10,
        recalculate_item: bool = False,
        item_users: SparseMatrix | None = None,
        filter_items: ArrayLike | None = None,
        items: ArrayLike | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the items whose factors have the largest cosine similarity.

        See `TPUAlternatingLeastSquares.similar_items`.

        Raises
        ------
        ValueError
            For `recalculate_item`: the transformers weight users, not the columns in `item_users`.
        """
        if recalculate_item:
            raise ValueError(
                "recalculate_item must be False in a RecommenderPipeline, because its steps weight "
                "whole users and not the columns in item_users: call similar_items of the last "
                "step, with weighted item_users"
            )
        return self._model().similar_items(itemid, N, filter_items=filter_items, items=items)

    @available_if(_if_model_has("similar_users"))
    def similar_users(
        self,
        userid: ArrayLike,
        N: int = 10,
        filter_users: ArrayLike | None = None,
        users: ArrayLike | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the users whose factors have the largest cosine similarity.

        See `TPUAlternatingLeastSquares.similar_users`.
        """
        return self._model().similar_users(userid, N, filter_users=filter_users, users=users)

    @available_if(_if_model_has("score"))
    def score(
        self, X: Any, y: object = None, sample_weight: ArrayLike | None = None, **params: Any
    ) -> float:
        """Weight the rows, and return the score of the last step.

        Parameters
        ----------
        X, y
            As in `score` of the last step.
        sample_weight : array-like, optional
            Passed to the last step if it is given.
        **params
            With scikit-learn's metadata routing, what the steps request, such as `user_features`.

        Returns
        -------
        float
        """
        is_routed = sklearn.get_config()["enable_metadata_routing"]
        if params and not is_routed:
            raise ValueError(
                f"score passes {', '.join(params)} on with scikit-learn's metadata routing only: "
                "call sklearn.set_config(enable_metadata_routing=True), and the model's "
                "set_score_request"
            )
        if sample_weight is not None or not is_routed:
            return super().score(X, y, sample_weight, **params)
        # scikit-learn's method passes a sample_weight of None on, which routing refuses for models
        # that take none.
        routed = process_routing(self, "score", **params)
        for name, step in self.steps[:-1]:
            if step is not None and step != "passthrough":
                X = step.transform(X, **routed[name].transform)
        name, model = self.steps[-1]
        return model.score(X, y, **routed[name].score)

    def set_output(self, *, transform: str | None = None) -> Self:
        """Choose the container that `transform` of the last step returns.

        The other steps keep their setting, because what they pass on is a sparse matrix, which
        frames of pandas and polars cannot hold.

        Parameters
        ----------
        transform : {"default", "pandas", "polars"}, optional
            None changes nothing.

        Returns
        -------
        self
        """
        if hasattr(self.steps[-1][1], "set_output"):
            self.steps[-1][1].set_output(transform=transform)
        return self

    def _transformers(self) -> list[Any]:
        return [step for _, step in self.steps[:-1] if step is not None and step != "passthrough"]

    def _model(self) -> Any:
        """The last step; ValueError if its items are not the columns that the first step gets."""
        model, steps = self.steps[-1][1], self._transformers()
        n_given = getattr(steps[0], "n_features_in_", None) if steps else None
        n_items = getattr(model, "n_features_in_", None)
        if n_given is not None and n_items is not None and n_items < n_given:
            raise _other_columns(n_given, n_items)
        return model

    def _weighted_row(self, userid: Any, user_items: SparseMatrix) -> Any:
        """The weighted row of a user, from one row or from the rows of all users."""
        rows = structure.checked(user_items)
        if sparse.issparse(rows) and rows.ndim == 2 and rows.shape[0] > 1:
            user = arguments.one_id(userid, None, "userid")
            # The model raises the error for a user beyond the matrix.
            rows = rows.tocsr()[[user]] if user < rows.shape[0] else rows
        return self._weighted(rows)

    def _weighted(self, user_items: SparseMatrix, is_strict: bool = False) -> Any:
        """Counts as the transformers weight them. The model refuses what is returned unchanged."""
        steps, rows = self._transformers(), structure.checked(user_items)
        is_refused = not sparse.issparse(rows) or rows.ndim > 2
        if is_refused or (is_strict and rows.ndim == 2 and rows.format != "csr") or not steps:
            return user_items
        rows = rows.reshape(1, -1).tocsr() if rows.ndim == 1 else rows.tocsr()
        n_given = getattr(steps[0], "n_features_in_", rows.shape[1])
        if rows.shape[1] < n_given:
            shape = (rows.shape[0], n_given)
            rows = type(rows)((rows.data, rows.indices, rows.indptr), shape=shape)
        n_columns = rows.shape[1]
        for step in steps:
            rows = step.transform(rows) if rows.shape[0] else rows
        if rows.shape[1] != n_columns:
            raise _other_columns(n_columns, rows.shape[1])
        return rows


def _features(user_features: Any) -> dict[str, Any]:
    """Keyword arguments; without features none, because other models do not take them."""
    return {} if user_features is None else {"user_features": user_features}


def _other_columns(n_given: int, n_items: int) -> ValueError:
    return ValueError(
        "the steps of a RecommenderPipeline must keep the columns, so that ids are those of items: "
        f"they make {n_items} columns of {n_given}. Select items before fit"
    )


def __dir__() -> list[str]:
    return sorted(__all__)
