"""Confidence weighting: scikit-learn transformers that turn counts into weights for a model."""

from __future__ import annotations

import copy
from numbers import Real
from typing import Any, Self

import numpy as np
from scipy import sparse
from sklearn import get_config
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from tpu_als.host import require_memory
from tpu_als.validation import structure
from tpu_als.validation.refusals import refuse_misplaced, require_finite
from tpu_als.validation.structure import SparseMatrix

__all__ = ["BM25Weighting", "LogWeighting", "TfidfWeighting"]


class _Weighting(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Base class: a weight depends on a value, its row, and what `fit` learnt of its column."""

    _takes_negatives = False
    _n_known: int | None = None  # columns of which something is learnt; None if nothing is
    _scales = ""  # parameters that may cause weights beyond the range of the dtype

    def fit(self, X: Any, y: object = None) -> Self:
        """Learn the values that `transform` needs from a matrix of users by items.

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
            For an object meant for another function, such as a table of events.
        ValueError
            For parameters out of range, values that are not finite, and negative values (except in
            `LogWeighting`).
        """
        self._check_parameters()
        refuse_misplaced(X)
        X = structure.checked(X, "X", widen=True)
        self._learn(self._csr(validate_data(self, X, reset=True, **_ACCEPTED)))
        return self

    def transform(self, X: Any) -> Any:
        """Weight new or known rows, each independently.

        Parameters
        ----------
        X : csr_matrix, csr_array or array-like of shape (n_rows, n_items)
            As in `fit`. It is not modified. In `LogWeighting` and `TfidfWeighting`, which learn
            nothing per column, a matrix without column names may have additional columns for new
            items.

        Returns
        -------
        csr_matrix, csr_array or ndarray of shape (n_rows, n_items)
            Of the same type as X (other sparse formats become CSR) and with the same stored
            entries; float64 for float64 input, else float32.

        Raises
        ------
        TypeError, ValueError
            As in `fit`. A ValueError also for another number of columns, for parameters that give
            weights beyond the range of the dtype, and for a sparse matrix if `set_output` or
            scikit-learn's configuration asks for frames of pandas or polars.
        """
        check_is_fitted(self)
        self._check_parameters()
        refuse_misplaced(X)
        self._refuse_frames_of_sparse(X)
        accepted = self._later(structure.checked(X, "X", widen=True))
        weighted = self._csr(accepted)
        with np.errstate(all="ignore"):
            values = self._weigh(weighted).astype(accepted.dtype, copy=False)
        self._check_range(weighted.data, values)
        weighted.data = values
        return weighted if sparse.issparse(accepted) else weighted.toarray()

    def _refuse_frames_of_sparse(self, X: object) -> None:
        """Raise ValueError for a sparse matrix if `set_output` asks for a frame."""
        config = getattr(self, "_sklearn_output_config", {})
        chosen = config.get("transform", get_config()["transform_output"])
        if sparse.issparse(X) and chosen != "default":
            raise ValueError(
                f"{chosen.capitalize()} output does not support sparse data, and "
                f"{type(self).__name__} keeps a sparse matrix sparse. Call "
                'set_output(transform="default") of this transformer, after set_output of its '
                "Pipeline; or use a tpu_als.RecommenderPipeline, whose set_output changes the last "
                "step only; or pass a dense array"
            )

    def _later(self, X: Any) -> Any:
        """Validate the input of `transform`."""
        accepted = check_array(X, input_name="X", estimator=self, **_ACCEPTED)
        n_fitted, n = getattr(self, "n_features_in_", accepted.shape[1]), accepted.shape[1]
        n_known = self._n_known
        if n_known is not None and n > n_known and not hasattr(X, "columns"):
            raise ValueError(
                f"X has {n} features, but {type(self).__name__} is expecting {n_known} features "
                "as input, because it learns the popularity of each item: fit again on a matrix "
                f"with the new items, call with_items, or pass X[:, :{n_known}]"
            )
        # Check the names and number of columns; scikit-learn checks the number with ensure_2d only.
        validate_data(self, X, reset=False, skip_check_array=True, ensure_2d=n <= n_fitted)
        return accepted

    def _check_range(self, counts: np.ndarray, weights: np.ndarray) -> None:
        """Raise ValueError for weights beyond the dtype's range, or rounded to zero."""
        wrong = np.flatnonzero(~np.isfinite(weights) | self._vanishes(counts, weights))
        if len(wrong):
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._scales.split())
            raise ValueError(
                f"{given} gives a weight of {weights[wrong[0]]} to a count of {counts[wrong[0]]} "
                f"in {weights.dtype}: choose parameters closer to the counts"
                + ("" if weights.dtype == np.float64 else ", or pass the counts as float64")
            )

    def _vanishes(self, counts: np.ndarray, weights: np.ndarray) -> bool | np.ndarray:
        """Whether the weight of a nonzero count was rounded to zero."""
        return False

    def _csr(self, accepted: Any) -> sparse.csr_matrix:
        """Canonical copy of validated input."""
        rows = accepted.copy() if sparse.issparse(accepted) else sparse.csr_matrix(accepted)
        rows.sum_duplicates()
        require_finite(rows, rows.data)
        if not self._takes_negatives and rows.nnz and rows.data.min() < 0:
            # the wording that scikit-learn's checks expect
            raise ValueError(f"Negative values in data passed to {type(self).__name__}")
        return rows

    def _check_parameters(self) -> None:
        """Raise ValueError for a parameter out of range."""

    def _learn(self, rows: SparseMatrix) -> None:
        """Set the values that are learnt from the columns."""

    def _weigh(self, rows: SparseMatrix) -> np.ndarray:
        """Weights of the stored values."""
        raise NotImplementedError

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = not self._takes_negatives
        tags.transformer_tags.preserves_dtype = ["float32", "float64"]
        return tags


