"""Entries into the padded cells that a layout has for them. NumPy only.

Entries come in blocks of rows, from memory or from disk, and only the shards of this process are
filled. Axis letters as in `layout`; J long rows, B blocks of long rows of one shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import sparse

from tpu_als.engine import layout
from tpu_als.engine.layout import RowMap

LONG_ROWS = 16  # long rows that are solved together
_BLOCK_ENTRIES = 1 << 20  # entries filled at once, which bounds the temporaries

Blocks = Iterable[tuple[np.ndarray, sparse.csr_matrix]]


class Entries(Protocol):
    """A matrix that can be read by rows of either side ("user", "item"), in blocks.

    `part` of `parts` is this process's part if the matrix is on disk.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """Users and items."""

    @property
    def nnz(self) -> int:
        """Stored entries."""

    @property
    def has_values(self) -> bool:
        """Whether any stored value is other than 1."""

    def lengths(self, side: str, part: int = 0, parts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Row ids and their stored entries; rows that are missing have none."""

    def blocks(self, side: str, part: int = 0, parts: int = 1) -> Blocks:
        """Row ids (m,) and canonical CSR (m, n_columns), block after block."""


@dataclass(frozen=True)
class InMemory:
    """A canonical CSR matrix as `Entries`. Every process has all of it.

    The other orientation may be left out where only users are to be solved.
    """

    user_items: sparse.csr_matrix
    item_users: sparse.csr_matrix | None

    @classmethod
    def turned(cls, user_items: sparse.csr_matrix) -> InMemory:
        """Both orientations; where all values are 1, which are not kept, the other has small ones.

        Turned, they would take as much memory as the ids.
        """
        only = cls(user_items, None)
        small = user_items
        if not only.has_values:
            parts = np.ones(only.nnz, np.int8), user_items.indices, user_items.indptr
            small = sparse.csr_matrix(parts, user_items.shape)
        return cls(user_items, small.T.tocsr())

    @property
    def shape(self) -> tuple[int, int]:
        """Users and items."""
        return self.user_items.shape

    @property
    def nnz(self) -> int:
        """Stored entries."""
        return int(self.user_items.nnz)

    @functools.cached_property
    def has_values(self) -> bool:
        """Whether any stored value is other than 1."""
        return bool((self.user_items.data != 1).any())

    def lengths(self, side: str, part: int = 0, parts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Ids and stored entries of all rows."""
        lengths = np.diff(self._matrix(side).indptr)
        return np.arange(len(lengths)), lengths

    def blocks(
        self, side: str, part: int = 0, parts: int = 1
    ) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """All rows, in blocks of a million entries."""
        matrix = self._matrix(side)
        indptr, n_rows = matrix.indptr.astype(np.int64, copy=False), matrix.shape[0]
        low = 0
        while low < n_rows:
            high = int(np.searchsorted(indptr, indptr[low] + _BLOCK_ENTRIES, side="right")) - 1
            high = min(max(high, low + 1), n_rows)
            at = slice(indptr[low], indptr[high])
            parts_ = (matrix.data[at], matrix.indices[at], indptr[low : high + 1] - indptr[low])
            yield np.arange(low, high), sparse.csr_matrix(parts_, (high - low, matrix.shape[1]))
            low = high

    def _matrix(self, side: str) -> sparse.csr_matrix:
        return self.user_items if side == "user" else self.item_users


def fill(
    blocks: Blocks, rows: RowMap, source_slots: np.ndarray, pad: int, shards: range, dtype: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """Lay entries into the cells that a row map names; long rows are left out.

    Parameters
    ----------
    blocks : iterable of (row ids, CSR matrix)
        Rows of other shards are passed over.
    rows : RowMap
        The map of the target rows.
    source_slots : int array (N,)
        Global slot of each source row.
    pad : int
        The source row that a cell without an entry refers to.
    shards : range
        The shards to fill.
    dtype : dtype or None
        Of the values; None keeps none.

    Returns
    -------
    ids : int32 array (len(shards), cells)
        Source slot of each cell.
    values : array (len(shards), cells) or None
        Stored value of each cell, 0 in a pad.
    """
    n_cells = len(shards) * rows.n_cells
    ids = np.full(n_cells, pad, np.int32)
    values = None if dtype is None else np.zeros(n_cells, dtype)
    source_slots = source_slots.astype(np.int32)
    is_same = np.array_equal(source_slots, np.arange(len(source_slots)))
    for row_ids, block in blocks:
        first = rows.cells[row_ids] - shards.start * rows.n_cells
        mine = (rows.cells[row_ids] >= 0) & (first >= 0) & (first < n_cells)
        if not mine.all():
            first, block = first[mine], block[mine]
        shift = first - block.indptr[:-1]
        if len(shift) and (shift == shift[0]).all():  # one row after the other, as they come
            where: Any = slice(shift[0], shift[0] + block.nnz)
        else:
            where = np.repeat(shift, np.diff(block.indptr)) + np.arange(block.nnz)
        ids[where] = block.indices if is_same else source_slots[block.indices]
        if values is not None:
            values[where] = block.data
    shape = (len(shards), rows.n_cells)
    return ids.reshape(shape), None if values is None else values.reshape(shape)


class Long(NamedTuple):
    """Long rows, in blocks of at most L entries; of each shard of a leading axis.

    The blocks of `LONG_ROWS` rows at a time follow each other. A shard may hold blocks of rows that
    live on another: then the shards' sums are added.

    Attributes
    ----------
    ids : int32 array (B, L)
        The source row that each cell refers to.
    values : array (B, L) or None
        Stored values; None where all are 1.
    rows : int32 array (B,)
        Row of each block, counted within its batch of rows.
    left : int32 array (B,)
        Entries of each block.
    starts : int32 array (J / LONG_ROWS + 1,)
        First block of each batch of rows.
    slots : int32 array (J,)
        Local slot of each long row, or the number of slots where another shard has it.
    lengths : int32 array (J,)
        Stored entries of each long row, over all shards.
    """

    ids: Any
    values: Any
    rows: Any
    left: Any
    starts: Any
    slots: Any
    lengths: Any


class LongEntries(NamedTuple):
    """The entries of long rows, in the order in which they were read.

    Attributes
    ----------
    long : int32 array (E,)
        Row of each entry, as its place in ``RowMap.long``.
    source : int32 array (E,)
        Its source row.
    values : array (E,) or None
        Its stored value.
    """

    long: np.ndarray
    source: np.ndarray
    values: np.ndarray | None


def long_entries(blocks: Blocks, rows: RowMap, turned: bool, dtype: Any) -> LongEntries:
    """Collect the entries of long rows, with values of this dtype; None keeps none.

    `turned` says that the blocks hold rows of the source side, whose columns are target rows.
    """
    place = np.full(len(rows.slots), -1, np.int32)
    place[rows.long] = np.arange(len(rows.long))
    found = [tuple(np.empty(0, each) for each in (np.int32, np.int32, dtype or np.int8))]
    for row_ids, block in blocks:
        if turned:
            long, source = place[block.indices], np.repeat(row_ids, np.diff(block.indptr))
            keep = long >= 0
            long, source, values = long[keep], source[keep], block.data[keep]
        else:
            mine = place[row_ids] >= 0
            block = block[mine]
            long = np.repeat(place[row_ids[mine]], np.diff(block.indptr))
            source, values = block.indices, block.data
        values = np.empty(0, np.int8) if dtype is None else values.astype(dtype)
        found.append((long, source.astype(np.int32), values))
    long, source, values = (np.concatenate(each) for each in zip(*found, strict=True))
    return LongEntries(long, source, None if dtype is None else values)


def fill_long(
    entries: LongEntries,
    shard: np.ndarray,
    ids: np.ndarray,
    rows: RowMap,
    lengths: np.ndarray,
    block: int,
    shards: range,
    agree: Callable[[int], int],
) -> Long:
    """Lay the entries of long rows into blocks.

    Parameters
    ----------
    entries : LongEntries
        Those of all long rows.
    shard : int array
        The shard of each entry; those of other processes are left out.
    ids : int array
        The source row for the cell of each entry.
    rows : RowMap
        The map of the target rows.
    lengths : int array (M,)
        Stored entries of each row.
    block : int
        Entries L of a block.
    shards : range
        The shards to fill.
    agree : callable
        The largest of a number over all processes.
    """
    n_rows = max(-(-len(rows.long) // LONG_ROWS), 1) * LONG_ROWS
    mine = np.flatnonzero((shard >= shards.start) & (shard < shards.stop))
    # by shard, then by row; the row's own order stays
    key = (shard[mine] - shards.start) * n_rows + entries.long[mine]
    order = np.argsort(key, kind="stable")
    mine, key = mine[order], key[order]
    counts = np.bincount(key, minlength=len(shards) * n_rows).reshape(len(shards), n_rows)
    blocks = -(-counts // block)
    n_blocks = layout.round_up(agree(int(blocks.sum(axis=1).max(initial=0))))
    ends = np.cumsum(blocks, axis=1)
    first = ends - blocks
    first_cell = (first + n_blocks * np.arange(len(shards))[:, None]).ravel() * block
    where = (first_cell - (np.cumsum(counts) - counts.ravel()))[key] + np.arange(len(mine))
    size = (len(shards), n_blocks, block)

    def laid(values: np.ndarray) -> np.ndarray:
        out = np.zeros(size, values.dtype)
        out.reshape(-1)[where] = values[mine]
        return out

    out_ids = laid(ids.astype(np.int32, copy=False))
    out_values = None if entries.values is None else laid(entries.values)
    of_block = np.zeros((len(shards), n_blocks), np.int32)
    left = np.zeros((len(shards), n_blocks), np.int32)
    for at in range(len(shards)):
        row = np.repeat(np.arange(n_rows), blocks[at])
        number = np.arange(len(row)) - first[at][row]
        of_block[at, : len(row)] = row % LONG_ROWS
        left[at, : len(row)] = np.minimum(counts[at][row] - number * block, block)
    starts = np.concatenate([first[:, ::LONG_ROWS], ends[:, -1:]], axis=1).astype(np.int32)
    return Long(
        out_ids, out_values, of_block, left, starts, *_long_tables(rows, lengths, n_rows, shards)
    )


def _long_tables(
    rows: RowMap, lengths: np.ndarray, n_rows: int, shards: range
) -> tuple[np.ndarray, np.ndarray]:
    """Slots and lengths of the long rows, for each shard."""
    shard, slot = np.divmod(rows.slots[rows.long], rows.n_slots)
    slots = np.full((len(shards), n_rows), rows.n_slots, np.int32)
    for at, number in enumerate(shards):
        own = np.flatnonzero(shard == number)
        slots[at, own] = slot[own]
    table = np.zeros((len(shards), n_rows), np.int32)
    table[:, : len(rows.long)] = lengths[rows.long]
    return slots, table
