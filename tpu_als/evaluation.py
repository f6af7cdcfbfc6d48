"""Splits and ranking metrics, for any model that has implicit's `recommend`.

Names that implicit has mean what they mean there, and give its numbers. Splits are vectorised and
the same for the same seed; ids may have any integer dtype, and id -1 is never a hit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from tpu_als import holdout, validation

METRICS = (
    "precision", "map", "ndcg", "auc", "recall", "hit_rate", "mrr", "coverage", "novelty",
)  # fmt: skip
_BATCH = 1024


def train_test_split(
    ratings: Any, train_percentage: float = 0.8, random_state: Any = None
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split entries at random; those of the test part below 0 are dropped, as in implicit.

    Parameters
    ----------
    ratings : sparse matrix or array of shape (n_users, n_items)
        The entries.
    train_percentage : float, default=0.8
        Probability, from 0 to 1, that an entry goes to the train part; 1 leaves no test part.
    random_state : None, int, RandomState or Generator, default=None
        Seed. The split of an integer is implicit's.

    Returns
    -------
    train, test : csr_matrix of shape (n_users, n_items)
    """
    if not 0 <= train_percentage <= 1:
        raise ValueError(f"train_percentage must be from 0 to 1, got {train_percentage}")
    entries = sparse.coo_matrix(ratings)
    draws = validation.random_generator(random_state).random(len(entries.data))
    in_train = draws < train_percentage
    return _part(entries, in_train), _part(entries, ~in_train & (entries.data > 0))


