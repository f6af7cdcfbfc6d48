"""Hiding a part of each row's entries, and how well a ranking finds them again.

In all splits and metrics an entry is relevant where its value is above 0. Zeros and negative
values that are stored are no hits to be found.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.exceptions import UndefinedMetricWarning

from . import matrices
from .exceptions import DataWarning
from .refusals import require_matrix

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
    counts = positive_counts(rows)
    wanted = np.floor(counts * fraction + rng.random(rows.shape[0])).astype(np.int64)
    wanted = np.minimum(np.maximum(wanted, at_least), np.maximum(counts - 1, 0))
    return parts(rows, drawn(rows, wanted, rng))


def least_fraction(rows: sparse.csr_matrix) -> float:
    """Least fraction at which `hide`, with its own generator, hides an entry; inf where none does.

    Parameters
    ----------
    rows : csr_matrix of shape (n_rows, n_columns)
        Canonical.
    """
    counts, chances = positive_counts(rows), np.random.default_rng(_SEED).random(rows.shape[0])
    able = counts >= 2
    return float(np.min((1 - chances[able]) / counts[able], initial=np.inf))


def positive_counts(rows: sparse.csr_matrix) -> np.ndarray:
    """Positive entries of each row (n_rows,), int64."""
    return np.diff(np.append(0, np.cumsum(rows.data > 0))[rows.indptr])


def drawn(rows: sparse.csr_matrix, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw entries at random, from the positive ones only.

    Parameters
    ----------
    rows : csr_matrix of shape (n_rows, n_columns)
        Canonical.
    wanted : ndarray of int and shape (n_rows,)
        How many of each row.
    rng : Generator
        What decides.

    Returns
    -------
    ndarray of bool and shape (nnz,)
    """
    counts, positive = positive_counts(rows), np.flatnonzero(rows.data > 0)
    row_of = np.repeat(np.arange(rows.shape[0]), counts)
    # Shuffles within rows: a row's number is the whole part of the key, chance the rest. The sum
    # of a large number and a chance close to 1 is rounded up, to the next row, unless bounded.
    keys = np.minimum(row_of + rng.random(len(positive)), np.nextafter(row_of + 1.0, 0))
    order = positive[np.argsort(keys, kind="stable")]
    place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(rows.nnz, dtype=bool)
    chosen[order[place < np.repeat(wanted, counts)]] = True
    return chosen


