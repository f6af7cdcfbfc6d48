"""Write entries into the padded cells of a layout. NumPy only.

Entries are read in blocks of rows, from memory or from disk, and only the shards of this process
are filled. Axis letters as in `layout`; J long rows, B blocks of long rows of one shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike
from scipy import sparse

from tpu_als.engine import layout
from tpu_als.engine.layout import RowMap

LONG_ROWS = 16  # least number of long rows that are solved together
_BLOCK_ENTRIES = 1 << 20  # entries filled at once, which bounds the temporaries

Blocks = Iterable[tuple[np.ndarray, sparse.csr_matrix]]


class Entries(Protocol):
    """A matrix that can be read by rows of either side ("user", "item"), in blocks.

    If the matrix is on disk, this process reads part number `part` of `parts`.
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
        """Row ids, and the number of entries of each. Rows without entries may be missing."""

    def blocks(self, side: str, part: int = 0, parts: int = 1) -> Blocks:
        """Yield row ids (m,) and a canonical CSR matrix (m, n_columns) for each block."""


@dataclass(frozen=True)
class InMemory:
    """A canonical CSR matrix as `Entries`. Every process has all of it.

    `item_users` is None if only users are solved.
    """

    user_items: sparse.csr_matrix
    item_users: sparse.csr_matrix | None

    @classmethod
    def with_transpose(cls, user_items: sparse.csr_matrix) -> InMemory:
        """Both orientations of a matrix.

        If all values are 1, they are not stored in cells, and the transposed matrix has values of
        one byte: float32 values would take as much memory as its ids.
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
        """Ids of all rows, and the number of stored entries of each."""
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
            arrays = (matrix.data[at], matrix.indices[at], indptr[low : high + 1] - indptr[low])
            yield np.arange(low, high), sparse.csr_matrix(arrays, (high - low, matrix.shape[1]))
            low = high

    def _matrix(self, side: str) -> sparse.csr_matrix:
        return self.user_items if side == "user" else self.item_users


def fill(
    blocks: Blocks,
    rows: RowMap,
    source_slots: np.ndarray,
    pad: int,
    shards: range,
    dtype: DTypeLike | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Write entries into the cells of a row map; long rows are left out.

    Parameters
    ----------
    blocks : iterable of (row ids, CSR matrix)
        Rows of other shards are skipped.
    rows : RowMap
        The map of the target rows.
    source_slots : int array (N,)
        Global slot of each source row.
    pad : int
        The source slot that cells without an entry refer to.
    shards : range
        The shards to fill.
    dtype : dtype or None
        Dtype of the values; with None no values are stored.

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
        if len(shift) and (shift == shift[0]).all():  # rows are consecutive in the cells
            where: slice | np.ndarray = slice(shift[0], shift[0] + block.nnz)
        else:
            where = np.repeat(shift, np.diff(block.indptr)) + np.arange(block.nnz)
        ids[where] = block.indices if is_same else source_slots[block.indices]
        if values is not None:
            values[where] = block.data
    shape = (len(shards), rows.n_cells)
    return ids.reshape(shape), None if values is None else values.reshape(shape)


class LongRows(NamedTuple):
    """Long rows, in blocks of at most L entries; all arrays have a leading axis of shards.

    The blocks of each batch of rows are consecutive. A shard may have blocks of rows
    whose slots are on another shard: the shards' sums are added.

    Attributes
    ----------
    ids : int32 array (B, L)
        The source row that each cell refers to.
    values : array (B, L) or None
        Stored values; None where all are 1.
    rows : int32 array (B,)
        Row of each block, counted within its batch of rows.
    n_entries : int32 array (B,)
        Number of entries of each block.
    starts : int32 array (J / batch_rows + 1,)
        First block of each batch of rows.
    slots : int32 array (J,)
        Local slot of each long row, or the number of slots if another shard has the row.
    lengths : int32 array (J,)
        Number of stored entries of each long row, over all shards.
    """

    ids: Any
    values: Any
    rows: Any
    n_entries: Any
    starts: Any
    slots: Any
    lengths: Any

    @property
    def batch_rows(self) -> int:
        """Rows of a batch."""
        return self.slots.shape[-1] // (self.starts.shape[-1] - 1)


class LongShape(NamedTuple):
    """Cells of a block of long rows, and rows of a batch."""

    block: int
    batch_rows: int = LONG_ROWS


class LongEntries(NamedTuple):
    """The entries of long rows, in the order in which they were read.

    Attributes
    ----------
    long : int32 array (E,)
        Row of each entry, as an index into ``RowMap.long``.
    source : int32 array (E,)
        Source row of each entry.
    values : array (E,) or None
        Stored values.
    """

    long: np.ndarray
    source: np.ndarray
    values: np.ndarray | None


class LongCells(NamedTuple):
    """The entries of long rows, with the shards and ids of their cells.

    Attributes
    ----------
    entries : LongEntries
        The entries.
    shard : int array (E,)
        Shard of each entry. Entries of other processes' shards are left out.
    ids : int array (E,)
        Source slot of each entry, as its shard numbers the slots.
    """

    entries: LongEntries
    shard: np.ndarray
    ids: np.ndarray


def long_entries(
    blocks: Blocks, rows: RowMap, is_transposed: bool, dtype: np.dtype | None
) -> LongEntries:
    """Collect the entries of long rows, with values of this dtype, or without values if None.

    If `is_transposed`, the blocks have rows of the source side, and their columns are target rows.
    """
    index = np.full(len(rows.slots), -1, np.int32)  # into rows.long
    index[rows.long] = np.arange(len(rows.long))
    found = [tuple(np.empty(0, kind) for kind in (np.int32, np.int32, dtype or np.int8))]
    for row_ids, block in blocks:
        if is_transposed:
            long, source = index[block.indices], np.repeat(row_ids, np.diff(block.indptr))
            is_long = long >= 0
            long, source, values = long[is_long], source[is_long], block.data[is_long]
        else:
            is_long = index[row_ids] >= 0
            block = block[is_long]
            long = np.repeat(index[row_ids[is_long]], np.diff(block.indptr))
            source, values = block.indices, block.data
        values = np.empty(0, np.int8) if dtype is None else values.astype(dtype)
        found.append((long, source.astype(np.int32), values))
    long, source, values = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return LongEntries(long, source, None if dtype is None else values)


def fill_long(
    long_cells: LongCells,
    rows: RowMap,
    lengths: np.ndarray,
    shape: LongShape,
    shards: range,
    agree: Callable[[int], int],
) -> LongRows:
    """Write the entries of long rows into blocks.

    Parameters
    ----------
    long_cells : LongCells
        The entries of all long rows.
    rows : RowMap
        The map of the target rows.
    lengths : int array (M,)
        Number of stored entries of each row.
    shape : LongShape
        Entries L of a block, and rows of a batch.
    shards : range
        The shards to fill.
    agree : callable
        Returns the maximum of a number over all processes.
    """
    entries, shard, ids = long_cells
    block, batch_rows = shape
    n_rows = max(-(-len(rows.long) // batch_rows), 1) * batch_rows
    mine = np.flatnonzero((shard >= shards.start) & (shard < shards.stop))
    # Sort by shard, then by row. The sort is stable, so a row's entries keep their order.
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

    def in_blocks(values: np.ndarray) -> np.ndarray:
        out = np.zeros(size, values.dtype)
        out.reshape(-1)[where] = values[mine]
        return out

    out_ids = in_blocks(ids.astype(np.int32, copy=False))
    out_values = None if entries.values is None else in_blocks(entries.values)
    row_of_block = np.zeros((len(shards), n_blocks), np.int32)
    n_entries = np.zeros((len(shards), n_blocks), np.int32)
    for at in range(len(shards)):
        row = np.repeat(np.arange(n_rows), blocks[at])
        number = np.arange(len(row)) - first[at][row]
        row_of_block[at, : len(row)] = row % batch_rows
        n_entries[at, : len(row)] = np.minimum(counts[at][row] - number * block, block)
    starts = np.concatenate([first[:, ::batch_rows], ends[:, -1:]], axis=1).astype(np.int32)
    slots, row_lengths = _slots_and_lengths(rows, lengths, n_rows, shards)
    return LongRows(out_ids, out_values, row_of_block, n_entries, starts, slots, row_lengths)


def _slots_and_lengths(
    rows: RowMap, lengths: np.ndarray, n_rows: int, shards: range
) -> tuple[np.ndarray, np.ndarray]:
    """Slots and lengths of the long rows, for each shard."""
    shard, slot = np.divmod(rows.slots[rows.long], rows.n_slots)
    slots = np.full((len(shards), n_rows), rows.n_slots, np.int32)
    for at, number in enumerate(shards):
        on_shard = np.flatnonzero(shard == number)
        slots[at, on_shard] = slot[on_shard]
    row_lengths = np.zeros((len(shards), n_rows), np.int32)
    row_lengths[:, : len(rows.long)] = lengths[rows.long]
    return slots, row_lengths
