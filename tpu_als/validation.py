"""Outside input to canonical CSR, ids and tables, or an error: got, expected, likely cause."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.utils import assert_all_finite

from .exceptions import ModelFitError, ParameterWarning
from .parameters import is_flag

_ROWS_AT_ONCE = 1 << 16  # of a table that is looked at for NaN


def fit_arguments(
    y: Any, show_progress: Any, callback: Any, default: Any = None
) -> tuple[bool | None, Callable | None]:
    """Tell scikit-learn's `fit(X, y)` from implicit's `fit(user_items, show_progress, callback)`.

    Parameters
    ----------
    y, show_progress, callback
        As given to `fit`.
    default : callable, optional
        The attribute `fit_callback`, for where there is no callback.

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


def warn_if_converted(matrix: Any) -> None:
    """Warn, as implicit does, where a sparse matrix is not CSR and has to be converted."""
    if sparse.issparse(matrix) and matrix.ndim == 2 and matrix.format != "csr":
        warnings.warn(
            f"Method expects CSR input, and was passed {type(matrix).__name__} instead: it is "
            "converted, which takes time and memory (pass user_items.tocsr())",
            ParameterWarning,
            stacklevel=3,
        )


def canonical_csr(matrix: Any) -> sparse.csr_matrix:
    """Return a float32 csr_matrix with sorted indices and no duplicates; the input stays as it is.

    Parameters
    ----------
    matrix : ndarray, sparse matrix or sparse array of shape (n_rows, n_columns)
        A 1-D sparse array is one row. Of a dense array, zeros are not entries; zeros that a
        sparse matrix stores are, as in implicit. Duplicate entries are summed (implicit lets
        them count twice in the weights and once in the filters).

    Raises
    ------
    ValueError
        Where a stored value is not finite or too large for float32, or an index out of bounds.
    """
    if sparse.issparse(matrix) and matrix.ndim == 1:
        matrix = matrix.reshape(1, -1)
    csr = matrix.tocsr() if sparse.issparse(matrix) else sparse.csr_matrix(matrix)
    with np.errstate(over="ignore"):
        values = np.asarray(csr.data, dtype=np.float32)
    if not np.isfinite(values).all():  # scikit-learn words the error, but is slow for a single row
        assert_all_finite(values, input_name="user_items")
    if csr.nnz and (csr.indices.min() < 0 or csr.indices.max() >= csr.shape[1]):
        raise ValueError(f"a column index of the sparse matrix lies outside its shape {csr.shape}")
    if isinstance(csr, sparse.csr_matrix) and values is csr.data and csr.has_canonical_format:
        return csr
    out = sparse.csr_matrix((values, csr.indices, csr.indptr), shape=csr.shape)
    if not out.has_canonical_format:
        out = out.copy()
        out.sum_duplicates()
    return out


def rows_for(
    matrix: Any,
    n_rows: int | None,
    n_columns: int,
    name: str = "user_items",
    strict: bool = True,
    mask: np.ndarray | None = None,
) -> sparse.csr_matrix:
    """Check the rows that go with a list of ids.

    Parameters
    ----------
    matrix : csr_matrix, csr_array or 1-D sparse array
        One row for each id. Other sparse formats pass where not `strict`.
    n_rows : int or None
        Number of ids; None accepts any number of rows.
    n_columns : int
        Rows of the table that the columns refer to. Fewer columns are filled up; more are cut
        off, and must hold no entries.
    name : str
        The argument's name, for messages.
    strict : bool
        Whether formats other than CSR are refused, as in `recommend`.
    mask : ndarray of bool, optional
        Where the ids came as a mask, `matrix` may have a row for each of its places.

    Returns
    -------
    rows : csr_matrix of shape (n_rows, n_columns)
        Canonical.

    Raises
    ------
    ValueError
        For another format, another number of rows, or entries beyond the table.
    """
    one_row = sparse.issparse(matrix) and matrix.ndim == 1
    if not sparse.issparse(matrix) or (strict and matrix.format != "csr" and not one_row):
        advice = f"{name}.tocsr()" if sparse.issparse(matrix) else f"csr_matrix({name})"
        if matrix is None:
            advice = "the rows of the ids"
            advice += ", or filter_already_liked_items=False" if strict else ""
        raise ValueError(
            f"{name} needs to be a CSR sparse matrix, got {type(matrix).__name__}: pass {advice}"
        )
    rows = canonical_csr(matrix)
    if mask is not None and rows.shape[0] == len(mask):
        rows = rows[np.flatnonzero(mask)]
    if n_rows is not None and rows.shape[0] != n_rows:
        of, ids = ("item", "itemids") if name == "item_users" else ("user", "userids")
        raise ValueError(
            f"{name} must contain 1 row for every {of} in {ids}: got {rows.shape[0]} rows of "
            f"shape {matrix.shape} for {n_rows} ids. Did you pass all rows? Use {name}[{ids}]"
        )
    return _fit_columns(rows, n_columns, name)


