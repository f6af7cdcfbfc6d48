"""Reading one Parquet file of sparse rows, with every check that its origin makes necessary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy import sparse

from ._transpose import index_dtype

_ALIASES = {"row_id": ("row_id", "row_tag"), "col_ids": ("col_ids", "col_tag")}


def parquet_library() -> tuple[ModuleType, ModuleType]:
    """pyarrow and pyarrow.parquet, or an ImportError that names the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            'sharded Parquet data need the package pyarrow: pip install "tpu-als[shards]"'
        ) from error
    return pyarrow, pyarrow.parquet


class RowReader:
    """What one file says of its rows, a row group at a time.

    Parameters
    ----------
    file : Path
    shape : (int, int)
        Rows and columns that ids must lie within.

    Raises
    ------
    ValueError
        By every method, naming the file, for what is no such file, lacks a column, has one of
        another type, or holds an id out of range, a value missing or not finite, lists of values
        and ids that differ in length, or a column twice in a row.
    """

    def __init__(self, file: Path, shape: tuple[int, int]) -> None:
        self.file, self.shape = file, shape

    def lengths(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield row ids and numbers of entries, both int64 (m,)."""
        for row_ids, (columns,) in self._groups(["col_ids"]):
            yield row_ids, _lengths(columns)

    def rows(
        self, has_values: bool, column: str = "col_ids"
    ) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Yield row ids int64 (m,), and rows as canonical float32 CSR of shape (m, n_columns)."""
        for row_ids, lists in self._groups([column, "values"] if has_values else [column]):
            lengths, ids = _lengths(lists[0]), self._flat(lists[0], column)
            values = self._values(lists[1], lengths) if has_values else None
            yield row_ids, self._checked(row_ids, lengths, ids, values)

    def _groups(self, names: list[str]) -> Iterator[tuple[np.ndarray, list[Any]]]:
        pa, pq = parquet_library()
        try:
            with pq.ParquetFile(self.file) as file:
                found = self._find(["row_id", *names], file.schema_arrow)
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=found)
                    ids, *lists = (table.column(name).combine_chunks() for name in found)
                    yield self._row_ids(ids), lists
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.file} cannot be read as a Parquet file: {error}") from error
        finally:
            # Arrow keeps what it once had; each process has better use for it.
            pa.default_memory_pool().release_unused()

    def _find(self, names: list[str], schema: Any) -> list[str]:
        """Names under which the file has these columns, once their types are checked."""
        pa, _ = parquet_library()
        found = []
        for name in names:
            aliases = _ALIASES.get(name, (name,))
            here = next((alias for alias in aliases if alias in schema.names), None)
            if here is None:
                wanted = " or ".join(aliases)
                raise ValueError(f"{self.file} has no column {wanted}, but {schema.names}")
            kind = schema.field(here).type
            is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            entry = kind.value_type if is_list else kind
            is_number = pa.types.is_integer(entry) or (
                name == "values" and pa.types.is_floating(entry)
            )
            if not is_number or is_list == (name == "row_id"):
                expected = {"row_id": "integers", "values": "lists of numbers"}
                wanted = expected.get(name, "lists of integers")
                raise ValueError(f"{self.file}: column {here} must hold {wanted}, not {kind}")
            found.append(here)
        return found

    def _row_ids(self, column: Any) -> np.ndarray:
        if column.null_count:
            raise ValueError(f"{self.file}: {column.null_count} rows have no row_id")
        row_ids = column.to_numpy().astype(np.int64)
        outside = row_ids[(row_ids < 0) | (row_ids >= self.shape[0])]
        if len(outside):
            raise ValueError(
                f"{self.file}: row_id {outside[0]} is not from 0 to below {self.shape[0]}, "
                "the rows of this side in totals.json"
            )
        return row_ids

    def _flat(self, column: Any, name: str) -> np.ndarray:
        flat = column.flatten()
        if flat.null_count:
            raise ValueError(f"{self.file}: lists in {name} have {flat.null_count} missing entries")
        return flat.to_numpy()

    def _values(self, column: Any, lengths: np.ndarray) -> np.ndarray:
        stored = column.is_valid().to_numpy(zero_copy_only=False)
        if np.any(_lengths(column)[stored] != lengths[stored]):
            raise ValueError(f"{self.file}: a list in values is not as long as the one in col_ids")
        values = np.ones(lengths.sum(), np.float32)
        with np.errstate(over="ignore"):
            values[np.repeat(stored, lengths)] = self._flat(column, "values")
        if not np.isfinite(values).all():
            raise ValueError(f"{self.file}: values must be finite, and within float32")
        return values

    def _checked(
        self, row_ids: np.ndarray, lengths: np.ndarray, ids: np.ndarray, values: np.ndarray | None
    ) -> sparse.csr_matrix:
        indptr = np.append(0, np.cumsum(lengths))
        outside = np.flatnonzero((ids < 0) | (ids >= self.shape[1]))
        if len(outside):
            row = row_ids[np.searchsorted(indptr, outside[0], side="right") - 1]
            raise ValueError(
                f"{self.file}: row {row} has column {ids[outside[0]]}, which is not from 0 to "
                f"below {self.shape[1]}, the columns of this side in totals.json"
            )
        values = np.ones(len(ids), np.float32) if values is None else values
        # A copy, as Arrow's memory is read-only and sorting is in place.
        indices = ids.astype(index_dtype(self.shape[1]))
        rows = sparse.csr_matrix((values, indices, indptr), (len(row_ids), self.shape[1]))
        if not rows.has_canonical_format:
            rows.sort_indices()
            same = np.flatnonzero(np.diff(rows.indices) == 0)
            row_of = np.searchsorted(indptr, same, side="right") - 1
            twice = indptr[row_of + 1] > same + 1
            if twice.any():
                row, column = row_ids[row_of[twice][0]], rows.indices[same[twice][0]]
                raise ValueError(f"{self.file}: row {row} has column {column} more than once")
            rows.has_canonical_format = True
        return rows


