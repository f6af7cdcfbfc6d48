"""The k largest of each row of scores, exactly, on a device or in NumPy.

The k best are in the k blocks with the largest maxima, so only those blocks are sorted. The columns
of a block are strided, so that the maxima of all blocks are maxima over contiguous runs.

Axis letters: B queries, n columns.
"""

from __future__ import annotations

import functools
import threading

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy import sparse

BLOCK = 16  # columns of a block that NumPy sorts
_BLOCKS = (32, 8)
HOST_QUERIES = 4  # up to this many queries, a dispatch costs more than the product
_KEPT_BYTES = 1 << 22
_NEAR_BYTES = 1 << 19  # of columns to choose from at once, which a core's cache holds
_memory = threading.local()


def largest(scores: Array, k: int, recall: float | None = None) -> tuple[Array, Array]:
    """Top k values (B, k) and columns of scores (B, n) on the device; traced.

    `recall`, where given, lets a TPU find this share of them in expectation, in one pass.
    """
    if recall is not None:
        best, columns = lax.approx_max_k(scores, k, recall_target=recall)
        return best, columns
    n_queries, n_columns = scores.shape
    for size in _BLOCKS:
        n_blocks = n_columns // size
        if n_columns % size == 0 and n_blocks >= 4 * k:
            break
    else:
        best, columns = lax.top_k(scores, k)
        return best, columns
    members = scores.reshape(n_queries, size, n_blocks)
    _, blocks = lax.top_k(members.max(axis=1), k)
    inside = jnp.take_along_axis(members, blocks[:, None, :], axis=2, mode="promise_in_bounds")
    best, at = largest(inside.reshape(n_queries, -1), k)
    return best, at // k * n_blocks + jnp.take_along_axis(blocks, at % k, axis=1)


def maxima(scores: Array, shown: Array, k: int) -> Array | None:
    """Maxima (B, n / BLOCK) of the blocks for `largest_of_blocks`; None where they do not pay.

    Only columns that are `shown` (n,) count.
    """
    n_columns = scores.shape[1]
    if n_columns % BLOCK or n_columns < 4 * k * BLOCK:
        return None
    # Of slices and with a sum, which XLA makes one loop of; a masked reduction took twice as long.
    added = jnp.where(shown, 0, -jnp.inf).astype(scores.dtype).reshape(BLOCK, 1, -1)
    parts = jnp.split(scores, BLOCK, axis=1)
    return functools.reduce(jnp.maximum, map(jnp.add, parts, added))


