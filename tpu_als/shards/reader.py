"""Read Parquet files of sparse rows. They may be damaged or untrusted, so all is checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from tpu_als.engine.digests import EntriesDigest
from tpu_als.host import require_memory
from tpu_als.shards.files import MOST, TOTALS, ShardFile, footer, parquet_library
from tpu_als.shards.transpose import index_dtype

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs as pa_fs

_ALIASES = {"row_id": ("row_id", "row_tag"), "col_ids": ("col_ids", "col_tag")}


class RowReader:
    """Reads the rows of one file, a row group at a time.

    Parameters
    ----------
    file : ShardFile
    shape : (int, int)
        Rows and columns that ids must lie within.
    side : {"user", "item"}
        Whether the rows are users or items.
    filesystem : pyarrow.fs.FileSystem
        The file system of the file.
    summary : list, optional
        To verify, from totals.json: rows, entries, digest, file size and footer checksum.

    Raises
    ------
    ValueError
        Every method raises it, and names the file. Reasons: the file is not Parquet, lacks a column
        or has one of another type; it holds an id out of range, a missing or infinite value, lists
        of values and ids of different lengths, or a column twice in a row; its content differs from
        totals.json, which is known only after the last row.
    """

    def __init__(
        self,
        file: ShardFile,
        shape: tuple[int, int],
        side: str,
        filesystem: pa_fs.FileSystem,
        summary: list[int | str] | None = None,
    ) -> None:
        self.file, self.shape = file.name, shape
        self._source, self._side, self._filesystem = file.source, side, filesystem
        self._summary = summary

    def counts(self) -> tuple[int, int, int, int]:
        """Read from the footer: bounds on the entries, number of rows, and largest row id or -1."""
        self._verify_footer()
        with self._reading():
            _, pq = parquet_library()
            meta = pq.read_metadata(self._source, filesystem=self._filesystem)
            n_rows, most, largest, is_known = int(meta.num_rows), 0, -1, False
            for group in range(meta.num_row_groups):
                for at in range(meta.num_columns):
                    column = meta.row_group(group).column(at)
                    name = column.path_in_schema.split(".")[0]
                    if name in _ALIASES["col_ids"]:
                        most, is_known = most + int(column.num_values), True
                    if name in _ALIASES["row_id"]:
                        found = column.statistics.max if column.is_stats_set else None
                        largest = max(largest, found) if isinstance(found, int) else largest
            if not (0 <= n_rows <= MOST and 0 <= most <= MOST and largest <= MOST):
                raise ValueError(
                    f"its footer has impossible counts, {n_rows} rows and {most} entries"
                )
        if not is_known and meta.num_row_groups:
            return 0, MOST, n_rows, largest
        # The count includes one value for each row without entries.
        return max(most - n_rows, 0), most, n_rows, largest

    def lengths(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield row ids and numbers of entries, both int64 (m,)."""
        n_rows, n_entries = 0, 0
        for row_ids, (columns,) in self._groups(["col_ids"]):
            lengths = _lengths(columns)
            n_rows, n_entries = n_rows + len(row_ids), n_entries + int(lengths.sum())
            yield row_ids, lengths
        self._verify(n_rows, n_entries, None)

    def rows(
        self, has_values: bool, column: str = "col_ids"
    ) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Yield row ids int64 (m,), and rows as canonical float32 CSR of shape (m, n_columns)."""
        names = [column, "values"] if has_values else [column]
        # If the totals say that there are no values, they must be absent or 1.
        if column == "col_ids" and not has_values and "values" in self._columns():
            names.append("values")
        digest, n_rows, n_entries = EntriesDigest(self._side, self.shape[1]), 0, 0
        for row_ids, lists in self._groups(names):
            lengths, ids = _lengths(lists[0]), self._flat(lists[0], column)
            values = self._values(lists[1], lengths) if len(lists) > 1 else None
            if not has_values and values is not None and np.any(values != 1):
                raise ValueError(
                    f"{self.file}: values are not all 1, but has_values is false in {TOTALS}"
                )
            rows = self._checked(row_ids, lengths, ids, values)
            if self._summary is not None:
                digest.add(row_ids, rows)
            n_rows, n_entries = n_rows + len(row_ids), n_entries + rows.nnz
            yield row_ids, rows
        if column == "col_ids":
            self._verify(n_rows, n_entries, f"{digest.total:016x}")

    def _verify(self, n_rows: int, n_entries: int, digest: str | None) -> None:
        """Compare the content with the totals; `digest` is None if only lengths were read."""
        if self._summary is not None:
            found = [n_rows, n_entries, *([] if digest is None else [digest])]
            self._compare("rows, entries and digest", found, self._summary[: len(found)])

    def _verify_footer(self) -> None:
        """Verify the footer before Arrow reads it, which may abort on a damaged one."""
        if self._summary is not None:
            with self._reading():
                found = footer(self._source, self._filesystem)
            self._compare("file size and footer checksum", found, self._summary[3:])

    def _compare(self, what: str, found: Sequence[object], expected: Sequence[object]) -> None:
        if found != expected:
            raise ValueError(
                f"{self.file} is damaged or another file: it has {what} {found}, but {TOTALS} says "
                f"{expected}"
            )

    def _columns(self) -> list[str]:
        self._verify_footer()
        with self._reading():
            _, pq = parquet_library()
            return list(pq.read_schema(self._source, filesystem=self._filesystem).names)

    def _groups(self, names: list[str]) -> Iterator[tuple[np.ndarray, list[pa.Array]]]:
        pa, pq = parquet_library()
        file = None
        self._verify_footer()
        try:
            with self._reading():
                file = pq.ParquetFile(
                    self._source, filesystem=self._filesystem, page_checksum_verification=True
                )
            found = self._find(["row_id", *names], file.schema_arrow)
            for group in range(file.num_row_groups):
                with self._reading():
                    size = file.metadata.row_group(group).total_byte_size
                    require_memory({"a row group": 2 * size}, f"write {self.file} in smaller ones")
                    table = file.read_row_group(group, columns=found)
                    ids, *lists = (table.column(name).combine_chunks() for name in found)
                    for array in (ids, *lists):
                        array.validate(full=True)
                yield self._row_ids(ids), lists
        finally:
            if file is not None:
                file.close(force=True)
            # Arrow does not return freed memory by itself.
            pa.default_memory_pool().release_unused()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Context in which errors become a ValueError that names the file."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # Arrow raises many kinds for damaged files
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ValueError(f"{self.file} cannot be read as a Parquet file: {reason}") from error

    def _find(self, names: list[str], schema: pa.Schema) -> list[str]:
        """Return the names that the file has for these columns, after a check of their types."""
        pa, _ = parquet_library()
        found = []
        for name in names:
            aliases = _ALIASES.get(name, (name,))
            here = next((alias for alias in aliases if alias in schema.names), None)
            if here is None:
                wanted = " or ".join(aliases)
                raise ValueError(f"{self.file} must have a column {wanted}, got {schema.names}")
            kind = schema.field(here).type
            is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            entry = kind.value_type if is_list else kind
            if name == "features":
                fits = pa.types.is_string(entry) or pa.types.is_large_string(entry)
            else:
                is_float = name == "values" and pa.types.is_floating(entry)
                fits = is_float or pa.types.is_integer(entry)
            if not fits or is_list == (name == "row_id"):
                expected = {
                    "row_id": "integers", "values": "lists of numbers", "features": "lists of text",
                }  # fmt: skip
                wanted = expected.get(name, "lists of integers")
                raise ValueError(f"{self.file}: column {here} must hold {wanted}, got {kind}")
            found.append(here)
        return found

    def _row_ids(self, column: pa.Array) -> np.ndarray:
        if column.null_count:
            raise ValueError(f"{self.file}: {column.null_count} rows have no row_id")
        row_ids = column.to_numpy().astype(np.int64)
        outside = row_ids[(row_ids < 0) | (row_ids >= self.shape[0])]
        if len(outside):
            raise ValueError(
                f"{self.file}: row_id {outside[0]} must be 0 or more and below "
                f"{self.shape[0]}, the number of rows in totals.json"
            )
        return row_ids

    def _flat(self, column: pa.Array, name: str) -> np.ndarray:
        flat = column.flatten()
        if flat.null_count:
            raise ValueError(f"{self.file}: lists in {name} have {flat.null_count} missing entries")
        return flat.to_numpy()

    def _values(self, column: pa.Array, lengths: np.ndarray) -> np.ndarray:
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
                f"{self.file}: row {row} has column {ids[outside[0]]}, which must be 0 or more "
                f"and below {self.shape[1]}, the number of columns in totals.json"
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


def _lengths(column: pa.Array) -> np.ndarray:
    """Lengths (m,) of the lists of an Arrow array, int64; 0 for null."""
    lengths = column.value_lengths().fill_null(0)
    return lengths.to_numpy().astype(np.int64)


def cut_rows(
    row_ids: np.ndarray, rows: sparse.csr_matrix, entries: int
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """Consecutive rows in pieces of at most `entries` entries; a longer row is its own piece."""
    if rows.nnz <= entries:
        yield row_ids, rows
        return
    begin, indptr = (
        0,
        rows.indptr.astype(np.int64, copy=False),
    )  # a sum with `entries` may exceed int32
    while begin < rows.shape[0]:
        end = int(np.searchsorted(indptr, indptr[begin] + entries, side="right")) - 1
        end = max(end, begin + 1)
        yield row_ids[begin:end], rows[begin:end]
        begin = end


def packed(
    readers: list[RowReader], has_values: bool, entries: int
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
    """The rows of files, in order, in blocks of at most `entries` entries or one row."""
    buffer: list[tuple[np.ndarray, sparse.csr_matrix]] = []
    n_buffered = 0
    for reader in readers:
        for row_ids, rows in reader.rows(has_values):
            for piece in cut_rows(row_ids, rows, entries):
                # Rows count too. Otherwise any number of empty rows would be buffered.
                size = max(len(piece[0]), piece[1].nnz)
                if buffer and n_buffered + size > entries:
                    yield joined(buffer)
                    buffer, n_buffered = [], 0
                buffer.append(piece)
                n_buffered += size
    if buffer:
        yield joined(buffer)


def joined(
    pieces: list[tuple[np.ndarray, sparse.csr_matrix]],
) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Concatenated row ids and rows."""
    if len(pieces) == 1:
        return pieces[0]
    ids, rows = zip(*pieces, strict=True)
    return np.concatenate(ids), sparse.vstack(rows, format="csr")
