"""Programs are kept for each set of arguments, and dropped when there are too many of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tpu_als.engine.xla.programs import Program, ProgramCache


def _cached(most: int) -> tuple[ProgramCache, Callable[..., Program]]:
    cache = ProgramCache(most)

    @cache.keep
    def scaled_by(factor: int) -> Program:
        return jax.jit(lambda values: factor * values)

    return cache, scaled_by


def _run(cache: ProgramCache, program: Program, size: int) -> Any:
    values = np.ones(size, np.float32)
    cache.compile_new([(program, (values,))], "float32", lambda work, keys: list(map(work, keys)))
    return program(values)


def test_equal_arguments_give_the_same_program() -> None:
    _, scaled_by = _cached(9)
    assert scaled_by(2) is scaled_by(2) is not scaled_by(3)


def test_each_shape_counts() -> None:
    cache, scaled_by = _cached(9)
    for size in (1, 2, 2):
        _run(cache, scaled_by(2), size)
    assert cache.n_compiled() == 2


def test_all_are_dropped_when_there_would_be_too_many() -> None:
    cache, scaled_by = _cached(3)
    first = scaled_by(1)
    for size in range(1, 10):
        assert _run(cache, scaled_by(1), size).tolist() == [1] * size
        assert cache.n_compiled() <= 3
    assert scaled_by(1) is not first
