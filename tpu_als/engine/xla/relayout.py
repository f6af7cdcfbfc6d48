"""Tables from the slots of one layout to those of another, without a whole table anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tpu_als.engine import layout
from tpu_als.engine.layout import RowMap
from tpu_als.engine.xla.mesh import Shards, Workplace

_PIECE_BYTES = 1 << 26  # of a table on its way


def row_numbers(rows: RowMap, place: Workplace) -> np.ndarray:
    """Row of every slot (len(local), S) of this process, counted from 1; 0 where there is none."""
    return (layout.rows_of_slots(rows, place.local) + 1).astype(np.int32)


def described(rows: RowMap, factors: int, place: Workplace) -> dict[str, Any]:
    """Shapes of a table's arrays and, in short, the slot of every row; equal for equal slots."""
    shape = [rows.n_slots, factors]
    shapes = [shape] * rows.n_shards if place.mesh is None else [[rows.n_shards, *shape]]
    return {"shapes": shapes, "slots": digest(rows.slots)}


def digest(numbers: np.ndarray) -> str:
    """Short name for an array of whole numbers."""
    return hashlib.sha256(np.ascontiguousarray(numbers, np.int64).data).hexdigest()[:16]


def listed(table: Shards) -> list[Any]:
    """The arrays that a table consists of."""
    return table if isinstance(table, list) else [table]


def moved(
    numbers: Iterable[Any], arrays: Iterable[Any], rows: RowMap, place: Workplace
) -> np.ndarray:
    """Put the rows of a table into other slots.

    All processes receive the parts piece by piece, and each picks the rows of its own slots.

    Parameters
    ----------
    numbers : iterable of jax.Array (..., S')
        Row of every old slot, counted from 1; 0 where there is none.
    arrays : iterable of jax.Array (..., S', K)
        The rows. Every process has parts of the same sizes in the same order.
    rows : RowMap
        The new slots.
    place : Workplace
        Where they are.

    Returns
    -------
    array (len(local), S, K)
        This process's slots, for `Workplace.put`.
    """
    out, first = None, place.local.start * rows.n_slots
    for number, part in zip(_own_parts(numbers), _own_parts(arrays), strict=True):
        number, part = number.ravel(), part.reshape(-1, part.shape[-1])
        if out is None:
            out = np.zeros((len(place.local) * rows.n_slots, part.shape[1]), part.dtype)
        step = max(_PIECE_BYTES // (part[:1].nbytes * len(place.processes)), 1)
        for low in range(0, len(part), step):
            found = place.gather_processes(number[low : low + step]).ravel()
            piece = place.gather_processes(part[low : low + step]).reshape(-1, part.shape[1])
            used = np.flatnonzero(found)
            slots = rows.slots[found[used] - 1] - first
            mine = (slots >= 0) & (slots < len(out))
            out[slots[mine]] = piece[used[mine]]
    assert out is not None, "a table has at least one array"
    return out.reshape(len(place.local), rows.n_slots, -1)


def _own_parts(arrays: Iterable[Any]) -> Iterator[np.ndarray]:
    for array in arrays:
        for shard in array.addressable_shards:
            yield np.asarray(shard.data)
