"""Damaged, foreign and hostile model files are refused with one kind of error, in little memory."""

from __future__ import annotations

import io
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_npz
import numpy as np
import pytest
from matrices import planted_groups
from models import make

from tpu_als import ModelFileError, TPUAlternatingLeastSquares

MOST = 200 << 20  # most bytes that a refusal may allocate
LOAD = TPUAlternatingLeastSquares.load


@pytest.fixture(scope="module")
def good() -> bytes:
    """A good file: 24 users by 18 items, 6 factors."""
    file = io.BytesIO()
    model = make(TPUAlternatingLeastSquares, use_cg=True, devices=1, calculate_training_loss=True)
    model.fit(planted_groups(), show_progress=False).save(file)
    return file.getvalue()


@pytest.fixture(autouse=True)
def counted(record_property: Any) -> None:
    record_property("proof: damaged, foreign and hostile model files", 1)


def peak_of(call: Callable[[], object]) -> int:
    """Most bytes that Python and NumPy held at once during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", hostile_npz.FILES)
def test_refused(good: bytes, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.npz"
    hostile_npz.FILES[name](path, good)

    def refuse() -> None:
        with pytest.raises(ModelFileError, match=re.escape(str(path))) as caught:
            LOAD(path)
        assert "allow_pickle" not in str(caught.value)

    assert peak_of(refuse) < MOST


@pytest.mark.parametrize("name", hostile_npz.HARMLESS)
def test_harmless(good: bytes, tmp_path: Path, name: str) -> None:
    path, expected = tmp_path / "model.npz", LOAD(io.BytesIO(good))
    hostile_npz.HARMLESS[name](path, good)
    read: list[Any] = []
    assert peak_of(lambda: read.append(LOAD(path))) < MOST
    np.testing.assert_array_equal(read[0].item_factors, expected.item_factors)
    np.testing.assert_array_equal(read[0].user_factors, expected.user_factors)
    assert [file.name for file in tmp_path.iterdir()] == ["model.npz"]


def test_a_directory_in_place_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=re.escape(str(path))):
        LOAD(path)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_an_open_file_that_is_cut(good: bytes, share: float) -> None:
    with pytest.raises(ModelFileError, match="file"):
        LOAD(io.BytesIO(good[: int(len(good) * share)]))


def test_any_byte_may_be_wrong(good: bytes, tmp_path: Path) -> None:
    """One byte changed anywhere: the file is refused, or loads as the very model it was."""
    path, expected = tmp_path / "model.npz", LOAD(io.BytesIO(good))
    refused, rng = 0, np.random.default_rng(0)
    places = rng.choice(len(good), 300, replace=False)
    for at in places:
        content = bytearray(good)
        content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        read, error = None, None
        try:
            read = LOAD(path)
        except ModelFileError as caught:
            error = caught
        if read is None:
            assert str(path) in str(error)
            refused += 1
        else:
            np.testing.assert_array_equal(read.user_factors, expected.user_factors)
            np.testing.assert_array_equal(read.item_factors, expected.item_factors)
            assert repr(read.get_params()) == repr(expected.get_params())
    assert refused > len(places) // 2


def test_the_good_file_loads(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    path.write_bytes(good)
    assert LOAD(path).item_factors.shape == (18, 6)
