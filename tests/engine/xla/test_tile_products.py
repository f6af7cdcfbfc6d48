"""Compare products of bfloat16 parts with float64 products, and fits with and without them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from small_fits import assert_same, small_fit

from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective, typed
from tpu_als.engine.xla import placing, solve, tile_products
from tpu_als.engine.xla.mesh import DeviceMesh, device_mesh
from tpu_als.engine.xla.solve import Block, Cells
from tpu_als.engine.xla.tile_products import TiledBlock, TileProducts

TILES = TileProducts()
N, STEPS = 30, 3
# Errors of products relative to the sum of the absolute terms: 16 bits of vectors, or float32.
BOUND = {"bfloat16": 2.0**-15, "float32": 2.0**-21}


@given(npst.arrays(np.float32, 20, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_parts_add_up_to_the_values(values: np.ndarray) -> None:
    values[np.abs(values) < 1e-25] = 0  # smaller parts may be below the least normal number
    for count, bits in (1, 8), (2, 16), (3, 24):
        parts = jax.jit(tile_products.bfloat16_parts, static_argnums=1)(values, count)
        assert len(parts) == count and all(part.dtype == jnp.bfloat16 for part in parts)
        total = sum(np.asarray(part, np.float64) for part in parts)
        np.testing.assert_allclose(total, values, rtol=2.0**-bits, atol=0)


def _blocks(n_rows: int, length: int, dtype: str) -> tuple[Block, TiledBlock, np.ndarray]:
    """The same rows in both forms, one empty and one full; and vectors (R, K)."""
    rng = np.random.default_rng(length)
    table = jnp.asarray(rng.normal(size=(N, 13)), dtype)
    n_entries = np.array([length, 0, *rng.integers(0, length + 1, n_rows)], np.int32)[:n_rows]
    cells = Cells(
        rng.integers(0, N, (n_rows, length)).astype(np.int32),
        rng.normal(size=(n_rows, length)).astype(np.float32),
        n_entries,
    )
    objective = typed(Objective.of("implicit", 2.0, 3.0), "float32")
    both = [kind.gather(table, objective, cells, "float32") for kind in (solve, TILES)]
    return both[0], both[1], rng.normal(size=(n_rows, 13)).astype(np.float32)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("n_rows", "length"), [(16, 8), (8, 24), (24, 128), (1, 40), (12, 16)])
def test_products_equal_dense_ones(n_rows: int, length: int, dtype: str) -> None:
    block, tiled, p = _blocks(n_rows, length, dtype)
    rows, w, v = (np.asarray(part, np.float64) for part in block)
    np.testing.assert_array_equal(
        sum(np.asarray(part, np.float64) for part in tiled.parts), rows.reshape(-1, 13)
    )
    np.testing.assert_array_equal(tiled.w, w)

    def predicted(p: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
        return np.einsum("rlk,rk->rl", rows, p)

    def projected(t: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
        return np.einsum("rlk,rl->rk", rows, t)

    t = predicted(p)
    size = predicted(np.abs(p), np.abs(rows))  # sums of absolute terms
    dense = {
        "predict": (t, size),
        "normal": (projected(w * t), projected(np.abs(w) * size, np.abs(rows))),
        "residual": (projected(v - w * t), projected(np.abs(v) + np.abs(w) * size, np.abs(rows))),
    }
    for name, (expected, scale) in dense.items():
        found = np.asarray(getattr(TILES, name)(tiled, p), np.float64)
        assert np.all(np.abs(found - expected) <= 2 * BOUND[dtype] * scale), name
    curvature = np.asarray(TILES.curvature(tiled, p), np.float64)
    assert curvature.shape == p.shape and np.all(curvature == curvature[:, :1])
    scale = (np.abs(w) * size * size).sum(axis=1)
    assert np.all(np.abs(curvature[:, 0] - (w * t * t).sum(axis=1)) <= 4 * BOUND[dtype] * scale)
    found = np.asarray(TILES.project(tiled, block.v), np.float64)
    assert np.all(
        np.abs(found - projected(v)) <= 2 * BOUND[dtype] * projected(np.abs(v), np.abs(rows))
    )


@pytest.mark.parametrize("dtype", BOUND)
def test_cg_takes_the_same_steps(dtype: str) -> None:
    block, tiled, z = _blocks(16, 24, dtype)
    block, tiled = (part._replace(w=jnp.abs(part.w)) for part in (block, tiled))
    d = np.random.default_rng(1).uniform(5, 20, z.shape).astype(np.float32)
    expected = solve.cg(block, z, d, STEPS)
    tolerance = 1e-3 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(TILES.cg(tiled, z, d, STEPS), expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize(
    ("devices", "table_layout", "dtype", "kind"),
    [
        (1, "replicated", "float32", "implicit"),
        (4, "sharded", "bfloat16", "implicit"),
        pytest.param(1, "replicated", "bfloat16", "ials", marks=pytest.mark.slow),
        pytest.param(2, "replicated", "float32", "features", marks=pytest.mark.slow),
        pytest.param(4, "sharded", "float32", "zero weights", marks=pytest.mark.slow),
    ],
)
def test_fits_equal_those_of_other_products(
    monkeypatch: pytest.MonkeyPatch, devices: int, table_layout: str, dtype: str, kind: str
) -> None:
    mesh, params = device_mesh(devices, table_layout=table_layout), AlsParams(6, dtype, "cg")
    monkeypatch.setattr(tile_products, "tiles_for", lambda mesh: None)
    without, expected = small_fit((40, 50), 256, params, mesh, kind)
    monkeypatch.setattr(tile_products, "tiles_for", lambda mesh: TILES)
    monkeypatch.setattr(DeviceMesh, "exchanges_in_background", True)
    data, found = small_fit((40, 50), 256, params, mesh, kind)
    assert without.products is None and data.products is TILES
    assert len(data.users.rows.rungs) == 2 and len(data.users.rows.long) > 1
    assert_same(found, expected, dtype)


@pytest.mark.parametrize("factors", [16, 128, 1024, 4096])
def test_chunks_have_whole_tiles(monkeypatch: pytest.MonkeyPatch, factors: int) -> None:
    monkeypatch.setattr(tile_products, "tiles_for", lambda mesh: TILES)
    monkeypatch.setattr(placing, "backend_kind", lambda mesh: "other")
    params, lengths = AlsParams(factors, "bfloat16", "cg"), np.geomspace(1, 1e6, 2000).astype(int)
    plan = placing.make_plan(lengths, params, device_mesh(1))
    assert all(plan.rows(length) % tile_products.TILE_ROWS == 0 for length in plan.lengths)


def test_tiles_are_for_tpus_only() -> None:
    assert tile_products.tiles_for(device_mesh(1)) is None
