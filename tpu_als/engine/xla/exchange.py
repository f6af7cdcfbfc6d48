"""Exchange of a sharded table's rows: planned once on the host, run inside the programs.

The sparsity pattern is the same in every epoch. So the host computes once which distinct source
rows the chunks of a *group* need, and which device has them. For each group one all-to-all sends
these rows only, and the group's cells refer to the received rows. In ALX every device gathers its
rows for all devices, so what a device receives does not depend on D; here it falls as 1/D.

Axis letters: W shards of this process, D devices, G groups, P rows of a message.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpu_als.engine import layout
from tpu_als.engine.layout import Rung

# Limits of a group's cells: enough that cells share rows. With many devices the limit is at least
# `_MESSAGE_CELLS` per device: messages are padded to the longest, and short ones vary more.
GROUP_CELLS = 1 << 17
_MESSAGE_CELLS = 1 << 13
_RUNGS_PER_PROGRAM = 4
_GROUP_CHUNKS = 8  # a group's limit is at least this many chunks


_Item = TypeVar("_Item")


class Route(NamedTuple):
    """Sizes of the exchange for one rung; hashable, a static argument of programs.

    Attributes
    ----------
    chunks : int
        Chunks of a group.
    rows : int
        Rows P that each device sends to each other device for a group, including unused rows.
    """

    chunks: int
    rows: int

    def groups(self, n_chunks: int) -> int:
        """Number of groups for a number of chunks."""
        return -(-n_chunks // self.chunks)


def plan(
    ids: np.ndarray,
    rungs: Sequence[Rung],
    n_devices: int,
    n_slots: int,
    agree: Callable[[int], int],
    in_advance: bool = False,
) -> tuple[tuple[Route, ...], np.ndarray]:
    """Plan the exchange for the cells of this process's shards, and update the cells' ids.

    Parameters
    ----------
    ids : int32 array (W, cells)
        Global source slots; replaced by positions among the rows received for the cell's group.
    rungs : sequence of Rung
        The rungs of the target side.
    n_devices : int
        Number of devices D; each has a part of the source table.
    n_slots : int
        Rows of such a part.
    agree : callable
        Returns the maximum of a number over all processes, so that all compile the same program.
    in_advance : bool, default=False
        Whether rows are received in advance (`Static.in_advance`). Then all rungs of a program have
        messages of one size.

    Returns
    -------
    routes : tuple of Route
        One per rung.
    requests : int32 array (W, sum over rungs of G * D * P)
        For every rung, group and sending device, the local slots that this shard needs.
    """
    scratch = np.empty(n_devices * n_slots, np.int32)
    bounds = np.arange(n_devices + 1) * n_slots
    routes, requests = [], []
    for part in in_programs(rungs) if in_advance else ([rung] for rung in rungs):
        chunks = [group_chunks(rung, n_devices) for rung in part]
        groups = [_groups(rung, size) for rung, size in zip(part, chunks, strict=True)]
        needed = [[_Needed.of(cells, group, bounds) for group in groups] for cells in ids]
        most = max((found.most for shard in needed for found in shard), default=0)
        rows = message_rows(agree(most))
        routes += [Route(size, rows) for size in chunks]
        for number, slices in enumerate(groups):
            requested = np.zeros((len(ids), len(slices), n_devices * rows), np.int32)
            for shard, cells in enumerate(ids):
                needed[shard][number].request(cells, requested[shard], scratch, n_slots)
            requests.append(requested.reshape(len(ids), -1))
    empty = np.zeros((len(ids), 0), np.int32)
    return tuple(routes), np.concatenate([empty, *requests], axis=1)


def in_programs(rungs: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    """Divide a list with one element per rung into the parts that one program processes.

    Fewer programs need fewer dispatches in a half-epoch; more programs compile in parallel.
    """
    for low in range(0, len(rungs), _RUNGS_PER_PROGRAM):
        yield rungs[low : low + _RUNGS_PER_PROGRAM]


def _groups(rung: Rung, chunks: int) -> list[slice]:
    """Cells of each group of a rung."""
    size = rung.rows * rung.length
    last = rung.first_cell + rung.n_chunks * size
    return [
        slice(at, min(at + chunks * size, last))
        for at in range(rung.first_cell, last, chunks * size)
    ]


class _Needed(NamedTuple):
    """What one shard needs for the groups of a rung.

    Attributes
    ----------
    groups : list of slice
        Cells of each group.
    slots : list of int array
        Distinct slots of each group, ascending.
    ends : list of int array (D + 1,)
        Position of each device's first slot in them.
    """

    groups: list[slice]
    slots: list[np.ndarray]
    ends: list[np.ndarray]

    @classmethod
    def of(cls, cells: np.ndarray, groups: list[slice], bounds: np.ndarray) -> _Needed:
        """Find it in the shard's cells, whose ids are global slots."""
        slots = [np.unique(cells[group]) for group in groups]
        return cls(groups, slots, [np.searchsorted(found, bounds) for found in slots])

    @property
    def most(self) -> int:
        """Rows of the longest message."""
        return max((int(np.diff(ends).max()) for ends in self.ends), default=0)

    def request(
        self, cells: np.ndarray, requested: np.ndarray, scratch: np.ndarray, n_slots: int
    ) -> None:
        """Write requests (G, D * P) and, into the cells, the positions of the received rows."""
        rows = requested.shape[1] // (len(scratch) // n_slots)
        for number, (group, slots, ends) in enumerate(
            zip(self.groups, self.slots, self.ends, strict=True)
        ):
            device = slots // n_slots
            position = device * rows + np.arange(len(slots)) - ends[device]
            requested[number, position] = slots - device * n_slots
            scratch[slots] = position
            cells[group] = scratch[cells[group]]


