"""Directories from which code is loaded. Only their user may write to them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH


def private_directory(path: str | os.PathLike[str]) -> Path:
    """Create a directory that only this user can write to, or check an existing one.

    Parameters
    ----------
    path : path-like
        The directory. If it does not exist, it is created with mode 700.

    Returns
    -------
    Path
        Absolute and without symbolic links, so that it cannot be redirected later.

    Raises
    ------
    PermissionError
        On POSIX, if the directory or anything in it belongs to another user or is writable by
        others, or if all users can replace one of its parents. Access control lists are not
        checked.
    """
    folder = Path(path).expanduser().resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name != "posix":
        return folder
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(
                f"code is loaded from {folder}, but all users can replace it, because "
                f"{parent} is writable by all users: choose a directory below your home"
            )
    is_closed = not folder.stat().st_mode & _OTHERS_ENTER
    for entry in _tree(folder):
        info = entry.lstat()
        is_shared = info.st_mode & _OTHERS_WRITE and not stat.S_ISLNK(info.st_mode)
        if info.st_uid != os.geteuid():
            problem = f"belongs to user {info.st_uid}, not to user {os.geteuid()} of this process"
        elif is_shared and (entry == folder or not is_closed):
            problem = f"is writable by others (mode {stat.S_IMODE(info.st_mode):o})"
        else:
            continue
        raise PermissionError(
            f"code is loaded from {folder}, but {entry} {problem}: choose a new directory, "
            f"or remove files that others may have put there and run chmod -R go-w {folder}"
        )
    return folder


def _tree(folder: Path) -> Iterator[Path]:
    """A directory and everything in it."""
    yield folder
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            yield Path(parent, name)
