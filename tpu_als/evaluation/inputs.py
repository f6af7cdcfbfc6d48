"""Check the numbers that are passed to splits, metrics and scorers."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def whole_number(name: str, value: object, least: int = 1) -> int:
    """Check that a count is an integer of at least `least`, and return it as an int."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def is_number(value: object) -> bool:
    """Whether a value is a finite real number, but not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def fraction(name: str, value: Any) -> float:
    """Check that a value is a number between 0 and 1, both excluded, and return it as a float."""
    if not is_number(value) or not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return float(value)