# `_csr` checks for finite values, after duplicates are summed.
_ACCEPTED: dict[str, Any] = dict(
    accept_sparse="csr", dtype=[np.float32, np.float64], ensure_all_finite=False
)
_EMPTY = {"ensure_min_samples": 0}


class LogWeighting(_Weighting):
    """``log(1 + x / epsilon)``: confidence grows with a count, but less than in proportion.

    The formula is that of [1]_. Negative values, which are dislikes in the "implicit" objective,
    stay negative: ``-log(1 - x / epsilon)``.

    Parameters
    ----------
    epsilon : float, default=1.0
        Above 0, in units of the counts. The weight is proportional to the count for counts far
        below it, and logarithmic for counts far above it.

    Attributes
    ----------
    n_features_in_ : int
        Number of items.
    feature_names_in_ : ndarray of str and shape (n_items,)
        Column names, if `fit` was given a DataFrame with string names.

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

    def _weigh(self, rows: SparseMatrix) -> np.ndarray:
        return np.sign(rows.data) * np.log1p(np.abs(rows.data) / self.epsilon)

    def _vanishes(self, counts: np.ndarray, weights: np.ndarray) -> bool | np.ndarray:
        return (weights == 0) & (counts != 0)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        return tags


class TfidfWeighting(_Weighting):
    """``sqrt(x) * idf``: entries of users with many items get smaller weights.

    ``idf = log(n_items) - log(1 + n)`` for a user with n entries. In
    ``implicit.nearest_neighbours.tfidf_weight`` items are documents and users are terms: the result
    equals ``tfidf_weight(X.T).T``. It is negative for a user with all items. `n_items` is always
    that of `fit`, also if a later matrix has more columns, so a user's weights do not change when
    the catalogue grows.

    Attributes
    ----------
    n_features_in_ : int
        Number of items, the `n_items` of the formula.
    feature_names_in_ : ndarray of str and shape (n_items,)
        Column names, if `fit` was given a DataFrame with string names.

    Examples
    --------
    >>> from scipy.sparse import csr_array
    >>> counts = csr_array([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    >>> TfidfWeighting().fit_transform(counts).data.round(2).tolist()
    [1.39, 0.29, 0.29]
    """

    def _weigh(self, rows: SparseMatrix) -> np.ndarray:
        return np.sqrt(rows.data) * _idf(rows, self.n_features_in_)


class BM25Weighting(_Weighting):
    """Okapi BM25: weights saturate, and are smaller for popular items and users with many items.

    An entry x of a user with n entries for an item becomes
    ``(K1 + 1) x / (K1 length + x) * (log(n_items) - log(1 + n))`` with
    ``length = 1 - B + B s / mean(s)``, s being the sum of the item's column in `fit`. This is
    ``implicit.nearest_neighbours.bm25_weight``, in which items are documents and users are terms:
    for the X of `fit` the result equals ``bm25_weight(X.T, K1, B).T``. It is negative for a user
    with all items. The length of each item is learnt, so a later matrix with more columns is an
    error, unless `with_items` has added the lengths of new items. `n_items` stays that of `fit`.

    Parameters
    ----------
    K1 : float, default=100
        At least 0. Count at which the weight of an item of mean length is half of its limit.
    B : float, default=0.8
        From 0 (popularity does not matter) to 1.

    Attributes
    ----------
    length_ : ndarray of shape (n_items,)
        float64; length of each item, 1 for an item whose sum is the mean. Longer after
        `with_items`.
    mean_ : float
        Mean of the sums of the columns in `fit`; 1 if all are 0.
    n_features_in_ : int
        Number of items in `fit`.
    feature_names_in_ : ndarray of str and shape (n_items,)
        Column names, if `fit` was given a DataFrame with string names.

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

    _scales = "K1 B"

    def __init__(self, K1: float = 100, B: float = 0.8) -> None:
        self.K1 = K1
        self.B = B

    def _check_parameters(self) -> None:
        _check("K1", self.K1, 0, np.inf)
        _check("B", self.B, 0, 1)

    def _learn(self, rows: SparseMatrix) -> None:
        n_items = rows.shape[1]
        require_memory(
            {f"sums and lengths of {n_items} items": 24 * n_items},
            "number the items from 0 on, without gaps",
        )
        sums = np.bincount(rows.indices, weights=rows.data, minlength=n_items)
        self.mean_ = float(sums.mean()) or 1.0
        self.length_ = self._lengths(sums)

    def _lengths(self, sums: np.ndarray) -> np.ndarray:
        return (1.0 - self.B) + self.B * sums / self.mean_

    @property
    def _n_known(self) -> int | None:  # type: ignore[override]
        return len(self.length_)

    def with_items(self, X: Any, items: Any) -> Self:
        """A copy that also knows new items. Those of `fit` keep their lengths.

        Parameters
        ----------
        X : csr_matrix, csr_array or array-like of shape (n_rows, n_all_items)
            Counts of all users who have some of the new items, with at least as many columns as
            are known.
        items : array-like of int and shape (m,)
            New columns. Their lengths are computed from their sums in X and the mean of `fit`, and
            replace those of an earlier call. New columns of X that are not listed get the length of
            an item without counts. Items of `fit` are an error.

        Returns
        -------
        BM25Weighting
            The copy, or `self` if there is nothing new. `self` does not change.

        Raises
        ------
        TypeError, ValueError
            As in `fit`; a ValueError also for items out of range, and for too few columns.
        """
        check_is_fitted(self)
        self._check_parameters()
        refuse_misplaced(X)
        X = structure.checked(X, "X", widen=True)
        rows = self._csr(check_array(X, input_name="X", estimator=self, **_ACCEPTED, **_EMPTY))
        at, n_known, n_items = np.asarray(items, np.int64), len(self.length_), rows.shape[1]
        if not at.size and n_items == n_known:
            return self
        if not hasattr(self, "mean_"):
            raise ValueError("mean_ is missing, as in a file of an earlier version: fit again")
        if n_items < n_known or (at.size and not self.n_features_in_ <= at.min()):
            raise ValueError(
                f"X must have at least the {n_known} known items, and items must be from "
                f"{self.n_features_in_} on, got {n_items} columns and items {at.tolist()!r:.60}"
            )
        if at.size and at.max() >= n_items:
            raise ValueError(f"items must be below {n_items}, got {at.max()}")
        sums = np.bincount(rows.indices, weights=rows.data, minlength=n_items)
        made = copy.copy(self)
        lengths = self._lengths(np.zeros(n_items))
        lengths[:n_known], lengths[at] = self.length_, self._lengths(sums[at])
        made.length_ = lengths
        return made

    def _weigh(self, rows: SparseMatrix) -> np.ndarray:
        limit = self.K1 * self.length_[rows.indices] + rows.data
        # a stored zero of an item of length 0 would be 0 / 0
        share = np.divide(rows.data, limit, out=np.zeros_like(limit), where=limit > 0)
        weights = (self.K1 + 1.0) * share * _idf(rows, self.n_features_in_)
        weights[np.isinf(limit)] = np.inf  # not 0, so that `_check_range` detects it
        return weights


def _idf(rows: SparseMatrix, n_items: int) -> np.ndarray:
    """Inverse document frequency of each stored value's row; documents are items."""
    counts = np.diff(rows.indptr)
    return np.repeat(np.log(n_items) - np.log1p(counts), counts)


def _check(name: str, value: Any, low: float, high: float, *, is_open: bool = False) -> None:
    fits = isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(float(value))
    if not fits or not low <= float(value) <= high or (is_open and value == low):
        span = f"a finite number above {low}" if is_open else f"a finite number of at least {low}"
        bound = f" and at most {high}" if np.isfinite(high) else ""
        raise ValueError(f"{name} must be {span}{bound}, got {value!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
