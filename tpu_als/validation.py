"""Outside input to canonical CSR, ids and settings, or an error: got, expected, likely cause."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection, Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np

from .exceptions import ModelFitError as ModelFitError
from .exceptions import ParameterWarning as ParameterWarning
from .host import require_memory
from .matrices import canonical_csr as canonical_csr
from .matrices import rows_for as rows_for
from .matrices import warn_if_converted as warn_if_converted

GROWTH = 1_000_000  # rows that a partial fit may add to any table, besides doubling it
LINEAR_SOLVERS = ("auto", "cg", "cholesky", "subspace")
DTYPES = ("float32", "float64", "bfloat16")


def _integer(least: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, Integral) and not isinstance(v, bool) and int(v) >= least


def _real(low: float, high: float = math.inf, is_open: bool = False) -> Callable[[Any], bool]:
    def accepts(v: Any) -> bool:
        if not isinstance(v, Real) or isinstance(v, bool) or not math.isfinite(v):
            return False
        return low < float(v) < high if is_open else low <= float(v) <= high

    return accepts


_PARAMETERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "factors": (_integer(1), "an integer of at least 1"),
    "regularization": (_real(0.0), "a finite number of at least 0"),
    "alpha": (_real(0.0), "a finite number of at least 0"),
    "iterations": (_integer(0), "an integer of at least 0"),
    "num_threads": (_integer(0), "an integer of at least 0 (0: all cores)"),
    "unobserved_weight": (_real(0.0), "a finite number of at least 0"),
    "regularization_exponent": (
        lambda v: v is None or _real(0.0)(v),
        "None or a finite number of at least 0",
    ),
    "linear_solver": (
        lambda v: v is None or (isinstance(v, str) and v in LINEAR_SOLVERS),
        f"None or one of {LINEAR_SOLVERS}",
    ),
    "cg_steps": (_integer(1), "an integer of at least 1"),
    "block_size": (_integer(1), "an integer of at least 1"),
    "over_relaxation": (
        _real(0.0, 2.0, is_open=True),
        "a number between 0 and 2, where 1 is plain ALS",
    ),
    "validation_fraction": (_real(0.0, 1.0, is_open=True), "a number between 0 and 1"),
    "n_iter_no_change": (_integer(1), "an integer of at least 1"),
    "approximate_recall": (
        lambda v: v is None or _real(0.0, 1.0, is_open=True)(v),
        "None or a number between 0 and 1",
    ),
    "checkpoint_dir": (
        lambda v: v is None or isinstance(v, (str, os.PathLike)),
        "None or the path of a directory",
    ),
    "checkpoint_every": (_integer(1), "an integer of at least 1"),
    "tol": (_real(0.0), "a finite number of at least 0"),
}


def check_parameters(parameters: dict[str, Any]) -> None:
    """Raise ValueError for the first constructor parameter outside its range.

    Parameters
    ----------
    parameters : dict
        Name to value; names without a rule here are checked by the room that uses them.
    """
    for name, (accepts, expected) in _PARAMETERS.items():
        if name in parameters and not accepts(parameters[name]):
            raise ValueError(f"{name} must be {expected}, got {parameters[name]!r}")


def storage_dtype(dtype: Any) -> str:
    """Name of the storage dtype: "float32", "float64" or "bfloat16".

    Parameters
    ----------
    dtype : dtype-like
        np.float32, np.float64 or their names, or "bfloat16".

    Raises
    ------
    ValueError
        For anything else.
    """
    try:
        name = dtype if isinstance(dtype, str) and dtype in DTYPES else np.dtype(dtype).name
    except TypeError:
        name = None
    if name not in DTYPES:
        raise ValueError(f"dtype must be np.float32, np.float64 or 'bfloat16', got {dtype!r}")
    return name


def random_generator(random_state: Any) -> np.random.Generator:
    """Return the generator that implicit would draw the first tables with.

    Parameters
    ----------
    random_state : int, None, numpy.random.RandomState, numpy.random.Generator or seed-like
        A RandomState gives a seed (implicit means to, and fails); all else is NumPy's
        `default_rng`, so a Generator is used as it is.

    Raises
    ------
    ValueError
        For anything else, such as a float, a bool or a negative integer.
    """
    if isinstance(random_state, np.random.RandomState):
        return np.random.default_rng(random_state.randint(2**31, dtype=np.int64))
    try:
        if isinstance(random_state, (bool, np.bool_)):
            raise TypeError("a bool is not a seed")
        return np.random.default_rng(random_state)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "random_state must be None, an integer of at least 0, a numpy.random.Generator or a "
            f"RandomState, got {random_state!r:.60}"
        ) from error


def random_seed(random_state: Any) -> int:
    """Draw a seed from what `random_generator` makes of this."""
    return int(random_generator(random_state).integers(1 << 31))


def fit_arguments(y: Any, show_progress: Any, callback: Any) -> tuple[bool, Callable | None]:
    """Tell scikit-learn's `fit(X, y)` from implicit's `fit(user_items, show_progress, callback)`.

    Returns
    -------
    show_progress : bool
    callback : callable or None
    """
    if callable(show_progress):
        show_progress, callback = True, show_progress
    if isinstance(y, (bool, np.bool_)):
        show_progress = y
    if callback is not None and not callable(callback):
        raise TypeError(
            f"callback must be callable(iteration, seconds, loss), got {type(callback).__name__}"
        )
    return bool(show_progress), callback


def ids_of(
    ids: Any, count: int | None, name: str = "userid"
) -> tuple[np.ndarray, bool, np.ndarray | None]:
    """Check an id or ids against a table.

    Parameters
    ----------
    ids : int, sequence, set, range, memoryview or ndarray of int, or a mask of bool
        A 0-d array is a single id.
    count : int or None
        Rows of the table; None does not look at the range.
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
        For ids that are not integers, negative, or beyond the table. JAX would clamp the latter
        silently, and NumPy would wrap the former.
    """
    if type(ids) is int and count is not None and 0 <= ids < count:  # a server's usual call
        return np.array([ids]), True, None
    array, is_scalar, mask = _integers(ids, name)
    if mask is not None and count is not None and len(mask) != count:
        raise IndexError(f"{name} is a mask of length {len(mask)}, expected {count}")
    if count is not None and array.size and (array.min() < 0 or array.max() >= count):
        wrong = array.min() if array.min() < 0 else array.max()
        raise IndexError(f"{name} {wrong} is not in the model, which has ids 0 to {count - 1}")
    return array.astype(np.int64), is_scalar, mask


def _integers(ids: Any, name: str) -> tuple[np.ndarray, bool, np.ndarray | None]:
    """Ids as they came, (n,); whether there was but one; and the mask, if it was one."""
    array = np.asarray(list(ids) if isinstance(ids, Collection) and _unordered(ids) else ids)
    is_scalar, mask = array.ndim == 0, None
    if array.ndim > 1:
        raise IndexError(f"{name} must be one id or a 1-D list of ids, got shape {array.shape}")
    if array.dtype == bool and not is_scalar:
        array, mask = np.flatnonzero(array), array
    if array.size and array.dtype.kind not in "iu":
        raise IndexError(f"{name} must hold integers, got dtype {array.dtype} ({ids!r:.60})")
    return np.atleast_1d(array), is_scalar, mask


def one_id(ids: Any, count: int | None, name: str) -> int:
    """Check an id of a table with `count` rows: a single one, of at least 0.

    Raises
    ------
    IndexError
        For several ids, none, or what `ids_of` refuses.
    """
    array = ids_of(ids, count, name)[0]
    if len(array) != 1:
        raise IndexError(f"{name} must be exactly one id, got {len(array)}: call once for each")
    if array[0] < 0:
        raise IndexError(f"{name} must not be negative, got {array[0]}")
    return int(array[0])


def ids_to_store(ids: Any, n_rows: int, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Check the ids of rows to store in a table, which they may grow.

    Parameters
    ----------
    ids : array-like of int
        Ids may repeat.
    n_rows : int
        Rows of the table. It may grow to twice as many and `GROWTH` more.
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
        For ids that are no integers, negative, or so large that the table would grow too far.
    """
    array, _, mask = _integers(ids, name)
    if array.size and array.min() < 0:
        raise IndexError(f"{name} must not be negative, got {array.min()}")
    bound = 2 * n_rows + GROWTH
    if array.size and int(array.max()) >= bound:
        raise IndexError(
            f"{name} {array.max()} is too far beyond the table, which has {n_rows} rows: one call "
            f"grows it to {bound} rows at most, twice its size and {GROWTH:,}, because the rows in "
            f"between are zero. Number new {name.removesuffix('ids')}s from {n_rows} on, or assign "
            f"{name.removesuffix('ids')}_factors a larger table first"
        )
    return array.astype(np.int64), mask


