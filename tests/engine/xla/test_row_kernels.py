"""Compare interpreted GPU kernels with float64 products, and with fits without them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_fits import assert_same, small_fit

from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective, typed
from tpu_als.engine.xla import row_kernels, solve
from tpu_als.engine.xla.data import device_products
from tpu_als.engine.xla.mesh import device_mesh
from tpu_als.engine.xla.row_kernels import RowKernels
from tpu_als.engine.xla.solve import Block, Cells, IndexedBlock

KERNELS = RowKernels(is_interpreted=True)
N, STEPS = 30, 3


def slow(parameter: int) -> object:
    """A parameter whose tests are not run by default."""
    return pytest.param(parameter, marks=pytest.mark.slow)


SOME_FACTORS = [slow(1), slow(8), 13]
SOME_LENGTHS = [slow(8), 24, slow(32), 96]


def _blocks(n_factors: int, length: int, seed: int = 0) -> tuple[Block, IndexedBlock, np.ndarray]:
    """The same rows as `Block` and `IndexedBlock`, one empty and one full; and (R, K)."""
    rng = np.random.default_rng(seed)
    n_rows = 5
    table = jnp.asarray(rng.normal(size=(N, n_factors)), jnp.float32)
    n_entries = np.array([length, 0, *rng.integers(1, length, n_rows - 2)], np.int32)
    ids = rng.integers(0, N, (n_rows, length)).astype(np.int32)
    values = rng.normal(size=(n_rows, length)).astype(np.float32)
    objective = typed(Objective.of("implicit", 2.0, 3.0), "float32")
    args = table, objective, Cells(ids, values, n_entries), "float32"
    rows = rng.normal(size=(n_rows, n_factors)).astype(np.float32)
    return solve.gather(*args), KERNELS.gather(*args), rows


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 entries, and rows divided into parts of at most 32."""
    monkeypatch.setattr(row_kernels, "_MOST_ENTRIES", 8)
    monkeypatch.setattr(row_kernels, "_PART", 32)
    monkeypatch.setattr(row_kernels, "_SHORTEST_PART", 16)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("n_factors", SOME_FACTORS)
@pytest.mark.parametrize("length", [*SOME_LENGTHS, slow(40)])
def test_products_equal_dense_ones(n_factors: int, length: int) -> None:
    block, indexed, p = _blocks(n_factors, length)
    rows, w, v = (np.asarray(part, np.float64) for part in block)
    t = np.einsum("rlk,rk->rl", rows, p)
    is_entry = np.arange(length) < np.asarray(indexed.n_entries)[:, None]
    dense = {
        "residual": np.einsum("rlk,rl->rk", rows, v - w * t),
        "normal": np.einsum("rlk,rl->rk", rows, w * t),
        "curvature": (w * t * t).sum(axis=1, keepdims=True),
        "predict": is_entry * t,
    }
    for name, expected in dense.items():
        found = getattr(KERNELS, name)(indexed, p)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-4, err_msg=name)
    expected = np.einsum("rlk,rl->rk", rows, v)
    np.testing.assert_allclose(KERNELS.project(indexed, block.v), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("n_factors", SOME_FACTORS)
@pytest.mark.parametrize("length", SOME_LENGTHS)
def test_cg_takes_the_same_steps(n_factors: int, length: int) -> None:
    block, indexed, z = _blocks(n_factors, length)
    positive = [part._replace(w=jnp.abs(part.w)) for part in (block, indexed)]
    d = np.random.default_rng(1).uniform(5, 20, z.shape).astype(np.float32)
    expected = solve.cg(positive[0], z, d, STEPS)
    np.testing.assert_allclose(KERNELS.cg(positive[1], z, d, STEPS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_devices", "dtype", "kind"),
    [
        (1, "float32", "implicit"),
        (1, "float32", "zero weights"),
        (1, "bfloat16", "implicit"),
        (2, "float32", "ials"),
        (2, "float32", "features"),
    ],
)
def test_fits_equal_those_without_kernels(
    monkeypatch: pytest.MonkeyPatch, n_devices: int, dtype: str, kind: str
) -> None:
    params = AlsParams(6, dtype, "cg")
    mesh = device_mesh(n_devices, num_threads=2, table_layout="replicated")
    without, expected = small_fit((24, 30), 64, params, mesh, kind)
    monkeypatch.setattr(row_kernels, "kernels_for", lambda mesh: KERNELS)
    data, found = small_fit((24, 30), 64, params, mesh, kind)
    assert without.products is None
    assert data.products is KERNELS
    assert len(data.users.rows.rungs) == 2
    assert len(data.users.rows.long)
    assert_same(found, expected, dtype)


def test_kernels_are_for_gpus_only() -> None:
    assert row_kernels.kernels_for(device_mesh(1)) is None


@pytest.mark.parametrize(
    ("solver", "dtype", "expected"),
    [
        ("cg", "float32", KERNELS),
        ("diagonal", "bfloat16", KERNELS),
        ("cholesky", "float32", None),
        ("cg", "float64", None),
    ],
)
def test_solvers_with_products(
    monkeypatch: pytest.MonkeyPatch, solver: str, dtype: str, expected: RowKernels | None
) -> None:
    monkeypatch.setattr(row_kernels, "kernels_for", lambda mesh: KERNELS)
    assert device_products(AlsParams(8, dtype, solver), device_mesh(1)) is expected


def test_kernels_that_work_are_found_to() -> None:
    assert row_kernels.works_on(jax.devices()[0], KERNELS)


def test_kernels_that_do_not_run_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels cannot run on a CPU device."""
    row_kernels.works_on.cache_clear()
    with pytest.warns(RuntimeWarning, match="do not run there"):
        assert not row_kernels.works_on(jax.devices()[0], RowKernels())
    row_kernels.works_on.cache_clear()
    monkeypatch.setattr(RowKernels, "cg", lambda self, block, z, d, steps: z)
    with pytest.warns(RuntimeWarning, match="solve a small example wrongly"):
        assert not row_kernels.works_on(jax.devices()[0], KERNELS)
    row_kernels.works_on.cache_clear()


def test_chunks_grow_with_the_entries() -> None:
    sizes = [row_kernels.chunk_sizes(count)[0] for count in (0, 10**6, 10**8, 10**11)]
    assert sizes == sorted(sizes)
    assert all(size & (size - 1) == 0 for size in sizes)


@pytest.mark.parametrize(("n_factors", "length"), [(64, 16), (100, 64), (256, 4096)])
def test_kernels_lower_for_cuda(n_factors: int, length: int) -> None:
    _, indexed, rows = _blocks(n_factors, length)
    kernels = RowKernels()
    if jax.__version_info__ >= (0, 11):
        pytest.skip("lowering needs a description of a GPU since JAX 0.11")
    traced = jax.jit(lambda b, z: kernels.cg(b, z, jnp.ones_like(z), 3)).trace(indexed, rows)
    assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
