"""Interactions that exceed a host's memory: a directory of Parquet files, by user and by item."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import sparse

from tpu_als.host import require_memory, threads
from tpu_als.shards.feature_files import read_features
from tpu_als.shards.files import TOTALS, Directory, ShardFile, is_count
from tpu_als.shards.reader import RowReader, joined, packed
from tpu_als.shards.transpose import index_dtype
from tpu_als.validation.features import FeatureTable

FORMAT = 1
Side = Literal["user", "item"]
SIDES: tuple[Side, ...] = ("user", "item")
_FOOTERS_AT_ONCE = 16
# Largest plausible number of rows of a side: a multiple of the known ids, plus a constant.
_ROWS_PER_ID, _MORE_ROWS = 64, 1 << 20


@dataclass(frozen=True)
class ShardedMatrix:
    """Interactions in a directory of Parquet files; `open_shards` and `write_shards` return it.

    It holds no entries and no open files, so it is cheap to pickle and to send to other processes.
    docs/shards.md describes the files. There are two sides ("user": rows are users; "item": rows
    are items). The files of a side are sorted by name; process `part` of `parts` reads the files
    number part, part + parts, ... All entries of a row are in one file.

    Attributes
    ----------
    path : Path or str
        The directory; an address if it is not local.
    shape : (int, int)
        Users and items.
    nnz : int
        Stored entries.
    n_shards : int
        Files of each side.
    has_values : bool
        Whether the values are read; otherwise all entries are 1.
    filesystem : pyarrow.fs.FileSystem or None
        The file system, if it was given.
    """

    path: Path | str
    shape: tuple[int, int]
    nnz: int
    n_shards: int
    has_values: bool
    filesystem: object = field(default=None, repr=False)

    @property
    def dtype(self) -> type[np.float32]:
        """Dtype of the entries when they are read."""
        return np.float32

    def files(self, side: Side, part: int = 0, parts: int = 1) -> list[Path | str]:
        """List the files of a process.

        Parameters
        ----------
        side : {"user", "item"}
        part, parts : int, default=0 of 1
            Number of this process, and of processes. If there are more processes than files, some
            have no file.

        Returns
        -------
        list of Path or of str
            Sorted by name, including those in subfolders; addresses if they are not local.

        Raises
        ------
        ValueError
            For another side, a part out of range, or if the number of files is not `n_shards`.
        """
        return [file.name for file in self._files(side, part, parts)]

    def _files(self, side: Side, part: int, parts: int) -> list[ShardFile]:
        if side not in SIDES:
            raise ValueError(f"side must be one of {SIDES}, got {side!r}")
        if not (is_count(parts) and is_count(part, 0) and part < parts):
            raise ValueError(f"part must be from 0 to below parts, got part {part} of {parts}")
        found = self._directory.files(side)
        if len(found) != self.n_shards:
            raise ValueError(
                f"{self.path}/{side} has {len(found)} Parquet files, but {TOTALS} counts "
                f"{self.n_shards}: files are missing, or belong to other data"
            )
        return found[part::parts]

    @property
    def _directory(self) -> Directory:
        return Directory(self.path, self.filesystem)

    def lengths(self, side: Side, part: int = 0, parts: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Count the entries of each row, one row group at a time.

        Parameters
        ----------
        side, part, parts
            As in `files`.

        Returns
        -------
        row_ids : ndarray of int64 (m,)
            In the order of the files. Rows that are in no file are absent.
        lengths : ndarray of int64 (m,)

        Raises
        ------
        ValueError
            If a row occurs twice, or all files together do not hold `nnz` entries; and as in
            `blocks`.
        """
        read = [pair for file in self._readers(side, part, parts) for pair in file.lengths()]
        row_ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in read)])
        lengths = np.concatenate([np.zeros(0, np.int64), *(counts for _, counts in read)])
        ordered = np.sort(row_ids)
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(repeated):
            raise ValueError(
                f"{self.path}/{side}: row {repeated[0]} occurs more than once, but all entries "
                "of a row must be in one file"
            )
        if parts == 1 and lengths.sum() != self.nnz:
            raise ValueError(
                f"{self.path}/{side} holds {lengths.sum()} entries, but {TOTALS} says {self.nnz}"
            )
        return row_ids, lengths

    def blocks(
        self, side: Side, part: int = 0, parts: int = 1, entries: int = 1 << 22
    ) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Stream the rows, with one block and one row group in memory at a time.

        Parameters
        ----------
        side, part, parts
            As in `files`.
        entries : int, default=2**22
            Largest number of entries of a block. A longer row is a block by itself.

        Yields
        ------
        row_ids : ndarray of int64 (m,)
            In the order of the files.
        rows : csr_matrix of shape (m, n_columns)
            float32, canonical; the columns are the other side's rows.

        Raises
        ------
        ValueError
            As in `files`. Also, naming the file, if a file is not Parquet, lacks a column, or holds
            an id out of range, a missing or infinite value, or a column twice in a row.
        """
        if not is_count(entries):
            raise ValueError(f"entries must be an integer of at least 1, got {entries!r}")
        return packed(self._readers(side, part, parts), self.has_values, int(entries))

    def to_csr(self) -> sparse.csr_matrix:
        """Read the whole matrix into memory.

        Returns
        -------
        csr_matrix of shape (n_users, n_items)
            float32, canonical.

        Raises
        ------
        ValueError
            As in `lengths` and `blocks`.
        MemoryError
            If it does not fit into memory.
        """
        dtype = index_dtype(max(*self.shape, self.nnz))
        width = np.dtype(dtype).itemsize
        require_memory(
            {"row starts": self.shape[0] * (8 + width), "entries": self.nnz * (4 + width)},
            "read it by blocks()",
        )
        row_ids, lengths = self.lengths("user")
        indptr = np.zeros(self.shape[0] + 1, np.int64)
        indptr[row_ids + 1] = lengths
        np.cumsum(indptr, out=indptr)
        indices, values = np.empty(self.nnz, dtype), np.empty(self.nnz, np.float32)
        for row_ids, rows in self.blocks("user"):
            offsets = np.repeat(indptr[row_ids] - rows.indptr[:-1], np.diff(rows.indptr))
            positions = offsets + np.arange(rows.nnz)
            indices[positions], values[positions] = rows.indices, rows.data
        return sparse.csr_matrix((values, indices, indptr.astype(dtype)), shape=self.shape)

    def held_out(self, part: int = 0, parts: int = 1) -> tuple[np.ndarray, sparse.csr_matrix]:
        """Read the items held out for evaluation, from the column `gt_tag` of the user files.

        Parameters
        ----------
        part, parts : int, default=0 of 1
            As in `files`.

        Returns
        -------
        row_ids : ndarray of int64 (m,)
            As in `blocks("user", part, parts)`, in the same order.
        held_out : csr_matrix of shape (m, n_items)
            float32 ones, canonical; some rows may be empty.

        Raises
        ------
        ValueError
            If a file has no such column, and as in `blocks`.
        """
        read = [
            pair
            for file in self._readers("user", part, parts)
            for pair in file.rows(has_values=False, column="gt_tag")
        ]
        nothing = np.zeros(0, np.int64), sparse.csr_matrix((0, self.shape[1]), dtype=np.float32)
        return joined([nothing, *read])

    def user_features(self, names: Sequence[str] | None = None) -> FeatureTable:
        """Read the features of all users, from the folder `user_features`.

        Parameters
        ----------
        names : sequence of str, optional
            The features to read, in this order, for example those of a fitted model; others in the
            files are left out. None means all, sorted by name.

        Returns
        -------
        FeatureTable
            One row for each user, of zeros for users that are in no file.

        Raises
        ------
        FileNotFoundError
            If there are no such files.
        ValueError
            Naming the file, if a file is not as docs/shards.md describes; if a row occurs twice;
            if `names` has repeats.
        """
        return read_features(self._directory, "user", self.shape[0], names)

    def item_features(self, names: Sequence[str] | None = None) -> FeatureTable:
        """Read the features of all items, from the folder `item_features`.

        Parameters, errors and the result are those of `user_features`.

        Parameters
        ----------
        names : sequence of str, optional
            As in `user_features`.

        Returns
        -------
        FeatureTable
            One row for each item.
        """
        return read_features(self._directory, "item", self.shape[1], names)

    def _readers(self, side: Side, part: int, parts: int) -> list[RowReader]:
        shape = self.shape if side == "user" else self.shape[::-1]
        directory, files = self._directory, self._files(side, part, parts)
        summaries = directory.totals(FORMAT).get("files")
        if summaries is not None:
            for file in files:
                if file.key not in summaries:
                    raise ValueError(f"{file.name} is not among the files in {TOTALS}")
        return [
            RowReader(file, shape, side, directory.filesystem, summaries and summaries[file.key])
            for file in files
        ]

    def _check_footers(self, side: Side) -> None:
        """Raise ValueError if the totals and the files' footers contradict each other."""
        readers = self._readers(side, 0, 1)
        counts = threads(RowReader.counts, readers, _FOOTERS_AT_ONCE)
        least, most, _, _ = np.array(counts, np.int64).sum(axis=0)
        if not least <= self.nnz <= most:
            raise ValueError(
                f"{self.path}/{side} holds {least} to {most} entries, but {TOTALS} says {self.nnz}"
            )
        name, n_rows = f"n_{side}s", self.shape[SIDES.index(side)]
        n_known = max(count[3] for count in counts) + 1
        if n_known and n_rows > _ROWS_PER_ID * n_known + _MORE_ROWS:
            raise ValueError(
                f"{self.path}/{TOTALS}: {name} is {n_rows}, but the largest row id in "
                f"{self.path}/{side} is {n_known - 1}"
            )


