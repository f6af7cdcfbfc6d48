"""Columns of an event frame as ids, numbers or times. Errors name the column, row and value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from tpu_als.datasets.kinds import kind_of_values, row_of, shown, unboxed

_LARGEST = float(np.finfo(np.float32).max)
_WIDEST = {"b": np.bool_, "i": np.int64, "u": np.uint64, "f": np.float64}


def columns_of(frame: object, names: list[str]) -> list[pd.Series]:
    """Columns of an event frame, without missing values.

    Parameters
    ----------
    frame : DataFrame
        One event per row.
    names : list of str
        The columns.

    Raises
    ------
    TypeError
        If it is not a pandas DataFrame.
    ValueError
        For a column that is missing or occurs twice, or a missing value.
    """
    if not isinstance(frame, pd.DataFrame):
        way = "frame.to_pandas()" if hasattr(frame, "to_pandas") else "pandas.DataFrame(frame)"
        kind = f"{type(frame).__module__}.{type(frame).__qualname__}"
        raise TypeError(f"frame must be a pandas DataFrame, got {kind}: pass {way}")
    lacking = [name for name in names if name not in frame.columns]
    if lacking:
        which = f"column {lacking[0]!r} is" if len(names) == 1 else f"columns {lacking} are"
        raise ValueError(f"{which} not in the frame, which has {list(frame.columns)}")
    for name in names:
        if isinstance(frame[name], pd.DataFrame):
            raise ValueError(
                f"the frame has {frame[name].shape[1]} columns named {name!r}, expected one: "
                "rename or drop the others"
            )
        rows = np.flatnonzero(missing(frame[name]))
        if len(rows):
            raise ValueError(
                f"column {name!r} must have no missing values, got {len(rows)}, the first in row "
                f"{rows[0]} (counted from 0), {shown(frame[name].iloc[rows[0]])}: drop those rows "
                "first"
            )
    return [frame[name] for name in names]


def missing(values: pd.Series | pd.Index) -> np.ndarray:
    """Whether values (n,) are missing, or are tuples or frozensets that hold missing values."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        codes = values.cat.codes if isinstance(values, pd.Series) else values.codes
        # The code of missing values is -1.
        return np.append(missing(values.dtype.categories), True)[np.asarray(codes)]
    found = np.array(values.isna(), bool)
    if values.dtype == object and pd.api.types.infer_dtype(values, skipna=True) == "mixed":
        found |= [_holds_missing(value) for value in values]
    return found


def _holds_missing(value: object) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return any(_is_missing(inner) or _holds_missing(inner) for inner in value)
    return False


def _is_missing(value: object) -> bool:
    return not isinstance(value, (str, int)) and pd.isna(value) is True


def ids_and_positions(column: pd.Series, given: object, name: str) -> tuple[pd.Index, np.ndarray]:
    """Return distinct ids, and the position of each value of a column among them.

    Parameters
    ----------
    column : Series of length n
        Ids of a single, sortable type.
    given : Index, list, array or None
        The ids to use, in this order; None uses those that occur, ascending.
    name : str
        Name of the argument `given` of the caller, for messages.

    Returns
    -------
    ids : Index of shape (m,)
    positions : ndarray of int64 and shape (n,)
        -1 for a value that is not among the given ids.

    Raises
    ------
    TypeError
        For given ids that are not a 1-D list, array or Index.
    ValueError
        For ids of several types, ids that cannot be sorted or compared, floating-point ids that are
        too large to be exact, and given ids that are missing or repeated.
    """
    label = f"column {column.name!r}"
    codes, values, kind = occurring(column, label)
    distinct = index_of(values)
    if given is None:
        try:
            order = distinct.argsort()
        except TypeError as error:
            raise ValueError(f"{label} holds {kind}, which cannot be sorted: {error}") from error
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order))
        return distinct[order], ranks[codes]
    ids = _given_ids(given, name)
    *_, known_kind = occurring(pd.Series(ids), f"{name}=")
    known = pd.Index(plain(pd.Series(ids)), tupleize_cols=False)
    if len(known) and len(values) and known_kind != kind:
        raise ValueError(
            f"{name}= holds {known_kind} (such as {shown(known[0])}), but {label} holds {kind} "
            f"(such as {shown(values[0])}), so no id can match: convert one of them with astype"
        )
    return ids, known.get_indexer(distinct)[codes].astype(np.int64)


