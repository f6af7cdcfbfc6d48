"""The host: its cores and memory, threads, and the BLAS in this process. Imports no JAX."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib
import numpy as np
import psutil
from threadpoolctl import ThreadpoolController

_SMALL = 1 << 26  # up to this many bytes are allocated without checking the available memory
LINE = 64  # bytes of a cache line; vectors that straddle two take twice as long to read
_limiting, _limited = threading.Lock(), 0  # number of open contexts of `single_blas_thread`
_limit: Any = None  # the limit that they set


class Memory:
    """A pool of memory blocks that are reused after the arrays in them are deleted.

    Page faults are expensive on a virtual machine, whose host reclaims memory that has been free
    for seconds: they were measured at 2 ns a byte, a hundred times the cost of writing.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any, room: int = 0) -> np.ndarray:
        """An uninitialised array that begins at a cache line.

        Parameters
        ----------
        shape, dtype
            Of the array.
        room : int, default=0
            Least number of elements for which to allocate memory, so that a larger array can reuse
            it later.
        """
        count = math.prod(shape)
        size = max(count, room) * np.dtype(dtype).itemsize
        try:
            block = self._free.setdefault(size, []).pop()
        except IndexError:
            block = np.empty(size + LINE, np.uint8)
        low = -block.ctypes.data % LINE
        lent: np.ndarray = np.asarray(_Lent(block, size, self))
        return lent[low : low + size].view(dtype)[:count].reshape(shape)

    def give_back(self, block: np.ndarray, size: int) -> None:
        """Return a block to the pool."""
        self._free.setdefault(size, []).append(block)

    def clear(self) -> None:
        """Release the free blocks."""
        self._free.clear()


class _Lent:
    """The base of an array from `Memory`; it returns the block when the last such array is gone."""

    def __init__(self, block: np.ndarray, size: int, memory: Memory) -> None:
        self.block, self.size, self.memory = block, size, weakref.ref(memory)
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        memory = self.memory()
        if memory is not None:
            memory.give_back(self.block, self.size)


def cores() -> int:
    """Cores this process may use: by its affinity, its control group and LOKY_MAX_CPU_COUNT."""
    affinity = getattr(os, "sched_getaffinity", None)
    own = None if affinity is None else frozenset(affinity(0))
    return _cores(own, os.environ.get("LOKY_MAX_CPU_COUNT"))


@functools.lru_cache(maxsize=8)
def _cores(affinity: frozenset[int] | None, limit: str | None) -> int:
    # joblib reads the control group's files in each call, which takes as long as a query.
    del affinity, limit
    return int(joblib.cpu_count())


def memory_bytes() -> int:
    """Bytes of memory of this machine."""
    return int(psutil.virtual_memory().total)


def require_memory(parts: dict[str, int], remedy: str) -> None:
    """Raise MemoryError if the available memory is too small, before it is allocated.

    Parameters
    ----------
    parts : dict of str to int
        Bytes of each large part, by a name for the message.
    remedy : str
        Advice to the caller, for the message.
    """
    total = sum(parts.values())
    if total < _SMALL:
        return
    available = int(psutil.virtual_memory().available)
    if total > available:
        listed = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in parts.items())
        raise MemoryError(
            f"{total / 1e9:.3g} GB of memory would be needed ({listed}), but "
            f"{available / 1e9:.3g} GB are available: {remedy}"
        )


def threads(work: Callable[[Any], Any], jobs: Sequence[Any], n_threads: int) -> list[Any]:
    """Map `work` over the jobs with a number of threads, including the caller's."""
    n_threads = min(len(jobs), n_threads)
    left, results = deque(enumerate(jobs)), [None] * len(jobs)

    def until_none() -> None:
        while True:
            try:
                number, job = left.popleft()
            except IndexError:
                return
            try:
                results[number] = work(job)
            except BaseException:
                left.clear()  # stops the other threads too
                raise

    # A job for each thread, not each of the jobs, which would cost a tenth of a millisecond.
    if n_threads < 2:
        until_none()
        return results
    with ThreadPoolExecutor(n_threads - 1) as pool:
        others = [pool.submit(until_none) for _ in range(n_threads - 1)]
        until_none()
        for other in others:
            other.result()
    return results


@contextlib.contextmanager
def single_blas_thread() -> Iterator[None]:
    """Context in which BLAS is limited to one thread, in the whole process.

    After each call OpenBLAS's threads spin for tens of milliseconds, on cores that work shards
    need; XLA calls it for the eigenbasis, in every half-epoch. Contexts may overlap, for example if
    several threads fit: the first sets the limit, and the last removes it.
    """
    global _limit, _limited
    with _limiting:
        if _limited == 0:
            _limit = _blas().limit(limits=1, user_api="blas")
        _limited += 1
    try:
        yield
    finally:
        with _limiting:
            _limited -= 1
            if _limited == 0:
                _limit.restore_original_limits()


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def give_back_memory() -> None:
    """Return freed memory to the system: glibc would keep hundreds of megabytes after compiling."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
