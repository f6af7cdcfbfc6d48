"""Convert callers' matrices to canonical CSR. Errors say what was passed and what was expected."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.exceptions import ParameterWarning
from tpu_als.validation import structure
from tpu_als.validation.refusals import refuse_misplaced, require_finite

log = logging.getLogger("tpu_als")


def warn_if_converted(matrix: Any) -> None:
    """Warn as implicit does if a sparse matrix is not CSR and must be converted."""
    if sparse.issparse(matrix) and matrix.ndim == 2 and matrix.format != "csr":
        warnings.warn(
            f"Method expects CSR input, and was passed {type(matrix).__name__} instead: it is "
            "converted, which takes time and memory (pass user_items.tocsr())",
            ParameterWarning,
            stacklevel=3,
        )


def canonical_csr(matrix: object, name: str = "user_items") -> sparse.csr_matrix:
    """Return a float32 csr_matrix with sorted indices and no duplicates; the input is not modified.

    Parameters
    ----------
    matrix : ndarray, sparse matrix or sparse array of shape (n_rows, n_columns)
        A 1-D sparse array is one row. Zeros of a dense array are not entries; stored zeros of a
        sparse matrix are, as in implicit. Duplicate entries are summed (implicit uses each of
        them in the weights, and one in the filters).
    name : str
        The argument's name, for messages.

    Raises
    ------
    TypeError
        For an object meant for another function, such as a table of events.
    ValueError
        If a stored value is not finite, not real or too large for float32, or if the arrays of a
        sparse matrix contradict each other or its shape.
    """
    refuse_misplaced(matrix, name)
    csr, is_ascending = _as_csr(matrix, name)
    values = csr.data
    if values.dtype != np.float32:
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    require_finite(csr, values, name)
    if is_ascending and values is csr.data and _is_plain(csr):
        return csr
    out = sparse.csr_matrix(_contiguous(csr, values), shape=csr.shape)
    if not is_ascending:
        out = out.copy()
        out.sum_duplicates()
        require_finite(out, out.data, name)
    return out


def canonical(matrix: Any, name: str = "user_items") -> sparse.csr_matrix:
    """Return CSR of the input's dtype with duplicates summed; a copy if there are any.

    Integers become int64 if their dtype cannot represent the sums. Values are not checked.

    Raises
    ------
    ValueError
        As `canonical_csr`, but for NaN and infinity; for sums of integers beyond int64.
    """
    csr, is_ascending = _as_csr(matrix, name)
    dtype = csr.dtype if csr is matrix or not sparse.issparse(matrix) else matrix.dtype
    if is_ascending and csr.dtype == dtype and _is_plain(csr):
        return csr
    out = sparse.csr_matrix(_contiguous(csr, csr.data), shape=csr.shape)
    if not is_ascending:
        if dtype.kind in "iu":
            _refuse_beyond_int64(np.abs(out.data.astype(np.float64)).sum(), name)
        out = out.astype(np.int64, copy=True) if dtype.kind in "iu" else out.copy()
        out.sum_duplicates()
    elif dtype.kind in "iu" and out.dtype != dtype:  # the conversion summed duplicates
        _refuse_beyond_int64(np.abs(out.data).max(initial=0), name)
    if dtype.kind in "biu" and out.dtype != dtype:
        fits = dtype.kind == "b" or np.array_equal(out.data.astype(dtype), out.data)
        out = out.astype(dtype if fits else np.int64)
    return out


def _refuse_beyond_int64(size: float, name: str) -> None:
    if size >= 2.0**63:
        raise ValueError(
            f"{name} holds integers whose sums may exceed int64: pass {name}.astype(np.float64)"
        )


def _as_csr(matrix: object, name: str) -> tuple[sparse.csr_matrix, bool]:
    """CSR of checked arrays, and whether its ids strictly increase in each row."""
    if sparse.issparse(matrix):
        csr, is_ascending = structure.checked_with_order(matrix, name, widen=True)
        if csr.ndim == 1:
            csr, is_ascending = csr.reshape(1, -1), False
        if csr.format == "csr" and is_ascending:
            return csr, True
        csr = csr.tocsr()
    else:
        dense = structure.real_numbers(np.asarray(matrix), name)
        if dense.ndim not in (1, 2):
            raise ValueError(
                f"{name} must be a matrix of shape (n_rows, n_columns), got "
                f"{type(matrix).__name__} of {dense.ndim} dimensions"
            )
        csr = sparse.csr_matrix(dense)
    return csr, structure.check_compressed(csr, name)


def _contiguous(
    csr: sparse.csr_matrix, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of a CSR matrix, made contiguous for the compiled loops."""
    values, indices, indptr = map(np.ascontiguousarray, (values, csr.indices, csr.indptr))
    return values, indices, indptr


def _is_plain(csr: sparse.csr_matrix) -> bool:
    """Whether a CSR matrix needs no copy: contiguous arrays, and one native index dtype."""
    kind = csr.indices.dtype
    return (
        isinstance(csr, sparse.csr_matrix)
        and kind == csr.indptr.dtype
        and kind.kind == "i"
        and kind.itemsize >= 4
        and kind.isnative
        and csr.indices.flags.c_contiguous
        and csr.indptr.flags.c_contiguous
        and csr.data.flags.c_contiguous
    )


