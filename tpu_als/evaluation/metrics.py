"""Metrics of rankings against held-out entries. NumPy only."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from tpu_als import host
from tpu_als.evaluation import holdout, inputs
from tpu_als.exceptions import DataWarning

METRICS = (
    "precision", "map", "ndcg", "auc", "recall", "hit_rate", "mrr", "coverage", "novelty",
    "recall_full", "precision_at_k", "auc_unseen",
)  # fmt: skip


def metrics_of_rankings(
    ids: Any,
    held_out: Any,
    popularity: np.ndarray | None = None,
    n_users: int | None = None,
    n_items: int | None = None,
    seen: Any = None,
) -> dict[str, float]:
    """Metrics of rankings against held-out entries.

    An entry is relevant if its value is above 0. A ranked id is a hit if it is a relevant entry of
    its row. Ids without a column in `held_out` are misses. Repeats of an id in a row are misses
    too, and a DataWarning gives their number.

    Parameters
    ----------
    ids : array of int and shape (n, K)
        Best first; below 0 for missing results.
    held_out : csr_matrix of shape (n, width)
        Finite values. Rows without a relevant entry are ignored.
    popularity : array of shape (width,), optional
        Number of users who like each item, for "novelty". 0 for items beyond its length.
    n_users : int, optional
        Total number of users, with and without held-out entries. Required with `popularity`.
    n_items : int, optional
        Size of the catalogue. It is raised to the width of the matrices and to the largest ranked
        id + 1, whichever is larger; this is also the default.
    seen : csr_matrix of shape (n, width), optional
        The items excluded from the rankings, for "auc_unseen". A DataWarning gives the number of
        relevant entries that are also stored in it.

    Returns
    -------
    dict of str to float
        With h hits in the first K and m relevant entries of a user, means over users of

        * "precision": sum of h over the sum of min(K, m), implicit's definition;
        * "precision_at_k": h / K, the textbook's;
        * "recall": h / min(K, m), the capped recall of Liang et al. (2018);
        * "recall_full": h / m, the textbook's;
        * "hit_rate": whether h > 0; "mrr": 1 / rank of the first hit;
        * "map": average precision over min(K, m);
        * "ndcg": sum of 1 / log2(1 + rank) of the hits, over the largest possible sum;
        * "auc": area under the ROC curve, where items that are not ranked are in random order. By
          implicit's definition all `width` items count. A ranking excludes the train items, so
          they count as negatives that are not ranked, and raise the value;
        * "auc_unseen": the same over the catalogue's items that are not stored in `seen`;

        "coverage": fraction of the catalogue that is ranked for any user; "novelty": mean of -log2
        of the fraction of the `n_users` who like a ranked item. NaN if a metric is undefined.

    Raises
    ------
    TypeError
        For a `held_out` or `seen` that is not a matrix.
    ValueError
        For NaN or infinity in a matrix, another number of rows, ids that are not integers, a
        popularity without `n_users`, or a popularity above `n_users`.

    Notes
    -----
    In implicit stored zeros and negative values of a test matrix are relevant, and a repeated id
    counts twice. Its AUC is outside the range 0 to 1 if a ranking has more misses than there are
    irrelevant items; here the misses beyond that number are ignored.
    """
    for name, value in (("n_users", n_users), ("n_items", n_items)):
        if value is not None:
            inputs.integer(name, value, 0)
    popularity = _checked_popularity(popularity, n_users)
    held_out = holdout.relevant(held_out, "held_out")
    ids = holdout.rankings(ids, held_out.shape[0])
    seen = None if seen is None else _pattern(holdout.canonical(seen, "seen"))
    if seen is not None and seen.shape[0] != held_out.shape[0]:
        raise ValueError(f"seen must have {held_out.shape[0]} rows, got shape {seen.shape}")
    counts = np.diff(held_out.indptr).astype(np.int64)
    is_measured = counts > 0
    ids, held_out, counts = ids[is_measured], held_out[is_measured], counts[is_measured]
    if not ids.size:
        return dict.fromkeys(METRICS, float("nan"))
    catalogue = _catalogue(ids, held_out, popularity, n_items, seen)
    hits = holdout.hits_of(ids, held_out)
    ranked = ids[ids >= 0]
    return {
        **_of_hits(hits, counts),
        "auc": _auc(hits, ~hits, counts, held_out.shape[1] - counts),
        "coverage": len(np.unique(ranked)) / catalogue,
        "novelty": _novelty(ranked, popularity, n_users),
        "auc_unseen": (
            float("nan")
            if seen is None
            else _auc_unseen(ids, hits, held_out, seen[is_measured], catalogue)
        ),
    }


def popularity_of(user_items: sparse.csr_matrix) -> np.ndarray:
    """Number of users with a positive entry for each item (n_items,), of a canonical matrix.

    Raises
    ------
    MemoryError
        If a number for each column does not fit into memory, as if hashes are used as column ids.
    """
    n_items = user_items.shape[1]
    host.require_memory(
        {f"popularity of {n_items} items": 8 * n_items},
        "number the items from 0 on, without gaps",
    )
    liked = user_items.indices[user_items.data > 0]
    return np.bincount(liked, minlength=n_items)


def _of_hits(hits: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Metrics that depend only on hits (n, K) and numbers of relevant entries (n,) > 0."""
    found, k = np.cumsum(hits, axis=1), hits.shape[1]
    n_hits, ranks, best = found[:, -1], np.arange(1, k + 1), np.minimum(counts, k)
    return {
        "precision": float(n_hits.sum() / best.sum()),
        "precision_at_k": float(np.mean(n_hits / k)),
        "recall": float(np.mean(n_hits / best)),
        "recall_full": float(np.mean(n_hits / counts)),
        "hit_rate": float(np.mean(n_hits > 0)),
        "mrr": float(np.mean((hits / ranks).max(axis=1))),
        "map": float(np.mean((hits * found / ranks).sum(axis=1) / best)),
        "ndcg": float(np.mean(holdout.ndcg_of_hits(hits, counts))),
    }


