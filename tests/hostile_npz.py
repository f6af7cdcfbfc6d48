"""Writers of damaged, foreign and hostile .npz files, which `load` must refuse."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

Writer = Callable[[Path, bytes], object]
BOMB = 300 << 20  # expanded size; the compressed file is a thousand times smaller


def members(good: bytes) -> dict[str, Any]:
    """Arrays of a good file."""
    with np.load(io.BytesIO(good), allow_pickle=False) as data:
        return {key: data[key] for key in data.files}


def npy(value: Any) -> bytes:
    """An array as a member of a file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(value), allow_pickle=True)
    return file.getvalue()


def changed(**changes: Any) -> Writer:
    """A good file with some members replaced; None removes a member."""

    def write(path: Path, good: bytes) -> None:
        arrays = {**members(good), **changes}
        with zipfile.ZipFile(path, "w") as file:
            for name, value in arrays.items():
                if value is not None:
                    file.writestr(f"{name}.npy", npy(value))

    return write


def with_members(raw: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Writer:
    """A good file with members of any content. Members of the same name are replaced."""

    def write(path: Path, good: bytes) -> None:
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, value in members(good).items():
                if f"{name}.npy" not in raw:
                    file.writestr(f"{name}.npy", npy(value))
            for name, content in raw.items():
                file.writestr(name, content)

    return write


def header(descr: str, shape: str, content: bytes = b"") -> bytes:
    """A member with a given header."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + content


def bomb(name: str) -> Writer:
    """A member that expands to far more than the file. It is streamed, to need no memory here."""

    def write(path: Path, good: bytes) -> None:
        changed(**{name: None})(path, good)
        block = bytes(1 << 20)
        with (
            zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
            file.open(f"{name}.npy", "w") as member,
        ):
            member.write(header("'<f4'", f"({BOMB // 4}, 1)"))
            for _ in range(BOMB // len(block)):
                member.write(block)

    return write


def truncated(share: float) -> Writer:
    """The first part of a good file."""
    return lambda path, good: path.write_bytes(good[: int(len(good) * share)])


def flipped(key: str) -> Writer:
    """One bit changed in the middle of a table's data."""

    def write(path: Path, good: bytes) -> None:
        data = members(good)[key].tobytes()
        content = bytearray(good)
        content[good.index(data) + len(data) // 2] ^= 16
        path.write_bytes(content)

    return write


def twice(path: Path, good: bytes) -> None:
    """Two members of one name, with different tables."""
    path.write_bytes(good)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("item_factors.npy", npy(np.ones((9, 6), np.float32)))


def encrypted(path: Path, good: bytes) -> None:
    """Every member flagged as encrypted."""
    content = bytearray(good)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(mark, at + 4)
    path.write_bytes(content)


def _savez(**arrays: Any) -> Writer:
    return lambda path, good: np.savez(path, **arrays)


def _nan() -> np.ndarray:
    table = np.ones((18, 6), np.float32)
    table[3, 2] = np.nan
    return table


ONES = np.ones((18, 6), np.float32)
OBJECTS = np.array([{"a": 1}], dtype=object)
FILES: dict[str, Writer] = {
    # damaged
    "empty": lambda path, good: path.write_bytes(b""),
    "one byte": lambda path, good: path.write_bytes(b"P"),
    **{
        f"truncated at {share:.0%}": truncated(share)
        for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)
    },
    "truncated by one byte": lambda path, good: path.write_bytes(good[:-1]),
    "without its first half": lambda path, good: path.write_bytes(good[len(good) // 2 :]),
    "a bit of the user table": flipped("user_factors"),
    "a bit of the item table": flipped("item_factors"),
    "zeros in place of the directory": lambda path, good: path.write_bytes(
        good[:-200] + bytes(200)
    ),
    "only zeros": lambda path, good: path.write_bytes(bytes(5000)),
    # of other programs
    "a matrix of SciPy": lambda path, good: sparse.save_npz(path, sparse.eye(9, format="csr")),
    "no members": lambda path, good: zipfile.ZipFile(path, "w").close(),
    "arrays of somebody": _savez(a=np.ones(3), b=np.ones(4)),
    "arrays without names": lambda path, good: np.savez(path, np.ones(3)),
    "weights of a neural network": _savez(**{"layer.0": ONES, "layer.1": ONES}),
    "an .npy file": lambda path, good: path.write_bytes(npy(ONES)),
    "text": lambda path, good: path.write_text("user,item\n1,2\n"),
    "a gzip file": lambda path, good: path.write_bytes(gzip.compress(good)),
    "a pickle": lambda path, good: path.write_bytes(b"\x80\x04\x95\x05\x00\x00\x00"),
    "a zip of text files": with_members({"readme.txt": b"hello", "factors.npy": b"6"}),
    # with contradictory values
    "tables of two widths": changed(item_factors=np.ones((18, 4), np.float32)),
    "a table of one axis": changed(user_factors=np.ones(24, np.float32)),
    "a table of three axes": changed(user_factors=np.ones((2, 3, 6), np.float32)),
    "a table that is a number": changed(user_factors=np.float32(3)),
    "NaN in a table": changed(item_factors=_nan()),
    "infinity in a table": changed(user_factors=np.full((24, 6), np.inf, np.float32)),
    "a table of integers": changed(item_factors=np.ones((18, 6), np.int64)),
    "a table of text": changed(item_factors=np.full((18, 6), "a")),
    "a table of complex numbers": changed(item_factors=ONES.astype(complex)),
    "a table of booleans": changed(item_factors=ONES.astype(bool)),
    "names of too few items": changed(tpu_als_feature_names_in_=np.array(["a", "b"])),
    "history of text": changed(tpu_als_history_loss=np.array(["a", "b"])),
    "iterations run below 0": changed(tpu_als_n_iter_=np.int64(-4)),
    # with parameters of other types
    "factors of text": changed(factors=np.str_("six")),
    "factors below 0": changed(factors=np.int64(-3)),
    "a list of factors": changed(factors=np.array([6, 7])),
    "alpha NaN": changed(alpha=np.float64("nan")),
    "alpha of text": changed(alpha=np.str_("2")),
    "regularization below 0": changed(regularization=np.float64(-1)),
    "an unknown dtype": changed(tpu_als_storage_dtype=np.str_("float12")),
    "a number as dtype": changed(dtype=np.int64(32), tpu_als_storage_dtype=None),
    "an unknown objective": changed(tpu_als_objective=np.str_("explicit")),
    "iterations of floats": changed(iterations=np.float64(1.5)),
    # of a later format, or without a format
    "a future format": changed(tpu_als_format=np.int64(10**6)),
    "a format of text": changed(tpu_als_format=np.str_("one")),
    "a format of two numbers": changed(tpu_als_format=np.array([1, 2])),
    "format -1": changed(tpu_als_format=np.int64(-1)),
    # hostile
    "a pickle in a table": changed(item_factors=OBJECTS),
    "a pickle in a parameter": changed(alpha=OBJECTS),
    "a bomb in a table": bomb("item_factors"),
    "a bomb in a parameter": bomb("alpha"),
    "a bomb in the names": bomb("tpu_als_feature_names_in_"),
    "a header with the shape of a terabyte": with_members(
        {"item_factors.npy": header("'<f4'", f"({2**36}, 6)", bytes(64))}
    ),
    "a header with the shape of more data than the member has": with_members(
        {"item_factors.npy": header("'<f4'", "(18, 6)", bytes(64))}
    ),
    "a header of less than there is": with_members(
        {"item_factors.npy": header("'<f4'", "(2, 6)", bytes(4096))}
    ),
    "a header with a shape below 0": with_members(
        {"item_factors.npy": header("'<f4'", "(-18, 6)", bytes(432))}
    ),
    "a header with a shape beyond 64 bits": with_members(
        {"item_factors.npy": header("'<f4'", f"({2**63}, {2**63})")}
    ),
    "a header with an unknown dtype": with_members(
        {"item_factors.npy": header("'<q9'", "(18, 6)", bytes(432))}
    ),
    "a header of records": with_members(
        {"item_factors.npy": header("[('a', '<f4')]", "(18, 6)", bytes(432))}
    ),
    "a header that is code": with_members(
        {"item_factors.npy": header("__import__('os').getcwd()", "(18, 6)")}
    ),
    "a header nested deeply": with_members(
        {"item_factors.npy": header("[" * 40 + "]" * 40, "(18, 6)")}
    ),
    "a header that never ends": with_members(
        {"item_factors.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{"}
    ),
    "a member of format 9": with_members({"item_factors.npy": b"\x93NUMPY\x09\x00" + bytes(99)}),
    "members of one name": twice,
    "an encrypted file": encrypted,
}
# Files with additional members, which are not read. They load like the good file.
HARMLESS: dict[str, Writer] = {
    "an absolute name": with_members({"/tmp/tpu_als_evil.npy": npy(ONES)}),
    "a name in the parent folder": with_members({"../../tpu_als_evil.npy": npy(ONES)}),
    "a text file beside the tables": with_members({"readme.txt": b"hello"}),
    "a pickle under an unknown name": changed(extra=OBJECTS),
    "an unknown array": with_members({"extra.npy": npy(ONES)}),
    "a bomb under an unknown name": bomb("extra"),
    "a compressed file": with_members({}, zipfile.ZIP_DEFLATED),
}
