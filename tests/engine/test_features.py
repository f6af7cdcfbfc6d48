"""Half-epochs, the loss and fold-in with features, on every backend, against the dense oracle."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import feature_oracle
import numpy as np
import oracle
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als.engine import als, layout
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.data import AlsParams, Data
from tpu_als.engine.features import Features, Regression
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import placing
from tpu_als.engine.xla.backend import XlaBackend
from tpu_als.engine.xla.mesh import device_mesh
from tpu_als.exceptions import DataWarning

BACKENDS = ["cpu", "cpu 2 threads", "xla 1", "xla threads", "xla 2", "xla 4 sharded"]
OBJECTIVES = [
    oracle.Objective("implicit", 0.5, 2.0),
    oracle.Objective("implicit", 0.5, 2.0, 0.3, 0.5),
    oracle.Objective("ials", 0.05, 1.5, 0.4),
    oracle.Objective("ials", 0.1, 1.5, 0.4, 0.3),
]
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def _matrix() -> sparse.csr_matrix:
    """40 x 30 with rows and columns of all lengths, two of each empty."""
    dense = random_counts(40, 30, density=0.3, seed=5).toarray()
    dense[3], dense[:, 2] = 1 + np.arange(30) % 3, 1
    dense[[7, 20]], dense[:, [4, 11]] = 0, 0
    return sparse.csr_matrix(dense.astype(np.float32))


def _features(n_rows: int, n_features: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n_rows, n_features)) * (rng.random((n_rows, n_features)) < 0.4)
    values[n_rows // 2] = 0  # a row without features
    return values.astype(np.float32)


MATRIX = _matrix()
USER_FEATURES = feature_oracle.Features(_features(40, 5, 1).astype(np.float64), 0.7, 1.5)
ITEM_FEATURES = feature_oracle.Features(_features(30, 9, 2).astype(np.float64), 1.3, 0.6)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[object]:
    """A backend by name; XLA's with few and short rungs, so that some rows are long."""
    name = request.param
    if name.startswith("cpu"):
        yield CpuBackend(2 if "2" in name else 1)
        return
    count = {"xla 1": (1, 1), "xla threads": (1, 2), "xla 2": (2, 0), "xla 4 sharded": (4, 0)}
    mesh = device_mesh(
        count[name][0], num_threads=count[name][1],
        table_layout="sharded" if "sharded" in name else "auto",
    )  # fmt: skip
    planned = placing.make_plan

    def small(*args: object, **options: object) -> layout.Plan:
        return dataclasses.replace(planned(*args, **options), lengths=(8, 16), chunk=32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "make_plan", small)
        yield XlaBackend(mesh)


def _of(given: feature_oracle.Features, dtype: str) -> Features:
    return Features(sparse.csr_matrix(given.values.astype(dtype)), given.gamma, given.weight)


def _placed(backend: object, params: AlsParams, sides: str) -> Data:
    data = backend.place(MATRIX, params)
    return als.with_features(
        data,
        _of(USER_FEATURES, params.compute_dtype) if "users" in sides else None,
        _of(ITEM_FEATURES, params.compute_dtype) if "items" in sides else None,
    )


