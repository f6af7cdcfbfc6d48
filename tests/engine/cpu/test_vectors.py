"""The products in LLVM's vector instructions, for registers of each size, against numpy."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from tpu_als.engine.cpu import emitter, vectors
from tpu_als.engine.cpu.vectors import GROUP

WIDTH = 48
DTYPES = [("float32", "float32"), ("float32", "float64"), ("float64", "float64")]


@pytest.fixture(params=[16, 32, 64])
def register_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The size of registers for which functions are compiled; LLVM splits those it has not."""
    monkeypatch.setattr(emitter, "REGISTER_BYTES", request.param)
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
    line, n_factors, n_tiles = 64 // np.dtype(dtype).itemsize, 11, 3 * vectors.TILES
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(n_factors, GROUP)).astype(dtype)
    tiles = rng.normal(size=(n_tiles, n_factors, line)).astype(dtype)
    found = np.full((GROUP, n_tiles * line), 7, "float32")
    computed = 0, 2 * vectors.TILES

    @numba.njit
    def run(columns: Any, tiles: Any, out: Any) -> None:
        for tile in computed:
            vectors.multiply(columns, tiles, tile, out)

    run(columns, tiles, found)
    for first in computed:
        for tile in range(first, first + vectors.TILES):
            expected = columns.T.astype(np.float64) @ tiles[tile]
            own = found[:, tile * line : (tile + 1) * line]
            np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5)
    rest = found[:, vectors.TILES * line : computed[1] * line]
    assert rest.size and (rest == 7).all()
