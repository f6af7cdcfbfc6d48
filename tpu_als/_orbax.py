"""Orbax, imported when it is needed, and kept from changing how the program logs."""

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
    """An absolute path, local or in a bucket, that is no file."""
    from etils import epath

    text = os.fspath(directory)
    found = epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))
    if found.exists() and not found.is_dir():
        raise NotADirectoryError(
            f"checkpoints need a directory, but {found} is a file; give another path"
        )
    return found


def manager(root: Any, keep: int, processes: tuple[int, ...]) -> Any:
    """Open a directory that exists, for these processes, which all do so."""
    ocp, first = load(), min(processes)
    together = ocp.options.MultiprocessingOptions(
        primary_host=first,
        active_processes=set(processes),
        barrier_sync_key_prefix=f"tpu_als_{first}",
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=False,  # not supported for some of the processes
        # Orbax's clean-up runs in a thread that `close` does not wait for, and fails where another
        # opening of the directory cleans up as well. On local paths `_runs` does it.
        cleanup_tmp_directories="://" in str(root),
        multiprocessing_options=together,
    )
    return ocp.CheckpointManager(root, options=options)


def reader(root: Any, process: int) -> Any:
    """Open a directory to read from it, by this process alone.

    A read that fails in one process then leaves no other one waiting for it.
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
    """Keep absl from giving the root logger a handler, as it does at any message without one.

    Meanwhile Python's own last resort stands there, which prints what it would have anyway.
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
