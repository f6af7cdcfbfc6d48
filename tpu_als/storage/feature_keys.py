"""The features of a fitted model as keys of a model file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.storage.npz import Header
from tpu_als.validation import structure

_SIDES = ("user", "item")
_PARTS = ("weights", "data", "indices", "indptr", "names_in_")
# Axes, kinds of dtype and a description of each part.
_EXPECTED = {
    "weights": (2, "f", "a 2-D array of floating-point numbers"),
    "data": (1, "f", "a 1-D array of floating-point numbers"),
    "indices": (1, "i", "a 1-D array of signed integers"),
    "indptr": (1, "i", "a 1-D array of signed integers"),
    "names_in_": (1, "U", "a 1-D array of text"),
}
KEYS = tuple(f"{side}_feature_{part}" for side in _SIDES for part in _PARTS)


def packed(
    side: str, weights: np.ndarray, rows: sparse.csr_matrix, names: np.ndarray | None
) -> dict[str, Any]:
    """Keys and values for a side's weights (n_features, factors), features of rows, and names."""
    values = (weights, rows.data, rows.indices, rows.indptr)
    found = dict(zip(_of(side), values, strict=False))
    if names is not None:
        found[f"{side}_feature_names_in_"] = names.astype(str)
    return found


def unpacked(
    values: Mapping[str, Any], tables: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, tuple[np.ndarray, sparse.csr_matrix, np.ndarray | None]]]:
    """Side, and weights, features of rows and names, for each side that a file has.

    Raises
    ------
    ValueError
        If a part is missing, damaged, or does not go with the others or with the table.
    """
    for side in _SIDES:
        keys = _of(side)
        present = [key for key in keys if key in values]
        if not present:
            continue
        missing = sorted({*keys[:4]} - {*present})
        if missing:
            raise ValueError(f"{missing[0]} is missing, but the file has {present[0]}")
        weights, data, indices, indptr = (values[key] for key in keys[:4])
        table, names = tables.get(f"{side}_factors"), values.get(keys[4])
        shape = len(indptr) - 1, len(weights)
        if table is None or weights.shape[1] != table.shape[1] or shape[0] > len(table):
            raise ValueError(
                f"{keys[0]} of shape {weights.shape}, with features of {shape[0]} rows, does not "
                f"go with {side}_factors of shape {None if table is None else table.shape}"
            )
        if not np.isfinite(weights).all() or not np.isfinite(data).all():
            raise ValueError(f"{keys[0]} and {keys[1]} must be finite")
        if names is not None and len(names) != len(weights):
            raise ValueError(f"{keys[4]} must have {len(weights)} names, got {len(names)}")
        rows = sparse.csr_matrix(shape, dtype=data.dtype)
        rows.data, rows.indices, rows.indptr = data, indices, indptr
        structure.check_compressed(rows, f"{side}_feature_indices")
        yield side, (weights, rows, None if names is None else names.astype(object))


def check_header(key: str, header: Header) -> None:
    """Raise ValueError for a part whose dtype or number of axes is wrong."""
    n_axes, kinds, expected = _EXPECTED[key.split("_feature_")[1]]
    if len(header.shape) != n_axes or header.dtype.kind not in kinds or header.dtype.subdtype:
        raise ValueError(f"{key} must be {expected}, got {header}")


def _of(side: str) -> list[str]:
    return [f"{side}_feature_{part}" for part in _PARTS]
