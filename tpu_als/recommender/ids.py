"""The ids of users or items, and their positions in the tables. Positions never change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from tpu_als.datasets.columns import index_from, index_of, missing, occurring
from tpu_als.datasets.kinds import shown

_INTEGER = r"-?(?:0|[1-9]\d{0,17})"  # text that stays the same as an int64
_SHARE = 8  # ids added by updates are merged when they are more than 1/8 of all


@dataclass(frozen=True)
class IdMap:
    """Ids in the order of their positions: those of `fit`, ascending, then those added later.

    Attributes
    ----------
    first : Index
        The ids of `fit`, and those merged into it.
    added : Index
        The ids after them.
    kind : str
        Their type in words, "nothing" if there are none.
    """

    first: pd.Index
    added: pd.Index = field(default_factory=lambda: pd.Index([]))
    kind: str = "nothing"

    def __len__(self) -> int:
        return len(self.first) + len(self.added)

    @property
    def index(self) -> pd.Index:
        """All ids."""
        return _joined(self.first, self.added) if len(self.added) else self.first

    def take(self, positions: np.ndarray) -> pd.Index:
        """The ids at some positions."""
        is_added = positions >= len(self.first)
        if not is_added.any():
            return self.first.take(positions)
        both = self.first.take(positions[~is_added])
        both = _joined(both, self.added.take(positions[is_added] - len(self.first)))
        order = np.empty(len(positions), np.int64)
        order[np.argsort(is_added, kind="stable")] = np.arange(len(positions))
        return both.take(order)

    def prepare(self) -> None:
        """Build the hash table that `positions` and `grown` need, which later maps share."""
        self.first.get_indexer(self.first[:1])

    def positions(self, column: pd.Series, label: str) -> np.ndarray:
        """Position (n,) of each value, int64; -1 for ids that are not in the map.

        Parameters
        ----------
        column : Series of length n
            Without missing values.
        label : str
            What the column is called in messages.

        Raises
        ------
        ValueError
            For ids of several types, or of another type than those of the map.
        """
        codes, distinct = self._distinct(column, label)
        return self._find(distinct)[codes]

    def grown(self, column: pd.Series, label: str) -> tuple[IdMap, np.ndarray]:
        """Add the ids that are not in the map; return the new map and the positions (n,)."""
        codes, distinct = self._distinct(column, label)
        if not len(self):
            known, order = _ascending(distinct)
            places = np.empty(len(order), np.int64)
            places[order] = np.arange(len(order))
            return IdMap(known, kind=_kind_of(known)), places[codes]
        found = self._find(distinct)
        is_new = found < 0
        if not is_new.any():
            return self, found[codes]
        new, _ = _ascending(distinct[is_new])
        if len(self.added) + len(new) <= len(self.first) // _SHARE:
            added = _joined(self.added, new) if len(self.added) else new
            known = IdMap(self.first, added, self.kind)
        else:
            known = IdMap(_joined(self.index, new), kind=self.kind)
        return known, known._find(distinct)[codes]

    def _distinct(self, column: pd.Series, label: str) -> tuple[np.ndarray, pd.Index]:
        codes, values, kind = occurring(column, label)
        if self.kind not in ("nothing", kind) and len(values):
            raise ValueError(
                f"{label} holds {kind} (such as {shown(values.iloc[0])}), but the ids of the data "
                f"of fit are {self.kind} (such as {shown(self.first[0])}), so no id can match: "
                "convert one of them with astype"
            )
        return codes, self._of_same_type(as_ids(values), label)

    def _of_same_type(self, distinct: pd.Index, label: str) -> pd.Index:
        """Ids in the type of those of the map; ValueError for numbers that are not equal then.

        Times get the time zone of the map, because pandas joins those of several as objects.
        """
        own = self.first.dtype
        if isinstance(own, pd.DatetimeTZDtype) and isinstance(distinct.dtype, pd.DatetimeTZDtype):
            distinct = pd.DatetimeIndex(distinct).tz_convert(own.tz)
        given = distinct.dtype
        if own == given or not len(self.first):
            return distinct
        if own.kind in "mM" and given.kind in "mM":
            return self._in_unit(distinct, label)
        if not all(isinstance(t, np.dtype) and t.kind in "iuf" for t in (own, given)):
            return distinct.astype(own) if self.kind == "text" else distinct
        values = distinct.to_numpy()
        with np.errstate(invalid="ignore"):
            converted = values.astype(own)
            is_same = (converted.astype(given) == values) & ((converted < 0) == (values < 0))
        if is_same.all():
            return pd.Index(converted)
        if own.kind in "iu" and given.kind in "iu":  # beyond the range: none of the map's ids
            return distinct.astype(object)
        raise ValueError(
            f"{label} holds {shown(values[~is_same][0])} ({given}), which is not an id of the "
            f"type of the data of fit, {own}: convert the ids to that type"
        )

    def _in_unit(self, distinct: Any, label: str) -> pd.Index:
        """Times or time spans in the unit of those of the map, if it holds them exactly."""
        known: Any = self.first
        try:
            converted: pd.Index = distinct.as_unit(known.unit)
            if (converted.as_unit(distinct.unit) == distinct).all():
                return converted
            known.as_unit(distinct.unit)
        except (pd.errors.OutOfBoundsDatetime, pd.errors.OutOfBoundsTimedelta):
            raise ValueError(
                f"{label} holds {shown(distinct[0])} ({distinct.dtype}), which cannot be compared "
                f"with the ids of the data of fit, such as {shown(known[0])} ({known.dtype}): "
                "convert the ids of both to one unit, for example with dt.as_unit('us')"
            ) from None
        return distinct

    def _find(self, distinct: pd.Index) -> np.ndarray:
        found = self.first.get_indexer(distinct).astype(np.int64)
        if len(self.added):
            missing = np.flatnonzero(found < 0)
            later = self.added.get_indexer(distinct[missing])
            found[missing] = np.where(later < 0, -1, later + len(self.first))
        return found


def whole_numbers(column: pd.Series) -> pd.Series:
    """Convert ids read as text to integers if all are written as integers: "12", but not "012"."""
    codes, distinct = pd.factorize(column)
    texts = pd.Series(distinct)
    if not len(texts) or not texts.str.fullmatch(_INTEGER).all():
        return column
    numbers = pd.Index(texts.astype(np.int64))
    return pd.Series(pd.Categorical.from_codes(codes, numbers), column.index, name=column.name)


def _ascending(ids: pd.Index) -> tuple[pd.Index, np.ndarray]:
    """Sorted ids, and their order; ids that cannot be compared stay as they occur."""
    try:
        order = ids.argsort()
    except TypeError:
        order = np.arange(len(ids))
    return ids[order], order


def as_ids(values: pd.Series) -> pd.Index:
    """Distinct values of a column in the type in which a map holds them."""
    return as_held(index_of(values))


def as_held(ids: pd.Index) -> pd.Index:
    """Ids in the type in which a map holds them.

    Integers are int64 (or uint64), which later ids fit into. Intervals are objects, because pandas
    does not look up overlapping ones, and those of integers and floats may be equal. Named tuples
    are tuples, which old versions of pandas do not find otherwise.
    """
    if isinstance(ids.dtype, pd.IntervalDtype):
        return ids.astype(object)
    if ids.dtype == object and len(ids) and isinstance(ids[0], tuple):
        values = ids.tolist()
        if any(type(value) is not tuple for value in values):
            return pd.Index(list(map(tuple, values)), tupleize_cols=False)
    is_narrow = ids.dtype.kind in "iu" and ids.dtype != np.uint64
    return ids.astype(np.int64) if is_narrow else ids


def _joined(ids: pd.Index, others: pd.Index) -> pd.Index:
    return as_held(ids.append(others))


def _kind_of(ids: pd.Index) -> str:
    return occurring(pd.Series(ids[:1]), "ids")[2]


def given_ids(ids: Any, name: str) -> tuple[pd.Series, bool]:
    """Ids passed to a method, and whether it is a single one.

    Parameters
    ----------
    ids : one id, or a list, array, Index or Series of ids
        A tuple or a frozenset is one id. Series of other frame libraries are accepted too.
    name : str
        The argument's name, for messages.

    Raises
    ------
    ValueError
        For missing values.
    TypeError
        For a set, a mapping or a frame.
    """
    is_single = isinstance(ids, (str, bytes, tuple, frozenset)) or not hasattr(ids, "__len__")
    if is_single:
        ids = [ids]
    elif isinstance(ids, (set, dict)) or getattr(ids, "ndim", 1) != 1:
        raise TypeError(
            f"{name} must be an id or a list of ids, got {type(ids).__name__}: pass a list"
        )
    elif hasattr(ids, "to_pylist"):  # PyArrow
        ids = ids.to_pylist()
    elif not isinstance(ids, (list, pd.Index, pd.Series, np.ndarray)):
        ids = ids.to_list() if hasattr(ids, "to_list") else list(ids)
    if isinstance(ids, list):
        ids = index_from(ids) if ids else pd.Index([], dtype=object)
    series = pd.Series(ids).reset_index(drop=True)
    is_missing = missing(series)
    if is_missing.any():
        at = int(np.argmax(is_missing))
        raise ValueError(
            f"{name} must have no missing ids, got {shown(series.iloc[at])} at position {at}"
        )
    return series.rename(name), is_single
