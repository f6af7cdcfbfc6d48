"""Ranking metrics of a model, and scorers for scikit-learn's searches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from tpu_als import host
from tpu_als.evaluation import holdout, inputs
from tpu_als.evaluation.metrics import METRICS, metrics_of_rankings, popularity_of
from tpu_als.validation import arguments
from tpu_als.validation.refusals import IF_EVENTS, require_matrix

_BATCH = 1024
_BYTES_PER_ID = 64  # of ids, hits, misses and their cumulative sums


def ranking_metrics_at_k(
    model: Any,
    train_user_items: sparse.spmatrix | sparse.sparray,
    test_user_items: sparse.spmatrix | sparse.sparray,
    K: int = 10,
    show_progress: bool = False,
    num_threads: int = 0,
    *,
    items: ArrayLike | None = None,
) -> dict[str, float]:
    """Rank items for every user with positive test entries; return metrics.

    Parameters
    ----------
    model : object
        Any model with ``recommend(userids, user_items, N)``; with `items`, also with its parameter
        ``items``.
    train_user_items : csr_matrix of shape (n_users, n_items)
        Known items of the users, which are excluded from the ranking.
    test_user_items : csr_matrix of shape (n_users, n_items)
        Positive entries are relevant. If both matrices have fewer columns than the model has items,
        ranked items beyond them are misses. They may have more columns: test entries of items
        unknown to the model cannot be hits. Train entries of such items are passed to the model;
        the models of this package then raise ValueError.
    K : int, default=10
        Length of the ranking. Shorter rankings are padded with ids that are not hits.
    show_progress, num_threads
        Ignored; parameters of implicit's function.
    items : array-like of int, or mask of bool, optional
        Columns of the matrices. Only these items are ranked, and only their test entries are
        relevant. The metrics are those of matrices that have only these columns, such as those of
        `cold_item_split`.

    Returns
    -------
    dict of str to float
        See `metrics_of_rankings`. The catalogue is the items of the model, or the columns of the
        matrices if there are more of them; with `items`, it is these items.

    Raises
    ------
    TypeError
        For an object that is not a matrix.
    ValueError
        For NaN or infinity, matrices of different shapes, no `items`, rankings of another shape, or
        rankings with ids that are not in `items`.
    IndexError
        For `items` that are not columns of the matrices.

    Warns
    -----
    DataWarning
        If positive test entries are also stored in the train matrix, with their number: they are
        excluded from the ranking, and lower the metrics.
    """
    del show_progress, num_threads
    K = inputs.integer("K", K)
    train = holdout.canonical(train_user_items, "train_user_items")
    test = holdout.relevant(test_user_items, "test_user_items")
    if train.shape != test.shape:
        raise ValueError(f"train has shape {train.shape}, but test {test.shape}")
    chosen = candidates(items, test.shape[1])
    test = within(test, chosen)
    users = np.flatnonzero(np.diff(test.indptr))
    ids = ranked_ids(model, train, users, K, chosen)
    known, n_items = within(train, chosen), catalogue_of(model) if chosen is None else None
    likes, n_users = popularity_of(known), max(train.shape[0], 1)
    return metrics_of_rankings(ids, test[users], likes, n_users, n_items, known[users])


def candidates(items: ArrayLike | None, n_columns: int) -> np.ndarray | None:
    """Check `items` of `ranking_metrics_at_k`; distinct ids, ascending, or None."""
    if items is None:
        return None
    given, _, mask = arguments.ids_of(items, None, "items")
    if mask is not None and len(mask) != n_columns:
        raise IndexError(
            f"items must be ids, or a mask with {n_columns} values, got {len(mask)} values"
        )
    chosen = np.unique(given)
    if not len(chosen):
        raise ValueError("items must hold at least one id, got none: pass None to rank all items")
    if chosen[0] < 0 or chosen[-1] >= n_columns:
        raise IndexError(
            f"items must be columns of the matrices, 0 to {n_columns - 1}, got "
            f"{chosen[0] if chosen[0] < 0 else chosen[-1]}"
        )
    return chosen


def within(matrix: sparse.csr_matrix, chosen: np.ndarray | None) -> sparse.csr_matrix:
    """The chosen columns of a matrix; None means all."""
    return matrix if chosen is None else matrix[:, chosen]


def ranked_ids(
    model: Any,
    train: sparse.csr_matrix,
    users: np.ndarray,
    k: int,
    chosen: np.ndarray | None = None,
) -> np.ndarray:
    """Rank k items for each of some users, in batches.

    Parameters
    ----------
    model : object
        Any model with ``recommend(userids, user_items, N)``.
    train : csr_matrix of shape (n_users, n_items)
        Known items of all users.
    users : ndarray of int and shape (n,)
        The users.
    k : int
        Length of the rankings.
    chosen : ndarray of int and shape (m,), optional
        Rank only these items; distinct and ascending.

    Returns
    -------
    ndarray of int64 and shape (n, k)
        -1 for missing results. With `chosen`, positions in it instead of ids.

    Raises
    ------
    ValueError
        If the model returns ids of another shape or dtype, or ids that are not in `chosen`.
    """
    _require_memory(len(users), k)
    ids = np.full((len(users), k), -1, np.int64)
    n, options = (k, {}) if chosen is None else (min(k, len(chosen)), {"items": chosen})
    for low in range(0, len(users), _BATCH):
        batch = users[low : low + _BATCH]
        ranked = model.recommend(batch, train[batch], N=n, **options)[0]
        ids[low : low + _BATCH] = _rankings(ranked, len(batch), k)
    return ids if chosen is None else _positions(ids, chosen)


def _positions(ids: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Positions of ranked ids (n, k) among the chosen items; -1 where there is no result."""
    at = np.minimum(np.searchsorted(chosen, ids), len(chosen) - 1)
    wrong = ids[(chosen[at] != ids) & (ids >= 0)]
    if len(wrong):
        raise ValueError(
            f"recommend(userids, user_items, N, items=items) must return ids that are in items, "
            f"got {wrong[0]} ({len(wrong)} of {(ids >= 0).sum()} ids are not)"
        )
    return np.where(ids >= 0, at, -1)


