"""Check that the arrays of a caller's sparse matrix are consistent, in range and real.

SciPy, the compiled loops and XLA address memory with the numbers in `indptr` and `indices`. A wrong
number there can crash the process, and the flags of a SciPy matrix can be wrong. So the arrays are
checked here before compiled code reads them, and the flags are ignored.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn, TypeAlias

import numpy as np
from scipy import sparse

from tpu_als.host import require_memory

_ROW_BYTES = 16  # of a row in a CSR matrix and in the conversion to it

SparseMatrix: TypeAlias = sparse.spmatrix | sparse.sparray


def checked(matrix: object, name: str = "user_items", *, widen: bool = False) -> Any:
    """Return a matrix that is safe for compiled code; the input is not modified.

    Parameters
    ----------
    matrix : object
        Objects other than sparse matrices are returned unchanged.
    name : str
        The argument's name, for messages.
    widen : bool, default=False
        Whether to convert integers of formats other than CSR to float64: conversion to CSR sums
        duplicates, and sums of small integer types overflow.

    Returns
    -------
    object
        If sparse: one or two dimensions, consistent arrays, ids in range, and real values. The
        order of the ids and duplicates are not checked.

    Raises
    ------
    ValueError
        For arrays that contradict each other or the shape, and for values that are not real.
    MemoryError
        For formats other than CSR with so many rows that a CSR does not fit into memory.
    """
    if sparse.issparse(matrix):
        return checked_with_order(matrix, name, widen=widen)[0]
    return matrix


def check_compressed(matrix: sparse.csr_matrix, name: str = "user_items") -> bool:
    """Raise ValueError unless the arrays of a CSR or CSC matrix fit each other and its shape.

    Returns
    -------
    bool
        Whether ids strictly increase in each row, or in each column of a CSC matrix.
    """
    shape = matrix.shape if matrix.ndim == 2 else (1, *matrix.shape)
    major, minor = shape if matrix.format == "csr" else shape[::-1]
    indptr, indices, data = matrix.indptr, matrix.indices, matrix.data
    n_entries = _length(indices, "indices", matrix, name)
    if _length(indptr, "indptr", matrix, name) != major + 1:
        _damaged(matrix, name, f"indptr has length {len(indptr)}, expected {major + 1}")
    if not isinstance(data, np.ndarray) or data.shape != (n_entries,):
        got = getattr(data, "shape", type(data).__name__)
        _damaged(matrix, name, f"data has shape {got}, but indices has length {n_entries}")
    return _is_ascending(indptr, indices, (major, minor), matrix, name)


def _is_ascending(
    indptr: np.ndarray,
    indices: np.ndarray,
    shape: tuple[int, int],
    matrix: sparse.spmatrix,
    name: str,
) -> bool:
    """Check the content of index arrays; return whether ids strictly increase within rows."""
    n_entries, (major, minor) = len(indices), shape
    if indptr[0] != 0 or indptr[-1] != n_entries:
        _damaged(
            matrix,
            name,
            f"indptr runs from {indptr[0]} to {indptr[-1]}, expected from 0 to {n_entries}, the "
            "length of indices and data (matrix.prune() drops spare entries)",
        )
    if major > 1:
        falls = indptr[1:] < indptr[:-1]
        if falls.any():
            at = int(falls.argmax())
            found = f"indptr falls from {indptr[at]} to {indptr[at + 1]} at row {at}"
            _damaged(matrix, name, f"{found}, expected a sequence that never decreases")
    if not n_entries:
        return True
    rises = indices[1:] > indices[:-1]
    if major > 1:  # the first id of a row may be below the last id of the row before
        starts = indptr[1:-1]
        rises[starts[(starts > 0) & (starts < n_entries)] - 1] = True
    is_ascending = np.count_nonzero(rises) == len(rises)  # half the time of `all`
    if is_ascending and major == 1:
        low, high = indices[0], indices[-1]
    else:
        low, high = indices.min(), indices.max()
    if low < 0 or high >= minor:
        _outside("column" if matrix.format != "csc" else "row", low, high, minor, matrix, name)
    return is_ascending


def checked_with_order(matrix: Any, name: str, *, widen: bool) -> tuple[Any, bool]:
    """Check a sparse matrix; return it, and whether it is CSR with increasing ids in each row."""
    if matrix.ndim > 2:
        raise ValueError(
            f"{name} must have at most 2 dimensions, got a sparse array of {matrix.ndim}"
        )
    kind = matrix.format
    if kind == "csr":
        is_ascending = check_compressed(matrix, name)
        return _real(matrix, name), is_ascending
    if kind in ("lil", "dok"):  # made of Python objects instead of arrays
        matrix = _from_objects(matrix, name)
        kind = matrix.format
    if kind == "csc":
        check_compressed(matrix, name)
    elif kind == "bsr":
        _check_blocks(matrix, name)
    elif kind == "coo":
        _check_coordinates(matrix, name)
    elif kind == "dia":
        _check_diagonals(matrix, name)
    matrix = _real(matrix, name)
    if matrix.ndim == 2:
        n_rows = matrix.shape[0]
        require_memory(
            {f"row pointers of {n_rows} rows of {name}": _ROW_BYTES * n_rows},
            "number the rows from 0 on, without gaps",
        )
    if widen and matrix.dtype.char not in "fd":
        matrix = matrix.astype(np.float64)
    return matrix, False


def _check_coordinates(matrix: sparse.spmatrix, name: str) -> None:
    n_entries, coordinates = len(matrix.data), matrix.coords
    if matrix.data.ndim != 1 or len(coordinates) != matrix.ndim:
        _damaged(matrix, name, f"{len(coordinates)} coordinates for {matrix.ndim} dimensions")
    axes = ("row", "column")[-matrix.ndim :]
    for axis, ids, size in zip(axes, coordinates, matrix.shape, strict=True):
        if _length(ids, f"{axis} ids", matrix, name) != n_entries:
            _damaged(matrix, name, f"{len(ids)} {axis} ids for {n_entries} values")
        if n_entries and (ids.min() < 0 or ids.max() >= size):
            _outside(axis, ids.min(), ids.max(), size, matrix, name)


def _check_blocks(matrix: sparse.spmatrix, name: str) -> None:
    indptr, indices, data = matrix.indptr, matrix.indices, matrix.data
    n_blocks = _length(indices, "indices", matrix, name)
    if data.ndim != 3 or len(data) != n_blocks or 0 in data.shape[1:]:
        _damaged(matrix, name, f"data has shape {data.shape}, but indices has length {n_blocks}")
    (major, rest), (minor, spare) = map(divmod, matrix.shape, data.shape[1:])
    if rest or spare:
        _damaged(matrix, name, f"blocks of {data.shape[1:]} do not divide its shape")
    if _length(indptr, "indptr", matrix, name) != major + 1:
        _damaged(matrix, name, f"indptr has length {len(indptr)}, expected {major + 1}")
    _is_ascending(indptr, indices, (major, minor), matrix, name)


def _check_diagonals(matrix: sparse.spmatrix, name: str) -> None:
    n_diagonals = _length(matrix.offsets, "offsets", matrix, name)
    if matrix.data.ndim != 2 or len(matrix.data) != n_diagonals:
        _damaged(matrix, name, f"data has shape {matrix.data.shape} for {n_diagonals} offsets")
    if len(np.unique(matrix.offsets)) != n_diagonals:
        _damaged(matrix, name, "offsets repeat")


def _from_objects(matrix: sparse.spmatrix, name: str) -> sparse.spmatrix:
    """Convert a matrix of Python objects to COO; the caller must still check its arrays."""
    if matrix.format == "dok":
        try:
            return matrix.tocoo()
        except (TypeError, ValueError, OverflowError) as error:
            _damaged(matrix, name, str(error))
    lists = len(matrix.rows), len(matrix.data), matrix.shape[0]
    if len(set(lists)) > 1:
        _damaged(matrix, name, f"{lists[0]} lists of ids and {lists[1]} of values")
    lengths = [len(ids) for ids in matrix.rows]
    if lengths != [len(values) for values in matrix.data]:
        _damaged(matrix, name, "a row's lists of ids and of values differ in length")
    rows = np.repeat(np.arange(len(lengths)), lengths)
    columns = [column for ids in matrix.rows for column in ids]
    values = [value for row in matrix.data for value in row]
    try:
        arrays = np.array(values, matrix.dtype), np.array(columns, np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        _damaged(matrix, name, str(error))
    out = sparse.coo_matrix(matrix.shape, dtype=matrix.dtype)
    out.data, out.coords = arrays[0], (rows, arrays[1])
    return out


def _length(array: object, what: str, matrix: sparse.spmatrix, name: str) -> int:
    """Length of an index array; raise ValueError unless it is one-dimensional and of integers."""
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        got = type(array).__name__
        if isinstance(array, np.ndarray):
            got = f"{array.dtype} of shape {array.shape}"
        _damaged(matrix, name, f"{what} must be a 1-D array of integers, got {got}")
    return len(array)


def _real(matrix: sparse.spmatrix, name: str) -> sparse.spmatrix:
    """Return the matrix if its values are real numbers, or a float64 copy if they are objects."""
    if matrix.data.dtype.kind == "O":
        out = copy.copy(matrix)  # not matrix.copy(): SciPy refuses objects
        out.data = real_numbers(matrix.data, name)
        return out
    real_numbers(matrix.data, name)
    return matrix


def real_numbers(values: np.ndarray, name: str) -> np.ndarray:
    """Return an array of real numbers; objects become float64.

    Raises
    ------
    ValueError
        For complex numbers, strings, dates and other objects.
    """
    if np.ma.is_masked(values):
        raise ValueError(f"{name} must have no masked values: pass the unmasked values only")
    kind = values.dtype.kind
    if kind in "fiub":
        return values
    if kind == "c" or (kind == "O" and any(isinstance(v, complex) for v in values.flat)):
        raise ValueError(
            f"{name} holds complex numbers, whose imaginary part would be lost: pass {name}.real, "
            f"or abs({name})"
        )
    if kind == "O" and not any(isinstance(v, (str, bytes)) for v in values.flat):
        try:
            return values.astype(np.float64)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(
        f"{name} must hold real numbers, got values of dtype {values.dtype}: convert them, for "
        f"instance with {name}.astype(np.float32)"
    )


def _damaged(matrix: sparse.spmatrix, name: str, what: str) -> NoReturn:
    raise ValueError(
        f"{name} is a damaged {type(matrix).__name__} of shape {matrix.shape}: {what}. Rebuild it "
        "from its entries, for instance as csr_matrix((values, (rows, columns)), shape)"
    )


def _outside(
    axis: str, low: int, high: int, size: int, matrix: sparse.spmatrix, name: str
) -> NoReturn:
    wrong = low if low < 0 else high
    raise ValueError(
        f"a {axis} index of the sparse matrix lies outside its shape {matrix.shape}: {name} has "
        f"{axis} {wrong}, expected 0 to {size - 1}"
    )
