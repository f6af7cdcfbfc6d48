"""Parameters and weights near the limits of float32, and systems without any ridge."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import oracle
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import ModelFitError, TPUAlternatingLeastSquares
from tpu_als.engine import als, layout
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.data import AlsParams, Data
from tpu_als.engine.objective import Objective, solver_for
from tpu_als.engine.xla import backend, placing
from tpu_als.engine.xla.mesh import device_mesh

K = 4
COUNTS = random_counts(40, 30, density=0.3, negatives=True, seed=2)
# how rows are solved: by compiled loops, by XLA whole, by XLA as long rows of blocks
WAYS = ["loops", "rungs", pytest.param("long rows", marks=pytest.mark.slow)]


def _data(way: str, monkeypatch: pytest.MonkeyPatch, solver: str = "cg", steps: int = 8) -> Data:
    if way == "long rows":
        planned = placing.make_plan

        def small(*args: Any) -> layout.Plan:
            return dataclasses.replace(planned(*args), lengths=(4,), chunk=8)

        monkeypatch.setattr(placing, "make_plan", small)
    params = AlsParams(K, "float32", solver, steps)
    if way == "loops":
        return CpuBackend(1).place(COUNTS, params)
    data = backend.place(COUNTS, params, device_mesh(1, num_threads=1))
    assert bool(len(data.users.rows.long)) == (way == "long rows")
    return data


def _tables() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [0.5 * rng.normal(size=(n, K)).astype(np.float32) for n in COUNTS.shape]


def _half_epoch(data: Data, objective: oracle.Objective) -> tuple[np.ndarray, float]:
    """The users solved against the items, and the loss then."""
    state, ours = als.start(data, *_tables()), Objective.of(*objective)
    users = als.half_epoch(*state, data, ours, target="users")
    state = als.AlsState(users, state.items)
    return als.user_factors(state, data), als.loss(state, data, ours)


@pytest.mark.parametrize(
    ("objective", "rel", "atol"),
    [
        (oracle.Objective("implicit", 1e10, 40.0), 1e-5, 0),
        (oracle.Objective("implicit", 1e17, 40.0), 1e-5, 0),
        (oracle.Objective("implicit", 1e30, 40.0), 0, 1e-25),
        (oracle.Objective("implicit", 3e38, 40.0), 0, 1e-30),
        (oracle.Objective("implicit", 1e-38, 40.0), 1e-3, 0),
        (oracle.Objective("ials", 0.01, 40.0, 1e10), 1e-5, 0),
        (oracle.Objective("ials", 0.01, 40.0, 1e30), 0, 1e-25),
        (oracle.Objective("ials", 0.1, 40.0, 1e-38), 5e-3, 0),
        (oracle.Objective("ials", 0.01, 1e-10, 1.0), 1e-5, 0),
        (oracle.Objective("ials", 0.01, 1e36, 1e36), 1e-3, 0),
        (oracle.Objective("ials", 0.01, 40.0, 1.0, 20), 0, 1e-20),
        (oracle.Objective("ials", 0.01, 40.0, 1.0, 50), 0, 1e-30),
        (oracle.Objective("ials", 0.0, 40.0, 1.0, 50), 1e-3, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_cg_solves_at_the_limits_of_float32(
    way: str,
    objective: oracle.Objective,
    rel: float,
    atol: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As "cholesky" does: no product overflows, and a row that must vanish does."""
    data = _data(way, monkeypatch)
    users, loss = _half_epoch(data, objective)
    expected = oracle.half_epoch(COUNTS, _tables()[1], objective)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(users, expected, rtol=0, atol=rel * scale + atol)
    assert np.isfinite(loss)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alpha", [1e20, 1e36])
