"""One of several processes that fit together; started by `processes.py`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares, enable_compilation_cache
from tpu_als.engine import layout
from tpu_als.shards import open_shards

SETTINGS = dict(factors=8, alpha=4.0, regularization=0.1, iterations=3, random_state=0)
USERS = np.array([5, 0, 89])


def join() -> None:
    """Set devices and connect to the other processes, as a user's program does."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))
    enable_compilation_cache(os.environ["JAX_COMPILATION_CACHE_DIR"])
    count = int(os.environ["PROCESSES"])
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{os.environ['PORT']}",
            num_processes=count,
            process_id=int(os.environ["PROCESS"]),
            heartbeat_timeout_seconds=20,
            shutdown_timeout_seconds=20,
        )


def fitted(case: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Fit, and use the tables on the devices before they are read."""
    counts = random_counts(90, 60, seed=5)
    features: dict[str, Any] = {}
    if case.pop("features", False):
        counts = without_entries(counts)
        features = {
            f"{side}_features": random_counts(n, 5, seed=n)
            for side, n in (("user", 90), ("item", 60))
        }
    data = open_shards(folder / "shards") if case.pop("shards") else counts
    killed = case.pop("kill", None)

    def kill(iteration: int, seconds: float, loss: float | None) -> None:
        if [int(os.environ["PROCESS"]), iteration] == killed:
            os.kill(os.getpid(), signal.SIGKILL)

    model = TPUAlternatingLeastSquares(**{**SETTINGS, "calculate_training_loss": True, **case})
    model.fit(data, show_progress=False, callback=kill, **features)
    of_users = features.get("user_features")
    some_features = None if of_users is None else of_users[:11]
    found = {"loss": model.history_["loss"], "norms": model.item_norms, "gramian": model.YtY}
    found["folded"] = model.transform(counts[:11], some_features)
    if features:
        found["embedded"] = model.embed_items(features["item_features"])
    found["pairs"] = model.score_pairs(USERS, USERS % 7)
    found["ids"], found["scores"] = model.recommend(USERS, counts[USERS], N=4)
    found["near"], _ = model.similar_items([3, 4], N=3)
    found["quality"] = model.score(counts, user_features=of_users)
    found["users"], found["items"] = model.user_factors, model.item_factors
    # again, from the copies on the host
    found["ids_again"], _ = model.recommend(USERS, counts[USERS], N=4)
    return {name: np.asarray(value) for name, value in found.items()}


def without_entries(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """The matrix with some empty rows and columns."""
    dense = counts.toarray()
    dense[[8, 70]], dense[:, [2, 41]] = 0, 0
    return sparse.csr_matrix(dense)


def main() -> None:
    """Run all cases, and write the results of this process."""
    folder = Path(sys.argv[1])
    join()
    layout.LONGEST = 16  # some rows are long, so the processes must add their sums
    for number, case in enumerate(json.loads(sys.argv[2])):
        found = fitted(case, folder)
        np.savez(folder / f"case{number}-process{os.environ['PROCESS']}.npz", **found)


if __name__ == "__main__":
    main()
