"""Trains with checkpoints in one or several processes. `processes.py` starts it; tests kill it.

Arguments: the directory of the checkpoints, the iterations to reach, and a file for the tables.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matrices import random_counts
from worker import join

from tpu_als.engine import als
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend
from tpu_als.engine.xla.data import XlaData
from tpu_als.engine.xla.mesh import device_mesh
from tpu_als.training.checkpoint import Checkpoints, Saved
from tpu_als.training.checkpoint_reader import Reader

SETTINGS = {"alpha": 2.0, "regularization": 0.5}


def begin(n_shards: int) -> tuple[XlaData, als.AlsState]:
    """Place a matrix on all devices, and make initial tables."""
    matrix = random_counts(70, 50, seed=3)
    rng = np.random.default_rng(4)
    tables = (rng.normal(0, 0.1, (n, 6)).astype(np.float32) for n in matrix.shape)
    mesh = device_mesh(None, num_threads=n_shards)
    data = backend.place(matrix, AlsParams(6), mesh, with_digest=True)
    return data, als.start(data, *tables)


def fail_once() -> None:
    """Make the first read of a table fail, as in a process whose part is damaged."""
    read, calls = Reader._arrays, []

    def failing(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError("this part is damaged")
        return read(*arguments)

    Reader._arrays = failing


def main() -> None:
    """Resume, train, and write the tables and the iteration at which training resumed."""
    directory, last, result = sys.argv[1:]
    join()
    if os.environ.get("UNREADABLE") == os.environ["PROCESS"]:
        fail_once()
    data, state = begin(int(os.environ["DEVICES"]))
    objective = Objective.of("implicit", SETTINGS["regularization"], SETTINGS["alpha"])
    history: dict[str, list[float]] = {"loss": []}
    begun = 0
    with Checkpoints(directory) as checkpoints:
        resumed = checkpoints.restore(SETTINGS, data)
        if resumed is not None:
            state, begun, history = resumed.state, resumed.iteration, resumed.history
        for iteration in range(begun, int(last)):
            state, _ = als.epoch(state, data, objective)
            history["loss"].append(als.loss(state, data, objective))
            checkpoints.save(Saved(state, iteration + 1, history), data, SETTINGS)
    tables = als.user_factors(state, data), als.item_factors(state, data)
    if os.environ["PROCESS"] == "0":
        found = {"users": tables[0], "items": tables[1], "loss": history["loss"], "begun": begun}
        np.savez(Path(result), **found)


if __name__ == "__main__":
    main()
