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
    """Open a directory for these processes, which all do so; make it where there is none."""
    ocp, first = load(), min(processes)
    root.mkdir(parents=True, exist_ok=True)
    together = ocp.options.MultiprocessingOptions(
        primary_host=first,
        active_processes=set(processes),
        barrier_sync_key_prefix=f"tpu_als_{first}",
    )
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=False,  # not supported for some of the processes
        cleanup_tmp_directories=True,
        multiprocessing_options=together,
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
