"""The caller's features of users and items, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.validation import structure


class FeatureTable:
    """Features of rows, with names; `fit` and other methods accept it in place of a matrix.

    scikit-learn's cross-validation passes it on as it is. It would cut a matrix of item features
    like user features if there are as many items as users.

    Parameters
    ----------
    values : sparse matrix, array-like or DataFrame of shape (n_rows, n_features)
        Finite numbers. Text and categories must be encoded, for example by scikit-learn's
        `OneHotEncoder`. Rows are in the order of the matrix; the index of a DataFrame is ignored.
    names : array-like of str and shape (n_features,), optional
        Names of the features. By default the column names of a DataFrame.

    Attributes
    ----------
    matrix : csr_matrix of shape (n_rows, n_features)
        float64.
    names : ndarray of str, or None

    Raises
    ------
    ValueError
        For NaN, infinity, text, or another shape; for names that repeat or are not text.
    """

    def __init__(self, values: Any, names: Any = None, *, _name: str = "features") -> None:
        if names is None:
            names = _column_names(values)
        self.matrix = _matrix(values, _name)
        self.names = None if names is None else _checked_names(names, self.matrix.shape[1])

    def __repr__(self) -> str:
        n_rows, n_features = self.matrix.shape
        return f"FeatureTable({n_rows} rows of {n_features} features)"


def table_for(given: Any, n_rows: int, name: str, rows: str) -> FeatureTable:
    """The features of `fit`, one row for each user or item.

    Parameters
    ----------
    given : FeatureTable or anything that it accepts
        The argument.
    n_rows : int
        Number of users or items.
    name, rows : str
        The argument's name, and what its rows are, for messages.

    Raises
    ------
    ValueError
        As `FeatureTable`; for another number of rows.
    """
    table = given if isinstance(given, FeatureTable) else FeatureTable(given, _name=name)
    if table.matrix.shape[0] != n_rows:
        advice = ""
        if rows == "users" and given is table:
            advice = (
                ". Cross-validation does not cut a FeatureTable: pass user_features as a matrix, "
                "such as features.matrix"
            )
        if rows == "items":
            advice = (
                ". If a cross-validation cut it like the users' rows, pass "
                "tpu_als.FeatureTable(item_features)"
            )
        raise ValueError(
            f"{name} must have one row for each of the {n_rows} {rows}, got {given_shape(table)}"
            f"{advice}"
        )
    return table


def rows_for(
    given: Any, n_rows: int | None, fitted_names: np.ndarray | None, n_features: int, name: str
) -> sparse.csr_matrix:
    """Features of rows for a fitted model, with the columns that it was fitted with.

    Parameters
    ----------
    given : FeatureTable or anything that it accepts
        The argument.
    n_rows : int or None
        Number of rows expected; None for any.
    fitted_names : ndarray of str, or None
        Names of the features in `fit`.
    n_features : int
        Number of features in `fit`.
    name : str
        The argument's name, for messages.

    Raises
    ------
    ValueError
        As `FeatureTable`; for another number of rows or other columns.
    """
    table = given if isinstance(given, FeatureTable) else FeatureTable(given, _name=name)
    if n_rows is not None and table.matrix.shape[0] != n_rows:
        raise ValueError(f"{name} must have {n_rows} rows, got {given_shape(table)}")
    if table.matrix.shape[1] != n_features:
        raise ValueError(
            f"{name} must have the {n_features} columns of the features in fit, got "
            f"{given_shape(table)}"
        )
    if fitted_names is not None and table.names is not None:
        wrong = np.flatnonzero(fitted_names != table.names)
        if len(wrong):
            at = wrong[0]
            raise ValueError(
                f"{name} must have its columns in the order of fit, but column {at} is "
                f"{table.names[at]!r}, and was {fitted_names[at]!r}"
            )
    return table.matrix


def in_dtype(matrix: sparse.csr_matrix, dtype: Any, name: str) -> sparse.csr_matrix:
    """Features in a model's dtype; ValueError for values beyond it."""
    with np.errstate(over="ignore"):
        converted = matrix.astype(dtype)
    if not np.isfinite(converted.data).all():
        most = np.abs(matrix.data).max()
        raise ValueError(
            f"{name} holds values up to {most:.2g}, which {np.dtype(dtype).name} cannot represent: "
            "scale them, for example by sklearn.preprocessing.StandardScaler"
        )
    return converted


