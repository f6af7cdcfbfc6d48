"""Checksums of tables, computed on the host for a CPU, else on the devices.

A table on an accelerator is not fetched for its checksum: a program on the device reads it once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpu_als import _digest
from tpu_als.mesh import Workplace, precision


def of_table(numbers: list[Any], rows: list[Any], place: Workplace) -> int:
    """Checksum of a table, the same for any division of its rows and in all processes.

    Parameters
    ----------
    numbers : list of int array (..., S)
        Row of every slot, counted from 1; 0 for unused slots.
    rows : list of array (..., S, K)
        The values of the slots.
    place : Workplace
        Where the arrays are. All its processes must make this call.
    """
    if place.platform == "cpu":
        return total(on_host(numbers, rows), place)
    with precision("float64"):
        sums = [int(on_devices(*pair)) for pair in zip(numbers, rows, strict=True)]
    return sum(sums) & _digest.MASK


def on_host(numbers: list[Any], rows: list[Any]) -> int:
    """The part of a table's checksum that this process has."""
    found = 0
    for number, part in zip(numbers, rows, strict=True):
        pairs = zip(number.addressable_shards, part.addressable_shards, strict=True)
        for numbers_here, rows_here in pairs:
            here = np.asarray(rows_here.data)
            found += _digest.table(
                np.asarray(numbers_here.data).ravel(), here.reshape(-1, here.shape[-1])
            )
    return found & _digest.MASK


def total(part: int, place: Workplace) -> int:
    """Sum modulo 2**64 of a number over the processes of a place."""
    parts = place.gather_processes(np.array([part & _digest.MASK], np.uint64).view(np.int64))
    return int(parts.view(np.uint64).sum(dtype=np.uint64))


@jax.jit
def on_devices(numbers: Array, rows: Array) -> Array:
    """`_digest.table` in 64-bit arithmetic on the devices, summed over the devices."""
    bits: Any = jnp.uint16 if rows.dtype.itemsize == 2 else jnp.uint32
    words = lax.bitcast_convert_type(rows, bits)
    if rows.dtype.itemsize == 8:
        words = words.reshape(*rows.shape[:-1], -1)
    keys = jnp.asarray(_digest.word_keys(words.shape[-1])).reshape((1,) * (words.ndim - 1) + (-1,))
    hashes = (words.astype(jnp.uint64) * keys).sum(-1, dtype=jnp.uint64)
    counts = (numbers != 0) | (hashes != 0)
    hashes = hashes ^ _mixed(numbers.astype(jnp.uint64), _digest.SALTS["user"])
    hashes = jnp.where(counts, _mixed(hashes, _digest.SALTS["item"]), jnp.uint64(0))
    return hashes.sum(dtype=jnp.uint64)


def _mixed(keys: Array, salt: int) -> Array:
    """`_digest.mixed` on the devices."""
    keys = keys * np.uint64(_digest.FIRST_FACTOR) + np.uint64(salt)
    for shift, factor in _digest.ROUNDS:
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return keys ^ (keys >> np.uint64(_digest.LAST_SHIFT))
