"""Scores, filters and exact top-k over a catalog of items.

A catalog is stored on the devices like a table of the engine; each device has its own part. All
devices score the same queries, and exchange only the best few items of their parts.

Axis letters: B queries of a batch, N items, K factors, W work shards, S slots of a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy import sparse

from tpu_als.engine import layout
from tpu_als.engine.cpu.ranking import empty, keep
from tpu_als.engine.layout import RowMap
from tpu_als.engine.xla import selection
from tpu_als.engine.xla.mesh import Collectives, DeviceMesh, Shards, precision
from tpu_als.engine.xla.programs import REPLICATED, SHARDED

# Bytes of scores kept at once: by a thread of a CPU, by another device.
_BATCH_BYTES = {"cpu": 1 << 26, "other": 1 << 28}
SEEN = 1 << 12  # least length that lists of seen items are padded to, so that shapes are few
_LANES = {"tpu": 128}
_SHORTEST = 1e-10  # replaces the length of a zero row, to allow division


class CatalogParts(NamedTuple):
    """Rows (W, S, K), lengths (W, S) or None, and whether a slot is ranked (W, S)."""

    rows: Shards
    lengths: Shards | None
    shown: Shards


class CatalogPart(NamedTuple):
    """One part of a catalog: rows (S, K), lengths (S,) or None, and whether a slot is ranked."""

    rows: Array
    lengths: Array | None
    shown: Array


class SeenItems(NamedTuple):
    """Items to leave out: the query, and the shard and slot of the item, padded with shard -1."""

    query: Array | np.ndarray
    shard: Array | np.ndarray
    slot: Array | np.ndarray


class Queries(NamedTuple):
    """Queries (B, K), and the items to leave out of each result."""

    rows: Array | np.ndarray
    seen: SeenItems


class RankStatic(NamedTuple):
    """Static arguments of a ranking program.

    Attributes
    ----------
    k : int
        Items of each result.
    dtype : str
        Dtype of scores.
    recall : float or None
        See `Catalog.top_k`.
    lanes : int
        Scores that are set together where items are left out.
    """

    k: int
    dtype: str
    recall: float | None
    lanes: int


class Best(NamedTuple):
    """The best items of each query, best first: scores, shards and slots (B, k)."""

    scores: Array
    shards: Array
    slots: Array


@dataclass(frozen=True)
class Catalog:
    """A table to rank, on the devices.

    Attributes
    ----------
    rows : Shards (W, S, K)
        The table.
    lengths : Shards (W, S) or None
        Divisors of scores.
    shown : Shards (W, S)
        Whether a slot has a row.
    slots : int array (N,)
        Global slot of each row.
    ids : int32 array (W, S)
        Row of each slot, or -1.
    mesh : DeviceMesh
        The devices.
    dtype : {"float32", "float64"}
        Dtype of queries and scores; the table may be stored in bfloat16.
    """

    rows: Shards
    lengths: Shards | None
    shown: Shards
    slots: np.ndarray
    ids: np.ndarray
    mesh: DeviceMesh
    dtype: str

    def top_k(
        self,
        queries: np.ndarray,
        k: int,
        *,
        seen: sparse.csr_matrix | None = None,
        excluded: np.ndarray | None = None,
        approximate_recall: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best k items of each query by inner product, exactly; best first.

        If there are several processes, each passes the same arguments and gets the whole result.

        Parameters
        ----------
        queries : array (B, K)
            In the catalog's dtype.
        k : int
            Number of items.
        seen : CSR matrix (B, N), optional
            Items to leave out of each query's result.
        excluded : int array, optional
            Items to leave out of every result.
        approximate_recall : float, optional
            For a faster search on TPUs, which finds this share of the k best in expectation
            (Chern et al. 2022, arXiv 2206.14286). Other devices always search exactly.

        Returns
        -------
        ids : int32 array (B, k)
            -1 at the end if fewer than k items can be returned.
        scores : array (B, k)
            Inner products, divided by the catalog's lengths if any; -FLT_MAX where the id is -1.

        Raises
        ------
        ValueError
            For an `approximate_recall` that is not between 0 and 1.
        """
        if approximate_recall is not None and not 0 < approximate_recall < 1:
            raise ValueError(
                f"approximate_recall must be a number between 0 and 1, or None for an exact "
                f"search, got {approximate_recall!r}"
            )
        ids, scores = empty(len(queries), k, np.dtype(self.dtype))
        width = min(k, len(self.slots))
        if width == 0 or len(queries) == 0:
            return ids, scores
        batch = batch_size(len(queries), self)
        program, parts = top_k_program(self, width, approximate_recall), _parts_of(self, excluded)
        # Not in parallel: all devices must run programs that communicate in the same order.
        for low in range(0, len(queries), batch):
            at = slice(low, low + batch)
            count = len(queries[at])
            padded = np.zeros((batch, queries.shape[1]), self.dtype)
            padded[:count] = queries[at]
            hidden = _seen_items(seen[at] if seen is not None else None, self)
            with precision(self.dtype):
                best = program(parts, Queries(padded, hidden))
                values, shards, slots = (np.asarray(array) for array in best)
            found = self.ids[shards, slots][:count, :width]
            keep(ids[at, :width], scores[at, :width], found, values[:count, :width])
        return ids, scores