def parts(
    rows: sparse.csr_matrix, chosen: np.ndarray
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split entries into those that are not in the mask `chosen` (nnz,), and those that are."""
    return _entries(rows, ~chosen), _entries(rows, chosen)


def _entries(rows: sparse.csr_matrix, chosen: np.ndarray) -> sparse.csr_matrix:
    indptr = np.append(0, np.cumsum(chosen))[rows.indptr]
    return sparse.csr_matrix((rows.data[chosen], rows.indices[chosen], indptr), shape=rows.shape)


def for_scoring(rows: sparse.csr_matrix) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Kept and hidden entries of the rows from which a fifth, always the same, can be hidden."""
    kept, hidden = hide(rows, _SCORED, at_least=1)
    measured = np.flatnonzero(np.diff(hidden.indptr))
    return kept[measured], hidden[measured]


def canonical(matrix: Any, name: str = "user_items") -> sparse.csr_matrix:
    """Return a csr_matrix with sorted indices and summed duplicates; the input stays as it is.

    Parameters
    ----------
    matrix : sparse matrix, sparse array or array of shape (n_rows, n_columns)
        Finite numbers.
    name : str
        The argument's name, for messages.

    Returns
    -------
    csr_matrix of shape (n_rows, n_columns)
        Of the input's dtype; of int64 where a sum of small integers does not fit.

    Raises
    ------
    TypeError
        For an object that is not a matrix, and a frame.
    ValueError
        For NaN or infinity, other kinds of values, other dimensions than two, or a sparse matrix
        whose arrays contradict each other or its shape.
    """
    rows = matrices.canonical(require_users_by_items(matrix, name), name)
    _check_finite(rows, name)
    return rows


def require_users_by_items(matrix: Any, name: str) -> Any:
    """Return a sparse matrix as it is, and other matrices as 2-D arrays; errors as `canonical`."""
    require_matrix(matrix, name, takes_frames=False)
    if sparse.issparse(matrix):
        return matrix
    array = np.asarray(matrix)
    if array.ndim != 2:
        raise ValueError(
            f"{name} must have users as rows and items as columns, got shape {array.shape}"
        )
    return array


def _check_finite(rows: sparse.csr_matrix, name: str) -> None:
    if rows.dtype.kind != "f" or np.isfinite(rows.data).all():
        return
    wrong = np.flatnonzero(~np.isfinite(rows.data))
    row = np.searchsorted(rows.indptr, wrong[0], side="right") - 1
    raise ValueError(
        f"{name} must hold finite values: {len(wrong)} of {rows.nnz} entries are NaN or infinite, "
        f"first row {row}, column {rows.indices[wrong[0]]}. Remove them"
    )


def relevant(matrix: Any, name: str) -> sparse.csr_matrix:
    """Positive entries of a matrix, canonical; arguments and errors are those of `canonical`."""
    rows = canonical(matrix, name)
    is_relevant = rows.data > 0
    return rows if is_relevant.all() else _entries(rows, is_relevant)


def rankings(ids: Any, n_rows: int) -> np.ndarray:
    """Check ranked ids.

    Parameters
    ----------
    ids : array-like of int and shape (n_rows, k)
        Best first; below 0 where there is no result.
    n_rows : int
        Rows that they were ranked for.

    Returns
    -------
    ndarray of int64 and shape (n_rows, k)
        -1 takes the place of a repeated id. A DataWarning has their count.

    Raises
    ------
    ValueError
        For another shape, or values that are not integers.
    """
    array = np.asarray(ids)
    if array.ndim != 2 or len(array) != n_rows:
        raise ValueError(
            f"ids must have a row for each of the {n_rows} users, best first, "
            f"got shape {array.shape}"
        )
    if not are_ids(array):
        raise ValueError(
            f"ids must hold integers that fit into int64, got dtype {array.dtype}: "
            "pass ids.astype(int), and -1 where there is no result"
        )
    return _without_repeats(array.astype(np.int64))


def are_ids(array: np.ndarray) -> bool:
    """Whether an array holds integers that fit into int64, or nothing."""
    return not array.size or (
        array.dtype.kind in "iu" and int(array.max()) <= np.iinfo(np.int64).max
    )


def _without_repeats(ids: np.ndarray) -> np.ndarray:
    ascending = np.sort(ids, axis=1)
    again = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
    if not again.any():
        return ids
    warnings.warn(
        f"{again.sum()} of {(ids >= 0).sum()} ranked ids repeat an id that is ranked higher in "
        "the same row: a repeat counts as a miss",
        DataWarning,
        stacklevel=4,
    )
    is_repeat = np.zeros(ids.shape, bool)
    order = np.argsort(ids, axis=1, kind="stable")
    np.put_along_axis(is_repeat, order[:, 1:], again, axis=1)
    return np.where(is_repeat, -1, ids)


def mean_ndcg(ids: np.ndarray, hidden: sparse.csr_matrix) -> float:
    """Mean NDCG of ranked ids, of which the hidden entries are the hits.

    Parameters
    ----------
    ids : ndarray of int and shape (n_rows, k)
        Best first; -1 is never a hit, nor is a repeated id.
    hidden : csr_matrix of shape (n_rows, n_columns)
        At least one positive entry in each row, and no other entries.

    Returns
    -------
    float
        NaN, with an UndefinedMetricWarning, where there are no rows.
    """
    ids = rankings(ids, hidden.shape[0])
    if not len(ids):
        warn_of_nothing("NDCG")
        return float("nan")
    return float(np.mean(ndcg_of_hits(hits_of(ids, hidden), np.diff(hidden.indptr))))


def warn_of_nothing(metric: str) -> None:
    """Warn that no row can be measured."""
    warnings.warn(
        f"{metric} is not defined: no row has two positive entries, one to fold in and one to find",
        UndefinedMetricWarning,
        stacklevel=4,
    )


def hits_of(ids: np.ndarray, hidden: sparse.csr_matrix) -> np.ndarray:
    """Whether each ranked id (n, K) is a positive entry of its row, (n, K).

    Ids below 0, and those that `hidden` has no column for, never are.
    """
    is_column = (ids >= 0) & (ids < hidden.shape[1])
    if not is_column.any() or not hidden.nnz:
        return np.zeros(ids.shape, bool)
    # Looked up row by row: a key of row and id in one number would have to be kept from overflow.
    rows = np.arange(len(ids))[:, None]
    return (hidden[rows, np.where(is_column, ids, 0)].toarray() > 0) & is_column


def ndcg_of_hits(hits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """NDCG (n,) of hits (n, K), for rows with `counts` (n,) > 0 entries to find."""
    discounts = 1 / np.log2(np.arange(2, hits.shape[1] + 2))
    return hits @ discounts / np.cumsum(discounts)[np.minimum(counts, hits.shape[1]) - 1]
