"""Errors for inputs that are not a matrix of finite numbers. Each says what to pass instead."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from datetime import date
from typing import Any

import numpy as np
from scipy import sparse

# Column names in lower case without underscores. A frame with one of each set is a table of events.
_USERS = {
    "user",
    "userid",
    "uid",
    "customer",
    "customerid",
    "household",
    "householdid",
    "visitorid",
}
_ITEMS = {"item", "itemid", "iid", "product", "productid", "movieid", "trackid", "artistid", "asin"}
_FEW = 16  # most columns of a table of events; wider frames may be matrices with such item names
_FEW_VALUES = 32
_MOST_AT_ONCE = 1 << 13  # numbers of an array that need no blocks
_ROWS_AT_ONCE = 1 << 16  # rows of a table that are checked for NaN at once
IF_EVENTS = (
    "if its rows are events, turn them into a matrix first, with "
    "tpu_als.datasets.interactions_from_frame(frame, user, item).matrix"
)
_NUMERIC_IN_POLARS = re.compile("U?Int|Float|Decimal|Boolean")


def refuse_misplaced(
    X: object, name: str = "X", *, takes_shards: bool = False, takes_blocks: bool = False
) -> None:
    """Raise TypeError for an object meant for another function, and name that function.

    Parameters
    ----------
    X : object
        What was passed as a matrix. Matrices, arrays and frames of numbers are accepted.
    name : str
        The argument's name, for messages.
    takes_shards : bool, default=False
        Whether a ShardedMatrix is accepted.
    takes_blocks : bool, default=False
        Whether lists, tuples and iterators of matrices are accepted.

    Raises
    ------
    TypeError
        For an `Interactions`, a table of events of pandas, polars or pyarrow or in an array, a
        ShardedMatrix, a path or text, and a tuple or list of matrices.
    """
    if sparse.issparse(X):  # the common case, which must be fast
        return
    # Types are compared by name, so that pandas, polars and pyarrow need not be imported.
    kinds = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(X).__mro__}
    problem = None if takes_shards else _sharded_problem(kinds, name, takes_blocks)
    problem = problem or _other_problem(X, kinds, name, takes_blocks)
    problem = problem or _table_problem(X, kinds, name)
    if problem is not None:
        sides = "items by users" if name == "item_users" else "users by items"
        raise TypeError(f"{name} must be a matrix of {sides}, got {problem}")


def require_matrix(X: object, name: str = "X", *, takes_frames: bool = True) -> None:
    """Raise TypeError as `refuse_misplaced` does, and for None.

    Parameters
    ----------
    X : object
        What was passed as a matrix.
    name : str
        The argument's name, for messages.
    takes_frames : bool, default=True
        Whether a frame of numbers is accepted: users are its rows and items its columns.

    Raises
    ------
    TypeError
        The message says what to pass instead.
    """
    refuse_misplaced(X, name)
    problem = None
    if X is None:
        problem = "None: pass a sparse matrix or an array"
    elif not takes_frames and hasattr(X, "columns"):
        problem = f"a frame: {IF_EVENTS}; if they are users, pass {name}.to_numpy()"
    if problem is not None:
        raise TypeError(f"{name} must be a matrix of users by items, got {problem}")


def require_finite(rows: Any, values: np.ndarray, name: str = "X") -> None:
    """Raise ValueError if a stored value is not finite.

    Parameters
    ----------
    rows : csr_matrix or csr_array
        The matrix.
    values : ndarray of shape (nnz,)
        Its stored values, in the dtype of the computation.
    name : str
        The argument's name, for messages.

    Raises
    ------
    ValueError
        The message gives the number of such values, and the row and column of the first.
    """
    if all_finite(values):
        return
    is_finite = np.isfinite(values)
    wrong, n_nan = np.flatnonzero(~is_finite), int(np.isnan(values).sum())
    problem = "NaN" if n_nan else f"infinity, or values too large for {values.dtype}"
    row = np.searchsorted(rows.indptr, wrong[0], side="right") - 1
    raise ValueError(
        f"{name} contains {problem}: {len(wrong)} of {len(values)} stored values are not finite "
        f"({n_nan} NaN), the first is {rows.data[wrong[0]]} in row {row}, column "
        f"{rows.indices[wrong[0]]} (counted from 0). Remove these entries or replace their values"
    )


def all_finite(values: np.ndarray) -> bool:
    """Whether an array of floats holds neither NaN nor infinity."""
    # Single queries check short arrays, for which every call of NumPy counts.
    if values.size <= _FEW_VALUES and math.isfinite(sum(values.ravel().tolist())):
        return True
    return np.count_nonzero(np.isfinite(values)) == values.size


def first_not_finite(array: np.ndarray) -> int | None:
    """The first row of an array (n, K) that holds NaN or infinity; None if there is none."""
    if array.size <= _MOST_AT_ONCE and all_finite(array):
        return None
    for low in range(0, len(array), _ROWS_AT_ONCE):
        block = array[low : low + _ROWS_AT_ONCE]
        with np.errstate(all="ignore"):
            if block.dtype.kind == "f" and block.flags.c_contiguous:
                flat = block.reshape(-1)
                if np.isfinite(flat.dot(flat)):  # a tenth of the time of the sums
                    continue
            sums = block.sum(axis=-1)
        for row in np.flatnonzero(~np.isfinite(sums)) + low:
            if not np.isfinite(array[row]).all():  # sums of finite numbers may overflow
                return int(row)
    return None


def _sharded_problem(kinds: set[str], name: str, takes_blocks: bool) -> str | None:
    """Describe a misplaced ShardedMatrix, or return None."""
    if "tpu_als.ShardedMatrix" not in kinds:
        return None
    if takes_blocks:  # not {name}.blocks('user'): its rows may be in any order
        return f"a ShardedMatrix: copy its directory, {name}.path, or pass {name}.to_csr()"
    return (
        f"a ShardedMatrix, which only `fit` takes: pass rows in memory, {name}.to_csr() or those "
        f"of {name}.blocks('user')"
    )


def _other_problem(X: object, kinds: set[str], name: str, takes_blocks: bool) -> str | None:
    """Describe a misplaced Interactions, path, or list of matrices, or return None."""
    if "tpu_als.Interactions" in kinds:
        return f"an Interactions: pass {name}.matrix"
    if isinstance(X, (str, bytes, os.PathLike)):
        return (
            f"a path or text ({X!r:.60}): read the file first, with scipy.sparse.load_npz, or, for "
            "`fit` on a directory of shards, with tpu_als.shards.open_shards"
        )
    if isinstance(X, np.ma.MaskedArray) and np.ma.is_masked(X):
        return f"an array with masked values: pass {name}.filled(0), where they are zero"
    # An open file is an iterator too, of its lines.
    if takes_blocks and isinstance(X, (tuple, list, Iterator)) and not hasattr(X, "read"):
        return None
    if isinstance(X, (dict, set, Iterator, type)) or hasattr(X, "get_params"):
        what = (
            f"the class {X.__name__}" if isinstance(X, type) else f"an object of {type(X).__name__}"
        )
        wanted = "blocks of one" if takes_blocks else "an array"
        return f"{what}: pass a sparse matrix or {wanted}"
    if isinstance(X, (tuple, list)) and any(map(sparse.issparse, X)):
        return f"a {type(X).__name__} of {len(X)} matrices: pass one of them"
    return None


def _table_problem(X: Any, kinds: set[str], name: str) -> str | None:
    """Describe a misplaced frame, table or array, or return None."""
    if "pandas.DataFrame" in kinds:
        others = (
            not _is_number_in_pandas(X, position, dtype) for position, dtype in enumerate(X.dtypes)
        )
        return _events("a frame of events", name) if _has_events(X.columns, any(others)) else None
    if "polars.DataFrame" in kinds:  # frames of numbers are accepted, as in scikit-learn
        others = (
            _NUMERIC_IN_POLARS.match(str(dtype)) is None for dtype in getattr(X, "dtypes", [""])
        )
        frame = f"{name}.to_pandas()"
        is_of_events = _has_events(X.columns, any(others))
        return _events("a polars frame of events", frame) if is_of_events else None
    if "polars.LazyFrame" in kinds:
        return _events("a polars LazyFrame", f"{name}.collect().to_pandas()")
    if kinds & {"pyarrow.Table", "pyarrow.RecordBatch"}:
        return _events("a pyarrow table", f"{name}.to_pandas()")
    if isinstance(X, np.ndarray) and (X.dtype.names or _has_text(X)):
        return _events("an array of text or records", f"pandas.DataFrame({name})")
    return None


def _events(what: str, frame: str) -> str:
    return (
        f"{what}: turn events, one a row, into a matrix with "
        f"tpu_als.datasets.interactions_from_frame({frame}, user, item).matrix"
    )


def _has_events(columns: Any, has_other_types: bool) -> bool:
    """Whether a frame has columns that are not numbers, or columns of users and of items."""
    few = columns if len(columns) <= _FEW else ()
    names = {re.sub("[^a-z]", "", str(column).lower()) for column in few}
    return has_other_types or bool(names & _USERS and names & _ITEMS)


def _is_number_in_pandas(frame: Any, position: int, dtype: Any) -> bool:
    dtype = getattr(getattr(dtype, "categories", None), "dtype", dtype)
    if dtype != np.dtype(object):
        return dtype.kind in "biufc"
    return not _has_text(frame.iloc[:, position].to_numpy(object))


def _has_text(values: np.ndarray) -> bool:
    if values.dtype.kind != "O":
        return values.dtype.kind in "USMm"
    return any(isinstance(value, (str, bytes, date)) for value in values.flat)
