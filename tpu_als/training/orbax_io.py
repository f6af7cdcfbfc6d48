"""Import orbax when it is needed, without letting it change the program's logging."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any


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


def path(directory: str | os.PathLike[str]) -> Any:
    """An absolute path, local or in a bucket; NotADirectoryError if it is a file."""
    from etils import epath

    text = os.fspath(directory)
    found = epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))
    if found.exists() and not found.is_dir():
        raise NotADirectoryError(
            f"checkpoints need a directory, but {found} is a file; give another path"
        )
    return found


def manager(root: Any, keep: int, processes: tuple[int, ...]) -> Any:
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
    )
    return ocp.CheckpointManager(root, options=options)


def reader(root: Any, process: int) -> Any:
    """Open a directory for reading by this process alone.

    If a read fails in one process, the others then do not wait for it.
    """
    ocp = load()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"tpu_als_reader_{process}",
    )
    options = ocp.CheckpointManagerOptions(
        create=False, read_only=True, multiprocessing_options=alone
    )
    return ocp.CheckpointManager(root, options=options)


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