def _require_memory(n_rows: int, k: int) -> None:
    """Raise MemoryError if there is not enough memory for metrics of (n_rows, k) ids."""
    parts = {f"metrics of {n_rows} rankings of {k} ids": _BYTES_PER_ID * n_rows * k}
    host.require_memory(parts, "measure fewer users, or lower K (k of a scorer)")


def _rankings(ids: ArrayLike, n_rows: int, k: int) -> np.ndarray:
    """Check the ids that a model recommends, and pad them to (n_rows, k) with -1."""
    array = np.asarray(ids)
    if array.ndim != 2 or len(array) != n_rows or not holdout.are_ids(array):
        raise ValueError(
            f"recommend(userids, user_items, N={k}) must return ids as integers of shape "
            f"({n_rows}, {k}) for {n_rows} users, got shape {array.shape} of {array.dtype}"
        )
    filled = np.full((n_rows, k), -1, np.int64)
    filled[:, : array.shape[1]] = array[:, :k]
    return filled


def catalogue_of(model: Any) -> int | None:
    """Number of items of a model, if it is known, without copying the table from the devices."""
    count = getattr(model, "n_features_in_", None)
    if count is None:
        shape: Any = getattr(getattr(model, "item_factors", None), "shape", None)
        count = shape[0] if shape else None
    return None if count is None else int(count)


def _metric_at_k(name: str) -> Callable[..., float]:
    def metric(
        model: Any,
        train_user_items: sparse.spmatrix | sparse.sparray,
        test_user_items: sparse.spmatrix | sparse.sparray,
        K: int = 10,
        show_progress: bool = False,
        num_threads: int = 0,
    ) -> float:
        del show_progress, num_threads
        return ranking_metrics_at_k(model, train_user_items, test_user_items, K)[name]

    metric.__doc__ = f'The "{name}" of `ranking_metrics_at_k`.'
    return metric


