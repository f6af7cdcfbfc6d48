"""Checksums of tables, computed on the host for a CPU, else on the devices.

A table on an accelerator is not fetched for its checksum: a program on the device reads it once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from tpu_als.engine import digests
from tpu_als.engine.xla.mesh import DeviceMesh, precision


def of_table(numbers: list[Array], rows: list[Array], mesh: DeviceMesh) -> int:
    """Checksum of a table; it does not depend on how the rows are divided, or on the process.

    Parameters
    ----------
    numbers : list of int array (..., S)
        Row of every slot, counted from 1; 0 for unused slots.
    rows : list of array (..., S, K)
        The values of the slots.
    mesh : DeviceMesh
        The devices of the arrays. All its processes must make this call.
    """
    if mesh.platform == "cpu":
        return total(on_host(numbers, rows), mesh)
    with precision("float64"):
        sums = [int(on_devices(*pair)) for pair in zip(numbers, rows, strict=True)]
    return sum(sums) & digests.MASK


def on_host(numbers: list[Array], rows: list[Array]) -> int:
    """Checksum of the part of a table that this process has."""
    found = 0
    for number, part in zip(numbers, rows, strict=True):
        pairs = zip(number.addressable_shards, part.addressable_shards, strict=True)
        for numbers_here, rows_here in pairs:
            here = np.asarray(rows_here.data)
            found += digests.table(
                np.asarray(numbers_here.data).ravel(), here.reshape(-1, here.shape[-1])
            )
    return found & digests.MASK


def total(part: int, mesh: DeviceMesh) -> int:
    """Sum modulo 2**64 of a number over the processes of a mesh."""
    parts = mesh.gather_processes(np.array([part & digests.MASK], np.uint64).view(np.int64))
    return int(parts.view(np.uint64).sum(dtype=np.uint64))


@jax.jit
def on_devices(numbers: Array, rows: Array) -> Array:
    """`digests.table` in 64-bit arithmetic on the devices, summed over the devices."""
    bits = jnp.uint16 if rows.dtype.itemsize == 2 else jnp.uint32
    words = lax.bitcast_convert_type(rows, bits)
    if rows.dtype.itemsize == 8:
        words = words.reshape(*rows.shape[:-1], -1)
    keys = jnp.asarray(digests.word_keys(words.shape[-1])).reshape((1,) * (words.ndim - 1) + (-1,))
    hashes = (words.astype(jnp.uint64) * keys).sum(-1, dtype=jnp.uint64)
    counts = (numbers != 0) | (hashes != 0)
    hashes = hashes ^ _mixed(numbers.astype(jnp.uint64), digests.SALTS["user"])
    hashes = jnp.where(counts, _mixed(hashes, digests.SALTS["item"]), jnp.uint64(0))
    return hashes.sum(dtype=jnp.uint64)


def _mixed(keys: Array, salt: int) -> Array:
    """`digests.mixed` on the devices."""
    keys = keys * np.uint64(digests.FIRST_FACTOR) + np.uint64(salt)
    for shift, factor in digests.ROUNDS:
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return keys ^ (keys >> np.uint64(digests.LAST_SHIFT))
