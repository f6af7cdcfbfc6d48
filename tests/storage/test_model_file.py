"""Model files: writing, reading and failures."""

from __future__ import annotations

import io
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import DataWarning, ModelFileError, TPUAlternatingLeastSquares
from tpu_als.storage import model_file

PARAMETERS = {
    "factors": 2,
    "regularization": 0.5,
    "dtype": np.float32,
    "random_state": 3,
    "objective": "ials",
    "devices": None,
    "use_gpu": None,
    "warm_start": True,
}
FITTED = {
    "user_factors": np.arange(6, dtype=np.float32).reshape(3, 2),
    "item_factors": np.ones((4, 2), np.float32),
    "feature_names_in_": np.array(["a", "b", "c", "d"], dtype=object),
    "n_iter_": 2,
    "history_": {"seconds": [0.5, 0.25], "loss": [2.0, 1.0]},
}


def saved(**changes: Any) -> io.BytesIO:
    """A file in memory that contains the model, positioned at its start."""
    file = io.BytesIO()
    model_file.save_model(file, {**PARAMETERS, **changes}, FITTED)
    file.seek(0)
    return file


def test_a_round_trip() -> None:
    parameters, fitted = model_file.load_model(saved(), PARAMETERS)
    expected = {name: value for name, value in PARAMETERS.items() if value is not None}
    assert parameters == expected
    assert parameters["dtype"] is np.float32
    assert type(parameters["factors"]) is int
    assert set(fitted) == set(FITTED)
    assert fitted["history_"] == FITTED["history_"]
    assert fitted["feature_names_in_"].dtype == object
    for name in ("user_factors", "item_factors", "feature_names_in_"):
        np.testing.assert_array_equal(fitted[name], FITTED[name])


def test_only_implicits_keys_have_no_prefix() -> None:
    with np.load(saved(), allow_pickle=False) as data:
        plain = {name for name in data.files if not name.startswith("tpu_als_")}
        assert plain == {
            "user_factors",
            "item_factors",
            "factors",
            "regularization",
            "dtype",
            "random_state",
        }
        assert str(data["dtype"]) == "float32"


def test_implicit_reads_bfloat16_as_float32() -> None:
    with np.load(saved(dtype="bfloat16"), allow_pickle=False) as data:
        assert str(data["dtype"]) == "float32"
    parameters, _ = model_file.load_model(saved(dtype="bfloat16"), PARAMETERS)
    assert parameters["dtype"] == "bfloat16"


@pytest.mark.parametrize("seed", [np.random.default_rng(0), np.random.RandomState(0)])
def test_generators_are_not_saved(seed: Any) -> None:
    parameters, _ = model_file.load_model(saved(random_state=seed), PARAMETERS)
    assert "random_state" not in parameters


def test_device_handles_are_not_saved() -> None:
    assert "devices" not in model_file.load_model(saved(devices=[object()]), PARAMETERS)[0]
    assert model_file.load_model(saved(devices=2), PARAMETERS)[0]["devices"] == 2


def test_an_unfitted_model() -> None:
    file = io.BytesIO()
    model_file.save_model(file, PARAMETERS, dict.fromkeys(FITTED))
    file.seek(0)
    assert model_file.load_model(file, PARAMETERS)[1] == {}


