"""Values derived from a table of factors, and checks of its rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tpu_als.engine.cpu import half_epoch
from tpu_als.host import single_blas_thread
from tpu_als.validation import refusals


class Given(NamedTuple):
    """Derived values that a user assigned, and the attributes' names, for messages."""

    gramian: np.ndarray | None = None
    norms: np.ndarray | None = None
    names: tuple[str, str] = ("gramian", "norms")


def norms(table: np.ndarray) -> np.ndarray:
    """Lengths (n,) of the rows of a table (n, K); 1e-10 in place of 0."""
    return divisible(np.linalg.norm(table, axis=-1))


def gramian(table: np.ndarray) -> np.ndarray:
    """Y^T Y (K, K) of a table (n, K), in its dtype."""
    with single_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
        return half_epoch.gramian(table, 1, table.dtype)


def divisible(lengths: np.ndarray) -> np.ndarray:
    """Lengths with 1e-10 in place of 0."""
    return np.where(lengths == 0, lengths.dtype.type(1e-10), lengths)


def require_finite(rows: np.ndarray, ids: np.ndarray | None = None) -> None:
    """Raise ValueError where rows of a table, with these ids or in its order, are not finite."""
    row = refusals.first_not_finite(rows)
    if row is not None:
        raise ValueError(
            f"factors must be finite, but row {row if ids is None else ids[row]} holds NaN or "
            "infinity, which was written into the table: write finite values, or assign the table "
            "again"
        )
