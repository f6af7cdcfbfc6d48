"""Arguments of splits, metrics and scorers: checked, or an error that says what to pass instead."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy import sparse

IF_EVENTS = (
    "if its rows are events, make a matrix of users by items of it first, "
    "tpu_als.datasets.interactions_from_frame(frame, user, item).matrix"
)


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Check that a count is an integer of at least `least`, and return it as an int."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def fraction(name: str, value: Any) -> float:
    """Check that a value is a number between 0 and 1, both excluded, and return it as a float."""
    if not is_number(value) or not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return float(value)


def refuse_other_objects(matrix: Any, name: str, frames: bool = False) -> None:
    """Raise TypeError, with what to pass instead, for what is no matrix of users by items.

    Parameters
    ----------
    matrix : object
        What was passed.
    name : str
        The argument's name, for the message.
    frames : bool, default=False
        Whether a data frame of numbers is accepted: users are rows, and items are columns.
    """
    kind, package = type(matrix).__name__, type(matrix).__module__.partition(".")[0]
    is_frame = package in ("pandas", "polars") and hasattr(matrix, "columns")
    advice = None
    if kind == "ShardedMatrix":
        advice = f"read the rows into memory first, {name}.to_csr(), or measure single blocks()"
    elif kind == "Interactions":
        advice = f"pass {name}.matrix"
    elif package == "pyarrow":
        advice = f"take frame = {name}.to_pandas(); {IF_EVENTS}"
    elif is_frame and not frames:
        advice = f"{IF_EVENTS}; if they are users, pass {name}.to_numpy()"
    elif is_frame and np.asarray(matrix).dtype.kind not in "biuf":
        advice = f"its values are not numbers; {IF_EVENTS}"
    elif isinstance(matrix, (str, os.PathLike)):
        advice = "load it first, for instance by scipy.sparse.load_npz"
    elif matrix is None:
        advice = "pass a sparse matrix or an array"
    if advice is not None:
        raise TypeError(
            f"{name} must be a matrix of users by items, got {kind} ({package}): {advice}"
        )


def sparse_matrix(matrix: Any, name: str) -> sparse.spmatrix:
    """Check the structure of a matrix, whatever SciPy's flags say of it.

    Parameters
    ----------
    matrix : sparse matrix, sparse array or array of shape (n_rows, n_columns)
        A 1-D sparse array is one row.
    name : str
        The argument's name, for messages.

    Returns
    -------
    csr_matrix, csc_matrix or coo_matrix of shape (n_rows, n_columns)
        Of the input's dtype. It may share the input's arrays, but no flags; entries may repeat.

    Raises
    ------
    TypeError
        For an object of another kind.
    ValueError
        For values that are not real numbers, other dimensions than two, or ids out of range.
    """
    refuse_other_objects(matrix, name)
    if not sparse.issparse(matrix):
        array = np.asarray(matrix)
        _check_values(array, name)
        if array.ndim != 2:
            raise ValueError(f"{name} must have users and items, got shape {array.shape}")
        return sparse.coo_matrix(array)
    if matrix.ndim == 1:
        matrix = matrix.reshape(1, -1)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have users and items, got shape {matrix.shape}")
    _check_values(matrix, name)
    try:
        return _rebuilt(matrix)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{name} is not a valid sparse matrix: {error}") from error


def _check_values(array: Any, name: str) -> None:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold real numbers, got dtype {array.dtype}")


def _rebuilt(matrix: Any) -> sparse.spmatrix:
    """The same entries in an object of its own, whose constructor checks them."""
    if matrix.format not in ("csr", "csc"):
        entries = matrix.tocoo()
        return sparse.coo_matrix((entries.data, (entries.row, entries.col)), shape=entries.shape)
    cls = sparse.csr_matrix if matrix.format == "csr" else sparse.csc_matrix
    rebuilt = cls((matrix.data, matrix.indices, matrix.indptr), shape=matrix.shape)
    rebuilt.check_format(full_check=True)
    return rebuilt
