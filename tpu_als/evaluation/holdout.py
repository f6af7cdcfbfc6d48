"""Hide a part of each row's entries, and measure how well a ranking finds them.

In all splits and metrics an entry is relevant if its value is above 0. Stored zeros and negative
values are not relevant.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from sklearn.exceptions import UndefinedMetricWarning

from tpu_als.exceptions import DataWarning
from tpu_als.validation import matrices
from tpu_als.validation.refusals import require_matrix

CUTOFF = 10
_HIDDEN_FRACTION = 0.2  # fraction of a row's positive entries that `score` hides
_SEED = 20110801


def hide(
    rows: sparse.csr_matrix,
    fraction: float,
    at_least: int = 0,
    rng: np.random.Generator | None = None,
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split the entries of each row into kept and hidden ones, by default in the same way.

    Parameters
    ----------
    rows : csr_matrix of shape (n_rows, n_columns)
        Canonical. Only positive entries are hidden, because the others are not relevant.
    fraction : float
        Fraction of a row's positive entries to hide. A number that is not an integer is randomly
        rounded up or down, so that the fraction is right on average for short rows too.
    at_least : int, default=0
        Smallest number of entries to hide of rows with at least two positive entries. One entry is
        always kept.
    rng : Generator, optional
        Random generator; by default one with a constant seed.

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
    """Smallest fraction at which `hide`, with its own generator, hides an entry; inf if none does.

    Parameters
    ----------
    rows : csr_matrix of shape (n_rows, n_columns)
        Canonical.
    """
    counts, chances = positive_counts(rows), np.random.default_rng(_SEED).random(rows.shape[0])
    is_split = counts >= 2
    return float(np.min((1 - chances[is_split]) / counts[is_split], initial=np.inf))


def positive_counts(rows: sparse.csr_matrix) -> np.ndarray:
    """Number of positive entries of each row (n_rows,), int64."""
    return np.diff(np.append(0, np.cumsum(rows.data > 0))[rows.indptr])


def drawn(rows: sparse.csr_matrix, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw entries at random, from the positive ones only.

    Parameters
    ----------
    rows : csr_matrix of shape (n_rows, n_columns)
        Canonical.
    wanted : ndarray of int and shape (n_rows,)
        Number of entries to draw from each row.
    rng : Generator
        Random generator.

    Returns
    -------
    ndarray of bool and shape (nnz,)
    """
    counts, positive = positive_counts(rows), np.flatnonzero(rows.data > 0)
    row_of = np.repeat(np.arange(rows.shape[0]), counts)
    # Shuffle within rows: a key is the row number plus a random fraction. The sum of a large number
    # and a fraction close to 1 could be rounded up to the next row, so it is bounded.
    keys = np.minimum(row_of + rng.random(len(positive)), np.nextafter(row_of + 1.0, 0))
    order = positive[np.argsort(keys, kind="stable")]
    position = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.zeros(rows.nnz, dtype=bool)
    chosen[order[position < np.repeat(wanted, counts)]] = True
    return chosen