def index_of(values: pd.Series) -> pd.Index:
    """Distinct ids as an Index; an array of objects lets pandas find their type, such as text."""
    return index_from(values.to_numpy() if values.dtype == object else values)


def index_from(values: Any) -> pd.Index:
    """Values as an Index; objects where the type that pandas finds cannot hold them."""
    try:
        return pd.Index(values, tupleize_cols=False)
    except (UnicodeEncodeError, NotImplementedError):  # halves of surrogate pairs, and float16
        return pd.Index(values, dtype=object, tupleize_cols=False)


def numbers_of(column: pd.Series) -> np.ndarray:
    """Values of a column of numbers or booleans, as float64.

    Parameters
    ----------
    column : Series of length n

    Returns
    -------
    ndarray of float64 and shape (n,)

    Raises
    ------
    ValueError
        For a value that is not a number, not finite, or too large for float32.
    """
    values = plain(column)
    if values.dtype.kind not in _WIDEST:
        values = values.astype(object)
        for row, value in enumerate(values):
            if not isinstance(value, (Real, Decimal, np.bool_)):
                advice = f"convert it, for example with pandas.to_numeric(frame[{column.name!r}])"
                raise refusal(column.name, row, value, "a number", advice)
        values = values.map(_as_float)
    result = values.to_numpy(np.float64)
    wrong = np.flatnonzero(~(np.abs(result) <= _LARGEST))
    if len(wrong):
        advice = f"replace such values, {len(wrong)} in all, or drop their rows"
        value = column.iloc[wrong[0]]
        raise refusal(column.name, wrong[0], value, "a finite number within float32", advice)
    return result


def _given_ids(given: Any, name: str) -> pd.Index:
    """`users=` or `items=` as an Index without missing or repeated ids."""
    is_list = isinstance(given, Iterable) and not isinstance(
        given, (str, bytes, Mapping, Set, pd.DataFrame)
    )
    if not is_list or getattr(given, "ndim", 1) != 1:
        advice = f"pass sorted({name})" if isinstance(given, Set) else "pass the ids themselves"
        raise TypeError(
            f"{name}= must be a 1-D list, array or Index of ids, got {type(given).__name__}: "
            f"{advice}"
        )
    if isinstance(given, pd.MultiIndex):
        given = given.to_flat_index()
    elif not isinstance(given, (pd.Index, pd.Series, np.ndarray)):
        given = list(given)
    elif given.dtype == np.float16:  # pandas cannot index float16
        given = given.astype(np.float32)
    ids = given if isinstance(given, pd.Index) else index_from(given)
    is_missing = missing(ids)
    if is_missing.any():
        raise ValueError(
            f"{name}= must have no missing values, got {is_missing.sum()}, the first of them "
            f"{shown(ids[is_missing][0])}: drop them first"
        )
    if not ids.is_unique:
        again = ids[ids.duplicated()]
        raise ValueError(
            f"{name}= must hold each id once, got {shown(again[0])} more than once ({len(again)} "
            f"repeated ids): pass pandas.unique({name})"
        )
    return ids


def plain(column: pd.Series) -> pd.Series:
    """Values with a default index; categoricals and nullable types become plain values."""
    values = column.reset_index(drop=True)
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(values.cat.categories.dtype)
    if values.dtype == np.float16:  # pandas cannot index float16
        return values.astype(np.float32)
    if isinstance(values.dtype, (np.dtype, pd.StringDtype)):
        return values
    if values.dtype.kind in _WIDEST:
        return pd.Series(values.to_numpy(_WIDEST[values.dtype.kind]))
    if isinstance(values.dtype, pd.ArrowDtype):  # such as text and times
        return values.astype(object).infer_objects()
    return values


