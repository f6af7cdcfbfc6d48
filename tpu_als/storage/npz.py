"""Write .npz files, and read ones that may be damaged, unrelated or hostile. Nothing is unpickled.

Headers are read first, so that a caller can refuse a file before memory is allocated. Members that
are not wanted are never decompressed.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from tpu_als.exceptions import ModelFileError

# Limits on the expansion. Factors hardly compress, but a model may contain many zeros.
_RATIO, _SMALL = 32, 1 << 26
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_OTHERS = (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)  # which members that are not wanted may have
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
# The header of a member: its signature, flags, and the lengths of its name and extra field.
_MEMBER, _FIRST = struct.Struct("<4s2xH18xHH"), b"PK\x03\x04"
_UTF8, _UNREADABLE = 0x800, {0x1: "encrypted", 0x20: "patched", 0x40: "strongly encrypted"}
_MOST_HEADER = 1 << 16  # bytes of an array's header
_AT_ONCE = 1 << 18  # bytes whose checksum is computed while they are in a cache
# What NumPy writes. `ast.literal_eval`, which NumPy calls, takes as long as reading 200 kB.
_HEADER = re.compile(
    rb"\{'descr': '([<>|][a-zA-Z]\d+)', 'fortran_order': (True|False), "
    rb"'shape': \((|\d+,|\d+(?:, \d+)+)\), \} *\n"
)
# Signature and version of NumPy's format. Later versions are for records, and have no limit on the
# header.
_ARRAY = b"\x93NUMPY\x01\x00"


class Header(NamedTuple):
    """Shape and dtype of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"an array of shape {self.shape} and dtype {self.dtype}"


def write_npz(file: BinaryIO, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as `numpy.savez` does, without copying them.

    Parameters
    ----------
    file : binary file object
        Open for writing; need not be seekable.
    arrays : dict of str to ndarray
        Without objects.

    Raises
    ------
    ValueError
        For an array of objects.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for key, array in arrays.items():
            header, numbers = _parts(array)
            member = zipfile.ZipInfo(f"{key}.npy")
            member.file_size = len(header) + len(numbers)
            with archive.open(member, "w") as stream:
                stream.write(header)
                for low in range(0, len(numbers), _AT_ONCE):
                    stream.write(numbers[low : low + _AT_ONCE])


def _parts(array: np.ndarray) -> tuple[bytes, memoryview]:
    """Header and numbers of an array in NumPy's format."""
    if array.dtype.hasobject:
        raise ValueError("arrays of objects are not written, as they would be pickled")
    flags = array.flags
    is_transposed = flags.f_contiguous and not flags.c_contiguous
    numbers = np.ascontiguousarray(array.T if is_transposed else array)
    if array.dtype.kind in "biufcU":  # NumPy's function takes ten times as long
        text = f"{{'descr': {array.dtype.str!r}, 'fortran_order': {is_transposed}, "
        text += f"'shape': {array.shape}, }}"
        text += " " * (-(len(text) + 11) % 64) + "\n"
        header = _ARRAY + len(text).to_bytes(2, "little") + text.encode()
    else:
        stream = io.BytesIO()
        about = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(stream, about)
        header = stream.getvalue()
    return header, _bytes_of(numbers)


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    flat: Any = array.reshape(-1).view(np.uint8) if array.nbytes else b""
    return memoryview(flat)


class _Stored(NamedTuple):
    """The numbers of an array in a member that is not compressed."""

    begin: int
    is_transposed: bool
    checksum_of_header: int
    checksum: int

    def read(self, file: Any, header: Header) -> np.ndarray:
        """Read the numbers once, and verify the member's checksum."""
        shape = header.shape[::-1] if self.is_transposed else header.shape
        array, checksum = np.empty(shape, header.dtype), self.checksum_of_header
        view = _bytes_of(array)
        file.seek(self.begin)
        while len(view):
            part = view[:_AT_ONCE]
            if hasattr(file, "readinto"):
                count = file.readinto(part)
            else:
                content = file.read(len(part))
                count = len(content)
                part[:count] = content
            if not count:
                raise EOFError(f"{len(view)} bytes are missing")
            checksum, view = zlib.crc32(part[:count], checksum), view[count:]
        if checksum != self.checksum:
            raise zipfile.BadZipFile("another checksum than that of the archive's list")
        return array.T if self.is_transposed else array


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
        self._name, self._file = name, file
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._stored: dict[str, _Stored] = {}
        self.headers: dict[str, Header] = {}
        with self._readable("the archive", "an .npz file as `save` writes it"):
            size = file.seek(0, os.SEEK_END)
            self._zip = zipfile.ZipFile(file)
            file.seek(max(0, size - _TAIL))
            _check_count(file.read(), len(self._zip.infolist()))
        members = self._zip.infolist()
        ends = _ends(members, self._zip.start_dir)
        for member in members:
            key = member.filename.removesuffix(".npy")
            with self._readable(f"key {key!r:.80}", "a member as in the archive's list"):
                begin = _begin(file, member, ends[member.header_offset])
            if wanted(key):
                with self._readable(f"key {key!r}", "one plain NumPy array, stored or deflated"):
                    self._add(key, member, begin)
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
        with self._readable(f"key {key!r}", "an array with its checksum"):
            if key in self._stored:
                return self._stored[key].read(self._file, self.headers[key])
            with self._zip.open(self._members[key]) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
                if stream.read(1):  # zipfile verifies the checksum only at the end of the member
                    raise ValueError("more bytes than the array has")
                return array

    def _add(self, key: str, member: zipfile.ZipInfo, begin: int) -> None:
        if key in self._members:
            raise ValueError("two members have this name")
        if member.compress_type not in _COMPRESSIONS:
            raise ValueError(f"compressed by method {member.compress_type}")
        is_stored = member.compress_type == zipfile.ZIP_STORED
        if is_stored:
            if member.compress_size != member.file_size:
                raise ValueError(f"{member.compress_size} bytes stored of {member.file_size}")
            self._file.seek(begin)
            text = self._file.read(min(member.file_size, _MOST_HEADER))
        else:
            with self._zip.open(member) as stream:
                text = stream.read(_MOST_HEADER)
        shape, is_transposed, dtype, length = _array_header(text)
        if dtype.hasobject:
            raise ValueError("pickled objects, which are never loaded")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"shape {shape}")
        if member.file_size != length + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{member.file_size} bytes for shape {shape} of {dtype}")
        if is_stored:
            so_far = zlib.crc32(text[:length])
            self._stored[key] = _Stored(begin + length, is_transposed, so_far, member.CRC)
        self._members[key] = member
        self.headers[key] = Header(shape, dtype)

    def _readable(self, what: str, expected: str) -> _Readable:
        return _Readable(self._name, what, expected)


