"""Tables on the devices give the results of their NumPy copies, on every mesh."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from matrices import random_counts

from tpu_als.engine import als
from tpu_als.engine.data import AlsParams, dtype_named
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend
from tpu_als.engine.xla.mesh import device_mesh
from tpu_als.engine.xla.resident import Table

COUNTS = random_counts(70, 50, seed=3)
MESHES = [(1, 1, "auto"), (1, 2, "auto"), (2, 0, "replicated"), (4, 0, "sharded")]


def _tables(
    mesh_args: tuple[int, int, str], dtype: str = "float32"
) -> tuple[dict[str, Table], dict[str, np.ndarray]]:
    devices, threads, table_layout = mesh_args
    mesh = device_mesh(devices, num_threads=threads, table_layout=table_layout)
    data = backend.place(COUNTS, AlsParams(6, dtype), mesh)
    rng = np.random.default_rng(0)
    given = {
        s: rng.normal(size=(n, 6)) for s, n in zip(("user", "item"), COUNTS.shape, strict=True)
    }
    state = als.start(data, *given.values())
    found = {
        "user": data.backend.table(state.users, data.users, data),
        "item": data.backend.table(state.items, data.items, data),
    }
    return found, {side: t.astype(dtype_named(dtype)).astype("f8") for side, t in given.items()}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("mesh_args", MESHES, ids=str)
def test_rows_lengths_and_gramians(mesh_args: tuple[int, int, str], dtype: str) -> None:
    found, given = _tables(mesh_args, dtype)
    for side, table in found.items():
        expected, ids = given[side], np.array([3, 3, 0, len(given[side]) - 1])
        assert table.shape == expected.shape
        assert table.dtype == (np.float64 if dtype == "float64" else np.float32)
        some = table.take(ids)
        np.testing.assert_array_equal(some, expected[ids].astype(table.dtype))
        assert some.dtype == table.dtype and some.flags.writeable
        assert table.take(ids[:0]).shape == (0, 6)
        rel = 1e-12 if dtype == "float64" else 1e-5
        np.testing.assert_allclose(table.norms(), np.linalg.norm(expected, axis=1), rtol=rel)
        np.testing.assert_allclose(table.gramian(), expected.T @ expected, rtol=rel, atol=1e-4)
        np.testing.assert_array_equal(table.fetch(), expected.astype(table.dtype))


@pytest.mark.slow
@pytest.mark.parametrize("mesh_args", MESHES, ids=str)
@pytest.mark.parametrize("kind", ["implicit", "ials"])
def test_rows_are_solved_exactly(mesh_args: tuple[int, int, str], kind: str) -> None:
    found, given = _tables(mesh_args)
    rows = random_counts(23, 50, seed=4)
    objective = oracle.Objective(kind, 0.5, 2.0, 0.3, 0.5)
    solved = found["item"].solve(rows, Objective.of(*objective))
    expected = oracle.half_epoch(rows, given["item"], objective)
    np.testing.assert_allclose(solved, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # the table is as it was
    np.testing.assert_array_equal(found["item"].fetch(), given["item"].astype("f4"))


@pytest.mark.slow
@pytest.mark.parametrize("normal", [False, True])
def test_drawn_rows_depend_on_seed_and_number_alone(normal: bool) -> None:
    found = []
    for devices, threads, table_layout in MESHES:
        mesh = device_mesh(devices, num_threads=threads, table_layout=table_layout)
        data = backend.place(random_counts(300, 200), AlsParams(16), mesh)
        state = als.draw(data, 7, 0.5, normal=normal)
        found.append((als.user_factors(state, data), als.item_factors(state, data)))
    for users, items in found:
        np.testing.assert_array_equal(users, found[0][0])
        np.testing.assert_array_equal(items, found[0][1])
        assert not np.array_equal(users[:200], items)
        if normal:
            assert users.std() == pytest.approx(0.5, rel=0.05) and abs(users.mean()) < 0.03
        else:
            assert users.min() >= 0 and users.max() < 0.5
            assert users.mean() == pytest.approx(0.25, rel=0.05)
    other = als.user_factors(als.draw(data, 8, 0.5, normal=normal), data)
    assert not np.array_equal(other, found[0][0])
