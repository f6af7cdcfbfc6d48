"""Write streamed rows as Parquet files by row and by column, in bounded memory."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.engine import digests
from tpu_als.shards.files import footer, is_count, parquet_library
from tpu_als.shards.reader import cut_rows
from tpu_als.shards.transpose import ExternalTranspose, index_dtype
from tpu_als.storage.atomic import replacing
from tpu_als.validation.arguments import canonical_csr
from tpu_als.validation.refusals import IF_EVENTS, refuse_misplaced

_ROW_GROUP_ENTRIES = 1 << 20
_UNKNOWN_ROWS = 1 << 40


@dataclass(frozen=True)
class Settings:
    """Arguments of `write_shards`, which describes them."""

    n_shards: int
    compression: str
    memory_entries: int


def write_sides(
    blocks: Iterable[sparse.csr_matrix],
    folder: Path,
    shape: tuple[int | None, int],
    has_values: bool | None,
    settings: Settings,
) -> tuple[int, int, bool, dict[str, list[int | str]]]:
    """Write the folders `user` and `item` from blocks of consecutive users.

    Parameters
    ----------
    blocks : iterable of csr_matrix
        Canonical, float32.
    folder : Path
        Must exist. A temporary folder in it is removed at the end, also after an error.
    shape : (int or None, int)
        Numbers of users, if known in advance, and items.
    has_values : bool or None
        Whether some entry is not 1; None if that is not known in advance.
    settings : Settings

    Returns
    -------
    n_rows, n_entries : int
        Totals over the blocks.
    has_values : bool
    summaries : dict
        Rows, entries and digest of each file.
    """
    n_rows, n_entries, found_values = 0, 0, False
    memory = settings.memory_entries
    with tempfile.TemporaryDirectory(dir=folder, prefix="transpose-") as runs:
        guess = _UNKNOWN_ROWS if shape[0] is None else shape[0]
        transpose = ExternalTranspose(
            Path(runs), (guess, shape[1]), has_values is not False, memory
        )
        with PartWriter(folder / "user", shape[1], has_values, settings) as users:
            for block in blocks:
                row_ids = np.arange(n_rows, n_rows + block.shape[0])
                for ids, rows in cut_rows(row_ids, block, min(_ROW_GROUP_ENTRIES, memory // 4 + 1)):
                    users.add(ids, rows)
                    transpose.add(ids, rows)
                    found_values = found_values or bool(np.any(rows.data != 1))
                n_rows, n_entries = n_rows + block.shape[0], n_entries + block.nnz
        n_users = max(n_rows, shape[0] or 0)
        with PartWriter(folder / "item", n_users, found_values, settings) as items:
            for ids, rows in transpose.merged(n_users):
                items.add(ids, rows)
    return n_rows, n_entries, found_values, users.summaries | items.summaries


def write_test(
    known: sparse.csr_matrix,
    held_out: sparse.csr_matrix,
    folder: Path,
    n_columns: int,
    settings: Settings,
) -> tuple[int, int, bool, dict[str, list[int | str]]]:
    """Write the folder `user` of data for evaluation, with the column `gt_tag`.

    Parameters
    ----------
    known, held_out : csr_matrix of one shape
        Canonical, float32.
    folder : Path
        Must exist.
    n_columns : int
        Number of items; at least the number of columns of the matrices.
    settings : Settings

    Returns
    -------
    n_rows, n_entries, has_values, summaries
        For `known`, as in `write_sides`.
    """
    has_values = bool(np.any(known.data != 1))
    both = sparse.hstack([known, held_out], format="csr")
    at_once = min(_ROW_GROUP_ENTRIES, settings.memory_entries // 4 + 1)
    with PartWriter(folder / "user", n_columns, has_values, settings, held_out=True) as users:
        for ids, rows in cut_rows(np.arange(both.shape[0]), both, at_once):
            users.add(ids, rows)
    return known.shape[0], known.nnz, has_values, users.summaries


class PartWriter(contextlib.AbstractContextManager):
    """Writes each row to the file of number `row_id % n_shards` (part-00000.parquet, ...).

    Parameters
    ----------
    folder : Path
        Must not exist; it is created.
    n_columns : int
        Number of columns. It decides whether column ids are int32 or int64.
    values : bool or None
        Whether the files have values. With None they have, but null in row groups of ones.
    settings : Settings
        At most `memory_entries` entries are buffered, over all parts.
    held_out : bool, default=False
        Whether the second half of the columns holds the held-out entries of the same items.
    """

    def __init__(
        self,
        folder: Path,
        n_columns: int,
        values: bool | None,
        settings: Settings,
        held_out: bool = False,
    ) -> None:
        pa, pq = parquet_library()
        n_shards = settings.n_shards
        ids = pa.list_(pa.from_numpy_dtype(index_dtype(n_columns)))
        lists = [("col_ids", ids)]
        if values is not False:
            lists.append(("values", pa.list_(pa.float32())))
        if held_out:
            lists.append(("gt_tag", ids))
        self._schema = pa.schema([("row_id", pa.int64()), *lists])
        self._null_if_ones = values is None
        self._group = max(1, min(_ROW_GROUP_ENTRIES, settings.memory_entries // n_shards))
        self._buffered: list[list[tuple[np.ndarray, sparse.csr_matrix]]] = [
            [] for _ in range(n_shards)
        ]
        self._n_buffered = [0] * n_shards
        folder.mkdir()
        self._folder = folder
        self._digests = [digests.EntriesDigest(folder.name, n_columns) for _ in range(n_shards)]
        self._counts = [[0, 0] for _ in range(n_shards)]
        with contextlib.ExitStack() as files:
            self._writers = [
                files.enter_context(
                    pq.ParquetWriter(
                        folder / _name(part),
                        self._schema,
                        compression=settings.compression,
                        use_dictionary=["values.list.element"],  # ids rarely repeat
                        write_statistics=["row_id"],
                        write_page_checksum=True,
                    )
                )
                for part in range(n_shards)
            ]
            self._files = files.pop_all()

    @property
    def summaries(self) -> dict[str, list[Any]]:
        """For each file: rows, entries, digest, size in bytes, and checksum of the footer."""
        pa, _ = parquet_library()
        local, found = pa.fs.LocalFileSystem(), {}
        for part, (counts, digest) in enumerate(zip(self._counts, self._digests, strict=True)):
            ending = footer(str(self._folder / _name(part)), local)
            found[f"{self._folder.name}/{_name(part)}"] = [
                *counts, f"{digest.total:016x}", *ending,
            ]  # fmt: skip
        return found

    def add(self, row_ids: np.ndarray, rows: sparse.csr_matrix) -> None:
        """Append rows to their parts; rows without entries are not written."""
        n_shards = len(self._buffered)
        stored = np.flatnonzero(np.diff(rows.indptr))
        order = stored[np.argsort(row_ids[stored] % n_shards, kind="stable")]
        row_ids, rows = row_ids[order], rows[order]
        bounds = np.searchsorted(row_ids % n_shards, np.arange(n_shards + 1))
        for part, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if begin < end:
                piece = rows[begin:end]
                self._buffered[part].append((row_ids[begin:end].copy(), piece))
                self._n_buffered[part] += piece.nnz
                if self._n_buffered[part] >= self._group:
                    self._write(part)

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        with self._files:
            if kind is None:
                for part in range(len(self._buffered)):
                    self._write(part)

    def _write(self, part: int) -> None:
        if not self._buffered[part]:
            return
        pa, _ = parquet_library()
        row_ids = np.concatenate([ids for ids, _ in self._buffered[part]])
        rows = sparse.vstack([rows for _, rows in self._buffered[part]], format="csr")
        self._buffered[part], self._n_buffered[part] = [], 0
        kinds = {field.name: field.type for field in self._schema}
        held_out = None
        if "gt_tag" in kinds:
            n_columns = rows.shape[1] // 2
            rows, held_out = rows[:, :n_columns], rows[:, n_columns:]
        self._digests[part].add(row_ids, rows)
        self._counts[part] = [
            self._counts[part][0] + len(row_ids),
            self._counts[part][1] + rows.nnz,
        ]
        columns = [pa.array(row_ids, pa.int64()), _id_lists(rows, kinds["col_ids"])]
        if "values" in kinds and self._null_if_ones and np.all(rows.data == 1):
            columns.append(pa.nulls(len(row_ids), kinds["values"]))
        elif "values" in kinds:
            columns.append(pa.ListArray.from_arrays(columns[1].offsets, pa.array(rows.data)))
        if held_out is not None:
            columns.append(_id_lists(held_out, kinds["gt_tag"]))
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._writers[part].write_table(table, row_group_size=len(row_ids))


def _name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _id_lists(rows: sparse.csr_matrix, kind: Any) -> Any:
    """The columns of each row, as an Arrow array of lists."""
    pa, _ = parquet_library()
    offsets = pa.array(_list_offsets(rows.indptr))
    return pa.ListArray.from_arrays(offsets, pa.array(rows.indices, kind.value_type, safe=False))


def _list_offsets(indptr: np.ndarray) -> np.ndarray:
    """Convert `indptr` to int32, the offsets of Arrow's lists; ValueError if it does not fit."""
    most = np.iinfo(np.int32).max
    if indptr[-1] > most:
        raise ValueError(
            f"a row group must have at most {most} entries, got {indptr[-1]}: lower "
            "memory_entries, or raise n_shards"
        )
    return indptr.astype(np.int32)


