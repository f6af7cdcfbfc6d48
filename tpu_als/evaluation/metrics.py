"""Metrics of rankings against held-out entries. NumPy only."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from tpu_als import host
from tpu_als.evaluation import holdout, inputs
from tpu_als.exceptions import DataWarning

METRICS = (
    "precision", "map", "ndcg", "auc", "recall", "hit_rate", "mrr", "coverage", "novelty",
    "precision_full", "recall_full", "map_full", "precision_at_k", "auc_unseen",
)  # fmt: skip


class Ratio(NamedTuple):
    """A metric as a ratio of two sums over users.

    Attributes
    ----------
    above : ndarray of shape (n,)
        Each user's part of the numerator.
    below : ndarray of shape (n,)
        Each user's part of the denominator; 1 for a mean over users, 0 where it is undefined.
    """

    above: np.ndarray
    below: np.ndarray

    def value(self) -> float:
        """The metric; NaN if it is undefined for all users."""
        total = self.below.sum()
        return float(self.above.sum() / total) if total else float("nan")


class HeldOut(NamedTuple):
    """Held-out entries of the users who have relevant ones, for any number of rankings.

    Attributes
    ----------
    is_measured : ndarray of bool and shape (n_rows,)
        Whether a row has relevant entries. The other attributes are of these n rows.
    relevant : csr_matrix of shape (n, width)
        The relevant entries.
    counts : ndarray of int64 and shape (n,)
        Their number.
    popularity : ndarray of shape (width,) or None
        Number of users who like each item.
    n_users : int or None
        Total number of users.
    seen : csr_matrix of bool and shape (n, width) or None
        Items excluded from the rankings.
    n_excluded : ndarray of int64 and shape (n,)
        Number of relevant entries that are also in `seen`.
    """

    is_measured: np.ndarray
    relevant: sparse.csr_matrix
    counts: np.ndarray
    popularity: np.ndarray | None
    n_users: int | None
    seen: sparse.csr_matrix | None
    n_excluded: np.ndarray


class Ranked(NamedTuple):
    """Ranked ids (n, K), whether they are relevant, and whether they are in `HeldOut.seen`."""

    ids: np.ndarray
    hits: np.ndarray
    was_seen: np.ndarray

    def first(self, k: int) -> Ranked:
        """The first k ids of each ranking."""
        return Ranked(*(array[:, :k] for array in self))


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
        * "precision_full": h / K, the textbook's; "precision_at_k" is another name of it;
        * "recall": h / min(K, m), the capped recall of Liang et al. (2018);
        * "recall_full": h / m, the textbook's;
        * "hit_rate": whether h > 0; "mrr": 1 / rank of the first hit;
        * "map": sum of the precisions at the ranks of the hits, over min(K, m);
        * "map_full": the same sum over m, as in trec_eval;
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
    The metrics without "_full" cap the denominator at what a ranking of K items can reach, so 1 is
    possible for every user. Those with "_full" divide by the full number, as most libraries do;
    docs/metrics.md lists which library has which definition.

    In implicit stored zeros and negative values of a test matrix are relevant, and a repeated id
    counts twice. Its AUC is outside the range 0 to 1 if a ranking has more misses than there are
    irrelevant items; here the misses beyond that number are ignored.
    """
    for name, value in (("n_users", n_users), ("n_items", n_items)):
        if value is not None:
            inputs.integer(name, value, 0)
    truth = held_out_entries(held_out, popularity, n_users, seen)
    ids = holdout.rankings(ids, len(truth.is_measured))[truth.is_measured]
    if not ids.size:
        return dict.fromkeys(METRICS, float("nan"))
    warn_of_overlap(truth, stacklevel=4)
    ranked = ranked_in(ids, truth)
    found = {name: ratio.value() for name, ratio in ratios(ranked, truth, n_items).items()}
    return {**found, "coverage": coverage(ranked, truth, n_items)}


def held_out_entries(
    held_out: Any, popularity: ArrayLike | None, n_users: int | None, seen: Any
) -> HeldOut:
    """Check held-out entries; arguments and errors are those of `metrics_of_rankings`."""
    counted = _checked_popularity(popularity, n_users)
    rows = holdout.relevant(held_out, "held_out")
    excluded = None if seen is None else _pattern(holdout.canonical(seen, "seen"))
    if excluded is not None and excluded.shape[0] != rows.shape[0]:
        raise ValueError(f"seen must have {rows.shape[0]} rows, got shape {excluded.shape}")
    counts = np.diff(rows.indptr).astype(np.int64)
    is_measured = counts > 0
    rows, counts, n_excluded = rows[is_measured], counts[is_measured], np.zeros(0, np.int64)
    if excluded is not None:
        excluded = excluded[is_measured]
        width = max(excluded.shape[1], rows.shape[1])
        both = _widened(excluded, width).multiply(_pattern(_widened(rows, width))).tocsr()
        n_excluded = np.diff(both.indptr).astype(np.int64)
    return HeldOut(is_measured, rows, counts, counted, n_users, excluded, n_excluded)


