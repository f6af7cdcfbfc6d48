"""Sharded Parquet data: round trips, files of other writers, bounded memory, errors."""

from __future__ import annotations

import doctest
import io
import json
import pickle
import sys
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares, shards
from tpu_als.datasets import interactions_from_frame, power_law
from tpu_als.engine import digests
from tpu_als.shards import ShardedMatrix, open_shards, transpose, write_shards, writer
from tpu_als.shards.transpose import ExternalTranspose

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def in_blocks(matrix: sparse.csr_matrix, n_rows: int) -> Iterator[sparse.csr_matrix]:
    """Blocks of consecutive rows."""
    return (matrix[begin : begin + n_rows] for begin in range(0, matrix.shape[0], n_rows))


def gathered(matrix: ShardedMatrix, side: str, **options: int) -> sparse.csr_matrix:
    """All rows of a side from its blocks, in row order."""
    shape = matrix.shape if side == "user" else matrix.shape[::-1]
    rows, columns, values = [], [], []
    for row_ids, block in matrix.blocks(side, **options):
        assert row_ids.dtype == np.int64 and row_ids.shape == (block.shape[0],)
        assert isinstance(block, sparse.csr_matrix) and block.dtype == np.float32
        assert block.indices.dtype == np.int32 and block.shape[1] == shape[1]
        assert sparse.csr_matrix(
            (block.data, block.indices, block.indptr), shape=block.shape
        ).has_canonical_format
        rows.append(np.repeat(row_ids, np.diff(block.indptr)))
        columns.append(block.indices)
        values.append(block.data)
    if not rows:
        return sparse.csr_matrix(shape, dtype=np.float32)
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_matrix(entries, shape=shape)


def assert_same(got: sparse.csr_matrix, expected: sparse.csr_matrix) -> None:
    """Check for equal entries, including stored zeros."""
    expected = sparse.csr_matrix(expected).sorted_indices()
    assert got.shape == expected.shape and got.dtype == np.float32
    np.testing.assert_array_equal(got.indptr, expected.indptr)
    np.testing.assert_array_equal(got.indices, expected.indices)
    np.testing.assert_array_equal(got.data, expected.data)


@st.composite
def matrices(draw: Any) -> sparse.csr_matrix:
    """Small matrices of several dtypes, some of them empty or with empty rows."""
    shape = draw(st.integers(0, 12)), draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    stored = rng.random(shape) < draw(st.sampled_from([0, 0.1, 0.5, 1]))
    stored &= rng.random((shape[0], 1)) < 0.7
    rows, columns = np.nonzero(stored)
    dtype = draw(st.sampled_from([np.float32, np.float64, np.int64, np.bool_]))
    most = draw(st.sampled_from([2, 6]))
    values = rng.integers(1, most, len(rows)).astype(dtype)
    return sparse.csr_matrix((values, (rows, columns)), shape=shape)


def test_examples() -> None:
    assert doctest.testmod(shards).failed == 0