def canonical_blocks(
    blocks: Iterable[Any], shape: tuple[int, int] | None
) -> Iterator[sparse.csr_matrix]:
    """Yield canonical blocks; ValueError if one is not a matrix or does not match the others."""
    if not isinstance(blocks, Iterable) or isinstance(blocks, np.ndarray):
        raise _not_blocks(blocks)
    # The elements of other iterables, such as the column names of a frame, do not help in an error.
    is_plain = isinstance(blocks, (list, tuple, Iterator))
    n_rows, width = 0, None
    for number, block in enumerate(blocks):
        if not (sparse.issparse(block) or is_plain):
            raise _not_blocks(blocks)
        if not sparse.issparse(block) or block.ndim != 2:
            raise ValueError(
                f"block {number} of the data must be a CSR matrix, got {type(block).__name__}"
            )
        if width not in (None, block.shape[1]):
            raise ValueError(
                f"block {number} of the data has {block.shape[1]} columns, but those before it "
                f"have {width}: every block must have all items as columns"
            )
        n_rows, width = n_rows + block.shape[0], block.shape[1]
        if shape is not None and (n_rows > shape[0] or width > shape[1]):
            raise ValueError(
                f"the data have at least {n_rows} users and {width} items, which is more than "
                f"shape={tuple(shape)}"
            )
        yield canonical_csr(block)


