"""The gramian of a table of which a few rows have changed, without the table."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tpu_als.host import single_blas_thread

# Times a column's sum of squares; above it the gramian is computed anew. The rounding of a table in
# float32 changes its gramian more than the sums in float64 do, so it may be carried for longer.
_MOST_MOVED, _MOST_MOVED_FLOAT32 = 16, 4096
_SHARE = 8  # the gramian is computed anew too if more than 1/8 of the rows have changed


class Carried(NamedTuple):
    """A gramian (K, K) in float64, and the squares (K,) of all numbers added and removed since.

    The rounding error grows with the sums added and removed. In each column it is limited to
    `_MOST_MOVED` times that of a new gramian, and to `_MOST_MOVED_FLOAT32` times if the table is
    not in float64.
    """

    gram: np.ndarray
    moved: np.ndarray


def after_change(
    known: Carried | None, n_rows: int, before: np.ndarray, after: np.ndarray
) -> Carried | None:
    """The gramian after some rows of a table were replaced; None if it must be computed anew.

    Parameters
    ----------
    known : Carried or None
        The gramian before.
    n_rows : int
        Rows of the table.
    before, after : array (m, K)
        The replaced rows as they were when the gramian was computed, zero where they are new; and
        the rows in their place.
    """
    if known is None or len(after) * _SHARE > n_rows:
        return None
    old, new = before.astype(np.float64), after.astype(np.float64)
    with single_blas_thread(), np.errstate(over="ignore", invalid="ignore"):
        gram = known.gram + (new.T @ new - old.T @ old)
        moved = known.moved + np.sum(old**2, axis=0) + np.sum(new**2, axis=0)
        most = _MOST_MOVED if after.dtype == np.float64 else _MOST_MOVED_FLOAT32
        is_exact = (moved <= most * np.diagonal(gram)).all()  # False for NaN
    return Carried(gram, moved) if is_exact else None
