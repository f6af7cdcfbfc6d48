"""ALS over arrays, without the estimator: pure functions for one CPU, one accelerator, or a pod.

`choose` picks a `Backend` for `Wishes`. Its `place` lays out a CSR matrix for `AlsParams`; then
`start` or `draw`, `epoch` and `loss` work on the laid-out `Data` with an `Objective`, and
`user_factors` and `item_factors` copy the tables out. `Backend.catalog` ranks a table, and
`Backend.source` solves new rows against one.

Examples
--------
>>> import numpy as np
>>> from scipy.sparse import csr_matrix
>>> from tpu_als import engine
>>> counts = csr_matrix(np.array([[3, 1, 0, 0], [1, 4, 1, 0], [0, 0, 2, 5]], np.float32))
>>> backend = engine.choose(engine.Wishes(num_threads=1))
>>> data = backend.place(counts, engine.AlsParams(factors=2))
>>> state = engine.draw(data, seed=0, scale=0.01, normal=False)
>>> objective = engine.Objective.of("implicit", regularization=0.1, alpha=10)
>>> for _ in range(3):
...     state, failed = engine.epoch(state, data, objective)
>>> engine.user_factors(state, data).shape, failed
((3, 2), (0, 0))
"""

from __future__ import annotations

from tpu_als.engine.als import (
    AlsState,
    draw,
    epoch,
    half_epoch,
    item_factors,
    loss,
    start,
    user_factors,
)
from tpu_als.engine.backends import Backend, Catalog, Source
from tpu_als.engine.choice import Wishes, choose
from tpu_als.engine.data import AlsParams, Data
from tpu_als.engine.objective import Objective

__all__ = [
    "AlsParams",
    "AlsState",
    "Backend",
    "Catalog",
    "Data",
    "Objective",
    "Source",
    "Wishes",
    "choose",
    "draw",
    "epoch",
    "half_epoch",
    "item_factors",
    "loss",
    "start",
    "user_factors",
]


def __dir__() -> list[str]:
    return sorted(__all__)
