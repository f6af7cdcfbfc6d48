"""Digests of matrices and tables that do not depend on the order of rows, blocks or processes.

A digest is the sum, modulo a power of two, of one hash for each entry or row. So it can be computed
from a stream, and the digests of the parts on several devices or processes can be added. One
changed entry, or one changed bit of a row, always changes the digest; other changes do so with a
probability of about 1 - 2**-60. A digest detects accidental damage, but not forgery.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping

import numpy as np
from scipy import sparse

Blocks = Iterator[tuple[np.ndarray, sparse.csr_matrix]]

_AT_ONCE = 1 << 15  # entries or words at once, so that temporaries fit into a core's cache
_FEW_COLUMNS = 1 << 18  # up to this many column keys are cached; else computed for each entry
SALTS = {"user": 0x9E3779B97F4A7C15, "item": 0xC2B2AE3D27D4EB4F}
_OTHER = {"user": "item", "item": "user"}
MASK = (1 << 64) - 1
# Constants of SplitMix64's finalizer: the shift and factor of each round.
FIRST_FACTOR, ROUNDS, LAST_SHIFT = (
    0xD1342543DE82EF95,
    ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)),
    31,
)


class EntriesDigest:
    """A digest of all entries (user, item, value), computed from the blocks of either side.

    The hash of an entry is ``key(user) * key(item) * mix(value)`` modulo 2**64, with odd keys, so
    that both sides of a matrix have the same digest.

    Parameters
    ----------
    side : {"user", "item"}
        Whether the rows of the blocks are users or items.
    n_columns : int
        Number of rows of the other side.
    """

    def __init__(self, side: str, n_columns: int) -> None:
        self._salts = SALTS[side], SALTS[_OTHER[side]]
        self._n_columns = n_columns
        self.total = 0

    def passing(self, blocks: Blocks) -> Blocks:
        """Yield the blocks unchanged, and add them to `total`."""
        for row_ids, rows in blocks:
            self.add(row_ids, rows)
            yield row_ids, rows

    def add(self, row_ids: np.ndarray, rows: sparse.csr_matrix) -> None:
        """Add the entries of some rows to `total`."""
        keys, lengths = _keys(row_ids, self._salts[0]), np.diff(rows.indptr)
        low, ends = 0, rows.indptr[1:]
        while low < len(keys):
            high = max(int(np.searchsorted(ends, rows.indptr[low] + _AT_ONCE, "right")), low + 1)
            at = slice(rows.indptr[low], rows.indptr[high])
            hashes = np.repeat(keys[low:high], lengths[low:high])
            hashes *= self._column_keys(rows.indices[at])
            hashes *= _mixed_values(rows.data[at])
            self.total = (self.total + int(hashes.sum(dtype=np.uint64))) & MASK
            low = high

    def _column_keys(self, ids: np.ndarray) -> np.ndarray:
        if self._n_columns > _FEW_COLUMNS:
            return _keys(ids, self._salts[1])
        return _all_keys(self._n_columns, self._salts[1])[ids]


@functools.lru_cache(maxsize=4)
def _all_keys(n: int, salt: int) -> np.ndarray:
    return _keys(np.arange(n), salt)


def _keys(ids: np.ndarray, salt: int) -> np.ndarray:
    """Odd 64-bit numbers for ids."""
    keys = mixed(ids, salt)
    keys |= np.uint64(1)
    return keys


def mixed(ids: np.ndarray, salt: int) -> np.ndarray:
    """Hash numbers to 64 bits without collisions, with the finalizer of SplitMix64."""
    keys = ids.astype(np.uint64)
    keys *= np.uint64(FIRST_FACTOR)
    keys += np.uint64(salt)
    for shift, factor in ROUNDS:
        keys ^= keys >> np.uint64(shift)
        keys *= np.uint64(factor)
    keys ^= keys >> np.uint64(LAST_SHIFT)
    return keys


def _mixed_values(values: np.ndarray) -> np.ndarray:
    """Hash values to nonzero 64-bit numbers without collisions."""
    if values.dtype != np.float32:
        values = values.astype(np.float64)
    bits = values.view(np.uint32 if values.dtype == np.float32 else np.uint64).astype(np.uint64)
    bits += np.uint64(1)
    bits *= np.uint64(0xA24BAED4963EE407)
    bits ^= bits >> np.uint64(32)
    return bits


def entries(matrix: sparse.csr_matrix) -> int:
    """Digest of a canonical matrix in memory, users by items."""
    digest = EntriesDigest("user", matrix.shape[1])
    digest.add(np.arange(matrix.shape[0]), matrix)
    return digest.total


def table(numbers: np.ndarray, rows: np.ndarray) -> int:
    """Digest of the slots of a table.

    Parameters
    ----------
    numbers : int array (S,)
        Row of every slot, counted from 1; 0 for unused slots.
    rows : float array (S, K)
        Of any dtype. Unused slots with zeros do not affect the digest.

    Returns
    -------
    int
        Digests of several parts are added modulo 2**64.
    """
    words = np.ascontiguousarray(rows).view(np.uint16 if rows.itemsize == 2 else np.uint32)
    keys = word_keys(words.shape[1])
    step = max(2 * _AT_ONCE // max(words.shape[1], 1), 1)
    total = 0
    for low in range(0, len(words), step):
        at = slice(low, low + step)
        hashes = words[at].astype(np.uint64) @ keys
        counts = (numbers[at] != 0) | (hashes != 0)
        hashes ^= mixed(numbers[at], SALTS["user"])
        total += int(mixed(hashes, SALTS["item"])[counts].sum(dtype=np.uint64))
    return total & MASK


@functools.lru_cache(maxsize=8)
def word_keys(n_words: int) -> np.ndarray:
    """Odd keys (n_words,) of the 32-bit words of a row, uint64.

    A row's hash is the sum of words times keys. One changed bit adds a power of two below 2**32
    times an odd number, which always changes the hash.
    """
    return _keys(np.arange(n_words), SALTS["item"])


def array(values: np.ndarray) -> str:
    """Digest of an array: its dtype, shape and bytes in order."""
    found = hashlib.sha256(f"{values.dtype.str} {values.shape}".encode())
    found.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def text(content: str) -> str:
    """Digest of a text."""
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def fields(record: Mapping[str, object]) -> str:
    """Digest of a JSON object without its field "checksum", which stores this digest."""
    rest = {name: value for name, value in record.items() if name != "checksum"}
    return text(json.dumps(rest, sort_keys=True))