def distinct_values(
    values: pd.Series,
) -> tuple[np.ndarray, np.ndarray | pd.api.extensions.ExtensionArray]:
    """The position of each value among the distinct values (n,), and the distinct values."""
    return pd.factorize(values.to_numpy() if isinstance(values.dtype, np.dtype) else values.array)


def occurring(column: pd.Series, label: str) -> tuple[np.ndarray, pd.Series, str]:
    """The distinct ids of a column, in any order, and their type in words.

    Parameters
    ----------
    column : Series of length n
        Without missing values. A categorical is read by its codes.
    label : str
        What the column is called in messages.

    Returns
    -------
    codes : int array (n,)
        Position of each value among the distinct ids.
    ids : Series
        The distinct ids.
    kind : str
        As `kind_of_values` names their type.

    Raises
    ------
    ValueError
        For ids of several types, floating-point ids that are too large to be exact, and text that
        UTF-8 cannot hold.
    """
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        codes = column.cat.codes.to_numpy()
        occurs = np.bincount(codes, minlength=len(dtype.categories)) > 0
        codes = (np.cumsum(occurs) - 1)[codes]
        values, dtype = plain(pd.Series(dtype.categories[occurs])), dtype.categories.dtype
        kind = kind_of_values(values, label, codes)
    else:
        column = plain(column)
        kind = kind_of_values(column, label)
        codes, distinct = distinct_values(column)
        values = pd.Series(distinct, dtype=distinct.dtype)
    if kind == "numbers":
        _require_exact(values, dtype, label, codes)
    if kind == "text":
        _require_unicode(values, label, codes)
    return codes, values, kind


def _require_exact(values: pd.Series, dtype: Any, label: str, codes: np.ndarray) -> None:
    """Refuse floating-point ids so large that different integers round to the same value.

    `values` are the distinct ids of a column of this dtype, and `codes` the positions of its rows.
    """
    if dtype.kind == "f":
        dtype = np.dtype(getattr(dtype, "numpy_dtype", dtype))
        positions = np.arange(len(values))
    elif dtype.kind == "O":
        dtype = np.dtype(np.float64)
        is_float = [isinstance(value, (float, np.floating)) for value in values]
        positions = np.flatnonzero(is_float)
    else:
        return
    limit = 2.0 ** (np.finfo(dtype).nmant + 1)
    numbers = values.iloc[positions].to_numpy(np.float64)
    wrong = positions[~(np.abs(numbers) < limit)]
    if len(wrong):
        row, at = min((row_of(at, codes), at) for at in wrong)
        value = values.iloc[at]
        raise ValueError(
            f"{label} holds {shown(value)} ({type(unboxed(value)).__name__}) in row {row} "
            f"(counted from 0), expected a finite id below {limit:.0f}, because {dtype} does "
            "not represent all larger integers: read the ids as integers or text"
        )


def _require_unicode(values: pd.Series, label: str, codes: np.ndarray) -> None:
    """Refuse text with halves of surrogate pairs, which neither PyArrow nor a file can hold."""
    if getattr(values.dtype, "storage", "python") == "pyarrow":
        return
    for at, value in enumerate(values):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{label} holds {shown(value)} in row {row_of(at, codes)} (counted from 0), which "
                f"is not valid Unicode ({error.reason}): decode the text again, or replace these "
                "characters with value.encode(errors='replace').decode()"
            ) from None


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return float("inf")


def refusal(name: object, row: int, value: object, expected: str, advice: str) -> ValueError:
    """An error about a value of a column, with what was expected and what to do."""
    return ValueError(
        f"column {name!r} holds {shown(value)} ({type(unboxed(value)).__name__}) in row {row} "
        f"(counted from 0), expected {expected}: {advice}"
    )
