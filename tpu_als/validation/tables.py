"""Check tables of factors, values derived from them, and solved rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tpu_als.exceptions import ModelFitError
from tpu_als.parameters import check_parameters
from tpu_als.validation.refusals import all_finite, first_not_finite


def factor_table(table: ArrayLike | None, name: str) -> np.ndarray | None:
    """Check an assigned table, and return it as float32 or float64; copied only to convert it.

    Parameters
    ----------
    table : array-like of shape (n_rows, n_factors) or None
        Also anything with `to_numpy`, such as implicit's GPU matrices. There may be no rows.
    name : str
        The attribute's name, for messages.

    Raises
    ------
    ValueError
        For another number of axes, no columns, or values that are not finite numbers.
    """
    if table is None:
        return None
    if np.ma.is_masked(table):
        raise ValueError(f"{name} must have no masked values: assign {name}.filled(0) or the like")
    try:
        array = np.asarray(table.to_numpy() if hasattr(table, "to_numpy") else table)
    except ValueError as error:  # lists of several lengths
        raise ValueError(
            f"{name} must be a 2-D array of numbers (n_rows, n_factors), got "
            f"{type(table).__name__}: {error}"
        ) from None
    # Kind "V" includes bfloat16, but also structured dtypes.
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
    row = first_not_finite(array)
    if row is not None:
        raise ValueError(
            f"{name} must hold finite numbers, got NaN, infinity or values too large for float32 "
            f"(first in row {row}: {array[row]!r:.100})"
        )


def same_width(user_width: int, item_width: int) -> None:
    """Raise ValueError if the user and item table differ in their number of factors."""
    if user_width != item_width:
        raise ValueError(
            f"user_factors and item_factors must have equally many columns to be multiplied, got "
            f"{user_width} and {item_width}: assign two tables of the same model"
        )


def user_weights(value: Any, width: int) -> tuple[np.ndarray, bool]:
    """Check weights that `explain` returned: a Cholesky factor (width, width) and its triangle.

    Raises
    ------
    ValueError
        For anything else.
    """
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    if is_pair and np.ndim(value[1]) == 0 and np.asarray(value[1]).dtype.kind in "biu":
        factor = np.asarray(value[0])
        is_finite = factor.dtype.kind == "f" and bool(np.isfinite(factor).all())
        if factor.shape == (width, width) and is_finite:
            return value
        got = f"a factor of shape {factor.shape}" + (
            "" if is_finite else ", not all finite numbers"
        )
    else:
        got = f"{value!r:.60}"
    raise ValueError(
        f"user_weights must be what explain returned for this user, a pair with a factor of "
        f"shape {(width, width)}, got {got}. Omit it, and it is computed"
    )


def derived(value: ArrayLike, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Check a gramian or norms that were assigned, of the given shape.

    Raises
    ------
    ValueError
        For another shape, values that are not finite numbers, or lengths that are not positive.
    """
    array = np.asarray(value)
    is_length = len(shape) == 1
    good = array.shape == shape and array.dtype.kind in "fiu" and bool(np.isfinite(array).all())
    good = good and not np.ma.is_masked(value)
    if not good or (is_length and not (array > 0).all()):
        expected = "positive numbers" if is_length else "numbers"
        others = (
            ", some of them NaN, infinite, masked or not positive" if array.shape == shape else ""
        )
        raise ValueError(
            f"{name} must hold finite {expected} of shape {shape}, got values of {array.dtype} and "
            f"shape {array.shape}{others}. Set {name} to None, and it is computed"
        )
    return array


def finite_rows(rows: np.ndarray, what: str) -> np.ndarray:
    """Return solved rows; ModelFitError if one of them is not finite."""
    if not all_finite(rows):
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        raise ModelFitError(
            f"NaN encountered in factors: {bad.size} of {len(rows)} rows could not be solved for "
            f"{what} (first: row {bad[0]}). alpha times a value may be too large for the dtype"
        )
    return rows


def finite_counts(counts: Iterable[int], iteration: int) -> None:
    """Raise ModelFitError if an epoch reports rows that are not finite; users come first."""
    for side, count in zip(("user", "item"), counts, strict=True):
        if count:
            raise ModelFitError(
                f"NaN encountered in factors: {count} {side} rows are not finite after iteration "
                f"{iteration} (counted from 0). alpha times a value may be too large for the "
                "dtype, or the systems singular: try a smaller alpha, or more regularization"
            )


def solver_arguments(X: Any, Y: Any, regularization: Any, num_threads: Any) -> None:
    """Check the tables and the ridge that the callable `solver` is given.

    Parameters
    ----------
    X : ndarray of float and shape (n_rows, factors)
        The table to solve; must be writeable.
    Y : array of shape (n_columns, factors)
        The table held fixed.
    regularization : float
        Finite, at least 0.
    num_threads : int or None
        At least 0.

    Raises
    ------
    ValueError
        For anything else. X is then unchanged.
    """
    if not isinstance(X, np.ndarray) or X.ndim != 2 or X.dtype.kind != "f" or not X.flags.writeable:
        got = type(X).__name__
        if isinstance(X, np.ndarray):
            got = f"{X.dtype} of shape {X.shape}, writeable={X.flags.writeable}"
        raise ValueError(f"X must be a writeable 2-D array of floats, as it is modified; got {got}")
    shape = np.shape(Y)
    if len(shape) != 2 or shape[1] != X.shape[1]:
        raise ValueError(
            f"Y must have shape (n_columns, {X.shape[1]}), the factors of X, got {shape}"
        )
    row = first_not_finite(np.asarray(Y))
    if row is not None:
        raise ValueError(f"Y must be finite, but row {row} holds NaN or infinity")
    check_parameters({"regularization": regularization, "num_threads": num_threads or 0})
