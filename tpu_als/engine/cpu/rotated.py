"""A fixed table in the eigenbasis of its gramian, to solve rows against.

Axis letters: M rows to solve, N source rows, K factors, P of them and pads to whole cache lines.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.engine.cpu import compiled, half_epoch
from tpu_als.engine.cpu.compiled import read_only
from tpu_als.engine.cpu.half_epoch import Rows, Settings
from tpu_als.engine.cpu.memory import Memory
from tpu_als.engine.objective import Objective, largest_weight, typed
from tpu_als.host import single_blas_thread, threads

# Bounds on the error's energy as a multiple of the solution's, for which errors stay below 1e-5
# and 1e-10 of the solution's length.
TOLERANCE = {"float32": 5e-6, "float64": 1e-11}
_LEAST_ROTATION = 1 << 21  # multiplications for which a thread pays


def most_steps(factors: int) -> int:
    """Steps of CG after which a direct solve is expected to be cheaper."""
    return max(factors, 32)


class RotatedTable:
    """A table (N, K) whose rows are rotated when they are first needed.

    As the gramian, the rotated rows do not change with the table.

    Parameters
    ----------
    table : array (N, K)
        float32 or float64.
    n_threads : int
        Number of threads that compute the gramian.
    """

    def __init__(self, table: np.ndarray, n_threads: int) -> None:
        self._table, self._lock = table, threading.Lock()
        with single_blas_thread():
            gram = half_epoch.gramian(table, n_threads, np.float64)
            rotation, spectrum = half_epoch.eigenbasis_of(gram, table.dtype)
        self._rotation, self._spectrum = read_only(rotation), spectrum
        # One more row, of zeros, stands for source rows that the table lacks.
        shape = len(table) + 1, rotation.shape[1]
        self._rows = Memory().empty(shape, table.dtype)
        self._rows[-1] = 0
        self._is_rotated = np.zeros(len(table) + 1, bool)
        self._is_rotated[-1] = True
        self._is_complete = False
        self._diagonal: tuple[Settings, Any] | None = None  # of the latest call

    def solve(self, rows: sparse.csr_matrix, objective: Objective, n_threads: int) -> np.ndarray:
        """Solutions (M, K) of equation (1); NaN in rows that did not converge.

        Column N of the rows (M, N or N + 1) stands for a source row of zeros.
        """
        self._rotate(rows.indices, n_threads)
        dtype, loops = self._table.dtype, compiled.converging()
        sizes = np.abs(rows.data)
        magnitudes = sizes.min(initial=np.inf), sizes.max(initial=0)
        factors, ahead = self._table.shape[1], half_epoch.prefetched(self._rows)
        settings = Settings(
            typed(objective, dtype), 1.0, most_steps(factors),
            largest_weight(objective, magnitudes, dtype),
        )  # fmt: skip
        limits = loops.Limits(TOLERANCE[dtype.name], settings.steps, settings.relaxation)
        latest = self._diagonal
        if latest is None or latest[0] != settings:
            diagonal = half_epoch.diagonal_of(self._spectrum, len(self._table), factors, settings)
            self._diagonal = latest = settings, diagonal
        given = Rows(
            rows.indptr[:-1].astype(np.int64), np.diff(rows.indptr).astype(np.int64),
            rows.indices.view(np.uint32) if rows.indices.dtype == np.int32
            else rows.indices.astype(np.uint32),
            None if magnitudes == (1, 1) and rows.data.min() == 1 else rows.data,
        )  # fmt: skip
        fixed, out = read_only(self._rows), np.empty((rows.shape[0], factors), dtype)

        def work(at: slice) -> None:
            part = given.part(at, dtype)
            rotated = np.zeros((at.stop - at.start, self._rows.shape[1]), dtype)
            loops.solve_rows(
                rotated, (part.cells, part.lengths),
                loops.Entries(fixed, part.ids, part.values, ahead),
                settings.objective, latest[1], limits,
            )  # fmt: skip
            loops.rotate_back(rotated, self._rotation, out[at])

        threads(work, given.parts(n_threads, factors), n_threads)
        return out

    def _rotate(self, ids: np.ndarray, n_threads: int) -> None:
        """Rotate the rows with these ids, unless they are rotated already."""
        if self._is_complete or self._is_rotated[ids].all():
            return
        with self._lock:
            is_missing = np.zeros(len(self._is_rotated), bool)
            is_missing[ids] = True
            is_missing &= ~self._is_rotated
            missing = np.flatnonzero(is_missing).astype(np.uint32)
            loops = compiled.converging()
            work = len(missing) * self._table.shape[1] ** 2
            count = min(n_threads, 1 + work // _LEAST_ROTATION)

            def rotate(part: np.ndarray) -> None:
                loops.rotate(read_only(self._table), read_only(part), self._rotation, self._rows)

            threads(rotate, np.array_split(missing, count), count)
            self._is_rotated[missing] = True
            self._is_complete = bool(self._is_rotated.all())
