"""Check the counts that are passed to splits, metrics and scorers."""

from __future__ import annotations

from numbers import Integral


def integer(name: str, value: object, least: int = 1) -> int:
    """Check that a count is an integer of at least `least`, and return it as an int."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