def group_chunks(rung: Rung, n_devices: int) -> int:
    """Number of chunks of a group of a rung."""
    chunk = rung.rows * rung.length
    most = max(GROUP_CELLS, n_devices * _MESSAGE_CELLS, _GROUP_CHUNKS * chunk) // chunk
    n_groups = -(-rung.n_chunks // most)
    return -(-rung.n_chunks // max(n_groups, 1))  # messages are padded to one size


def message_rows(most: int) -> int:
    """Rows of each message of a rung, given the number of rows of the longest."""
    return layout.round_up(most, small=64)


class Messages(NamedTuple):
    """Number of groups of a rung, and rows P of each of its messages."""

    groups: int
    rows: int


def exchange_requests(rungs: Sequence[Messages], requests: Array, axis: str) -> Array:
    """Convert the slots that each device needs to the slots that each must send.

    The requests themselves are exchanged by all-to-all, so that no process needs the plan of
    another.
    """
    devices = lax.axis_size(axis)
    low, sends = 0, [jnp.zeros(0, jnp.int32)]
    # Consecutive rungs with messages of one size are processed as one. The loop is over groups,
    # because an exchange along an inner axis takes many times as long to compile for a TPU.
    for rows, same in itertools.groupby(rungs, lambda messages: messages.rows):
        groups = sum(messages.groups for messages in same)
        size = groups * devices * rows
        part = lax.slice(requests, (low,), (low + size,)).reshape(groups, devices, rows)
        exchanged = lax.map(lambda group: lax.all_to_all(group, axis, 0, 0, tiled=True), part)
        sends.append(exchanged.reshape(-1))
        low += size
    return jnp.concatenate(sends)


def receive(table: Array, sends: Array, first: Array, rows: int, axis: str) -> Array:
    """Rows (D * P, K) for one group, P from each device, given this device's part (S, K)."""
    count = lax.axis_size(axis) * rows
    slots = lax.dynamic_slice(sends, (first,), (count,))
    sent = table.at[slots].get(mode="promise_in_bounds")
    return lax.all_to_all(sent, axis, 0, 0, tiled=True)


def received_rows(routes: Sequence[Route], rungs: Sequence[Rung], n_devices: int) -> int:
    """Rows that each device receives from others in a half-epoch, including unused rows."""
    pairs = zip(routes, rungs, strict=True)
    rows = sum(route.groups(rung.n_chunks) * route.rows for route, rung in pairs)
    return (n_devices - 1) * rows