class TestRoundTrip:
    @given(matrices(), st.integers(1, 5), st.integers(1, 30), st.integers(1, 30), st.integers(0, 6))
    def test_both_sides(
        self, matrix: Any, n_shards: int, memory: int, entries: int, n_rows: int
    ) -> None:
        data = in_blocks(matrix, n_rows) if n_rows else matrix
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transpose, "_WRITTEN_AT_ONCE", 4)
            with tempfile.TemporaryDirectory() as folder:
                options = dict(shape=matrix.shape, memory_entries=memory, compression="none")
                written = write_shards(data, folder, n_shards, **options)
                assert written == open_shards(folder)
                assert written.shape == matrix.shape and written.nnz == matrix.nnz
                assert written.n_shards == n_shards and written.dtype == np.float32
                assert written.has_values == bool(np.any(matrix.data != 1))
                expected = matrix.astype(np.float32)
                assert_same(written.to_csr(), expected)
                assert_same(gathered(written, "user", entries=entries), expected)
                assert_same(gathered(written, "item", entries=entries), expected.T.tocsr())

    @pytest.mark.parametrize("binary", [False, True])
    def test_blocks_equal_the_matrix(self, tmp_path: Path, binary: bool) -> None:
        matrix = random_counts(60, 25, seed=3)
        if binary:
            matrix.data[:] = 1
        whole = write_shards(matrix, tmp_path / "whole", 3)
        blocks = write_shards(in_blocks(matrix, 7), tmp_path / "blocks", 3)
        assert blocks.shape == (60, 25) and blocks.has_values is not binary
        for side in ("user", "item"):
            for one, other in zip(whole.blocks(side), blocks.blocks(side), strict=True):
                np.testing.assert_array_equal(one[0], other[0])
                assert_same(other[1], one[1])

    def test_values_in_the_last_block_only(self, tmp_path: Path) -> None:
        matrix = sparse.csr_matrix(np.ones((6, 4), np.float32))
        matrix.data[-1] = 3
        written = write_shards(in_blocks(matrix, 1), tmp_path, 1, memory_entries=4)
        nulls = pq.read_table(written.files("user")[0])["values"].is_null().to_pylist()
        assert nulls == [True] * 5 + [False]
        assert_same(written.to_csr(), matrix)

    def test_no_values_column_for_ones(self, tmp_path: Path) -> None:
        ones = power_law(30, 20, 90)
        written = write_shards(ones, tmp_path, 2)
        for file in (*written.files("user"), *written.files("item")):
            assert pq.read_schema(file).names == ["row_id", "col_ids"]

    def test_layout(self, tmp_path: Path) -> None:
        matrix = random_counts(31, 20)
        written = write_shards(matrix, tmp_path, 4)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["item", "totals.json", "user"]
        totals = json.loads((tmp_path / "totals.json").read_text())
        assert totals.pop("checksum") == digests.fields(totals)
        for key, summary in totals["files"].items():
            content = (tmp_path / key).read_bytes()
            length = int.from_bytes(content[-8:-4], "little") + 8
            assert summary[3:] == [len(content), zlib.crc32(content[-length:])]
            del summary[3:]
        assert totals == {
            "format": 1,
            "n_users": 31,
            "n_items": 20,
            "n_entries": matrix.nnz,
            "n_shards": 4,
            "has_values": True,
            "files": self.summaries(matrix, 4),
        }
        for side, lengths in (("user", matrix.getnnz(1)), ("item", matrix.getnnz(0))):
            stored = np.flatnonzero(lengths)
            for part, file in enumerate(written.files(side)):
                assert file == tmp_path / side / f"part-{part:05d}.parquet"
                table = pq.read_table(file)
                kinds = [pa.int64(), pa.list_(pa.int32()), pa.list_(pa.float32())]
                assert [field.type for field in table.schema] == kinds
                assert table["row_id"].to_pylist() == stored[stored % 4 == part].tolist()

    @staticmethod
    def summaries(matrix: sparse.csr_matrix, n_shards: int) -> dict[str, list[Any]]:
        """Rows, entries and digest of each file."""
        found = {}
        for part in range(n_shards):
            users, items = matrix.copy(), matrix.tocsc()
            users.data = np.where(np.repeat(np.arange(31), matrix.getnnz(1)) % 4 == part, 1, 0)
            items.data = np.where(np.repeat(np.arange(20), matrix.getnnz(0)) % 4 == part, 1, 0)
            for side, mask, axis in (("user", users, 1), ("item", items, 0)):
                mask.eliminate_zeros()
                own = matrix.multiply(mask).tocsr().astype(np.float32)
                counts = [int(np.sum(own.getnnz(axis) > 0)), own.nnz]
                found[f"{side}/part-{part:05d}.parquet"] = [
                    *counts,
                    f"{digests.entries(own):016x}",
                ]
        return found

    def test_rows_and_columns_beyond_the_data(self, tmp_path: Path) -> None:
        matrix = random_counts(5, 4)
        written = write_shards(matrix, tmp_path / "matrix", shape=(9, 7))
        assert written.shape == (9, 7)
        assert_same(written.to_csr()[:5, :4], matrix)
        nothing = write_shards([], tmp_path / "nothing", 2, shape=(3, 2))
        assert nothing.nnz == 0 and not nothing.has_values
        assert_same(nothing.to_csr(), sparse.csr_matrix((3, 2), dtype=np.float32))

    def test_duplicates_are_summed_and_zeros_stay(self, tmp_path: Path) -> None:
        entries = ([1, 2, 0], ([0, 0, 1], [2, 2, 0]))
        written = write_shards(sparse.csr_array(entries, shape=(2, 3)), tmp_path)
        assert written.nnz == 2
        assert written.to_csr().data.tolist() == [3, 0]

    def test_pickles(self, tmp_path: Path) -> None:
        written = write_shards(random_counts(5, 4), tmp_path)
        packed = pickle.dumps(written)
        assert pickle.loads(packed) == written and len(packed) < 1000


