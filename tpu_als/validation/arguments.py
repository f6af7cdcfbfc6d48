"""Check arguments: ids, numbers and flags. Errors say what was passed and what was expected."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from tpu_als.host import require_memory
from tpu_als.parameters import is_flag
from tpu_als.validation.matrices import canonical_csr as canonical_csr
from tpu_als.validation.matrices import rows_for as rows_for
from tpu_als.validation.matrices import rows_to_store as rows_to_store
from tpu_als.validation.matrices import warn_if_converted as warn_if_converted

GROWTH = 1_000_000  # rows that a partial fit may add to a table, in addition to doubling it
_MOST_PADDING = 1 << 26  # bytes of results that are mostly padding
_LARGEST_ID = 1 << 63
_FEW = 1 << 13  # results that need no check of the memory


def fit_arguments(
    y: object, show_progress: object, callback: object, default: object = None
) -> tuple[bool | None, Callable | None]:
    """Accept scikit-learn's `fit(X, y)` and implicit's `fit(user_items, show_progress, callback)`.

    Parameters
    ----------
    y, show_progress, callback
        As given to `fit`.
    default : callable, optional
        The attribute `fit_callback`, which is used if there is no callback.

    Returns
    -------
    show_progress : bool or None
    callback : callable or None

    Raises
    ------
    TypeError
        For a callback that cannot be called, or a `show_progress` that is not True, False or None.
    """
    if callable(show_progress):
        show_progress, callback = None, show_progress
    if isinstance(y, (bool, np.bool_)):
        show_progress = y
    name = "callback" if callback is not None else "fit_callback"
    callback = default if callback is None else callback
    if callback is not None and not callable(callback):
        raise TypeError(
            f"{name} must be callable(iteration, seconds, loss), got {type(callback).__name__}"
        )
    if show_progress is not None and not is_flag(show_progress):
        raise TypeError(f"show_progress must be True, False or None, got {show_progress!r:.60}")
    return None if show_progress is None else bool(show_progress), callback


def ids_of(
    ids: ArrayLike, count: int | None, name: str = "userid"
) -> tuple[np.ndarray, bool, np.ndarray | None]:
    """Check an id or ids against a table.

    Parameters
    ----------
    ids : int, sequence, set, range, memoryview or ndarray of int, or a mask of bool
        A 0-d array is a single id.
    count : int or None
        Rows of the table; None skips the check of the range.
    name : str
        The argument's name, for messages.

    Returns
    -------
    ids : ndarray of int64 and shape (n,)
    is_scalar : bool
        Whether a single id was given.
    mask : ndarray of bool or None
        The mask that was given, if any.

    Raises
    ------
    IndexError
        For ids that are not integers, are negative or are beyond the table. NumPy would count
        negative ids from the end, and JAX would clamp ids beyond the table.
    """
    # A server's usual call.
    if type(ids) is int and 0 <= ids < (_LARGEST_ID if count is None else count):
        return np.array([ids]), True, None
    array, is_scalar, mask = _integers(ids, name, count)
    if count is not None and array.size and (array.min() < 0 or array.max() >= count):
        wrong = array.min() if array.min() < 0 else array.max()
        raise IndexError(f"{name} {wrong} is not in the model, which has ids 0 to {count - 1}")
    return array.astype(np.int64), is_scalar, mask


def _integers(
    ids: ArrayLike, name: str, count: int | None = None
) -> tuple[np.ndarray, bool, np.ndarray | None]:
    """Return ids (n,), whether a single id was given, and the mask if a mask was given."""
    if np.ma.is_masked(ids):
        raise IndexError(f"{name} must have no masked values: pass {name}.compressed()")
    given = list(ids) if isinstance(ids, Collection) and _unordered(ids) else ids
    try:
        array = np.asarray(given)
    except ValueError as error:  # lists of several lengths
        raise IndexError(f"{name} must hold integers, got {ids!r:.60}: {error}") from None
    is_scalar, mask = array.ndim == 0, None
    if array.ndim > 1:
        raise IndexError(f"{name} must be one id or a 1-D list of ids, got shape {array.shape}")
    if array.dtype == bool and not is_scalar:
        array, mask = np.flatnonzero(array), array
        if count is not None and len(mask) != count:
            raise IndexError(f"{name} is a mask of length {len(mask)}, expected {count}")
    if array.size and array.dtype.kind not in "iu":
        raise IndexError(f"{name} must hold integers, got dtype {array.dtype} ({ids!r:.60})")
    return np.atleast_1d(array), is_scalar, mask


def one_id(ids: ArrayLike, count: int | None, name: str) -> int:
    """Check a single id, of at least 0, of a table with `count` rows.

    Raises
    ------
    IndexError
        For several ids, no id, or an id that `ids_of` refuses.
    """
    array = ids_of(ids, count, name)[0]
    if len(array) != 1:
        raise IndexError(f"{name} must be exactly one id, got {len(array)}: call once for each")
    if array[0] < 0:
        raise IndexError(f"{name} must not be negative, got {array[0]}")
    return int(array[0])


def ids_to_store(ids: ArrayLike, n_rows: int, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Check the ids of rows to store in a table; new ids add rows to it.

    Parameters
    ----------
    ids : array-like of int
        Ids may repeat.
    n_rows : int
        Number of rows of the table. The limit is twice that number plus `GROWTH`.
    name : str
        The argument's name, for messages.

    Returns
    -------
    ids : ndarray of int64 and shape (n,)
    mask : ndarray of bool or None
        The mask that was given, if any.

    Raises
    ------
    IndexError
        For ids that are not integers, are negative, or would make the table too large.
    """
    array, _, mask = _integers(ids, name, n_rows)
    if array.size and array.min() < 0:
        raise IndexError(f"{name} must not be negative, got {array.min()}")
    bound = 2 * n_rows + GROWTH
    if array.size and int(array.max()) >= bound:
        raise IndexError(
            f"{name} {array.max()} is too far beyond the table, which has {n_rows} rows: one call "
            f"grows it to {bound} rows at most, twice its size plus {GROWTH:,}, because the rows "
            f"in between are zero. Number new {name.removesuffix('ids')}s from {n_rows} on, or "
            f"assign {name.removesuffix('ids')}_factors with more rows first"
        )
    return array.astype(np.int64), mask