def largest_of_blocks(
    scores: np.ndarray, maxima: np.ndarray | None, shown: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Top k values (B, k), best first, and columns of scores (B, n) in NumPy.

    `maxima` are those of the columns that are `shown` (n,), by blocks.
    """
    if maxima is None:
        return _sorted(np.where(shown, scores, -np.inf), k)
    step = max(_NEAR_BYTES // (BLOCK * k * np.dtype(np.intp).itemsize), 1)
    parts = (slice(low, low + step) for low in range(0, len(scores), step))
    found = (_of_blocks(scores[at], maxima[at], shown, k) for at in parts)
    best, columns = map(np.concatenate, zip(*found, strict=True))
    return best, columns


def _of_blocks(
    scores: np.ndarray, maxima: np.ndarray, shown: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """`largest_of_blocks` for a few rows at a time, so that the scores stay in a core's cache."""
    n_queries, n_blocks = maxima.shape
    blocks = np.argpartition(maxima, -k, axis=1)[:, -k:]
    blocks.sort(axis=1)  # so that memory is read in its order
    inside = (blocks[:, None, :] + n_blocks * np.arange(BLOCK)[:, None]).reshape(n_queries, -1)
    values = _take(scores, inside)
    values[~shown.take(inside)] = -np.inf
    best, at = _sorted(values, k)
    return best, _take(inside, at)


def _sorted(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    at = np.argpartition(values, -k, axis=1)[:, -k:]
    best = _take(values, at)
    order = np.argsort(best, axis=1)[:, ::-1]
    return _take(best, order), _take(at, order)


def _take(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """np.take_along_axis(values, columns, 1), several times as fast."""
    rows = np.arange(len(values))[:, None] * values.shape[1]
    return values.reshape(-1).take(columns + rows)


def largest_of_row(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Top k values (k,), best first, and columns of scores (n,) in NumPy."""
    # Methods, since numpy's functions around them cost as much as their work here.
    n_blocks = len(scores) // BLOCK
    if n_blocks < 4 * k:
        columns = scores.argpartition(-k)[-k:]
    else:
        maxima = np.maximum.reduce(scores[: n_blocks * BLOCK].reshape(BLOCK, n_blocks))
        maxima.partition(n_blocks - k)
        # So many columns have at least this, and few more do.
        columns = (scores >= maxima[n_blocks - k]).nonzero()[0]
    values = scores.take(columns)
    order = values.argsort()[: -k - 1 : -1]
    return values.take(order), columns.take(order)


def top_k_on_host(
    queries: np.ndarray,
    table: np.ndarray,
    k: int,
    *,
    lengths: np.ndarray | None = None,
    seen: sparse.csr_matrix | None = None,
    excluded: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`ranking.top_k` of a few queries over a table (N, K) of the host, without any dispatch.

    `lengths` (N,), where given, divide the scores; the rest is as there.
    """
    width = min(k, len(table))
    if not width:
        return empty(len(queries), k, table.dtype)
    ids, scores = np.empty((len(queries), k), np.int32), np.empty((len(queries), k), table.dtype)
    # One product per query: a thin matrix product is much slower than products with vectors.
    for row, query in enumerate(queries):
        products = np.matmul(table, query, out=_scratch(len(table), table.dtype))
        if lengths is not None:
            products /= lengths
        if seen is not None:
            products[seen.indices[seen.indptr[row] : seen.indptr[row + 1]]] = -np.inf
        if excluded is not None:
            products[excluded] = -np.inf
        best, found = largest_of_row(products, width)
        if best[-1] > -np.inf and width == k:  # the usual call: nothing is missing
            ids[row], scores[row] = found, best
        else:
            ids[row], scores[row] = empty(1, k, table.dtype)
            keep_finite(ids[row, :width], scores[row, :width], found, best)
    return ids, scores


def top_k_of_chosen(
    queries: np.ndarray,
    rows: np.ndarray,
    chosen: np.ndarray,
    k: int,
    *,
    lengths: np.ndarray | None = None,
    seen: sparse.csr_matrix | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`top_k_on_host` of any number of queries over some rows (n, K) of a table.

    `chosen` (n,) are their ids, ascending; `seen` is of the whole table.
    """
    ids, scores = empty(len(queries), k, rows.dtype)
    width = min(k, len(chosen))
    step = max(_KEPT_BYTES // max(rows.dtype.itemsize * len(chosen), 1), 1)
    for low in range(0, len(queries) if width else 0, step):
        at = slice(low, low + step)
        products = queries[at] @ rows.T
        if lengths is not None:
            products /= lengths
        if seen is not None:
            part = seen[at]
            place = np.minimum(np.searchsorted(chosen, part.indices), len(chosen) - 1)
            hit = chosen[place] == part.indices
            row = np.repeat(np.arange(len(products)), np.diff(part.indptr))
            products[row[hit], place[hit]] = -np.inf
        best, found = _sorted(products, width)
        keep_finite(ids[at, :width], scores[at, :width], chosen[found], best)
    return ids, scores


def _scratch(length: int, dtype: np.dtype) -> np.ndarray:
    """Memory of this thread, reused if small: page faults take half of a product's time."""
    kept = getattr(_memory, "scratch", None)
    if kept is None or len(kept) < length or kept.dtype != dtype:
        kept = np.empty(length, dtype)
        if kept.nbytes <= _KEPT_BYTES:
            _memory.scratch = kept
    return kept[:length]


def empty(n_queries: int, k: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores (B, k) of places without a result."""
    ids = np.full((n_queries, k), -1, np.int32)
    return ids, np.full((n_queries, k), -np.finfo(np.float32).max, dtype)


def keep_finite(
    ids: np.ndarray, scores: np.ndarray, found: np.ndarray, products: np.ndarray
) -> None:
    """Write the results that are not hidden ones."""
    kept = np.isfinite(products)
    ids[kept], scores[kept] = found[kept], products[kept]