def rows_for(
    matrix: Any,
    n_rows: int | None,
    n_columns: int,
    name: str = "user_items",
    strict: bool = True,
    mask: np.ndarray | None = None,
) -> sparse.csr_matrix:
    """Check the rows that were passed with a list of ids.

    Parameters
    ----------
    matrix : csr_matrix, csr_array or 1-D sparse array
        One row for each id. Other sparse formats are accepted unless `strict`.
    n_rows : int or None
        Number of ids; None accepts any number of rows.
    n_columns : int
        Number of rows of the table that the columns refer to. A narrower matrix is widened. A wider
        one is cut to this width, and its further columns must have no entries.
    name : str
        The argument's name, for messages.
    strict : bool
        Whether formats other than CSR are refused, as in `recommend`.
    mask : ndarray of bool, optional
        The ids as a mask. `matrix` may then have one row for each element of the mask.

    Returns
    -------
    rows : csr_matrix of shape (n_rows, n_columns)
        Canonical.

    Raises
    ------
    ValueError
        For another format, another number of rows, or entries beyond the table.
    """
    rows = _rows_of_ids(matrix, n_rows, name, strict, mask)
    return _fit_columns(rows, n_columns, name, allow_unknown=False)


def rows_to_store(
    matrix: Any, n_rows: int, n_columns: int, name: str, mask: np.ndarray | None
) -> sparse.csr_matrix:
    """As `rows_for`, in any sparse format and with entries of ids that the table does not have yet.

    Returns
    -------
    rows : csr_matrix of shape (n_rows, n_columns), or (n_rows, n_columns + 1)
        Canonical. If there are entries of unknown ids, they are all moved to one additional column,
        which stands for a row of zeros in the table. That id may repeat within a row.
    """
    rows = _rows_of_ids(matrix, n_rows, name, strict=False, mask=mask)
    return _fit_columns(rows, n_columns, name, allow_unknown=True)


def _rows_of_ids(
    matrix: Any, n_rows: int | None, name: str, strict: bool, mask: np.ndarray | None
) -> sparse.csr_matrix:
    """Canonical rows, one for each id, of any width."""
    refuse_misplaced(matrix, name)
    is_sparse = sparse.issparse(matrix)
    if not is_sparse or (strict and matrix.format != "csr" and matrix.ndim > 1):
        advice = f"{name}.tocsr()" if is_sparse else f"csr_matrix({name})"
        if matrix is None:
            advice = "the rows of the ids"
            advice += ", or filter_already_liked_items=False" if strict else ""
        raise ValueError(
            f"{name} needs to be a CSR sparse matrix, got {type(matrix).__name__}: pass {advice}"
        )
    rows = canonical_csr(matrix, name)
    if mask is not None and rows.shape[0] == len(mask):
        rows = rows[np.flatnonzero(mask)]
    if n_rows is not None and rows.shape[0] != n_rows:
        of, ids = ("item", "itemids") if name == "item_users" else ("user", "userids")
        raise ValueError(
            f"{name} must contain 1 row for every {of} in {ids}: got {rows.shape[0]} rows of "
            f"shape {matrix.shape} for {n_rows} ids. Did you pass all rows? Use {name}[{ids}]"
        )
    return rows


def _fit_columns(
    rows: sparse.csr_matrix, n_columns: int, name: str, allow_unknown: bool
) -> sparse.csr_matrix:
    if rows.shape[1] == n_columns:
        return rows
    ids, width = rows.indices, n_columns
    # Ids are within the shape of the matrix, so only a wider matrix needs a check.
    if rows.nnz and rows.shape[1] > n_columns and ids.max() >= n_columns:
        kind = "items" if name == "user_items" else "users"
        if not allow_unknown:
            raise ValueError(
                f"{name} of shape {rows.shape} has an entry in column {ids.max()}, but the "
                f"model was fitted with {n_columns} {kind}. Is the matrix transposed, or are there "
                f"new {kind} (add them with partial_fit_{kind})?"
            )
        is_unknown = ids >= n_columns
        log.info(
            "%d of %d entries of %s belong to %s that the model does not have yet: they add no "
            "information to the solve", is_unknown.sum(), rows.nnz, name, kind,
        )  # fmt: skip
        ids, width = np.minimum(ids, n_columns), n_columns + 1
    return sparse.csr_matrix((rows.data, ids, rows.indptr), (rows.shape[0], width))


def known_entries(
    rows: sparse.csr_matrix, row: Any, n_columns: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids and values of a row's entries below `n_columns`, and the number of all its entries.

    The number is n_u of equation (2), which includes entries of unknown ids.
    """
    at = slice(rows.indptr[row], rows.indptr[row + 1])
    ids, values = rows.indices[at], rows.data[at]
    count = len(ids)
    if rows.shape[1] > n_columns:
        is_known = ids < n_columns
        ids, values = ids[is_known], values[is_known]
    return ids, values, count


def explained_row(user_items: object, user: int, n_items: int) -> sparse.csr_matrix:
    """Return the row (1, n_items) of a user, from the whole matrix or from that row alone.

    Parameters
    ----------
    user_items : sparse matrix or array of shape (n_users, n_items), (1, n_items) or (n_items,)
        A single row is used for any `user`.
    user : int
        Which row to use if there are several.
    n_items : int
        Rows of the item table.

    Raises
    ------
    IndexError
        For a user beyond the matrix.
    ValueError
        As in `rows_for`.
    """
    rows = rows_for(user_items, None, n_items, strict=False)
    if rows.shape[0] == 1:
        return rows
    if user >= rows.shape[0]:
        raise IndexError(
            f"userid {user} is not in user_items, which has {rows.shape[0]} rows: pass the whole "
            "matrix, or the user's own row, user_items[userid]"
        )
    return rows[user]
