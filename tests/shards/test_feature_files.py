"""Features beside the shards: round trips, files of other writers, errors, and fits from them."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import FeatureTable, TPUAlternatingLeastSquares
from tpu_als.shards import ShardedMatrix, open_shards, write_features, write_shards, writing

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COUNTS = random_counts(30, 20, density=0.3, seed=5)
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(20, 6)) * (RNG.random((20, 6)) < 0.5)
VALUES[3] = 0
NAMES = ["b", "a=x", "10", "2", "é", "a=y"]
ITEMS = FeatureTable(VALUES, NAMES)
USERS = pd.DataFrame(RNG.integers(0, 2, (30, 3)), columns=["young", "urban", "never"])
USERS["never"] = 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(COUNTS, tmp_path / "purchases", n_shards=2)
    return tmp_path / "purchases"


def foreign(folder: Path, *tables: Any) -> ShardedMatrix:
    """Item features of another writer, a file for each table."""
    target = folder / "item_features" / "date=today"
    target.mkdir(parents=True)
    (folder / "item_features" / "_SUCCESS").touch()
    for number, table in enumerate(tables):
        pq.write_table(pa.table(table), target / f"part-{number}-c000.parquet", row_group_size=2)
    return open_shards(folder)


def test_examples() -> None:
    assert doctest.testmod(writing).failed == 0


class TestRoundTrip:
    def test_values_and_names(self, folder: Path) -> None:
        write_features(folder, user_features=USERS, item_features=ITEMS)
        matrix = open_shards(folder)
        items, users = matrix.item_features(), matrix.user_features()
        order = np.argsort(NAMES)
        assert items.names.tolist() == sorted(NAMES)
        np.testing.assert_array_equal(items.matrix.toarray(), VALUES[:, order])
        assert users.names.tolist() == ["urban", "young"]  # nobody has the third
        np.testing.assert_array_equal(users.matrix.toarray(), USERS[["urban", "young"]])
        assert matrix.to_csr().nnz == COUNTS.nnz

    def test_chosen_names_in_their_order(self, folder: Path) -> None:
        write_features(open_shards(folder), item_features=ITEMS)
        matrix = open_shards(folder)
        np.testing.assert_array_equal(matrix.item_features(NAMES).matrix.toarray(), VALUES)
        some = matrix.item_features(np.array(["2", "absent", "b"]))
        assert some.names.tolist() == ["2", "absent", "b"]
        np.testing.assert_array_equal(some.matrix.toarray()[:, [0, 2]], VALUES[:, [3, 0]])
        assert not some.matrix[:, [1]].nnz
        with pytest.raises(ValueError, match="names must be distinct"):
            matrix.item_features(["b", "b"])

    def test_several_row_groups(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tpu_als.shards.feature_files._ROW_GROUP_ENTRIES", 7)
        write_features(folder, item_features=ITEMS)
        (file,) = (folder / "item_features").iterdir()
        assert pq.ParquetFile(file).num_row_groups > 3
        found = open_shards(folder).item_features(NAMES)
        np.testing.assert_array_equal(found.matrix.toarray(), VALUES)

    def test_features_that_are_all_zero(self, folder: Path) -> None:
        write_features(folder, item_features=FeatureTable(np.zeros((20, 2)), ["a", "b"]))
        found = open_shards(folder).item_features(["a", "b"])
        assert found.matrix.shape == (20, 2) and not found.matrix.nnz


class TestFit:
    @pytest.mark.parametrize("options", [{}, {"devices": 2, "table_layout": "sharded"}], ids=str)
    def test_equals_a_fit_from_memory(self, folder: Path, options: dict[str, Any]) -> None:
        write_features(folder, user_features=USERS, item_features=ITEMS)
        matrix = open_shards(folder)
        rng, fits = np.random.default_rng(0), []
        start = {"user_factors": rng.random((30, 4)), "item_factors": rng.random((20, 4))}
        for data, users, items in (
            (matrix, matrix.user_features(), matrix.item_features()),
            (COUNTS, USERS, ITEMS),
        ):
            model = TPUAlternatingLeastSquares(
                factors=4, iterations=3, dtype=np.float64, linear_solver="exact", **options
            )
            for name, table in start.items():
                setattr(model, name, table)
            model.fit(data, show_progress=False, user_features=users, item_features=items)
            fits.append(model)
        shards, memory = fits
        for name in ("user_factors", "item_factors"):
            np.testing.assert_allclose(
                getattr(shards, name), getattr(memory, name), rtol=1e-7, atol=1e-9
            )
        order = np.argsort(NAMES)
        assert shards.item_feature_names_in_.tolist() == sorted(NAMES)
        np.testing.assert_allclose(
            shards.item_feature_weights_, memory.item_feature_weights_[order], rtol=1e-6, atol=1e-9
        )
        new = matrix.item_features(shards.item_feature_names_in_)
        np.testing.assert_allclose(shards.embed_items(new), memory.embed_items(ITEMS), atol=1e-7)


class TestOtherWriters:
    def test_any_order_of_rows_and_files(self, folder: Path) -> None:
        matrix = foreign(
            folder,
            {"row_id": [7, 2, 0], "features": [["a", "b"], [], None], "price": [1, 2, 3]},
            {"row_id": pa.array([1], pa.int32()), "features": [["c", "a"]]},
        )
        found = matrix.item_features()
        expected = np.zeros((20, 3))
        expected[7, :2], expected[1, [0, 2]] = 1, 1
        np.testing.assert_array_equal(found.matrix.toarray(), expected)

    def test_values(self, folder: Path) -> None:
        lists = pa.array([["a", "b"], ["b"]], pa.large_list(pa.large_string()))
        values = pa.array([[0.1, 2], None], pa.list_(pa.float64()))
        found = foreign(folder, {"row_id": [1, 0], "features": lists, "values": values})
        rows = found.item_features().matrix
        np.testing.assert_array_equal(rows.toarray()[:2], [[0, 1], [0.1, 2]])


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "a row out of range": ({"row_id": [20], "features": [["a"]]}, "row_id 20 must be .* below 20"),
    "a row without id": ({"row_id": [0, None], "features": [["a"], ["a"]]}, "1 rows have no"),
    "a row twice": ({"row_id": [4, 4], "features": [["a"], ["b"]]}, "row 4 occurs more than once"),
    "no column": ({"row_id": [0], "tags": [["a"]]}, "must have a column features, got"),
    "numbers": ({"row_id": [0], "features": [[1]]}, "features must hold lists of text, got list"),
    "no list": ({"row_id": [0], "features": ["a"]}, "must hold lists of text, got string"),
    "a name twice": (
        {"row_id": [0, 5], "features": [["a"], ["b", "a", "b"]]},
        "row 5 has feature 'b' more than once",
    ),
    "no name": ({"row_id": [0], "features": [["a", None]]}, "lists in features have 1 nulls"),
    "lengths": (
        {"row_id": [0], "features": [["a"]], "values": [[1.0, 2.0]]},
        "values is not as long as the one in features",
    ),
    "a value that is missing": (
        {"row_id": [0], "features": [["a", "b"]], "values": [[1.0, None]]},
        "values have 1 missing",
    ),
    "infinite": ({"row_id": [0], "features": [["a"]], "values": [[np.inf]]}, "must be finite"),
}  # fmt: skip


class TestRefusals:
    @pytest.mark.parametrize("case", BAD_FILES)
    def test_files(self, folder: Path, case: str) -> None:
        columns, message = BAD_FILES[case]
        with pytest.raises(ValueError, match=message) as caught:
            foreign(folder, columns).item_features()
        assert "item_features" in str(caught.value)

    def test_a_row_in_two_files(self, folder: Path) -> None:
        one = {"row_id": [4], "features": [["a"]]}
        with pytest.raises(ValueError, match="item_features: row 4 occurs more than once"):
            foreign(folder, one, one).item_features()

    def test_a_file_that_is_not_parquet(self, folder: Path) -> None:
        (folder / "item_features").mkdir()
        (folder / "item_features" / "a.parquet").write_text("text")
        with pytest.raises(ValueError, match=r"a\.parquet cannot be read as a Parquet file"):
            open_shards(folder).item_features()

    def test_no_features(self, folder: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no Parquet files in user_features: write"):
            open_shards(folder).user_features()

    def test_writing(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="got neither"):
            write_features(folder)
        with pytest.raises(ValueError, match="item_features must have distinct names.*got none"):
            write_features(folder, item_features=VALUES)
        twice = pd.DataFrame(VALUES[:, :2], columns=["a", "a"])
        with pytest.raises(ValueError, match="names must not repeat, got 'a' several times"):
            write_features(folder, item_features=twice)
        with pytest.raises(ValueError, match="one row for each of the 30 users, got shape"):
            write_features(folder, user_features=USERS[:20])
        write_features(folder, item_features=ITEMS)
        with pytest.raises(FileExistsError, match="item_features exists: remove it first"):
            write_features(folder, user_features=USERS, item_features=ITEMS)
        assert not (folder / "user_features").exists()

    def test_an_address_is_not_written_to(self, folder: Path) -> None:
        local = pa.fs.LocalFileSystem()
        matrix = open_shards(str(folder), filesystem=local)
        with pytest.raises(ValueError, match="writes to a local directory, got the address"):
            write_features(matrix, item_features=ITEMS)

    def test_an_error_leaves_no_files(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(writing, "write_feature_file", fail)
        before = sorted(folder.iterdir())
        with pytest.raises(OSError, match="disk full"):
            write_features(folder, item_features=ITEMS)
        assert sorted(folder.iterdir()) == before


def test_sparse_tables_with_names(folder: Path) -> None:
    table = FeatureTable(sparse.csr_matrix(VALUES), NAMES)
    write_features(folder, item_features=table)
    assert open_shards(folder).item_features(NAMES).matrix.nnz == np.count_nonzero(VALUES)
