"""Models on disk: what is written, what is read, and what a failure leaves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares, model_file

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
    """A file in memory that holds the model, at its start."""
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


def test_only_implicits_names_stand_without_a_prefix() -> None:
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


def test_bfloat16_reads_as_float32_elsewhere() -> None:
    with np.load(saved(dtype="bfloat16"), allow_pickle=False) as data:
        assert str(data["dtype"]) == "float32"
    parameters, _ = model_file.load_model(saved(dtype="bfloat16"), PARAMETERS)
    assert parameters["dtype"] == "bfloat16"


@pytest.mark.parametrize("seed", [np.random.default_rng(0), np.random.RandomState(0)])
def test_generators_are_left_out(seed: Any) -> None:
    parameters, _ = model_file.load_model(saved(random_state=seed), PARAMETERS)
    assert "random_state" not in parameters


def test_handles_of_devices_are_left_out() -> None:
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

    def half(file: Any, **arrays: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        model_file.save_npz(path, {"factors": 4})
    assert [p.name for p in tmp_path.iterdir()] == ["model.npz"]
    assert model_file.load_npz(path) == {"factors": 3}


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", alpha=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
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


def test_a_path_among_the_parameters(tmp_path: Path) -> None:
    TPUAlternatingLeastSquares(checkpoint_dir=tmp_path / "here").save(tmp_path / "model")
    read = TPUAlternatingLeastSquares.load(tmp_path / "model.npz")
    assert read.checkpoint_dir == str(tmp_path / "here")
