"""Kills processes that save a model, and counts files and loads: ``saving_worker.py DIR KILLS``."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from tpu_als.storage import model_file

STATES = [np.full((20_000, 8), value, np.float32) for value in (1, 2)]


def save(path: Path, number: int) -> None:
    """Save two states alternately until killed."""
    while True:
        number += 1
        model_file.save_npz(path, {"factors": number % 2, "user_factors": STATES[number % 2]})


def main(folder: Path, kills: int) -> None:
    """Print how many loads gave one of the states, and how many files remain."""
    path, chance, good, most = folder / "model.npz", random.Random(0), 0, 0
    model_file.save_npz(path, {"factors": 0, "user_factors": STATES[0]})
    for number in range(kills):
        child = os.fork()
        if not child:
            save(path, number)
        time.sleep(chance.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = model_file.load_npz(path)
        good += np.array_equal(found["user_factors"], STATES[found["factors"]])
        most = max(most, len(os.listdir(folder)))
    model_file.save_npz(path, {"factors": 0, "user_factors": STATES[0]})
    sys.stdout.write(f"{good} {most} {len(os.listdir(folder))}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
