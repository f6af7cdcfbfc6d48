"""Checkpoints of training: what comes back, on which layout, and after which accident."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import processes
import pytest
from matrices import random_counts

from tpu_als import als, layout, placing, relayout, solve
from tpu_als.als import AlsState
from tpu_als.checkpoint import FOLDER, FORMAT, Checkpoints, Resumed
from tpu_als.mesh import Workplace, workplace
from tpu_als.placing import AlsParams, Data

pytest.importorskip("orbax.checkpoint")

# devices, threads, layout of the source table
PLACES = {
    "one": (1, 1, "auto"),
    "threads": (1, 2, "auto"),
    "two": (2, 0, "sharded"),
    "three": (3, 0, "replicated"),
    "four": (4, 0, "sharded"),
}
SETTINGS = {"alpha": 2.0, "shape": (3, 4), "objective": "implicit", "exponent": None}
OBJECTIVE = solve.objective("implicit", 0.5, 2.0)
HISTORY = {"seconds": [0.1, 1 / 3], "loss": [float("nan"), 1e-300]}


@pytest.fixture(scope="module")
def placed() -> Any:
    """A matrix, with rows in several rungs and long ones, on any of the places."""
    matrix, made = random_counts(90, 40, density=0.3, seed=2), {}
    planned = placing.make_plan

    def small(*args: object, **options: object) -> layout.Plan:
        return dataclasses.replace(planned(*args, **options), lengths=(8, 16), chunk=32)

    def get(name: str, dtype: str = "float32") -> Data:
        if (name, dtype) not in made:
            devices, threads, table_layout = PLACES[name]
            place = workplace(devices, num_threads=threads, table_layout=table_layout)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(placing, "make_plan", small)
                made[name, dtype] = placing.place(matrix, AlsParams(7, dtype=dtype), place)
            assert len(made[name, dtype].users.rows.long) > 0
            assert len(made[name, dtype].users.rows.rungs) == 2
        return made[name, dtype]

    return get


def _start(data: Data, seed: int = 0) -> AlsState:
    rng = np.random.default_rng(seed)
    return als.start(data, rng.normal(size=(90, 7)), rng.normal(size=(40, 7)))


def _rows(state: AlsState, data: Data) -> list[np.ndarray]:
    return [als.user_factors(state, data), als.item_factors(state, data)]


def _save(directory: Path, data: Data, iteration: int = 1, seed: int = 0, **extra: Any) -> AlsState:
    state = _start(data, seed)
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.save(iteration, state, data, SETTINGS, HISTORY, extra)
    return state


def _restore(directory: Path, data: Data, **changed: Any) -> Resumed | None:
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore({**SETTINGS, **changed}, data)


def _steps(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / FOLDER).iterdir())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ["threads", "four"])
def test_the_same_layout_has_the_same_bits(
    name: str, dtype: str, placed: Any, tmp_path: Path
) -> None:
    data = placed(name, dtype)
    best = np.arange(6, dtype=dtype if dtype == "float64" else "float32").reshape(2, 3)
    state = _save(tmp_path, data, 2, best=best)
    found = _restore(tmp_path, data)
    assert found is not None and found.iteration == 2
    np.testing.assert_equal(found.history, HISTORY)
    assert list(found.extra) == ["best"] and found.extra["best"].dtype == best.dtype
    np.testing.assert_array_equal(found.extra["best"], best)
    pairs = zip(jax.tree.leaves(found.state), jax.tree.leaves(state), strict=True)
    for ours, saved in pairs:
        assert (ours.shape, ours.dtype, ours.sharding) == (saved.shape, saved.dtype, saved.sharding)
        assert np.asarray(ours).tobytes() == np.asarray(saved).tobytes()


@pytest.mark.parametrize("name", PLACES)
def test_any_other_layout_has_the_same_rows(name: str, placed: Any, tmp_path: Path) -> None:
    saved = _rows(_save(tmp_path, placed(name)), placed(name))
    for other in PLACES:
        data = placed(other)
        found = _restore(tmp_path, data)
        assert found is not None
        for ours, expected in zip(_rows(found.state, data), saved, strict=True):
            np.testing.assert_array_equal(ours, expected)
        fresh = _start(data)
        # as `start` would have placed them, pad slots and all: a later iteration compiles nothing
        for ours, own in zip(*map(jax.tree.leaves, (found.state, fresh)), strict=True):
            assert (ours.shape, ours.dtype, ours.sharding) == (own.shape, own.dtype, own.sharding)
            np.testing.assert_array_equal(ours, own)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_rows_travel_in_pieces(
    dtype: str, placed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = _rows(_save(tmp_path, placed("three", dtype)), placed("three", dtype))
    data, sizes = placed("two", dtype), []
    gather = Workplace.gather_processes

    def counting(place: Workplace, values: np.ndarray) -> np.ndarray:
        sizes.append(values.nbytes)
        return gather(place, values)

    monkeypatch.setattr(Workplace, "gather_processes", counting)
    monkeypatch.setattr(relayout, "_PIECE_BYTES", 1000)
    found = _restore(tmp_path, data)
    assert found is not None and len(sizes) > 12 and max(sizes) <= 1000
    for ours, expected in zip(_rows(found.state, data), saved, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("name", ["threads", "four"])
def test_training_goes_on_exactly(name: str, placed: Any, tmp_path: Path) -> None:
    data = placed(name)
    state = _start(data)
    with Checkpoints(tmp_path, every=2) as checkpoints:
        for iteration in range(1, 6):
            state, _ = als.epoch(state, data, OBJECTIVE)
            # training runs on while this is being written
            is_saved = checkpoints.save(iteration, state, data, SETTINGS, HISTORY)
            assert is_saved == (iteration % 2 == 0)
    found = _restore(tmp_path, data)
    assert found is not None and found.iteration == 4
    resumed, _ = als.epoch(found.state, data, OBJECTIVE)
    for ours, expected in zip(_rows(resumed, data), _rows(state, data), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_the_latest_few_are_kept(placed: Any, tmp_path: Path) -> None:
    data = placed("one")
    states = [_start(data, seed) for seed in range(6)]
    with Checkpoints(tmp_path, every=2) as checkpoints:
        save = [checkpoints.save(i, s, data, SETTINGS, {}) for i, s in enumerate(states)]
        assert save == [True, False] * 3
        assert checkpoints.save(5, states[5], data, SETTINGS, {}, force=True)
        assert not checkpoints.save(5, states[5], data, SETTINGS, {}, force=True)
    assert _steps(tmp_path) == ["2", "4", "5"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(6, states[0], data, SETTINGS, {})
    assert _steps(tmp_path) == ["6"]


def test_nothing_to_resume_from(placed: Any, tmp_path: Path) -> None:
    assert _restore(tmp_path / "new" / "folder", placed("one")) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": 3.0}, "settings: alpha was 2.0 and is 3.0. Give"),
        ({"shape": [3, 5]}, r"shape was \[3, 4\] and is \[3, 5\]"),
        (
            {"exponent": 1.0, "extra": 1},
            "exponent was None and is 1.0; extra was 'absent' and is 1",
        ),
    ],
)
def test_other_settings_are_refused(
    changed: dict[str, Any], message: str, placed: Any, tmp_path: Path
) -> None:
    _save(tmp_path, placed("one"))
    with pytest.raises(ValueError, match=message) as refused:
        _restore(tmp_path, placed("one"), **changed)
    assert str(tmp_path / FOLDER) in str(refused.value)
    assert _restore(tmp_path, placed("one"), shape=[3, 4]) is not None


def test_other_data_are_refused(placed: Any, tmp_path: Path) -> None:
    data = placed("one")
    _save(tmp_path, data)
    near, far = (
        dataclasses.replace(data, absolute_sum=data.absolute_sum * factor)
        for factor in (1 + 1e-8, 1 + 1e-5)
    )
    assert _restore(tmp_path, near) is not None
    with pytest.raises(ValueError, match="data: sum of absolute values was [0-9.]+ and is [0-9.]+"):
        _restore(tmp_path, far)
    # one user's entries for another's: the numbers of entries are the same
    matrix = random_counts(90, 40, density=0.3, seed=2)[np.r_[1:90, 0]]
    turned = placing.place(matrix, data.params, data.place)
    with pytest.raises(
        ValueError, match=r"data: entries per user \(digest\) was '\w+' and is '\w+'. G"
    ):
        _restore(tmp_path, turned)
    wider = placing.place(random_counts(90, 41), AlsParams(8), data.place)
    with pytest.raises(ValueError, match="factors was 7 and is 8; shape was .*entries was"):
        _restore(tmp_path, wider)


def test_a_later_format_is_refused(placed: Any, tmp_path: Path) -> None:
    _save(tmp_path, placed("one"))
    file = tmp_path / FOLDER / "1" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({**meta, "format": FORMAT + 1}))
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}.*up to {FORMAT}.*upgrade"):
        _restore(tmp_path, placed("one"))


@pytest.mark.parametrize("damage", ["meta", "users", "truncated"])
def test_a_damaged_checkpoint_says_what_to_do(damage: str, placed: Any, tmp_path: Path) -> None:
    data = placed("two")
    before = _save(tmp_path, data, 1, seed=1)
    _save(tmp_path, data, 2, seed=2)
    latest = tmp_path / FOLDER / "2"
    if damage == "truncated":
        files = [path for path in (latest / "users").rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
    else:
        shutil.rmtree(latest / damage)
    with pytest.raises(ValueError, match=f"{latest} cannot be read .*; remove it to resume from"):
        _restore(tmp_path, data)
    shutil.rmtree(latest)
    found = _restore(tmp_path, data)
    assert found is not None and found.iteration == 1
    np.testing.assert_array_equal(_rows(found.state, data)[0], _rows(before, data)[0])


def test_what_was_cut_short_is_removed_and_what_lies_beside_stays(
    placed: Any, tmp_path: Path
) -> None:
    for beside in ("7", "8.orbax-checkpoint-tmp", "model.npz"):
        (tmp_path / beside).mkdir()
    _save(tmp_path, placed("one"))
    shutil.copytree(tmp_path / FOLDER / "1", tmp_path / FOLDER / "2.orbax-checkpoint-tmp")
    found = _restore(tmp_path, placed("one"))
    assert found is not None and found.iteration == 1
    for iteration in range(2, 6):
        _save(tmp_path, placed("one"), iteration)
    assert _steps(tmp_path) == ["3", "4", "5"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["7", "8.orbax-checkpoint-tmp", "model.npz", FOLDER]


def test_arguments_are_checked_first(
    placed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in itertools.product(("every", "keep"), (0, 1.5, True)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number .* got {value}"):
            Checkpoints(tmp_path, **{"every": 1, name: value})
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file; give another path"):
        Checkpoints(tmp_path / "file")
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match=r"all processes of a job.* process \[0\] only"):
        _restore(tmp_path / "team", placed("one"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_may_be_relative(
    placed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _save(Path("runs") / ".." / "here", placed("one"))
    assert _steps(tmp_path / "here") == ["1"]


def test_without_orbax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r'pip install "tpu-als\[checkpoint\]"'):
        Checkpoints(tmp_path)


def test_a_failed_write_is_raised(placed: Any, tmp_path: Path) -> None:
    data = placed("one")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(SETTINGS, data) is None
    shutil.rmtree(tmp_path / FOLDER)
    (tmp_path / FOLDER).touch()
    with pytest.raises(OSError), checkpoints:
        checkpoints.save(1, _start(data), data, SETTINGS, {})


def test_no_traces_are_left(placed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    threads, options = set(threading.enumerate()), dict(jax.config.values)
    _save(tmp_path, placed("four"))
    assert _restore(tmp_path, placed("two")) is not None
    assert logging.getLogger().handlers == []
    for thread in set(threading.enumerate()) - threads:
        if not thread.daemon:
            thread.join(20)  # on its way out
            assert not thread.is_alive(), thread
    assert dict(jax.config.values) == options


def _train(directory: Path, last: int, result: Path, team: tuple[int, int]) -> dict[str, Any]:
    """Tables after so many iterations by a team of processes and devices of each."""
    arguments = [str(directory), str(last), str(result)]
    running = processes.start(arguments, *team, script="checkpoint_worker.py")
    output = processes.finish(running, 120)
    assert all(process.returncode == 0 for process in running), "\n".join(output)
    return dict(np.load(result))


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    delays = np.random.default_rng(0).uniform(0, 0.5, 3)
    directory, begun = tmp_path / "killed", 0
    for delay in delays:
        arguments = [str(directory), "1000000", str(tmp_path / "none.npz")]
        running = processes.start(arguments, 1, 2, script="checkpoint_worker.py")
        try:
            limit = time.monotonic() + 60
            while time.monotonic() < limit and begun >= _latest(directory):
                assert running[0].poll() is None, running[0].communicate()[0]
                time.sleep(0.01)
            time.sleep(delay)
            running[0].kill()
        finally:
            processes.finish(running, 10)
        assert _latest(directory) > begun
        begun = _latest(directory)
    found = _train(directory, begun + 3, tmp_path / "resumed.npz", (1, 2))
    expected = _train(tmp_path / "whole", begun + 3, tmp_path / "whole.npz", (1, 2))
    assert found.pop("begun") == begun and expected.pop("begun") == 0
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def _latest(directory: Path) -> int:
    if not (directory / FOLDER).is_dir():
        return 0
    return max((int(name) for name in _steps(directory) if name.isdigit()), default=0)


@pytest.mark.slow
def test_teams_hand_over_to_each_other(tmp_path: Path) -> None:
    """Two processes, then one with eight devices, then four with one each."""
    whole = _train(tmp_path / "whole", 4, tmp_path / "whole.npz", (2, 2))
    assert len(whole["loss"]) == 4
    first = _train(tmp_path / "team", 2, tmp_path / "first.npz", (2, 2))
    again = _train(tmp_path / "team", 2, tmp_path / "again.npz", (2, 2))
    moved = _train(tmp_path / "team", 2, tmp_path / "moved.npz", (1, 8))
    assert (first["begun"], again["begun"], moved["begun"]) == (0, 2, 2)
    for name in ("users", "items", "loss"):
        np.testing.assert_array_equal(again[name], first[name])
        np.testing.assert_array_equal(moved[name], first[name])
    _train(tmp_path / "team", 3, tmp_path / "third.npz", (1, 8))
    last = _train(tmp_path / "team", 4, tmp_path / "last.npz", (4, 1))
    assert last["begun"] == 3
    for name in ("users", "items", "loss"):
        np.testing.assert_allclose(last[name], whole[name], rtol=2e-3, atol=2e-4, err_msg=name)
