"""The k best of each query on a CPU: BLAS multiplies, and the best scores are selected.

The compiled loops of `selection` select. For a few queries NumPy does, unless numba is loaded
already: a process that serves single queries need not load it. Of equal scores, the lower ids are
kept and come first.

Axis letters: B queries, N items, K factors.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from scipy import sparse

from tpu_als.engine.cpu import compiled
from tpu_als.engine.cpu.compiled import read_only
from tpu_als.host import single_blas_thread, threads

BLOCK = 16  # columns of a block
FEW = 4  # up to this many queries, products with vectors are faster than a product of matrices
_FEW_SCORES = 1 << 12  # up to this many scores, each query is ranked by itself
_MOST_INSERTED = 128  # up to this many places are filled by insertion
NO_SCORE = -np.finfo(np.float32).max  # of places without a result, as in implicit
_KEPT_BYTES = 1 << 22
_BATCH_BYTES = 1 << 22  # of a thread's scores, which a core's share of the last cache holds
# BLAS copies the items' rows for each product, so products must have many queries: in float32, 256
# with this number of items.
_MOST_COLUMNS = 1 << 12
_MOST_QUERIES, _LEAST_QUERIES = 256, 16  # of a thread at a time
_CANDIDATE_BYTES = 1 << 24
_LEAST_CHOICE = 256  # items for each place of a result for which a part of the table pays
_LEAST_WORK = 1 << 26  # multiplications for which a thread pays
_NONE = np.empty(0, np.int32)
_NO_LENGTHS = {np.dtype(kind): np.empty(0, kind) for kind in (np.float32, np.float64)}
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
    # Memory for scores that no thread uses at the moment: new pages are expensive.
    unused: deque[np.ndarray] = field(
        default_factory=lambda: deque(maxlen=16), repr=False, compare=False
    )
    # A view of the table for the loops.
    _rows: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", read_only(self.table))

    @property
    def dtype(self) -> np.dtype:
        """Dtype of queries and scores."""
        return self.table.dtype

    def top_k(
        self,
        queries: np.ndarray,
        k: int,
        *,
        seen: sparse.csr_matrix | Seen | None = None,
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
            Items to leave out of every result; ascending.
        approximate_recall : float, optional
            Ignored: the result is exact.

        Returns
        -------
        ids : int32 array (B, k)
            -1 at the tail where fewer than k items were left.
        scores : array (B, k)
            `NO_SCORE` where the id is -1; NaN where the product is NaN or plus infinity.
        """
        if not (k and len(queries) and len(self.table)):
            return empty(len(queries), k, self.table.dtype)
        is_small = len(queries) <= FEW or len(queries) * len(self.table) <= _FEW_SCORES
        if is_small or not compiled.is_available():
            return _of_few(self, queries, k, seen, excluded)
        return self._of_many(queries, k, seen, excluded)

    def best_of_one(
        self, query: np.ndarray, k: int, seen: sparse.csr_matrix | None = None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """`top_k` of the usual single query (K,), with fewer calls around the product.

        Returns ids and scores (k,), or None if the caller must use `top_k`: numba is not loaded, k
        is large, the result has fewer than k items, or a score is not finite.
        """
        if len(query) != self.table.shape[1] or query.dtype != self.table.dtype:
            return None
        loops = _loaded_selection(self, k)
        if loops is None or not k:
            return None
        ids, scores = self._best(loops, query, k, _NONE if seen is None else seen.indices)
        is_complete = scores.item(0) < math.inf and scores.item(k - 1) > -math.inf
        return (ids, scores) if is_complete else None

    def _best(
        self, loops: ModuleType, query: np.ndarray, k: int, hidden: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores (k,) of a query, as `selection.best_of_query` gives them."""
        dtype = self.table.dtype
        lengths = _NO_LENGTHS[dtype] if self.lengths is None else self.lengths
        found: tuple[np.ndarray, np.ndarray] = loops.best_of_query(
            self._rows, _plain(query, dtype), lengths, _plain(hidden, np.int32),
            _scratch(len(self.table), dtype), k,
        )  # fmt: skip
        return found

    def _of_many(
        self,
        queries: np.ndarray,
        k: int,
        seen: sparse.csr_matrix | Seen | None,
        excluded: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        n_items, factors = self.table.shape
        width = min(k, n_items)
        n_threads = min(self.n_threads, 1 + len(queries) * n_items * factors // _LEAST_WORK)
        size = _BATCH_BYTES // (min(n_items, _MOST_COLUMNS) * self.table.itemsize)
        size = min(max(size, _LEAST_QUERIES), _MOST_QUERIES)
        size = max(min(size, _CANDIDATE_BYTES // (8 * width)), 1)
        n_parts = 1
        # Copies take most of the time of few queries, so each thread copies a part of the table.
        if len(queries) <= size and n_items >= n_threads * width * _LEAST_CHOICE:
            n_parts = n_threads
        else:
            n_jobs = -(-len(queries) // size)
            n_jobs += -n_jobs % n_threads  # so that threads end together
            size = -(-len(queries) // n_jobs)
        bounds = [n_items * part // n_parts for part in range(n_parts + 1)]
        longest = -(-n_items // n_parts)
        select = _Selection(self, width, excluded, -(-longest // -(-longest // _MOST_COLUMNS)))

        starts, seen_ids = np.empty(0, np.int64), np.empty(0, np.int32)
        if seen is not None:
            starts = seen.indptr.astype(np.int64, copy=False)
            seen_ids = seen.indices.astype(np.int32, copy=False)
        parts = [empty(len(queries), k, self.table.dtype) for _ in range(n_parts)]

        @np.errstate(over="ignore", invalid="ignore")
        def work(job: tuple[int, int]) -> None:
            low, part = job
            at, (ids, scores) = slice(low, min(low + size, len(queries))), parts[part]
            hidden = Seen(read_only(starts[low : at.stop + 1]), read_only(seen_ids))
            select(queries[at], range(*bounds[part : part + 2]), hidden, ids[at], scores[at])

        with single_blas_thread():
            jobs = itertools.product(range(0, len(queries), size), range(n_parts))
            threads(work, list(jobs), n_threads)
        return parts[0] if n_parts == 1 else _best_of_parts(parts, k)


class _Selection:
    """Selects the best items of some queries, and scores `n_columns` items at a time.

    Parameters
    ----------
    catalog : Catalog
        The table.
    k : int
        Items wanted, at most N.
    excluded : int array or None
        Items to leave out, in any order.
    n_columns : int
        Items to score at a time.
    """

    def __init__(
        self, catalog: Catalog, k: int, excluded: np.ndarray | None, n_columns: int
    ) -> None:
        self._catalog, self._k, self._n_columns = catalog, k, n_columns
        self._loops, dtype = compiled.selection(), catalog.dtype
        lengths = np.empty(0, dtype) if catalog.lengths is None else catalog.lengths
        lengths = np.ascontiguousarray(lengths, dtype)
        with np.errstate(divide="ignore", over="ignore"):
            inverses = 1 / lengths
        inverses[np.isinf(inverses)] = np.nan
        self._lengths = self._loops.Lengths(read_only(lengths), read_only(inverses))
        self._excluded = np.sort(np.asarray(() if excluded is None else excluded, np.int32))

    def __call__(
        self, queries: np.ndarray, items: range, seen: Seen, ids: np.ndarray, scores: np.ndarray
    ) -> None:
        """Write the best of some items to the first k columns of (B, n), as `keep` does.

        The best is first. There are at least k items.
        """
        catalog, k, loops = self._catalog, self._k, self._loops
        n_queries, dtype = len(queries), catalog.dtype
        shape = n_queries, min(2 * k + 32, len(items) + 1)
        candidates = loops.Candidates(
            np.empty(shape, dtype), np.empty(shape, np.int32),
            np.zeros(n_queries, np.int64), np.full(n_queries, -np.inf, dtype),
        )  # fmt: skip
        scratch = self._memory(n_queries * self._n_columns)
        for low in items[:: self._n_columns]:
            rows = catalog.table[low : min(low + self._n_columns, items.stop)]
            products = scratch[: n_queries * len(rows)].reshape(n_queries, len(rows))
            np.matmul(queries, rows.T, out=products)
            between = np.searchsorted(self._excluded, (low, low + len(rows)))
            excluded = read_only(self._excluded[slice(*between)])
            hidden = loops.Hidden(self._lengths, *seen, excluded)
            loops.select(products, low, hidden, k, candidates)
        catalog.unused.append(scratch)
        if k <= _MOST_INSERTED:
            loops.finish(candidates, k, ids, scores)
            return
        best, found = candidates.scores[:, :k], candidates.ids[:, :k]
        order = np.lexsort((found, -best), axis=1)
        found, best = (np.take_along_axis(a, order, 1) for a in (found, best))
        keep(ids[:, :k], scores[:, :k], found, best)

    def _memory(self, size: int) -> np.ndarray:
        """Memory for so many scores."""
        try:
            scratch = self._catalog.unused.pop()
        except IndexError:
            scratch = np.empty(0, self._catalog.dtype)
        return scratch if len(scratch) >= size else np.empty(size, self._catalog.dtype)


def _best_of_parts(
    parts: list[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the ids and scores (B, k) of consecutive parts of a table."""
    ids, scores = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    # NaN comes first, as in each part. Places without a result come last.
    keys = np.where(np.isnan(scores), -np.inf, np.where(ids < 0, np.inf, -scores))
    order = np.argsort(keys, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


class Seen(NamedTuple):
    """Items to leave out of each query's result, as in a CSR matrix without values.

    Attributes
    ----------
    indptr, indices : int array (B + 1,), int array
        Where each query's items begin, and the items.
    """

    indptr: np.ndarray
    indices: np.ndarray


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
    hidden = None
    if seen is not None and len(chosen):
        columns = np.minimum(np.searchsorted(chosen, seen.indices), len(chosen) - 1)
        is_chosen = chosen[columns] == seen.indices
        counts = np.concatenate([[0], np.cumsum(is_chosen)])
        hidden = Seen(counts[seen.indptr], columns[is_chosen])
    ids, scores = Catalog(rows, lengths, 1).top_k(queries, k, seen=hidden)
    if len(chosen):
        ids = np.where(ids < 0, ids, chosen[ids]).astype(np.int32)
    return ids, scores


@np.errstate(over="ignore", invalid="ignore")  # the caller looks for NaN
def _of_few(
    catalog: Catalog,
    queries: np.ndarray,
    k: int,
    seen: sparse.csr_matrix | Seen | None,
    excluded: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """`Catalog.top_k` of a few queries."""
    # Every call of NumPy counts here: its code is not in a cache after a product with the table.
    table, lengths, n_items = catalog.table, catalog.lengths, len(catalog.table)
    width, loops = min(k, n_items), _loaded_selection(catalog, min(k, n_items))
    ids, scores = empty(len(queries), k, table.dtype)
    for row in range(len(queries)):
        hidden = _NONE if excluded is None else excluded
        if seen is not None:
            own = seen.indices[seen.indptr[row] : seen.indptr[row + 1]]
            hidden = own if excluded is None else np.concatenate([own, excluded])
        if loops is None:
            # A product with each query: one with a thin matrix is much slower.
            products = np.dot(table, queries[row], out=_scratch(n_items, table.dtype))
            if lengths is not None:
                products /= lengths
            products[hidden] = -np.inf
            best, found = largest(products, width)
        else:
            found, best = catalog._best(loops, queries[row], width, hidden)
        keep(ids[row, :width], scores[row, :width], found, best)
    return ids, scores


def _loaded_selection(catalog: Catalog, k: int) -> ModuleType | None:
    """The compiled loops for single queries, if they apply.

    They apply if numba is already loaded (loading takes a second), if k is small, and if the arrays
    of the catalog have the types that the loops are compiled for.
    """
    table, lengths = catalog.table, catalog.lengths
    if "numba" not in sys.modules or not (k <= _MOST_INSERTED and k <= len(table)):
        return None
    if lengths is not None and _plain(lengths, table.dtype) is not lengths:
        return None
    is_plain = table.flags.c_contiguous and compiled.is_available()
    return compiled.selection() if is_plain else None


def _plain(array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """An array of the type that the loops are compiled for; a copy if it is of another."""
    if array.dtype == dtype and array.flags.writeable and array.flags.c_contiguous:
        return array
    return np.array(array, dtype)


def largest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Top k values (k,), best first, and columns of scores (n,), in NumPy."""
    # Methods, since numpy's functions around them cost as much as their work here.
    n_blocks = len(scores) // BLOCK
    if n_blocks < 4 * k:
        maxima, n_blocks = scores.copy(), len(scores)
    else:
        maxima = np.maximum.reduce(scores[: n_blocks * BLOCK].reshape(BLOCK, n_blocks))
    maxima.partition((n_blocks - k, n_blocks - 1))
    if math.isnan(maxima[-1]):
        return largest(np.where(scores < np.inf, scores, np.inf), k)
    columns = (scores >= maxima[n_blocks - k]).nonzero()[0]  # at least k, and few more
    values = scores.take(columns)
    order = (-values).argsort(kind="stable")[:k]
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
