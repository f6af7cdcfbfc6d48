"""Plan the slot and the cells of every row of a table from the rows' lengths. NumPy only.

Axis letters: W work shards, S slots of one shard's table, R rows of a chunk, L padded length.

Every row of a table gets a *slot*. Rows are sorted by length into *rungs*: all rows of a rung are
padded to one length ``L`` and assigned to the shards in turn, ``R`` rows per chunk, so that the
shards have equal work. The chunks of a rung are consecutive in the cells and in the table, so a
solved chunk is written as one slice, without a scatter::

    one shard's table      | rung 0: chunk, chunk, ... | rung 1: ... | long rows | unused, zero |
    one shard's cells      | rung 0: R x L, R x L, ... | rung 1: ... | unused       |

Rows longer than the last rung are *long*: `cells.fill_long` puts their entries in other blocks.
The last slot of the last shard has no row: it is always zero, and pad cells refer to it.

The CPU backend has no rungs, chunks or pads: rows and entries keep their order (`in_order`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SHORTEST = 8  # cells; shorter rungs would save less padding than a program costs
LONGEST = 4096  # cells by default; longer rows are divided into blocks of the last rung
ROWS_MULTIPLE = 8  # rows that an accelerator processes together
_SMALL_CELLS = 1 << 18


@dataclass(frozen=True)
class Plan:
    """Shapes of chunks for both sides. Fits with equal plans use the same compiled programs.

    Attributes
    ----------
    lengths : tuple of int
        Padded length L of each rung, ascending.
    chunk : int
        Cells of a chunk; a chunk of rung L has ``max(1, min(chunk // L, most_rows))`` rows.
    most_rows : int
        Upper bound on R. It bounds the scratch of solvers that store a K x K system per row.
    n_shards : int
        Work shards W.
    n_owners : int, default=1
        Number of processes that own rows; each has an equal number of consecutive shards.
    """

    lengths: tuple[int, ...]
    chunk: int
    most_rows: int
    n_shards: int
    n_owners: int = 1

    def rows(self, length: int) -> int:
        """Rows R of a chunk of the rung of this length: a multiple of 8 if there are more."""
        rows = max(1, min(self.chunk // length, self.most_rows))
        return rows - rows % ROWS_MULTIPLE if rows > ROWS_MULTIPLE else rows


@dataclass(frozen=True)
class Rung:
    """Consecutive chunks of one shape, at the same positions in every shard; maybe none."""

    length: int
    rows: int
    first_slot: int
    first_cell: int
    n_chunks: int


@dataclass(frozen=True)
class RowMap:
    """The slot and the cells of each row of a table.

    Attributes
    ----------
    slots : int64 array (M,)
        Global slot ``shard * n_slots + local slot`` of each row.
    cells : int64 array (M,)
        First cell of each row, counted like the slots; -1 for a long row.
    long : int64 array (J,)
        The long rows.
    rungs : tuple of Rung
        The rungs in use, also those that only the other side uses (`share_rungs`).
    n_slots, n_cells : int
        Slots S and cells of one shard, unused ones included.
    n_shards : int
        Work shards W.
    """

    slots: np.ndarray
    cells: np.ndarray
    long: np.ndarray
    rungs: tuple[Rung, ...]
    n_slots: int
    n_cells: int
    n_shards: int

    @property
    def pad_slot(self) -> int:
        """The global slot that pad cells refer to; its row is always zero."""
        return self.n_shards * self.n_slots - 1


def ladder(lengths: np.ndarray, rung_cells: float, longest: int = LONGEST) -> tuple[int, ...]:
    """Choose the rungs' lengths for given row lengths, at a low total cost.

    Each row is padded to the next rung. Each rung costs as much as `rung_cells` cells, because it
    is a program to compile. First, powers of two are chosen by dynamic programming. Then
    a length of 3/4 of a chosen rung is added if it saves more than it costs. The result
    depends on the arguments only. A finer grid does not pad less at the same cost. Its best choice
    also changes with a few rows, so that each fold of a matrix would need other programs.

    Parameters
    ----------
    lengths : int array
        Stored entries of the rows, of both orientations.
    rung_cells : float
        Number of cells whose work in all iterations takes as long as compiling a rung.
    longest : int, default=LONGEST
        Bound on the rungs' lengths.

    Returns
    -------
    tuple of int
        Ascending. The last is at least the longest row, or `longest`.
    """
    grid = doubling(int(lengths.max(initial=1)), longest)
    ordered = np.sort(lengths)
    chosen = _cheapest_rungs(ordered, np.array(grid), rung_cells)
    halves = []
    for low, high in itertools.pairwise((-1, *chosen)):
        # Rows of 3/4 of a power of two fill registers better than those of the geometric mean.
        middle = max(high * 3 // 4 // SHORTEST * SHORTEST, SHORTEST)
        rows = np.count_nonzero((lengths > low) & (lengths <= middle))
        if low < middle < high and rows * (high - middle) > rung_cells:
            halves.append(middle)
    return tuple(sorted((*chosen, *halves)))


def doubling(longest: int, bound: int = LONGEST, growth: int = 2) -> tuple[int, ...]:
    """Lengths of rungs, each `growth` times the one before, up to the longest row or `bound`."""
    rungs = [SHORTEST]
    while rungs[-1] < min(longest, bound):
        rungs.append(rungs[-1] * growth)
    return (*rungs[:-1], min(rungs[-1], bound))


def _cheapest_rungs(ordered: np.ndarray, grid: np.ndarray, rung_cells: float) -> tuple[int, ...]:
    """The lengths of a grid that minimise the total cost of padded cells and rungs.

    Row lengths must be in ascending order. The last length of the grid is always chosen.
    """
    rows = np.searchsorted(ordered, grid, side="right")
    below = np.concatenate([[0], rows])
    # cost[j]: least cells for the rows up to grid[j - 1] with the rungs chosen so far
    cost = np.where(below == 0, 0.0, np.inf)
    choices, totals = [], []
    for _ in grid:
        step = cost[None, :] + (below[1:, None] - below[None, :]) * grid[:, None]
        step[np.arange(len(grid))[:, None] < np.arange(len(grid) + 1)[None, :]] = np.inf
        choices.append(step.argmin(axis=1))
        cost = np.concatenate([[np.inf], step.min(axis=1)])
        totals.append(cost[-1])
    count = int(np.argmin(np.array(totals) + rung_cells * np.arange(1, len(grid) + 1))) + 1
    chosen, at = set(), len(grid)
    for choice in reversed(choices[:count]):
        chosen.add(int(grid[at - 1]))
        at = choice[at - 1]
    return tuple(sorted(chosen))


def round_up(count: int, small: int = 1 << 13) -> int:
    """Round a size up, so that nearby sizes have the same shape and programs.

    The result is a power of two up to `small`, and at most an eighth larger than a size above it.
    """
    bits = max(int(count) - 1, 7).bit_length()
    if count <= small:
        return 1 << bits
    grain = 1 << (bits - 4)
    return -(-count // grain) * grain


def map_rows(lengths: np.ndarray, plan: Plan, owners: np.ndarray | None = None) -> RowMap:
    """Give every row a slot and a first cell.

    Parameters
    ----------
    lengths : int array (M,)
        Stored entries of each row. Empty rows go to the first rung, where they solve to zero.
    plan : Plan
        The shapes.
    owners : int array (M,), optional
        For each row, which of the ``plan.n_owners`` equal groups of consecutive shards must have
        it. By default any shard may have it.

    Raises
    ------
    ValueError
        If the number of slots or cells does not fit into int32.
    """
    order = np.argsort(lengths, kind="stable")
    ends = np.searchsorted(lengths[order], plan.lengths, side="right")
    slots, cells, shard_of = (np.full(len(lengths), -1, np.int64) for _ in range(3))
    *short, long = np.split(order, ends)
    turns, most = [], []
    for members in (*short, long):
        shard_of[members], turn = _assign(members, plan, owners)
        turns.append(turn)
        most.append(int(turn.max(initial=-1)) + 1)
    rungs, n_slots, n_cells = stack(most, plan)
    _check_addressable(n_slots * plan.n_shards, n_cells)
    filled = [(members, turn) for members, turn in zip(short, turns, strict=False) if len(members)]
    for rung, (members, turn) in zip(rungs, filled, strict=True):
        slots[members] = rung.first_slot + turn
        cells[members] = rung.first_cell + turn * rung.length + shard_of[members] * n_cells
    slots[long] = sum(rung.n_chunks * rung.rows for rung in rungs) + turns[-1]
    slots += shard_of * n_slots
    return RowMap(slots, cells, long, rungs, n_slots, n_cells, plan.n_shards)


def _check_addressable(n_slots: int, n_cells: int) -> None:
    """Raise ValueError if the slots of all shards, or the cells of one, do not fit into int32."""
    for count, what, remedy in (
        (n_slots, "slots of a table", "fit fewer rows"),
        (n_cells, "cells of a device", "use more devices"),
    ):
        if count > np.iinfo(np.int32).max:
            raise ValueError(
                f"the data need {count} {what}, but compiled programs number them with int32, up "
                f"to {np.iinfo(np.int32).max}: {remedy}"
            )


def in_order(lengths: np.ndarray) -> RowMap:
    """Map rows (M,) of these lengths to one shard in their order, without padding or rungs.

    This is for the CPU backend, which needs no chunks of one shape.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    none, n_rows = np.empty(0, np.int64), len(lengths)
    return RowMap(
        np.arange(n_rows), ends - lengths, none, (), round_up(n_rows + 1), int(lengths.sum()), 1
    )


def stack(rows: Sequence[int], plan: Plan) -> tuple[tuple[Rung, ...], int, int]:
    """Rungs, slots and cells of a shard.

    `rows` has the largest number of rows on any shard, for each rung and, last, for long rows.
    """
    rungs, slot, cell = [], 0, 0
    for length, count in zip(plan.lengths, rows[:-1], strict=True):
        if count:
            size = plan.rows(length)
            n_chunks = -(-count // size)
            rungs.append(Rung(length, size, slot, cell, n_chunks))
            slot += n_chunks * size
            cell += n_chunks * size * length
    return tuple(rungs), round_up(slot + rows[-1] + 1), round_up(cell, _SMALL_CELLS)


def _assign(
    members: np.ndarray, plan: Plan, owners: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The shard of each row, and its position among the rows assigned to that shard.

    Rows must be sorted by length. Every second round assigns them to the shards in reverse order,
    so that all shards get about the same total length.
    """
    count = len(members)
    n_shards, at, first = plan.n_shards, np.arange(count), 0
    if owners is not None:
        n_shards = plan.n_shards // plan.n_owners
        owner = owners[members]
        order = np.argsort(owner, kind="stable")
        begins = np.searchsorted(owner[order], np.arange(plan.n_owners))
        at[order] = np.arange(count) - begins[owner[order]]
        first = owner * n_shards
    turn, index = np.divmod(at, n_shards)
    return first + np.where(turn % 2 == 0, index, n_shards - 1 - index), turn


def share_shapes(first: RowMap, second: RowMap, most_waste: int) -> tuple[RowMap, RowMap]:
    """Enlarge both maps to common sizes if that adds at most `most_waste` slots.

    Two sides of equal shapes run the same compiled programs.
    """
    n_slots = max(first.n_slots, second.n_slots)
    n_cells = max(first.n_cells, second.n_cells)
    waste = (2 * n_slots - first.n_slots - second.n_slots) * first.n_shards
    if waste > most_waste:
        return first, second
    return _resize(first, n_slots, n_cells), _resize(second, n_slots, n_cells)


def share_rungs(first: RowMap, second: RowMap) -> tuple[RowMap, RowMap]:
    """Add each map's rungs to the other, without chunks, if the maps have one size.

    One program processes several rungs. Both sides can use it only if all these rungs are equal.
    """
    if (first.n_slots, first.n_cells) != (second.n_slots, second.n_cells):
        return first, second
    shapes = {rung.length: rung.rows for rung in (*first.rungs, *second.rungs)}
    return _with_rungs(first, shapes), _with_rungs(second, shapes)


def _with_rungs(rows: RowMap, shapes: dict[int, int]) -> RowMap:
    present = {rung.length: rung for rung in rows.rungs}
    rungs = (
        present.get(length, Rung(length, shapes[length], 0, 0, 0)) for length in sorted(shapes)
    )
    return replace(rows, rungs=tuple(rungs))


def _resize(rows: RowMap, n_slots: int, n_cells: int) -> RowMap:
    shard, slot = np.divmod(rows.slots, rows.n_slots)
    cells = rows.cells + shard * (n_cells - rows.n_cells)
    cells = np.where(rows.cells < 0, rows.cells, cells)
    return replace(
        rows, slots=shard * n_slots + slot, cells=cells, n_slots=n_slots, n_cells=n_cells
    )


def rows_of_slots(rows: RowMap, shards: range) -> np.ndarray:
    """Row of every slot (len(shards), S) of some shards; -1 for unused slots."""
    numbers = np.full(len(shards) * rows.n_slots, -1, np.int64)
    slots = rows.slots - shards.start * rows.n_slots
    found = np.flatnonzero((slots >= 0) & (slots < len(numbers)))
    numbers[slots[found]] = found
    return numbers.reshape(len(shards), rows.n_slots)


def to_slots(table: np.ndarray, rows: RowMap, shards: range) -> np.ndarray:
    """Copy rows (M, ...) to slot order (len(shards), S, ...); unused slots are zero."""
    out = np.zeros((len(shards) * rows.n_slots, *table.shape[1:]), table.dtype)
    slots = rows.slots - shards.start * rows.n_slots
    is_inside = (slots >= 0) & (slots < len(out))
    if is_inside.all():
        out[slots] = table
    else:
        out[slots[is_inside]] = table[is_inside]
    return out.reshape(len(shards), rows.n_slots, *table.shape[1:])


def from_slots(table: np.ndarray, rows: RowMap) -> np.ndarray:
    """Copy a table in slot order (W, S, K) to the caller's rows (M, K)."""
    return table.reshape(-1, table.shape[-1])[rows.slots]