class TestHeldOut:
    @given(matrices(), st.integers(1, 4), st.integers(1, 30), st.integers(0, 99))
    def test_round_trip(self, known: Any, n_shards: int, memory: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        chosen = (rng.random(known.shape) < 0.3) & (rng.random((known.shape[0], 1)) < 0.5)
        held_out = sparse.csr_matrix(chosen * np.float32(2))
        with tempfile.TemporaryDirectory() as folder:
            options = dict(held_out=held_out, memory_entries=memory)
            written = write_shards(known, folder, n_shards, **options)
            assert written == open_shards(folder)
            assert written.shape == known.shape and written.nnz == known.nnz
            assert_same(written.to_csr(), known.astype(np.float32))
            row_ids, found = written.held_out()
            blocks = list(written.blocks("user", entries=5))
            ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in blocks)])
            np.testing.assert_array_equal(ids, row_ids)
            # Rows with held-out entries only are written; rows without any entry are not.
            lengths = known.getnnz(1) + held_out.getnnz(1)
            np.testing.assert_array_equal(np.sort(row_ids), np.flatnonzero(lengths))
            assert_same(found, (held_out != 0).astype(np.float32)[row_ids])

    def test_layout(self, tmp_path: Path) -> None:
        known = random_counts(9, 6)
        written = write_shards(known, tmp_path, 2, held_out=known, shape=(9, 8))
        assert written.shape == (9, 8) and written.has_values
        assert sorted(p.name for p in tmp_path.iterdir()) == ["totals.json", "user"]
        names = ["row_id", "col_ids", "values", "gt_tag"]
        assert [pq.read_schema(file).names for file in written.files("user")] == [names] * 2
        with pytest.raises(ValueError, match="item has 0 Parquet files"):
            written.blocks("item")

    def test_refused(self, tmp_path: Path) -> None:
        known = random_counts(4, 3)
        with pytest.raises(ValueError, match="with held_out the data must be one CSR matrix"):
            write_shards([known], tmp_path, held_out=known)
        for wrong, got in ((known[:3], r"\(3, 3\)"), (known.toarray(), r"\(4, 3\)"), ([1], "list")):
            with pytest.raises(ValueError, match=rf"data's shape \(4, 3\), got .*{got}"):
                write_shards(known, tmp_path, held_out=wrong)
        held_out = known.astype(np.float64)
        held_out.data[0] = np.nan
        with pytest.raises(ValueError):
            write_shards(known, tmp_path, held_out=held_out)
        assert not list(tmp_path.iterdir())


class TestMemory:
    def test_runs_are_merged(self, tmp_path: Path) -> None:
        matrix = power_law(300, 80, 5000, exponent=0.8)
        transpose = ExternalTranspose(tmp_path, (300, 80), False, 200)
        for row in range(300):
            transpose.add(np.array([row]), matrix[row])
        assert len(list(tmp_path.iterdir())) == 25
        columns = list(transpose.merged(300))
        longest = np.diff(matrix.tocsc().indptr).max()
        assert len(columns) > 10 and longest > 200  # some columns exceed the memory
        assert max(block.nnz for _, block in columns) <= 200 + longest
        np.testing.assert_array_equal(np.concatenate([ids for ids, _ in columns]), np.arange(80))
        assert_same(sparse.vstack([block for _, block in columns]), matrix.T.tocsr())

    def test_order_is_stable_for_any_keys(self) -> None:
        rng = np.random.default_rng(0)
        for most in (1, 3, 1000, 2**62):
            keys = rng.integers(0, most, 500) // max(1, most // 7) * max(1, most // 7)
            expected = np.argsort(keys, kind="stable")
            np.testing.assert_array_equal(transpose._stable_order(keys), expected)

    def test_memory_does_not_grow_with_the_data(self, tmp_path: Path) -> None:
        peaks = []
        for n_blocks in (10, 60):
            blocks = (power_law(500, 300, 5000, random_state=i) for i in range(n_blocks))
            tracemalloc.start()
            written = write_shards(blocks, tmp_path / str(n_blocks), 2, memory_entries=20_000)
            for side in ("user", "item"):
                sizes = [rows.nnz for _, rows in written.blocks(side, entries=20_000)]
                assert sum(sizes) == n_blocks * 5000
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        # an entry takes at least 8 bytes, so keeping the additional entries would take 2 MB
        assert peaks[1] < peaks[0] + 400_000, peaks

    def test_blocks_have_about_the_requested_length(self, tmp_path: Path) -> None:
        written = write_shards(power_law(400, 50, 4000), tmp_path, 3, memory_entries=300)
        longest = written.lengths("item")[1].max()
        assert longest > 150
        for side, most in (("user", 150), ("item", longest)):
            sizes = [rows.nnz for _, rows in written.blocks(side, entries=150)]
            assert max(sizes) <= most and sum(sizes) == 4000
        assert len(list(written.blocks("user", entries=5000))) == 1


