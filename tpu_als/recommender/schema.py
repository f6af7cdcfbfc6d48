"""What the columns of an event frame mean, from the parameters of a `Recommender`."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

_CHOICES = {"repeated": ("sum", "last", "max"), "unknown": ("popular", "drop", "error")}


class Schema(NamedTuple):
    """The columns of an event frame, and how events become values.

    Attributes
    ----------
    user, item : str
        Columns of ids.
    value, timestamp, event : str or None
        Columns of numbers, times and types.
    event_weights : dict
        Factor of each type.
    half_life : int, float or None
        Time in which the value of an event halves: microseconds, or the unit of numeric times.
    is_duration : bool
        Whether `half_life` is a duration, for columns of times, and not a number.
    repeated : {"sum", "last", "max"}
        How the values of a user's events with the same item are combined.
    """

    user: str
    item: str
    value: str | None
    timestamp: str | None
    event: str | None
    event_weights: dict[Any, float]
    half_life: float | None
    is_duration: bool
    repeated: str

    @property
    def columns(self) -> list[str]:
        """All columns that are read."""
        names = (self.user, self.item, self.value, self.timestamp, self.event)
        return [name for name in names if name is not None]


def schema_of(recommender: Any) -> Schema:
    """Check the parameters of a recommender.

    Raises
    ------
    ValueError
        For a parameter out of range, and for parameters that contradict each other.
    """
    names: dict[str, Any] = {}
    for name in ("user", "item", "value", "timestamp", "event"):
        given = getattr(recommender, name)
        is_optional = name not in ("user", "item")
        if not (isinstance(given, str) or (given is None and is_optional)):
            raise ValueError(f"{name} must be the name of a column, got {given!r:.60}")
        names[name] = given
    used = [given for given in names.values() if given is not None]
    if len(set(used)) < len(used):
        raise ValueError(
            f"user, item, value, timestamp and event must name different columns, got {names}"
        )
    for name in _CHOICES:
        choice(recommender, name)
    half_life, is_duration = _half_life(recommender.half_life, names["timestamp"])
    weights = _event_weights(recommender.event_weights, names["event"])
    return Schema(
        **names,
        event_weights=weights,
        half_life=half_life,
        is_duration=is_duration,
        repeated=recommender.repeated,
    )


def choice(recommender: Any, name: str) -> str:
    """The parameter `repeated` or `unknown`; ValueError if it is none of its choices.

    `unknown` is read by each answer, so it is checked there too.
    """
    given: str = getattr(recommender, name)
    if given not in _CHOICES[name]:
        raise ValueError(f"{name} must be one of {_CHOICES[name]}, got {given!r:.60}")
    return given


def _half_life(given: Any, timestamp: str | None) -> tuple[float | None, bool]:
    if given is None:
        return None, False
    if timestamp is None:
        raise ValueError(f"half_life={given!r} needs times: set timestamp to the name of a column")
    is_number = isinstance(given, Real) and not isinstance(given, (bool, np.bool_))
    try:
        length = float(given) if is_number else pd.Timedelta(given).value / 1000
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"half_life must be a duration such as '30D', or for numeric times a number in their "
            f"unit, got {given!r:.60}"
        ) from error
    if not (np.isfinite(length) and length > 0):
        raise ValueError(f"half_life must be above 0, got {given!r:.60}")
    return length, not is_number


def _event_weights(given: Any, event: str | None) -> dict[Any, float]:
    if given is None and event is None:
        return {}
    if given is None or event is None:
        lacking, present = (
            ("event_weights", "event") if given is None else ("event", "event_weights")
        )
        raise ValueError(f"{present} needs {lacking} too: event={event!r}, event_weights={given!r}")
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"event_weights must map each event type to a number, got {given!r:.60}")
    for kind, weight in given.items():
        is_number = isinstance(weight, Real) and not isinstance(weight, (bool, np.bool_))
        if not is_number or not np.isfinite(float(weight)):
            raise ValueError(f"event_weights[{kind!r}] must be a finite number, got {weight!r:.60}")
    return {kind: float(weight) for kind, weight in given.items()}
