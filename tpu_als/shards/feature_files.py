"""Read and write Parquet files of features, which name the features of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse

from tpu_als.shards.files import Directory, parquet_library
from tpu_als.shards.reader import RowReader
from tpu_als.validation.features import FeatureTable

if TYPE_CHECKING:
    import pyarrow as pa

_ROW_GROUP_ENTRIES = 1 << 20


class _Entries(NamedTuple):
    """Entries of rows: their row ids, the numbers of their names, and values; all of shape (n,)."""

    rows: np.ndarray
    numbers: np.ndarray
    values: np.ndarray


class FeatureReader(RowReader):
    """Reads the features of one file, a row group at a time."""

    def features(self, numbers: dict[str, int]) -> Iterator[tuple[np.ndarray, _Entries]]:
        """Yield row ids (m,) and entries; names that are not in `numbers` are added to it.

        Raises
        ------
        ValueError
            As `RowReader`; for a name that is missing or repeated in a row, and a value that is
            missing or not finite.
        """
        has_values = "values" in self._columns()
        for row_ids, lists in self._groups(["features", "values"] if has_values else ["features"]):
            lengths = lists[0].value_lengths().fill_null(0).to_numpy().astype(np.int64)
            flat = lists[0].flatten()
            if flat.null_count:
                raise ValueError(f"{self.file}: lists in features have {flat.null_count} nulls")
            encoded = flat.dictionary_encode()
            names = encoded.dictionary.to_pylist()
            of_names = np.array([numbers.setdefault(name, len(numbers)) for name in names], int)
            entries = _Entries(
                np.repeat(row_ids, lengths),
                of_names[encoded.indices.to_numpy()],
                self._numbers(lists[1], lengths) if has_values else np.ones(lengths.sum()),
            )
            self._refuse_repeated(np.repeat(np.arange(len(row_ids)), lengths), entries, numbers)
            yield row_ids, entries

    def _numbers(self, column: pa.Array, lengths: np.ndarray) -> np.ndarray:
        """Values (n,) of the entries; 1 where the list of a row is null."""
        stored = column.is_valid().to_numpy(zero_copy_only=False)
        found = column.value_lengths().fill_null(0).to_numpy()
        if np.any(found[stored] != lengths[stored]):
            raise ValueError(f"{self.file}: a list in values is not as long as the one in features")
        values = np.ones(lengths.sum())
        values[np.repeat(stored, lengths)] = self._flat(column, "values")
        if not np.isfinite(values).all():
            raise ValueError(f"{self.file}: values must be finite")
        return values

    def _refuse_repeated(
        self, places: np.ndarray, entries: _Entries, numbers: dict[str, int]
    ) -> None:
        order = np.lexsort((entries.numbers, places))
        row, name = places[order], entries.numbers[order]
        same = np.flatnonzero((row[1:] == row[:-1]) & (name[1:] == name[:-1]))
        if len(same):
            at = order[same[0]]
            repeated = list(numbers)[entries.numbers[at]]
            raise ValueError(
                f"{self.file}: row {entries.rows[at]} has feature {repeated!r} more than once"
            )


def read_features(
    directory: Directory, side: str, n_rows: int, names: Sequence[str] | None
) -> FeatureTable:
    """Read all features of a side.

    Parameters
    ----------
    directory : Directory
        Where the folder ``{side}_features`` is.
    side : {"user", "item"}
    n_rows : int
        Number of users or items.
    names : sequence of str, optional
        The features to keep, in this order; None keeps all, sorted by name.

    Raises
    ------
    FileNotFoundError
        If there are no files.
    ValueError
        As `FeatureReader.features`; for a row in two places, and for repeated `names`.
    """
    folder = f"{side}_features"
    files = directory.files(folder)
    if not files:
        raise FileNotFoundError(
            f"{directory.path} has no Parquet files in {folder}: write them as docs/shards.md "
            f"describes, or pass features from memory to fit"
        )
    numbers: dict[str, int] = {}
    readers = [FeatureReader(file, (n_rows, 0), side, directory.filesystem) for file in files]
    read = [group for reader in readers for group in reader.features(numbers)]
    row_ids = np.sort(np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in read)]))
    repeated = row_ids[1:][row_ids[1:] == row_ids[:-1]]
    if len(repeated):
        raise ValueError(
            f"{directory.path}/{folder}: row {repeated[0]} occurs more than once, but all features "
            "of a row must be in one place"
        )
    kept = sorted(numbers) if names is None else [str(name) for name in names]
    columns = {name: column for column, name in enumerate(kept)}
    if len(columns) != len(kept):
        raise ValueError("names must be distinct")
    # The last number is for no name, so that the array is never empty.
    column_of = np.array([*(columns.get(name, -1) for name in numbers), -1])
    parts = [entries for _, entries in read]
    rows, of_names, values = (
        np.concatenate([np.zeros(0, kind), *(entries[at] for entries in parts)])
        for at, kind in enumerate((np.int64, np.int64, np.float64))
    )
    at = column_of[of_names]
    is_kept = at >= 0
    found = (values[is_kept], (rows[is_kept], at[is_kept]))
    return FeatureTable(sparse.csr_matrix(found, shape=(n_rows, len(kept))), kept)


def write_feature_file(table: FeatureTable, file: Path) -> None:
    """Write features with names to a Parquet file that docs/shards.md describes."""
    pa, pq = parquet_library()
    assert table.names is not None
    schema = pa.schema(
        [("row_id", pa.int64()), ("features", pa.list_(pa.string())),
         ("values", pa.list_(pa.float64()))]
    )  # fmt: skip
    matrix, names = table.matrix, pa.array(table.names.tolist(), pa.string())
    stored = np.flatnonzero(np.diff(matrix.indptr))
    group_of = matrix.indptr[stored] // _ROW_GROUP_ENTRIES
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for ids in np.split(stored, np.flatnonzero(np.diff(group_of)) + 1):
            rows = matrix[ids]
            offsets = pa.array(rows.indptr.astype(np.int32))
            values = None
            if np.any(rows.data != 1):
                values = pa.ListArray.from_arrays(offsets, pa.array(rows.data))
            columns = [
                pa.array(ids, pa.int64()),
                pa.ListArray.from_arrays(offsets, names.take(pa.array(rows.indices))),
                pa.nulls(len(ids), schema.field("values").type) if values is None else values,
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), max(len(ids), 1))