class TestParts:
    def test_they_partition_the_rows(self, tmp_path: Path) -> None:
        matrix = random_counts(50, 30, density=0.1)
        written = write_shards(matrix, tmp_path, 5)
        for side, whole in (("user", matrix), ("item", matrix.T.tocsr())):
            for parts in (1, 2, 5, 7):
                files, ids, total = [], [], sparse.csr_matrix(whole.shape, dtype=np.float32)
                for part in range(parts):
                    files += written.files(side, part, parts)
                    row_ids, lengths = written.lengths(side, part, parts)
                    assert row_ids.dtype == lengths.dtype == np.int64
                    np.testing.assert_array_equal(lengths, np.diff(whole.indptr)[row_ids])
                    ids.append(row_ids)
                    total += gathered(written, side, part=part, parts=parts)
                assert sorted(files) == written.files(side)
                stored = np.flatnonzero(np.diff(whole.indptr))
                np.testing.assert_array_equal(np.sort(np.concatenate(ids)), stored)
                assert_same(total, whole)

    def test_rows_of_a_process(self, tmp_path: Path) -> None:
        written = write_shards(random_counts(50, 30, density=0.5), tmp_path, 6)
        assert set(written.lengths("user", 1, 3)[0] % 3) == {1}


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[..., ShardedMatrix]:
    """Open files of another writer; both sides are equal, n by n."""

    def write(tables: list[Any], n: int = 3, **totals: Any) -> ShardedMatrix:
        for side in ("user", "item"):
            (tmp_path / side).mkdir()
            (tmp_path / side / "_SUCCESS").touch()
            (tmp_path / side / "_metadata.parquet").touch()
            for number, table in enumerate(tables):
                table = table if isinstance(table, pa.Table) else pa.table(table)
                file = tmp_path / side / f"part-{number:05d}-c000.snappy.parquet"
                pq.write_table(table, file, row_group_size=2)
        n_entries = sum(
            len(ids or []) for table in tables for ids in pa.table(table)[1].to_pylist()
        )
        found = dict(
            format=1, n_users=n, n_items=n, n_entries=n_entries, n_shards=len(tables),
            has_values=False,
        )  # fmt: skip
        (tmp_path / "totals.json").write_text(json.dumps(found | totals))
        return open_shards(tmp_path)

    return write


