"""Directories with compiled code must be writable by their user only."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

import tpu_als
from tpu_als.engine import compilation_cache
from tpu_als.engine.compilation_cache import private_directory

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes and owners are of POSIX")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A private cache that contains one program."""
    path = tmp_path / "cache"
    (path / "loops").mkdir(parents=True)
    (path / "loops" / "index.nbi").write_bytes(b"")
    for entry, mode in ((path, 0o755), (path / "loops", 0o755), (path / "loops/index.nbi", 0o644)):
        entry.chmod(mode)
    return path


def refused(path: Path, message: str) -> None:
    """Check that the directory is refused, and that no option is set."""
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(PermissionError, match=message):
        tpu_als.enable_compilation_cache(path)
    assert compilation_cache.directory is None and jax.config.jax_compilation_cache_dir == before


def test_private_directories_are_accepted(folder: Path, tmp_path: Path) -> None:
    assert private_directory(folder) == folder.resolve()
    assert private_directory(str(folder)) == folder.resolve()
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert private_directory(link) == folder.resolve()


def test_new_directories_have_mode_700(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        made = private_directory(tmp_path / "deep" / "cache")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
def test_writable_by_others(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    refused(folder, f"cache is writable by others .mode {mode:o}.: .* chmod -R go-w")


@pytest.mark.parametrize("inside", ["loops", "loops/index.nbi"])
def test_writable_inside(folder: Path, inside: str) -> None:
    (folder / inside).chmod(0o666 if inside.endswith("nbi") else 0o777)
    refused(folder, f"{inside} is writable by others")
    folder.chmod(0o700)  # no other user can enter the directory
    assert private_directory(folder) == folder.resolve()


def test_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    refused(folder, f"cache belongs to user {owner}, not to user {owner + 1} of this process")


def test_a_file_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lstat = Path.lstat

    def of_another(path: Path) -> os.stat_result:
        info = list(lstat(path))
        info[4] += path.name == "index.nbi"  # the user id of the owner
        return os.stat_result(info)

    monkeypatch.setattr(Path, "lstat", of_another)
    refused(folder, "index.nbi belongs to user")


def test_parents_writable_by_all_users(folder: Path) -> None:
    folder.parent.chmod(0o777)
    refused(folder, "all users can replace it, because .* is writable by all users")
    folder.parent.chmod(0o1777)  # the sticky bit, as of /tmp: only owners can rename files
    assert private_directory(folder) == folder.resolve()