def _unordered(ids: Collection) -> bool:
    return isinstance(ids, (set, frozenset)) or type(ids).__name__ in ("dict_keys", "dict_values")


def selection(
    chosen: ArrayLike | None, dropped: ArrayLike | None, count: int, names: tuple[str, str]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Check a whitelist and a blacklist of ids, of which only one may be given.

    Parameters
    ----------
    chosen, dropped : array-like of int or None
        `items` and `filter_items`, or `users` and `filter_users`.
    count : int
        Rows of the table.
    names : (str, str)
        The arguments' names.

    Returns
    -------
    chosen : ndarray of int64 or None
        Sorted and distinct.
    excluded : ndarray of int64 or None
        The dropped ids, also sorted and distinct.
    """
    if chosen is None and dropped is None:
        return None, None
    kept = None if chosen is None else np.unique(ids_of(chosen, count, names[0])[0])
    out = None if dropped is None else np.unique(ids_of(dropped, count, names[1])[0])
    if kept is None:
        return None, out if out is not None and out.size else None
    if out is not None and out.size:
        raise ValueError(f"Can't set both {names[0]} and {names[1]}: give one of them")
    return kept, None


def flags(**values: object) -> None:
    """Raise ValueError for the first argument that is not True, False, 1 or 0."""
    for name, value in values.items():
        if value is not True and value is not False and not is_flag(value):
            raise ValueError(f"{name} must be True or False, got {value!r:.60}")


def result_count(n: SupportsIndex) -> int:
    """Check N, the number of results: an integer of at least 0 and below 2**31."""
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"N must be an integer, got {type(n).__name__}") from None
    if n < 0:
        raise ValueError(f"N must be at least 0, got {n}")
    if n >= 1 << 31:
        raise ValueError(f"N must be below 2**31, as ids are int32, got {n}")
    return n


def require_results(n_queries: int, n: int, n_rows: int, dtype: DTypeLike) -> None:
    """Raise MemoryError if ids and scores (n_queries, n) would not fit into memory.

    Results from a table of n_rows rows that are mostly padding, because n is above n_rows, may
    take 64 MB.
    """
    size = n_queries * n
    if size <= _FEW:
        return
    require_memory(
        {"ids": 4 * size, "scores": size * np.dtype(dtype).itemsize},
        f"set N to less than {n}, or pass fewer than {n_queries} ids at a time",
    )
    if n > 2 * n_rows and size * (4 + np.dtype(dtype).itemsize) > _MOST_PADDING:
        raise MemoryError(
            f"N={n} for {n_queries} ids would make results that are mostly padding, as there are "
            f"{n_rows} rows to rank: set N to at most {n_rows}"
        )
