"""Rotated source rows: when they are kept, and their memory. test_converging has solutions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from tpu_als.engine.cpu import eigenbasis, exact, rotation
from tpu_als.engine.cpu.compiled import read_only
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective, confidence

N_SOURCE = 150
OBJECTIVE = Objective.of("implicit", 1.0, 40.0)


def _table() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(N_SOURCE, 16)).astype(np.float32)


def _rows() -> sparse.csr_matrix:
    """Rows (60, 150) of about 40 entries."""
    rng = np.random.default_rng(0)
    dense = (rng.random((60, N_SOURCE)) < 0.25) * rng.integers(1, 6, (60, N_SOURCE))
    return sparse.csr_matrix(dense.astype(np.float32))


def _source(table: np.ndarray) -> exact.Source:
    return exact.Source(table, AlsParams(16, "float32", "cholesky"), 2)


def _error(found: np.ndarray, table: np.ndarray, row: sparse.csr_matrix) -> float:
    """Distance to the dense float64 solution of equation (1), in units of its length."""
    wide, (w, v) = table.astype(np.float64), confidence(OBJECTIVE, row.data.astype(np.float64))
    liked = wide[row.indices]
    matrix = wide.T @ wide + np.eye(16) + (liked.T * w) @ liked
    expected = np.linalg.solve(matrix, liked.T @ v)
    return float(np.linalg.norm(found[0] - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("width", [1, 7, 16, 33])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rotated_rows(dtype: type, width: int) -> None:
    rng = np.random.default_rng(width)
    table, matrix = rng.normal(size=(20, 11)).astype(dtype), rng.normal(size=(11, width))
    ids, out = np.array([3, 20, 3, 19, 0, 1, 2, 4, 5]), np.full((9, width), 7, dtype)
    tiles = read_only(rotation.tiles_of(matrix))
    rotation.rotate(read_only(table), read_only(ids), tiles, out)
    expected = np.vstack([table, np.zeros(11)])[ids] @ matrix  # id N is a row of zeros
    np.testing.assert_allclose(out, expected, 0, 100 * np.finfo(dtype).eps)


@pytest.mark.parametrize("written", [1.5, np.nan])
def test_rows_that_differ(written: float) -> None:
    table = _table()
    before, ids = table.copy(), np.array([4, N_SOURCE, 9], np.uint32)
    assert not rotation.differ(table, before, ids)
    table[5, 3] = written
    assert not rotation.differ(table, before, ids)
    table[9, 15] = written
    assert rotation.differ(table, before, ids)


def test_rotated_rows_of_a_small_table_are_kept_until_they_change() -> None:
    table, rows = _table(), _rows()
    source = _source(table)
    rotated = source._eigenbasis()._source
    row = rows[7]
    source.solve(row, OBJECTIVE)
    assert rotated._kept is None  # one row needs few of them
    for _ in range(N_SOURCE):
        source.solve(row, OBJECTIVE)
    kept = rotated._kept
    assert kept is not None
    changed = row.indices[0]
    table[changed] *= -1  # the same gramian
    other = sparse.csr_matrix(np.delete(np.eye(N_SOURCE, dtype=np.float32), changed, axis=0)[:1])
    source.solve(other, OBJECTIVE)
    assert rotated._kept is kept
    found = source.solve(row, OBJECTIVE)
    assert rotated._kept is None
    assert _error(found, table, row) < 1e-5


def test_memory_for_rotated_rows_has_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eigenbasis, "_SMALL", 0)
    monkeypatch.setattr(eigenbasis, "_KEPT_BYTES", 0)
    rows = _rows()
    source = _source(_table())
    for row in range(rows.shape[0]):
        source.solve(rows[row], OBJECTIVE)
    blocks = source._eigenbasis()._source._memory._free
    assert 0 < sum(map(len, blocks.values())) <= N_SOURCE.bit_length()
