"""Check fractions, and find the latest fraction of times."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np


def is_number(value: object) -> bool:
    """Whether a value is a finite real number, but not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def require(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a number between 0 and 1, both excluded."""
    if not is_number(value) or not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")


def is_latest(times: np.ndarray, fraction: float) -> np.ndarray:
    """Whether each of `times` (n,) is later than the cut, of which at most a fraction are.

    The cut is one of the times. Times equal to it are not later, so all of them stay together.
    """
    cut = np.quantile(times, 1 - fraction, method="lower") if len(times) else 0
    return times > cut
