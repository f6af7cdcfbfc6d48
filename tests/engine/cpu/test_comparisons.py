"""Comparisons in LLVM's vector instructions, for registers of each size, and orders of floats."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from tpu_als.engine.cpu import comparisons, emitter, intrinsics

DTYPES = ["float32", "float64"]


@pytest.fixture(params=[16, 32, 64])
def register_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The size of registers for which functions are compiled; LLVM splits those it has not."""
    monkeypatch.setattr(emitter, "REGISTER_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_maxima(dtype: str, is_scaled: bool, register_bytes: int) -> None:
    lanes, rng = register_bytes // np.dtype(dtype).itemsize, np.random.default_rng(0)
    numbers, factors = rng.normal(size=100).astype(dtype), (1 + rng.random(100)).astype(dtype)
    out, factor = np.full(lanes + 2, 7, dtype), 2 if is_scaled else -1

    @numba.njit
    def run(numbers: Any, factors: Any, factor: int, out: Any) -> Any:
        return comparisons.maxima(numbers, factors, (5, 3, factor, 1), out)

    assert not run(numbers, factors, factor, out)
    scores = numbers[5 : 5 + 3 * lanes]
    if is_scaled:
        scores = scores * factors[2 : 2 + 3 * lanes]
    np.testing.assert_array_equal(out[1:-1], scores.reshape(3, lanes).max(axis=0))
    assert out[0] == out[-1] == 7
    for bad in (np.nan, np.inf):
        for at in (5, 5 + 3 * lanes - 1):
            changed = numbers.copy()
            changed[at] = bad
            assert run(changed, factors, factor, out)
    for fine in (-np.inf, np.finfo(dtype).max / 2):
        numbers[5] = fine
        assert not run(numbers, factors, factor, out)


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_least(dtype: str, is_scaled: bool, register_bytes: int) -> None:
    lanes, rng = register_bytes // np.dtype(dtype).itemsize, np.random.default_rng(1)
    numbers = rng.integers(-3, 4, 40).astype(dtype)
    factors = np.where(rng.random(40) < 0.5, 1, 2).astype(dtype)

    @numba.njit
    def run(numbers: Any, factors: Any, factor: int, least: Any) -> Any:
        return comparisons.at_least(numbers, factors, (3, factor), least)

    scores = numbers[3 : 3 + lanes] * (factors[1 : 1 + lanes] if is_scaled else 1)
    for least in (-4, -1, 0, 2, 7):
        bits = run(numbers, factors, 1 if is_scaled else -1, np.dtype(dtype).type(least))
        assert [bool(bits >> at & 1) for at in range(lanes)] == (scores >= least).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_orders_of_floats(dtype: str) -> None:
    info = np.finfo(dtype)
    sizes = [0.0, info.smallest_subnormal, info.tiny, 1, 1 + info.eps, 7, info.max, np.inf]
    numbers = np.array([-size for size in sizes[::-1]] + sizes, dtype)

    @numba.njit
    def run(numbers: Any, orders: Any, back: Any) -> None:
        for at in range(len(numbers)):
            orders[at] = intrinsics.order_of(numbers[at])
            back[at] = intrinsics.float_at(orders[at], numbers[at])

    orders, back = np.empty(len(numbers), np.int64), np.empty_like(numbers)
    run(numbers, orders, back)
    assert (np.diff(orders) > 0).all()
    np.testing.assert_array_equal(back.view(np.uint8), numbers.view(np.uint8))


def test_the_lowest_bit() -> None:
    run = numba.njit(lambda bits: intrinsics.lowest_bit(bits))
    assert [run(bits) for bits in (1, 2, 12, 1 << 40, (1 << 40) + 8)] == [0, 1, 2, 40, 3]