def _tables(factors: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return rng.normal(size=(40, factors)), rng.normal(size=(30, factors))


def _close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("solver", ["exact", "cholesky", "cg"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_epochs_equal_the_oracles(
    backend: object, solver: str, objective: oracle.Objective, dtype: str
) -> None:
    solver = "cholesky" if solver == "exact" and isinstance(backend, XlaBackend) else solver
    params = AlsParams(4, dtype, solver, cg_steps=9, positive=objective.name == "ials")
    data = _placed(backend, params, "users, items")
    state = als.start(data, *(table.astype(dtype) for table in _tables()))
    given, (users, items) = Objective.of(*objective), _tables()
    tolerance = TOLERANCE[dtype] * (20 if solver == "cg" else 1)
    for _ in range(2):
        state, failed = als.epoch(state, data, given)
        assert failed == (0, 0)
        users = feature_oracle.half_epoch(MATRIX, users, items, objective, USER_FEATURES)
        items = feature_oracle.half_epoch(MATRIX.T, items, users, objective, ITEM_FEATURES)
    _close(als.user_factors(state, data), users, tolerance)
    _close(als.item_factors(state, data), items, tolerance)
    for target, table, features, rows in (
        ("users", users, USER_FEATURES, MATRIX),
        ("items", items, ITEM_FEATURES, MATRIX.T),
    ):
        mine = state.users if target == "users" else state.items
        weights = feature_oracle.best_weights(rows, table, objective, features)
        found = als.feature_weights(mine, data, given, target=target)
        _close(found, weights, 10 * tolerance)
        whole, _ = als.completed(mine, data, given, target=target)
        side = getattr(data, target)
        expected = np.where(side.lengths[:, None] > 0, table, features.values @ weights)
        _close(data.backend.table(whole, side, data).fetch(), expected, 10 * tolerance)
    loss = als.loss(state, data, given)
    total = feature_oracle.total_loss(MATRIX, users, items, objective, USER_FEATURES, ITEM_FEATURES)
    plain = oracle.total_loss(MATRIX, users, items, objective)
    expected = oracle.loss(MATRIX, users, items, objective) * total / plain
    assert loss == pytest.approx(expected, rel=10 * tolerance)


@pytest.mark.parametrize("backend", ["cpu", "xla 2"], indirect=True)
@pytest.mark.parametrize("sides", ["users", "items"])
def test_a_side_without_features_keeps_its_ridge(backend: object, sides: str) -> None:
    params, objective = AlsParams(4, "float64", "cholesky"), OBJECTIVES[2]
    data = _placed(backend, params, sides)
    (users, items), given = _tables(), Objective.of(*objective)
    state, _ = als.epoch(als.start(data, users, items), data, given)
    of_users = USER_FEATURES if sides == "users" else None
    of_items = ITEM_FEATURES if sides == "items" else None
    users = feature_oracle.half_epoch(MATRIX, users, items, objective, of_users)
    items = feature_oracle.half_epoch(MATRIX.T, items, users, objective, of_items)
    _close(als.user_factors(state, data), users, 1e-9)
    _close(als.item_factors(state, data), items, 1e-9)
    other = "items" if sides == "users" else "users"
    assert als.completed(state.users, data, given, target=other)[1] is None


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_rows_whose_weights_are_all_zero(backend: object) -> None:
    """Binary data with a confidence of 1: the systems are diagonal, and solved by division."""
    ones, objective = MATRIX.sign(), oracle.Objective("implicit", 0.5, 1.0)
    data = backend.place(ones, AlsParams(4, "float64"))
    data = als.with_features(data, None, _of(ITEM_FEATURES, "float64"))
    users, items = _tables()
    state, _ = als.epoch(als.start(data, users, items), data, Objective.of(*objective))
    users = feature_oracle.half_epoch(ones, users, items, objective)
    items = feature_oracle.half_epoch(ones.T, items, users, objective, ITEM_FEATURES)
    _close(als.item_factors(state, data), items, 1e-10)


@pytest.mark.parametrize("backend", ["cpu", "xla threads"], indirect=True)
@pytest.mark.parametrize("relaxation", [1.0, 1.5])
def test_the_loss_never_rises(backend: object, relaxation: float) -> None:
    objective = Objective.of(*OBJECTIVES[0])
    data = _placed(backend, AlsParams(4, "float64", "cg", cg_steps=3), "users, items")
    state = als.start(data, *_tables())
    losses = [als.loss(state, data, objective)]
    for _ in range(6):
        state, _ = als.epoch(state, data, objective, relaxation)
        losses.append(als.loss(state, data, objective))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("backend", BACKENDS[:3], indirect=True)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_fold_in_equals_the_oracle(backend: object, objective: oracle.Objective) -> None:
    _, items = _tables()
    prior = np.random.default_rng(3).normal(size=(40, 4))
    params = AlsParams(4, "float64", "cholesky")
    found = backend.source(items, params).solve(MATRIX, Objective.of(*objective), prior=prior)
    _close(found, feature_oracle.solve(MATRIX, prior, items, objective), 1e-9)


def test_fold_in_has_the_same_bits_in_any_batch() -> None:
    _, items = _tables(20)
    prior = np.random.default_rng(3).normal(size=(40, 20)).astype(np.float32)
    source = CpuBackend(2).source(items.astype(np.float32), AlsParams(20, linear_solver="cholesky"))
    objective = Objective.of(*OBJECTIVES[2])
    whole = source.solve(MATRIX, objective, prior=prior)
    for row in range(40):
        one = source.solve(MATRIX[row], objective, prior=prior[row : row + 1])
        np.testing.assert_array_equal(one[0], whole[row])


def test_a_regression_by_cg_equals_a_direct_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    matrix, lam = sparse.random_array((80, 30), density=0.2, rng=rng, format="csr"), rng.random(80)
    sums = rng.normal(size=(30, 4))
    direct = Regression(matrix, lam, 0.1).weights(sums)
    monkeypatch.setattr("tpu_als.engine.features._MOST_DIRECT", 0)
    np.testing.assert_allclose(Regression(matrix, lam, 0.1).weights(sums), direct, rtol=1e-6)
    monkeypatch.setattr("tpu_als.engine.features._MOST_STEPS", 1)
    with pytest.warns(DataWarning, match="30 features stopped after 1 steps"):
        Regression(matrix, lam, 0.1).weights(sums)


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_a_singular_regression_gives_the_same_products(share: float) -> None:
    rng = np.random.default_rng(0)
    half = rng.normal(size=(80, 3)) * (rng.random((80, 3)) < max(share, 0.3))
    matrix = sparse.csr_matrix(np.hstack([half, half, np.zeros((80, 2))]))
    table = half @ rng.normal(size=(3, 4))
    weights = Regression(matrix, np.ones(80), 0.0).weights(matrix.T @ table)
    np.testing.assert_allclose(matrix @ weights, table, atol=1e-6)