def test_a_step_of_cg_lowers_the_loss_whatever_the_weights(
    way: str, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside such weights the diagonal is nothing, so that CG is not preconditioned."""
    losses = []
    for steps in (1, 3):
        data = _data(way, monkeypatch, steps=steps)
        losses.append(_half_epoch(data, oracle.Objective("ials", 0.01, alpha, 1.0))[1])
        monkeypatch.undo()
    best = _half_epoch(
        _data("rungs", monkeypatch, "cholesky"), oracle.Objective("ials", 0.01, alpha)
    )
    assert np.isfinite(losses).all()
    assert losses[0] > losses[1] > best[1] * (1 - 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["implicit", "ials"])
@pytest.mark.parametrize("ridge", [0.0, 1e-45, 1e-30])
def test_cg_without_a_diagonal_makes_progress(
    way: str, name: str, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = oracle.Objective(name, ridge, 40.0, 0.0)
    data = _data(way, monkeypatch, steps=3)
    before = als.loss(als.start(data, *_tables()), data, Objective.of(*objective))
    users, after = _half_epoch(data, objective)
    assert np.isfinite(users).all() and after < before / 2


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("objective", ["implicit", "ials"])
@pytest.mark.parametrize("ridge", [0.0, 1e-30])
def test_without_a_ridge_or_other_cells_fit_solves_exactly(
    objective: str, ridge: float, native: bool
) -> None:
    """Systems are singular, as a row may have fewer entries than factors: least norm, near zero."""
    settings = dict(
        factors=6, alpha=3.0, regularization=ridge, unobserved_weight=0.0, iterations=1,
        objective=objective, random_state=0, devices=1, use_native=native, dtype=np.float64,
    )  # fmt: skip
    matrix = abs(COUNTS)
    start = np.random.default_rng(1).normal(size=(30, 6))
    found = []
    for solver in ("cg", "cholesky"):
        model = TPUAlternatingLeastSquares(**settings, linear_solver=solver)
        model.user_factors, model.item_factors = np.zeros((40, 6)), start
        found.append(model.fit(matrix, show_progress=False).user_factors)
    np.testing.assert_array_equal(*found)
    exact = oracle.half_epoch(matrix, start, oracle.Objective(objective, 0.0, 3.0, 0.0))
    rows, columns = matrix.nonzero()
    ours, theirs = ((users[rows] * start[columns]).sum(axis=1) for users in (found[0], exact))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_the_solver_is_direct_only_where_the_diagonal_is_nothing() -> None:
    for objective, expected in (
        (Objective.of("ials", 0.0, 1.0, 0.0), "cholesky"),
        (Objective.of("ials", 1e-9, 40.0, 1e-9), "cholesky"),
        (Objective.of("ials", 1e-3, 40.0, 0.0), "cg"),
        (Objective.of("ials", 0.0, 40.0, 1e-3), "cg"),
    ):
        assert solver_for("cg", objective) == expected


@pytest.mark.parametrize("value", [1e30, 3e38])
def test_a_fold_in_near_the_limit_does_not_depend_on_the_batch(value: float) -> None:
    """With alpha 40 the larger one is above float32: float64 on the host has it, for any batch."""
    model = TPUAlternatingLeastSquares(factors=4, alpha=40.0, random_state=0, iterations=2)
    model.fit(abs(COUNTS), show_progress=False)
    rows = sparse.csr_matrix(abs(COUNTS)[:12], copy=True)
    rows.data[rows.indptr[3]] = value
    many = model.recalculate_user(np.arange(12), rows)
    one = model.recalculate_user(3, rows[3])
    # Beside such a weight no other counts, in any precision: the prediction is 1, the rest is free.
    item = model.item_factors[rows.indices[rows.indptr[3]]]
    np.testing.assert_allclose([many[3] @ item, one @ item], 1, atol=1e-3)
    np.testing.assert_allclose(many[4], model.recalculate_user(4, rows[4]), rtol=0, atol=1e-3)


def test_an_overflow_in_fit_says_what_to_do() -> None:
    matrix = COUNTS.copy()
    matrix.data[0] = 3e38
    for native in (False, True):
        model = TPUAlternatingLeastSquares(factors=4, iterations=1, alpha=40.0, use_native=native)
        with pytest.raises(
            ModelFitError, match="user rows.*too large for the dtype.*smaller alpha"
        ):
            model.fit(matrix, show_progress=False)
