"""Confidence weighting: what a count says, as scikit-learn transformers in front of a model."""

from __future__ import annotations

from numbers import Real
from typing import Any, Self

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from . import structure


class _Weighting(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """A function of each stored value, its row and what `fit` learnt of its column."""

    _takes_negatives = False

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn from a matrix of users by items what `transform` needs.

        Parameters
        ----------
        X : csr_matrix, csr_array or array-like of shape (n_users, n_items)
            Counts. Stored zeros are entries, duplicates are summed.
        y : None
            Ignored.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For parameters out of range, values that are not finite, and, but for `LogWeighting`,
            negative values.
        """
        self._check_parameters()
        self._learn(self._csr(self._accepted(X, reset=True)))
        return self

    def transform(self, X: Any) -> Any:
        """Weight rows, seen in `fit` or not, each on its own.

        Parameters
        ----------
        X : csr_matrix, csr_array or array-like of shape (n_rows, n_items)
            As in `fit`. It is not changed.

        Returns
        -------
        csr_matrix, csr_array or ndarray of shape (n_rows, n_items)
            Of the kind of X (other sparse formats become CSR) and with the same stored entries;
            float64 for float64 input, else float32.

        Raises
        ------
        ValueError
            As `fit`.
        """
        check_is_fitted(self)
        accepted = self._accepted(X, reset=False)
        weighted = self._csr(accepted)
        values = self._weigh(weighted)
        weighted.data = values.astype(accepted.dtype, copy=False)
        return weighted if sparse.issparse(accepted) else weighted.toarray()

    def _accepted(self, X: Any, reset: bool) -> Any:
        """Check X; sparse input becomes CSR."""
        X = structure.checked(X, "X", widen=True)
        return validate_data(self, X, reset=reset, **_ACCEPTED)

    def _csr(self, accepted: Any) -> Any:
        """Canonical copy of validated input."""
        rows = accepted.copy() if sparse.issparse(accepted) else sparse.csr_matrix(accepted)
        rows.sum_duplicates()
        if not self._takes_negatives and rows.nnz and rows.data.min() < 0:
            # scikit-learn's wording: its checks look for it
            raise ValueError(f"Negative values in data passed to {type(self).__name__}")
        return rows

    def _check_parameters(self) -> None:
        """Raise ValueError for a parameter out of range."""

    def _learn(self, rows: Any) -> None:
        """Set what is learnt from the columns."""

    def _weigh(self, rows: Any) -> np.ndarray:
        """Weights of the stored values."""
        raise NotImplementedError

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = not self._takes_negatives
        tags.transformer_tags.preserves_dtype = ["float32", "float64"]
        return tags


_ACCEPTED: dict[str, Any] = dict(accept_sparse="csr", dtype=[np.float32, np.float64])


class LogWeighting(_Weighting):
    """``log(1 + x / epsilon)``: ten purchases are more sure than one, though not ten times [1]_.

    A negative value, a dislike to the "implicit" objective, stays one: ``-log(1 - x / epsilon)``.

    Parameters
    ----------
    epsilon : float, default=1.0
        Above 0, in units of the counts. Where counts are far below it, weights are in proportion
        to them; far above it, a factor on a count only adds to its weight.

    Attributes
    ----------
    n_features_in_ : int
        Number of items.
    feature_names_in_ : ndarray of str and shape (n_items,)
        Column names, where `fit` saw a DataFrame with string names.

    References
    ----------
    .. [1] Hu, Koren, Volinsky. Collaborative filtering for implicit feedback datasets. ICDM 2008.
       Equation (6), without its ``1 + alpha``: `alpha` is a parameter of the model.

    Examples
    --------
    >>> from scipy.sparse import csr_array
    >>> LogWeighting().fit_transform(csr_array([[1.0, 0.0, 7.0]])).data.round(2).tolist()
    [0.69, 2.08]
    """

    _takes_negatives = True

    def __init__(self, epsilon: float = 1.0) -> None:
        self.epsilon = epsilon

    def _check_parameters(self) -> None:
        _check("epsilon", self.epsilon, 0, np.inf, is_open=True)

    def _weigh(self, rows: Any) -> np.ndarray:
        return np.sign(rows.data) * np.log1p(np.abs(rows.data) / self.epsilon)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags


class TfidfWeighting(_Weighting):
    """``sqrt(x) * idf``: entries of users with many items say less.

    ``idf = log(n_items) - log(1 + n)`` for a user with n entries, as in
    ``implicit.nearest_neighbours.tfidf_weight``, to which items are documents and users are terms:
    the result equals ``tfidf_weight(X.T).T``. It is below zero for a user of all items.

    Attributes
    ----------
    n_features_in_ : int
        Number of items.
    feature_names_in_ : ndarray of str and shape (n_items,)
        Column names, where `fit` saw a DataFrame with string names.

    Examples
    --------
    >>> from scipy.sparse import csr_array
    >>> counts = csr_array([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    >>> TfidfWeighting().fit_transform(counts).data.round(2).tolist()
    [1.39, 0.29, 0.29]
    """

    def _weigh(self, rows: Any) -> np.ndarray:
        return np.sqrt(rows.data) * _idf(rows)


class BM25Weighting(_Weighting):
    """Okapi BM25: counts saturate, sooner for popular items; users with many items say less.

    An entry x of a user with n entries for an item becomes
    ``(K1 + 1) x / (K1 length + x) * (log(n_items) - log(1 + n))`` with
    ``length = 1 - B + B s / mean(s)``, s being the sum of the item's column in `fit`. This is
    ``implicit.nearest_neighbours.bm25_weight``, to which items are documents and users are terms:
    the result equals ``bm25_weight(X.T, K1, B).T`` where X is what `fit` saw. It is below zero
    for a user of all items.

    Parameters
    ----------
    K1 : float, default=100
        At least 0. Count at which the weight of an item of mean length is half of its limit.
    B : float, default=0.8
        From 0 (popularity does not matter) to 1.

    Attributes
    ----------
    length_ : ndarray of shape (n_items,)
        float64; length of each item, 1 for one of the mean sum.
    n_features_in_ : int
        Number of items.
    feature_names_in_ : ndarray of str and shape (n_items,)
        Column names, where `fit` saw a DataFrame with string names.

    References
    ----------
    .. [1] Robertson, Zaragoza. The probabilistic relevance framework: BM25 and beyond. 2009.

    Examples
    --------
    >>> from scipy.sparse import csr_array
    >>> counts = csr_array([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    >>> BM25Weighting(K1=1.2, B=0.5).fit_transform(counts).data.round(2).tolist()
    [0.92, 0.18, 0.32]
    """

    def __init__(self, K1: float = 100, B: float = 0.8) -> None:
        self.K1 = K1
        self.B = B

    def _check_parameters(self) -> None:
        _check("K1", self.K1, 0, np.inf)
        _check("B", self.B, 0, 1)

    def _learn(self, rows: Any) -> None:
        sums = np.bincount(rows.indices, weights=rows.data, minlength=rows.shape[1])
        mean = sums.mean()
        self.length_ = (1.0 - self.B) + self.B * sums / (mean if mean else 1.0)

    def _weigh(self, rows: Any) -> np.ndarray:
        limit = self.K1 * self.length_[rows.indices] + rows.data
        # a stored zero of an item of length 0 would be 0 / 0
        share = np.divide(rows.data, limit, out=np.zeros_like(limit), where=limit > 0)
        return (self.K1 + 1.0) * share * _idf(rows)


def _idf(rows: Any) -> np.ndarray:
    """Inverse document frequency of the row of each stored value, items being documents."""
    counts = np.diff(rows.indptr)
    return np.repeat(np.log(rows.shape[1]) - np.log1p(counts), counts)


def _check(name: str, value: Any, low: float, high: float, *, is_open: bool = False) -> None:
    fits = isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(float(value))
    if not fits or not low <= float(value) <= high or (is_open and value == low):
        span = f"a finite number above {low}" if is_open else f"a finite number of at least {low}"
        bound = f" and at most {high}" if np.isfinite(high) else ""
        raise ValueError(f"{name} must be {span}{bound}, got {value!r}")
