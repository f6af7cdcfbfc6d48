"""Columns of times: their order, and microseconds that can be compared over several frames."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tpu_als.datasets.columns import distinct_values, plain, refusal
from tpu_als.datasets.kinds import kind_of_values, time_kind

_ZONE = r"[T ].*(?:Z|[+-]\d\d:?(?:\d\d)?)$"  # the end of an ISO 8601 text with an offset


def ranks_of_times(column: pd.Series) -> np.ndarray:
    """Ranks of a column of times; equal times have equal ranks.

    Parameters
    ----------
    column : Series of length n
        Times, dates, time spans, periods, finite numbers, ISO 8601 text, or an ordered categorical,
        which is ranked by the order of its categories.

    Returns
    -------
    ndarray of int64 and shape (n,)

    Raises
    ------
    ValueError
        For values of several types, or a value that is not a time.
    """
    name = column.name
    if isinstance(column.dtype, pd.CategoricalDtype) and column.cat.ordered:
        return column.cat.codes.to_numpy(np.int64)
    values = plain(column)
    kind = kind_of_values(values, f"column {name!r}")
    if kind in ("booleans", "complex numbers"):
        raise refusal(name, 0, values[0], "a time", "split by a column of times")
    codes, distinct = distinct_values(values)
    times = pd.Series(distinct)
    if kind == "text":
        times = _parsed(times, values, name)
    elif values.dtype.kind == "f" and np.isinf(values).any():
        row = np.flatnonzero(np.isinf(values))[0]
        raise refusal(name, row, values[row], "a finite time", "replace it or drop its row")
    # Ranks are of the exact values: as floats, times less than a microsecond apart would be equal.
    try:
        ranks = times.rank(method="dense").to_numpy(np.int64)
    except TypeError as error:
        message = f"column {name!r} holds {kind}, which cannot be sorted: {error}"
        raise ValueError(message) from error
    return ranks[codes]


def times_of(column: pd.Series) -> tuple[np.ndarray, str]:
    """Times that can be compared over several frames.

    Parameters
    ----------
    column : Series of length n
        Times, dates, ISO 8601 text, or finite numbers.

    Returns
    -------
    times : int64 or float64 array (n,)
        Microseconds since 1970, in UTC if there is a time zone; numbers as they are.
    kind : {"numbers", "times with a time zone", "times without a time zone"}

    Raises
    ------
    ValueError
        For values of several types, or a value that is not a time.
    """
    name = column.name
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    values = plain(column)
    kind = kind_of_values(values, f"column {name!r}") if len(values) else "numbers"
    if kind == "numbers":
        numbers = values.to_numpy(np.int64 if values.dtype.kind in "iu" else np.float64)
        wrong = np.flatnonzero(~np.isfinite(numbers))
        if len(wrong):
            row = wrong[0]
            raise refusal(name, row, values[row], "a finite time", "replace it or drop its row")
        return numbers, kind
    if kind == "text":
        codes, distinct = distinct_values(values)
        texts = pd.Series(distinct)
        times = _parsed(texts, values, str(name))
        is_zoned = bool(texts.str.contains(_ZONE, regex=True).any())
        return _microseconds(times)[codes], time_kind(is_zoned or None)
    times = pd.to_datetime(values, errors="coerce", utc=True)
    wrong = np.flatnonzero(times.isna())
    if (not kind.startswith("times") and kind != "date objects") or len(wrong):
        row = wrong[0] if len(wrong) else 0
        raise refusal(name, row, values[row], "a time", "convert it with pandas.to_datetime")
    return _microseconds(times), kind if kind.startswith("times") else time_kind(None)


def _microseconds(times: pd.Series) -> np.ndarray:
    return times.dt.tz_localize(None).to_numpy("datetime64[us]").astype(np.int64)


def _parsed(texts: pd.Series, values: pd.Series, name: str) -> pd.Series:
    """Parse distinct texts as times in UTC; `values` is their column, for messages."""
    times = pd.to_datetime(texts, format="ISO8601", errors="coerce", utc=True)
    zoned = texts.str.contains(_ZONE, regex=True).to_numpy(bool)
    wrong, expected = times.isna().to_numpy(), "text by ISO 8601 (such as '2020-01-31 12:00')"
    if not wrong.any() and len(zoned):
        wrong = zoned != zoned[0]
        expected = f"a time {'with' if zoned[0] else 'without'} an offset, as in row 0"
    if wrong.any():
        row = np.flatnonzero(values.isin(texts[wrong]))[0]
        advice = f"convert the column first, with pandas.to_datetime(frame[{name!r}], format=...)"
        raise refusal(name, row, values[row], expected, advice)
    return times
