"""Rows of a sharded table to the devices that need them: planned once, moved inside the program.

The sparsity pattern is the same in every epoch, so the host works out once which distinct source
rows the chunks of a *group* need, and which device has them. A step then moves just those, with
one all-to-all, and its cells point into what arrived. Where every device gathers its rows for all
(ALX), each receives as much however many there are; here that falls as 1/D.

Axis letters: W shards of this process, D devices, G groups, P rows from each device to each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpu_als.engine import layout
from tpu_als.engine.layout import Rung

# Cells whose rows arrive together: enough to share rows; and for each device, so that messages stay
# long when there are many. All are as long as the fullest one, and short ones are uneven.
GROUP_CELLS = 1 << 17
_MESSAGE_CELLS = 1 << 11


class Route(NamedTuple):
    """How the rows for one rung arrive; hashable, compiled in.

    Attributes
    ----------
    chunks : int
        Chunks of a group.
    rows : int
        Rows P that each device sends to each for a group, unused ones included.
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
) -> tuple[tuple[Route, ...], np.ndarray]:
    """Plan the exchange for the cells of this process's shards, and point the cells at it.

    Parameters
    ----------
    ids : int32 array (W, cells)
        Global source slots. Overwritten with places in what arrives for the cell's group.
    rungs : sequence of Rung
        The rungs of the target side.
    n_devices : int
        Devices D, which have a part of the source table each.
    n_slots : int
        Rows of such a part.
    agree : callable
        The largest of a number over all processes, so that all compile the same program.

    Returns
    -------
    routes : tuple of Route
        One a rung.
    requests : int32 array (W, sum over rungs of G * D * P)
        For every rung, group and device, the local slots wanted of it, as the receiver sees it.
    """
    scratch = np.empty(n_devices * n_slots, np.int32)
    bounds = np.arange(n_devices + 1) * n_slots
    routes, requests = [], []
    for rung in rungs:
        size = rung.rows * rung.length
        chunks = group_chunks(rung, n_devices)
        last = rung.first_cell + rung.n_chunks * size
        groups = [
            slice(at, min(at + chunks * size, last))
            for at in range(rung.first_cell, last, chunks * size)
        ]
        wanted = [[_distinct(own[group], bounds) for group in groups] for own in ids]
        most = max((int(np.diff(ends).max()) for own in wanted for _, ends in own), default=0)
        route = Route(chunks, message_rows(agree(most)))
        asked = np.zeros((len(ids), len(groups), n_devices * route.rows), np.int32)
        for shard, own in enumerate(wanted):
            for number, (slots, ends) in enumerate(own):
                device = slots // n_slots
                place = device * route.rows + np.arange(len(slots)) - ends[device]
                asked[shard, number, place] = slots - device * n_slots
                scratch[slots] = place
                cells = ids[shard, groups[number]]
                cells[:] = scratch[cells]
        routes.append(route)
        requests.append(asked.reshape(len(ids), -1))
    empty = np.zeros((len(ids), 0), np.int32)
    return tuple(routes), np.concatenate([empty, *requests], axis=1)


def group_chunks(rung: Rung, n_devices: int) -> int:
    """Chunks of a rung whose rows arrive together."""
    group = max(GROUP_CELLS, n_devices * _MESSAGE_CELLS)
    return min(max(group // (rung.rows * rung.length), 1), rung.n_chunks)


def message_rows(most: int) -> int:
    """Rows of all messages of a rung, given those that the fullest one needs."""
    return layout.round_up(most, small=64)


def _distinct(ids: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct slots, ascending, and where those of each device begin."""
    slots = np.unique(ids)
    return slots, np.searchsorted(slots, bounds)


def turn(routes: Sequence[tuple[int, int]], requests: Array, axis: str) -> Array:
    """What each device must send, from what each requests; (groups, rows) of every rung given.

    One all-to-all of the requests themselves, so that no process needs another's plan.
    """
    devices = lax.axis_size(axis)
    low, sends = 0, [jnp.zeros(0, jnp.int32)]
    # Rungs with messages of one size follow each other as one; and group by group in a loop, since
    # for a TPU one exchange along an inner axis takes many times as long to compile.
    for rows, rungs in itertools.groupby(routes, lambda route: route[1]):
        groups = sum(count for count, _ in rungs)
        size = groups * devices * rows
        part = lax.slice(requests, (low,), (low + size,)).reshape(groups, devices, rows)
        turned = lax.map(lambda group: lax.all_to_all(group, axis, 0, 0, tiled=True), part)
        sends.append(turned.reshape(-1))
        low += size
    return jnp.concatenate(sends)


def receive(own: Array, sends: Array, first: Array, rows: int, axis: str) -> Array:
    """Rows (D * P, K) for one group, P from each device, given this device's part (S, K)."""
    count = lax.axis_size(axis) * rows
    local = lax.dynamic_slice(sends, (first,), (count,))
    leaving = own.at[local].get(mode="promise_in_bounds")
    return lax.all_to_all(leaving, axis, 0, 0, tiled=True)


def received_rows(routes: Sequence[Route], rungs: Sequence[Rung], n_devices: int) -> int:
    """Rows that each device receives from others in a half-epoch, unused ones included."""
    pairs = zip(routes, rungs, strict=True)
    rows = sum(route.groups(rung.n_chunks) * route.rows for route, rung in pairs)
    return (n_devices - 1) * rows
