"""The gramian of a table of which a few rows have changed, without a pass over the table."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tpu_als.host import single_blas_thread

_MOST_MOVED = 16  # times the trace; beyond it the gramian is computed anew
_SHARE = 8  # with more than this part of the rows changed, it is computed anew too


class Carried(NamedTuple):
    """A gramian (K, K) in float64, and the squares of all rows added and removed since.

    Rounding errors are relative to the largest sums so far. They stay within `_MOST_MOVED` times
    those of a gramian that is computed from the table.
    """

    gram: np.ndarray
    moved: float = 0.0


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
        The replaced rows, zero where they are new, and those in their place.
    """
    if known is None or len(after) * _SHARE > n_rows:
        return None
    old, new = before.astype(np.float64), after.astype(np.float64)
    with single_blas_thread():
        gram = known.gram + (new.T @ new - old.T @ old)
    moved = known.moved + float(np.vdot(old, old) + np.vdot(new, new))
    # The negation also refuses NaN.
    return Carried(gram, moved) if moved <= _MOST_MOVED * np.trace(gram) else None
