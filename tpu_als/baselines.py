"""Recommenders without a model, to compare a model with."""

from __future__ import annotations

import copy
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils import metadata_routing
from sklearn.utils.validation import check_is_fitted, validate_data

from tpu_als.evaluation import holdout, splits
from tpu_als.evaluation.metrics import popularity_of
from tpu_als.validation import arguments, fractions
from tpu_als.validation.estimators import checked_rows
from tpu_als.validation.structure import SparseMatrix

__all__ = ["PopularityRecommender"]
_NO_ID = -1
_NO_SCORE = np.finfo(np.float32).min
_RESULTS_AT_ONCE = 1 << 16


class PopularityRecommender(BaseEstimator):
    """Recommends to every user the most popular items that the user does not have.

    The popularity of an item is the number of users with a positive entry for it. With a
    `half_life` recent entries count more: an entry counts ``0.5 ** (age / half_life)``, where its
    age is the time from it to the latest entry. This is the baseline to beat for a model.

    Parameters
    ----------
    half_life : float, default=None
        Age at which an entry counts half, in the unit of the timestamps. None counts all entries
        equally, and ignores timestamps.

    Attributes
    ----------
    popularity_ : ndarray of float32 and shape (n_items,)
        The scores.
    ranking_ : ndarray of int32 and shape (n_items,)
        All items, the most popular first. Of equally popular items, the smaller id is first.
    n_users_ : int
        Number of users.
    n_features_in_ : int
        Number of items.
    feature_names_in_ : ndarray of str and shape (n_items,)
        Column names, if `fit` was given a DataFrame with string names.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> plays = csr_matrix([[3, 1, 0, 0], [1, 4, 1, 0], [0, 0, 2, 5]])
    >>> model = PopularityRecommender().fit(plays)
    >>> ids, scores = model.recommend(0, plays[0], N=2)
    >>> ids.tolist(), scores.tolist()
    ([2, 3], [2.0, 1.0])
    """

    # The first argument of `fit` is not called X, so scikit-learn would take it for metadata.
    __metadata_request__fit = {  # noqa: RUF012
        "user_items": metadata_routing.UNUSED,
        "show_progress": metadata_routing.UNUSED,
    }

    def __init__(self, half_life: float | None = None) -> None:
        self.half_life = half_life

    def fit(
        self,
        user_items: Any,
        y: object = None,
        timestamps: SparseMatrix | None = None,
        show_progress: object = None,
    ) -> Self:
        """Count the users of each item.

        Parameters
        ----------
        user_items : csr_matrix, csr_array or array-like of shape (n_users, n_items)
            Positive entries count, whatever their value.
        y : None
            Ignored.
        timestamps : csr_matrix or csr_array with the same entries
            The time of each entry, as a number. Required with `half_life`. If an entry is stored
            twice, the later time is used. `datasets.interactions_from_frame` makes this matrix from
            the latest event of each user and item, with the day of the event as its value.
        show_progress : bool
            Ignored; a parameter of the `fit` of other models.

        Returns
        -------
        self

        Raises
        ------
        TypeError
            For an object that is not a matrix.
        ValueError
            For NaN or infinity, a `half_life` that is not a finite number above 0, or timestamps
            that are missing or have other entries. The object then stays as it was.
        """
        arguments.warn_if_converted(user_items)
        rows = checked_rows(copy.copy(self), user_items, "user_items", reset=True)
        if self.half_life is None:
            counts = popularity_of(rows)
        else:
            counts = self._recent(rows, timestamps)
        validate_data(self, user_items, reset=True, skip_check_array=True)
        self.popularity_ = counts.astype(np.float32)
        self.ranking_ = np.argsort(-self.popularity_, kind="stable").astype(np.int32)
        self.n_users_ = rows.shape[0]
        return self

    def recommend(
        self,
        userid: ArrayLike,
        user_items: SparseMatrix | None,
        N: int = 10,
        filter_already_liked_items: bool = True,
        filter_items: ArrayLike | None = None,
        recalculate_user: bool = False,
        items: ArrayLike | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Recommend the most popular items to a user or to several.

        The parameters and errors are those of `TPUAlternatingLeastSquares.recommend`.

        Parameters
        ----------
        userid : int or array-like of int
            A user or users.
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
            Accept users who were not in the data of `fit`.
        items : array-like of int, optional
            Rank these items only; N is then at most their number. Excludes `filter_items`.

        Returns
        -------
        ids : ndarray of int32 and shape (N,), or (n, N) for several users
            Best first. If a user has fewer than N candidates, -1 follows, with score -3.4e38.
        scores : ndarray of float32 and the same shape
            Popularity.

        Raises
        ------
        ValueError
            If the matrix is not CSR, does not have one row per user, or has entries of unknown
            items.
        IndexError
            For ids that were not in the data of `fit`.
        MemoryError
            If the results would not fit into the free memory; raised before any work.
        """
        n = arguments.result_count(N)
        arguments.flags(
            filter_already_liked_items=filter_already_liked_items,
            recalculate_user=recalculate_user,
        )
        check_is_fitted(self)
        n_items = len(self.popularity_)
        at, is_scalar, mask = arguments.ids_of(userid, None if recalculate_user else self.n_users_)
        rows = None
        if filter_already_liked_items or recalculate_user:
            rows = arguments.rows_for(user_items, len(at), n_items, mask=mask)
        names = ("items", "filter_items")
        chosen, excluded = arguments.selection(items, filter_items, n_items, names)
        n = n if chosen is None else min(n, len(chosen))
        arguments.require_results(len(at), n, n_items, np.float32)
        candidates = self._candidates(chosen, excluded)
        ids = _best(candidates, rows if filter_already_liked_items else None, len(at), n, n_items)
        scores = np.append(self.popularity_, _NO_SCORE)[ids]  # id -1 is the last
        return (ids[0], scores[0]) if is_scalar else (ids, scores)

    def score(self, X: Any, y: object = None) -> float:
        """Mean NDCG@10 of hidden items, as `TPUAlternatingLeastSquares.score` measures it.

        Parameters
        ----------
        X : csr_matrix, csr_array or array-like of shape (n_rows, n_items)
            Rows of known or new users.
        y : None
            Ignored.

        Returns
        -------
        float
            Between 0 and 1; NaN, with an UndefinedMetricWarning, if no row has two positive
            entries.
        """
        check_is_fitted(self)
        kept, hidden, _ = holdout.for_scoring(checked_rows(self, X, "X", reset=False))
        users = np.arange(kept.shape[0])
        ids, _ = self.recommend(users, kept, N=holdout.CUTOFF, recalculate_user=True)
        return holdout.mean_ndcg(ids, hidden)

    def _recent(self, rows: sparse.csr_matrix, timestamps: SparseMatrix | None) -> np.ndarray:
        """Sum over users of ``0.5 ** (age / half_life)`` for each item (n_items,)."""
        half_life: Any = self.half_life
        if not fractions.is_number(half_life) or half_life <= 0:
            raise ValueError(
                f"half_life must be None or a finite number above 0, got {half_life!r}"
            )
        if timestamps is None:
            raise ValueError(
                f"half_life={half_life} needs the time of each entry: pass fit(user_items, "
                "timestamps=...), a sparse matrix with the entries of user_items"
            )
        times = splits.times_of(rows, timestamps, np.maximum).astype(np.float64)
        if not np.isfinite(times).all():
            raise ValueError("timestamps must be finite")
        is_liked = rows.data > 0
        liked, times = rows.indices[is_liked], times[is_liked]
        with np.errstate(over="ignore"):
            ages = (times.max(initial=-np.inf) - times) / float(half_life)
        popularity_of(rows)  # checks the memory
        return np.bincount(liked, weights=0.5**ages, minlength=rows.shape[1])

    def _candidates(self, chosen: np.ndarray | None, excluded: np.ndarray | None) -> np.ndarray:
        """Items that may be recommended, best first."""
        if chosen is None and excluded is None:
            return self.ranking_
        is_candidate = np.full(len(self.ranking_), chosen is None)
        if chosen is not None:
            is_candidate[chosen] = True
        if excluded is not None:
            is_candidate[excluded] = False
        return self.ranking_[is_candidate[self.ranking_]]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def _best(
    candidates: np.ndarray, seen: sparse.csr_matrix | None, n_rows: int, n: int, n_items: int
) -> np.ndarray:
    """The first n candidates that each row has not seen (n_rows, n), int32; then -1."""
    padded = np.append(candidates, np.int32(_NO_ID))
    if seen is None or not seen.nnz:
        best = padded[np.minimum(np.arange(n), len(candidates))]
        return np.repeat(best[None], n_rows, axis=0)
    places = np.full(n_items, -1, np.int32)
    places[candidates] = np.arange(len(candidates))
    ids = np.empty((n_rows, n), np.int32)
    step = max(_RESULTS_AT_ONCE // max(n, 1), 1)
    for low in range(0, n_rows, step):
        unseen = _unseen(places, len(candidates), seen[low : low + step], n)
        ids[low : low + step] = padded[np.minimum(unseen, len(candidates))]
    return ids


def _unseen(places: np.ndarray, n_candidates: int, seen: sparse.csr_matrix, n: int) -> np.ndarray:
    """The first n places that each row has not seen (n_rows, n).

    If the sorted places that a row has seen are s_0, s_1, ..., there are s_j - j unseen places
    before s_j. So the unseen place number k is k plus the number of j with s_j - j <= k.

    Parameters
    ----------
    places : ndarray of int32 and shape (n_items,)
        Place of each item among the candidates; below 0 for other items.
    n_candidates : int
        Number of candidates.
    seen : csr_matrix of shape (n_rows, n_items)
        Canonical.
    n : int
        Number of places.
    """
    n_rows = seen.shape[0]
    lengths = np.diff(seen.indptr)
    row, at = np.repeat(np.arange(n_rows), lengths), places[seen.indices]
    matters = (at >= 0) & (at < n + lengths[row])  # no other place is among the results
    row, at = row[matters], at[matters]
    at = np.sort(row * np.int64(n_candidates) + at) - row * n_candidates  # sorted within rows
    starts = np.searchsorted(row, np.arange(n_rows))
    before = at - (np.arange(len(row)) - starts[row])
    is_near = before < n
    cells = row[is_near] * n + before[is_near]
    skipped = np.bincount(cells, minlength=n_rows * n).reshape(n_rows, n).cumsum(axis=1)
    return np.arange(n) + skipped


def __dir__() -> list[str]:
    return sorted(__all__)