precision_at_k = _metric_at_k("precision")
mean_average_precision_at_k = _metric_at_k("map")
ndcg_at_k = _metric_at_k("ndcg")
AUC_at_k = _metric_at_k("auc")
recall_at_k = _metric_at_k("recall")
hit_rate_at_k = _metric_at_k("hit_rate")
mrr_at_k = _metric_at_k("mrr")
coverage_at_k = _metric_at_k("coverage")
novelty_at_k = _metric_at_k("novelty")
recall_full_at_k = _metric_at_k("recall_full")
precision_full_at_k = _metric_at_k("precision_full")
mean_average_precision_full_at_k = _metric_at_k("map_full")
AUC_unseen_at_k = _metric_at_k("auc_unseen")


class make_ranking_scorer:  # noqa: N801  (named as scikit-learn names its scorer factories)
    """Scorer for ``GridSearchCV(scoring=...)`` by strong generalisation.

    A fixed fifth of each row's positive entries is hidden, the rest is folded in, and the hidden
    ones are ranked among all items not folded in, as in the estimator's own `score`. Works for a
    model and for a Pipeline that ends in one, whose earlier steps transform the entries to fold in.
    The column names of a DataFrame are checked as in `score`, and passed to those steps.

    Parameters
    ----------
    metric : str
        One of `METRICS`. "novelty" uses the model's ``item_popularity_`` if it has that attribute,
        and otherwise the popularity in the given rows.
    k : int, default=10
        Length of the ranking.
    """

    def __init__(self, metric: str, k: int = 10) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
        self.metric, self.k = metric, inputs.integer("k", k)

    def __call__(self, estimator: Any, X: object, y: object = None) -> float:
        """Score a fitted estimator on new or known rows.

        Parameters
        ----------
        estimator : object
            A fitted model, or a Pipeline that ends in one.
        X : csr_matrix, csr_array, array or DataFrame of shape (n_rows, n_items)
            Rows; a matrix may have fewer columns than the model has items.
        y : None
            Ignored.

        Returns
        -------
        float
            NaN, with an UndefinedMetricWarning, if no row has two positive entries.

        Raises
        ------
        TypeError
            For an object that is not a matrix, such as a table of events.
        ValueError
            For NaN or infinity, or columns that are not the model's.
        """
        _check_frame(estimator, X)
        visible, hidden, _ = holdout.for_scoring(arguments.canonical_csr(X))
        model, known = estimator, visible
        if hasattr(X, "columns"):  # the steps, or the model, compare the order of the columns
            known = pd.DataFrame(visible.toarray(), columns=X.columns)
        if hasattr(estimator, "steps"):
            model = estimator[-1]
            known = estimator[:-1].transform(known) if len(estimator.steps) > 1 else known
        if hasattr(known, "columns") and isinstance(model, BaseEstimator):
            validate_data(model, known, reset=False, skip_check_array=True)
        if not visible.shape[0]:
            holdout.warn_of_undefined(self.metric)
            return float("nan")
        known, users = sparse.csr_matrix(known), np.arange(visible.shape[0])
        _require_memory(len(users), self.k)
        ids, _ = model.recommend(users, known, N=self.k, recalculate_user=True)
        ranked = _rankings(ids, len(users), self.k)
        likes, n_users = None, None
        if self.metric == "novelty":
            likes, n_users = _popularity_of_fit(model, visible)
        found = metrics_of_rankings(ranked, hidden, likes, n_users, catalogue_of(model), visible)
        return found[self.metric]


def _check_frame(estimator: Any, X: object) -> None:
    """Raise an error for objects that are not a matrix, and frames of another width."""
    require_matrix(X)
    expected = getattr(estimator, "n_features_in_", None)
    if hasattr(X, "columns") and expected is not None and len(X.columns) != expected:
        raise ValueError(
            f"X must have users as rows and the {expected} items of fit as columns, got "
            f"{len(X.columns)} columns: {IF_EVENTS}"
        )


def _popularity_of_fit(model: Any, rows: sparse.csr_matrix) -> tuple[np.ndarray, int]:
    """Return how many users like each item (n_items,), and how many users there are.

    Both are those of the data of `fit`, if the model has them, and otherwise those of `rows`.
    """
    popularity = getattr(model, "item_popularity_", None)
    if popularity is None:
        return popularity_of(rows), rows.shape[0]
    return popularity, max(model.user_factors.shape[0], int(np.max(popularity, initial=1)))
