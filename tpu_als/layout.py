"""CSR to padded, bucketed, sharded cells. NumPy only; nothing here knows of JAX or devices.

Axis letters: W work shards, S slots of one shard's table, R rows of a chunk, L padded length.

Every row of a table gets a *slot*. Rows are sorted by length into *rungs*: all rows of a rung are
padded to one length ``L`` and dealt to the shards in turn, ``R`` rows a chunk, so that the shards
have equal work. Chunks of a rung follow each other, in the cells as in the table, so a solved
chunk is written as one slice and nothing is scattered::

    one shard's table      | rung 0: chunk, chunk, ... | rung 1: ... | long rows | unused, zero |
    one shard's cells      | rung 0: R x L, R x L, ... | rung 1: ... | long rows | unused       |

Rows longer than the last rung are *long*: each is a run of whole blocks of the last rung's length.
The last slot of the last shard is never a row's: its table row is zero, and pad cells point at it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

SHORTEST = 8  # cells; below this, padding costs less than a compiled program
LONGEST = 4096  # cells; a longer row is worked on in blocks of the last rung
_SMALL_CELLS = 1 << 18
_FILL_ENTRIES = 1 << 22  # entries filled at once, which bounds the temporaries


@dataclass(frozen=True)
class Plan:
    """Shapes that both sides, refits and candidates share, so that they share programs.

    Attributes
    ----------
    lengths : tuple of int
        Padded length L of each rung, ascending.
    chunk : int
        Cells of a chunk; a chunk of rung L has ``max(1, min(chunk // L, most_rows))`` rows.
    most_rows : int
        Upper bound on R, which bounds the scratch of solvers that keep a K x K system a row.
    n_shards : int
        Work shards W.
    """

    lengths: tuple[int, ...]
    chunk: int
    most_rows: int
    n_shards: int

    def rows(self, length: int) -> int:
        """Rows R of a chunk of the rung of this length."""
        return max(1, min(self.chunk // length, self.most_rows))


@dataclass(frozen=True)
class Rung:
    """A run of chunks of one shape, at the same place in every shard."""

    length: int
    rows: int
    first_slot: int
    first_cell: int
    n_chunks: int


@dataclass(frozen=True)
class RowMap:
    """Where each row of a table lives; planned from the row lengths alone.

    Attributes
    ----------
    slots : int64 array (M,)
        Global slot ``shard * n_slots + local slot`` of each row.
    cells : int64 array (M,)
        First cell of each row, counted like the slots.
    rungs : tuple of Rung
        The rungs in use.
    n_long : int
        Long rows of the fullest shard; they follow the last rung.
    long_slot, long_cell : int
        Where the long rows begin, in slots and in cells.
    n_slots, n_cells : int
        Slots S and cells of one shard, unused ones included.
    n_shards : int
        Work shards W.
    """

    slots: np.ndarray
    cells: np.ndarray
    rungs: tuple[Rung, ...]
    n_long: int
    long_slot: int
    long_cell: int
    n_slots: int
    n_cells: int
    n_shards: int

    @property
    def pad_slot(self) -> int:
        """The global slot that pad cells point at; its table row is always zero."""
        return self.n_shards * self.n_slots - 1


@dataclass(frozen=True)
class Cells:
    """The entries of one orientation, laid out: what a half-epoch reads.

    Attributes
    ----------
    ids : int32 array (W, cells)
        Source slot of each cell; the pad slot where there is no entry.
    values : float array (W, cells)
        Stored value of each cell, 0 in a pad.
    lengths : int32 array (W, S)
        Stored entries of each slot's row; 0 for empty rows and unused slots.
    long_cells : int32 array (W, J)
        First cell of each long row of the shard, in slot order.
    """

    ids: np.ndarray
    values: np.ndarray
    lengths: np.ndarray
    long_cells: np.ndarray


def ladder(lengths: np.ndarray, rung_cells: float, most: int = 16) -> tuple[int, ...]:
    """Choose the rungs' lengths from a histogram of row lengths, at the least total cost.

    Dynamic programming over a geometric grid: each row is padded to the next rung, and a rung
    itself costs as much as `rung_cells` cells, since each is a program to compile.

    Parameters
    ----------
    lengths : int array
        Stored entries of the rows, of both orientations.
    rung_cells : float
        Cells whose work in all iterations takes as long as compiling a rung.
    most : int, default=16
        Most rungs.

    Returns
    -------
    tuple of int
        Ascending. The last one holds the longest row, or is `LONGEST`.
    """
    grid = _grid(int(lengths.max(initial=1)))
    rows = np.searchsorted(np.sort(lengths), grid, side="right")
    below = np.concatenate([[0], rows])
    # cost[j]: least cells for the rows up to grid[j - 1] with the rungs chosen so far
    cost = np.where(below == 0, 0.0, np.inf)
    choices, totals = [], []
    for _ in range(most):
        step = cost[None, :] + (below[1:, None] - below[None, :]) * grid[:, None]
        step[np.arange(len(grid))[:, None] < np.arange(len(grid) + 1)[None, :]] = np.inf
        choices.append(step.argmin(axis=1))
        cost = np.concatenate([[np.inf], step.min(axis=1)])
        totals.append(cost[-1])
    count = int(np.argmin(np.array(totals) + rung_cells * np.arange(1, most + 1))) + 1
    chosen, at = [], len(grid)
    for choice in reversed(choices[:count]):
        chosen.append(int(grid[at - 1]))
        at = choice[at - 1]
    return tuple(sorted(set(chosen)))


def padded_cells(lengths: np.ndarray, ladder: tuple[int, ...]) -> int:
    """Cells that rows of these lengths take on a ladder; whole last rungs for longer rows."""
    rungs = np.array(ladder)
    at = np.minimum(np.searchsorted(rungs, lengths), len(rungs) - 1)
    return int((rungs[at] * np.maximum(-(-lengths // rungs[at]), 1)).sum())


def _grid(longest: int) -> np.ndarray:
    """Lengths a rung may have: a tenth apart, up to somewhat over the longest row."""
    grain = max((1 << max(longest - 1, 1).bit_length()) >> 3, SHORTEST)
    top = min(-(-longest // grain) * grain, LONGEST)
    steps = np.arange(np.ceil(np.log(LONGEST / SHORTEST) / np.log(1.1)) + 1)
    grid = np.unique(np.ceil(1.1**steps).astype(np.int64)) * SHORTEST
    return np.append(grid[grid < top], top)


def round_up(count: int, small: int = 1 << 13) -> int:
    """Round a size up, so that nearby sizes share a compiled shape.

    To a power of two below `small`, where memory is no concern; by at most an eighth above.
    """
    bits = max(int(count) - 1, 7).bit_length()
    if count <= small:
        return 1 << bits
    grain = 1 << (bits - 4)
    return -(-count // grain) * grain


def map_rows(lengths: np.ndarray, plan: Plan) -> RowMap:
    """Give every row a slot and a first cell.

    Parameters
    ----------
    lengths : int array (M,)
        Stored entries of each row. Empty rows go to the first rung, where they solve to zero.
    plan : Plan
        The shapes.
    """
    shards = plan.n_shards
    order = np.argsort(lengths, kind="stable")
    ends = np.searchsorted(lengths[order], plan.lengths, side="right")
    slots = np.empty(len(lengths), np.int64)
    cells = np.empty(len(lengths), np.int64)
    shard_of = np.empty(len(lengths), np.int64)
    rungs, slot, cell, low = [], 0, 0, 0
    for length, high in zip(plan.lengths, ends, strict=True):
        members, low = order[low:high], high
        if len(members) == 0:
            continue
        rows = plan.rows(length)
        n_chunks = -(-len(members) // (rows * shards))
        rungs.append(Rung(length, rows, slot, cell, n_chunks))
        place = np.arange(len(members))
        shard_of[members] = place % shards
        slots[members] = slot + place // shards
        cells[members] = cell + place // shards * length
        slot += n_chunks * rows
        cell += n_chunks * rows * length
    members = order[low:]
    n_long, used = _deal_long(members, lengths, plan, (slot, cell), (shard_of, slots, cells))
    n_slots = round_up(slot + n_long + 1)
    n_cells = round_up(cell + used, _SMALL_CELLS)
    slots += shard_of * n_slots
    cells += shard_of * n_cells
    return RowMap(slots, cells, tuple(rungs), n_long, slot, cell, n_slots, n_cells, shards)


def _deal_long(
    members: np.ndarray,
    lengths: np.ndarray,
    plan: Plan,
    first: tuple[int, int],
    where: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> tuple[int, int]:
    """Deal rows longer than the last rung, there and back so that the sums stay close."""
    shard_of, slots, cells = where
    shards, block = plan.n_shards, plan.lengths[-1]
    turn = np.arange(len(members)) % (2 * shards)
    dealt = np.where(turn < shards, turn, 2 * shards - 1 - turn)
    n_long = used = 0
    for shard in range(shards):
        own = members[dealt == shard]
        blocks = -(-lengths[own] // block)
        shard_of[own] = shard
        slots[own] = first[0] + np.arange(len(own))
        cells[own] = first[1] + (np.cumsum(blocks) - blocks) * block
        n_long, used = max(n_long, len(own)), max(used, int(blocks.sum()) * block)
    return n_long, used


def share_shapes(first: RowMap, second: RowMap, most_waste: int) -> tuple[RowMap, RowMap]:
    """Grow both maps to common sizes where that wastes at most `most_waste` slots.

    Two sides of equal shapes run the same compiled programs.
    """
    n_slots = max(first.n_slots, second.n_slots)
    n_cells = max(first.n_cells, second.n_cells)
    waste = (2 * n_slots - first.n_slots - second.n_slots) * first.n_shards
    if waste > most_waste:
        return first, second
    return _resize(first, n_slots, n_cells), _resize(second, n_slots, n_cells)


def _resize(rows: RowMap, n_slots: int, n_cells: int) -> RowMap:
    shard, slot = np.divmod(rows.slots, rows.n_slots)
    shard_too, cell = np.divmod(rows.cells, rows.n_cells)
    slots, cells = shard * n_slots + slot, shard_too * n_cells + cell
    return RowMap(
        slots, cells, rows.rungs, rows.n_long, rows.long_slot, rows.long_cell,
        n_slots, n_cells, rows.n_shards,
    )  # fmt: skip


def fill(matrix: sparse.csr_matrix, rows: RowMap, source_slots: np.ndarray, pad_slot: int) -> Cells:
    """Lay the entries of a CSR matrix into the cells its row map names.

    Parameters
    ----------
    matrix : CSR matrix (M, N)
        Rows are targets, columns source rows; canonical (sorted, no duplicates).
    rows : RowMap
        The map of the M rows.
    source_slots : int array (N,)
        Global slot of each source row.
    pad_slot : int
        The source table's pad slot.
    """
    ids = np.full(rows.n_shards * rows.n_cells, pad_slot, np.int32)
    values = np.zeros(rows.n_shards * rows.n_cells, matrix.dtype)
    source_slots = source_slots.astype(np.int32)
    indptr = matrix.indptr.astype(np.int64, copy=False)
    low = 0
    while low < matrix.shape[0]:
        high = int(np.searchsorted(indptr, indptr[low] + _FILL_ENTRIES, side="right")) - 1
        high = min(max(high, low + 1), matrix.shape[0])
        part = slice(indptr[low], indptr[high])
        counts = np.diff(indptr[low : high + 1])
        shift = rows.cells[low:high] - indptr[low:high]
        where = np.repeat(shift, counts) + np.arange(part.start, part.stop)
        ids[where] = source_slots[matrix.indices[part]]
        values[where] = matrix.data[part]
        low = high
    shape = (rows.n_shards, rows.n_cells)
    return Cells(ids.reshape(shape), values.reshape(shape), *row_tables(np.diff(indptr), rows))


def row_tables(lengths: np.ndarray, rows: RowMap) -> tuple[np.ndarray, np.ndarray]:
    """Per slot: the stored entries of its row; per long row: its first cell."""
    table = np.zeros(rows.n_shards * rows.n_slots, np.int32)
    table[rows.slots] = lengths
    shard, slot = np.divmod(rows.slots, rows.n_slots)
    long = slot >= rows.long_slot
    first = np.zeros((rows.n_shards, round_up(rows.n_long) if rows.n_long else 0), np.int32)
    first[shard[long], slot[long] - rows.long_slot] = rows.cells[long] % rows.n_cells
    return table.reshape(rows.n_shards, rows.n_slots), first


def to_slots(table: np.ndarray, rows: RowMap) -> np.ndarray:
    """Caller's rows (M, K) to a table in slot order (W, S, K), zero where no row lives."""
    out = np.zeros((rows.n_shards * rows.n_slots, table.shape[1]), table.dtype)
    out[rows.slots] = table
    return out.reshape(rows.n_shards, rows.n_slots, table.shape[1])


def from_slots(table: np.ndarray, rows: RowMap) -> np.ndarray:
    """Table in slot order (W, S, K) to the caller's rows (M, K), a writeable copy."""
    return table.reshape(-1, table.shape[-1])[rows.slots]
