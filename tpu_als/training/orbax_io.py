"""Import orbax when it is needed, without letting it change the program's logging."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etils import epath
    from orbax.checkpoint import CheckpointManager
    from orbax.checkpoint.args import Composite
    from orbax.checkpoint.path.step import Metadata

_ITERATION = re.compile("0|[1-9][0-9]*")
_POLL = 0.005  # seconds between two looks at another manager's save
_saving = threading.Lock()
# The manager that began the latest save of this process.
_latest: weakref.ref[CheckpointManager] | None = None


def load() -> ModuleType:
    """Import orbax, or say how to install it."""
    try:
        with handlers_kept():
            import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            f'checkpoints need orbax-checkpoint ({error}): pip install "tpu-als[checkpoint]"'
        ) from error
    return ocp


def path(directory: str | os.PathLike[str]) -> epath.Path:
    """An absolute path, local or in a bucket; NotADirectoryError if it is a file."""
    from etils import epath

    text = os.fspath(directory)
    found = epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))
    if found.exists() and not found.is_dir():
        raise NotADirectoryError(
            f"checkpoints need a directory, but {found} is a file; give another path"
        )
    return found


def manager(root: epath.Path, keep: int, processes: tuple[int, ...]) -> CheckpointManager:
    """Open an existing directory for these processes, which must all make this call."""
    ocp, first = load(), min(processes)
    together = ocp.options.MultiprocessingOptions(
        primary_host=first,
        active_processes=set(processes),
        barrier_sync_key_prefix=f"tpu_als_{first}",
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=False,  # not supported for some of the processes
        # Orbax's clean-up runs in a thread that `close` does not wait for. It fails if another
        # opening of the directory cleans up meanwhile. On local paths `_runs` cleans up instead.
        cleanup_tmp_directories="://" in str(root),
        multiprocessing_options=together,
        step_name_format=_IterationFolders(),
    )
    return ocp.CheckpointManager(root, options=options)


def save(manager: CheckpointManager, iteration: int, args: Composite) -> None:
    """Start to save in the background, after the saves of this process's other managers.

    Orbax numbers the operations of the whole process, so that saves of two managers at a time, as
    of fits in several threads, take each other's folders for their own.
    """
    global _latest
    manager.wait_until_finished()  # a failed save stays "in progress"; raise it before the lock
    with _saving:
        other = None if _latest is None else _latest()
        # Not by waiting for it to finish: that would take its errors from its own thread.
        while other is not None and other is not manager and other.is_saving_in_progress():
            time.sleep(_POLL)
            other = None if _latest is None else _latest()  # closed meanwhile
        _latest = weakref.ref(manager)
        manager.save(iteration, args=args, force=True)


def close(manager: CheckpointManager) -> None:
    """Wait until everything is written. After an error, other managers may save as well."""
    global _latest
    try:
        manager.close()
    finally:
        if _latest is not None and _latest() is manager:
            _latest = None


def reader(root: epath.Path, process: int) -> CheckpointManager:
    """Open a directory for this process alone, which must only read.

    If a read fails in one process, the others then do not wait for it.
    """
    ocp = load()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"tpu_als_reader_{process}",
    )
    # Orbax logs two warnings for each manager with `read_only`. One that is never asked to save or
    # delete does not write either.
    options = ocp.CheckpointManagerOptions(
        create=False, multiprocessing_options=alone, step_name_format=_IterationFolders()
    )
    return ocp.CheckpointManager(root, options=options)


class _IterationFolders:
    """Finds the checkpoints among the entries of a run's folder; orbax's protocol NameFormat.

    Before version 0.12, orbax's own format logs a warning for each other entry, such as run.json.
    """

    def __init__(self) -> None:
        self._standard = load().path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        """Name of the folder of an iteration."""
        return self._standard.build_name(step)

    def find_step(self, base_path: epath.Path, step: int) -> Metadata:
        """Orbax's description of a checkpoint; ValueError if it is absent or incomplete."""
        return self._standard.find_step(base_path, step)

    def find_all(self, base_path: epath.Path) -> Iterator[Metadata]:
        """Orbax's descriptions of all checkpoints, except incomplete ones."""
        for folder in base_path.glob("*"):
            if _ITERATION.fullmatch(folder.name):
                found = None
                with contextlib.suppress(ValueError):
                    found = self.find_step(base_path, int(folder.name))
                if found is not None:
                    yield found


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Prevent absl from adding a handler to the root logger when it logs without one.

    Meanwhile the root logger has Python's handler of last resort, which prints the same messages.
    """
    root, stand_in = logging.getLogger(), logging.lastResort
    if root.handlers or stand_in is None:
        yield
        return
    root.addHandler(stand_in)
    try:
        yield
    finally:
        root.removeHandler(stand_in)
