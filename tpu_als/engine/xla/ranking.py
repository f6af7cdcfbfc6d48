"""Scores, filters and exact top-k over a catalog of items.

A catalog is stored on the devices like a table of the engine, each device with its own part. All
devices score the same queries, and send only the best few items of their parts.

Axis letters: B queries of a batch, N items, K factors, W work shards, S slots of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy import sparse

from tpu_als.engine import layout
from tpu_als.engine.cpu.ranking import empty, keep
from tpu_als.engine.layout import RowMap
from tpu_als.engine.xla.mesh import Shards, Together, Workplace, precision

# Bytes of scores kept at once: by a thread of a CPU, by another device.
_BATCH_BYTES = {"cpu": 1 << 26, "other": 1 << 28}
SEEN = 1 << 12  # least length that lists of seen items are padded to, so that shapes are few
_BLOCKS = (32, 8)  # columns of a block; see `engine.cpu.ranking`
_SHORTEST = 1e-10  # replaces the length of a zero row, to allow division
# Rows, lengths and whether they are shown: of all parts, and of one.
_Own = tuple[Shards, Shards | None, Shards]
_Part = tuple[Array, Array | None, Array]


@dataclass(frozen=True)
class Catalog:
    """A table to rank, on the devices.

    Attributes
    ----------
    rows : Shards (W, S, K)
        The table.
    lengths : Shards (W, S) or None
        What scores are divided by.
    shown : Shards (W, S)
        Whether a slot has a row.
    slots : int array (N,)
        Global slot of each row.
    ids : int32 array (W, S)
        Row of each slot, or -1.
    place : Workplace
        Where they are.
    dtype : {"float32", "float64"}
        Of queries and scores; the table may be kept in bfloat16.
    """

    rows: Shards
    lengths: Shards | None
    shown: Shards
    slots: np.ndarray
    ids: np.ndarray
    place: Workplace
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

        With several processes every one passes the same arguments and gets the whole result.

        Parameters
        ----------
        queries : array (B, K)
            In the catalog's dtype.
        k : int
            Items wanted.
        seen : CSR matrix (B, N), optional
            Items to leave out of each query's result.
        excluded : int array, optional
            Items to leave out of every result.
        approximate_recall : float, optional
            Accept that this share of the k best is found in expectation, for a faster search on
            TPUs (Chern et al. 2022, arXiv 2206.14286). Other devices search exactly all the same.

        Returns
        -------
        ids : int32 array (B, k)
            -1 at the tail where fewer than k items were left.
        scores : array (B, k)
            Inner products, over the catalog's lengths if it has any; -FLT_MAX where the id is -1.

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
        program, own = ranking(self, width, approximate_recall), _placed(self, excluded)
        # One after the other: programs that communicate must start in the same order everywhere.
        for low in range(0, len(queries), batch):
            at = slice(low, low + batch)
            count = len(queries[at])
            asked = np.zeros((batch, queries.shape[1]), self.dtype)
            asked[:count] = queries[at]
            hidden = _seen(seen[at] if seen is not None else None, self)
            with precision(self.dtype):
                best, shard, slot = (np.asarray(part) for part in program(own, (asked, hidden))[0])
            found, best = self.ids[shard, slot][:count, :width], best[:count, :width]
            keep(ids[at, :width], scores[at, :width], found, best)
        return ids, scores


class Seen(NamedTuple):
    """Items to leave out: the query, and the shard and slot of the item, padded with shard -1."""

    query: Any
    shard: Any
    slot: Any


def catalog(table: np.ndarray, place: Workplace, *, lengths: np.ndarray | None = None) -> Catalog:
    """Place a table of the host to rank its rows, in equal parts.

    Parameters
    ----------
    table : array (N, K)
        float32 or float64.
    place : Workplace
        Where to.
    lengths : array (N,), optional
        What scores are divided by: the rows' lengths, for cosines with unit queries.
    """
    n_parts = len(place.devices)
    n_slots = layout.round_up(max(-(-len(table) // n_parts), 1))
    slots, dtype = np.arange(len(table)), table.dtype
    if lengths is not None:
        table = (table / lengths[:, None]).astype(dtype, copy=False)
    with precision(dtype.name):
        rows = place.put(_in_parts(table, slots, n_slots, _local(n_parts, place)))
    return _made(rows, slots, (n_parts, n_slots), place, None, dtype.name)


def catalog_of(
    table: Shards,
    rows: RowMap,
    place: Workplace,
    *,
    cosine: bool = False,
    lengths: np.ndarray | None = None,
) -> Catalog:
    """Rank the rows of a table of the engine in place, without a copy.

    With several processes all of them have to make this call, and the same calls of `top_k`.

    Parameters
    ----------
    table : Shards (W, S, K)
        In slot order, float32, float64 or bfloat16; scores of the latter are float32.
    rows : RowMap
        Which row is where.
    place : Workplace
        Where it is.
    cosine : bool, default=False
        Divide scores by the rows' lengths, which the devices compute; 1e-10 in place of 0.
    lengths : array (N,), optional
        Divide scores by these instead.
    """
    first = table if place.mesh is not None else table[0]
    dtype = "float64" if first.dtype == np.float64 else "float32"
    shape = (rows.n_shards, rows.n_slots)
    made = _made(table, rows.slots, shape, place, lengths, dtype)
    if not cosine or lengths is not None:
        return made
    with precision(dtype):
        own = place.whole(_lengths, dtype)(table, None)[2]
    return Catalog(table, own, made.shown, made.slots, made.ids, place, dtype)


def _made(
    rows: Shards,
    slots: np.ndarray,
    shape: tuple[int, int],
    place: Workplace,
    lengths: np.ndarray | None,
    dtype: str,
) -> Catalog:
    ids = np.full(shape, -1, np.int32)
    ids.ravel()[slots] = np.arange(len(slots), dtype=np.int32)
    own, divisors = _local(shape[0], place), None
    with precision(dtype):
        if lengths is not None:
            parts = _in_parts(lengths.astype(dtype, copy=False), slots, shape[1], own)
            divisors = place.put(np.where(parts == 0, np.ones((), dtype), parts))
        shown = place.put(ids[own] >= 0)
    return Catalog(rows, divisors, shown, slots, ids, place, dtype)


def _local(n_parts: int, place: Workplace) -> slice:
    """The parts of this process."""
    return slice(n_parts) if place.mesh is None else slice(place.local.start, place.local.stop)


def _in_parts(values: np.ndarray, slots: np.ndarray, n_slots: int, parts: slice) -> np.ndarray:
    """Values (N, ...) of the rows in some of the parts (P, S, ...), 0 where there is no row."""
    first, count = parts.start or 0, parts.stop - (parts.start or 0)
    out = np.zeros((count * n_slots, *values.shape[1:]), values.dtype)
    at = slots - first * n_slots
    own = (at >= 0) & (at < len(out))
    out[at[own]] = values[own]
    return out.reshape(count, n_slots, *values.shape[1:])


def _lengths(dtype: str, _: Together, rows: Shards, __: None) -> tuple[None, None, Shards]:
    def part(own: Array) -> Array:
        squares = jnp.sum(jnp.square(own.astype(dtype)), axis=1)
        return jnp.where(squares == 0, jnp.asarray(_SHORTEST, dtype), jnp.sqrt(squares))

    return None, None, jax.tree.map(part, rows)


def _shown(catalog: Catalog, excluded: np.ndarray | None) -> np.ndarray:
    """Which slots of this process (its shards, S) have a row that is not excluded."""
    own = _local(len(catalog.ids), catalog.place)
    shown = catalog.ids[own] >= 0
    if excluded is not None:
        at = catalog.slots[excluded] - (own.start or 0) * shown.shape[1]
        shown.ravel()[at[(at >= 0) & (at < shown.size)]] = False
    return shown


def _placed(catalog: Catalog, excluded: np.ndarray | None) -> _Own:
    shown = catalog.shown
    if excluded is not None:
        with precision(catalog.dtype):
            shown = catalog.place.put(_shown(catalog, excluded))
    return catalog.rows, catalog.lengths, shown


def ranking(catalog: Catalog, k: int, approximate_recall: float | None = None) -> Any:
    """Program ((rows, lengths, shown), (queries, seen)) -> ((scores, shards, slots), None, None).

    The best over all shards (B, at least k), on every device.
    """
    return catalog.place.whole(_rank, (_wide(k), catalog.dtype, approximate_recall))


def batch_size(n_queries: int, catalog: Catalog) -> int:
    """Queries ranked at once: a power of two, so that few shapes are compiled."""
    place = catalog.place
    kind = "cpu" if place.platform == "cpu" else "other"
    on_one = catalog.ids.size // len(place.devices)
    most = max(_BATCH_BYTES[kind] // (on_one * np.dtype(catalog.dtype).itemsize), 8)
    share = -(-n_queries // place.n_threads)
    return 1 << min(int(most).bit_length() - 1, max(share - 1, 7).bit_length())


def _wide(k: int) -> int:
    """Compile for a few widths only."""
    return 1 << max(k - 1, 15).bit_length()


def _seen(seen: sparse.csr_matrix | None, catalog: Catalog) -> Seen:
    count = 0 if seen is None else seen.nnz
    padded = np.full((3, max(SEEN, 1 << max(count - 1, 0).bit_length())), -1, np.int32)
    if seen is not None:
        padded[0, :count] = np.repeat(np.arange(seen.shape[0]), np.diff(seen.indptr))
        padded[1:, :count] = np.divmod(catalog.slots[seen.indices], catalog.ids.shape[1])
    return Seen(*padded)


def _rank(
    static: tuple[int, str, float | None],
    together: Together,
    own: _Own,
    shared: tuple[Array, Seen],
) -> tuple[tuple[Array, Array, Array], None, None]:
    """Scores, shards and slots (B, k) of the best over all shards, on every device."""
    k, dtype, recall = static
    queries, seen = shared
    found = []
    for number, part in enumerate(_parts(together, own)):
        shard = number if together.axis is None else lax.axis_index(together.axis)
        # Beyond the part, and so dropped, unless the item is of this shard.
        slot = jnp.where(seen.shard == shard, seen.slot, part[0].shape[0])
        scores = _scores(queries, part, seen.query, slot, dtype)
        scores = jnp.where(part[2][None, :], scores, -jnp.inf)
        found.append(largest(scores, min(k, scores.shape[1]), recall))
    best, slots = (jnp.stack(each) for each in zip(*found, strict=True))
    if together.axis is not None:
        best, slots = (lax.all_gather(e, together.axis, tiled=True) for e in (best, slots))
    n_parts, n_queries, width = best.shape
    flat = (n_queries, n_parts * width)
    best, at = lax.top_k(jnp.moveaxis(best, 0, 1).reshape(flat), min(k, flat[1]))
    slots = jnp.take_along_axis(jnp.moveaxis(slots, 0, 1).reshape(flat), at, axis=1)
    return (best, at // width, slots), None, None


def _parts(together: Together, own: _Own) -> list[_Part]:
    """The parts that this program has: a device's own, or all."""
    if together.axis is not None:
        return [own]
    rows, lengths, shown = own
    return list(zip(rows, lengths or [None] * len(rows), shown, strict=True))


def _scores(queries: Array, part: _Part, query: Array, slot: Array, dtype: str) -> Array:
    """Scores (B, S) of one part of the catalog, -inf at the given queries and slots."""
    rows, lengths, _ = part
    scores = jnp.matmul(queries, rows.astype(dtype).T, precision=lax.Precision.HIGHEST)
    if lengths is not None:
        scores = scores / lengths[None, :]
    return scores.at[query, slot].set(-jnp.inf, mode="drop")


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
