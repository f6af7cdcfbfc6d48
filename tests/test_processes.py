"""The same tables and answers from one process and from several, from a matrix and from shards."""

from __future__ import annotations

import json
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
]
# processes, and devices of each
TEAMS = [(1, 8), (2, 2), (4, 1)]


def _run(team: tuple[int, int], folder: Path) -> list[list[dict[str, np.ndarray]]]:
    """For every case what each process found."""
    running = processes.start([str(folder), json.dumps(CASES)], *team)
    output = processes.finish(running)
    assert all(process.returncode == 0 for process in running), "\n".join(output)
    return [
        [dict(np.load(folder / f"case{case}-process{p}.npz")) for p in range(team[0])]
        for case in range(len(CASES))
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
@pytest.mark.parametrize("team", TEAMS, ids=str)
def test_a_team_finds_what_one_finds(
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
        np.testing.assert_allclose(found["loss"], expected["loss"], rtol=bound)
        assert found["quality"] == pytest.approx(expected["quality"], abs=0.02)
        np.testing.assert_array_equal(found["near"][:, 0], [3, 4])
        if bound < 0.01:
            for name in ("ids", "ids_again", "near"):
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
