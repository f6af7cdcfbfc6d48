"""Files that `write_npz` writes and `NpzFile` reads, beside NumPy's and zipfile's functions."""

from __future__ import annotations

import io
import struct
import tokenize
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpu_als import ModelFileError
from tpu_als.storage.npz import NpzFile, write_npz

ARRAYS: dict[str, np.ndarray] = {
    "table": np.arange(600_000, dtype=np.float32).reshape(3000, 200),
    "in columns": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "every second": np.arange(12)[::2],
    "number": np.asarray(3.5),
    "flag": np.asarray(True),
    "text": np.asarray("größer"),
    "names": np.array(["a", "bcd"]),
    "no text": np.asarray(""),
    "nothing": np.empty((0, 3), np.float32),
    "complex": np.array([1 + 2j]),
    "other byte order": np.arange(3, dtype=">i4"),
    "cube": np.arange(8, dtype=np.uint8).reshape(2, 2, 2),
    "large": np.zeros((1, 1), np.float64),
}


class Pipe(io.RawIOBase):
    """A file that can be written from its beginning only."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.content += data
        return memoryview(data).nbytes


class OnlyRead:
    """An open file without `readinto`, which returns fewer bytes than it is asked for."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)
        self.seek, self.tell = self._file.seek, self._file.tell

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, 50_000))


def _written(arrays: dict[str, np.ndarray] = ARRAYS) -> bytes:
    file = io.BytesIO()
    write_npz(file, arrays)
    return file.getvalue()


def _require_equal(found: Any, content: Any) -> None:
    with NpzFile(content, "the file", lambda key: True) as read:
        assert set(read.headers) == set(found)
        for key, array in found.items():
            mine = read.read(key)
            assert mine.dtype == array.dtype and mine.flags.writeable, key
            np.testing.assert_array_equal(mine, array)


def test_numpy_reads_what_is_written() -> None:
    with np.load(io.BytesIO(_written()), allow_pickle=False) as read:
        assert read.files == list(ARRAYS)
        for key, array in ARRAYS.items():
            assert read[key].dtype == array.dtype, key
            np.testing.assert_array_equal(read[key], array)
            assert read[key].flags.f_contiguous == array.flags.f_contiguous or key == "every second"


@pytest.mark.parametrize("writer", [write_npz, None, np.savez_compressed])
def test_what_is_written_is_read(writer: Any) -> None:
    file = io.BytesIO()
    if writer is write_npz:
        write_npz(file, ARRAYS)
    else:
        (writer or np.savez)(file, **ARRAYS)
    _require_equal(ARRAYS, file)


def test_files_without_readinto_and_without_seek(tmp_path: Path) -> None:
    pipe = Pipe()
    write_npz(pipe, ARRAYS)  # type: ignore[arg-type]
    _require_equal(ARRAYS, io.BytesIO(pipe.content))
    _require_equal({"number": ARRAYS["number"]}, OnlyRead(_written({"number": ARRAYS["number"]})))
    path = tmp_path / "arrays.npz"
    path.write_bytes(_written())
    with path.open("rb") as file:
        _require_equal(ARRAYS, file)
    with path.open("rb", buffering=0) as file:
        _require_equal(ARRAYS, file)


def test_objects_are_not_written() -> None:
    with pytest.raises(ValueError, match="objects"):
        _written({"a": np.array([{}])})


def test_members_may_not_overlap() -> None:
    content = bytearray(_written({"first": np.zeros(40), "second": np.ones(40)}))
    for at in (content.index(b"first.npy"), content.index(b"second.npy")):
        assert at >= 30
    # The list says that the first member is as long as both.
    entry = content.index(b"PK\x01\x02")
    size = struct.unpack_from("<L", content, entry + 20)[0] + 200
    struct.pack_into("<LL", content, entry + 20, size, size)
    with pytest.raises(ModelFileError, match="'first'.*overlaps"):
        NpzFile(io.BytesIO(content), "the file", lambda key: True)


@pytest.mark.parametrize(
    ("compression", "is_read"), [(zipfile.ZIP_BZIP2, False), (zipfile.ZIP_LZMA, True)]
)
def test_other_compressions_are_refused_where_they_are_wanted(
    compression: int, is_read: bool
) -> None:
    file = io.BytesIO()
    member = io.BytesIO()
    np.lib.format.write_array(member, np.ones(3))
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("other.npy", member.getvalue())
    if is_read:
        with pytest.raises(ModelFileError, match="compressed by method"):
            NpzFile(file, "the file", lambda key: True)
    else:
        assert not NpzFile(file, "the file", lambda key: False).headers


def test_any_bit_of_the_numbers_may_be_wrong() -> None:
    content, table = _written(), ARRAYS["table"].tobytes()
    begin = content.index(table)
    for at in (0, len(table) // 2, len(table) - 1):
        damaged = bytearray(content)
        damaged[begin + at] ^= 4
        with NpzFile(io.BytesIO(damaged), "the file", lambda key: True) as read:
            np.testing.assert_array_equal(read.read("names"), ARRAYS["names"])
            with pytest.raises(ModelFileError, match="'table' cannot be read: got another checks"):
                read.read("table")


@pytest.mark.parametrize(
    ("descr", "shape", "order"),
    [
        ("'<f8'", "(2,3)", "False"),  # without a space
        ("'float64'", "(2, 3)", "True"),
        ("'<f8'", "(6)", "False"),
        ("'<f8'", "(2, 3", "False"),
        ("'<q9'", "(2, 3)", "False"),
        ("'|O'", "(6,)", "False"),
    ],
)
def test_unusual_headers_are_read_as_numpy_reads_them(descr: str, shape: str, order: str) -> None:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    content += np.arange(6.0).tobytes()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", content)
    try:
        expected = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError):
        with pytest.raises(ModelFileError, match="'a' cannot be read"):
            NpzFile(file, "the file", lambda key: True)
    else:
        _require_equal({"a": expected}, file)