@dataclass
class _Readable:
    """Context in which damage becomes a ModelFileError; faster than one made by contextlib."""

    name: str
    what: str
    expected: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, ModelFileError) or not isinstance(error, _DAMAGE):
            return
        reason = (f"{error}".splitlines() or [""])[0]
        raise ModelFileError(
            f"{self.name}: {self.what} cannot be read: got {reason:.200} "
            f"({type(error).__name__}), expected {self.expected}. The file is damaged or is not "
            "a model; save it again, or restore it from a copy"
        ) from error


def _ends(members: list[zipfile.ZipInfo], end: int) -> dict[int, int]:
    """For each member's offset, the offset of the one after it, or of the archive's list."""
    offsets = sorted({member.header_offset for member in members} | {end})
    return {**dict(itertools.pairwise(offsets)), offsets[-1]: end}


def _begin(file: BinaryIO, member: zipfile.ZipInfo, end: int) -> int:
    """Offset of a member's content, after the checks that `zipfile.ZipFile.open` makes."""
    file.seek(member.header_offset)
    content = file.read(_MEMBER.size)
    if len(content) < _MEMBER.size:
        raise EOFError("the header of the member ends early")
    mark, flags, length, extra = _MEMBER.unpack(content)
    if mark != _FIRST:
        raise zipfile.BadZipFile("no header where the archive's list says")
    name = file.read(length).decode("utf-8" if flags & _UTF8 else "cp437")
    if name != member.orig_filename:
        raise zipfile.BadZipFile(f"the header has another name, {name!r:.80}")
    for flag, problem in _UNREADABLE.items():
        if member.flag_bits & flag:
            raise NotImplementedError(f"the member is {problem}")
    if member.compress_type not in (*_COMPRESSIONS, *_OTHERS):
        raise NotImplementedError(f"the member is compressed by method {member.compress_type}")
    begin = member.header_offset + _MEMBER.size + length + extra
    if begin + member.compress_size > end:
        raise zipfile.BadZipFile("the member overlaps the next one")
    return begin


def _array_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, dtype and length of the header at the begin of a member's content."""
    begin = len(_ARRAY) + 2
    length = begin + int.from_bytes(content[begin - 2 : begin], "little")
    if content.startswith(_ARRAY) and len(content) >= length:
        usual = _usual_header(content[begin:length])
        if usual is not None:
            return *usual, length
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"version {version} of NumPy's format")
    shape, is_transposed, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, is_transposed, dtype, stream.tell()


@functools.lru_cache(maxsize=64)  # most members of a model are numbers of a few dtypes
def _usual_header(text: bytes) -> tuple[tuple[int, ...], bool, np.dtype] | None:
    """Shape, order and dtype in a header as NumPy writes it; None for any other header."""
    found = _HEADER.fullmatch(text)
    if found is None:
        return None
    shape = tuple(map(int, found[3].replace(b",", b" ").split()))
    return shape, found[2] == b"True", np.dtype(found[1].decode("ascii"))


def _check_count(tail: bytes, count: int) -> None:
    """Raise ValueError if the last record of the archive gives another number of members.

    zipfile does not check this: a damaged length in one entry can hide the next entry.
    """
    (expected,) = struct.unpack_from("<H", tail, tail.rfind(_END) + 10)
    if expected not in (count, 0xFFFF):  # 0xFFFF means more members than 16 bits can count
        raise ValueError(f"{count} members, but the archive lists {expected}")
