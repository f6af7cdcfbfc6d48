"""The directory of sharded files: local, or in one of pyarrow's file systems."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tpu_als.engine import digests

if TYPE_CHECKING:
    from pyarrow import fs as pa_fs

TOTALS = "totals.json"
_TAIL = 1 << 16  # bytes to read at the end of a file; most footers are shorter
_TOTALS_BYTES = 1 << 28  # largest size of a totals.json
MOST = 1 << 48  # limit on rows, entries and files, so that small sums of them fit into int64


def parquet_library() -> tuple[ModuleType, ModuleType]:
    """Import pyarrow and pyarrow.parquet; an ImportError names the extra."""
    try:
        import pyarrow
        import pyarrow.fs
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            'sharded Parquet data need the package pyarrow: pip install "tpu-als[shards]"'
        ) from error
    return pyarrow, pyarrow.parquet


def is_count(number: object, least: int = 1) -> bool:
    """Whether `number` is an integer of at least `least`."""
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= least


@dataclass(frozen=True)
class ShardFile:
    """A Parquet file.

    Attributes
    ----------
    name : Path or str
        For messages and users: a local path, or an address.
    source : str
        The path within its file system.
    key : str
        The path within the directory of shards, as in totals.json.
    """

    name: Path | str
    source: str
    key: str


class Directory:
    """A directory of shards.

    Parameters
    ----------
    path : str or path-like
        A local path, or an address such as ``s3://bucket/purchases`` or ``file:///data/purchases``.
    filesystem : pyarrow.fs.FileSystem or fsspec file system, optional
        The file system of `path`; by default the one in its address.

    Attributes
    ----------
    path : Path or str
        Absolute if it is local.
    filesystem : pyarrow.fs.FileSystem
        The file system of `path`.
    """

    def __init__(self, path: str | os.PathLike[str], filesystem: object = None) -> None:
        pa, _ = parquet_library()
        text, local = os.fspath(path), pa.fs.LocalFileSystem()
        self.path: Path | str
        if filesystem is not None:
            self.filesystem = _arrow_filesystem(filesystem)
            self.path, self._base = text, text.rstrip("/")
        elif "://" in text:
            try:
                self.filesystem, self._base = pa.fs.FileSystem.from_uri(text)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ValueError(f"pyarrow cannot open the address {text}: {error}") from error
            is_local = self.filesystem.equals(local)
            self.path = Path(self._base) if is_local else text.rstrip("/")
        else:
            self.path, self.filesystem = Path(text).absolute(), local
            self._base = str(self.path)

    def has(self, name: str) -> bool:
        """Whether there is a folder of this name."""
        pa, _ = parquet_library()
        return self._info(name).type == pa.fs.FileType.Directory

    def files(self, folder: str) -> list[ShardFile]:
        """All Parquet files in a folder and its subfolders (``part=0/...``), sorted by name."""
        pa, _ = parquet_library()
        base = f"{self._base}/{folder}"
        selector = pa.fs.FileSelector(base, allow_not_found=True, recursive=True)
        found = []
        try:
            entries = self.filesystem.get_file_info(selector)
        except NotADirectoryError:
            return []
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path}/{folder} cannot be listed: {error}") from error
        for entry in entries:
            key = entry.path[len(base) :].lstrip("/")
            # Spark and others use these prefixes for files that are not data.
            is_data = not any(part.startswith(("_", ".")) for part in key.split("/"))
            if entry.is_file and is_data and key.endswith(".parquet"):
                where = f"{folder}/{key}"
                name = self.path / where if isinstance(self.path, Path) else f"{self.path}/{where}"
                found.append(ShardFile(name, entry.path, where))
        return sorted(found, key=lambda file: file.key.split("/"))

    def totals(self, version: int) -> dict[str, Any]:
        """Read and check the totals of the directory; FileNotFoundError if there are none."""
        pa, _ = parquet_library()
        info = self._info(TOTALS)
        file = f"{self.path}/{TOTALS}"
        if info.type == pa.fs.FileType.NotFound:
            raise FileNotFoundError(
                f"{self.path} has no {TOTALS}, which is written last: this is not a directory of "
                "shards, or writing it was interrupted (then remove it and write it again)"
            )
        if not info.is_file or info.size > _TOTALS_BYTES:
            got = f"a file of {info.size} bytes" if info.is_file else "a directory"
            raise ValueError(f"{file} must be a file of JSON, got {got}")
        try:
            with self.filesystem.open_input_file(info.path) as stream:
                totals = json.loads(stream.read().decode("utf-8"))
        except (ValueError, RecursionError, pa.ArrowException, OSError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise ValueError(f"{file} cannot be read as JSON: {reason}") from error
        return checked_totals(totals, file, version)

    def _info(self, name: str) -> pa_fs.FileInfo:
        pa, _ = parquet_library()
        try:
            return self.filesystem.get_file_info(f"{self._base}/{name}")
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path}/{name} cannot be read: {error}") from error


def _arrow_filesystem(filesystem: object) -> pa_fs.FileSystem:
    """Return a file system of pyarrow; file systems of fsspec are wrapped."""
    pa, _ = parquet_library()
    if isinstance(filesystem, pa.fs.FileSystem):
        return filesystem
    if hasattr(filesystem, "open") and hasattr(filesystem, "protocol"):
        return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem))
    raise ValueError(
        "filesystem must be a pyarrow.fs.FileSystem or a file system of fsspec, got "
        f"{type(filesystem).__name__}"
    )


def checked_totals(totals: Any, file: str, version: int) -> dict[str, Any]:
    """Check and return the content of totals.json; a ValueError names the invalid entry."""
    found = totals.get("format") if isinstance(totals, dict) else None
    if isinstance(found, int) and found > version:
        raise ValueError(
            f"{file} has format {found}, but this version reads formats up to {version}: it was "
            "written by a later tpu_als; upgrade to read it"
        )
    least = {"format": version, "n_users": 0, "n_items": 0, "n_entries": 0, "n_shards": 1}
    for name, low in least.items():
        number: Any = totals.get(name) if isinstance(totals, dict) else None
        if not is_count(number, low):
            got = repr(number)[:50]
            raise ValueError(f"{file}: {name} must be an integer of at least {low}, got {got}")
        if int(number) > MOST:
            size = int(number).bit_length()
            raise ValueError(f"{file}: {name} must be at most 2**48, got about 2**{size}")
    if not isinstance(totals.get("has_values"), bool):
        got = repr(totals.get("has_values"))[:50]
        raise ValueError(f"{file}: has_values must be true or false, got {got}")
    files = totals.get("files", {})
    if not isinstance(files, dict) or not all(map(_is_summary, files.values())):
        raise ValueError(
            f"{file}: files must give for each file [rows, entries, digest, bytes, CRC-32 of the "
            "footer], where the digest is text and the others are integers of at least 0"
        )
    if "checksum" in totals and not _has_its_checksum(totals):
        raise ValueError(
            f"{file} does not match the checksum in it. It is damaged (restore it from a copy) or "
            "was edited (remove its field checksum)"
        )
    return totals


def _has_its_checksum(totals: dict[str, object]) -> bool:
    try:
        return totals["checksum"] == digests.fields(totals)
    except RecursionError:  # an additional field is nested too deeply
        return False


def _is_summary(value: object) -> bool:
    """Whether `value` is [rows, entries, digest, bytes, CRC-32 of the footer]."""
    return (
        isinstance(value, list)
        and len(value) == 5
        and all(is_count(number, 0) for number in (*value[:2], *value[3:]))
        and isinstance(value[2], str)
    )


def footer(source: str, filesystem: pa_fs.FileSystem) -> list[int]:
    """Return the size of a file, and the CRC-32 of the footer at its end.

    Parquet has checksums of pages but not of footers, and Arrow may abort the process if a footer
    is damaged.
    """
    with filesystem.open_input_file(source) as stream:
        size = stream.size()
        tail = stream.read_at(min(_TAIL, size), max(size - _TAIL, 0))
        length = 8 + int.from_bytes(tail[-8:-4], "little")
        if length > len(tail):
            length = min(length, size)
            tail = stream.read_at(length, size - length)
        return [size, zlib.crc32(tail[-length:])]