class TestOtherWriters:
    def test_any_order_and_types(self, foreign: Callable[..., ShardedMatrix]) -> None:
        ints, doubles = pa.large_list(pa.int64()), pa.list_(pa.float64())
        first = {
            "note": ["a", "b", "c", "d"],
            "row_id": pa.array([3, 0, 4, 1], pa.int32()),
            "values": pa.array([[4, 2], [1, 2, 3], [], None], doubles),
            "col_ids": pa.array([[4, 2], [3, 0, 1], None, [2, 1]], ints),
        }
        second = {"row_id": [2], "col_ids": [[0]], "values": [[0.5]]}
        got = foreign([pa.table(first).select([1, 3, 2, 0]), second], n=5, has_values=True)
        expected = [
            [2, 3, 0, 1, 0],
            [0, 1, 1, 0, 0],
            [0.5, 0, 0, 0, 0],
            [0, 0, 2, 0, 4],
            [0, 0, 0, 0, 0],
        ]
        np.testing.assert_array_equal(got.to_csr().toarray(), expected)
        assert_same(gathered(got, "item", entries=2), sparse.csr_matrix(expected, dtype="f"))
        row_ids, lengths = got.lengths("user")
        assert row_ids.tolist() == [3, 0, 4, 1, 2] and lengths.tolist() == [2, 3, 0, 2, 1]

    def test_webgraph(self, foreign: Callable[..., ShardedMatrix]) -> None:
        kind = pa.list_(pa.int64())
        table = {
            "row_tag": [2, 0, 1],
            "col_tag": pa.array([[0, 1], [2], []], kind),
            "gt_tag": pa.array([[2], [], [1, 0]], kind),
        }
        got = foreign([table])
        np.testing.assert_array_equal(got.to_csr().toarray(), [[0, 0, 1], [0, 0, 0], [1, 1, 0]])
        row_ids, held_out = got.held_out()
        assert row_ids.tolist() == [2, 0, 1] == next(got.blocks("user"))[0].tolist()
        np.testing.assert_array_equal(held_out.toarray(), [[0, 0, 1], [0, 0, 0], [1, 1, 0]])
        assert held_out.dtype == np.float32 and held_out.has_canonical_format
        assert got.held_out(1, 2)[1].shape == (0, 3)

    def test_values_although_the_totals_say_ones(
        self, foreign: Callable[..., ShardedMatrix]
    ) -> None:
        ones = {"row_id": [0, 1], "col_ids": [[0, 2], [1]], "values": [[1.0, 1.0], None]}
        other = {"row_id": [2], "col_ids": [[0, 2]], "values": [[5.0, 7.0]]}
        got = foreign([ones, other])
        assert next(got.blocks("user", part=0, parts=2))[1].data.tolist() == [1, 1, 1]
        message = r"00001-c000.*values are not all 1, but has_values is false in totals.json"
        for read in (got.to_csr, lambda: list(got.blocks("item"))):
            with pytest.raises(ValueError, match=message):
                read()

    def test_empty_rows_count_in_the_length_of_a_block(
        self, foreign: Callable[..., ShardedMatrix]
    ) -> None:
        empty = pa.array([[]] * 40, pa.list_(pa.int32()))
        got = foreign([{"row_id": list(range(40)), "col_ids": empty}], n=40)
        assert [len(ids) for ids, _ in got.blocks("user", entries=10)] == [10] * 4

    def test_rows_for_evaluation_only(self, foreign: Callable[..., ShardedMatrix]) -> None:
        kind = pa.list_(pa.int64())
        lists = {"col_tag": pa.array([[0]], kind), "gt_tag": pa.array([[1]], kind)}
        folder = foreign([{"row_tag": [1], **lists}]).path
        for file in (folder / "item").iterdir():
            file.unlink()
        with pytest.raises(ValueError, match="item has 0 Parquet files, but totals.json counts 1"):
            open_shards(folder)
        (folder / "item").rmdir()
        assert open_shards(folder).held_out()[1].indices.tolist() == [1]
        with pytest.raises(ValueError, match="item has 0 Parquet files"):
            open_shards(folder).blocks("item")


BAD_FILES = {
    "row_id out of range": (
        {"row_id": [0, 3], "col_ids": [[0], [1]]},
        "row_id 3 must be 0 or more and below 3",
    ),
    "row_id negative": (
        {"row_id": [-1], "col_ids": [[0]]},
        "row_id -1 must be 0 or more",
    ),
    "row_id missing": (
        {"row_id": [0, None], "col_ids": [[0], [1]]},
        "1 rows have no row_id",
    ),
    "column out of range": (
        {"row_id": [0, 2], "col_ids": [[0, 1], [1, 3]]},
        "row 2 has column 3, which must be 0 or more and below 3",
    ),
    "column negative": (
        {"row_id": [0, 2], "col_ids": [[], [-1]]},
        "row 2 has column -1",
    ),
    "column missing": (
        {"row_id": [0], "col_ids": [[0, None]]},
        "lists in col_ids have 1 missing entries",
    ),
    "column twice": (
        {"row_id": [1, 2], "col_ids": [[0, 1], [1, 2, 1]]},
        "row 2 has column 1 more than once",
    ),
    "no ids": (
        {"rows": [0], "col_ids": [[0]]},
        "must have a column row_id or row_tag, got ['rows', 'col_ids']",
    ),
    "no columns": (
        {"row_tag": [0], "cols": [[0]]},
        "must have a column col_ids or col_tag, got",
    ),
    "ids are text": (
        {"row_id": ["0"], "col_ids": [[0]]},
        "column row_id must hold integers, got string",
    ),
    "columns are no lists": (
        {"row_id": [0], "col_tag": [0]},
        "column col_tag must hold lists of integers, got int64",
    ),
    "columns are fractions": (
        {"row_id": [0], "col_ids": [[0.5]]},
        "column col_ids must hold lists of integers, got list",
    ),
}
BAD_VALUES = {
    "too short": ({"values": [[1.0], [1.0]]}, "not as long as the one in col_ids"),
    "missing": ({"values": [[1.0, None], [1.0]]}, "lists in values have 1 missing entries"),
    "not finite": ({"values": [[1.0, float("nan")], [1.0]]}, "values must be finite"),
    "too large": ({"values": [[1.0, 1e39], [1.0]]}, "values must be finite, and within float32"),
    "of text": ({"values": [["1", "1"], ["1"]]}, "must hold lists of numbers, got list"),
    "no column": ({}, "must have a column values"),
}


