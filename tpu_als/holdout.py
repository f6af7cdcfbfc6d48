"""Hiding a part of each row's entries, and how well a ranking finds them again."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.exceptions import UndefinedMetricWarning

from . import matrices

CUTOFF = 10
_SCORED = 0.2  # part of a row's entries that a score is measured with
_SEED = 20110801


def hide(
    rows: sparse.csr_matrix,
    fraction: float,
    at_least: int = 0,
    rng: np.random.Generator | None = None,
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split the entries of each row into kept and hidden ones; by default the same at every call.

    Parameters
    ----------
    rows : csr_matrix of shape (n_rows, n_columns)
        Canonical. Only positive entries are hidden: zeros and negatives are no hits to be found.
    fraction : float
        Part of a row's positive entries to hide. Where it is no whole number, chance decides
        between its neighbours, so that short rows are hidden from in the right proportion.
    at_least : int, default=0
        Entries hidden from every row that has two positive entries or more. One is always kept.
    rng : Generator, optional
        What decides; by default one with a seed of its own.

    Returns
    -------
    kept, hidden : csr_matrix of shape (n_rows, n_columns)
    """
    rng = np.random.default_rng(_SEED) if rng is None else rng
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


def for_scoring(rows: sparse.csr_matrix) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Kept and hidden entries of the rows from which a fifth, always the same, can be hidden."""
    kept, hidden = hide(rows, _SCORED, at_least=1)
    measured = np.flatnonzero(np.diff(hidden.indptr))
    return kept[measured], hidden[measured]


def canonical(matrix: Any) -> sparse.csr_matrix:
    """CSR of the input's dtype, with its duplicates summed; in a copy where it has any."""
    return matrices.canonical(matrix)


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
    return float(np.mean(ndcg_of_hits(hits_of(ids, hidden), np.diff(hidden.indptr))))


def hits_of(ids: np.ndarray, hidden: sparse.csr_matrix) -> np.ndarray:
    """Whether each ranked id (n, K) is a hidden entry of its row; -1 never is."""
    width, rows = np.int64(hidden.shape[1]), np.arange(len(ids))
    wanted = np.repeat(rows, np.diff(hidden.indptr)) * width + hidden.indices
    wanted = np.append(np.sort(wanted), -1)  # what a search beyond the last one finds
    found = rows[:, None] * width + ids
    return (wanted[np.searchsorted(wanted[:-1], found)] == found) & (ids >= 0)


def ndcg_of_hits(hits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """NDCG (n,) of hits (n, K), for rows with `counts` (n,) > 0 entries to find."""
    discounts = 1 / np.log2(np.arange(2, hits.shape[1] + 2))
    return hits @ discounts / np.cumsum(discounts)[np.minimum(counts, hits.shape[1]) - 1]