def _fit_columns(rows: sparse.csr_matrix, n_columns: int, name: str) -> sparse.csr_matrix:
    if rows.nnz and rows.indices.max() >= n_columns:
        kind = "items" if name == "user_items" else "users"
        raise ValueError(
            f"{name} of shape {rows.shape} has an entry in column {rows.indices.max()}, but the "
            f"model was fitted with {n_columns} {kind}. Is the matrix transposed, or are there "
            f"new {kind} (add them with partial_fit_{kind})?"
        )
    if rows.shape[1] == n_columns:
        return rows
    return sparse.csr_matrix((rows.data, rows.indices, rows.indptr), (rows.shape[0], n_columns))


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
    array = np.asarray(list(ids) if isinstance(ids, Collection) and _unordered(ids) else ids)
    is_scalar, mask = array.ndim == 0, None
    if array.ndim > 1:
        raise IndexError(f"{name} must be one id or a 1-D list of ids, got shape {array.shape}")
    if array.dtype == bool and not is_scalar:
        if count is not None and len(array) != count:
            raise IndexError(f"{name} is a mask of length {len(array)}, expected {count}")
        array, mask = np.flatnonzero(array), array
    if array.size and array.dtype.kind not in "iu":
        raise IndexError(f"{name} must hold integers, got dtype {array.dtype} ({ids!r:.60})")
    array = np.atleast_1d(array).astype(np.int64)
    if count is not None and array.size and (array.min() < 0 or array.max() >= count):
        wrong = array.min() if array.min() < 0 else array.max()
        raise IndexError(f"{name} {wrong} is not in the model, which has ids 0 to {count - 1}")
    return array, is_scalar, mask


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
    if n < 0:
        raise ValueError(f"N must be at least 0, got {n}")
    return n


def factor_table(table: Any, name: str) -> np.ndarray | None:
    """Check an assigned table: None, or a 2-D array of float32 or float64, not copied if it is.

    Parameters
    ----------
    table : array-like of shape (n_rows, n_factors) or None
        Also anything with `to_numpy`, such as implicit's GPU matrices. There may be no rows.
    name : str
        The attribute's name, for messages.

    Raises
    ------
    ValueError
        For another number of axes, no columns, or values that are no finite numbers.
    """
    if table is None:
        return None
    array = np.asarray(table.to_numpy() if hasattr(table, "to_numpy") else table)
    # "V" is bfloat16; structures are of that kind as well.
    if array.ndim != 2 or array.dtype.kind not in "fiuV" or array.dtype.names or not array.shape[1]:
        raise ValueError(
            f"{name} must be a 2-D array of numbers (n_rows, n_factors), "
            f"got shape {array.shape} of {array.dtype}"
        )
    if array.dtype not in (np.float32, np.float64):
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    _check_finite(array, name)
    return array


def _check_finite(array: np.ndarray, name: str) -> None:
    for low in range(0, len(array), _ROWS_AT_ONCE):
        with np.errstate(all="ignore"):
            sums = array[low : low + _ROWS_AT_ONCE].sum(axis=-1)
        suspects = np.flatnonzero(~np.isfinite(sums)) + low
        # Sums of finite numbers may overflow.
        bad = [row for row in suspects if not np.isfinite(array[row]).all()]
        if bad:
            raise ValueError(
                f"{name} must hold finite numbers, got NaN, infinity or values too large for "
                f"float32 (first in row {bad[0]}: {array[bad[0]]!r:.100})"
            )


def same_width(user_width: int, item_width: int) -> None:
    """Raise ValueError where rows of a user and an item table differ in their number of factors."""
    if user_width != item_width:
        raise ValueError(
            f"user_factors and item_factors must have equally many columns to be multiplied, got "
            f"{user_width} and {item_width}: assign two tables of one model"
        )


def derived(value: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Check a gramian or norms that were assigned, of the given shape.

    Raises
    ------
    ValueError
        For another shape, values that are no finite numbers, or lengths that are not positive.
    """
    array = np.asarray(value)
    is_length = len(shape) == 1
    good = array.shape == shape and array.dtype.kind in "fiu" and bool(np.isfinite(array).all())
    if not good or (is_length and not (array > 0).all()):
        expected = "positive numbers" if is_length else "numbers"
        raise ValueError(
            f"{name} must hold finite {expected} of shape {shape}, got shape {array.shape} of "
            f"{array.dtype}{' with other values' if array.shape == shape else ''}. Set {name} to "
            "None to have it computed"
        )
    return array


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
