"""Small fits by XLA's programs, with long rows and two rungs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import sparse

from tpu_als.engine import als, layout
from tpu_als.engine.data import AlsParams
from tpu_als.engine.features import Features
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend, placing
from tpu_als.engine.xla.data import XlaData
from tpu_als.engine.xla.mesh import DeviceMesh


def small_fit(
    shape: tuple[int, int], chunk: int, params: AlsParams, mesh: DeviceMesh, kind: str
) -> tuple[XlaData, list[np.ndarray]]:
    """The data, and the tables after two iterations and the loss.

    `kind` is "implicit", "ials", "features" (of the items) or "zero weights".
    """
    chances = np.random.default_rng(0).random(shape)
    dense = np.where(chances < np.linspace(0.1, 0.9, shape[0])[:, None], chances, 0)
    matrix = sparse.csr_matrix(dense.astype(np.float32))
    objective = Objective.of("ials" if kind == "ials" else "implicit", 3.0, 2.0)
    if kind == "zero weights":
        objective, matrix = Objective.of("implicit", 3.0, 1.0), matrix.sign()
    planned = placing.make_plan

    def small(*args: object) -> layout.Plan:
        return dataclasses.replace(planned(*args), lengths=(8, 16), chunk=chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "make_plan", small)
        data = backend.place(matrix, params, mesh)
    if kind == "features":
        rng = np.random.default_rng(1)
        given = sparse.random_array((shape[1], 4), density=0.5, rng=rng)
        features = Features(sparse.csr_matrix(given, dtype=np.float32), 1.0, 2.0)
        data = als.with_features(data, item_features=features)
    state = als.draw(data, 0, 0.1, normal=True)
    for _ in range(2):
        state, failed = als.epoch(state, data, objective, 1.0)
        assert failed == (0, 0)
    tables = [als.user_factors(state, data), als.item_factors(state, data)]
    return data, [*tables, np.array(als.loss(state, data, objective))]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], dtype: str) -> None:
    """Tables and losses differ by the rounding of products only."""
    tolerance = 2e-2 if dtype == "bfloat16" else 2e-4
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one.astype(np.float32), other.astype(np.float32), rtol=tolerance, atol=tolerance
        )
