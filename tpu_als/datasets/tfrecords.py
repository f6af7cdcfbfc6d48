"""Records of TensorFlow's files, without TensorFlow: lists of integers by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

_LENGTH_OF_INT = 10  # bytes of the longest integer
_MASK = 0xA282EAD8  # of the checksums, from TensorFlow's record format


def read_examples(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The integer features of each ``tf.train.Example`` in a file, whose checksums are verified.

    Parameters
    ----------
    path : Path
        A TFRecord file without compression.

    Yields
    ------
    dict of str to ndarray of int64
        The values by the name of the feature; features of other types are left out.

    Raises
    ------
    ValueError
        If the file is damaged, or is not such a file.
    ImportError
        If google-crc32c, which the extra ``fetch`` installs, is missing.
    """
    with path.open("rb") as file:
        number = 0
        while (record := _record(file, f"record {number} of {path}")) is not None:
            try:
                yield dict(_features(record))
            except (IndexError, ValueError, UnicodeDecodeError) as error:
                raise ValueError(f"record {number} of {path} is not an Example: {error}") from error
            number += 1


def _record(file: IO[bytes], name: str) -> memoryview | None:
    """The next record, or None at the end of the file."""
    head = file.read(12)
    if not head:
        return None
    length = int.from_bytes(head[:8], "little")
    _check(head[:8], head[8:], name)
    body = file.read(length + 4)
    if len(body) < length + 4:
        raise ValueError(f"{name} is incomplete: {len(body)} of {length + 4} bytes")
    _check(body[:length], body[length:], name)
    return memoryview(body)[:length]


def _check(content: bytes, stored: bytes, name: str) -> None:
    try:
        import google_crc32c
    except ImportError as error:
        raise ImportError(
            "records need the package google-crc32c: pip install 'tpu-als[fetch]'"
        ) from error
    crc = google_crc32c.value(content)
    masked = ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF
    if len(stored) != 4 or masked != int.from_bytes(stored, "little"):
        raise ValueError(f"{name} is damaged, or the file is not a TFRecord file: wrong checksum")


def _features(example: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the integer features: Example.features.feature, a map."""
    for number, features in _fields(example):
        if number != 1:
            continue
        for _, entry in _fields(features):
            parts = dict(_fields(entry))
            for kind, values in _fields(parts.get(2, memoryview(b""))):
                if kind == 3:  # int64_list
                    yield bytes(parts[1]).decode(), _integers(values)


def _integers(values: memoryview) -> np.ndarray:
    """Int64List.value, which is one packed field, or a field for each integer."""
    packed = b"".join(bytes(part) for number, part in _fields(values) if number == 1)
    return decode_integers(np.frombuffer(packed, dtype=np.uint8))


def decode_integers(packed: np.ndarray) -> np.ndarray:
    """Convert a sequence of protobuf's integers of variable length, from 0 to 2**63 - 1.

    Parameters
    ----------
    packed : ndarray of uint8
        Each integer is in groups of 7 bits, the lowest first; the last byte is below 128.

    Returns
    -------
    ndarray of int64
    """
    ends = np.flatnonzero(packed < 128)
    if not len(packed):
        return np.empty(0, dtype=np.int64)
    if not len(ends) or ends[-1] != len(packed) - 1:
        raise ValueError("an integer is incomplete")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() >= _LENGTH_OF_INT:
        raise ValueError("an integer is negative, or larger than 2**63 - 1")
    shifts = 7 * (np.arange(len(packed)) - np.repeat(starts, lengths))
    return np.add.reduceat((packed & 127).astype(np.int64) << shifts, starts)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Numbers and contents of the fields of a message; integers as their bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            begin, (_, at) = at, _varint(message, at)
        elif kind == 2:
            length, begin = _varint(message, at)
            at = begin + length
        elif kind in (1, 5):
            begin, at = at, at + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"a field of unknown type {kind}")
        if at > len(message):
            raise ValueError("a field is incomplete")
        yield tag >> 3, message[begin:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer, and the place after it."""
    value = shift = 0
    for place in range(at, at + _LENGTH_OF_INT):
        byte = message[place]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place + 1
        shift += 7
    raise ValueError("an integer is too long")
