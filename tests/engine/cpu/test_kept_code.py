"""Compiled code on disk that is damaged, of other types, or cannot be written."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest

from tpu_als.engine.cpu import compiled, jit


def _double(number: Any) -> Any:
    return number + number


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the code of `_double` for an integer and for a float."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    function = jit.compiled(_double)
    assert function(2) == 4 and function(0.5) == 1.0
    assert len(list(tmp_path.rglob("*.nbc"))) == 2
    return tmp_path


def _loaded() -> Any:
    """The function as a new process has it, after a call with an integer."""
    function = jit.compiled(_double)
    assert function(21) == 42 and function(0.5) == 1.0
    return function.stats


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def _flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4  # in the machine code, where a pickle stays valid
    file.write_bytes(content)


def _made_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def test_code_is_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tpu_als"):
        stats = _loaded()
    assert sum(stats.cache_hits.values()) == 2 and not caplog.records


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("nbi", _emptied),
        ("nbi", _cut),
        ("nbi", _made_a_folder),
        ("nbc", _emptied),
        ("nbc", _cut),
        ("nbc", _flipped),
    ],
)
def test_damaged_code_is_compiled_again(
    kind: str, damage: Callable[[Path], None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in folder.rglob(f"*.{kind}"):
        damage(file)
    with caplog.at_level(logging.WARNING, logger="tpu_als"):
        _loaded()
    assert "cannot be read" in caplog.text and str(folder) in caplog.text
    if damage is not _made_a_folder:  # the files were replaced
        assert sum(_loaded().cache_hits.values()) == 2


def test_code_for_other_types_is_compiled_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two processes that compile a function at the same time may give their files one name."""
    first, second = sorted(folder.rglob("*.nbc"))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with caplog.at_level(logging.WARNING, logger="tpu_als"):
        _loaded()
    assert "code for (float64,)" in caplog.text
    assert sum(_loaded().cache_hits.values()) == 2


def test_a_full_disk_stops_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    function = jit.compiled(_double)
    monkeypatch.setattr(type(function._cache._cache_file), "_save_data", full)
    with caplog.at_level(logging.WARNING, logger="tpu_als"):
        assert function(21) == 42
    assert "cannot be written" in caplog.text and "No space left" in caplog.text


RESULTS = """
import zlib
import numpy as np
from scipy import sparse
from tpu_als import TPUAlternatingLeastSquares
matrix = sparse.random(400, 300, 0.1, "csr", np.float32, random_state=0)
for dtype in (np.float32, np.float64):
    settings = dict(factors=24, alpha=5.0, iterations=2, random_state=0, dtype=dtype)
    model = TPUAlternatingLeastSquares(**settings, calculate_training_loss=True)
    model.fit(matrix, show_progress=False)
    ids, scores = model.recommend(np.arange(400), matrix, N=7)
    parts = model.item_factors, model.transform(matrix), ids, scores, model.history_["loss"]
    print([zlib.crc32(np.ascontiguousarray(part).tobytes()) for part in parts])
"""


@pytest.mark.slow
def test_the_process_that_compiles_has_the_results_of_later_ones(tmp_path: Path) -> None:
    """Bit for bit, though it does not read the code from a file."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    first, second = (
        subprocess.run(
            [sys.executable, "-c", RESULTS], env=environment, capture_output=True, text=True,
            check=True,
        ).stdout
        for _ in range(2)
    )  # fmt: skip
    assert list(tmp_path.rglob("*.nbc"))
    assert first == second


def test_kept_code_depends_on_every_file_that_the_loops_import() -> None:
    here = Path(compiled.__file__).parent
    sources = {(here / name).resolve() for name in compiled._SOURCES}
    for source in sources - {here.parent / "objective.py"}:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tpu_als."):
                base = here.parents[2].joinpath(*(node.module or "").split("."))
                modules = [base / f"{alias.name}.py" for alias in node.names]
                found = [file for file in (*modules, base.with_suffix(".py")) if file.exists()]
                assert set(found) <= sources, f"{source.name} imports {found}"