class TestBadFiles:
    @pytest.mark.parametrize("name", BAD_FILES)
    def test_ids(self, foreign: Callable[..., ShardedMatrix], name: str) -> None:
        table, message = BAD_FILES[name]
        fine = {"row_id": [1], "col_ids": [[0]]}
        got = foreign([table | {}, fine])
        for side in ("user", "item"):
            with pytest.raises(ValueError) as error:
                list(got.blocks(side))
            assert message in str(error.value)
            assert str(got.files(side)[0]) in str(error.value)

    @pytest.mark.parametrize("name", BAD_VALUES)
    def test_values(self, foreign: Callable[..., ShardedMatrix], name: str) -> None:
        values, message = BAD_VALUES[name]
        table = {"row_id": [1, 2], "col_ids": [[0, 1], [1]], **values}
        got = foreign([table], has_values=True)
        with pytest.raises(ValueError) as error:
            got.to_csr()
        assert message in str(error.value)
        assert str(got.files("user")[0]) in str(error.value)

    def test_a_file_that_is_not_parquet(self, foreign: Callable[..., ShardedMatrix]) -> None:
        got = foreign([{"row_id": [1], "col_ids": [[0]]}])
        got.files("user")[0].write_text("no parquet")
        for read in (got.to_csr, lambda: got.lengths("user"), lambda: list(got.blocks("user"))):
            with pytest.raises(ValueError, match=r"c000.* cannot be read as a Parquet file"):
                read()

    def test_a_row_in_two_files(self, foreign: Callable[..., ShardedMatrix]) -> None:
        table = {"row_id": [0, 1], "col_ids": [[0], [1]]}
        got = foreign([table, table])
        for read in (got.to_csr, lambda: got.lengths("item")):
            with pytest.raises(ValueError, match=r"row 0 occurs more than once, but all entries"):
                read()

    def test_entries_are_missing(self, foreign: Callable[..., ShardedMatrix]) -> None:
        with pytest.raises(ValueError, match=r"holds 1 to 2 entries, but totals.json says 5"):
            foreign([{"row_id": [0], "col_ids": [[0, 1]]}], n_entries=5)

    def test_entries_are_fewer(self, foreign: Callable[..., ShardedMatrix]) -> None:
        # the footers do not show whether a row has no entry or one
        got = foreign([{"row_id": [0, 1], "col_ids": [[0, 1], [2]]}], n_entries=2)
        for read in (got.to_csr, lambda: got.lengths("item")):
            with pytest.raises(ValueError, match=r"holds 3 entries, but totals.json says 2"):
                read()

    def test_held_out_without_the_column(self, foreign: Callable[..., ShardedMatrix]) -> None:
        got = foreign([{"row_id": [0], "col_ids": [[0, 1]]}])
        with pytest.raises(ValueError, match="must have a column gt_tag, got"):
            got.held_out()