def catalog(table: np.ndarray, mesh: DeviceMesh, *, lengths: np.ndarray | None = None) -> Catalog:
    """Place a table of the host in equal parts, to rank its rows.

    Parameters
    ----------
    table : array (N, K)
        float32 or float64.
    mesh : DeviceMesh
        The devices to place it on.
    lengths : array (N,), optional
        Divisors of scores: the rows' lengths, for cosines with unit queries.
    """
    n_parts = len(mesh.devices)
    n_slots = layout.round_up(max(-(-len(table) // n_parts), 1))
    slots, dtype = np.arange(len(table)), table.dtype
    if lengths is not None:
        table = (table / lengths[:, None]).astype(dtype, copy=False)
    with precision(dtype.name):
        rows = mesh.put(_in_parts(table, slots, n_slots, _local_parts(n_parts, mesh)))
    return _catalog(rows, slots, (n_parts, n_slots), mesh, None, dtype.name)


def catalog_of(
    table: Shards,
    rows: RowMap,
    mesh: DeviceMesh,
    *,
    cosine: bool = False,
    lengths: np.ndarray | None = None,
) -> Catalog:
    """Rank the rows of a table of the engine, without a copy.

    If there are several processes, all must make this call, and the same calls of `top_k`.

    Parameters
    ----------
    table : Shards (W, S, K)
        In slot order, float32, float64 or bfloat16; scores of the latter are float32.
    rows : RowMap
        The slots of the rows.
    mesh : DeviceMesh
        The devices of the table.
    cosine : bool, default=False
        Divide scores by the rows' lengths, which the devices compute; 1e-10 replaces 0.
    lengths : array (N,), optional
        Divide scores by these instead.
    """
    first = table[0] if isinstance(table, list) else table
    dtype = "float64" if first.dtype == np.float64 else "float32"
    shape = (rows.n_shards, rows.n_slots)
    catalog = _catalog(table, rows.slots, shape, mesh, lengths, dtype)
    if not cosine or lengths is not None:
        return catalog
    with precision(dtype):
        return replace(
            catalog, lengths=mesh.all_shards_program(_lengths, dtype, SHARDED)(table, None)
        )


def _catalog(
    rows: Shards,
    slots: np.ndarray,
    shape: tuple[int, int],
    mesh: DeviceMesh,
    lengths: np.ndarray | None,
    dtype: str,
) -> Catalog:
    ids = np.full(shape, -1, np.int32)
    ids.ravel()[slots] = np.arange(len(slots), dtype=np.int32)
    local, divisors = _local_parts(shape[0], mesh), None
    with precision(dtype):
        if lengths is not None:
            parts = _in_parts(lengths.astype(dtype, copy=False), slots, shape[1], local)
            divisors = mesh.put(np.where(parts == 0, np.ones((), dtype), parts))
        shown = mesh.put(ids[local] >= 0)
    return Catalog(rows, divisors, shown, slots, ids, mesh, dtype)


def _local_parts(n_parts: int, mesh: DeviceMesh) -> slice:
    """The parts of this process."""
    if mesh.jax_mesh is None:
        return slice(n_parts)
    return slice(mesh.local_shards.start, mesh.local_shards.stop)


def _in_parts(values: np.ndarray, slots: np.ndarray, n_slots: int, parts: slice) -> np.ndarray:
    """Move values (N, ...) of rows to some of the parts (P, S, ...); 0 where there is no row."""
    first, count = parts.start or 0, parts.stop - (parts.start or 0)
    out = np.zeros((count * n_slots, *values.shape[1:]), values.dtype)
    at = slots - first * n_slots
    is_inside = (at >= 0) & (at < len(out))
    out[at[is_inside]] = values[is_inside]
    return out.reshape(count, n_slots, *values.shape[1:])


def _lengths(dtype: str, _: Collectives, table: Shards, __: None) -> Shards:
    """Length of each row."""

    def lengths(rows: Array) -> Array:
        squares = jnp.sum(jnp.square(rows.astype(dtype)), axis=1)
        return jnp.where(squares == 0, jnp.asarray(_SHORTEST, dtype), jnp.sqrt(squares))

    return jax.tree.map(lengths, table)


def _shown(catalog: Catalog, excluded: np.ndarray | None) -> np.ndarray:
    """Which slots of this process (its shards, S) have a row that is not excluded."""
    local = _local_parts(len(catalog.ids), catalog.mesh)
    shown = catalog.ids[local] >= 0
    if excluded is not None:
        at = catalog.slots[excluded] - (local.start or 0) * shown.shape[1]
        shown.ravel()[at[(at >= 0) & (at < shown.size)]] = False
    return shown


def _parts_of(catalog: Catalog, excluded: np.ndarray | None) -> CatalogParts:
    """Parts of the catalog, in which the excluded items are not shown."""
    shown = catalog.shown
    if excluded is not None:
        with precision(catalog.dtype):
            shown = catalog.mesh.put(_shown(catalog, excluded))
    return CatalogParts(catalog.rows, catalog.lengths, shown)


def top_k_program(
    catalog: Catalog, k: int, approximate_recall: float | None = None
) -> Callable[..., Best]:
    """Compile the program (CatalogParts, Queries) -> Best, of at least `k` items."""
    lanes = _LANES.get(catalog.mesh.platform, 1)
    static = RankStatic(_compiled_width(k), catalog.dtype, approximate_recall, lanes)
    return catalog.mesh.all_shards_program(_rank, static, REPLICATED)


def batch_size(n_queries: int, catalog: Catalog) -> int:
    """Number of queries ranked at once: a power of two, so that few shapes are compiled."""
    mesh = catalog.mesh
    kind = "cpu" if mesh.platform == "cpu" else "other"
    n_slots = catalog.ids.size // len(mesh.devices)  # of one device
    most = max(_BATCH_BYTES[kind] // (n_slots * np.dtype(catalog.dtype).itemsize), 8)
    share = -(-n_queries // mesh.n_threads)
    return 1 << min(int(most).bit_length() - 1, max(share - 1, 7).bit_length())


def _compiled_width(k: int) -> int:
    """A width of at least `k`: a power of two, so that few programs are compiled."""
    return 1 << max(k - 1, 15).bit_length()


def _seen_items(seen: sparse.csr_matrix | None, catalog: Catalog) -> SeenItems:
    count = 0 if seen is None else seen.nnz
    padded = np.full((3, max(SEEN, 1 << max(count - 1, 0).bit_length())), -1, np.int32)
    if seen is not None:
        padded[0, :count] = np.repeat(np.arange(seen.shape[0]), np.diff(seen.indptr))
        padded[1:, :count] = np.divmod(catalog.slots[seen.indices], catalog.ids.shape[1])
    return SeenItems(*padded)


def _rank(
    static: RankStatic,
    collectives: Collectives,
    parts: CatalogParts,
    queries: Queries,
) -> Best:
    """The best items over all shards, on every device."""
    k, dtype = static.k, static.dtype
    seen, found = queries.seen, []
    for number, part in enumerate(_local(collectives, parts)):
        shard = number if collectives.axis is None else lax.axis_index(collectives.axis)
        # Items of other shards get a slot beyond the part, which the scatter ignores.
        slot = jnp.where(seen.shard == shard, seen.slot, part.rows.shape[0])
        scores = _scores(queries.rows, part, dtype)
        scores = selection.without(scores, seen.query, slot, static.lanes)
        scores = jnp.where(part.shown[None, :], scores, -jnp.inf)
        found.append(selection.largest(scores, min(k, scores.shape[1]), static.recall))
    best, slots = (jnp.stack(arrays) for arrays in zip(*found, strict=True))
    if collectives.axis is not None:
        best, slots = (lax.all_gather(a, collectives.axis, tiled=True) for a in (best, slots))
    n_parts, n_queries, width = best.shape
    flat = (n_queries, n_parts * width)
    best, at = lax.top_k(jnp.moveaxis(best, 0, 1).reshape(flat), min(k, flat[1]))
    slots = jnp.take_along_axis(jnp.moveaxis(slots, 0, 1).reshape(flat), at, axis=1)
    return Best(best, at // width, slots)


def _local(collectives: Collectives, parts: CatalogParts) -> list[CatalogPart]:
    """The parts that this program has: a device's own, or all."""
    rows, shown = collectives.local_parts(parts.rows), collectives.local_parts(parts.shown)
    if parts.lengths is None:
        return [CatalogPart(*part) for part in zip(rows, [None] * len(rows), shown, strict=True)]
    lengths = collectives.local_parts(parts.lengths)
    return [CatalogPart(*part) for part in zip(rows, lengths, shown, strict=True)]


def _scores(queries: Array | np.ndarray, part: CatalogPart, dtype: str) -> Array:
    """Scores (B, S) of one part of the catalog."""
    scores = jnp.matmul(queries, part.rows.astype(dtype).T, precision=lax.Precision.HIGHEST)
    return scores if part.lengths is None else scores / part.lengths[None, :]