def _auc(hits: np.ndarray, misses: np.ndarray, counts: np.ndarray, others: np.ndarray) -> float:
    """Mean fraction of the pairs (relevant item, irrelevant item) that are in the right order.

    Parameters
    ----------
    hits, misses : ndarray of bool and shape (n, K)
        Whether a ranked item is relevant, and whether it is irrelevant.
    counts, others : ndarray of int64 and shape (n,)
        Number of relevant and of irrelevant items; users without one of these are ignored.
    """
    misses = misses & (np.cumsum(misses, axis=1) <= others[:, None])
    found = np.cumsum(hits, axis=1)
    right = (found * misses).sum(axis=1)
    right = right + (found[:, -1] + counts) / 2 * (others - misses.sum(axis=1))
    pairs = counts * others  # int64: 1,000 relevant of 3,000,000 items do not fit into int32
    is_defined = pairs > 0
    return float(np.mean(right[is_defined] / pairs[is_defined])) if is_defined.any() else np.nan


def _auc_unseen(
    ids: np.ndarray,
    hits: np.ndarray,
    held_out: sparse.csr_matrix,
    seen: sparse.csr_matrix,
    n_items: int,
) -> float:
    """AUC over the unseen items; relevant entries that were seen are ignored, with a warning."""
    width = max(seen.shape[1], held_out.shape[1])
    both = _widened(seen, width).multiply(_pattern(_widened(held_out, width))).tocsr()
    if both.nnz:
        warnings.warn(
            f"{both.nnz} of {held_out.nnz} relevant test entries are stored in the train part "
            "too: a ranking excludes them, so they count as misses. Remove them from one of "
            "the parts",
            DataWarning,
            stacklevel=4,
        )
    was_seen = holdout.hits_of(ids, seen)
    counts = np.diff(held_out.indptr).astype(np.int64) - np.diff(both.indptr)
    others = n_items - np.diff(seen.indptr) - counts
    misses = (ids >= 0) & ~hits & ~was_seen
    return _auc(hits & ~was_seen, misses, counts, others)


def _pattern(rows: sparse.csr_matrix) -> sparse.csr_matrix:
    """Replace every stored value by True, also stored zeros."""
    return sparse.csr_matrix((np.ones(rows.nnz, bool), rows.indices, rows.indptr), shape=rows.shape)


def _widened(rows: sparse.csr_matrix, width: int) -> sparse.csr_matrix:
    return sparse.csr_matrix((rows.data, rows.indices, rows.indptr), shape=(rows.shape[0], width))


def _catalogue(
    ids: np.ndarray,
    held_out: sparse.csr_matrix,
    popularity: np.ndarray | None,
    n_items: int | None,
    seen: sparse.csr_matrix | None,
) -> int:
    widths = [held_out.shape[1], int(ids.max(initial=-1)) + 1]
    widths += [] if popularity is None else [len(popularity)]
    widths += [] if seen is None else [seen.shape[1]]
    return max([*widths, *([] if n_items is None else [n_items])])


def _checked_popularity(popularity: ArrayLike | None, n_users: int | None) -> np.ndarray | None:
    if popularity is None:
        return None
    counts = np.asarray(popularity)
    is_masked = np.ma.is_masked(popularity)
    if (
        is_masked
        or counts.ndim != 1
        or counts.dtype.kind not in "iuf"
        or not np.isfinite(counts).all()
    ):
        raise ValueError(
            "popularity must be finite numbers, one for each item, got shape "
            f"{counts.shape} of {counts.dtype}"
        )
    if (counts < 0).any():
        raise ValueError(f"popularity must be at least 0, got {counts.min()}")
    most = int(np.max(counts, initial=1))
    if n_users is None or not n_users >= most:
        raise ValueError(
            "n_users must be given with popularity, and be at least its largest count, "
            f"{most}, got {n_users}"
        )
    return counts


def _novelty(ranked: np.ndarray, popularity: np.ndarray | None, n_users: int | None) -> float:
    if popularity is None or n_users is None or not len(ranked):
        return float("nan")
    liked = np.zeros(len(ranked))
    is_known = ranked < len(popularity)
    liked[is_known] = popularity[ranked[is_known]]
    # Items that no user likes count as liked by half a user, to keep the logarithm finite.
    return float(np.mean(-np.log2(np.maximum(liked, 0.5) / n_users)))
