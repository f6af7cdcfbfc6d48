"""Atomic replacement of files: modes, links, long names, and leftovers of dead writers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpu_als.storage import atomic

posix = pytest.mark.skipif(os.name != "posix", reason="modes, links, locks and kills of POSIX")


def write(path: Path, content: bytes = b"new") -> None:
    """Replace a file."""
    with atomic.replacing(path) as file:
        file.write(content)


@posix
class TestReplacing:
    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
    def test_the_mode_stays(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "model.npz"
        path.write_bytes(b"old")
        path.chmod(mode)
        with atomic.replacing(path) as file:
            part = next(p for p in tmp_path.iterdir() if p != path)
            assert part.stat().st_mode & 0o777 == mode
            file.write(b"new")
        assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == mode

    def test_a_new_file_has_the_usual_mode(self, tmp_path: Path) -> None:
        write(tmp_path / "ours")
        (tmp_path / "plain").write_bytes(b"")
        assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode

    @pytest.mark.parametrize("exists", [True, False])
    def test_the_target_of_a_link_is_replaced(self, tmp_path: Path, exists: bool) -> None:
        target = tmp_path / "elsewhere" / "model.npz"
        target.parent.mkdir()
        if exists:
            target.write_bytes(b"old")
        (tmp_path / "link").symlink_to(target)
        (tmp_path / "second").symlink_to("link")
        write(tmp_path / "second")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
        assert target.read_bytes() == b"new"
        assert [p.name for p in target.parent.iterdir()] == ["model.npz"]

    @pytest.mark.parametrize("name", ["n" * 255, "ä" * 127])
    def test_long_names(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / name)
        assert [p.name for p in tmp_path.iterdir()] == [name]

    def test_only_leftovers_of_dead_writers_are_removed(self, tmp_path: Path) -> None:
        path, other = tmp_path / "model.npz", tmp_path / "model.npz2"
        leftovers = []
        for name in (path, other):
            part = atomic._create(name, atomic._prefix(name))
            part[1].close()  # as the system does when a process ends
            leftovers.append(part[0])
        with atomic.replacing(path) as living:
            assert not leftovers[0].exists()
            write(path, b"by another")
            living.write(b"by the first")
        assert path.read_bytes() == b"by the first"
        assert set(tmp_path.iterdir()) == {path, leftovers[1]}

    def test_a_writer_whose_file_was_removed_as_a_leftover(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, lock, calls = tmp_path / "model.npz", atomic._lock, []

        def late(descriptor: int) -> bool:
            calls.append(descriptor)
            if len(calls) == 1:
                atomic._remove_leftovers(tmp_path, atomic._prefix(path))
                assert not list(tmp_path.iterdir())
            return lock(descriptor)

        monkeypatch.setattr(atomic, "_lock", late)
        write(path)
        assert len(calls) == 2 and path.read_bytes() == b"new"
        assert list(tmp_path.iterdir()) == [path]


@posix
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.nightly)])
def test_a_killed_writer_leaves_a_complete_file(tmp_path: Path, kills: int) -> None:
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(here / "saving_worker.py"), str(tmp_path), str(kills)],
        env={**os.environ, "PYTHONPATH": str(here.parent), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    good, most, left = map(int, done.stdout.split())
    assert good == kills and left == 1
    assert most <= 2  # the file, and a leftover of the last writer
