"""Sort the entries of a matrix by column, on disk and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import sparse

_WRITTEN_AT_ONCE = 1 << 18


class ExternalTranspose:
    """An external merge sort of a matrix's entries by column.

    Entries fill a buffer; a full buffer is sorted and becomes a file, a run. `merged` reads all
    runs in parallel. Unlike a split into fixed ranges of columns, this needs neither the number of
    entries nor the popularity of columns in advance.

    Parameters
    ----------
    folder : Path
        Directory of the runs, which take 8 to 20 bytes per entry. The caller removes it.
    shape : (int, int)
        Rows and columns, or upper bounds of them. A larger dtype of ids costs disk space only.
    has_values : bool
        Whether to keep the values. Otherwise all of them are taken as 1.
    memory_entries : int
        Entries in memory at once, at up to 28 bytes each.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, int], has_values: bool, memory_entries: int
    ) -> None:
        fields = [("column", index_dtype(shape[1])), ("row", index_dtype(shape[0]))]
        self._record = np.dtype(fields + [("value", np.float32)] * has_values)
        self._folder = folder
        self._memory_entries = memory_entries
        self._buffer = np.empty(memory_entries, self._record)
        self._n_buffered = 0
        self._runs: list[_Run] = []

    def add(self, row_ids: np.ndarray, rows: sparse.csr_matrix) -> None:
        """Add the entries of rows. The ids ascend, also from one call to the next."""
        row_ids = np.repeat(row_ids, np.diff(rows.indptr))
        begin = 0
        while begin < rows.nnz:
            room = self._buffer[self._n_buffered : self._n_buffered + rows.nnz - begin]
            here = slice(begin, begin + len(room))
            room["column"], room["row"] = rows.indices[here], row_ids[here]
            if "value" in _fields(self._record):
                room["value"] = rows.data[here]
            begin += len(room)
            self._n_buffered += len(room)
            if self._n_buffered == len(self._buffer):
                self._write_run()

    def merged(self, n_rows: int) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Yield the columns that have entries, as rows in ascending order and never divided.

        Parameters
        ----------
        n_rows : int
            Rows that were added.

        Yields
        ------
        column_ids : ndarray of int64 (m,)
        columns : csr_matrix of shape (m, n_rows)
            float32, canonical.
        """
        self._write_run()
        self._buffer = np.empty(0, self._record)
        # A quarter of the memory, because the result is copied when it is sorted and split.
        share = max(1, self._memory_entries // (4 * max(1, len(self._runs))))
        runs = self._runs
        while runs:
            for run in runs:
                run.fill(share)
            # Columns before `limit` are complete: no run has more of their entries on disk.
            limit = min((run.last for run in runs if run.n_left), default=None)
            ready = np.concatenate([run.take(limit) for run in runs])
            if len(ready):
                yield _as_rows(ready[_stable_order(ready["column"])], n_rows)
            else:  # a run has more entries of the column `limit` than its share
                for run in runs:
                    run.fill(2 * len(run.buffer) if run.last == limit else 0)
            runs = [run for run in runs if run.n_left or len(run.buffer)]

    def _write_run(self) -> None:
        if not self._n_buffered:
            return
        records = self._buffer[: self._n_buffered]
        path = self._folder / f"run-{len(self._runs):06d}"
        order = _stable_order(records["column"])
        with open(path, "xb") as file:
            for begin in range(0, len(order), _WRITTEN_AT_ONCE):
                records[order[begin : begin + _WRITTEN_AT_ONCE]].tofile(file)
        self._runs.append(_Run(path, self._record, len(records)))
        self._n_buffered = 0


class _Run:
    """A file of sorted records. The next ones are in `buffer`."""

    def __init__(self, path: Path, record: np.dtype, n_records: int) -> None:
        self.buffer = np.empty(0, record)
        self.n_left = n_records
        self._path, self._offset = path, 0

    @property
    def last(self) -> int:
        """Column of the last record in the buffer."""
        return int(self.buffer["column"][-1])

    def fill(self, n_records: int) -> None:
        """Read until the buffer has `n_records` records, or the file has no more."""
        wanted = min(n_records - len(self.buffer), self.n_left)
        if wanted > 0:
            more = np.fromfile(self._path, self.buffer.dtype, wanted, offset=self._offset)
            self.buffer = np.concatenate([self.buffer, more])
            self._offset += more.nbytes
            self.n_left -= wanted

    def take(self, column: int | None) -> np.ndarray:
        """Remove and return the entries before `column`; all if it is None."""
        end = len(self.buffer) if column is None else np.searchsorted(self.buffer["column"], column)
        taken, self.buffer = self.buffer[:end], self.buffer[end:].copy()
        return taken


def _as_rows(records: np.ndarray, n_columns: int) -> tuple[np.ndarray, sparse.csr_matrix]:
    starts = np.flatnonzero(np.diff(records["column"], prepend=-1))
    has_values = "value" in _fields(records.dtype)
    values = records["value"] if has_values else np.ones(len(records), np.float32)
    entries = (values, records["row"], np.append(starts, len(records)))
    rows = sparse.csr_matrix(entries, shape=(len(starts), n_columns))
    return records["column"][starts].astype(np.int64), rows


def _fields(record: np.dtype) -> tuple[str, ...]:
    return record.names or ()


def _stable_order(keys: np.ndarray) -> np.ndarray:
    """Stable argsort of integers of at least 0.

    Key and position are packed into one number where they fit, which is 7 times faster.
    """
    bits = len(keys).bit_length()
    if int(keys.max(initial=0)).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    order = keys.astype(np.int64) << bits
    order |= np.arange(len(keys))
    order.sort()
    order &= (1 << bits) - 1
    return order


def index_dtype(n: int) -> type[np.int32] | type[np.int64]:
    """The smallest dtype for ids of `n` rows that both SciPy and Parquet support."""
    return np.int32 if n <= np.iinfo(np.int32).max else np.int64
