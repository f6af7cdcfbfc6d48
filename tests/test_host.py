"""Memory of the host that is used again; its threads are tested with `DeviceMesh`'s."""

from __future__ import annotations

import gc
import os
import weakref

import jax
import joblib
import numpy as np
import pytest
from matrices import random_counts

from tpu_als import TPUAlternatingLeastSquares, host
from tpu_als.engine.cpu.memory import LINE, Memory


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def _block(array: np.ndarray) -> weakref.ref[np.ndarray]:
    """The memory that an array was lent."""
    while isinstance(array, np.ndarray):
        array = array.base
    return weakref.ref(array.block)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7,)])
def test_arrays_begin_at_a_cache_line_and_can_be_written(
    shape: tuple[int, ...], dtype: str
) -> None:
    array = Memory().empty(shape, dtype)
    assert array.shape == shape and array.dtype == dtype and array.flags.c_contiguous
    assert _address(array) % LINE == 0
    array[...] = 1
    assert (array == 1).all()


def test_memory_is_used_again_once_nothing_looks_at_it() -> None:
    memory = Memory()
    array = memory.empty((4, 6), np.float32)
    first, view = _address(array), array[1:].T
    del array
    assert _address(memory.empty((4, 6), np.float32)) != first
    view[...] = 3
    gc.collect()
    again = memory.empty((4, 6), np.float32)
    assert (view == 3).all() and _address(again) != first
    del view
    assert _address(memory.empty((4, 6), np.float32)) == first


def test_what_jax_holds_is_not_written_over() -> None:
    memory = Memory()
    array = memory.empty((64, 64), np.float32)
    array[...] = 5
    on_device = jax.device_put(array, jax.devices()[0])
    seen = np.asarray(on_device)
    assert _address(seen) == _address(array)  # no copy, so that there is something to lose
    del array, on_device
    gc.collect()
    for _ in range(3):
        memory.empty((64, 64), np.float32)[...] = 6
    assert (seen == 5).all()


def test_smaller_arrays_share_memory_with_those_that_they_name() -> None:
    memory = Memory()
    first = _address(memory.empty((10, 16), np.float32))
    assert _address(memory.empty((9, 12), np.float32, room=160)) == first
    assert _address(memory.empty((9, 12), np.float32)) != first


def test_arrays_outlive_their_pool_and_keep_nothing_of_it() -> None:
    memory = Memory()
    array, other = memory.empty((5,), np.float64), memory.empty((5,), np.float64)
    array[...] = 2
    block = _block(other)
    del other, memory
    gc.collect()
    assert array.sum() == 10 and block() is None


def test_what_is_free_can_be_let_go() -> None:
    memory = Memory()
    array = memory.empty((5,), np.float64)
    block = _block(array)
    del array
    assert block() is not None
    memory.clear()
    assert block() is None


def test_cores_are_those_that_joblib_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By affinity, control group and LOKY_MAX_CPU_COUNT, also where it changes later."""
    assert host.cores() == joblib.cpu_count()
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert host.cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert host.cores() == 1


def test_cores_are_not_counted_anew_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    host.cores()
    monkeypatch.setattr(joblib, "cpu_count", lambda: pytest.fail("counted again"))
    assert host.cores() >= 1


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_fits_where_the_system_lacks_what_unix_has(
    devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, several CPU devices included."""
    for name in ("sysconf", "sched_getaffinity", "fork", "geteuid", "getuid", "O_DIRECTORY"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(host.sys, "platform", "win32")
    counts = random_counts(30, 20)
    settings = dict(iterations=1, devices=devices, use_native=False, table_layout="auto")
    model = TPUAlternatingLeastSquares(3, **settings).fit(counts, show_progress=False)
    assert np.isfinite(model.user_factors).all()
    assert model.recommend(0, counts[0], N=2)[0].shape == (2,)


@pytest.mark.parametrize("use_native", [False, True])
def test_tables_beyond_the_memory_are_refused_before_any_work(use_native: bool) -> None:
    model = TPUAlternatingLeastSquares(10**7, use_native=use_native, iterations=1)
    with pytest.raises(MemoryError, match=r"user table .* item table .* gramian.*fewer factors"):
        model.fit(random_counts(30, 20), show_progress=False)
    assert model.user_factors is None


def test_memory_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    host.require_memory({"small": 1 << 20}, "no remedy")
    with pytest.raises(MemoryError, match=r"1e\+06 GB.*\(tables 1e\+06 GB\).*available: buy more"):
        host.require_memory({"tables": 10**15}, "buy more")
