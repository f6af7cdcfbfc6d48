"""The products in LLVM's vector instructions, for registers of each size, against numpy."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from tpu_als.engine.cpu import vectors
from tpu_als.engine.cpu.vectors import GROUP

WIDTH = 48
DTYPES = [("float32", "float32"), ("float32", "float64"), ("float64", "float64")]


@pytest.fixture(params=[16, 32, 64])
def register_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The size of registers for which functions are compiled; LLVM splits those it has not."""
    monkeypatch.setattr(vectors, "REGISTER_BYTES", request.param)
    return int(request.param)


def _rows(dtype: str) -> Any:
    """Two groups of rows, between elements that must not count."""
    rows = np.full((4 * GROUP, WIDTH), np.nan, dtype)
    rows[GROUP : 3 * GROUP] = np.random.default_rng(0).normal(size=(2 * GROUP, WIDTH))
    return rows


@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
def test_dots(dtype: str, wide: str, register_bytes: int) -> None:
    rows, p = _rows(dtype), np.random.default_rng(1).normal(size=WIDTH).astype(wide)
    found = np.full(WIDTH, 7, wide)

    @numba.njit
    def run(rows: Any, p: Any, out: Any) -> None:
        vectors.dots(rows, 2 * GROUP, p, out)

    run(rows, p, found)
    expected = rows[2 * GROUP : 3 * GROUP].astype(np.float64) @ p
    np.testing.assert_allclose(found[:GROUP], expected, rtol=0, atol=100 * np.finfo(wide).eps)
    assert (found[GROUP:] == 7).all()


@pytest.mark.parametrize(("dtype", "wide"), DTYPES)
def test_add_rows(dtype: str, wide: str, register_bytes: int) -> None:
    rows, rng = _rows(dtype), np.random.default_rng(1)
    factors, before = rng.normal(size=WIDTH).astype(wide), rng.normal(size=WIDTH).astype(wide)
    found = before.copy()

    @numba.njit
    def run(rows: Any, factors: Any, out: Any) -> None:
        vectors.add_rows(rows, GROUP, factors, out)

    run(rows, factors, found)
    expected = before + factors[:GROUP].astype(np.float64) @ rows[GROUP : 2 * GROUP]
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * np.finfo(wide).eps)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_multiply(dtype: str, register_bytes: int) -> None:
    line, n_factors = 64 // np.dtype(dtype).itemsize, 11
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(n_factors, GROUP)).astype(dtype)
    tiles = rng.normal(size=(3, n_factors, line)).astype(dtype)
    found = np.full((GROUP, 3 * line), 7, "float32")

    @numba.njit
    def run(columns: Any, tiles: Any, out: Any) -> None:
        for tile in (0, 2):
            vectors.multiply(columns, tiles, tile, out)

    run(columns, tiles, found)
    for tile in (0, 2):
        expected = columns.T.astype(np.float64) @ tiles[tile]
        own = found[:, tile * line : (tile + 1) * line]
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5)
    assert (found[:, line : 2 * line] == 7).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_add_tile(dtype: str, register_bytes: int) -> None:
    lanes, rng = register_bytes // np.dtype(dtype).itemsize, np.random.default_rng(0)
    rows, factors = (rng.normal(size=(9, WIDTH)).astype(dtype) for _ in range(2))
    found = rng.normal(size=(WIDTH, WIDTH + 16)).astype(dtype)
    expected, columns = found.astype(np.float64), slice(16, 16 + lanes)

    @numba.njit
    def run(rows: Any, factors: Any, sign: Any, out: Any) -> None:
        vectors.add_tile(rows, factors, (7, GROUP, 16), sign, out)

    run(rows, factors, np.dtype(dtype).type(-1), found)
    own = factors[:7, GROUP : 2 * GROUP].astype(np.float64)
    expected[GROUP : 2 * GROUP, columns] -= own.T @ rows[:7, columns]
    np.testing.assert_allclose(found, expected, rtol=0, atol=100 * np.finfo(dtype).eps)
