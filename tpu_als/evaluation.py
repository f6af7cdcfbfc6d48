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

from tpu_als import holdout, matrices, validation
from tpu_als.splits import (
    leave_k_out_split,
    strong_generalization_split,
    time_split,
    train_test_split,
)

METRICS = (
    "precision", "map", "ndcg", "auc", "recall", "hit_rate", "mrr", "coverage", "novelty",
)  # fmt: skip
_BATCH = 1024


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
    train, test = matrices.canonical(train_user_items), holdout.canonical(test_user_items)
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
    rows = holdout.canonical(user_items)
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
        visible, hidden = holdout.for_scoring(validation.canonical_csr(X))
        model, known = estimator, visible
        if hasattr(X, "columns"):  # whose order the steps, or the model, compare
            known = pd.DataFrame(visible.toarray(), columns=X.columns)
        if hasattr(estimator, "steps"):
            model = estimator[-1]
            known = estimator[:-1].transform(known) if len(estimator.steps) > 1 else known
        if hasattr(known, "columns") and isinstance(model, BaseEstimator):
            validate_data(model, known, reset=False, skip_check_array=True)
        known, users = sparse.csr_matrix(known), np.arange(visible.shape[0])
        ids, _ = model.recommend(users, known, N=self.k, recalculate_user=True)
        found = metrics_of_rankings(ids, hidden, _popularity(visible), len(users))
        return found[self.metric]


__all__ = [
    "METRICS", "AUC_at_k", "coverage_at_k", "hit_rate_at_k", "leave_k_out_split",
    "make_ranking_scorer", "mean_average_precision_at_k", "metrics_of_rankings", "mrr_at_k",
    "ndcg_at_k", "novelty_at_k", "precision_at_k", "ranking_metrics_at_k", "recall_at_k",
    "strong_generalization_split", "time_split", "train_test_split",
]  # fmt: skip
