"""Outside input to canonical CSR, ids and settings, or an error: got, expected, likely cause."""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Callable, Collection, Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.utils import assert_all_finite

from .exceptions import ModelFitError, ParameterWarning

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
    """
    if isinstance(random_state, np.random.RandomState):
        return np.random.default_rng(random_state.randint(2**31, dtype=np.int64))
    return np.random.default_rng(random_state)


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
            f"{what} (first: row {bad[0]}). alpha times a value may be too large for the dtype"
        )
    return rows


def finite_counts(counts: Iterable[int], iteration: int) -> None:
    """Raise ModelFitError where an epoch reports rows that are not finite, users first."""
    for side, count in zip(("user", "item"), counts, strict=True):
        if count:
            raise ModelFitError(
                f"NaN encountered in factors: {count} {side} rows are not finite after iteration "
                f"{iteration} (counted from 0). alpha times a value may be too large for the "
                "dtype, or the systems singular: try a smaller alpha, or more regularization"
            )
