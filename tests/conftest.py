"""Four CPU devices, strict numerics, one BLAS thread; small matrices; counters.

All options are set before a JAX backend starts. Test processes, and the processes that they start,
share a cache of compiled programs. It is removed after the run, unless JAX_COMPILATION_CACHE_DIR
names another cache.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the processes that tests start
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the main process; workers inherit the directory
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tpu_als-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import proof
import pytest
import threadpoolctl
from matrices import planted_groups, random_counts
from models import load_class, make
from scipy import sparse

# Otherwise implicit warns and is slow. A plugin may have loaded NumPy before this file.
threadpoolctl.threadpool_limits(1, user_api="blas")
jax.config.update("jax_num_cpu_devices", 4)
# Global options: those of context managers apply to one thread, and the engine may use several.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("dev", deadline=None, max_examples=20)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True)
# The tests set the large numbers of examples, see proof.examples.
hypothesis.settings.register_profile("nightly", deadline=None, print_blob=True)
hypothesis.settings.load_profile(proof.PROFILE)

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_compile_seconds: list[float] = []


def _record_compile(event: str, duration: float, **_: object) -> None:
    if event == _COMPILE_EVENT:
        _compile_seconds.append(duration)


jax.monitoring.register_event_duration_secs_listener(_record_compile)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Record the number of hypothesis examples of the test, for the summary."""
    yield
    name = getattr(item, "originalname", item.name)
    if count := proof.EXAMPLES.pop(name, 0):
        item.user_properties.append((f"{proof.PREFIX}examples of {name}", count))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many bad inputs, files, examples and concurrent reads were tested."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    totals = proof.summary(reports)
    if totals:
        terminalreporter.section(f"proof ({proof.PROFILE} profile)")
        for name, total in sorted(totals.items()):
            terminalreporter.write_line(f"{total:>8,} {name}")


class Count:
    """How many programs XLA compiled inside a ``with`` block."""

    programs: int = 0


@contextlib.contextmanager
def counted_compilations() -> Iterator[Count]:
    """Clear the caches, and count; read ``count.programs`` after the block."""
    jax.clear_caches()
    before, count = len(_compile_seconds), Count()
    yield count
    count.programs = len(_compile_seconds) - before


@contextlib.contextmanager
def counted_warm() -> Iterator[Count]:
    """Count without clearing the caches: the programs that another call compiles."""
    before, count = len(_compile_seconds), Count()
    yield count
    count.programs = len(_compile_seconds) - before


@pytest.fixture(scope="session")
def counts() -> sparse.csr_matrix:
    """30 users by 20 items, positive counts."""
    return random_counts(30, 20)


@pytest.fixture(scope="session")
def signed_counts() -> sparse.csr_matrix:
    """30 users by 20 items, a quarter of the entries negative."""
    return random_counts(30, 20, negatives=True, seed=1)


@pytest.fixture(scope="session")
def groups() -> sparse.csr_matrix:
    """24 users by 18 items in three groups; each user lacks one item of its group."""
    return planted_groups()


@pytest.fixture
def compilations() -> object:
    """``with compilations() as count:`` counts the programs compiled from cold caches."""
    return counted_compilations


@pytest.fixture
def new_compilations() -> object:
    """``with new_compilations() as count:`` counts the programs that the caches did not have."""
    return counted_warm


@pytest.fixture(scope="module", params=["implicit", "tpu_als"])
def cls(request: pytest.FixtureRequest) -> Any:
    """The class under test."""
    return load_class(request.param)


@pytest.fixture(scope="module")
def fitted(cls: Any, groups: sparse.csr_matrix) -> Any:
    """A model fitted to the planted groups; tests that change it take a copy."""
    model = make(cls)
    model.fit(groups, show_progress=False)
    return model


@pytest.fixture
def twin(fitted: Any) -> Any:
    """A copy that a test may change."""
    return copy.deepcopy(fitted)