def _unordered(ids: Collection) -> bool:
    return isinstance(ids, (set, frozenset)) or type(ids).__name__ in ("dict_keys", "dict_values")


def selection(
    chosen: Any, dropped: Any, count: int, names: tuple[str, str]
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
        Likewise those dropped.
    """
    kept = None if chosen is None else np.unique(ids_of(chosen, count, names[0])[0])
    out = None if dropped is None else np.unique(ids_of(dropped, count, names[1])[0])
    if kept is None:
        return None, out if out is not None and out.size else None
    if out is not None and out.size:
        raise ValueError(f"Can't set both {names[0]} and {names[1]}: give one of them")
    return kept, None


def result_count(n: Any) -> int:
    """Check N, the number of results: an integer of at least 0."""
    try:
        n = operator.index(n)
    except TypeError:
        raise TypeError(f"N must be an integer, got {type(n).__name__}") from None
    if not 0 <= n < 1 << 31:
        raise ValueError(f"N must be at least 0 and below 2**31, got {n}")
    return n


def require_results(n_queries: int, n: int, dtype: Any) -> None:
    """Raise MemoryError where ids and scores (n_queries, n) would not fit into memory."""
    size = n_queries * n
    require_memory(
        {"ids": 4 * size, "scores": size * np.dtype(dtype).itemsize},
        f"set N to less than {n}, or pass fewer than {n_queries} ids at a time",
    )


def solver_arguments(X: Any, Y: Any, regularization: Any) -> None:
    """Check the tables and the ridge that the callable `solver` is given.

    Parameters
    ----------
    X : ndarray of float and shape (n_rows, factors)
        To be written into.
    Y : array of shape (n_columns, factors)
        The table held fixed.
    regularization : float
        Finite, at least 0.

    Raises
    ------
    ValueError
        For anything else. Nothing has been written then.
    """
    if not isinstance(X, np.ndarray) or X.ndim != 2 or X.dtype.kind != "f" or not X.flags.writeable:
        got = type(X).__name__
        if isinstance(X, np.ndarray):
            got = f"{X.dtype} of shape {X.shape}, writeable={X.flags.writeable}"
        raise ValueError(f"X must be a writeable 2-D array of floats, as it is solved; got {got}")
    shape = np.shape(Y)
    if len(shape) != 2 or shape[1] != X.shape[1]:
        raise ValueError(
            f"Y must have shape (n_columns, {X.shape[1]}), the factors of X, got {shape}"
        )
    is_number = isinstance(regularization, Real) and not isinstance(regularization, bool)
    if not is_number or not math.isfinite(regularization) or regularization < 0:
        raise ValueError(
            f"regularization must be a finite number of at least 0, got {regularization!r}"
        )


def factor_table(table: Any, name: str) -> np.ndarray | None:
    """Check an assigned table: None, or a 2-D array of float32 or float64, not copied if it is.

    Parameters
    ----------
    table : array-like of shape (n_rows, n_factors) or None
        Also anything with `to_numpy`, such as implicit's GPU matrices.
    name : str
        The attribute's name, for messages.
    """
    if table is None:
        return None
    array = np.asarray(table.to_numpy() if hasattr(table, "to_numpy") else table)
    if array.ndim != 2 or array.dtype.kind not in "fiuV":
        raise ValueError(
            f"{name} must be a 2-D array of numbers (n_rows, n_factors), "
            f"got shape {array.shape} of {array.dtype}"
        )
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def start_table(table: np.ndarray, shape: tuple[int, int], name: str) -> np.ndarray:
    """Check that a table to continue from has the shape that the data and `factors` ask for."""
    if table.shape != shape:
        raise ValueError(
            f"{name} to start from has shape {table.shape}, but the data and `factors` need "
            f"{shape}. Set {name} to None, or warm_start to False, to start anew"
        )
    return table


def finite_rows(rows: np.ndarray, what: str) -> np.ndarray:
    """Return solved rows, or raise ModelFitError where one is not finite."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise ModelFitError(
            f"NaN encountered in factors: {bad.size} of {len(rows)} rows could not be solved for "
            f"{what} (first: row {bad[0]}). Weights may be too large; try more regularization"
        )
    return rows


def finite_counts(counts: Iterable[int], iteration: int) -> None:
    """Raise ModelFitError where an epoch reports rows that are not finite, users first."""
    for side, count in zip(("user", "item"), counts, strict=True):
        if count:
            raise ModelFitError(
                f"NaN encountered in factors: {count} {side} rows are not finite after iteration "
                f"{iteration} (counted from 0). Weights may be too large for the dtype; "
                "try more regularization or a smaller alpha"
            )
