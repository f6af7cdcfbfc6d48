"""Loops that rotate rows of a table into the eigenbasis and back, compiled by numba.

`compiled.rotation` imports this module when it is needed. Rows are rotated here and not by BLAS,
whose last bits depend on the number of rows. So the bits of a solution do not depend on the other
rows.

Axis letters: N rows of a table, K factors, P of them and pads to whole cache lines.
"""

from __future__ import annotations

import numpy as np

from tpu_als.engine.cpu.jit import compiled
from tpu_als.engine.cpu.memory import LINE
from tpu_als.engine.cpu.vectors import GROUP, TILES, multiply


def tiles_of(matrix: np.ndarray) -> np.ndarray:
    """A matrix (K, P) as `vectors.multiply` reads it; zeros fill the last tiles."""
    line = LINE // matrix.itemsize
    padded = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % (line * TILES))))
    return np.ascontiguousarray(padded.reshape(len(matrix), -1, line).transpose(1, 0, 2))


@compiled
def rotate(table: np.ndarray, ids: np.ndarray, tiles: np.ndarray, out: np.ndarray) -> None:
    """Write the products of n rows of a table (N, K) and a matrix (K, P) to `out`.

    If `out` (n, O) has fewer columns than the matrix, the last ones are left out. Sums have the
    dtype of `tiles`, which hold the matrix as `tiles_of` writes it. Products of a row do
    not depend on the other rows. The id N stands for a row of zeros.
    """
    n_rows, n_factors = table.shape
    columns = np.empty((n_factors, GROUP), tiles.dtype)
    sums = np.empty((GROUP, len(tiles) * tiles.shape[2]), tiles.dtype)
    for at in range(0, len(ids), GROUP):
        count = min(len(ids) - at, GROUP)
        for j in range(GROUP):
            row = ids[at + j] if j < count else n_rows
            for k in range(n_factors):
                columns[k, j] = table[row, k] if row < n_rows else 0
        for tile in range(0, len(tiles), TILES):
            multiply(columns, tiles, tile, sums)
        for j in range(count):
            for k in range(out.shape[1]):
                out[at + j, k] = sums[j, k]


@compiled
def differ(table: np.ndarray, before: np.ndarray, ids: np.ndarray) -> bool:
    """Whether some rows of a table (N, K) are not as before, or hold NaN; id N is skipped."""
    n_rows, n_factors = table.shape
    for at in range(len(ids)):
        row, n_changed = ids[at], 0
        if row < n_rows:
            for k in range(n_factors):
                n_changed += table[row, k] != before[row, k]
        if n_changed:
            return True
    return False
