"""Checkpoints of training: what comes back, on which layout, and after which accident."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import logging
import os
import resource
import shutil
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import processes
import pytest
from matrices import random_counts

from tpu_als.engine import als, digests, layout
from tpu_als.engine.als import AlsState
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend, placing, relayout
from tpu_als.engine.xla.data import XlaData
from tpu_als.engine.xla.mesh import DeviceMesh, device_mesh
from tpu_als.exceptions import DataWarning
from tpu_als.training.checkpoint import FOLDER, FORMAT, Checkpoints, Saved

pytest.importorskip("orbax.checkpoint")

# devices, threads, layout of the source table
MESHES = {
    "one": (1, 1, "auto"),
    "threads": (1, 2, "auto"),
    "two": (2, 0, "sharded"),
    "three": (3, 0, "replicated"),
    "four": (4, 0, "sharded"),
}
SETTINGS = {"alpha": 2.0, "shape": (3, 4), "objective": "implicit", "exponent": None}
OBJECTIVE = Objective.of("implicit", 0.5, 2.0)
HISTORY = {"seconds": [0.1, 1 / 3], "loss": [float("nan"), 1e-300]}


@pytest.fixture(scope="module")
def placed() -> Any:
    """A matrix, with rows in several rungs and long ones, on any of the places."""
    matrix, made = random_counts(90, 40, density=0.3, seed=2), {}
    planned = placing.make_plan

    def small(*args: object, **options: object) -> layout.Plan:
        return dataclasses.replace(planned(*args, **options), lengths=(8, 16), chunk=32)

    def get(name: str, dtype: str = "float32") -> XlaData:
        if (name, dtype) not in made:
            devices, threads, table_layout = MESHES[name]
            mesh = device_mesh(devices, num_threads=threads, table_layout=table_layout)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(placing, "make_plan", small)
                made[name, dtype] = backend.place(
                    matrix, AlsParams(7, dtype=dtype), mesh, with_digest=True
                )
            assert len(made[name, dtype].users.rows.long) > 0
            assert len(made[name, dtype].users.rows.rungs) == 2
        return made[name, dtype]

    return get


def _start(data: XlaData, seed: int = 0) -> AlsState:
    rng = np.random.default_rng(seed)
    return als.start(data, rng.normal(size=(90, 7)), rng.normal(size=(40, 7)))


def _rows(state: AlsState, data: XlaData) -> list[np.ndarray]:
    return [als.user_factors(state, data), als.item_factors(state, data)]


def _save(
    directory: Path, data: XlaData, iteration: int = 1, seed: int = 0, **extra: Any
) -> AlsState:
    state = _start(data, seed)
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.save(Saved(state, iteration, HISTORY, extra), data, SETTINGS)
    return state


def _restore(directory: Path, data: XlaData, **changed: Any) -> Saved | None:
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore({**SETTINGS, **changed}, data)


def _runs(directory: Path) -> list[Path]:
    """Folders of all runs."""
    return sorted(path for path in (directory / FOLDER).iterdir() if path.is_dir())


def _run(directory: Path) -> Path:
    """The folder of the only run."""
    (run,) = _runs(directory)
    return run


def _steps(directory: Path) -> list[str]:
    return sorted(path.name for path in _run(directory).iterdir() if path.is_dir())


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


@pytest.mark.parametrize("name", MESHES)
def test_another_layout_reads_the_same_rows(name: str, placed: Any, tmp_path: Path) -> None:
    saved = _rows(_save(tmp_path, placed(name)), placed(name))
    for other in MESHES:
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
def test_rows_are_moved_in_pieces(
    dtype: str, placed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = _rows(_save(tmp_path, placed("three", dtype)), placed("three", dtype))
    data, sizes = placed("two", dtype), []
    gather = DeviceMesh.gather_processes

    def counting(mesh: DeviceMesh, values: np.ndarray) -> np.ndarray:
        sizes.append(values.nbytes)
        return gather(mesh, values)

    monkeypatch.setattr(DeviceMesh, "gather_processes", counting)
    monkeypatch.setattr(relayout, "_PIECE_BYTES", 1000)
    found = _restore(tmp_path, data)
    assert found is not None and len(sizes) > 12 and max(sizes) <= 1000
    for ours, expected in zip(_rows(found.state, data), saved, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("name", ["threads", pytest.param("four", marks=pytest.mark.slow)])
def test_resumed_training_is_exact(name: str, placed: Any, tmp_path: Path) -> None:
    data = placed(name)
    state = _start(data)
    with Checkpoints(tmp_path, every=2) as checkpoints:
        for iteration in range(1, 6):
            state, _ = als.epoch(state, data, OBJECTIVE)
            # training runs on while this is being written
            is_saved = checkpoints.save(Saved(state, iteration, HISTORY), data, SETTINGS)
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
        save = [checkpoints.save(Saved(s, i, {}), data, SETTINGS) for i, s in enumerate(states)]
        assert save == [True, False] * 3
        assert checkpoints.save(Saved(states[5], 5, {}), data, SETTINGS, force=True)
        assert not checkpoints.save(Saved(states[5], 5, {}), data, SETTINGS, force=True)
    assert _steps(tmp_path) == ["2", "4", "5"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(Saved(states[0], 6, {}), data, SETTINGS)
    assert _steps(tmp_path) == ["6"]


def test_resuming_logs_no_warning_and_changes_no_file(
    placed: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = placed("four")
    with caplog.at_level(logging.WARNING):
        _save(tmp_path, data)
        run = _run(tmp_path)
        (run / "notes.txt").touch()
        for name in ("007", "x1", "1x"):
            (run / name).mkdir()
        before = {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))}
        found = _restore(tmp_path, data)
    assert found is not None and found.iteration == 1
    assert [record.getMessage() for record in caplog.records] == []
    assert {path: path.stat().st_mtime_ns for path in (run, *run.rglob("*"))} == before


def test_nothing_to_resume_from(placed: Any, tmp_path: Path) -> None:
    assert _restore(tmp_path / "new" / "folder", placed("one")) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": 3.0}, "alpha was 2.0 and is 3.0"),
        ({"shape": [3, 5]}, "shape was [3, 4] and is [3, 5]"),
        (
            {"exponent": 1.0, "extra": 1},
            "exponent was None and is 1.0; extra was 'absent' and is 1",
        ),
    ],
)
def test_other_settings_are_another_run(
    changed: dict[str, Any],
    message: str,
    placed: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = placed("one")
    saved = _save(tmp_path, data)
    first = _run(tmp_path)
    with caplog.at_level(logging.INFO, logger="tpu_als"):
        assert _restore(tmp_path, data, **changed) is None
    assert f"the run {first.name} differs in: {message}" in caplog.text
    assert "started the run" in caplog.text and len(_runs(tmp_path)) == 2
    with caplog.at_level(logging.INFO, logger="tpu_als"):
        found = _restore(tmp_path, data, shape=[3, 4])
    assert found is not None and f"resumed from {first / '1'}" in caplog.text
    np.testing.assert_array_equal(_rows(found.state, data)[0], _rows(saved, data)[0])


def _rewired(matrix: Any) -> Any:
    """Two entries of two rows change their columns; lengths and sums stay."""
    dense = matrix.toarray()
    for first, second in itertools.combinations(range(len(dense)), 2):
        left = np.flatnonzero((dense[first] == 1) & (dense[second] == 0))
        right = np.flatnonzero((dense[second] == 1) & (dense[first] == 0))
        if len(left) and len(right):
            dense[[first, second], left[0]] = dense[[second, first], left[0]]
            dense[[first, second], right[0]] = dense[[second, first], right[0]]
            return type(matrix)(dense)
    raise AssertionError("there are no such rows")


def _values(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    def changed(matrix: Any) -> Any:
        new = matrix.copy()
        new.data = change(new.data).astype(np.float32)
        return new

    return changed


def _one(position: int, change: Callable[[np.float32], Any]) -> Callable[[Any], Any]:
    def at(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[position] = change(values[position])
        return values

    return _values(at)


ALTERED = {
    "signs": _values(lambda values: -values),
    "one sign": _one(17, lambda value: -value),
    "permuted values": _values(lambda values: values[::-1]),
    "two values swapped": _values(lambda values: np.r_[values[1::-1], values[2:]]),
    "rewired": _rewired,
    "the least change": _one(-1, lambda value: np.nextafter(value, np.float32(9))),
    "rows turned": lambda matrix: matrix[np.r_[1:90, 0]],
}


@pytest.mark.parametrize("name", ALTERED)
def test_other_data_are_another_run(name: str, tmp_path: Path) -> None:
    matrix, mesh = random_counts(90, 40, density=0.3, seed=2), device_mesh(1)
    matrix.data[:2] = 1, 2
    other = ALTERED[name](matrix)
    assert (other != matrix).nnz
    data, altered = (
        backend.place(each, AlsParams(7), mesh, with_digest=True) for each in (matrix, other)
    )
    _save(tmp_path, data)
    assert _restore(tmp_path, altered) is None
    assert _restore(tmp_path, data) is not None


def test_data_need_a_digest(tmp_path: Path) -> None:
    data = backend.place(random_counts(9, 5), AlsParams(2), device_mesh(1))
    with pytest.raises(ValueError, match=r"place\(..., with_digest=True\)"):
        _restore(tmp_path, data)


def test_a_later_format_is_refused(placed: Any, tmp_path: Path) -> None:
    _save(tmp_path, placed("one"))
    file = _run(tmp_path) / "1" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({**meta, "format": FORMAT + 1}))
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}.*up to {FORMAT}.*upgrade"):
        _restore(tmp_path, placed("one"))


def _largest(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", ["meta", "users", "truncated"])
def test_a_damaged_checkpoint_falls_back(damage: str, placed: Any, tmp_path: Path) -> None:
    data = placed("two")
    before = _save(tmp_path, data, 1, seed=1)
    _save(tmp_path, data, 2, seed=2)
    latest = _run(tmp_path) / "2"
    if damage == "truncated":
        largest = _largest(latest / "users")
        largest.write_bytes(largest.read_bytes()[:100])
    else:
        shutil.rmtree(latest / damage)
    named = latest / damage.replace("truncated", "users")
    with Checkpoints(tmp_path) as checkpoints:
        message = f"1 damaged .* from iteration 1: {named} "
        with pytest.warns(DataWarning, match=message) as warned:
            found = checkpoints.restore(SETTINGS, data)
        assert len(warned) == 1
        assert found is not None and found.iteration == 1
        np.testing.assert_array_equal(_rows(found.state, data)[0], _rows(before, data)[0])
        # what is trained again takes its place
        again = _start(data, 3)
        assert checkpoints.save(Saved(again, 2, HISTORY), data, SETTINGS)
    found = _restore(tmp_path, data)
    assert found is not None and found.iteration == 2
    np.testing.assert_array_equal(_rows(found.state, data)[1], _rows(again, data)[1])
    for step in ("1", "2"):
        shutil.rmtree(_run(tmp_path) / step / "items")
    run = _run(tmp_path)
    with pytest.raises(
        ValueError, match=f"none of the 2 checkpoints in {run} .* Remove that folder"
    ):
        _restore(tmp_path, data)


def _flipped(file: Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


@pytest.mark.parametrize(
    "count", [40, pytest.param(500, marks=pytest.mark.nightly)], ids=["few", "many"]
)
def test_a_flipped_bit_never_changes_restored_tables(
    count: int, placed: Any, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """Where one bit of the latest checkpoint is flipped: the same tables, or those before."""
    data, best, rng = placed("two"), np.arange(6.0), np.random.default_rng(0)
    for step in (1, 2):
        state = _start(data, step)
        with Checkpoints(tmp_path) as checkpoints:
            saved = Saved(state, step, HISTORY, {"best": best + step})
            checkpoints.save(saved, data, SETTINGS)
    run = _run(tmp_path)
    # By folder and size, because orbax names data files at random.
    files = sorted(
        (path for path in (run / "2").rglob("*") if path.stat().st_size and path.is_file()),
        key=lambda path: (path.parent, path.stat().st_size),
    )
    weights = np.sqrt([path.stat().st_size for path in files])
    saved = {step: _rows(_start(data, step), data) for step in (1, 2)}
    seen = {1: 0, 2: 0}
    for _ in range(count):
        file = files[rng.choice(len(files), p=weights / weights.sum())]
        sound = file.read_bytes()
        _flipped(file, rng)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", DataWarning)
            found = _restore(tmp_path, data)
        file.write_bytes(sound)
        assert found is not None
        step = found.iteration
        seen[step] += 1
        assert len([w for w in warned if w.category is DataWarning]) == (step == 1)
        np.testing.assert_array_equal(found.extra["best"], best + step)
        np.testing.assert_equal(found.history, HISTORY)
        for ours, expected in zip(_rows(found.state, data), saved[step], strict=True):
            np.testing.assert_array_equal(ours, expected)
    record_property("flips noticed, without effect", seen)
    assert seen[1] > count // 4


def _nested(file: Path) -> None:
    file.write_text("[" * 100_000 + "]" * 100_000)


def _meta(**changes: Any) -> Callable[[Path], None]:
    """Change the metadata, with a checksum that fits."""

    def change(step: Path) -> None:
        file = step / "meta" / "metadata"
        meta = json.loads(file.read_text()) | changes
        meta["checksum"] = digests.fields(meta)
        file.write_text(json.dumps(meta))

    return change


def _replaced(step: Path) -> None:
    shutil.rmtree(step)
    step.write_text("a file")


def _swapped(step: Path) -> None:
    (step / "users").rename(step / "other")
    (step / "items").rename(step / "users")
    (step / "other").rename(step / "items")


def _emptied(folder: str) -> Callable[[Path], None]:
    def empty(step: Path) -> None:
        for file in (step / folder).rglob("*"):
            if file.is_file():
                file.write_bytes(b"")

    return empty


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no metadata": lambda step: shutil.rmtree(step / "meta"),
    "no users": lambda step: shutil.rmtree(step / "users"),
    "no items": lambda step: shutil.rmtree(step / "items"),
    "no extra": lambda step: shutil.rmtree(step / "extra"),
    "nothing at all": lambda step: [shutil.rmtree(p) for p in step.iterdir() if p.is_dir()],
    "a file for metadata": lambda step: (shutil.rmtree(step / "meta"), (step / "meta").touch()),
    "a folder for metadata": lambda step: (
        (step / "meta" / "metadata").unlink(),
        (step / "meta" / "metadata").mkdir(),
    ),
    "metadata nested": lambda step: _nested(step / "meta" / "metadata"),
    "metadata empty": lambda step: (step / "meta" / "metadata").write_text(""),
    "metadata of text": lambda step: (step / "meta" / "metadata").write_text('"text"'),
    "metadata a list": lambda step: (step / "meta" / "metadata").write_text("[1, 2]"),
    "metadata binary": lambda step: (step / "meta" / "metadata").write_bytes(bytes(range(256))),
    "metadata without keys": lambda step: (step / "meta" / "metadata").write_text("{}"),
    "an old format": _meta(format="x"),
    "another run": _meta(run="0" * 16),
    "another iteration": _meta(iteration=7),
    "a table of 2**60 rows": _meta(
        slots={s: {"shapes": [[1 << 60, 7]], "slots": "x"} for s in ("users", "items")}
    ),
    "a table of -1 rows": _meta(
        slots={s: {"shapes": [[-1, 7]], "slots": "x"} for s in ("users", "items")}
    ),
    "shapes of text": _meta(slots={"users": {"shapes": "x"}, "items": {}}),
    "no slots": _meta(slots=None),
    "other checksums": _meta(checksums={"users": "0", "items": "0"}),
    "checksums of text": _meta(checksums={"users": "?", "items": "?"}),
    "another extra": _meta(extra={"other": "0"}),
    "users and items swapped": _swapped,
    "empty files of users": _emptied("users"),
    "empty files of items": _emptied("items"),
    "empty files of extra": _emptied("extra"),
    "no data of users": lambda step: _largest(step / "users").unlink(),
    "data of users truncated": lambda step: os.truncate(_largest(step / "users"), 50),
    "data of items are text": lambda step: _largest(step / "items").write_text("no data"),
    "tree of users nested": lambda step: _nested(step / "users" / "_METADATA"),
    "no tree of users": lambda step: (step / "users" / "_METADATA").write_text("{}"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_reported_without_much_memory(name: str, placed: Any, tmp_path: Path) -> None:
    data = placed("one")
    _save(tmp_path, data, 1, best=np.arange(3.0))
    DAMAGES[name](_run(tmp_path) / "1")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"checkpoints in {_run(tmp_path)} can be read: .*/1"):
        _restore(tmp_path, data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000


def test_two_trainings_of_one_run(placed: Any, tmp_path: Path) -> None:
    data = placed("one")
    with Checkpoints(tmp_path) as first, Checkpoints(tmp_path) as second:
        assert first.restore(SETTINGS, data) is None
        owner = f"host {socket.gethostname()}, process {os.getpid()}, since"
        for refused in (
            lambda: second.restore(SETTINGS, data),
            lambda: second.save(Saved(_start(data), 1, {}), data, SETTINGS),
        ):
            with pytest.raises(RuntimeError, match=rf"another fit \({owner}.* wait until it has"):
                refused()
        # another run may share the directory
        assert second.restore({**SETTINGS, "alpha": 1.0}, data) is None
        assert first.save(Saved(_start(data), 1, {}), data, SETTINGS)
    assert _restore(tmp_path, data) is not None


def test_without_locks_nothing_is_removed(
    placed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for alpha in range(6):
        _restore(tmp_path, placed("one"), alpha=alpha)
    assert len(_runs(tmp_path)) == 6
    assert "this file system has no locks" in caplog.text


def test_three_other_runs_stay(placed: Any, tmp_path: Path) -> None:
    data = placed("one")

    def alphas() -> set[int]:
        files = [path / "run.json" for path in _runs(tmp_path)]
        return {json.loads(file.read_text())["alpha"] for file in files if file.exists()}

    with Checkpoints(tmp_path) as running:
        running.restore({**SETTINGS, "alpha": 0}, data)
        kept = _run(tmp_path)
        (tmp_path / FOLDER / "mine").mkdir()
        (tmp_path / FOLDER / ("a" * 16)).mkdir()  # not ours: it has no run.json
        for alpha in range(1, 7):
            for path in _runs(tmp_path):
                age = path.stat().st_mtime - 10
                os.utime(path, (age, age))
            assert _restore(tmp_path, data, alpha=alpha) is None
        # the one that is open, the last, and three others
        assert alphas() == {0, 3, 4, 5, 6} and kept.is_dir()
    assert alphas() == {0, 4, 5, 6}
    assert (tmp_path / FOLDER / "mine").is_dir() and (tmp_path / FOLDER / ("a" * 16)).is_dir()
    locks = [path for path in (tmp_path / FOLDER).iterdir() if path.suffix == ".lock"]
    assert len(locks) == 4


def test_checkpoints_of_the_old_layout_stay(placed: Any, tmp_path: Path) -> None:
    _save(tmp_path, placed("one"), 3)
    for name in ("3", "12"):
        shutil.copytree(_run(tmp_path) / "3", tmp_path / "old" / FOLDER / name)
    with pytest.warns(DataWarning, match=r"2 checkpoints of an earlier version.* 3, 12:") as warned:
        assert _restore(tmp_path / "old", placed("one")) is None
    assert len(warned) == 1
    assert (tmp_path / "old" / FOLDER / "12" / "users").is_dir()


def test_fewer_iterations(placed: Any, tmp_path: Path) -> None:
    data = placed("one")
    for step in range(1, 6):
        _save(tmp_path, data, step, seed=step)
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(SETTINGS, data, at_most=4)
        assert found is not None and found.iteration == 4
        np.testing.assert_array_equal(_rows(found.state, data)[0], _rows(_start(data, 4), data)[0])
        assert checkpoints.restore(SETTINGS, data, at_most=2) is None
        # those of more iterations stay
        assert not checkpoints.save(Saved(_start(data), 1, {}), data, SETTINGS)
    assert _steps(tmp_path) == ["3", "4", "5"]


def test_incomplete_checkpoints_are_removed_and_other_files_stay(
    placed: Any, tmp_path: Path
) -> None:
    for beside in ("7", "8.orbax-checkpoint-tmp", "model.npz"):
        (tmp_path / beside).mkdir()
    _save(tmp_path, placed("one"))
    shutil.copytree(_run(tmp_path) / "1", _run(tmp_path) / "2.orbax-checkpoint-tmp")
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
        checkpoints.save(Saved(_start(data), 1, {}), data, SETTINGS)


def test_trainings_in_threads(placed: Any, tmp_path: Path) -> None:
    """Orbax mixes up the saves of two managers at a time, also in different directories."""
    data = placed("one")

    def train(number: int) -> None:
        settings = {**SETTINGS, "alpha": float(number)}
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.restore(settings, data) is None
            for iteration in range(1, 4):
                checkpoints.save(Saved(_start(data, number), iteration, {}), data, settings)
        with Checkpoints(tmp_path) as checkpoints:
            found = checkpoints.restore(settings, data)
            assert found is not None and found.iteration == 3

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(4)))


def test_a_failed_save_holds_up_no_other(placed: Any, tmp_path: Path) -> None:
    data = placed("one")
    checkpoints = Checkpoints(tmp_path / "a")
    assert checkpoints.restore(SETTINGS, data) is None
    shutil.rmtree(tmp_path / "a" / FOLDER)
    (tmp_path / "a" / FOLDER).touch()
    with pytest.raises(OSError), checkpoints:
        checkpoints.save(Saved(_start(data), 1, {}), data, SETTINGS)
    with Checkpoints(tmp_path / "b") as checkpoints:
        assert checkpoints.save(Saved(_start(data), 1, {}), data, SETTINGS)


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
    output = processes.finish(running, 600)
    assert all(process.returncode == 0 for process in running), "\n".join(output)
    return dict(np.load(result))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills", [5, pytest.param(200, marks=pytest.mark.nightly)], ids=["few", "many"]
)
def test_killed_at_any_moment(
    kills: int, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    delays = np.random.default_rng(0).uniform(0, 0.5, kills)
    directory, begun = tmp_path / "killed", 0
    for delay in delays:
        arguments = [str(directory), "1000000", str(tmp_path / "none.npz")]
        running = processes.start(arguments, 1, 2, script="checkpoint_worker.py")
        try:
            limit = time.monotonic() + 600  # ends a worker that hangs
            while time.monotonic() < limit and begun >= _latest(directory):
                assert running[0].poll() is None, running[0].communicate()[0]
                time.sleep(0.01)
            time.sleep(delay)
            running[0].kill()
        finally:
            processes.finish(running, 10)
        assert _latest(directory) > begun
        begun = _latest(directory)
    record_property("kills, iterations", [kills, begun])
    found = _train(directory, begun + 3, tmp_path / "resumed.npz", (1, 2))
    expected = _train(tmp_path / "whole", begun + 3, tmp_path / "whole.npz", (1, 2))
    assert found.pop("begun") == begun and expected.pop("begun") == 0
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def _latest(directory: Path) -> int:
    if not (directory / FOLDER).is_dir() or not _runs(directory):
        return 0
    return max((int(name) for name in _steps(directory) if name.isdigit()), default=0)


@pytest.mark.slow
def test_a_second_job_ends_at_once_and_the_lock_ends_with_its_owner(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "saved"), "1000000", str(tmp_path / "none.npz")]
    first = processes.start(arguments, 1, 2, script="checkpoint_worker.py")
    try:
        limit = time.monotonic() + 600  # ends a worker that hangs
        while time.monotonic() < limit and not _latest(tmp_path / "saved"):
            assert first[0].poll() is None, first[0].communicate()[0]
            time.sleep(0.01)
        second = processes.start(arguments, 2, 1, script="checkpoint_worker.py")
        output = processes.finish(second, 120)
        for process, text in zip(second, output, strict=True):
            assert process.returncode not in (0, None), text
            owner = f"host {socket.gethostname()}, process {first[0].pid}, since"
            assert f"another fit ({owner}" in text, text
        assert first[0].poll() is None
        first[0].kill()
    finally:
        processes.finish(first, 10)
    last = _latest(tmp_path / "saved")
    found = _train(tmp_path / "saved", last + 1, tmp_path / "found.npz", (2, 1))
    assert found["begun"] == last


@pytest.mark.nightly
def test_other_numbers_of_processes_resume_a_run(tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_a_part_that_one_process_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes fall back to the checkpoint before, and none waits for the other."""
    first = _train(tmp_path / "saved", 2, tmp_path / "first.npz", (2, 1))
    monkeypatch.setenv("UNREADABLE", "1")
    found = _train(tmp_path / "saved", 2, tmp_path / "found.npz", (2, 1))
    assert found["begun"] == 1
    for name in ("users", "items", "loss"):
        np.testing.assert_array_equal(found[name], first[name], err_msg=name)
