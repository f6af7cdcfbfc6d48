"""The loop that computes losses, compiled by numba; `compiled.loss` imports this module.

Axis letters: R rows, K factors.
"""

from __future__ import annotations

import numpy as np

from tpu_als.engine.cpu.intrinsics import prefetch, widen
from tpu_als.engine.cpu.jit import compiled
from tpu_als.engine.cpu.loops import Entries, confidence
from tpu_als.engine.objective import Objective


@compiled
def measure_rows(
    rows: np.ndarray,
    starts: tuple[np.ndarray, np.ndarray],
    entries: Entries,
    objective: Objective,
    offset: float,
    out: np.ndarray,
) -> None:
    """Write the loss of the entries of R rows into `out`, as in `xla.solve.cells_loss`.

    `objective` has the offset 0, so that w is the absolute confidence; `offset` is the actual one.
    Predictions t are in the dtype of the tables; their losses are summed in float64. The loss of an
    entry is computed from squares, because sums of (w t - 2 v) t and of constants nearly cancel.
    """
    source, ids, values, ahead = entries
    cells, lengths = starts
    address, row_bytes = source.ctypes.data, rows.shape[1] * source.itemsize
    kind = rows.dtype.type
    zero, one = kind(0), kind(1)
    for row in range(len(lengths)):
        total = np.float64(0)
        for at in range(cells[row], cells[row] + lengths[row]):
            if ahead and at + ahead < len(ids):
                for byte in range(0, row_bytes, 64):
                    prefetch(address + ids[at + ahead] * row_bytes + byte)
            t, i = zero, ids[at]
            for k in range(rows.shape[1]):
                t += widen(source[i, k]) * rows[row, k]
            w, v = confidence(objective, values[at] if len(values) else one)
            liked = kind(v)
            total += liked * (one - t) ** 2 + (kind(w) - liked) * (one + t * t)
            total -= offset * t * t
        out[row] = total
