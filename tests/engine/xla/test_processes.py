"""The same tables and answers from one process and from several, from a matrix and from shards."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from matrices import random_counts

from tpu_als.shards import write_shards

CASES: list[dict[str, Any]] = [
    {"shards": False, "table_layout": "sharded"},
    {"shards": True, "table_layout": "sharded"},
    {"shards": False, "table_layout": "replicated", "dtype": "bfloat16", "over_relaxation": 1.3},
    {"shards": False, "table_layout": "sharded", "early_stopping": True, "alpha": 40.0},
    {"shards": False, "table_layout": "sharded", "features": True},
    {"shards": False, "table_layout": "replicated", "features": True, "objective": "ials"},
]
# processes, and devices of each
TEAMS = [(1, 8), (2, 2), (4, 1)]


def _run(
    team: tuple[int, int], folder: Path, cases: list[dict[str, Any]] = CASES
) -> list[list[dict[str, np.ndarray]]]:
    """For every case what each process found."""
    running = processes.start([str(folder), json.dumps(cases)], *team)
    output = processes.finish(running)
    assert all(process.returncode == 0 for process in running), "\n".join(output)
    return [
        [dict(np.load(folder / f"case{case}-process{p}.npz")) for p in range(team[0])]
        for case in range(len(cases))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_shards(random_counts(90, 60, seed=5), folder / "shards", n_shards=4)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, np.ndarray]]:
    """What a single process with a single device finds."""
    return [found[0] for found in _run((1, 1), folder)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "team", [*TEAMS[:2], pytest.param(TEAMS[2], marks=pytest.mark.nightly)], ids=str
)
def test_several_processes_give_the_results_of_one(
    team: tuple[int, int], folder: Path, alone: list[dict[str, np.ndarray]]
) -> None:
    for case, every, expected in zip(CASES, _run(team, folder), alone, strict=True):
        for found in every[1:]:
            for name, value in found.items():
                np.testing.assert_array_equal(value, every[0][name], err_msg=name)
        found = every[0]
        bound = 0.05 if case.get("dtype") == "bfloat16" else 1e-4
        for name in ("users", "items", "folded", "pairs", "scores", "norms", "gramian"):
            largest = np.abs(expected[name]).max()
            np.testing.assert_allclose(
                found[name], expected[name], rtol=0, atol=bound * largest, err_msg=name
            )
        if "features" in case:
            np.testing.assert_allclose(found["embedded"], expected["embedded"], rtol=0, atol=bound)
            np.testing.assert_allclose(found["items"][[2, 41]], found["embedded"][[2, 41]])
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=bound)
        assert found["quality"] == pytest.approx(expected["quality"], abs=0.02)
        np.testing.assert_array_equal(found["near"][:, 0], [3, 4])
        if bound < 0.01:
            for name in ("ids", "ids_again", "near"):
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others_and_a_restart_resumes(
    victim: int, folder: Path, tmp_path: Path
) -> None:
    case: dict[str, Any] = {"shards": True, "table_layout": "sharded", "iterations": 6}
    saved = {**case, "checkpoint_dir": str(tmp_path / "saved")}
    running = processes.start([str(folder), json.dumps([{**saved, "kill": [victim, 3]}])], 2)
    output = processes.finish(running, 240)
    assert running[victim].returncode == -signal.SIGKILL
    assert running[1 - victim].returncode != 0
    # the process that keeps the others' addresses takes them with it, if JAX is quicker than we
    assert "lost touch with another one" in output[1 - victim] or victim == 0
    assert "another" in output[1 - victim] or "coordination service" in output[1 - victim]
    if victim == 0:
        return  # a restart is the same whoever was lost
    uninterrupted, _ = _run((2, 1), folder, [case])[0]
    elsewhere = shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    for found in _run((2, 1), folder, [saved])[0]:
        assert len(found["loss"]) == 6
        for name in ("users", "items", "loss"):
            np.testing.assert_array_equal(found[name], uninterrupted[name], err_msg=name)
    found = _run((1, 4), folder, [{**saved, "checkpoint_dir": str(elsewhere)}])[0][0]
    for name in ("users", "items", "loss"):
        largest = np.abs(uninterrupted[name]).max()
        np.testing.assert_allclose(found[name], uninterrupted[name], rtol=0, atol=1e-4 * largest)