def _lengths(column: Any) -> np.ndarray:
    """Lengths (m,) of an Arrow array of lists, int64; 0 where there is none."""
    lengths = column.value_lengths().fill_null(0)
    return lengths.to_numpy().astype(np.int64)


def cut_rows(
    row_ids: np.ndarray, rows: sparse.csr_matrix, entries: int
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """Consecutive rows in pieces of at most `entries` entries; a longer row is its own piece."""
    if rows.nnz <= entries:
        yield row_ids, rows
        return
    begin, indptr = 0, rows.indptr.astype(np.int64, copy=False)  # `entries` more may not fit int32
    while begin < rows.shape[0]:
        end = int(np.searchsorted(indptr, indptr[begin] + entries, side="right")) - 1
        end = max(end, begin + 1)
        yield row_ids[begin:end], rows[begin:end]
        begin = end


def packed(
    readers: list[RowReader], has_values: bool, entries: int
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """The rows of files, in order, in blocks of at most `entries` entries or one row."""
    held: list[tuple[np.ndarray, sparse.csr_matrix]] = []
    n_held = 0
    for reader in readers:
        for row_ids, rows in reader.rows(has_values):
            for piece in cut_rows(row_ids, rows, entries):
                # Rows count too, or empty ones would pile up.
                size = max(len(piece[0]), piece[1].nnz)
                if held and n_held + size > entries:
                    yield joined(held)
                    held, n_held = [], 0
                held.append(piece)
                n_held += size
    if held:
        yield joined(held)


def joined(
    pieces: list[tuple[np.ndarray, sparse.csr_matrix]],
) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Row ids and rows, one below the other."""
    if len(pieces) == 1:
        return pieces[0]
    ids, rows = zip(*pieces, strict=True)
    return np.concatenate(ids), sparse.vstack(rows, format="csr")


def is_count(number: Any, least: int = 1) -> bool:
    """Whether it is an integer of at least so much."""
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= least


def parquet_files(folder: Path) -> list[Path]:
    """The folder's files of data, by name."""
    if not folder.is_dir():
        return []
    # Spark and others begin the names of what is not data with these.
    return sorted(f for f in folder.glob("*.parquet") if not f.name.startswith(("_", ".")))


def read_totals(file: Path, version: int) -> dict[str, Any]:
    """The totals of a directory, checked."""
    try:
        totals = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    found = totals.get("format") if isinstance(totals, dict) else None
    if isinstance(found, int) and found > version:
        raise ValueError(
            f"{file} has format {found}, but this version reads formats up to {version}: it was "
            "written by a later tpu_als; upgrade to read it"
        )
    least = {"format": version, "n_users": 0, "n_items": 0, "n_entries": 0, "n_shards": 1}
    for name, low in least.items():
        number = totals.get(name) if isinstance(totals, dict) else None
        if not isinstance(number, int) or isinstance(number, bool) or number < low:
            raise ValueError(f"{file}: {name} must be an integer of at least {low}, got {number!r}")
    if not isinstance(totals.get("has_values"), bool):
        got = totals.get("has_values")
        raise ValueError(f"{file}: has_values must be true or false, got {got!r}")
    return totals
