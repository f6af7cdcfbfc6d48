"""A lock between processes. The operating system releases it when the process ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

log = logging.getLogger("tpu_als")
_PATIENCE = 0.5  # seconds to wait for a process that ends or that only tests the lock
_FAR = 1 << 30  # position of the byte that Windows locks; the text before it stays readable
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class FileLock:
    """An exclusive lock on a file that names the process holding it.

    The lock is released at the end of the process. On a file system without locks every process
    gets the lock, and `is_real` is False.

    Parameters
    ----------
    path : Path
        The file. It is created if needed, and not removed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.is_real = path, True
        self._file: int | None = None

    def acquire(self, patience: float = _PATIENCE) -> bool:
        """Take the lock; return False if another process still holds it after `patience` s."""
        limit = time.monotonic() + patience
        while not self._try():
            if time.monotonic() > limit:
                return False
            time.sleep(0.01)
        return True

    def sign(self) -> None:
        """Write the host and id of this process to the file."""
        assert self._file is not None
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, json.dumps(owner).encode())

    def owner(self) -> str:
        """The process named in the file, for a message."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return f"host {found['host']}, process {found['pid']}, since {found['since']}"
        return "unknown host and process"

    def release(self) -> None:
        """Release the lock, if it is held."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _try(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = self._locked(file) and self._is_at_path(file)
        except BaseException:
            os.close(file)
            raise
        if taken:
            self._file = file
        else:
            os.close(file)
        return taken

    def _locked(self, file: int) -> bool:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                os.lseek(file, _FAR, os.SEEK_SET)
                msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.warning("%s: this file system has no locks, so two fits may write the same run",
                            self.path)  # fmt: skip
                self.is_real = False
                return True
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                return False
            raise
        return True

    def _is_at_path(self, file: int) -> bool:
        """Whether the path still refers to this file: others may remove or replace it."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False
