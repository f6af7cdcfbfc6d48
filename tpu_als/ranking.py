"""Scores, filters and exact top-k over a catalog of items.

Axis letters: B queries of a batch, N items, K factors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy import sparse

from tpu_als import layout
from tpu_als.mesh import Workplace, precision

_BATCH_BYTES = 1 << 23  # of scores kept at once by a thread
_BLOCKS = (32, 8)
_HOST_BLOCK = 64
HOST_QUERIES = 4  # up to so many queries, a dispatch costs more than the product


@dataclass(frozen=True)
class Catalog:
    """A table to rank.

    Attributes
    ----------
    table : array (N, K)
        The rows, on the host.
    placed : tuple of arrays (N', K)
        The rows on each device, in equal parts, each padded to N'.
    place : Workplace
        Where they are.
    """

    table: np.ndarray
    placed: tuple[Array, ...]
    place: Workplace

    @property
    def dtype(self) -> str:
        """Name of the dtype, "float32" or "float64"."""
        return self.table.dtype.name


def catalog(table: np.ndarray, place: Workplace) -> Catalog:
    """Place a table (N, K), float32 or float64, to rank its rows."""
    part = layout.round_up(max(-(-len(table) // len(place.devices)), 1))
    placed = []
    with precision(table.dtype.name):
        for number, device in enumerate(place.devices):
            rows = np.zeros((part, table.shape[1]), table.dtype)
            own = table[number * part : (number + 1) * part]
            rows[: len(own)] = own
            placed.append(jax.device_put(rows, device))
    return Catalog(table, tuple(placed), place)


def top_k(
    queries: np.ndarray,
    catalog: Catalog,
    k: int,
    *,
    seen: sparse.csr_matrix | None = None,
    excluded: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Best k items of each query by inner product, exactly; best first.

    Parameters
    ----------
    queries : array (B, K)
        In the catalog's dtype.
    catalog : Catalog
        The items.
    k : int
        Items wanted.
    seen : CSR matrix (B, N), optional
        Items to leave out of each query's result.
    excluded : int array, optional
        Items to leave out of every result.

    Returns
    -------
    ids : int32 array (B, k)
        -1 at the tail where fewer than k items were left.
    scores : array (B, k)
        Inner products; -FLT_MAX where the id is -1.
    """
    ids, scores = _empty(len(queries), k, catalog.table.dtype)
    width = min(k, len(catalog.table))
    if width == 0 or len(queries) == 0:
        return ids, scores
    batch = _batch(len(queries), catalog)

    def work(low: int) -> None:
        at = slice(low, low + batch)
        own = seen[at] if seen is not None else None
        found = _rank_on_devices(queries[at], catalog, width, own, excluded, batch)
        _keep_finite(ids[at, :width], scores[at, :width], *found)

    catalog.place.threads(work, range(0, len(queries), batch))
    return ids, scores


def top_k_on_host(
    queries: np.ndarray,
    table: np.ndarray,
    k: int,
    *,
    lengths: np.ndarray | None = None,
    seen: sparse.csr_matrix | None = None,
    excluded: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`top_k` of a few queries over a table (N, K) in NumPy, without any dispatch.

    `lengths` (N,), where given, divide the scores; the rest is as in `top_k`.
    """
    ids, scores = _empty(len(queries), k, table.dtype)
    width = min(k, len(table))
    if width == 0:
        return ids, scores
    # One product a query: a thin matrix product is much slower than so many with a vector.
    products = np.stack([table @ query for query in queries])
    if lengths is not None:
        products /= lengths
    if seen is not None:
        products[np.repeat(np.arange(len(queries)), np.diff(seen.indptr)), seen.indices] = -np.inf
    if excluded is not None:
        products[:, excluded] = -np.inf
    best = _candidates(products, width)
    found = np.take_along_axis(products, best, 1)
    order = np.argsort(-found, axis=1, kind="stable")[:, :width]
    best, found = np.take_along_axis(best, order, 1), np.take_along_axis(found, order, 1)
    _keep_finite(ids[:, :width], scores[:, :width], best, found)
    return ids, scores


def _candidates(products: np.ndarray, k: int) -> np.ndarray:
    """Columns (B, at least k) among which the k best of each row are.

    The k best stand in the k blocks with the largest maxima, or in what is left of a whole block.
    """
    n_queries, n_items = products.shape
    n_blocks = n_items // _HOST_BLOCK
    chosen = np.arange(n_items)[None].repeat(n_queries, 0)
    if n_blocks > 2 * k:
        whole = products[:, : n_blocks * _HOST_BLOCK].reshape(n_queries, n_blocks, _HOST_BLOCK)
        blocks = np.argpartition(whole.max(axis=2), -k, axis=1)[:, -k:]
        inside = blocks[:, :, None] * _HOST_BLOCK + np.arange(_HOST_BLOCK)
        rest = chosen[:, n_blocks * _HOST_BLOCK :]
        chosen = np.concatenate([inside.reshape(n_queries, -1), rest], axis=1)
    best = np.argpartition(np.take_along_axis(products, chosen, 1), -k, axis=1)[:, -k:]
    return np.take_along_axis(chosen, best, 1)


def _empty(n_queries: int, k: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((n_queries, k), -1, np.int32)
    return ids, np.full((n_queries, k), -np.finfo(np.float32).max, dtype)


def _keep_finite(
    ids: np.ndarray, scores: np.ndarray, found: np.ndarray, products: np.ndarray
) -> None:
    """Write the results that are not hidden ones."""
    kept = np.isfinite(products)
    ids[kept], scores[kept] = found[kept], products[kept]


def _batch(n_queries: int, catalog: Catalog) -> int:
    """Queries ranked at once: a power of two, so that few shapes are compiled."""
    size = catalog.table.dtype.itemsize
    most = max(_BATCH_BYTES // (catalog.placed[0].shape[0] * size), 8)
    share = -(-n_queries // catalog.place.n_shards)
    return 1 << min(int(most).bit_length() - 1, max(share - 1, 7).bit_length())


def _rank_on_devices(
    queries: np.ndarray,
    catalog: Catalog,
    k: int,
    seen: sparse.csr_matrix | None,
    excluded: np.ndarray | None,
    batch: int,
) -> tuple[np.ndarray, np.ndarray]:
    n_items, part = len(catalog.table), catalog.placed[0].shape[0]
    padded = np.zeros((batch, queries.shape[1]), queries.dtype)
    padded[: len(queries)] = queries
    hidden = _hidden(batch, part * len(catalog.placed), seen, excluded, n_items)
    found = []
    with precision(catalog.dtype):
        for number, rows in enumerate(catalog.placed):
            own = np.ascontiguousarray(hidden[:, number * part : (number + 1) * part])
            found.append(_rank(padded, rows, own, min(_wide(k), part)))
    scores = np.concatenate([np.asarray(s) for s, _ in found], axis=1)[: len(queries)]
    ids = np.concatenate(
        [np.asarray(i) + number * part for number, (_, i) in enumerate(found)], axis=1
    )[: len(queries)]
    # Stable, so that among equal scores the smaller id of the earlier part comes first.
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


def _wide(k: int) -> int:
    """Compile for a few widths only."""
    return 1 << max(k - 1, 15).bit_length()


def _hidden(
    n_rows: int,
    n_columns: int,
    seen: sparse.csr_matrix | None,
    excluded: np.ndarray | None,
    n_items: int,
) -> np.ndarray:
    """Whether an item must not be recommended, (n_rows, n_columns)."""
    hidden = np.zeros((n_rows, n_columns), bool)
    hidden[:, n_items:] = True
    if excluded is not None:
        hidden[:, excluded] = True
    if seen is not None:
        hidden[np.repeat(np.arange(seen.shape[0]), np.diff(seen.indptr)), seen.indices] = True
    return hidden


@functools.partial(jax.jit, static_argnums=3)
def _rank(queries: Array, rows: Array, hidden: Array, k: int) -> tuple[Array, Array]:
    """Top k scores (B, k) and row numbers of one part of the catalog.

    The k best stand in the k blocks with the largest maxima, so only those are sorted. Items of a
    block lie a whole number of blocks apart: a maximum over them is one over contiguous runs.
    """
    scores = jnp.matmul(queries, rows.T, precision=lax.Precision.HIGHEST)
    scores = jnp.where(hidden, -jnp.inf, scores)
    return _best(scores, k)


def _best(scores: Array, k: int) -> tuple[Array, Array]:
    """Top k values (B, k) and columns of scores (B, n), by blocks while that pays."""
    n_queries, n_columns = scores.shape
    for size in _BLOCKS:
        n_blocks = n_columns // size
        if n_columns % size == 0 and n_blocks >= 4 * k:
            break
    else:
        return lax.top_k(scores, k)
    members = scores.reshape(n_queries, size, n_blocks)
    _, blocks = lax.top_k(members.max(axis=1), k)
    inside = jnp.take_along_axis(members, blocks[:, None, :], axis=2, mode="promise_in_bounds")
    best, at = _best(inside.reshape(n_queries, -1), k)
    return best, at // k * n_blocks + jnp.take_along_axis(blocks, at % k, axis=1)
