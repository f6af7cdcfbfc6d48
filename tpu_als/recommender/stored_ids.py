"""Ids in the file of a recommender. Nothing is pickled."""

from __future__ import annotations

import ipaddress
import itertools
import json
import pathlib
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd

from tpu_als.datasets.columns import index_of, missing
from tpu_als.datasets.kinds import kind_of_values, shown
from tpu_als.recommender.ids import IdMap, as_held

_PLAIN = (str, int, float, bool)  # types of JSON
_NUMPY = (np.number, np.bool_, np.str_)
_CONTAINERS: dict[str, type] = {"tuple": tuple, "frozenset": frozenset}
_SOME = 100  # ids that `unstorable` writes and reads
_ADVICE = (
    "convert them, for example with astype(str), or pickle the recommender instead of saving it"
)


def _decimal(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"{text!r:.60} is not a decimal") from None
    if value.is_nan():
        raise ValueError("a decimal that is not a number")
    return value


def _span_text(value: timedelta) -> str:
    return f"{value.days} {value.seconds} {value.microseconds}"


def _span(text: str) -> timedelta:
    days, seconds, microseconds = map(int, text.split())
    return timedelta(days, seconds, microseconds)


def _period_text(value: pd.Period) -> str:
    return f"{value.ordinal} {value.freqstr}"


def _period(text: str) -> pd.Period:
    ordinal, frequency = text.split(" ", 1)
    return pd.PeriodIndex.from_ordinals([int(ordinal)], freq=frequency)[0]


def _interval_text(value: pd.Interval) -> str:
    return json.dumps([_plain(value.left), _plain(value.right), value.closed])


def _interval(text: str) -> pd.Interval:
    left, right, closed = json.loads(text)
    ends = [_value(left), _value(right)]
    if all(isinstance(end, pd.Timestamp) and end.tz is not None for end in ends):
        ends = [end.tz_convert("UTC") for end in ends]  # both need the same offset
    return pd.Interval(*ends, closed)


# Ids that are objects: name in the file, type, writer, reader.
_OBJECTS: dict[str, tuple[Any, Callable[[Any], str], Callable[[str], Any]]] = {
    "uuids": (UUID, str, UUID),
    "decimals": (Decimal, str, _decimal),
    "dates": (date, date.isoformat, date.fromisoformat),
    "bytes": (bytes, lambda value: value.decode("latin-1"), lambda text: text.encode("latin-1")),
    # from here on format 4
    "fractions": (Fraction, str, Fraction),
    "complex numbers": (complex, repr, complex),
    "datetimes": (datetime, datetime.isoformat, datetime.fromisoformat),
    "timestamps": (pd.Timestamp, pd.Timestamp.isoformat, pd.Timestamp),
    "times of day": (time, time.isoformat, time.fromisoformat),
    "time spans": (timedelta, _span_text, _span),
    "timedeltas": (pd.Timedelta, pd.Timedelta.isoformat, pd.Timedelta),
    "periods": (pd.Period, _period_text, _period),
    "intervals": (pd.Interval, _interval_text, _interval),
    "paths": (type(pathlib.Path()), str, pathlib.Path),
    "posix paths": (pathlib.PurePosixPath, str, pathlib.PurePosixPath),
    "windows paths": (pathlib.PureWindowsPath, str, pathlib.PureWindowsPath),
    "IPv4 addresses": (ipaddress.IPv4Address, str, ipaddress.IPv4Address),
    "IPv6 addresses": (ipaddress.IPv6Address, str, ipaddress.IPv6Address),
    "IPv4 networks": (ipaddress.IPv4Network, str, ipaddress.IPv4Network),
    "IPv6 networks": (ipaddress.IPv6Network, str, ipaddress.IPv6Network),
}
_FORMS = {kind: form for form, (kind, *_) in _OBJECTS.items()}
_OF_FORMAT_3 = ("uuids", "decimals", "dates", "bytes")


def format_of(about: list[Any]) -> int:
    """The first format of files that has ids written like this."""
    form = about[2]
    if form in _OF_FORMAT_3:
        return 3
    return 4 if form in _OBJECTS or form in ("nested", "spans") else 1


def write(ids: IdMap, name: str, arrays: dict[str, Any]) -> list[Any]:
    """Write ids to an array; return how they are written.

    Raises
    ------
    ValueError
        For ids of other types than those of `_OBJECTS`, text, numbers, times, and tuples and
        frozensets of them, and for ids that `read` would not give back.
    """
    try:
        arrays[name], about = _written(ids.index, ids.kind)
    except ValueError as error:
        raise ValueError(f"ids of {name} cannot be saved, because they hold {error}") from None
    return [name, ids.kind, *about]


def read(about: Any, arrays: dict[str, np.ndarray]) -> IdMap:
    """Read ids; ValueError and the like if they are damaged."""
    name, _, form, detail, dtype = about
    index = as_held(_index_of(arrays[name], form, detail, dtype))
    if not index.is_unique or missing(index).any():
        raise ValueError(f"ids of {name} that are missing or repeated")
    return IdMap(index, kind=kind_of_values(index[:1], name))


def unstorable(ids: IdMap) -> str | None:
    """Reason why `write` would refuse these ids, with an example and advice; else None.

    The types of all ids are looked at, and some ids are written and read.
    """
    if ids.kind == "text" or not len(ids):
        return None
    try:
        if ids.first.dtype == object:
            _require_types(ids.first.tolist())
        _written(ids.first[:_SOME], ids.kind)
    except ValueError as error:
        return str(error)
    return None