def leave_k_out_split(
    ratings: Any, K: int = 1, train_only_size: float = 0.0, random_state: Any = None
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Hold out K entries of every user with more than K + 1; unlike implicit's, reproducible.

    Parameters
    ----------
    ratings : sparse matrix or array of shape (n_users, n_items)
        The entries.
    K : int, default=1
        Entries to hold out of a user.
    train_only_size : float, default=0.0
        Part of the users of whom nothing is held out.
    random_state : None, int, RandomState or Generator, default=None
        Seed.

    Returns
    -------
    train, test : csr_matrix of shape (n_users, n_items)
    """
    if K < 1:
        raise ValueError(f"K must be 1 or more, got {K}")
    if not 0 <= train_only_size < 1:
        raise ValueError(f"train_only_size must be at least 0 and below 1, got {train_only_size}")
    entries, rng = sparse.coo_matrix(ratings), validation.random_generator(random_state)
    counts = np.bincount(entries.row, minlength=entries.shape[0])
    tested = (counts > K + 1) & (rng.random(entries.shape[0]) >= train_only_size)
    order = np.argsort(entries.row + rng.random(entries.nnz), kind="stable")
    place = np.arange(entries.nnz) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(entries.nnz, bool)
    held[order[(place < K) & tested[entries.row[order]]]] = True
    return _part(entries, ~held), _part(entries, held & (entries.data > 0))


def strong_generalization_split(
    user_items: Any,
    test_users: float = 0.1,
    fold_in: float = 0.8,
    random_state: Any = None,
) -> tuple[sparse.csr_matrix, sparse.csr_matrix, sparse.csr_matrix]:
    """Split users into training ones and unseen ones, of whom a part of the entries is folded in.

    Parameters
    ----------
    user_items : sparse matrix or array of shape (n_users, n_items)
        The entries; one stored twice is summed.
    test_users : float, default=0.1
        Part of all users to hold out of training, from those with two positive entries or more.
    fold_in : float, default=0.8
        Part of each such user's positive entries to fold in; at least one is left to be found.
        Other entries are folded in.
    random_state : None, int, RandomState or Generator, default=None
        Seed.

    Returns
    -------
    train : csr_matrix of shape (n_users - n, n_items)
    visible, held_out : csr_matrix of shape (n, n_items)
        The entries to fold in, and those to rank, of the n unseen users.

    References
    ----------
    Liang, Krishnan, Hoffman, Jebara (2018), Variational Autoencoders for Collaborative Filtering,
    section 4.1; also the protocol of ALX.
    """
    _check_fraction("test_users", test_users)
    _check_fraction("fold_in", fold_in)
    rows, rng = _canonical(user_items), validation.random_generator(random_state)
    positive = np.append(0, np.cumsum(rows.data > 0))[rows.indptr]
    able = np.flatnonzero(np.diff(positive) > 1)
    if not len(able):
        raise ValueError("no user has two positive entries, one to fold in and one to find")
    chosen = np.sort(rng.permutation(able)[: max(round(test_users * rows.shape[0]), 1)])
    train = rows[np.setdiff1d(np.arange(rows.shape[0]), chosen)]
    visible, held_out = holdout.hide(rows[chosen], 1 - fold_in, at_least=1, rng=rng)
    return train, visible, held_out


def time_split(
    user_items: Any, timestamps: Any, fraction: float = 0.2
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split entries into the earlier ones and the latest `fraction`; ties stay in the earlier part.

    For a matrix, whose entries are a user and an item each. `datasets.split_by_time` has the same
    cut for a table of single interactions, of which a user may have several with an item.

    Parameters
    ----------
    user_items : sparse matrix or array of shape (n_users, n_items)
        The entries.
    timestamps : sparse matrix or array of the same entries
        When each of them happened, in any unit.
    fraction : float, default=0.2
        Part of the entries to hold out.

    Returns
    -------
    train, test : csr_matrix of shape (n_users, n_items)

    Raises
    ------
    ValueError
        For a fraction out of range, other entries, or a missing time (NaN).
    """
    _check_fraction("fraction", fraction)
    entries, times = _sorted(user_items), _sorted(timestamps)
    same = entries.shape == times.shape and np.array_equal(entries.indptr, times.indptr)
    if not same or not np.array_equal(entries.indices, times.indices):
        raise ValueError("timestamps must be a sparse matrix with the entries of user_items")
    if np.isnan(times.data).any():
        raise ValueError("timestamps must have no missing values (NaN): drop those entries first")
    cut = np.quantile(times.data, 1 - fraction, method="lower") if times.nnz else 0
    late = times.data > cut
    return _part(entries.tocoo(), ~late), _part(entries.tocoo(), late)


def ranking_metrics_at_k(
    model: Any,
    train_user_items: Any,
    test_user_items: Any,
    K: int = 10,
    show_progress: bool = False,
    num_threads: int = 0,
) -> dict[str, float]:
    """Rank items for every user with test entries, and measure.

    Parameters
    ----------
    model : object
        With ``recommend(userids, user_items, N)``: ours, implicit's or another.
    train_user_items : csr_matrix of shape (n_users, n_items)
        What the users are known to like; left out of the ranking.
    test_user_items : csr_matrix of shape (n_users, n_items)
        What should be found.
    K : int, default=10
        Length of the ranking.
    show_progress, num_threads
        Ignored; as implicit has them.

    Returns
    -------
    dict of str to float
        See `metrics_of_rankings`.
    """
    del show_progress, num_threads
    train, test = sparse.csr_matrix(train_user_items), _canonical(test_user_items)
    if train.shape != test.shape:
        raise ValueError(f"train has shape {train.shape}, but test {test.shape}")
    users = np.flatnonzero(np.diff(test.indptr))
    batches = [
        np.asarray(model.recommend(batch, train[batch], N=K)[0])
        for batch in (users[low : low + _BATCH] for low in range(0, len(users), _BATCH))
    ]
    ids = np.concatenate(batches) if batches else np.zeros((0, K), np.int32)
    return metrics_of_rankings(ids, test[users], _popularity(train), train.shape[0])


def metrics_of_rankings(
    ids: np.ndarray,
    held_out: sparse.csr_matrix,
    popularity: np.ndarray | None = None,
    n_users: int | None = None,
) -> dict[str, float]:
    """Metrics of rankings against held-out entries.

    Parameters
    ----------
    ids : array of int and shape (n, K)
        Best first; below 0 where there is no result.
    held_out : csr_matrix of shape (n, n_items)
        The hits; rows without any are left out.
    popularity : array of shape (n_items,), optional
        Users who like each item, for "novelty".
    n_users : int, optional
        Of how many users, those without held-out entries included; needed with `popularity`.

    Returns
    -------
    dict of str to float
        With h hits in the first K and m held-out entries of a user, means over users of

        * "precision": sum of h over the sum of min(K, m), implicit's definition;
        * "recall": h / min(K, m), the capped recall of Liang et al. (2018);
        * "hit_rate": whether h > 0; "mrr": 1 / rank of the first hit;
        * "map": average precision over min(K, m);
        * "ndcg": sum of 1 / log2(1 + rank) of the hits, over the largest possible sum;
        * "auc": area under the ROC curve, where what is not ranked is taken to be in random order;

        "coverage": part of the items ranked for anybody; "novelty": mean of -log2 of the part of
        the `n_users` who like a ranked item. NaN where there is nothing to measure.

    Raises
    ------
    ValueError
        For a popularity without `n_users`, or one above it.
    """
    _check_popularity(popularity, n_users)
    counts = np.diff(held_out.indptr)
    ids, held_out, counts = ids[counts > 0], held_out[counts > 0], counts[counts > 0]
    k = ids.shape[1]
    if not ids.size:
        return dict.fromkeys(METRICS, float("nan"))
    hits = holdout.hits_of(ids, held_out)
    found, places = np.cumsum(hits, axis=1), np.arange(1, k + 1)
    most = np.minimum(counts, k)
    ranked = ids[ids >= 0]
    return {
        "precision": float(hits.sum() / most.sum()),
        "map": float(np.mean((hits * found / places).sum(axis=1) / most)),
        "ndcg": float(np.mean(holdout.ndcg_of_hits(hits, counts))),
        "auc": float(np.mean(_auc(hits, found, counts, held_out.shape[1]))),
        "recall": float(np.mean(found[:, -1] / most)),
        "hit_rate": float(np.mean(found[:, -1] > 0)),
        "mrr": float(np.mean((hits / places).max(axis=1))),
        "coverage": len(np.unique(ranked)) / held_out.shape[1],
        "novelty": _novelty(ranked, popularity, n_users),
    }


def _auc(hits: np.ndarray, found: np.ndarray, counts: np.ndarray, n_items: int) -> np.ndarray:
    """Pairs of a held-out and another item in the right order, over all pairs (n,)."""
    misses = hits.shape[1] - found[:, -1]
    others = n_items - counts
    right = (found * ~hits).sum(axis=1) + (found[:, -1] + counts) / 2 * (others - misses)
    return right / np.maximum(counts * others, 1)


def _check_popularity(popularity: np.ndarray | None, n_users: int | None) -> None:
    most = 0 if popularity is None else int(np.max(popularity, initial=0))
    if popularity is not None and (n_users is None or n_users < most):
        raise ValueError(
            "n_users must be the number of users that popularity counts, here at least "
            f"{most}, got {n_users}"
        )


def _popularity(user_items: sparse.csr_matrix) -> np.ndarray:
    """Users with a positive entry for each item (n_items,)."""
    rows = _canonical(user_items)
    return np.bincount(rows.indices[rows.data > 0], minlength=rows.shape[1])


def _novelty(ranked: np.ndarray, popularity: np.ndarray | None, n_users: int | None) -> float:
    if popularity is None or n_users is None or not len(ranked):
        return float("nan")
    # An item that nobody likes yet is taken to have half a user.
    return float(np.mean(-np.log2(np.maximum(popularity[ranked], 0.5) / n_users)))


def _metric_at_k(name: str) -> Callable[..., float]:
    def metric(
        model: Any,
        train_user_items: Any,
        test_user_items: Any,
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


class make_ranking_scorer:  # noqa: N801  (named as scikit-learn names its scorer factories)
    """Scorer for ``GridSearchCV(scoring=...)`` by strong generalisation.

    A fixed fifth of each row's entries is hidden, the rest is folded in, and the hidden ones are
    ranked among all items not folded in, as in the estimator's own `score`. Works for a model
    alone and for a Pipeline that ends in one, whose earlier steps transform what is folded in.
    Of a DataFrame, column names are checked as in `score`, and passed on to those steps.

    Parameters
    ----------
    metric : str
        One of `METRICS`.
    k : int, default=10
        Length of the ranking.
    """

    def __init__(self, metric: str, k: int = 10) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}")
        self.metric, self.k = metric, k

    def __call__(self, estimator: Any, X: Any, y: Any = None) -> float:
        """Score a fitted estimator on rows, seen in `fit` or not."""
        visible, hidden = holdout.hide(validation.canonical_csr(X), 0.2, at_least=1)
        tested = np.flatnonzero(np.diff(hidden.indptr))
        visible, hidden = visible[tested], hidden[tested]
        model, known = estimator, visible
        if hasattr(X, "columns"):  # whose order the steps, or the model, compare
            known = pd.DataFrame(visible.toarray(), columns=X.columns)
        if hasattr(estimator, "steps"):
            model = estimator[-1]
            known = estimator[:-1].transform(known) if len(estimator.steps) > 1 else known
        if hasattr(known, "columns") and isinstance(model, BaseEstimator):
            validate_data(model, known, reset=False, skip_check_array=True)
        known = sparse.csr_matrix(known)
        ids, _ = model.recommend(np.arange(len(tested)), known, N=self.k, recalculate_user=True)
        found = metrics_of_rankings(ids, hidden, _popularity(visible), len(tested))
        return found[self.metric]


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def _sorted(matrix: Any) -> sparse.csr_matrix:
    """CSR with sorted indices; where that takes sorting, in a copy, as others may share them."""
    rows = sparse.csr_matrix(matrix)
    return rows if rows.has_sorted_indices else rows.sorted_indices()


def _canonical(matrix: Any) -> sparse.csr_matrix:
    """CSR of the input's dtype, with its duplicates summed; in a copy where it has any."""
    rows = sparse.csr_matrix(matrix)
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    return rows


def _part(entries: sparse.coo_matrix, chosen: np.ndarray) -> sparse.csr_matrix:
    kept = (entries.data[chosen], (entries.row[chosen], entries.col[chosen]))
    return sparse.csr_matrix(kept, shape=entries.shape, dtype=entries.dtype)


__all__ = [
    "METRICS", "AUC_at_k", "coverage_at_k", "hit_rate_at_k", "leave_k_out_split",
    "make_ranking_scorer", "mean_average_precision_at_k", "metrics_of_rankings", "mrr_at_k",
    "ndcg_at_k", "novelty_at_k", "precision_at_k", "ranking_metrics_at_k", "recall_at_k",
    "strong_generalization_split", "time_split", "train_test_split",
]  # fmt: skip
