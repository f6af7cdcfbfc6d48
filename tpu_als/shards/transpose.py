"""Entries in the order of their rows to the order of their columns, in bounded memory, on disk."""

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
        Where the runs go: 8 to 20 bytes an entry. Whoever owns it removes it.
    shape : (int, int)
        Rows and columns; either may be too large a guess, which costs only disk.
    has_values : bool
        Whether to keep the values, or take all of them as 1.
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
        self._n_held = 0
        self._runs: list[_Run] = []

    def add(self, row_ids: np.ndarray, rows: sparse.csr_matrix) -> None:
        """Take the entries of rows, whose ids ascend, and follow those of earlier calls."""
        row_ids = np.repeat(row_ids, np.diff(rows.indptr))
        begin = 0
        while begin < rows.nnz:
            room = self._buffer[self._n_held : self._n_held + rows.nnz - begin]
            here = slice(begin, begin + len(room))
            room["column"], room["row"] = rows.indices[here], row_ids[here]
            if "value" in _fields(self._record):
                room["value"] = rows.data[here]
            begin += len(room)
            self._n_held += len(room)
            if self._n_held == len(self._buffer):
                self._write_run()

    def merged(self, n_rows: int) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Yield the columns that have entries, ascending and each whole, as rows.

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
            # The first column of which a run may have more entries than it holds.
            limit = min((run.last for run in runs if run.n_left), default=None)
            ready = np.concatenate([run.take(limit) for run in runs])
            if len(ready):
                yield _as_rows(ready[_stable_order(ready["column"])], n_rows)
            else:  # that column is longer than the share of such a run
                for run in runs:
                    run.fill(2 * len(run.held) if run.last == limit else 0)
            runs = [run for run in runs if run.n_left or len(run.held)]

    def _write_run(self) -> None:
        if not self._n_held:
            return
        records = self._buffer[: self._n_held]
        path = self._folder / f"run-{len(self._runs):06d}"
        order = _stable_order(records["column"])
        with open(path, "xb") as file:
            for begin in range(0, len(order), _WRITTEN_AT_ONCE):
                records[order[begin : begin + _WRITTEN_AT_ONCE]].tofile(file)
        self._runs.append(_Run(path, self._record, len(records)))
        self._n_held = 0


class _Run:
    """A file of sorted records, of which the next ones are held in memory."""

    def __init__(self, path: Path, record: np.dtype, n_records: int) -> None:
        self.held = np.empty(0, record)
        self.n_left = n_records
        self._path, self._offset = path, 0

    @property
    def last(self) -> int:
        """Column of the last record held."""
        return int(self.held["column"][-1])

    def fill(self, n_records: int) -> None:
        """Hold that many, or all that are left."""
        wanted = min(n_records - len(self.held), self.n_left)
        if wanted > 0:
            more = np.fromfile(self._path, self.held.dtype, wanted, offset=self._offset)
            self.held = np.concatenate([self.held, more])
            self._offset += more.nbytes
            self.n_left -= wanted

    def take(self, column: int | None) -> np.ndarray:
        """Remove and return the entries before `column`; all if it is None."""
        end = len(self.held) if column is None else np.searchsorted(self.held["column"], column)
        taken, self.held = self.held[:end], self.held[end:].copy()
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
    """Stable argsort of integers of at least 0: place and key in one number sort 7 times faster."""
    bits = len(keys).bit_length()
    if int(keys.max(initial=0)).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    order = keys.astype(np.int64) << bits
    order |= np.arange(len(keys))
    order.sort()
    order &= (1 << bits) - 1
    return order


def index_dtype(n: int) -> type[np.int32] | type[np.int64]:
    """The smallest dtype for ids of `n` rows that SciPy and Parquet have both."""
    return np.int32 if n <= np.iinfo(np.int32).max else np.int64
