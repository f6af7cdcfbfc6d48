"""Hiding a part of each row's entries, and how well a ranking finds them again."""

from __future__ import annotations

import warnings

import numpy as np
from scipy import sparse
from sklearn.exceptions import UndefinedMetricWarning

CUTOFF = 10
_SEED = 20110801


def hide(
    rows: sparse.csr_matrix, fraction: float, at_least: int = 0
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split the entries of each row into kept and hidden ones; the same split at every call.

    Parameters
    ----------
    rows : csr_matrix of shape (n_rows, n_columns)
        Canonical. Only positive entries are hidden: zeros and negatives are no hits to be found.
    fraction : float
        Part of a row's positive entries to hide. Where it is no whole number, chance decides
        between its neighbours, so that short rows are hidden from in the right proportion.
    at_least : int, default=0
        Entries hidden from every row that has two positive entries or more. One is always kept.

    Returns
    -------
    kept, hidden : csr_matrix of shape (n_rows, n_columns)
    """
    rng = np.random.default_rng(_SEED)
    row_of = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    positive = np.flatnonzero(rows.data > 0)
    counts = np.bincount(row_of[positive], minlength=rows.shape[0])
    wanted = np.floor(counts * fraction + rng.random(rows.shape[0])).astype(np.int64)
    wanted = np.minimum(np.maximum(wanted, at_least), np.maximum(counts - 1, 0))
    # Shuffles within rows: a row's number is the whole part of the key, chance the rest.
    order = positive[np.argsort(row_of[positive] + rng.random(len(positive)), kind="stable")]
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_hidden = np.zeros(rows.nnz, dtype=bool)
    is_hidden[order[place < np.repeat(wanted, counts)]] = True
    return _entries(rows, row_of, ~is_hidden), _entries(rows, row_of, is_hidden)


def _entries(rows: sparse.csr_matrix, row_of: np.ndarray, chosen: np.ndarray) -> sparse.csr_matrix:
    indptr = np.zeros(rows.shape[0] + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of[chosen], minlength=rows.shape[0]), out=indptr[1:])
    return sparse.csr_matrix((rows.data[chosen], rows.indices[chosen], indptr), shape=rows.shape)


def mean_ndcg(ids: np.ndarray, hidden: sparse.csr_matrix) -> float:
    """Mean NDCG of ranked ids, of which the hidden entries are the hits.

    Parameters
    ----------
    ids : ndarray of int and shape (n_rows, k)
        Best first; -1 is never a hit.
    hidden : csr_matrix of shape (n_rows, n_columns)
        At least one entry in each row.

    Returns
    -------
    float
        NaN, with an UndefinedMetricWarning, where there are no rows.
    """
    if not len(ids):
        warnings.warn(
            "NDCG is not defined: no row has two positive entries, one to fold in and one to find",
            UndefinedMetricWarning,
            stacklevel=3,
        )
        return float("nan")
    width = np.int64(hidden.shape[1])
    counts = np.diff(hidden.indptr)
    wanted = np.repeat(np.arange(len(ids)), counts) * width + hidden.indices
    found = np.arange(len(ids))[:, None] * width + ids
    hits = np.isin(found, wanted) & (ids >= 0)
    discounts = 1 / np.log2(np.arange(2, ids.shape[1] + 2))
    ideal = np.cumsum(discounts)[np.minimum(counts, ids.shape[1]) - 1]
    return float(np.mean(hits @ discounts / ideal))