def open_shards(path: str | os.PathLike, filesystem: object = None) -> ShardedMatrix:
    """Open a directory written by `write_shards`, Spark, Beam or BigQuery.

    Reads the totals and the footer of each file.

    Parameters
    ----------
    path : str or path
        The directory, or an address that pyarrow opens, such as ``s3://bucket/purchases``,
        ``gs://...`` or ``file:///data/purchases``. Only data for evaluation may lack the folder
        `item`. Files may be in subfolders of `user` and `item`, as ``user/part=0/x.parquet``.
    filesystem : pyarrow.fs.FileSystem or file system of fsspec, optional
        The file system of `path`, for storage that needs its own settings.

    Returns
    -------
    ShardedMatrix

    Raises
    ------
    FileNotFoundError
        If there is no totals.json. `write_shards` writes it last.
    ValueError
        If the totals are not as described, have a later format, or contradict the files; if a file
        is not a Parquet file.
    ImportError
        If pyarrow, which the extra ``shards`` installs, is missing.
    """
    directory = Directory(path, filesystem)
    totals = directory.totals(FORMAT)
    shape = totals["n_users"], totals["n_items"]
    given = None if filesystem is None else directory.filesystem
    matrix = ShardedMatrix(
        directory.path, shape, totals["n_entries"], totals["n_shards"], totals["has_values"], given
    )
    for side in SIDES:
        if side == "user" or directory.has(side):
            matrix._check_footers(side)
    return matrix
