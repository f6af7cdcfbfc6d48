"""Events to cells: the value of each event, combined for each pair of a user and an item."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from tpu_als.datasets import columns as event_columns
from tpu_als.datasets.kinds import shown
from tpu_als.datasets.times import times_of
from tpu_als.recommender.history import Cells
from tpu_als.recommender.schema import Schema

_FAINTEST = -900.0  # exponent of the smallest decay: the sign of a value is never lost
_LARGEST = float(np.finfo(np.float32).max)


class Clock(NamedTuple):
    """How times are compared.

    Attributes
    ----------
    kind : str
        The type of the times, in words.
    latest : int or float
        The latest time of the data of `fit`, whose events have their full value.
    newest : int or float
        The latest time of all events, also of updates.
    """

    kind: str
    latest: Any
    newest: Any

    def after(self, events: Events) -> Clock:
        """The clock after an update by some events."""
        if events.latest is None:
            return self
        return self._replace(newest=max(self.newest, events.latest))


class Events(NamedTuple):
    """Checked events, without those of types of weight 0.

    Attributes
    ----------
    frame : DataFrame
        The columns of ids.
    values : float64 array (n,)
        Value of each event, times the weight of its type.
    times : int64 or float64 array (n,), or None
        Their times, comparable over calls.
    kind : str
        Type of the times.
    """

    frame: pd.DataFrame
    values: np.ndarray
    times: np.ndarray | None
    kind: str

    @property
    def latest(self) -> Any:
        """The latest time; None without times or events."""
        return self.times.max() if self.times is not None and len(self.times) else None


def checked(frame: pd.DataFrame, schema: Schema) -> Events:
    """Check the columns of an event frame.

    Raises
    ------
    ValueError
        For a column that is missing, missing values, values that are not numbers or times, and
        types without a weight. The message has column, row and value.
    """
    found = dict(zip(schema.columns, event_columns.columns_of(frame, schema.columns), strict=True))
    values = np.ones(len(frame))
    if schema.value is not None:
        values = event_columns.numbers_of(found[schema.value])
    times, kind = None, ""
    if schema.timestamp is not None:
        times, kind = _times(found[schema.timestamp], schema)
    ids = pd.DataFrame({name: found[name] for name in (schema.user, schema.item)})
    if schema.event is not None:
        factors = _factors(found[schema.event], schema.event_weights)
        values = values * factors
        if not factors.all():
            kept = factors != 0
            ids, values = ids[kept], values[kept]
            times = None if times is None else times[kept]
    return Events(ids, values, times, kind)


def no_events(schema: Schema) -> Events:
    """Events that change nothing."""
    times = None if schema.timestamp is None else np.empty(0, np.int64)
    ids = pd.DataFrame({name: pd.Series([], dtype=object) for name in (schema.user, schema.item)})
    return Events(ids, np.empty(0), times, "")


def _factors(kinds: pd.Series, weights: dict[Any, float]) -> np.ndarray:
    codes, distinct = pd.factorize(kinds)
    factors = np.array([weights.get(kind, np.nan) for kind in distinct], np.float64)[codes]
    wrong = np.flatnonzero(np.isnan(factors))
    if len(wrong):
        raise ValueError(
            f"column {kinds.name!r} holds {shown(kinds.iloc[wrong[0]])} in row {wrong[0]} (counted "
            f"from 0), which is not a key of event_weights ({len(wrong)} rows in all). The keys are"
            f" {list(weights)}. Add it, with 0 to ignore its events"
        )
    return factors


def _times(column: pd.Series, schema: Schema) -> tuple[np.ndarray, str]:
    """Times as microseconds, or as the numbers they are; and their type in words."""
    times, kind = times_of(column)
    if (
        schema.half_life is not None
        and len(times)
        and schema.is_duration != kind.startswith("times")
    ):
        wanted = "a number in their unit" if kind == "numbers" else "a duration such as '30D'"
        raise ValueError(f"column {column.name!r} holds {kind}: half_life must be {wanted}")
    return times, kind


def check_times(events: Events, schema: Schema, clock: Clock | None) -> None:
    """Raise ValueError if events have times of another type than the events of `fit`."""
    if clock is not None and len(events.frame) and events.kind not in ("", clock.kind):
        raise ValueError(
            f"column {schema.timestamp!r} holds {events.kind}, but the data of fit hold "
            f"{clock.kind}: convert one of them"
        )


def decayed(events: Events, schema: Schema, clock: Clock | None) -> np.ndarray:
    """Values (n,) with the decay of `half_life`, which is 1 at the latest time of `fit`."""
    if schema.half_life is None or events.times is None or clock is None:
        return events.values
    age = (clock.latest - events.times) / schema.half_life
    with np.errstate(over="ignore"):
        return events.values * np.exp2(np.maximum(-age, _FAINTEST))


def now(values: np.ndarray, schema: Schema, clock: Clock | None) -> np.ndarray:
    """Values (n,) of events without a time, which count as at the newest time of all events."""
    if schema.half_life is None or clock is None:
        return values
    with np.errstate(over="ignore"):
        return values * np.exp2((clock.newest - clock.latest) / schema.half_life)


def cells_of(
    events: Events, values: np.ndarray, at: tuple[np.ndarray, np.ndarray], shape: tuple[int, int],
    repeated: str,
) -> Cells:  # fmt: skip
    """Combine the values of events of the same user and item.

    Parameters
    ----------
    events : Events
        Their order and times decide which is the last.
    values : float64 array (n,)
        Value of each event.
    at : two of int64 array (n,)
        User and item of each event.
    shape : (int, int)
        Numbers of users and items.
    repeated : {"sum", "last", "max"}
        How to combine.

    Returns
    -------
    Cells
        Without weights: they are zero.
    """
    users, items = at
    times = None
    if repeated == "sum":
        sums = sparse.csr_matrix((values, (users, items)), shape=shape)
        sums.sum_duplicates()
        indptr, items, values = sums.indptr, sums.indices, sums.data
    else:
        # The last of each group after sorting: the latest event, or the largest value.
        key = (values,) if repeated == "max" else () if events.times is None else (events.times,)
        order = np.lexsort((*key, items, users))
        users, items, values = users[order], items[order], values[order]
        is_last = np.append((np.diff(users) != 0) | (np.diff(items) != 0), True)[: len(order)]
        users, items, values = users[is_last], items[is_last], values[is_last]
        if repeated == "last" and events.times is not None:
            times = events.times[order][is_last]
        indptr = np.append(0, np.cumsum(np.bincount(users, minlength=shape[0])))
    if not np.all(np.abs(values) <= _LARGEST):
        raise ValueError(
            "the combined values of a user and an item are beyond float32: scale the column of "
            "values down, or fit again if half_life makes new events large"
        )
    weights = np.zeros(len(values), np.float32)
    return Cells(indptr.astype(np.int64), items.astype(np.int32), values, weights, times)


def combined(old: Cells, new: Cells, repeated: str) -> Cells:
    """Combine cells of the same rows. Without times, or at equal times, `new` is the later one."""
    n_rows = len(old.indptr) - 1
    rows = np.repeat(np.tile(np.arange(n_rows), 2), np.append(old.lengths, new.lengths))
    items, values = np.append(old.items, new.items), np.append(old.values, new.values)
    is_new = np.repeat([0, 1], [len(old.items), len(new.items)])
    times = None
    if old.times is not None and new.times is not None:
        times = np.append(old.times, new.times)
    key = is_new if times is None else times
    order = np.lexsort((is_new, key, items, rows))
    rows, items, values = rows[order], items[order], values[order]
    is_first = np.append(True, (np.diff(rows) != 0) | (np.diff(items) != 0))[: len(order)]
    starts = np.flatnonzero(is_first)
    if not len(starts):
        return old
    if repeated == "sum":
        merged = np.add.reduceat(values, starts)
    elif repeated == "max":
        merged = np.maximum.reduceat(values, starts)
    else:
        ends = np.append(starts[1:], len(order)) - 1
        merged = values[ends]
        times = None if times is None else times[order][ends]
    indptr = np.append(0, np.cumsum(np.bincount(rows[starts], minlength=n_rows)))
    weights = np.zeros(len(starts), np.float32)
    return Cells(indptr, items[starts], merged, weights, times if repeated == "last" else None)
