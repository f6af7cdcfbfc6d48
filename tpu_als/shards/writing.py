"""Write a directory of shards: the interactions, and features of users and items."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scipy import sparse

from tpu_als.shards.feature_files import write_feature_file
from tpu_als.shards.files import TOTALS, Directory, is_count, parquet_library
from tpu_als.shards.sharded_matrix import FORMAT, SIDES, ShardedMatrix, open_shards
from tpu_als.shards.writer import (
    Settings,
    checked_data,
    checked_held_out,
    new_directory,
    write_sides,
    write_test,
    write_totals,
)
from tpu_als.validation.features import FeatureTable, table_for
from tpu_als.validation.refusals import refuse_misplaced

_COMPRESSIONS = ("zstd", "snappy", "gzip", "brotli", "lz4", "none")


def write_shards(
    data: sparse.csr_matrix | Iterable[sparse.csr_matrix],
    path: str | os.PathLike,
    n_shards: int = 8,
    *,
    shape: tuple[int, int] | None = None,
    held_out: sparse.csr_matrix | None = None,
    compression: str = "zstd",
    memory_entries: int = 1 << 24,
) -> ShardedMatrix:
    """Write interactions as sharded Parquet files, by user and by item, in bounded memory.

    The item side is made by an external sort. Its temporary files (8 to 20 bytes per entry) are in
    the same directory. After an error all files are removed.

    Parameters
    ----------
    data : csr_matrix of shape (n_users, n_items), or iterable of csr_matrix
        Blocks hold consecutive users, from user 0 on, and all have `n_items` columns. Repeated
        entries are summed; stored zeros are entries.
    path : str or path
        Local directory to create; may exist if it is empty.
    n_shards : int, default=8
        Number of files of each side, all open at once. Should be a multiple of the number of
        processes that will read them.
    shape : (int, int), optional
        Numbers of users and items; by default those of the data. Needed if the last users have no
        entries.
    held_out : csr_matrix of shape (n_users, n_items), optional
        For evaluation: the entries to find. The data must then be one matrix of the known entries.
        It is written as the column `gt_tag`, and there is no folder `item`.
    compression : str, default="zstd"
        "zstd", "snappy", "gzip", "brotli", "lz4" or "none".
    memory_entries : int, default=2**24
        Entries in memory at once, at about 40 bytes each, in addition to one block of the data and
        the longest row. With many shards, more entries give longer row groups.

    Returns
    -------
    ShardedMatrix

    Raises
    ------
    FileExistsError
        If `path` is a file, or a directory that is not empty.
    TypeError
        For data meant for another function, such as a table of events, an `Interactions`, a
        ShardedMatrix or a path.
    ValueError
        For data of another type, blocks of different widths, values that are not finite, a shape
        that is too small, no block and no shape, `held_out` that does not match the data, or
        another argument out of range.
    ImportError
        If pyarrow, which the extra ``shards`` installs, is missing.

    Examples
    --------
    >>> import tempfile
    >>> blocks = [sparse.csr_matrix([[1, 0, 1]]), sparse.csr_matrix([[0, 0, 1]])]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     matrix = write_shards(blocks, folder, n_shards=2)
    ...     matrix.shape, matrix.nnz, matrix.to_csr().toarray().tolist()
    ((2, 3), 3, [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    """
    parquet_library()
    for name, number in (("n_shards", n_shards), ("memory_entries", memory_entries)):
        if not is_count(number):
            raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
    if compression not in _COMPRESSIONS:
        raise ValueError(f"compression must be one of {_COMPRESSIONS}, got {compression!r}")
    refuse_misplaced(data, "data", takes_blocks=True)
    if held_out is not None:
        held_out = checked_held_out(held_out, data)
    blocks, sizes, has_values = checked_data(data, shape)
    local = Directory(path).path
    if not isinstance(local, Path):
        raise ValueError(
            f"write_shards writes to a local directory, got the address {path}: write locally and "
            "copy the directory, totals.json last"
        )
    with new_directory(local, SIDES) as folder:
        settings = Settings(int(n_shards), compression, int(memory_entries))
        if held_out is None:
            written = write_sides(blocks, folder, sizes, has_values, settings)
        else:
            written = write_test(next(blocks), held_out, folder, sizes[1], settings)
        n_rows, n_entries, has_values, summaries = written
        totals = {
            "format": FORMAT,
            "n_users": n_rows if sizes[0] is None else sizes[0],
            "n_items": sizes[1],
            "n_entries": n_entries,
            "n_shards": int(n_shards),
            "has_values": has_values,
            "files": summaries,
        }
        write_totals(folder / TOTALS, totals)
    return open_shards(local)


def write_features(
    shards: ShardedMatrix | str | os.PathLike[str],
    *,
    user_features: Any = None,
    item_features: Any = None,
) -> None:
    """Write features of users or items as Parquet files into a local directory of shards.

    `ShardedMatrix.user_features` and `item_features` read them.

    Parameters
    ----------
    shards : ShardedMatrix, str or path
        The directory, which `write_shards` or another writer has completed.
    user_features, item_features : DataFrame or FeatureTable, optional
        One row for each user or item, with names of the features. Zeros are not written.

    Raises
    ------
    FileExistsError
        If there is a folder of features already. Remove it first.
    ValueError
        If neither is given; for features without distinct names, or that `fit` would refuse; for an
        address instead of a local directory.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> products = pd.DataFrame({"food": [1, 1, 0], "price": [2.5, 0.5, 9.0]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     matrix = write_shards(sparse.csr_matrix([[1, 0, 1], [0, 1, 1]]), folder, n_shards=1)
    ...     write_features(matrix, item_features=products)
    ...     table = matrix.item_features()
    >>> table, table.names.tolist(), table.matrix.toarray()[2].tolist()
    (FeatureTable(3 rows of 2 features), ['food', 'price'], [0.0, 9.0])
    """
    matrix = shards if isinstance(shards, ShardedMatrix) else open_shards(shards)
    folder = matrix.path
    if not isinstance(folder, Path):
        raise ValueError(f"write_features writes to a local directory, got the address {folder}")
    given = {"user": user_features, "item": item_features}
    tables = {
        side: _named(table_for(values, n_rows, f"{side}_features", f"{side}s"), side)
        for (side, values), n_rows in zip(given.items(), matrix.shape, strict=True)
        if values is not None
    }
    if not tables:
        raise ValueError("pass user_features or item_features, got neither")
    for side in tables:
        if (folder / f"{side}_features").exists():
            raise FileExistsError(f"{folder / f'{side}_features'} exists: remove it first")
    for side, table in tables.items():
        unfinished = folder / f"_{side}_features-{uuid.uuid4().hex}"
        unfinished.mkdir()
        try:
            write_feature_file(table, unfinished / "part-00000.parquet")
            unfinished.rename(folder / f"{side}_features")  # complete at once
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _named(table: FeatureTable, side: str) -> FeatureTable:
    """The table; ValueError if its features have no names."""
    if table.names is None:
        raise ValueError(
            f"{side}_features must have distinct names of features, got none: pass a DataFrame, "
            "or tpu_als.FeatureTable(values, names)"
        )
    return table
