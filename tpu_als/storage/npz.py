"""Read arrays from an .npz file that may be damaged, unrelated or hostile. Nothing is unpickled.

Headers are read first, so that a caller can refuse a file before memory is allocated. Members that
are not wanted are never decompressed.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from tpu_als.exceptions import ModelFileError

# Limits on the expansion. Factors hardly compress, but a model may contain many zeros.
_RATIO, _SMALL = 32, 1 << 26
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# An encrypted member, or a header with too many nested brackets, is a RuntimeError.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    ArithmeticError,
    LookupError,
    MemoryError,
    RuntimeError,
)


# Signature of a zip file's last record, and its largest distance from the end of the file.
_END, _TAIL = b"PK\x05\x06", (1 << 16) + 22


class Header(NamedTuple):
    """Shape and dtype of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"an array of shape {self.shape} and dtype {self.dtype}"


class NpzFile:
    """The wanted arrays of an .npz file; a context manager.

    Parameters
    ----------
    file : binary file object
        Seekable.
    name : str
        Name of the file, for messages.
    wanted : callable
        Takes a key and returns whether to read it.

    Attributes
    ----------
    headers : dict of str to Header
        Header of each wanted array, by key.

    Raises
    ------
    ModelFileError
        If the file is damaged, holds pickled objects, or expands too much: its arrays would take
        more than 64 MB and more than 32 times the size of the file.
    """

    def __init__(self, file: BinaryIO, name: str, wanted: Callable[[str], bool]) -> None:
        self._name = name
        self._members: dict[str, zipfile.ZipInfo] = {}
        self.headers: dict[str, Header] = {}
        with self._readable("the archive", "an .npz file as `save` writes it"):
            size = file.seek(0, os.SEEK_END)
            self._zip = zipfile.ZipFile(file)
            file.seek(max(0, size - _TAIL))
            _check_count(file.read(), len(self._zip.infolist()))
        for member in self._zip.infolist():
            key = member.filename.removesuffix(".npy")
            with self._readable(f"key {key!r:.80}", "a member as in the archive's list"):
                self._zip.open(member).close()  # zipfile compares the two copies of the name
            if wanted(key):
                self._add(key, member)
        needed = sum(member.file_size for member in self._members.values())
        if needed > max(_SMALL, _RATIO * size):
            largest = max(self._members, key=lambda key: self._members[key].file_size)
            raise ModelFileError(
                f"{name}: {size} bytes would become {needed}, most of them in key {largest!r}, "
                f"but a model's tables hardly compress: expected {max(_SMALL, _RATIO * size)} "
                "bytes at most. It may have been made to exhaust memory"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def read(self, key: str) -> np.ndarray:
        """Read an array, and verify its checksum."""
        with (
            self._readable(f"key {key!r}", "an array with its checksum"),
            self._zip.open(self._members[key]) as stream,
        ):
            array = np.lib.format.read_array(stream, allow_pickle=False)
            if stream.read(1):  # zipfile verifies the checksum only at the end of the member
                raise ValueError("more bytes than the array has")
            return array

    def _add(self, key: str, member: zipfile.ZipInfo) -> None:
        expected = "one plain NumPy array, stored or deflated"
        with self._readable(f"key {key!r}", expected):
            if key in self._members:
                raise ValueError("two members have this name")
            if member.compress_type not in _COMPRESSIONS:
                raise ValueError(f"compressed by method {member.compress_type}")
            with self._zip.open(member) as stream:
                version = np.lib.format.read_magic(stream)
                if version != (1, 0):  # later ones are for records, and have no limit on the header
                    raise ValueError(f"version {version} of NumPy's format")
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                begin = stream.tell()
            if dtype.hasobject:
                raise ValueError("pickled objects, which are never loaded")
            if not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"shape {shape}")
            if member.file_size != begin + math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{member.file_size} bytes for shape {shape} of {dtype}")
        self._members[key] = member
        self.headers[key] = Header(shape, dtype)

    @contextlib.contextmanager
    def _readable(self, what: str, expected: str) -> Iterator[None]:
        try:
            yield
        except ModelFileError:
            raise
        except _DAMAGE as error:
            reason = (f"{error}".splitlines() or [""])[0]
            raise ModelFileError(
                f"{self._name}: {what} cannot be read: got {reason:.200} "
                f"({type(error).__name__}), expected {expected}. The file is damaged or is not "
                "a model; save it again, or restore it from a copy"
            ) from error


def _check_count(tail: bytes, count: int) -> None:
    """Raise ValueError if the last record of the archive gives another number of members.

    zipfile does not check this: a damaged length in one entry can hide the next entry.
    """
    (expected,) = struct.unpack_from("<H", tail, tail.rfind(_END) + 10)
    if expected not in (count, 0xFFFF):  # 0xFFFF means more members than 16 bits can count
        raise ValueError(f"{count} members, but the archive lists {expected}")
