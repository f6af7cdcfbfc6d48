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

from tpu_als.datasets.columns import missing, shown
from tpu_als.recommender.ids import IdMap

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
    return pd.Interval(_value(left), _value(right), closed)


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
    return 3 if form in _OF_FORMAT_3 else 4 if form in _OBJECTS or form == "nested" else 1


def write(ids: IdMap, name: str, arrays: dict[str, Any]) -> list[Any]:
    """Write ids to an array; return how they are written.

    Raises
    ------
    ValueError
        For ids of other types than those of `_OBJECTS`, text, numbers, times, and tuples and
        frozensets of them.
    """
    index, kind = ids.index, ids.kind
    if kind == "text":
        text = "\0".join(index)
        if text.count("\0") == len(index) - 1:
            arrays[name] = _bytes(text)
            return [name, kind, "text", len(index), str(index.dtype)]
        arrays[name] = _bytes(json.dumps(list(index)))
        return [name, kind, "json", len(index), str(index.dtype)]
    if kind.startswith("times") and index.dtype.kind == "M":
        zone = str(index.tz) if getattr(index, "tz", None) is not None else None
        arrays[name] = index.asi8
        return [name, kind, "times", zone, index.unit]
    if index.dtype.kind in "biuf" and isinstance(index.dtype, np.dtype):
        arrays[name] = index.to_numpy()
        return [name, kind, "numbers", None, str(index.dtype)]
    values = index.tolist()
    try:
        _require_types(values)
        form, text = _text_of(values)
    except ValueError as error:
        raise ValueError(f"ids of {name} cannot be saved, because they hold {error}") from None
    arrays[name] = _bytes(text)
    return [name, kind, form, len(index), str(index.dtype)]


def read(about: Any, arrays: dict[str, np.ndarray]) -> IdMap:
    """Read ids; ValueError and the like if they are damaged."""
    name, kind, form, detail, dtype = about
    array = arrays[name]
    if form == "numbers":
        index = pd.Index(array, dtype=dtype)
    elif form == "times":
        times = pd.DatetimeIndex(array.view(f"datetime64[{dtype}]"))
        index = times if detail is None else times.tz_localize("UTC").tz_convert(detail)
    else:
        text = array.tobytes().decode()
        values = text.split("\0") if form == "text" else _values_of(form, text)
        index = pd.Index(values, dtype=dtype, tupleize_cols=False)
        if len(index) != detail:
            raise ValueError(f"{len(index)} ids of {name}, expected {detail}")
    if not index.is_unique or missing(index).any():
        raise ValueError(f"ids of {name} that are missing or repeated")
    return IdMap(index, kind=str(kind))


def unstorable(ids: IdMap) -> str | None:
    """Reason why `write` would refuse these ids, with an example and advice; else None.

    The types of all ids are looked at, and some ids are written and read.
    """
    if ids.kind == "text" or not len(ids):
        return None
    values = (ids.first if ids.first.dtype == object else ids.first[:_SOME]).tolist()
    try:
        _require_types(values)
        _text_of(values[:_SOME])
    except ValueError as error:
        return str(error)
    return None


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
    for one, again in zip(values, _values_of(form, text), strict=True):
        if again != one:
            raise ValueError(f"ids that cannot be written exactly, such as {shown(one)}: {_ADVICE}")
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
