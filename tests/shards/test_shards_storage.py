"""Sharded data on storage: folders, addresses, damaged, foreign and hostile files."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.engine.data import AlsParams
from tpu_als.engine.xla import backend
from tpu_als.engine.xla.mesh import device_mesh
from tpu_als.shards import ShardedMatrix, open_shards, write_shards

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
fs = pytest.importorskip("pyarrow.fs")

COUNTS = random_counts(60, 25, seed=3)


def assert_same(found: ShardedMatrix, expected: sparse.csr_matrix = COUNTS) -> None:
    np.testing.assert_array_equal(found.to_csr().toarray(), expected.toarray())
    turned = np.zeros(expected.T.shape)
    for row_ids, rows in found.blocks("item"):
        turned[row_ids] = rows.toarray()
    np.testing.assert_array_equal(turned, expected.T.toarray())


def change_totals(folder: Path, **changes: Any) -> None:
    """Change fields, remove those set to "absent", and remove the checksum."""
    file = folder / "totals.json"
    totals = json.loads(file.read_text()) | {"checksum": "absent"} | changes
    file.write_text(json.dumps({k: v for k, v in totals.items() if v != "absent"}))


def rewrite(
    file: Path, change: Callable[[dict[str, Any]], dict[str, Any]] = dict, **how: Any
) -> None:
    """Change the columns of a file."""
    table = pq.read_table(file)
    columns = change({name: table[name].to_pylist() for name in table.column_names})
    pq.write_table(pa.table(columns), file, **how)


class TestLocations:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return Path(write_shards(COUNTS, tmp_path / "plays", 3).path)

    def test_hive_folders(self, folder: Path) -> None:
        for side in ("user", "item"):
            for number, file in enumerate(sorted((folder / side).iterdir())):
                nested = folder / side / f"year={number % 2}" / f"part={number}"
                nested.mkdir(parents=True)
                file.rename(nested / "x.parquet")
            (folder / side / "_temporary").mkdir()
            (folder / side / "_temporary" / "y.parquet").touch()
            (folder / side / ".hidden").mkdir()
            (folder / side / ".hidden" / "y.parquet").touch()
        change_totals(folder, files="absent")
        found = open_shards(folder)
        assert_same(found)
        names = [str(Path(file).relative_to(folder)) for file in found.files("user")]
        assert names == [
            "user/year=0/part=0/x.parquet",
            "user/year=0/part=2/x.parquet",
            "user/year=1/part=1/x.parquet",
        ]
        assert sum(rows.nnz for p in range(2) for _, rows in found.blocks("user", p, 2)) == (
            COUNTS.nnz
        )

    def test_an_address_of_a_local_file(self, folder: Path) -> None:
        found = open_shards(f"file://{folder}")
        assert found == open_shards(folder) and found.path == folder
        assert_same(found)
        written = write_shards(COUNTS, f"file://{folder.parent}/other", 2)
        assert written.path == folder.parent / "other"
        assert_same(written)

    def test_another_file_system(self, folder: Path) -> None:
        inner = fs.SubTreeFileSystem(str(folder.parent), fs.LocalFileSystem())
        found = open_shards("plays", filesystem=inner)
        assert found.path == "plays" and found.filesystem is inner
        assert found.files("item", 1, 3) == ["plays/item/part-00001.parquet"]
        assert_same(found)
        options = dict(factors=4, random_state=0, iterations=2)
        models = [TPUAlternatingLeastSquares(**options) for _ in range(2)]
        for model, rows in zip(models, (found, open_shards(folder)), strict=True):
            model.fit(rows, show_progress=False)
        np.testing.assert_array_equal(models[0].item_factors, models[1].item_factors)

    def test_a_file_system_in_memory(self, folder: Path) -> None:
        memory = pytest.importorskip("fsspec").filesystem("memory")
        memory.put(str(folder), "/bucket/plays", recursive=True)
        try:
            assert_same(open_shards("/bucket/plays", filesystem=memory))
            memory.rm("/bucket/plays/user/part-00001.parquet")
            with pytest.raises(ValueError, match="bucket/plays/user has 2 Parquet files, but"):
                open_shards("/bucket/plays", filesystem=memory)
        finally:
            memory.rm("/bucket", recursive=True)

    def test_addresses_that_cannot_be_opened(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="pyarrow cannot open the address nowhere://x"):
            open_shards("nowhere://x")
        with pytest.raises(ValueError, match=r"filesystem must be a pyarrow.fs.FileSystem .* int"):
            open_shards(folder, filesystem=3)
        with pytest.raises(FileNotFoundError, match=r"/absent has no totals.json"):
            open_shards(f"file://{folder}/absent")
        with pytest.raises(ValueError, match=r"local directory, got the address mock://x/y"):
            write_shards(COUNTS, "mock://x/y")


def _cut(file: Path, keep: float) -> None:
    os.truncate(file, int(file.stat().st_size * keep))


def _replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _first_row_twice(columns: dict[str, Any]) -> dict[str, Any]:
    return {name: [*values, values[0]] for name, values in columns.items()}


def _without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda columns: {key: values for key, values in columns.items() if key != name}


def _column(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda columns: {**columns, name: [change(value) for value in columns[name]]}


FILES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("no parquet"),
    "magic only": lambda file: file.write_bytes(b"PAR1PAR1"),
    "huge footer": lambda file: file.write_bytes(b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1"),
    "binary": lambda file: file.write_bytes(bytes(range(256)) * 20),
    "zip": lambda file: file.write_bytes(b"PK\x03\x04" + bytes(100)),
    "numpy": lambda file: file.write_bytes(b"\x93NUMPY\x01\x00" + bytes(100)),
    "start is missing": lambda file: file.write_bytes(file.read_bytes()[100:]),
    "end is missing": lambda file: _cut(file, 0.9),
    "half is missing": lambda file: _cut(file, 0.5),
    "pages are zeros": lambda file: file.write_bytes(
        b"PAR1" + bytes(300) + file.read_bytes()[304:]
    ),
    "footer is zeros": lambda file: file.write_bytes(
        file.read_bytes()[:-200] + bytes(192) + file.read_bytes()[-8:]
    ),
    "footer nested": lambda file: file.write_bytes(
        b"PAR1" + b"\x1c" * 100_000 + (100_000).to_bytes(4, "little") + b"PAR1"
    ),
    "a folder": _replace_by_folder,
    "missing": lambda file: file.unlink(),
    "no rows": lambda file: rewrite(file, lambda c: {name: v[:0] for name, v in c.items()}),
    "no row_id": lambda file: rewrite(file, _without("row_id")),
    "no col_ids": lambda file: rewrite(file, _without("col_ids")),
    "no values": lambda file: rewrite(file, _without("values")),
    "a row twice": lambda file: rewrite(file, _first_row_twice),
    "a row is missing": lambda file: rewrite(
        file, lambda c: {name: values[1:] for name, values in c.items()}
    ),
    "other rows": lambda file: rewrite(file, _column("row_id", lambda row: 59 - row)),
    "ids of text": lambda file: rewrite(file, _column("row_id", str)),
    "ids of 2**62": lambda file: rewrite(file, _column("row_id", lambda row: row + (1 << 62))),
    "columns of 2**62": lambda file: rewrite(
        file, _column("col_ids", lambda ids: [each + (1 << 62) for each in ids])
    ),
    "columns reversed": lambda file: rewrite(
        file, _column("col_ids", lambda ids: [24 - each for each in ids])
    ),
    "columns are numbers": lambda file: rewrite(file, _column("col_ids", len)),
    "columns nested": lambda file: rewrite(file, _column("col_ids", lambda ids: [ids])),
    "values changed": lambda file: rewrite(
        file, _column("values", lambda row: [value + 1 for value in row])
    ),
    "values of NaN": lambda file: rewrite(
        file, _column("values", lambda row: [float("nan")] * len(row))
    ),
    "values of 1e300": lambda file: rewrite(
        file, _column("values", lambda row: [1e300] * len(row))
    ),
    "values null": lambda file: rewrite(file, _column("values", lambda row: None)),
    "values of another length": lambda file: rewrite(
        file, _column("values", lambda row: [*row, 1.0])
    ),
}
TOTALS: dict[str, Callable[[Path], Any]] = {
    "totals empty": lambda file: file.write_text(""),
    "totals nested": lambda file: file.write_text("[" * 200_000 + "]" * 200_000),
    "totals nested in objects": lambda file: file.write_text('{"a":' * 200_000),
    "totals a folder": _replace_by_folder,
    "totals missing": lambda file: file.unlink(),
    "totals binary": lambda file: file.write_bytes(bytes(range(256))),
    "totals a number of a million digits": lambda file: file.write_text("9" * 1_000_000),
    "n_users NaN": lambda file: file.write_text(
        file.read_text().replace('"n_users": 60', '"n_users": NaN')
    ),
    "n_users 60.0": lambda file: change_totals(file.parent, n_users=60.0),
    "n_users 2**40": lambda file: change_totals(file.parent, n_users=1 << 40),
    "n_items 2**40": lambda file: change_totals(file.parent, n_items=1 << 40),
    "n_items 2**31": lambda file: change_totals(file.parent, n_items=1 << 31),
    "n_users 10**400": lambda file: change_totals(file.parent, n_users=10**400),
    "n_users too few": lambda file: change_totals(file.parent, n_users=40),
    "n_items too few": lambda file: change_totals(file.parent, n_items=20),
    "n_entries too many": lambda file: change_totals(file.parent, n_entries=1 << 40),
    "n_entries one too many": lambda file: change_totals(file.parent, n_entries=COUNTS.nnz + 1),
    "n_entries one too few": lambda file: change_totals(file.parent, n_entries=COUNTS.nnz - 1),
    "n_shards": lambda file: change_totals(file.parent, n_shards=1 << 40),
    "has_values is false": lambda file: change_totals(file.parent, has_values=False),
    "files of text": lambda file: change_totals(file.parent, files="text"),
    "files of numbers": lambda file: change_totals(file.parent, files={"user/x.parquet": 3}),
    "files without this one": lambda file: change_totals(file.parent, files={}),
}


def _read_all(folder: Path) -> list[Any]:
    """Read everything of both sides, and lay it out for a fit."""
    found = open_shards(folder)
    for side in ("user", "item"):
        found.lengths(side)
        list(found.blocks(side))
    return [found.to_csr(), backend.place(found, AlsParams(2), device_mesh(1))]


def _attempt(folder: Path) -> tuple[sparse.csr_matrix | None, str]:
    try:
        return _read_all(folder)[0], ""
    except (ValueError, FileNotFoundError) as error:
        return None, str(error)


def _refused(folder: Path) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        _read_all(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000
    return str(error.value)


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return Path(write_shards(COUNTS, tmp_path / "plays", 2, memory_entries=200).path)

    @pytest.mark.parametrize("name", FILES)
    def test_a_damaged_file(self, folder: Path, name: str) -> None:
        for side in ("user", "item"):
            copy = Path(shutil.copytree(folder, folder.parent / side))
            FILES[name](copy / side / "part-00001.parquet")
            message = _refused(copy)
            assert f"{copy}/{side}" in message, message

    @pytest.mark.parametrize("name", TOTALS)
    def test_damaged_totals(self, folder: Path, name: str) -> None:
        TOTALS[name](folder / "totals.json")
        message = _refused(folder)
        assert str(folder) in message and "totals.json" in message, message

    @pytest.mark.parametrize("has_totals", [True, False])
    @pytest.mark.parametrize("side", ["user", "item"])
    @pytest.mark.parametrize("of_values", [True, False])
    def test_sides_that_disagree(
        self, folder: Path, side: str, has_totals: bool, of_values: bool
    ) -> None:
        other = COUNTS.copy()
        if of_values:
            other.data = other.data[::-1].copy()
        else:
            other = sparse.csr_matrix(other.toarray()[:, ::-1])
        write_shards(other, folder.parent / "other", 2)
        shutil.rmtree(folder / side)
        shutil.copytree(folder.parent / "other" / side, folder / side)
        if not has_totals:  # as other writers, which write no summaries
            change_totals(folder, files="absent")
        message = "damaged or another file" if has_totals else "different entries or values"
        with pytest.raises(ValueError, match=f"{folder}.*{message}"):
            backend.place(open_shards(folder), AlsParams(2), device_mesh(1))

    @pytest.mark.parametrize(
        "count", [20, pytest.param(500, marks=pytest.mark.nightly)], ids=["few", "many"]
    )
    def test_flipped_bits_of_files_are_detected(
        self, folder: Path, count: int, record_property: Callable[[str, Any], None]
    ) -> None:
        rng, noticed = np.random.default_rng(1), 0
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for _ in range(count):
            file = files[rng.integers(len(files))]
            sound = file.read_bytes()
            content = bytearray(sound)
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            file.write_bytes(content)
            found, message = _attempt(folder)
            file.write_bytes(sound)
            if found is None:
                noticed += 1
                assert str(folder) in message
            else:
                np.testing.assert_array_equal(found.toarray(), COUNTS.toarray())
        record_property("flips noticed, of", [noticed, count])
        assert noticed > count // 2

    def test_flipped_bits_of_the_totals_are_detected(
        self, tmp_path: Path, record_property: Callable[[str, Any], None]
    ) -> None:
        expected = write_shards(COUNTS, tmp_path / "plays", 1)
        file = tmp_path / "plays" / "totals.json"
        sound, refused = file.read_bytes(), 0
        for at, bit in itertools.product(range(len(sound)), range(8)):
            content = bytearray(sound)
            content[at] ^= 1 << bit
            file.write_bytes(content)
            found, message = None, ""
            try:
                found = open_shards(tmp_path / "plays")
            except ValueError as error:
                message = str(error)
            refused += found is None
            assert found == expected or str(file) in message, content
        record_property("flips refused, of", [refused, 8 * len(sound)])
        assert refused > 7 * len(sound)

    @pytest.mark.parametrize("change", [{"n_items": 26}, {"n_users": 61}, {"more": 1}], ids=str)
    def test_the_totals_have_a_checksum(self, folder: Path, change: dict[str, int]) -> None:
        file = folder / "totals.json"
        totals = json.loads(file.read_text())
        file.write_text(json.dumps(totals | change))
        with pytest.raises(ValueError, match=f"{file} does not match the checksum in it"):
            open_shards(folder)
        file.write_text(json.dumps(dict(reversed(totals.items()))))
        assert_same(open_shards(folder))
        file.write_text(json.dumps(totals | {"checksum": 3}))
        with pytest.raises(ValueError, match="does not match the checksum"):
            open_shards(folder)

    def test_totals_nested_almost_too_deeply(self, folder: Path) -> None:
        """The checksum raises no other error for JSON of any depth that can be read."""
        sound = (folder / "totals.json").read_text().rstrip("}")
        for depth in range(600, 1000, 3):
            more = f', "more": {"[" * depth}{"]" * depth}}}'
            (folder / "totals.json").write_text(sound + more)
            with pytest.raises(ValueError, match="checksum|RecursionError"):
                open_shards(folder)

    def test_totals_without_a_checksum_are_read(self, folder: Path) -> None:
        change_totals(folder)
        assert "checksum" not in json.loads((folder / "totals.json").read_text())
        assert_same(open_shards(folder))

    def test_pages_have_checksums(self, folder: Path) -> None:
        """The checksum of the page is verified before it is decompressed."""
        file = folder / "user" / "part-00000.parquet"
        column = pq.ParquetFile(file).metadata.row_group(0).column(1)
        content = bytearray(file.read_bytes())
        content[column.data_page_offset + column.total_compressed_size - 5] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} cannot be read .*CRC"):
            list(open_shards(folder).blocks("user"))

    def test_files_without_checksums_are_read(self, folder: Path) -> None:
        for file in folder.rglob("*.parquet"):
            rewrite(file, write_page_checksum=False)
        change_totals(folder, files="absent")  # other writers do not write it
        assert_same(open_shards(folder))