def finite_products(rows: np.ndarray, name: str) -> np.ndarray:
    """Factors that features predict; ValueError if they are not finite."""
    if not np.isfinite(rows).all():
        row = np.flatnonzero(~np.isfinite(rows).all(axis=1))[0]
        raise ValueError(
            f"row {row} of {name} is too large: its factors are not finite. Scale it as in fit"
        )
    return rows


def _checked_names(names: Any, n_features: int) -> np.ndarray:
    """Names of features, as a copy."""
    found = np.array(names, dtype=object)
    if found.shape != (n_features,):
        raise ValueError(
            f"names must have one name for each of the {n_features} features, got shape "
            f"{found.shape}"
        )
    for name in found:
        if not isinstance(name, str):
            raise ValueError(f"names must be text, got {name!r}: pass str(name)")
        if "\0" in name:
            raise ValueError(f"names must not have null characters, got {name!r}")
    unique, counts = np.unique(found.astype(str), return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"names must not repeat, got {str(unique[counts > 1][0])!r} several times")
    return found


def given_shape(table: FeatureTable) -> str:
    """A table's shape, for messages."""
    return f"shape {table.matrix.shape}"


def _column_names(values: Any) -> np.ndarray | None:
    """Names of a frame's columns, if all are text."""
    columns = getattr(values, "columns", None)
    if columns is None:
        return None
    names = list(columns)
    return np.array(names, dtype=object) if all(isinstance(name, str) for name in names) else None


def _matrix(values: Any, name: str) -> sparse.csr_matrix:
    if not sparse.issparse(values):
        values = _dense(values, name)
    # A copy, because the next lines change it in place.
    matrix = sparse.csr_matrix(structure.checked(values, name), dtype=np.float64, copy=True)
    matrix.sum_duplicates()
    bad = np.flatnonzero(~np.isfinite(matrix.data))
    if len(bad):
        row = int(np.searchsorted(matrix.indptr, bad[0], side="right")) - 1
        raise ValueError(
            f"{name} must hold finite numbers, but row {row}, column {matrix.indices[bad[0]]} is "
            f"{matrix.data[bad[0]]}: fill in missing values, or add a column that says that the "
            "value is missing"
        )
    if not matrix.shape[1]:
        raise ValueError(f"{name} must have at least one column, got shape {matrix.shape}")
    matrix.eliminate_zeros()
    return matrix


def _dense(values: Any, name: str) -> sparse.csr_matrix:
    """A dense table as a sparse one; the error for text names its column."""
    is_frame = hasattr(values, "columns")
    for column, dtype in zip(values.columns, values.dtypes, strict=True) if is_frame else ():
        is_number = getattr(dtype, "kind", None) in tuple("biuf") or _is_numeric(dtype)
        if not is_number:
            raise ValueError(
                f"{name} must hold numbers, but column {column!r} has dtype {dtype}: encode text "
                "and categories, for example by sklearn.preprocessing.OneHotEncoder"
            )
    array = _array_of_frame(values) if is_frame else np.asarray(values)
    if array.dtype == object:
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} must hold numbers, got objects: encode text and categories, for example "
                "by sklearn.preprocessing.OneHotEncoder"
            ) from None
    if array.ndim != 2:
        raise ValueError(
            f"{name} must be a table of shape (n_rows, n_features), got {type(values).__name__} "
            f"of shape {array.shape}"
        )
    return sparse.csr_matrix(structure.real_numbers(array, name))


def _array_of_frame(frame: Any) -> np.ndarray:
    """A frame of numbers as an array; missing values of pandas' own dtypes are NaN."""
    try:
        return np.asarray(frame.to_numpy(dtype=np.float64, na_value=np.nan))
    except (AttributeError, TypeError):  # not pandas
        return np.asarray(frame)


def _is_numeric(dtype: Any) -> bool:
    """Whether a dtype of another library than NumPy is one of numbers."""
    test = getattr(dtype, "is_numeric", None)  # polars
    if callable(test):
        return bool(test()) or str(dtype) == "Boolean"
    subtype = getattr(dtype, "subtype", None)  # pandas: sparse
    return getattr(subtype, "kind", "O") in tuple("biuf")