def parts(
    rows: sparse.csr_matrix, chosen: np.ndarray
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split entries by the mask `chosen` (nnz,): first those not chosen, then the chosen ones."""
    return _entries(rows, ~chosen), _entries(rows, chosen)


def _entries(rows: sparse.csr_matrix, chosen: np.ndarray) -> sparse.csr_matrix:
    indptr = np.append(0, np.cumsum(chosen))[rows.indptr]
    return sparse.csr_matrix((rows.data[chosen], rows.indices[chosen], indptr), shape=rows.shape)


def for_scoring(
    rows: sparse.csr_matrix,
) -> tuple[sparse.csr_matrix, sparse.csr_matrix, np.ndarray]:
    """Hide a constant fifth of the entries of each row that has at least two positive ones.

    Returns kept and hidden entries, and the numbers of their rows; other rows are dropped.
    """
    kept, hidden = hide(rows, _HIDDEN_FRACTION, at_least=1)
    measured = np.flatnonzero(np.diff(hidden.indptr))
    return kept[measured], hidden[measured], measured


def canonical(matrix: object, name: str = "user_items") -> sparse.csr_matrix:
    """Return a csr_matrix with sorted indices and summed duplicates; the input is not modified.

    Parameters
    ----------
    matrix : sparse matrix, sparse array or array of shape (n_rows, n_columns)
        Finite numbers.
    name : str
        The argument's name, for messages.

    Returns
    -------
    csr_matrix of shape (n_rows, n_columns)
        Of the input's dtype; int64 if a sum of small integers does not fit.

    Raises
    ------
    TypeError
        For a frame, and for other objects that are not a matrix.
    ValueError
        For NaN or infinity, other kinds of values, other dimensions than two, or a sparse matrix
        whose arrays contradict each other or its shape.
    """
    rows = matrices.canonical(require_users_by_items(matrix, name), name)
    _check_finite(rows, name)
    return rows


def require_users_by_items(matrix: object, name: str) -> sparse.spmatrix:
    """Return sparse matrices unchanged and others as 2-D arrays; errors as in `canonical`."""
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


def relevant(matrix: object, name: str) -> sparse.csr_matrix:
    """Return the positive entries of a matrix; arguments and errors are those of `canonical`."""
    rows = canonical(matrix, name)
    is_relevant = rows.data > 0
    return rows if is_relevant.all() else _entries(rows, is_relevant)


def rankings(ids: ArrayLike, n_rows: int) -> np.ndarray:
    """Check ranked ids.

    Parameters
    ----------
    ids : array-like of int and shape (n_rows, k)
        Best first; below 0 for missing results.
    n_rows : int
        Number of rows that they were ranked for.

    Returns
    -------
    ndarray of int64 and shape (n_rows, k)
        Repeated ids are replaced by -1. A DataWarning gives their number.

    Raises
    ------
    ValueError
        For another shape, or values that are not integers.
    """
    if np.ma.is_masked(ids):
        raise ValueError("ids must have no masked values: pass ids.filled(-1)")
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
    """Whether an array is empty or holds integers that fit into int64."""
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
    """Mean NDCG of ranked ids; the hidden entries are the relevant ones.

    Parameters
    ----------
    ids : ndarray of int and shape (n_rows, k)
        Best first; -1 is never a hit, nor is a repeated id.
    hidden : csr_matrix of shape (n_rows, n_columns)
        At least one positive entry in each row, and no other entries.

    Returns
    -------
    float
        NaN, with an UndefinedMetricWarning, if there are no rows.
    """
    ids = rankings(ids, hidden.shape[0])
    if not len(ids):
        warn_of_undefined("NDCG")
        return float("nan")
    return float(np.mean(ndcg_of_hits(hits_of(ids, hidden), np.diff(hidden.indptr))))


def warn_of_undefined(metric: str) -> None:
    """Warn that no row has enough entries for a metric."""
    warnings.warn(
        f"{metric} is not defined: no row has two positive entries, one to fold in and one to find",
        UndefinedMetricWarning,
        stacklevel=4,
    )


def hits_of(ids: np.ndarray, hidden: sparse.csr_matrix) -> np.ndarray:
    """Whether each ranked id (n, K) is a positive entry of its row, (n, K).

    False for ids below 0 and for ids without a column in `hidden`.
    """
    is_column = (ids >= 0) & (ids < hidden.shape[1])
    if not is_column.any() or not hidden.nnz:
        return np.zeros(ids.shape, bool)
    # Look up by row and id: a single key that combines both could overflow.
    rows = np.arange(len(ids))[:, None]
    return (hidden[rows, np.where(is_column, ids, 0)].toarray() > 0) & is_column


def ndcg_of_hits(hits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """NDCG (n,) of hits (n, K), for rows with `counts` (n,) > 0 entries to find."""
    discounts = 1 / np.log2(np.arange(2, hits.shape[1] + 2))
    return hits @ discounts / np.cumsum(discounts)[np.minimum(counts, hits.shape[1]) - 1]
