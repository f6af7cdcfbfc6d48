"""The host: its cores and memory, threads, and the BLAS in this process. Imports no JAX."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
from threadpoolctl import ThreadpoolController

_SMALL = 1 << 26  # up to this many bytes are allocated without checking the available memory
_FEW_THREADS = 16  # up to this number, as many threads as wanted, also on fewer cores
_limiting, _limited = threading.Lock(), 0  # number of open contexts of `single_blas_thread`
_limit: Any = None  # the limit that they set


def cores() -> int:
    """Cores this process may use: by its affinity, its control group and LOKY_MAX_CPU_COUNT."""
    affinity = getattr(os, "sched_getaffinity", None)
    own = None if affinity is None else frozenset(affinity(0))
    return _cores(own, os.environ.get("LOKY_MAX_CPU_COUNT"))


@functools.lru_cache(maxsize=8)
def _cores(affinity: frozenset[int] | None, limit: str | None) -> int:
    # joblib reads the control group's files in each call, which takes as long as a query.
    import joblib

    del affinity, limit
    return int(joblib.cpu_count())


def thread_count(num_threads: int) -> int:
    """Threads to use where `num_threads` are wanted; 0 means all cores.

    The number is limited to 16 or the number of cores, whichever is larger: more do not help.
    """
    n_cores = cores()
    return n_cores if num_threads <= 0 else min(num_threads, max(n_cores, _FEW_THREADS))


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
