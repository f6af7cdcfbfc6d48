"""Atomic writing: a file gets its name only after its content is on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove or replace an open file
    fcntl = None  # type: ignore[assignment]

_SHOWN = 24  # characters of the name in the temporary file's name, whose length is limited


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when it is closed; an error leaves `path` unchanged.

    If `path` is a symbolic link, its target is replaced. The mode of an existing file is kept.
    Temporary files that dead processes left for the same name are removed.
    """
    path = Path(os.path.realpath(path))
    prefix = _prefix(path)
    _remove_leftovers(path.parent, prefix)
    part, file = _create(path, prefix)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # before the lock is released
                os.replace(part, path)
        if fcntl is None:
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _prefix(path: Path) -> str:
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return f".{path.name[:_SHOWN]}.{digest}."


def _create(path: Path, prefix: str) -> tuple[Path, BinaryIO]:
    """Create a temporary file, locked for as long as it is open."""
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    while True:
        part = path.with_name(f"{prefix}{uuid.uuid4().hex[:12]}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        # The new file is at no time more readable than the old one.
        file = os.fdopen(os.open(part, flags, 0o666 if mode is None else mode & 0o600), "w+b")
        try:
            if mode is not None and hasattr(os, "fchmod"):
                with contextlib.suppress(OSError):  # a file system without modes
                    os.fchmod(file.fileno(), mode)
            if _lock(file.fileno()) and part.exists():
                return part, file
        except BaseException:
            file.close()
            part.unlink(missing_ok=True)
            raise
        file.close()  # before it was locked, another process removed it as a leftover


def _lock(descriptor: int) -> bool:
    """Lock a file until it is closed or the process ends; False if another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, where leftovers are not removed either
        return True
    return True


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove temporary files that no process has locked."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        found = [e.name for e in entries if e.name.startswith(prefix) and e.name.endswith(".tmp")]
    for name in found:
        # An OSError means that the file is locked or gone; on Windows, that it is open.
        with contextlib.suppress(OSError), open(folder / name, "r+b") as file:
            if fcntl is not None:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(folder / name)  # while it is locked, so that a slow writer notices
        if fcntl is None:
            with contextlib.suppress(OSError):
                os.unlink(folder / name)
