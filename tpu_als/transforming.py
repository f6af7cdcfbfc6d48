"""The estimator as scikit-learn's transformer: `transform`, `inverse_transform` and `score`."""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np
from scipy import sparse
from sklearn.base import TransformerMixin
from sklearn.utils import check_array

from tpu_als import engine_options
from tpu_als.evaluation import holdout
from tpu_als.host import require_memory
from tpu_als.serving.features import prior_for
from tpu_als.serving.fitted import FittedModel, ModelHolder
from tpu_als.serving.fold_in import folded_in
from tpu_als.serving.ranking import How, Limits, rank
from tpu_als.validation.estimators import checked_rows


class Transforming(ModelHolder, TransformerMixin):
    """Methods of scikit-learn's transformers that use a fitted model."""

    approximate_recall: float | None

    def transform(self, X: Any, user_features: Any = None) -> np.ndarray:
        """Compute exact factors of new or known rows (fold-in).

        Parameters
        ----------
        X : csr_matrix, csr_array or array-like of shape (n_rows, n_items)
            As in `fit`.
        user_features : matrix, DataFrame or FeatureTable of shape (n_rows, n_features), optional
            Features of the rows. Needed if `fit` got user features.

        Returns
        -------
        ndarray of shape (n_rows, factors)
            On a CPU each row depends only on that row of X, bit for bit. docs/math.md states what
            holds on other devices.

        Raises
        ------
        ValueError
            If the columns differ from those of `fit`; if `user_features` is missing, or was not
            given to `fit`.
        """
        fitted = self._fitted.require(self)
        rows = self._validated(X, fitted)
        prior = prior_for(fitted.features("user"), "user", user_features, rows.shape[0])
        return folded_in(self, fitted.item, rows, prior)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Score all items for given factors.

        Parameters
        ----------
        X : array-like of shape (n_rows, factors)
            Factors, such as `transform` gives.

        Returns
        -------
        ndarray of shape (n_rows, n_items)
            A dense array, which may be large. Use `recommend` for the best items.
        """
        items = self._fitted.require(self, "item").item
        items.require_finite()
        table = items.read()
        factors = check_array(X, dtype=[np.float64, np.float32], ensure_min_samples=0)
        if factors.shape[1] != table.shape[1]:
            raise ValueError(
                f"X has {factors.shape[1]} columns, expected {table.shape[1]} factors: "
                "inverse_transform takes what transform returns"
            )
        size = len(factors) * len(table) * table.itemsize
        require_memory({"scores": size}, "pass fewer rows, or use recommend for the best items")
        return factors.astype(table.dtype, copy=False) @ table.T

    def score(self, X: Any, y: object = None, user_features: Any = None) -> float:
        """Mean NDCG@10 of hidden items; the rows need not have been in the data of `fit`.

        A fifth of each row's positive entries is hidden, the same in every call. The rest is folded
        in, and all items that were not folded in are ranked. The hidden items are the relevant
        ones. Rows with fewer than two positive entries do not count.

        Parameters
        ----------
        X : csr_matrix, csr_array or array-like of shape (n_rows, n_items)
            As in `fit`.
        y : None
            Ignored.
        user_features : matrix, DataFrame or FeatureTable of shape (n_rows, n_features), optional
            As in `transform`.

        Returns
        -------
        float
            Between 0 and 1; larger is better.
        """
        fitted = self._fitted.require(self)
        rows = self._validated(X, fitted)
        prior = prior_for(fitted.features("user"), "user", user_features, rows.shape[0])
        kept, hidden, measured = holdout.for_scoring(rows)
        prior = None if prior is None else prior.some(measured)
        solved = folded_in(self, fitted.item, kept, prior)
        how = How(lambda: engine_options.backend_of(self).alone, self.approximate_recall)
        ids, _ = rank(fitted.item, solved, holdout.CUTOFF, Limits(kept), how)
        return holdout.mean_ndcg(ids, hidden)

    @property
    def _n_features_out(self) -> int:
        return self._fitted.require(self, "item").item.shape[1]

    def _validated(self, X: Any, fitted: FittedModel) -> sparse.csr_matrix:
        """Check X against a fitted model as scikit-learn does; return canonical CSR."""
        return checked_rows(self._view(fitted), X, "X", reset=False)

    def _view(self, fitted: FittedModel) -> Self:
        """Copy this estimator with another fitted model; everything else is shared."""
        view = copy.copy(self)
        view._fitted = fitted
        return view