@pytest.mark.parametrize("name", ["model", "model.npz", "model.v2"])
@pytest.mark.parametrize("kind", [str, Path])
def test_paths(tmp_path: Path, name: str, kind: Any) -> None:
    path = kind(tmp_path / name)
    model_file.save_npz(path, {"factors": 3})
    assert [p.name for p in tmp_path.iterdir()] == [
        name if name.endswith(".npz") else name + ".npz"
    ]
    assert model_file.load_npz(path) == {"factors": 3}
    with pytest.raises(FileNotFoundError):
        model_file.load_npz(kind(tmp_path / "another"))


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.npz"
    model_file.save_npz(path, {"factors": 3})

    def half(file: Any, arrays: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(model_file, "write_npz", half)
    with pytest.raises(KeyboardInterrupt):
        model_file.save_npz(path, {"factors": 4})
    assert [p.name for p in tmp_path.iterdir()] == ["model.npz"]
    assert model_file.load_npz(path) == {"factors": 3}


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", tpu_als_format=1, alpha=np.array([{}], dtype=object))
    with pytest.raises(ModelFileError, match="'alpha' cannot be read: got pickled objects, which"):
        model_file.load_npz(tmp_path / "bad.npz")


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "later.npz", tpu_als_format=model_file.FORMAT + 1)
    with pytest.raises(ValueError, match="written by a later tpu_als; upgrade"):
        model_file.load_npz(tmp_path / "later.npz")


class _Wider(TPUAlternatingLeastSquares):
    def __init__(self, factors: int = 4, extra: int = 0) -> None:
        super().__init__(factors, iterations=1, random_state=0)
        self.extra = extra


def test_a_subclass_with_parameters_of_its_own(tmp_path: Path) -> None:
    matrix = sparse.random(20, 15, 0.3, "csr", random_state=0, dtype=np.float32)
    model = _Wider(3, extra=7)
    model.fit(matrix, show_progress=False)
    model.save(tmp_path / "model.npz")
    read = _Wider.load(tmp_path / "model.npz")
    assert (read.factors, read.extra) == (3, 7)
    np.testing.assert_array_equal(read.item_factors, model.item_factors)


def test_checkpoint_dir_is_not_loaded(tmp_path: Path) -> None:
    model = TPUAlternatingLeastSquares(checkpoint_dir=tmp_path / "here")
    with pytest.warns(DataWarning, match="no user and no item factors"):
        model.save(tmp_path / "model")
    with np.load(tmp_path / "model.npz") as data:
        assert "tpu_als_checkpoint_dir" not in data.files
    assert TPUAlternatingLeastSquares.load(tmp_path / "model.npz").checkpoint_dir is None


def test_a_file_of_format_1_stays_loadable() -> None:
    # Written by the first version with a format. Do not replace it by a newer file.
    model = TPUAlternatingLeastSquares.load(
        Path(__file__).parents[1] / "data" / "model-format-1.npz"
    )
    given = {name: value for name, value in model.get_params().items() if name in OF_FORMAT_1}
    assert given == OF_FORMAT_1
    assert model.checkpoint_dir is None  # the file has a checkpoint_dir
    assert list(model.feature_names_in_) == [f"item {i}" for i in range(7)]
    assert (model.n_iter_, model.n_features_in_) == (2, 7)
    assert model.history_["loss"] == [0.590489460009655, 0.32000209210959846]
    assert (model.user_factors.shape, model.item_factors.shape) == ((12, 3), (7, 3))
    row = sparse.csr_matrix(([3.0, 1.0], ([0, 0], [1, 4])), shape=(1, 7))
    expected = oracle.fold_in(
        row, model.item_factors, oracle.Objective("ials", 0.5, 2.0, unobserved_weight=0.25)
    )
    np.testing.assert_allclose(model.recalculate_user(0, row), expected[0], atol=1e-5)


OF_FORMAT_1 = {
    "factors": 3,
    "regularization": 0.5,
    "alpha": 2.0,
    "dtype": np.float32,
    "iterations": 2,
    "random_state": 5,
    "num_threads": 1,
    "calculate_training_loss": True,
    "objective": "ials",
    "unobserved_weight": 0.25,
    "linear_solver": "cholesky",
    "checkpoint_every": 2,
    "verbose": None,
}
GOOD = {
    "tpu_als_format": 1,
    "factors": 2,
    "alpha": 1.0,
    "dtype": "float32",
    "user_factors": np.ones((3, 2), np.float32),
    "item_factors": np.ones((4, 2), np.float32),
    "tpu_als_n_iter_": 2,
    "tpu_als_history_seconds": np.ones(2),
    "tpu_als_feature_names_in_": np.array(list("abcd")),
}