def warn_of_overlap(truth: HeldOut, stacklevel: int) -> None:
    """Warn once if relevant entries are excluded from the rankings, with their number."""
    if truth.n_excluded.any():
        warnings.warn(
            f"{truth.n_excluded.sum()} of {truth.relevant.nnz} relevant test entries are stored in "
            "the train part too: a ranking excludes them, so they count as misses. Remove them "
            "from one of the parts",
            DataWarning,
            stacklevel=stacklevel,
        )


def ranked_in(ids: np.ndarray, truth: HeldOut) -> Ranked:
    """Look up ranked ids (n, K), without repeats, in the held-out entries."""
    seen = np.zeros(ids.shape, bool) if truth.seen is None else holdout.hits_of(ids, truth.seen)
    return Ranked(ids, holdout.hits_of(ids, truth.relevant), seen)


def ratios(ranked: Ranked, truth: HeldOut, n_items: int | None) -> dict[str, Ratio]:
    """All metrics that are sums over users; "coverage" is not.

    Parameters
    ----------
    ranked : Ranked
        Of n users and K ids, K > 0.
    truth : HeldOut
        Of the same n users.
    n_items : int or None
        As in `metrics_of_rankings`.
    """
    hits, counts = ranked.hits, truth.counts
    unseen = Ratio(np.zeros(0), np.zeros(0))
    if truth.seen is not None:
        wanted = counts - truth.n_excluded
        others = _catalogue(ranked, truth, n_items) - np.diff(truth.seen.indptr) - wanted
        misses = (ranked.ids >= 0) & ~hits & ~ranked.was_seen
        unseen = _auc(hits & ~ranked.was_seen, misses, wanted, others)
    return {
        **_of_hits(hits, counts),
        "auc": _auc(hits, ~hits, counts, truth.relevant.shape[1] - counts),
        "novelty": _novelty(ranked.ids, truth.popularity, truth.n_users),
        "auc_unseen": unseen,
    }


def coverage(ranked: Ranked, truth: HeldOut, n_items: int | None) -> float:
    """Fraction of the catalogue that is ranked for any user."""
    shown = np.unique(ranked.ids[ranked.ids >= 0])
    return len(shown) / _catalogue(ranked, truth, n_items)


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


def _of_hits(hits: np.ndarray, counts: np.ndarray) -> dict[str, Ratio]:
    """Metrics that depend only on hits (n, K) and numbers of relevant entries (n,) > 0."""
    found, k = np.cumsum(hits, axis=1), hits.shape[1]
    n_hits, ranks, best = found[:, -1], np.arange(1, k + 1), np.minimum(counts, k)
    precisions = (hits * found / ranks).sum(axis=1)
    means = {
        "precision_full": n_hits / k,
        "precision_at_k": n_hits / k,
        "recall": n_hits / best,
        "recall_full": n_hits / counts,
        "hit_rate": n_hits > 0,
        "mrr": (hits / ranks).max(axis=1),
        "map": precisions / best,
        "map_full": precisions / counts,
        "ndcg": holdout.ndcg_of_hits(hits, counts),
    }
    ones = np.ones(len(hits))
    return {
        "precision": Ratio(n_hits, best),
        **{name: Ratio(values, ones) for name, values in means.items()},
    }


def _auc(hits: np.ndarray, misses: np.ndarray, counts: np.ndarray, others: np.ndarray) -> Ratio:
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
    fractions = np.divide(right, pairs, out=np.zeros(len(pairs)), where=is_defined)
    return Ratio(fractions, is_defined)


def _pattern(rows: sparse.csr_matrix) -> sparse.csr_matrix:
    """Replace every stored value by True, also stored zeros."""
    return sparse.csr_matrix((np.ones(rows.nnz, bool), rows.indices, rows.indptr), shape=rows.shape)


def _widened(rows: sparse.csr_matrix, width: int) -> sparse.csr_matrix:
    return sparse.csr_matrix((rows.data, rows.indices, rows.indptr), shape=(rows.shape[0], width))


def _catalogue(ranked: Ranked, truth: HeldOut, n_items: int | None) -> int:
    """Size of the catalogue, see `metrics_of_rankings`."""
    widths = [truth.relevant.shape[1], int(ranked.ids.max(initial=-1)) + 1]
    widths += [] if truth.popularity is None else [len(truth.popularity)]
    widths += [] if truth.seen is None else [truth.seen.shape[1]]
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


def _novelty(ids: np.ndarray, popularity: np.ndarray | None, n_users: int | None) -> Ratio:
    if popularity is None or n_users is None:
        return Ratio(np.zeros(0), np.zeros(0))
    liked = np.zeros(ids.shape)
    is_known = (ids >= 0) & (ids < len(popularity))
    liked[is_known] = popularity[ids[is_known]]
    # Items that no user likes count as liked by half a user, to keep the logarithm finite.
    surprise = -np.log2(np.maximum(liked, 0.5) / n_users)
    is_ranked = ids >= 0
    return Ratio((surprise * is_ranked).sum(axis=1), is_ranked.sum(axis=1))