class TestOpening:
    def test_without_totals(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "absent"):
            with pytest.raises(FileNotFoundError, match=r"has no totals.json, which is written"):
                open_shards(folder)

    @pytest.mark.parametrize("side", ["user", "item"])
    def test_a_file_is_missing(self, tmp_path: Path, side: str) -> None:
        written = write_shards(random_counts(9, 5), tmp_path, 3)
        written.files(side)[1].unlink()
        message = f"{side} has 2 Parquet files, but totals.json counts 3: files are missing"
        with pytest.raises(ValueError, match=message):
            open_shards(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": 2}, "has format 2, but this version reads formats up to 1"),
            ({"format": "1"}, "format must be an integer of at least 1, got '1'"),
            ({"n_users": -1}, "n_users must be an integer of at least 0, got -1"),
            ({"n_items": 2.0}, "n_items must be an integer of at least 0, got 2.0"),
            ({"n_entries": None}, "n_entries must be an integer of at least 0, got None"),
            ({"n_shards": 0}, "n_shards must be an integer of at least 1, got 0"),
            ({"has_values": 1}, "has_values must be true or false, got 1"),
        ],
    )
    def test_totals(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        write_shards(random_counts(9, 5), tmp_path)
        file = tmp_path / "totals.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ValueError, match=f"totals.json:? {message}"):
            open_shards(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[1]"])
    def test_totals_that_are_not_a_json_object(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "totals.json").write_text(text)
        with pytest.raises(ValueError, match=r"totals.json( cannot be read|: format must be)"):
            open_shards(tmp_path)

    def test_arguments(self, tmp_path: Path) -> None:
        written = write_shards(random_counts(9, 5), tmp_path)
        with pytest.raises(ValueError, match="side must be one of .* got 'users'"):
            written.files("users")  # type: ignore[arg-type]
        for part, parts in ((2, 2), (-1, 2), (0, 0), (0.5, 2)):
            with pytest.raises(ValueError, match="part must be from 0 to below parts, got part"):
                written.lengths("user", part, parts)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="entries must be an integer of at least 1, got 0"):
            written.blocks("user", entries=0)

    @pytest.mark.parametrize("missing", ["pyarrow", "pyarrow.parquet"])
    def test_a_missing_package_names_the_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
    ) -> None:
        matrix = random_counts(9, 5)
        write_shards(matrix, tmp_path)
        monkeypatch.setitem(sys.modules, missing, None)
        for call in (
            lambda: open_shards(tmp_path),
            lambda: write_shards(matrix, tmp_path / "other"),
        ):
            with pytest.raises(ImportError, match=r'pip install "tpu-als\[shards\]"'):
                call()


def failing(matrix: sparse.csr_matrix) -> Iterator[sparse.csr_matrix]:
    """Yield blocks, and then raise an error."""
    yield matrix
    raise RuntimeError("no more data")


