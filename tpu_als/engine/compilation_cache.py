"""Where compiled programs are kept between processes: a directory that only its user may change."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH

directory: str | None = None  # the directory that `enable_compilation_cache` was given


def enable_compilation_cache(path: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a directory, so that later processes need not compile them again.

    This sets JAX's options for the whole process, and so for all JAX code in it; the package never
    does this by itself. Call it before the first fit. If JAX is not imported yet, the options are
    set when the package imports it. A file is reused only by the same version of JAX on the same
    kind of device. Loops compiled by numba, which are otherwise kept beside the package, are kept
    in the same directory.

    Parameters
    ----------
    path : path-like
        The directory. If it does not exist, it is created with mode 700. Its content is run as
        code, so nobody else may be able to write there.

    Raises
    ------
    PermissionError
        On POSIX, if the directory or anything in it belongs to another user or is writable by
        others, or if all users can replace one of its parents. No option is set then.
    """
    global directory
    directory = os.fspath(private_directory(path))
    if "jax" in sys.modules:
        apply_to_jax()


def apply_to_jax() -> None:
    """Set JAX's options for the directory, if there is one."""
    if directory is None:
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", directory)
    # The package has many small programs; by default JAX keeps only slow and large ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


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
