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

_BATCH_BYTES = 1 << 24  # of scores kept at once by a thread
_HOST_QUERIES = 4  # up to so many queries, a dispatch costs more than the product


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
    ids = np.full((len(queries), k), -1, np.int32)
    scores = np.full((len(queries), k), -np.finfo(np.float32).max, catalog.table.dtype)
    width = min(k, len(catalog.table))
    if width == 0 or len(queries) == 0:
        return ids, scores
    batch = _batch(len(queries), catalog)
    on_host = len(queries) <= _HOST_QUERIES

    def work(low: int) -> None:
        at = slice(low, low + batch)
        own = seen[at] if seen is not None else None
        if on_host:
            found = _rank_on_host(queries[at], catalog, width, own, excluded)
        else:
            found = _rank_on_devices(queries[at], catalog, width, own, excluded, batch)
        kept = np.isfinite(found[1])
        ids[at, :width] = np.where(kept, found[0], -1)
        scores[at, :width] = np.where(kept, found[1], scores[at, :width])

    catalog.place.threads(work, range(0, len(queries), batch))
    return ids, scores


def _batch(n_queries: int, catalog: Catalog) -> int:
    """Queries ranked at once: a power of two, so that few shapes are compiled."""
    size = catalog.table.dtype.itemsize
    most = max(_BATCH_BYTES // (catalog.placed[0].shape[0] * size), 8)
    share = -(-n_queries // catalog.place.n_shards)
    return 1 << min(int(most).bit_length() - 1, max(share - 1, 7).bit_length())


def _rank_on_host(
    queries: np.ndarray,
    catalog: Catalog,
    k: int,
    seen: sparse.csr_matrix | None,
    excluded: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    scores = queries @ catalog.table.T
    if seen is not None:
        scores[np.repeat(np.arange(len(queries)), np.diff(seen.indptr)), seen.indices] = -np.inf
    if excluded is not None:
        scores[:, excluded] = -np.inf
    best = np.argpartition(scores, -k, axis=1)[:, -k:]
    order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
    best = np.take_along_axis(best, order, 1)
    return best, np.take_along_axis(scores, best, 1)


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
    hidden = _hidden_bits(batch, part * len(catalog.placed), seen, excluded, n_items)
    found = []
    with precision(catalog.dtype):
        for number, rows in enumerate(catalog.placed):
            bits = hidden[:, number * part // 8 : (number + 1) * part // 8]
            found.append(_rank(padded, rows, np.ascontiguousarray(bits), min(_wide(k), part)))
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


def _hidden_bits(
    n_rows: int,
    n_columns: int,
    seen: sparse.csr_matrix | None,
    excluded: np.ndarray | None,
    n_items: int,
) -> np.ndarray:
    """One bit a cell (n_rows, n_columns / 8): set where an item must not be recommended."""
    hidden = np.zeros((n_rows, n_columns // 8), np.uint8)
    everywhere = np.zeros(n_columns, np.uint8)
    everywhere[n_items:] = 1
    if excluded is not None:
        everywhere[excluded] = 1
    if seen is not None:
        rows = np.repeat(np.arange(seen.shape[0]), np.diff(seen.indptr))
        bits = np.left_shift(1, 7 - seen.indices % 8).astype(np.uint8)
        np.bitwise_or.at(hidden, (rows, seen.indices // 8), bits)
    return hidden | np.packbits(everywhere)


@functools.partial(jax.jit, static_argnums=3)
def _rank(queries: Array, rows: Array, hidden: Array, k: int) -> tuple[Array, Array]:
    """Top k scores (B, k) and row numbers of one part of the catalog."""
    scores = jnp.matmul(queries, rows.T, precision=lax.Precision.HIGHEST)
    shifts = jnp.arange(7, -1, -1, dtype=jnp.uint8)
    bits = (hidden[:, :, None] >> shifts[None, None]) & jnp.uint8(1)
    scores = jnp.where(bits.reshape(scores.shape) == 1, -jnp.inf, scores)
    return lax.top_k(scores, k)
