"""The types of ids, in words. Objects and arrays of the same values have the same words."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from numbers import Real

import numpy as np
import pandas as pd

_KINDS = {
    "b": "booleans", "i": "numbers", "u": "numbers", "f": "numbers", "c": "complex numbers",
    "m": "time spans",
}  # fmt: skip
# Types of objects that pandas detects without a loop in Python.
_INFERRED = {
    "string": "text", "boolean": "booleans", "integer": "numbers", "floating": "numbers",
    "mixed-integer-float": "numbers", "decimal": "numbers", "empty": "nothing",
}  # fmt: skip


def kind_of_values(
    values: pd.Series | pd.Index, label: str, codes: np.ndarray | None = None
) -> str:
    """Return the type of these values in words; ValueError if they have different types.

    `codes` are the positions of a column's rows among these values, if these are not the rows.
    """
    dtype = values.dtype
    if isinstance(dtype, pd.StringDtype):
        return "text"
    if dtype.kind == "M":
        return time_kind(getattr(dtype, "tz", None))
    if isinstance(dtype, (pd.PeriodDtype, pd.IntervalDtype)):
        return _kind_of(values.array[0]) if len(values) else "nothing"
    if not pd.api.types.is_object_dtype(dtype):
        return _KINDS.get(dtype.kind, str(dtype))
    inferred = _INFERRED.get(pd.api.types.infer_dtype(values, skipna=False))
    if inferred is not None:
        return inferred
    first, row_of_first = None, 0
    order = range(len(values)) if codes is None else pd.unique(codes)
    for at, value in zip(order, values[order], strict=True):
        kind = _kind_of(value)
        if first is None:
            first, row_of_first = kind, row_of(at, codes)
        try:
            hash(value)
        except TypeError:
            raise ValueError(
                f"{label} holds {shown(value)} in row {row_of(at, codes)} (counted from 0), which "
                "cannot be hashed: use numbers, text, times or tuples of them"
            ) from None
        if kind != first:
            raise ValueError(
                f"{label} holds values of different types, which cannot be compared: {first} "
                f"({shown(values[order[0]])}) in row {row_of_first}, but {kind} ({shown(value)}) "
                f"in row {row_of(at, codes)} (counted from 0). Convert them to one type, for "
                "example with astype(str)"
            )
    return first or "nothing"


def _kind_of(value: object) -> str:
    """The type of an object, in the same words as that of an array of such values."""
    if isinstance(value, (bool, np.bool_)):
        return "booleans"
    if isinstance(value, (Real, Decimal)):
        return "numbers"
    if isinstance(value, str):
        return "text"
    if isinstance(value, datetime):
        return time_kind(value.tzinfo)
    if isinstance(value, (timedelta, np.timedelta64)):
        return _KINDS["m"]
    if isinstance(value, (complex, np.complexfloating)):
        return _KINDS["c"]
    if isinstance(value, (tuple, frozenset)):  # a named tuple is equal to a tuple
        return "tuple objects" if isinstance(value, tuple) else "frozenset objects"
    if isinstance(value, pd.Period):
        return f"periods of the frequency {value.freqstr}"
    if isinstance(value, pd.Interval):
        return f"intervals of {_kind_of(value.left)}"
    return f"{type(value).__name__} objects"


def time_kind(zone: object) -> str:
    """The type of times, in words, by their time zone."""
    return "times without a time zone" if zone is None else "times with a time zone"


def row_of(at: int, codes: np.ndarray | None) -> int:
    """The first row that has the value at this position; `codes` are the positions of the rows."""
    return at if codes is None else int(np.flatnonzero(codes == at)[0])


def shown(value: object) -> str:
    """A value formatted for messages."""
    return f"{unboxed(value)!r:.60}"


def unboxed(value: object) -> object:
    """A value of NumPy as one of Python."""
    return value.item() if isinstance(value, np.generic) else value
