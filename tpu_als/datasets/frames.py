"""Event frames, with one interaction per row: convert them to a matrix, and split them by time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy import sparse

from tpu_als.datasets.columns import columns_of, ids_and_positions, numbers_of
from tpu_als.datasets.interactions import Interactions
from tpu_als.datasets.kinds import shown
from tpu_als.datasets.times import ranks_of_times
from tpu_als.exceptions import DataWarning
from tpu_als.validation import fractions

log = logging.getLogger("tpu_als")


def interactions_from_frame(
    frame: pd.DataFrame,
    user: str,
    item: str,
    value: str | None = None,
    *,
    users: Iterable | None = None,
    items: Iterable | None = None,
    unknown: str = "drop",
) -> Interactions:
    """Convert a table of interactions, one per row, to a matrix.

    Parameters
    ----------
    frame : DataFrame
        One interaction per row.
    user, item : str
        Names of the columns with user and item ids. Each must have a single, sortable type.
    value : str, optional
        Name of the column of numbers to sum; None counts the interactions.
    users, items : Index, array or list, optional
        Ids of the rows and columns, in this order and without repeats; for example those of an
        earlier call. By default all ids that occur.
    unknown : {"drop", "error"}, default="drop"
        What to do with interactions whose user is not in `users` or whose item is not in `items`:
        drop them, with one DataWarning that gives their number, or raise an error.

    Returns
    -------
    Interactions
        Unpacks as ``matrix, users, items``. Its method `decode` converts recommendations to a table
        with item ids.

    Raises
    ------
    TypeError
        If the frame is not a pandas DataFrame, or `users` or `items` is not a list of ids.
    ValueError
        For a column that is missing or occurs twice; a missing user, item or value; ids of several
        types; `users` or `items` with missing or repeated ids, or of a type that cannot be compared
        with the column's; values or sums that are not finite numbers within float32; unknown users
        or items, with ``unknown="error"``.

    Warns
    -----
    DataWarning
        If interactions were dropped. The same message is logged by the logger "tpu_als".

    Examples
    --------
    >>> frame = pd.DataFrame({"who": ["ann", "bob", "ann"], "what": ["tea", "tea", "tea"]})
    >>> purchases = interactions_from_frame(frame, "who", "what")
    >>> purchases.users.tolist(), purchases.matrix.toarray().tolist()
    (['ann', 'bob'], [[2.0], [1.0]])
    """
    if unknown not in ("drop", "error"):
        raise ValueError(f"unknown must be 'drop' or 'error', got {unknown!r}")
    series = columns_of(frame, [user, item] if value is None else [user, item, value])
    values = np.ones(len(frame)) if value is None else numbers_of(series[2])
    user_ids, rows = ids_and_positions(series[0], users, "users")
    item_ids, columns = ids_and_positions(series[1], items, "items")
    known = (rows >= 0) & (columns >= 0)
    if not known.all():
        message = _unknown_ids(series[0][rows < 0], series[1][columns < 0], known)
        if unknown == "error":
            raise ValueError(f"{message}: add them, or pass unknown='drop'")
        message += ", and were dropped: pass unknown='error' to make this an error"
        log.warning(message)
        warnings.warn(message, DataWarning, stacklevel=2)
    entries = (values[known], (rows[known], columns[known]))
    sums = sparse.csr_matrix(entries, shape=(len(user_ids), len(item_ids)))
    return Interactions(_within_float32(sums, user_ids, item_ids), user_ids, item_ids)


def split_by_time(
    frame: pd.DataFrame, timestamp: str, fraction: float = 0.2
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split interactions into the earlier ones and the latest `fraction` of them.

    Use it before the table is converted to a matrix. The same user and item may occur in both
    parts. `evaluation.time_split` splits the entries of a matrix in the same way.

    Parameters
    ----------
    frame : DataFrame
        One interaction per row.
    timestamp : str
        Name of the column with the time: times, dates, finite numbers, ISO 8601 text (with an
        offset from UTC in all rows or in none), or an ordered categorical.
    fraction : float, default=0.2
        Fraction of the interactions that go to the second frame, between 0 and 1.

    Returns
    -------
    early, late : DataFrame
        All interactions at the time of the cut are in the first frame.

    Raises
    ------
    TypeError
        For a frame that is not a pandas DataFrame.
    ValueError
        For a fraction out of range; a column that is missing or occurs twice; a missing time, a
        value that is not a time, or times of several types.
    """
    fractions.require("fraction", fraction)
    is_late = fractions.is_latest(ranks_of_times(columns_of(frame, [timestamp])[0]), fraction)
    return frame[~is_late], frame[is_late]


def _unknown_ids(users: pd.Series, items: pd.Series, known: np.ndarray) -> str:
    """Count the interactions with unknown ids, and the distinct unknown users and items."""
    row = np.flatnonzero(~known)[0]
    parts = [
        f"{ids.nunique()} of column {ids.name!r} that are not in {name}="
        for ids, name in ((users, "users"), (items, "items"))
        if len(ids)
    ]
    return (
        f"{len(known) - known.sum()} of {len(known)} interactions, the first in row {row} (counted "
        f"from 0), have unknown ids ({', '.join(parts)})"
    )


def _within_float32(sums: sparse.csr_matrix, users: pd.Index, items: pd.Index) -> sparse.csr_matrix:
    """Convert sums of finite values to float32; ValueError if one is too large."""
    wrong = np.flatnonzero(np.abs(sums.data) > np.finfo(np.float32).max)
    if len(wrong):
        row = np.searchsorted(sums.indptr, wrong[0], side="right") - 1
        raise ValueError(
            f"the values of user {shown(users[row])} and item "
            f"{shown(items[sums.indices[wrong[0]]])} sum to {sums.data[wrong[0]]:.3g}, more than "
            "float32 can represent: scale the column of values down"
        )
    return sums.astype(np.float32)