def _written(index: pd.Index, kind: str) -> tuple[np.ndarray, list[Any]]:
    """An array, and its form; ValueError for ids that are not the same when they are read."""
    array, about = _array_of(index, kind)
    try:
        again = as_held(_index_of(array, *about))
        is_same = again.dtype == index.dtype and again.equals(index)
    except (ValueError, TypeError, LookupError, OverflowError, OSError):
        is_same = False
    if is_same:
        return array, about
    if about[0] == "times":
        raise ValueError(
            f"times with the time zone {about[1]!r:.60} (such as {shown(index[0])}), which cannot "
            "be written exactly: convert them, for example with dt.tz_convert('UTC') or astype(str)"
        )
    raise ValueError(f"values that cannot be written exactly, such as {shown(index[0])}: {_ADVICE}")


def _array_of(index: pd.Index, kind: str) -> tuple[np.ndarray, list[Any]]:
    """Ids as an array, and the form, detail and type that `_index_of` needs."""
    if kind == "text":
        text, form = "\0".join(index), "text"
        if text.count("\0") != len(index) - 1:
            text, form = json.dumps(list(index)), "json"
        return _bytes(text), [form, len(index), str(index.dtype)]
    if index.dtype.kind == "M":
        zone = str(index.tz) if getattr(index, "tz", None) is not None else None
        return index.asi8, ["times", zone, index.unit]
    if index.dtype.kind == "m":
        return index.asi8, ["spans", None, index.unit]
    if index.dtype.kind in "biuf" and isinstance(index.dtype, np.dtype):
        return index.to_numpy(), ["numbers", None, str(index.dtype)]
    values = index.tolist()
    _require_types(values)
    form, text = _text_of(values)
    if form == "intervals":  # the type of an array has the time zone and the unit
        index = index_of(pd.Series(values, dtype=object))
    return _bytes(text), [form, len(index), str(index.dtype)]


def _index_of(array: np.ndarray, form: str, detail: Any, dtype: str) -> pd.Index:
    """The ids that `_array_of` has converted."""
    if form == "numbers":
        return pd.Index(array, dtype=dtype)
    if form == "spans":
        return pd.TimedeltaIndex(array.view(f"timedelta64[{dtype}]"))
    if form == "times":
        times = pd.DatetimeIndex(array.view(f"datetime64[{dtype}]"))
        return times if detail is None else times.tz_localize("UTC").tz_convert(detail)
    text = array.tobytes().decode()
    values = text.split("\0") if form == "text" else _values_of(form, text)
    index = pd.Index(values, dtype=dtype, tupleize_cols=False)
    if len(index) != detail:
        raise ValueError(f"{len(index)} ids, expected {detail}")
    return index


def _require_types(values: list[Any]) -> None:
    """Raise ValueError for values of types that a file cannot hold."""
    known = {*_FORMS, *_PLAIN}
    for kind in _types(values):
        if kind not in known and not issubclass(kind, _NUMPY):
            example = next((value for value in values if type(value) is kind), values[0])
            raise ValueError(f"{kind.__name__} objects (such as {shown(example)}): {_ADVICE}")


def _types(values: Any) -> set[type]:
    """Types of values, and of those in containers."""
    found = set(map(type, values))
    containers = {kind for kind in found if issubclass(kind, tuple(_CONTAINERS.values()))}
    if containers:
        inner = (value for value in values if type(value) in containers)
        found |= _types(list(itertools.chain.from_iterable(inner)))
    return found - containers


def _text_of(values: list[Any]) -> tuple[str, str]:
    """The name of a form, and the values as text in it; ValueError if this changes a value."""
    kinds = set(map(type, values))
    form = _FORMS.get(next(iter(kinds))) if len(kinds) == 1 else None
    if form is not None:
        text = json.dumps([_OBJECTS[form][1](value) for value in values])
    elif kinds <= set(_PLAIN):
        form, text = "json", json.dumps(values)
    elif kinds == {tuple} and set(map(type, itertools.chain.from_iterable(values))) <= set(_PLAIN):
        form, text = "tuples", json.dumps([list(value) for value in values])
    else:
        form, text = "nested", json.dumps([_plain(value) for value in values])
    try:
        read = _values_of(form, text)
    except (ValueError, OverflowError):  # such as time spans beyond the range of pandas
        read = [None] * len(values)
    for one, again in zip(values, read, strict=True):
        if again != one:
            raise ValueError(
                f"values that cannot be written exactly, such as {shown(one)}: {_ADVICE}"
            )
    return form, text


def _values_of(form: str, text: str) -> list[Any]:
    values = json.loads(text)
    if form == "tuples":
        return [tuple(value) for value in values]
    if form == "nested":
        return [_value(value) for value in values]
    if form in _OBJECTS:
        return [_OBJECTS[form][2](str(value)) for value in values]
    if form != "json":
        raise ValueError(f"ids in the form {form!r:.60}")
    return list(values)


def _plain(value: Any) -> Any:
    """A value in the types of JSON: objects and containers become lists that begin with a name."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, _NUMPY):
        return _plain(value.item())
    if isinstance(value, frozenset):
        return ["frozenset", *sorted(map(_plain, value), key=json.dumps)]
    if isinstance(value, tuple):
        return ["tuple", *map(_plain, value)]
    form = _FORMS[type(value)]
    return [form, _OBJECTS[form][1](value)]


def _value(given: Any) -> Any:
    """The value that `_plain` has converted."""
    if not isinstance(given, list):
        return given
    form, *values = given
    if form in _CONTAINERS:
        return _CONTAINERS[form](map(_value, values))
    return _OBJECTS[form][2](str(values[0]))


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)