def archive(**changes: Any) -> bytes:
    """Bytes of a model file with some keys changed, or removed if None."""
    file = io.BytesIO()
    np.savez(file, **{k: v for k, v in {**GOOD, **changes}.items() if v is not None})
    return file.getvalue()


def load(content: bytes) -> Any:
    """Load a model from these bytes."""
    return TPUAlternatingLeastSquares.load(io.BytesIO(content))


NOT_FINITE = np.array([[np.nan, 1], [1, 1], [1, np.inf]], np.float32)


class TestDamagedAndForeignFiles:
    def test_the_model_that_the_cases_change_is_good(self) -> None:
        assert load(archive()).item_factors.shape == (4, 2)
        assert load(archive(unknown=np.ones(3))).n_iter_ == 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"user_factors": NOT_FINITE}, "user_factors must hold finite numbers, got NaN"),
            ({"item_factors": np.ones((4, 3))}, "equally many columns"),
            ({"item_factors": np.ones(4)}, "item_factors must be a 2-D array of floating-point"),
            ({"item_factors": np.ones((4, 2), int)}, "item_factors must be a 2-D array of float"),
            ({"item_factors": np.array([["a", "b"]])}, "item_factors must be a 2-D array"),
            ({"factors": 5}, "as many columns as the parameter factors=5, got shape"),
            ({"factors": None}, "key 'factors' is missing, which every file has that `save` wrote"),
            ({"tpu_als_item_popularity_": np.array([1, 0, -3, 2])}, "must be at least 0, got -3"),
            ({"tpu_als_item_popularity_": np.ones(4)}, "popularity_ must be a 1-D array of signed"),
            ({"tpu_als_item_popularity_": np.ones(4, bool)}, "popularity_ must be a 1-D array"),
            ({"tpu_als_item_popularity_": np.ones(4, np.uint64)}, "popularity_ must be a 1-D arr"),
            ({"tpu_als_item_popularity_": np.array(list("1234"))}, "popularity_ must be a 1-D arr"),
            ({"tpu_als_item_popularity_": np.ones((4, 1), int)}, "popularity_ must be a 1-D array"),
            ({"tpu_als_item_popularity_": np.ones(3, int)}, "a count for each item, got 3"),
            ({"factors": 2.5}, "factors must be an integer of at least 1, got 2.5"),
            ({"factors": "many"}, "factors must be an integer of at least 1, got 'many'"),
            ({"factors": np.ones(2)}, "factors must be a number or text, got an array of shape"),
            ({"alpha": -5.0}, "alpha must be a finite number of at least 0, got -5.0"),
            ({"alpha": np.nan}, "alpha must be a finite number of at least 0, got nan"),
            ({"alpha": 1j}, "alpha must be a number or text, got an array of shape"),
            ({"use_cg": "False"}, "use_cg must be True or False, got 'False'"),
            ({"tpu_als_warm_start": 3}, "warm_start must be True or False, got 3"),
            ({"random_state": -3}, "random_state must be None, an integer of at least 0"),
            ({"dtype": "int32"}, "dtype must be np.float32, np.float64 or 'bfloat16', got 'int32'"),
            ({"tpu_als_objective": "warp"}, "objective must be one of"),
            ({"tpu_als_n_iter_": 3}, "n_iter_ values in each series"),
            ({"tpu_als_history_loss": np.ones(3)}, "n_iter_ values in each series"),
            ({"tpu_als_history_loss": np.array(["a"] * 2)}, "history_loss must be a 1-D array"),
            ({"tpu_als_feature_names_in_": np.array(["a"])}, "a name for each of the 4 items"),
            ({"tpu_als_feature_names_in_": np.ones(4)}, "feature_names_in_ must be a 1-D array"),
            ({"tpu_als_format": "one"}, "'tpu_als_format' must be an integer of at least 1"),
            ({"tpu_als_format": 0}, "'tpu_als_format' must be an integer of at least 1"),
            ({"tpu_als_format": 9}, "written by a later tpu_als; upgrade"),
            ({"tpu_als_format": None}, "'tpu_als_format' is missing, and so is iterations"),
            ({"alpha": np.array([{}], object)}, "key 'alpha' cannot be read: got pickled objects"),
        ],
        ids=str,
    )
    def test_values_of_a_wrong_type(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ModelFileError, match=message) as raised:
            load(archive(**changes))
        assert "the model file: " in str(raised.value)

    @pytest.mark.parametrize("dtype", [np.int8, np.int32, ">i8"])
    def test_popularity_becomes_int64(self, dtype: Any) -> None:
        counts = np.array([1, 0, 3, 2], dtype)
        model = load(archive(tpu_als_item_popularity_=counts))
        assert model.item_popularity_.dtype == np.int64
        np.testing.assert_array_equal(model.item_popularity_, counts)

    def test_a_file_of_implicits_without_a_format(self) -> None:
        theirs = {"iterations": 3, "regularization": 0.1, "use_cg": True, "tpu_als_format": None}
        assert load(archive(**theirs)).factors == 2
        with pytest.raises(ModelFileError, match="'tpu_als_format' is missing, and so is factors"):
            load(archive(**theirs, factors=None))

    def test_other_files(self, tmp_path: Path) -> None:
        path = tmp_path / "model.npz"
        sparse.save_npz(path, sparse.csr_matrix(np.eye(3)))
        with pytest.raises(ModelFileError, match=r"model.npz: key 'tpu_als_format' is missing"):
            TPUAlternatingLeastSquares.load(path)
        np.savez(path)
        with pytest.raises(ModelFileError, match="is missing, and so is factors"):
            TPUAlternatingLeastSquares.load(path)
        for content in (b"", b"PK", b"\x93NUMPY", b"not a model" * 100, archive()[:-30]):
            path.write_bytes(content)
            with pytest.raises(ModelFileError, match="model.npz: the archive cannot be read"):
                TPUAlternatingLeastSquares.load(path)
        with pytest.raises(FileNotFoundError):
            TPUAlternatingLeastSquares.load(tmp_path / "none")
        (tmp_path / "folder").mkdir()
        with pytest.raises(IsADirectoryError):
            TPUAlternatingLeastSquares.load(tmp_path / "folder")

    def test_a_file_of_another_model_of_implicit(self, tmp_path: Path) -> None:
        bpr = pytest.importorskip("implicit.cpu.bpr").BayesianPersonalizedRanking
        model = bpr(factors=3, iterations=1, num_threads=1)
        model.fit(sparse.csr_matrix(np.eye(4, dtype=np.float32)), show_progress=False)
        model.save(str(tmp_path / "bpr"))
        with pytest.raises(ModelFileError, match="so is use_cg, which a file of implicit's ALS"):
            TPUAlternatingLeastSquares.load(tmp_path / "bpr")

    def test_implicits_half_precision(self) -> None:
        theirs = {"iterations": 3, "regularization": 0.1, "use_cg": True, "tpu_als_format": None}
        half = np.ones((3, 2), np.float16)
        model = load(archive(dtype="float16", user_factors=half, **theirs))
        assert model.dtype is np.float32 and model.user_factors.dtype == np.float32

    def test_every_truncation(self) -> None:
        content = archive()
        for length in range(0, len(content), 23):
            with pytest.raises(ModelFileError):
                load(content[:length])

    def test_flipped_bits_are_detected(self) -> None:
        content, loaded = archive(), 0
        good, rng = load(content), np.random.default_rng(0)
        for position in rng.integers(len(content) * 8, size=600):
            flipped = bytearray(content)
            flipped[position // 8] ^= 1 << position % 8
            try:
                model = load(bytes(flipped))
            except ModelFileError:
                continue
            loaded += 1  # dates and other fields without effect
            assert model.get_params() == good.get_params()
            assert model.n_iter_ == good.n_iter_ and model.history_ == good.history_
            assert list(model.feature_names_in_) == list("abcd")
            np.testing.assert_array_equal(model.user_factors, good.user_factors)
            np.testing.assert_array_equal(model.item_factors, good.item_factors)
        assert loaded < 400

    @pytest.mark.parametrize("key", ["user_factors", "tpu_als_history_loss", "unknown"])
    def test_a_bomb_is_not_decompressed(self, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
        file, zeros = io.BytesIO(), bytes(1 << 20)
        file.write(archive(**{key: None}))
        header = {"descr": "<f4", "fortran_order": False, "shape": (25 << 19, 2)}
        with (
            zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as bomb,
            bomb.open(key + ".npy", "w") as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(100):
                member.write(zeros)
        assert file.tell() < 200_000
        read = []
        original = np.lib.format.read_array

        def seen(stream: Any, **how: Any) -> np.ndarray:
            read.append(stream.name)
            return original(stream, **how)

        monkeypatch.setattr(np.lib.format, "read_array", seen)
        if key == "unknown":
            assert load(file.getvalue()).factors == 2
        else:
            with pytest.raises(ModelFileError, match=f"most of them in key '{key}', but a model's"):
                load(file.getvalue())
        assert key + ".npy" not in read

    @pytest.mark.parametrize(
        "header",
        [
            "{'descr':'<f4','fortran_order':False,'shape':(2**20,2**20)}",
            "{'descr':'<f4','fortran_order':False,'shape':(1099511627776,2)}",
            "{'descr':'<f4','fortran_order':False,'shape':(-1,2)}",
            "{'descr':'<f4','fortran_order':False,'shape':(True,2)}",
            "{'descr':'|O','fortran_order':False,'shape':(1,2)}",
            "{'descr':[('a','<f4')],'fortran_order':False,'shape':(0,2)}",
            "{'descr':('<f4',(1000000,)),'fortran_order':False,'shape':(0,2)}",
            "{'descr':'|V2000000000','fortran_order':False,'shape':(0,2)}",
            "{'descr':'nothing','fortran_order':False,'shape':(0,2)}",
            "{'shape':(0,2)}",
            "(" * 9000,
            "[" * 3000 + "]" * 3000,
            "-" * 9000 + "1",
            "\x00",
        ],
        ids=lambda header: header[:70],
    )
    def test_hostile_headers(self, header: str) -> None:
        file = io.BytesIO()
        file.write(archive(user_factors=None))
        text = header.encode("latin1")
        with zipfile.ZipFile(file, "a") as changed:
            content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
            changed.writestr("user_factors.npy", content)
        with pytest.raises(ModelFileError, match="user_factors"):
            load(file.getvalue())

    def test_a_compressed_table(self) -> None:
        file = io.BytesIO()
        np.savez_compressed(file, **{**GOOD, "user_factors": np.zeros((20_000, 2), np.float32)})
        assert load(file.getvalue()).user_factors.shape == (20_000, 2)


def test_tables_of_other_widths_are_not_saved(tmp_path: Path) -> None:
    model = TPUAlternatingLeastSquares(factors=2)
    model.user_factors, model.item_factors = np.ones((3, 4)), np.ones((5, 4))
    with pytest.raises(ValueError, match="Set factors=4 before save"):
        model.save(tmp_path / "model")
    model.item_factors = np.ones((5, 3))
    with pytest.raises(ValueError, match="equally many columns"):
        model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


MATRIX = random_counts(12, 9, density=0.5)


def fitted_model(**changes: Any) -> TPUAlternatingLeastSquares:
    """A model that is quick to fit."""
    model = TPUAlternatingLeastSquares(3, iterations=1, random_state=0, **changes)
    return model.fit(MATRIX, show_progress=False)


def test_a_file_that_load_would_refuse_is_not_written(tmp_path: Path) -> None:
    model = fitted_model()
    model.save(tmp_path / "model.npz")
    before = (tmp_path / "model.npz").read_bytes()
    model.item_factors[3, 0] = np.nan
    with pytest.raises(ValueError, match="item_factors must hold finite numbers.*row 3"):
        model.save(tmp_path / "model.npz")
    assert (tmp_path / "model.npz").read_bytes() == before


@pytest.mark.parametrize("alpha", [Fraction(1, 3), 2**70])
def test_fractions_and_large_integers_are_kept(alpha: Any, tmp_path: Path) -> None:
    fitted_model(alpha=alpha).save(tmp_path / "model.npz")
    assert TPUAlternatingLeastSquares.load(tmp_path / "model.npz").alpha == float(alpha)


def test_popularity_and_names_of_assigned_tables_are_kept(tmp_path: Path) -> None:
    model = fitted_model()
    model.user_factors, model.item_factors = 2 * model.user_factors, 2 * model.item_factors
    popularity = fitted_model().item_popularity_
    fitted_model().save(tmp_path / "fitted.npz")
    loaded = TPUAlternatingLeastSquares.load(tmp_path / "fitted.npz")
    np.testing.assert_array_equal(loaded.item_popularity_, popularity)
    model.save(tmp_path / "assigned.npz")
    loaded = TPUAlternatingLeastSquares.load(tmp_path / "assigned.npz")
    for each in (model, loaded):
        each.fit(MATRIX, show_progress=False)
    np.testing.assert_array_equal(model.item_factors, loaded.item_factors)


@pytest.mark.parametrize("side", ["user", "item"])
def test_a_table_set_to_none_is_not_assigned(side: str, tmp_path: Path) -> None:
    model = fitted_model()
    setattr(model, f"{side}_factors", None)
    with pytest.warns(DataWarning, match=f"no {side} factors"):
        model.save(tmp_path / "model.npz")
    loaded = TPUAlternatingLeastSquares.load(tmp_path / "model.npz")
    assert getattr(loaded, f"{side}_factors") is None


def test_wrong_column_names_are_not_written(tmp_path: Path) -> None:
    model = fitted_model()
    model.save(tmp_path / "model.npz")
    before = (tmp_path / "model.npz").read_bytes()
    model.feature_names_in_ = np.array(["tea"], object)
    with pytest.raises(ValueError, match="a name for each of the 9 items, got 1"):
        model.save(tmp_path / "model.npz")
    assert (tmp_path / "model.npz").read_bytes() == before


def test_a_grown_model_has_a_popularity_for_each_item(tmp_path: Path) -> None:
    model = fitted_model()
    before = model.item_popularity_
    model.partial_fit_items([10], sparse.csr_matrix(np.ones((1, 12), np.float32)))
    np.testing.assert_array_equal(model.item_popularity_, [*before, 0, 0])
    model.save(tmp_path / "model.npz")
    loaded = TPUAlternatingLeastSquares.load(tmp_path / "model.npz")
    np.testing.assert_array_equal(loaded.item_popularity_, model.item_popularity_)


def test_a_file_with_the_removed_solver_loads(tmp_path: Path) -> None:
    model = TPUAlternatingLeastSquares(3, iterations=1, linear_solver="cholesky")
    model.fit(random_counts(9, 8), show_progress=False).save(tmp_path / "model.npz")
    with np.load(tmp_path / "model.npz") as file:
        values = dict(file)
    names = [name for name in values if name.endswith("linear_solver")]
    values.update(dict.fromkeys(names, np.array("subspace")), tpu_als_block_size=np.array(64))
    np.savez(tmp_path / "old.npz", **values)
    with pytest.warns(DataWarning, match="old.npz: linear_solver 'subspace' was removed"):
        loaded = TPUAlternatingLeastSquares.load(tmp_path / "old.npz")
    assert loaded.linear_solver == "cg"
    np.testing.assert_array_equal(loaded.item_factors, model.item_factors)