def _not_blocks(data: object) -> ValueError:
    """Error for data that are neither a sparse matrix nor blocks of one."""
    advice = ""
    if hasattr(data, "columns"):
        advice = f": {IF_EVENTS}; if they are users, pass scipy.sparse.csr_matrix(data)"
    elif hasattr(data, "__array__"):
        advice = ": pass scipy.sparse.csr_matrix(data)"
    return ValueError(
        "data must be a CSR matrix or an iterable of CSR matrices, got "
        f"{type(data).__name__}{advice}"
    )


def checked_held_out(held_out: Any, data: Any) -> sparse.csr_matrix:
    """Return the held-out entries, canonical; ValueError if they do not match the data."""
    refuse_misplaced(held_out, "held_out")
    if not sparse.issparse(data):
        raise ValueError("with held_out the data must be one CSR matrix, not blocks")
    if not sparse.issparse(held_out) or held_out.shape != data.shape:
        got = f"{type(held_out).__name__} {getattr(held_out, 'shape', '')}".rstrip()
        raise ValueError(
            f"held_out must be a CSR matrix of the data's shape {data.shape}, got {got}"
        )
    return next(canonical_blocks([held_out], None))


def checked_data(
    data: Any, shape: tuple[int, int] | None
) -> tuple[Iterator[sparse.csr_matrix], tuple[int | None, int], bool | None]:
    """Check the data, and return blocks, (users, items), and whether there are values.

    The number of users, and whether there are values, are None if not known yet.
    """
    is_matrix = sparse.issparse(data)
    if shape is not None and not (len(shape) == 2 and all(is_count(n, 0) for n in shape)):
        raise ValueError(f"shape must be two integers of at least 0, got {shape!r}")
    blocks = canonical_blocks([data] if is_matrix else data, shape)
    first = next(blocks, None)
    if first is None:
        if shape is None:
            raise ValueError("the data contain no block: pass shape=(n_users, n_items)")
        return blocks, shape, None
    n_users = data.shape[0] if is_matrix else None
    has_values = bool(np.any(first.data != 1)) if is_matrix else None
    sizes = (n_users, first.shape[1]) if shape is None else (int(shape[0]), int(shape[1]))
    return itertools.chain([first], blocks), sizes, has_values


@contextlib.contextmanager
def new_directory(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Create an empty directory; after an error, remove folders of these names in it."""
    was_there = folder.exists()
    if was_there and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty directory: choose another, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException:
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)
        if not was_there:
            folder.rmdir()
        raise


def write_totals(file: Path, totals: dict[str, object]) -> None:
    """Write a JSON file atomically, with a checksum of its fields."""
    with replacing(file) as stream:
        checked = {**totals, "checksum": digests.fields(totals)}
        stream.write(json.dumps(checked, indent=1).encode())
