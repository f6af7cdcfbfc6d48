"""Confidence weighting: what a count says, as scikit-learn transformers in front of a model."""

from __future__ import annotations

from numbers import Real
from typing import Any, Self

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from . import structure
from .refusals import refuse_misplaced, require_finite


class _Weighting(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """A function of each stored value, its row and what `fit` learnt of its column."""

    _takes_negatives = False
    _learns_columns = False
    _scales = ""  # the parameters that may take weights out of the range of the dtype

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
        TypeError
            For an object that belongs to another call, such as a table of events.
        ValueError
            For parameters out of range, values that are not finite, and, but for `LogWeighting`,
            negative values.
        """
        self._check_parameters()
        refuse_misplaced(X)
        X = structure.checked(X, "X", widen=True)
        self._learn(self._csr(validate_data(self, X, reset=True, **_ACCEPTED)))
        return self

    def transform(self, X: Any) -> Any:
        """Weight rows, seen in `fit` or not, each on its own.

        Parameters
        ----------
        X : csr_matrix, csr_array or array-like of shape (n_rows, n_items)
            As in `fit`. It is not changed. A matrix without column names may have more columns,
            of items that are new since `fit`, where nothing is learnt of a column: in
            `LogWeighting` and `TfidfWeighting`.

        Returns
        -------
        csr_matrix, csr_array or ndarray of shape (n_rows, n_items)
            Of the kind of X (other sparse formats become CSR) and with the same stored entries;
            float64 for float64 input, else float32.

        Raises
        ------
        TypeError, ValueError
            As `fit`; and a ValueError for another number of columns, and for parameters that give
            weights beyond the range of the dtype.
        """
        check_is_fitted(self)
        self._check_parameters()
        refuse_misplaced(X)
        accepted = self._later(structure.checked(X, "X", widen=True))
        weighted = self._csr(accepted)
        with np.errstate(all="ignore"):
            values = self._weigh(weighted).astype(accepted.dtype, copy=False)
        self._check_range(weighted.data, values)
        weighted.data = values
        return weighted if sparse.issparse(accepted) else weighted.toarray()

    def _later(self, X: Any) -> Any:
        """Validate what `transform` takes."""
        accepted = check_array(X, input_name="X", estimator=self, **_ACCEPTED)
        n_fitted, n = getattr(self, "n_features_in_", accepted.shape[1]), accepted.shape[1]
        if n > n_fitted and self._learns_columns and not hasattr(X, "columns"):
            raise ValueError(
                f"X has {n} features, but {type(self).__name__} is expecting {n_fitted} features "
                "as input, as it learns the popularity of each item: fit again on a matrix with "
                f"the new items, or pass X[:, :{n_fitted}]"
            )
        # Names of columns, and their number; scikit-learn counts columns where it asks for 2-D.
        validate_data(self, X, reset=False, skip_check_array=True, ensure_2d=n <= n_fitted)
        return accepted

    def _check_range(self, counts: np.ndarray, weights: np.ndarray) -> None:
        """Raise ValueError for weights beyond the dtype, or that it rounds to zero."""
        wrong = np.flatnonzero(~np.isfinite(weights) | self._vanishes(counts, weights))
        if len(wrong):
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._scales.split())
            raise ValueError(
                f"{given} gives a weight of {weights[wrong[0]]} to a count of {counts[wrong[0]]} "
                f"in {weights.dtype}: choose parameters nearer to the counts"
                + ("" if weights.dtype == np.float64 else ", or pass the counts as float64")
            )

    def _vanishes(self, counts: np.ndarray, weights: np.ndarray) -> Any:
        """Whether a count lost its weight to rounding."""
        return False

    def _csr(self, accepted: Any) -> Any:
        """Canonical copy of validated input."""
        rows = accepted.copy() if sparse.issparse(accepted) else sparse.csr_matrix(accepted)
        rows.sum_duplicates()
        require_finite(rows, rows.data)
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


# Finite values are checked after duplicates are summed, with a message of our own.
_ACCEPTED: dict[str, Any] = dict(
    accept_sparse="csr", dtype=[np.float32, np.float64], ensure_all_finite=False
)


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
    _scales = "epsilon"

    def __init__(self, epsilon: float = 1.0) -> None:
        self.epsilon = epsilon

    def _check_parameters(self) -> None:
        _check("epsilon", self.epsilon, 0, np.inf, is_open=True)

    def _weigh(self, rows: Any) -> np.ndarray:
        return np.sign(rows.data) * np.log1p(np.abs(rows.data) / self.epsilon)

    def _vanishes(self, counts: np.ndarray, weights: np.ndarray) -> Any:
        return (weights == 0) & (counts != 0)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags


class TfidfWeighting(_Weighting):
    """``sqrt(x) * idf``: entries of users with many items say less.

    ``idf = log(n_items) - log(1 + n)`` for a user with n entries, as in
    ``implicit.nearest_neighbours.tfidf_weight``, to which items are documents and users are terms:
    the result equals ``tfidf_weight(X.T).T``. It is below zero for a user of all items. `n_items`
    is that of `fit`, also for a later matrix with more columns, so that a user's weights do not
    change because the catalogue grew.

    Attributes
    ----------
    n_features_in_ : int
        Number of items, the `n_items` of the formula.
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
        return np.sqrt(rows.data) * _idf(rows, self.n_features_in_)


class BM25Weighting(_Weighting):
    """Okapi BM25: counts saturate, sooner for popular items; users with many items say less.

    An entry x of a user with n entries for an item becomes
    ``(K1 + 1) x / (K1 length + x) * (log(n_items) - log(1 + n))`` with
    ``length = 1 - B + B s / mean(s)``, s being the sum of the item's column in `fit`. This is
    ``implicit.nearest_neighbours.bm25_weight``, to which items are documents and users are terms:
    the result equals ``bm25_weight(X.T, K1, B).T`` where X is what `fit` saw. It is below zero
    for a user of all items. The length of each item is learnt, so a later matrix with more columns
    is an error: fit again.

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

    _learns_columns = True
    _scales = "K1 B"

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
        weights = (self.K1 + 1.0) * share * _idf(rows, self.n_features_in_)
        weights[np.isinf(limit)] = np.inf  # not 0, so that it is seen
        return weights


def _idf(rows: Any, n_items: int) -> np.ndarray:
    """Inverse document frequency of the row of each stored value, items being documents."""
    counts = np.diff(rows.indptr)
    return np.repeat(np.log(n_items) - np.log1p(counts), counts)


def _check(name: str, value: Any, low: float, high: float, *, is_open: bool = False) -> None:
    fits = isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(float(value))
    if not fits or not low <= float(value) <= high or (is_open and value == low):
        span = f"a finite number above {low}" if is_open else f"a finite number of at least {low}"
        bound = f" and at most {high}" if np.isfinite(high) else ""
        raise ValueError(f"{name} must be {span}{bound}, got {value!r}")
