"""Cores, memory, threads and BLAS of this process. Does not import JAX."""

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
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

_SMALL = 1 << 26  # up to this many bytes are allocated without checking the available memory
_FEW_THREADS = 16  # requests up to this number are granted, also on fewer cores
_blas_lock, _n_limits = threading.Lock(), 0  # open contexts of `single_blas_thread`
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_blas_limit: Any = None  # the limit that the first of them set


def cores() -> int:
    """Cores this process may use: by its affinity, its control group and LOKY_MAX_CPU_COUNT."""
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = None if affinity is None else frozenset(affinity(0))
    return _cores(allowed, os.environ.get("LOKY_MAX_CPU_COUNT"))


@functools.lru_cache(maxsize=8)
def _cores(affinity: frozenset[int] | None, limit: str | None) -> int:
    # joblib reads the control group's files in each call, which takes as long as one ranking.
    import joblib

    del affinity, limit
    return int(joblib.cpu_count())


def thread_count(num_threads: int) -> int:
    """Number of threads for a request of `num_threads`; 0 means all cores.

    The number is limited to 16 or the number of cores, whichever is larger: more do not help.
    """
    n_cores = cores()
    return n_cores if num_threads <= 0 else min(num_threads, max(n_cores, _FEW_THREADS))


def memory_bytes() -> int:
    """Bytes of memory of this machine."""
    import psutil  # late: it takes 8 ms, and a process that serves does not need it

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
    import psutil  # late, as above

    available = int(psutil.virtual_memory().available)
    if total > available:
        listed = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in parts.items())
        raise MemoryError(
            f"{total / 1e9:.3g} GB of memory are needed ({listed}), but only "
            f"{available / 1e9:.3g} GB are available: {remedy}"
        )


def threads(work: Callable[[_Job], _Result], jobs: Sequence[_Job], n_threads: int) -> list[_Result]:
    """Map `work` over the jobs with a number of threads, including the caller's."""
    n_threads = min(len(jobs), n_threads)
    queue: deque[tuple[int, _Job]] = deque(enumerate(jobs))
    results: list[_Result] = [None] * len(jobs)  # type: ignore[list-item]

    def run_jobs() -> None:
        while True:
            try:
                number, job = queue.popleft()
            except IndexError:
                return
            try:
                results[number] = work(job)
            except BaseException:
                queue.clear()  # stops the other threads too
                raise

    # The pool gets one call per thread: submitting a job costs a tenth of a millisecond.
    if n_threads < 2:
        run_jobs()
        return results
    with ThreadPoolExecutor(n_threads - 1) as pool:
        others = [pool.submit(run_jobs) for _ in range(n_threads - 1)]
        run_jobs()
        for other in others:
            other.result()
    return results


@contextlib.contextmanager
def single_blas_thread() -> Iterator[None]:
    """Context in which BLAS is limited to one thread, in the whole process.

    OpenBLAS's threads spin for tens of milliseconds after each call, and occupy cores that the
    fit needs. XLA calls OpenBLAS for the eigenbasis in every half-epoch. Contexts may overlap, for
    example if several threads fit: the first sets the limit, and the last removes it.
    """
    global _blas_limit, _n_limits
    with _blas_lock:
        if _n_limits == 0:
            _blas_limit = _blas().limit(limits=1, user_api="blas")
        _n_limits += 1
    try:
        yield
    finally:
        with _blas_lock:
            _n_limits -= 1
            if _n_limits == 0:
                _blas_limit.restore_original_limits()


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def give_back_memory() -> None:
    """Return freed memory to the system. glibc keeps hundreds of megabytes after compiling."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