class TestWriting:
    def test_only_to_an_empty_directory(self, tmp_path: Path) -> None:
        matrix = random_counts(4, 3)
        (tmp_path / "empty").mkdir()
        write_shards(matrix, tmp_path / "empty")
        (tmp_path / "file").touch()
        for path in (tmp_path / "empty", tmp_path / "file"):
            with pytest.raises(FileExistsError, match="is not an empty directory: choose another"):
                write_shards(matrix, path)
        assert_same(open_shards(tmp_path / "empty").to_csr(), matrix)

    @pytest.mark.parametrize("exists", [False, True])
    def test_an_error_removes_all_files(self, tmp_path: Path, exists: bool) -> None:
        folder = tmp_path / "shards"
        if exists:
            folder.mkdir()
        with pytest.raises(RuntimeError, match="no more data"):
            write_shards(failing(random_counts(40, 30)), folder, memory_entries=20)
        assert folder.exists() == exists
        assert not list(folder.glob("**/*"))

    def test_an_error_in_the_transpose_removes_all_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_read(*_: Any, **__: Any) -> None:
            raise OSError("disk is gone")

        monkeypatch.setattr(np, "fromfile", no_read)
        with pytest.raises(OSError, match="disk is gone"):
            write_shards(random_counts(40, 30), tmp_path / "shards", memory_entries=20)
        assert not list(tmp_path.iterdir())

    def test_offsets_of_a_row_group_are_int32(self) -> None:
        largest = np.array([0, 2**31 - 1])
        np.testing.assert_array_equal(writer._list_offsets(largest), largest)
        with pytest.raises(ValueError, match="at most 2147483647 entries, got 2147483648: lower"):
            writer._list_offsets(largest + np.array([0, 1]))

    def test_totals_are_written_last(self, tmp_path: Path) -> None:
        folder, matrix = tmp_path / "shards", random_counts(6, 4)

        def blocks() -> Iterator[sparse.csr_matrix]:
            yield matrix
            with pytest.raises(FileNotFoundError, match=r"totals.json, which is written last"):
                open_shards(folder)
            yield matrix

        assert write_shards(blocks(), folder).shape == (12, 4)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (np.eye(3), "CSR matrix or an iterable of CSR matrices, got ndarray"),
            (3, "CSR matrix or an iterable of CSR matrices, got int"),
            ([], "the data contain no block: pass shape="),
            ([np.eye(3)], "block 0 of the data must be a CSR matrix, got ndarray"),
            (
                [random_counts(2, 3), random_counts(2, 4)],
                "block 1 of the data has 4 columns, but those before it have 3",
            ),
            (sparse.csr_matrix([[1.0, np.nan]]), "NaN"),
            ([random_counts(2, 2), sparse.csr_matrix([[1.0, np.inf]])], "infinity"),
        ],
    )
    def test_data(self, tmp_path: Path, data: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            write_shards(data, tmp_path / "shards")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (
                "/tmp/x",
                r"a path or text \('/tmp/x'\): read the file first, with scipy.sparse.load_",
            ),
            (Path("x"), "a path or text"),
            (b"x", "a path or text"),
            (io.StringIO("x"), "an object of StringIO: pass a sparse matrix or blocks of one"),
            ({}, "an object of dict: pass a sparse matrix or blocks of one"),
            ({0: sparse.eye(3)}, "an object of dict: pass a sparse matrix or blocks of one"),
            (TPUAlternatingLeastSquares, "the class TPUAlternatingLeastSquares: pass a sparse"),
            (
                TPUAlternatingLeastSquares(),
                "an object of TPUAlternatingLeastSquares: pass a sparse",
            ),
            (
                pd.DataFrame({"user": [1], "item": [2]}),
                r"a frame of events: .*interactions_from_frame\(data, user, item\).matrix",
            ),
            (
                pa.table({"user": [1], "item": [2]}),
                r"a pyarrow table: .*interactions_from_frame\(data.to_pandas\(\), user, item\)",
            ),
            (
                interactions_from_frame(pd.DataFrame({"user": [1], "item": [2]}), "user", "item"),
                r"an Interactions: pass data.matrix$",
            ),
            (
                ShardedMatrix(Path("x"), (2, 3), 3, 1, True),
                r"a ShardedMatrix: copy its directory, data.path, or pass data.to_csr\(\)$",
            ),
        ],
        ids=lambda value: type(value).__name__,
    )
    @pytest.mark.parametrize("options", [{}, {"held_out": random_counts(2, 3)}], ids=["", "both"])
    def test_data_for_another_function(
        self, tmp_path: Path, data: Any, message: str, options: dict[str, Any]
    ) -> None:
        with pytest.raises(
            TypeError, match="^data must be a matrix of users by items, got " + message
        ):
            write_shards(data, tmp_path / "shards", **options)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (pd.DataFrame(np.eye(3)), r"DataFrame: if its rows are events, .* scipy.sparse.csr_m"),
            (pd.Series(np.ones(3)), r"Series: pass scipy.sparse.csr_matrix\(data\)$"),
            (np.eye(3), r"ndarray: pass scipy.sparse.csr_matrix\(data\)$"),
            (range(3), "range$"),
            (bytearray(b"x"), "bytearray$"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_data_that_are_not_blocks(self, tmp_path: Path, data: Any, message: str) -> None:
        expected = "^data must be a CSR matrix or an iterable of CSR matrices, got "
        with pytest.raises(ValueError, match=expected + message):
            write_shards(data, tmp_path / "shards")
        assert not list(tmp_path.iterdir())

    def test_any_iterable_of_blocks(self, tmp_path: Path) -> None:
        matrix = random_counts(6, 4)
        blocks = {"first": matrix[:2], "last": matrix[2:]}.values()
        for number, data in enumerate((blocks, iter(blocks), tuple(blocks), list(blocks))):
            assert_same(write_shards(data, tmp_path / str(number), 1).to_csr(), matrix)

    def test_held_out_of_another_type(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="^held_out must be a matrix .* got a path or text"):
            write_shards(random_counts(2, 3), tmp_path / "shards", held_out="x.npz")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_shards": 0}, "n_shards must be an integer of at least 1, got 0"),
            ({"n_shards": True}, "n_shards must be an integer of at least 1, got True"),
            ({"memory_entries": 1.5}, "memory_entries must be an integer of at least 1, got 1.5"),
            ({"compression": "zip"}, "compression must be one of .* got 'zip'"),
            ({"shape": (4,)}, "shape must be two integers of at least 0"),
            ({"shape": (4, -1)}, "shape must be two integers of at least 0"),
            ({"shape": (3, 3)}, r"at least 4 users and 3 items, which is more than shape=\(3, 3\)"),
            ({"shape": (4, 2)}, r"at least 4 users and 3 items, which is more than shape=\(4, 2\)"),
        ],
    )
    def test_arguments(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            write_shards(random_counts(4, 3), tmp_path / "shards", **options)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "brotli", "lz4", "none"])
    def test_compression(self, tmp_path: Path, compression: str) -> None:
        matrix = random_counts(20, 10)
        written = write_shards(matrix, tmp_path, 1, compression=compression)
        column = pq.ParquetFile(written.files("item")[0]).metadata.row_group(0).column(1)
        assert column.compression == compression.upper().replace("NONE", "UNCOMPRESSED")
        assert_same(written.to_csr(), matrix)
