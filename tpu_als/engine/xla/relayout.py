"""Move tables from the slots of one layout to those of another; no process has a whole table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from jax import Array

from tpu_als.engine import layout
from tpu_als.engine.layout import RowMap
from tpu_als.engine.xla.mesh import DeviceMesh, Shards

_PIECE_BYTES = 1 << 26  # of a table that all processes receive at once


def row_numbers(rows: RowMap, mesh: DeviceMesh) -> np.ndarray:
    """Row of every slot (len(local_shards), S), counted from 1; 0 for unused slots."""
    return (layout.rows_of_slots(rows, mesh.local_shards) + 1).astype(np.int32)


def describe(rows: RowMap, factors: int, mesh: DeviceMesh) -> dict[str, object]:
    """Shapes of a table's arrays, and a digest of the rows' slots."""
    shape = [rows.n_slots, factors]
    shapes = [shape] * rows.n_shards if mesh.jax_mesh is None else [[rows.n_shards, *shape]]
    return {"shapes": shapes, "slots": digest(rows.slots)}


def digest(numbers: np.ndarray) -> str:
    """Digest of an array of integers."""
    return hashlib.sha256(np.ascontiguousarray(numbers, np.int64).data).hexdigest()[:16]


def as_list(table: Shards) -> list[Array]:
    """The arrays that a table consists of."""
    return table if isinstance(table, list) else [table]


def move_rows(
    numbers: Iterable[Array], arrays: Iterable[Array], rows: RowMap, mesh: DeviceMesh
) -> np.ndarray:
    """Move the rows of a table to other slots.

    All processes receive the parts piece by piece, and each takes the rows of its own slots.

    Parameters
    ----------
    numbers : iterable of jax.Array (..., S')
        Row of every old slot, counted from 1; 0 for unused slots.
    arrays : iterable of jax.Array (..., S', K)
        The rows. Every process has parts of the same sizes in the same order.
    rows : RowMap
        The new slots.
    mesh : DeviceMesh
        The devices of the new table.

    Returns
    -------
    array (len(local_shards), S, K)
        This process's slots, for `DeviceMesh.put`.
    """
    out, first = None, mesh.local_shards.start * rows.n_slots
    for number, part in zip(_local_parts(numbers), _local_parts(arrays), strict=True):
        number, part = number.ravel(), part.reshape(-1, part.shape[-1])
        if out is None:
            out = np.zeros((len(mesh.local_shards) * rows.n_slots, part.shape[1]), part.dtype)
        step = max(_PIECE_BYTES // (part[:1].nbytes * len(mesh.processes)), 1)
        for low in range(0, len(part), step):
            found = mesh.gather_processes(number[low : low + step]).ravel()
            piece = mesh.gather_processes(part[low : low + step]).reshape(-1, part.shape[1])
            used = np.flatnonzero(found)
            slots = rows.slots[found[used] - 1] - first
            mine = (slots >= 0) & (slots < len(out))
            out[slots[mine]] = piece[used[mine]]
    assert out is not None, "a table has at least one array"
    return out.reshape(len(mesh.local_shards), rows.n_slots, -1)


def _local_parts(arrays: Iterable[Array]) -> Iterator[np.ndarray]:
    """The parts of arrays that this process has."""
    for array in arrays:
        for shard in array.addressable_shards:
            yield np.asarray(shard.data)
