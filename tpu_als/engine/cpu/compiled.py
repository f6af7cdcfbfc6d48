"""Loads and compiles the loops, which takes a second or more, when they are needed."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tpu_als.engine import compilation_cache
from tpu_als.engine.data import BFLOAT16, dtype_named
from tpu_als.exceptions import DataWarning

_SOURCES = (
    "jit.py", "kept_code.py", "memory.py", "intrinsics.py", "emitter.py", "vectors.py",
    "comparisons.py", "loops.py", "loss.py", "converging.py", "rotation.py", "direct.py",
    "selection.py", "../objective.py",
)  # fmt: skip
_loading, _importing = threading.RLock(), threading.RLock()


@functools.cache
def is_available() -> bool:
    """Whether numba loads and compiles; if it does not, warn once."""
    try:
        import numba
    except Exception as error:  # noqa: BLE001  (also SystemError and AttributeError, of other NumPys)
        warnings.warn(
            f"numba does not load, so fits on this CPU run by XLA and take about twice as long: "
            f"{error}",
            DataWarning,
            stacklevel=2,
        )
        return False
    config: Any = numba.config
    return not config.DISABLE_JIT


@functools.cache
def loops() -> ModuleType:
    """The module `engine.cpu.loops`, whose functions numba compiles when they are called."""
    return _load("loops")


@functools.cache
def loss() -> ModuleType:
    """The module `engine.cpu.loss`, whose function numba compiles when it is called."""
    return _load("loss")


@functools.cache
def selection() -> ModuleType:
    """The module `engine.cpu.selection`, whose functions numba compiles when they are called."""
    return _load("selection")


@functools.cache
def converging() -> ModuleType:
    """The module `engine.cpu.converging`, whose functions numba compiles when they are called."""
    return _load("converging")


@functools.cache
def rotation() -> ModuleType:
    """The module `engine.cpu.rotation`, whose functions numba compiles when they are called."""
    return _load("rotation")


@functools.cache
def direct() -> ModuleType:
    """The module `engine.cpu.direct`, whose functions numba compiles when they are called."""
    return _load("direct")


def _load(name: str) -> ModuleType:
    """Import a module of compiled functions.

    Compiled code is kept between processes, like Python's own: beside the source or, if that is
    not writable, where numba keeps it. numba notices changes of the file that a function is in, but
    not of other files, so the directory is named after the content of all of them.
    """
    import numba

    config: Any = numba.config
    with _importing:
        before = config.CACHE_DIR
        folder = _cache_folder(compilation_cache.directory or before)
        if folder:
            config.CACHE_DIR = folder
        try:
            return importlib.import_module(f"tpu_als.engine.cpu.{name}")
        finally:
            config.CACHE_DIR = before


def _cache_folder(given: str) -> str:
    """The directory for compiled code; empty if numba is to choose."""
    here = Path(__file__).parent
    try:
        content = b"".join((here / name).read_bytes() for name in _SOURCES)
    except OSError:  # the package is in an archive
        return ""
    name = hashlib.sha256(content).hexdigest()[:16]
    base = Path(given) if given else here / "__pycache__"
    if not given and not os.access(base if base.is_dir() else here, os.W_OK):
        return ""
    return os.fspath(base / f"loops-{name}")


def begin_loading(dtype: str) -> None:
    """Compile the loops for tables of a dtype in the background."""
    threading.Thread(target=ready, args=(dtype,)).start()


def _wait_before_fork() -> None:
    """Let other threads compile to the end: a forked process would wait for their locks forever."""
    _loading.acquire()
    _importing.acquire()


def _go_on_after_fork() -> None:
    _importing.release()
    _loading.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_wait_before_fork,
        after_in_parent=_go_on_after_fork,
        after_in_child=_go_on_after_fork,
    )


def ready(dtype: str) -> ModuleType:
    """The loops, with the one that solves rows compiled for tables of a dtype."""
    with _loading:
        return _ready(dtype)


@functools.cache
def _ready(dtype: str) -> ModuleType:
    compute = "float32" if dtype == "bfloat16" else dtype
    found, kind = loops(), np.dtype(compute).type
    number, table = np.zeros(1, np.int64), np.zeros((1, 1), compute)
    entries = found.Entries(
        numbers_of(table.astype(dtype_named(dtype))),
        read_only(number.astype(np.uint32)),
        read_only(np.empty(0, compute)),
        0,
    )
    objective = found.Objective(*map(kind, (1, 1, 1, 1, 1)))
    diagonal = found.Diagonal(read_only(table[0]), *map(kind, (1,) * 6))
    starts = found.Starts(read_only(number), read_only(number), read_only(table[:0]))
    found.solve_rows(table, starts, entries, objective, diagonal, found.Solver(kind(1), 1))
    return found


def numbers_of(table: np.ndarray) -> np.ndarray:
    """A read-only view of a table as the loops read it: the bits of bfloat16 numbers as uint16."""
    return read_only(table.view(np.uint16) if table.dtype.name == BFLOAT16 else table)


def read_only(array: np.ndarray) -> np.ndarray:
    """A read-only view. numba compiles for each type anew, and such views have one type."""
    view = array.view()
    view.flags.writeable = False
    return view
