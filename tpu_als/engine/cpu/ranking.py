"""The k best of each query on a CPU: BLAS multiplies, NumPy chooses.

The k best columns of a row are in the k blocks with the largest maxima, so only those blocks are
sorted. The columns of a block are strided, so that the maxima of all blocks are maxima over
contiguous runs.

Axis letters: B queries, N items, K factors.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from tpu_als.host import single_blas_thread, threads

BLOCK = 16  # columns of a block
FEW = 4  # up to this many queries, products with vectors are faster than a product of matrices
NO_SCORE = -np.finfo(np.float32).max  # of places without a result, as in implicit
_KEPT_BYTES = 1 << 22
_NEAR_BYTES = 1 << 19  # of columns to choose from at once, which a core's cache holds
_BATCH_BYTES = 1 << 25  # of scores of a thread
_memory = threading.local()


@dataclass(frozen=True)
class Catalog:
    """A table to rank.

    Attributes
    ----------
    table : array (N, K)
        float32 or float64. It is read in each call, so later changes are seen.
    lengths : array (N,) or None
        What scores are divided by.
    n_threads : int
        Number of threads.
    """

    table: np.ndarray
    lengths: np.ndarray | None
    n_threads: int

    @property
    def dtype(self) -> np.dtype:
        """Dtype of queries and scores."""
        return self.table.dtype

    def top_k(
        self,
        queries: np.ndarray,
        k: int,
        *,
        seen: sparse.csr_matrix | None = None,
        excluded: np.ndarray | None = None,
        approximate_recall: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best k items of each query by product; best first.

        Parameters
        ----------
        queries : array (B, K)
            In the table's dtype.
        k : int
            Items wanted.
        seen : CSR matrix (B, N), optional
            Items to leave out of each query's result.
        excluded : int array, optional
            Items to leave out of every result.
        approximate_recall : float, optional
            Ignored: the result is exact.

        Returns
        -------
        ids : int32 array (B, k)
            -1 at the tail where fewer than k items were left.
        scores : array (B, k)
            `NO_SCORE` where the id is -1; NaN where the product is NaN or infinite.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for NaN
            return self._best(queries, k, seen, excluded)

    def _best(
        self,
        queries: np.ndarray,
        k: int,
        seen: sparse.csr_matrix | None,
        excluded: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        if len(queries) <= FEW:
            return _of_few(self, queries, k, seen, excluded)
        ids, scores = empty(len(queries), k, self.table.dtype)
        width = min(k, len(self.table))
        if not width:
            return ids, scores
        row_bytes = len(self.table) * self.table.itemsize
        share = -(-len(queries) // self.n_threads)
        size = min(max(_BATCH_BYTES // row_bytes, 8), share)
        scratch = threading.local()

        @np.errstate(over="ignore", invalid="ignore")
        def work(low: int) -> None:
            at = slice(low, min(low + size, len(queries)))
            if not hasattr(scratch, "scores"):
                scratch.scores = np.empty((size, len(self.table)), self.table.dtype)
            products = scratch.scores[: at.stop - low]
            np.matmul(queries[at], self.table.T, out=products)
            if self.lengths is not None:
                products /= self.lengths
            if seen is not None:
                part = seen[at]
                products[
                    np.repeat(np.arange(len(products)), np.diff(part.indptr)), part.indices
                ] = -np.inf
            if excluded is not None:
                products[:, excluded] = -np.inf
            best, found = largest(products, width)
            keep(ids[at, :width], scores[at, :width], found, best)

        with single_blas_thread():
            threads(work, range(0, len(queries), size), self.n_threads)
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
    """`Catalog.top_k` over some rows (n, K) of a table.

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
        keep(ids[at, :width], scores[at, :width], chosen[found], best)
    return ids, scores


def _of_few(
    catalog: Catalog,
    queries: np.ndarray,
    k: int,
    seen: sparse.csr_matrix | None,
    excluded: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """`Catalog.top_k` of a few queries."""
    table, lengths = catalog.table, catalog.lengths
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
        best, found = _largest_of_row(products, width)
        if np.inf > best[0] and best[-1] > -np.inf and width == k:  # nothing is missing
            ids[row], scores[row] = found, best
        else:
            ids[row], scores[row] = empty(1, k, table.dtype)
            keep(ids[row, :width], scores[row, :width], found, best)
    return ids, scores


def largest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Top k values (B, k), best first, and columns of scores (B, n)."""
    n_queries, n_columns = scores.shape
    n_blocks = n_columns // BLOCK
    if n_blocks < 4 * k:
        return _sorted(scores, k)
    step = max(_NEAR_BYTES // (BLOCK * k * np.dtype(np.intp).itemsize), 1)
    found = [_of_blocks(scores[low : low + step], k) for low in range(0, n_queries, step)]
    best, columns = map(np.concatenate, zip(*found, strict=True))
    return best, columns


def _of_blocks(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`largest` for a few rows at a time, so that the columns to choose from stay in a cache."""
    n_queries, n_columns = scores.shape
    n_blocks = n_columns // BLOCK
    # Of slices: a reduction over the middle axis takes several times as long.
    maxima = scores[:, :n_blocks].copy()
    for low in range(n_blocks, BLOCK * n_blocks, n_blocks):
        np.maximum(maxima, scores[:, low : low + n_blocks], out=maxima)
    blocks = np.argpartition(maxima, -k, axis=1)[:, -k:]
    blocks.sort(axis=1)  # so that memory is read in its order
    inside = (blocks[:, None, :] + n_blocks * np.arange(BLOCK)[:, None]).reshape(n_queries, -1)
    rest = np.arange(BLOCK * n_blocks, n_columns)
    if len(rest):
        rest = np.broadcast_to(rest, (n_queries, len(rest)))
        inside = np.concatenate([inside, rest], axis=1)
    best, at = _sorted(_take(scores, inside), k)
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


def _largest_of_row(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
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
    return ids, np.full((n_queries, k), NO_SCORE, dtype)


def keep(ids: np.ndarray, scores: np.ndarray, found: np.ndarray, products: np.ndarray) -> None:
    """Write the results that are not hidden ones; of NaN and infinity a score of NaN only."""
    kept = np.isfinite(products)
    ids[kept], scores[kept] = found[kept], products[kept]
    scores[~(products < np.inf)] = np.nan
