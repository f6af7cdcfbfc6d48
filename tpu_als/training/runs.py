"""The folders of runs in a directory of checkpoints: their locks, and the removal of old runs.

A run is a training with its parameters, data and initial tables; its identity is a digest of them.
On a local path the first process of a job holds a lock file next to the run's folder. Addresses
such as ``gs://bucket`` have no locks, so other runs are never removed there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tpu_als.exceptions import DataWarning
from tpu_als.storage.atomic import replacing
from tpu_als.storage.lock import FileLock

if TYPE_CHECKING:
    from etils import epath

KEPT = 3  # other runs to keep, in addition to those that a process is writing
ABOUT = "run.json"
_IDENTITY = re.compile(r"[0-9a-f]{16}")
_REMOVED = "removed-"  # prefix of the name of a run that is being removed
_PROBE = "probe-"
_UNFINISHED = ".orbax-checkpoint-tmp"  # orbax's name for an incomplete checkpoint

log = logging.getLogger("tpu_als")


class RunFolder:
    """The folder of one run, and its lock; used by the first process of a job.

    Parameters
    ----------
    root : epath.Path
        The directory of all runs.
    identity : str
        The run's identity, 16 hexadecimal digits. It is the folder's name.
    about : dict
        The values that the identity is a digest of, stored for people to read.

    Attributes
    ----------
    path : epath.Path
        The folder.
    """

    def __init__(self, root: epath.Path, identity: str, about: Mapping[str, object]) -> None:
        self.path = root / identity
        self._root, self._about = root, about
        self._is_local = "://" not in str(root)
        self._lock: FileLock | None = None

    def open(self) -> None:
        """Create the folder, take the lock, remove incomplete checkpoints and old other runs.

        Raises
        ------
        RuntimeError
            If another fit holds the lock.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        self._warn_of_old_layout()
        if self._is_local:
            lock = FileLock(_lock_path(self.path))
            if not lock.acquire():
                raise RuntimeError(
                    f"another fit ({lock.owner()}) writes checkpoints of the same parameters and "
                    f"data to {self.path}: wait until it has ended, or choose another directory"
                )
            self._lock = lock
            lock.sign()
            # This replaces orbax's own clean-up, which can race with another opening of the folder.
            for pattern in (f"*{_UNFINISHED}*", f"{_PROBE}*"):
                for path in list(Path(self.path).glob(pattern)):
                    shutil.rmtree(path, ignore_errors=True)
        self.path.mkdir(exist_ok=True)
        self._describe()
        self._prune()

    def probe(self) -> None:
        """Raise OSError if the folder is not writable.

        Orbax would detect this too, but only after its threads waited five minutes for each other.
        """
        if self._is_local:
            found = self.path / f"{_PROBE}{uuid.uuid4().hex}"
            found.mkdir()
            found.rmdir()

    def close(self) -> None:
        """Release the lock, and remove the oldest other runs."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()
            with contextlib.suppress(OSError):  # the directory may be gone
                self._prune()

    def others(self) -> list[Path]:
        """Folders of other runs on a local path, the most recently written first."""
        if not self._is_local:
            return []
        found = []
        for path in Path(self._root).iterdir():
            with contextlib.suppress(OSError):  # another process may be removing it
                if path.name != self.path.name and _is_run(path):
                    steps = (entry for entry in path.iterdir() if entry.name.isdigit())
                    times = [path.stat().st_mtime, *(step.stat().st_mtime for step in steps)]
                    found.append((max(times), path.name, path))
        return [path for _, _, path in sorted(found, reverse=True)]

    def differences(self) -> str:
        """How this run differs from the most recently written other run, for the log."""
        for other in self.others():
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                theirs = json.loads((other / ABOUT).read_text(encoding="utf-8"))
                return (
                    f"the run {other.name} differs in: {'; '.join(_differing(theirs, self._about))}"
                )
        return "there is no other run"

    def _describe(self) -> None:
        text = json.dumps(self._about, indent=1)
        if not self._is_local:
            (self.path / ABOUT).write_text(text)
        elif not (self.path / ABOUT).exists():
            with replacing(Path(self.path) / ABOUT) as file:
                file.write(text.encode())

    def _prune(self) -> None:
        """Remove other runs that are not being written, except the `KEPT` most recent."""
        if not self._is_local:
            return
        for path in Path(self._root).glob(f"{_REMOVED}*"):
            shutil.rmtree(path, ignore_errors=True)
        n_kept = 0
        for path in self.others():
            with _unlocked(path) as is_free:
                if not is_free:
                    continue
                n_kept += 1
                if n_kept <= KEPT:
                    continue
                away = path.with_name(f"{_REMOVED}{uuid.uuid4().hex}")
                with contextlib.suppress(OSError):
                    path.rename(away)
                    _lock_path(path).unlink(missing_ok=True)
            shutil.rmtree(away, ignore_errors=True)
            log.info("removed the checkpoints of an older run, %s", path)

    def _warn_of_old_layout(self) -> None:
        steps = sorted(int(path.name) for path in self._root.iterdir() if path.name.isdigit()
                       and len(path.name) < 16)  # fmt: skip
        if steps:
            warnings.warn(
                f"{self._root} holds {len(steps)} checkpoints of an earlier version of tpu_als, "
                f"the folders {', '.join(map(str, steps))}: they are not resumed and not removed; "
                "remove those folders if they are not needed",
                DataWarning,
                stacklevel=2,
            )


def _is_run(path: Path) -> bool:
    return _IDENTITY.fullmatch(path.name) is not None and (path / ABOUT).is_file()


def _lock_path(folder: epath.Path | Path) -> Path:
    return Path(f"{folder}.lock")


@contextlib.contextmanager
def _unlocked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a run. False if another process holds it, or if locks do not work."""
    lock = FileLock(_lock_path(folder))
    try:
        yield lock.acquire(0) and lock.is_real
    finally:
        lock.release()


def _differing(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [
        f"{name} was {before.get(name, 'absent')!r} and is {now.get(name, 'absent')!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name, "absent") != now.get(name, "absent")
    ]
