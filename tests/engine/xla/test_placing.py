"""Values of a matrix on the devices: the narrowest exact dtype, with equal results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import random_counts
from scipy import sparse

from tpu_als import shards
from tpu_als.engine import als
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend, placing
from tpu_als.engine.xla.data import XlaData
from tpu_als.engine.xla.mesh import device_mesh

FACTORS = 8


def _tables(data: XlaData) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (data.users.n_rows, data.items.n_rows)
    start = (rng.normal(size=(n, FACTORS)).astype(np.float32) for n in shape)
    state = als.start(data, *start)
    objective = Objective.of("implicit", 0.1, 3.0)
    for _ in range(2):
        state, failed = als.epoch(state, data, objective)
        assert failed == (0, 0)
    loss = als.loss(state, data, objective)
    return [als.user_factors(state, data), als.item_factors(state, data), np.array(loss)]


def _matrix(values: list[float]) -> sparse.csr_matrix:
    matrix = random_counts(90, 70, seed=4).astype(np.float32)
    matrix.data[:] = np.resize(np.array(values, np.float32), matrix.nnz)
    return matrix


CASES = {"ones": ([1.0], None), "ratings": ([0.5, 3.0, -4.5, 0.0], ml_dtypes.bfloat16),
         "counts": ([1.0, 257.0], np.float32)}  # fmt: skip


def test_values_beyond_bfloat16_are_stored_as_float32() -> None:
    most = np.finfo(np.float32).max
    data = backend.place(_matrix([1.0, most]), AlsParams(FACTORS), device_mesh(1))
    assert data.users.cells.values[0].dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize("devices", [None, 4])
@pytest.mark.parametrize("case", CASES)
def test_values_have_the_narrowest_exact_dtype(
    case: str, devices: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, expected = CASES[case]
    # so that there are long rows too
    monkeypatch.setattr(placing, "_LONGEST", {"cpu": 16, "other": 16})
    monkeypatch.setattr(placing.layout, "LONGEST", 16)
    mesh = device_mesh(devices or 1, num_threads=2, table_layout="sharded" if devices else "auto")
    matrix, params = _matrix(values), AlsParams(FACTORS)
    data = backend.place(matrix, params, mesh)
    assert len(data.users.rows.long) and len(data.items.rows.long)
    for side in (data.users, data.items):
        for kept in (side.cells.values, side.long.values if side.long is not None else None):
            first: Any = kept[0] if isinstance(kept, list) else kept
            assert (first is None) if expected is None else (first.dtype == expected)
    monkeypatch.setattr(placing, "kept_as", lambda *_: np.dtype(np.float32))
    wide = backend.place(matrix, params, mesh)
    for found, same in zip(_tables(data), _tables(wide), strict=True):
        np.testing.assert_allclose(found, same, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("values", "kept"), [([1.0], False), ([2.0], True)])
def test_shards_without_values_keep_none(values: list[float], kept: bool, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    matrix, mesh = _matrix(values), device_mesh(1)
    opened = shards.write_shards(matrix, tmp_path / "data", 2)
    params = AlsParams(FACTORS)
    data, in_memory = (backend.place(entries, params, mesh) for entries in (opened, matrix))
    assert (data.users.cells.values is not None) == kept
    for found, same in zip(_tables(data), _tables(in_memory), strict=True):
        np.testing.assert_allclose(found, same, rtol=1e-4, atol=1e-5)


ORDER_SCRIPT = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
from matrices import random_counts
from tpu_als import TPUAlternatingLeastSquares

small, large = random_counts(50, 40, seed=1), random_counts(300, 200, seed=2)
found = {}
for solver, native, devices in json.loads(sys.argv[1]):
    for matrix in [small, large] if sys.argv[2] == "after" else [large]:
        model = TPUAlternatingLeastSquares(
            4, iterations=2, random_state=0, alpha=4.0, linear_solver=solver,
            use_native=native, devices=devices, num_threads=2,
        )
        model.fit(matrix, show_progress=False)
    found[f"{solver} {native} {devices}"] = model.user_factors.tobytes().hex(), (
        model.item_factors.tobytes().hex()
    )
print(json.dumps(found))
"""
SOLVERS = ("cg", "cholesky")
SETTINGS = [("cg", True, 1), *((name, False, count) for name in SOLVERS for count in (1, 4))]


@pytest.mark.slow
def test_a_fit_does_not_depend_on_the_fits_before_it() -> None:
    """The same tables, bit for bit, in a fresh process and after a fit of a smaller matrix."""
    here = Path(__file__).parents[2]
    path = os.pathsep.join([str(here.parent), str(here)])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", ORDER_SCRIPT, json.dumps(SETTINGS), order],
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for order in ("fresh", "after")
    ]
    fresh, after = (json.loads(process.communicate()[0]) for process in running)
    assert len(fresh) == len(SETTINGS)
    for name, tables in fresh.items():
        assert tables == after[name], name


@given(st.integers(0, 99))
def test_plans_depend_on_coarse_properties_of_the_lengths(seed: int) -> None:
    """Folds of a matrix get one ladder, and so share programs."""
    rng, params, mesh = np.random.default_rng(seed), AlsParams(64), device_mesh(1)
    lengths = np.minimum(np.exp(rng.normal(4, 1.2, 12_000)).astype(int), 3000)
    plans = [
        placing.make_plan(rng.permutation(lengths)[: len(lengths) * 4 // 5], params, mesh)
        for _ in range(5)
    ]
    rungs = [set(plan.lengths) for plan in plans]
    assert len(set.union(*rungs)) <= len(rungs[0]) + 1
