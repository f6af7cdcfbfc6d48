"""Rows solved to convergence in the eigenbasis of a fixed table's gramian.

Axis letters: M rows to solve, N source rows, K factors, P of them and pads to whole cache lines.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from tpu_als.engine.cpu import compiled, half_epoch
from tpu_als.engine.cpu.compiled import read_only
from tpu_als.engine.cpu.half_epoch import Rows, Settings
from tpu_als.engine.cpu.memory import LINE, Memory
from tpu_als.engine.objective import Objective, largest_weight, typed
from tpu_als.host import threads

if TYPE_CHECKING:
    from tpu_als.engine.cpu.loops import Diagonal

_LEAST_ROWS = 4  # rows for which there is memory
_MANY = 4  # entries for each source row from which all source rows are rotated
_SMALL = 1 << 15  # numbers of rotated rows that take no memory of the pool
_LEAST_ROTATION = 1 << 21  # multiplications for which a thread pays


class Eigenbasis:
    """The eigenbasis of a table (N, K).

    It follows the rule of the gramian: it does not change when someone writes into the table.

    Parameters
    ----------
    table : array (N, K)
        float32 or float64. Its rows are read in each call.
    gram : float64 array (K, K)
        Its gramian.
    n_source : int, optional
        N of equation (2), if it is not the number of rows of the table.
    """

    def __init__(self, table: np.ndarray, gram: np.ndarray, n_source: int | None = None) -> None:
        self._n_source = len(table) if n_source is None else n_source
        rotation, spectrum = half_epoch.eigenbasis_of(gram, table.dtype)
        # In float64, as small components, those in the directions of small eigenvalues, decide the
        # solution where the ridge is small.
        self._tiles = read_only(_tiles(rotation))
        self._tiles_back = read_only(_tiles(rotation.T.astype(table.dtype)))
        self._table, self._spectrum = table, spectrum
        # The latest call's objective and largest value, and its settings and diagonal part.
        self._latest: tuple[tuple[Objective, float], Settings, Diagonal] | None = None
        self._memory = Memory()

    def solve(
        self,
        rows: sparse.csr_matrix,
        objective: Objective,
        n_threads: int,
        prior: np.ndarray | None = None,
    ) -> np.ndarray:
        """Solutions (M, K) of equation (1); NaN in rows that did not converge.

        Column N of the rows (M, N or N + 1) stands for a source row of zeros. Rows are drawn to
        those of `prior` (M, K).
        """
        loops, factors = compiled.converging(), self._table.shape[1]
        settings, diagonal = self._settings(rows.data, objective)
        limits = loops.Limits(settings.tolerance, settings.steps, settings.relaxation)
        source, ids = self._rotated(rows, n_threads)
        is_ones = len(rows.data) and rows.data.min() == 1 == rows.data.max()
        given = Rows(
            rows.indptr[:-1].astype(np.int64), np.diff(rows.indptr).astype(np.int64), ids,
            None if is_ones else rows.data, prior,
        )  # fmt: skip
        ahead, out = half_epoch.prefetched(source), np.empty((rows.shape[0], factors), source.dtype)

        def work(at: slice) -> None:
            part = given.part(at, source.dtype)
            rotated = np.zeros((at.stop - at.start, source.shape[1]), source.dtype)
            priors = read_only(self._priors(part, source.dtype))
            starts = compiled.loops().Starts(part.cells, part.lengths, priors)
            loops.solve_rows(
                rotated, starts,
                loops.Entries(read_only(source), part.ids, part.values, ahead),
                settings.objective, diagonal, limits,
            )  # fmt: skip
            loops.rotate(
                read_only(rotated), read_only(np.arange(len(rotated))), self._tiles_back, out[at]
            )

        threads(work, given.parts(n_threads, factors), n_threads)
        return out

    def _priors(self, part: Rows, dtype: np.dtype) -> np.ndarray:
        """The rotated priors (R, P) of some rows, or an empty array."""
        width = len(self._spectrum)
        if part.priors is None:
            return np.empty((0, width), dtype)
        out, ids = np.zeros((len(part.priors), width), dtype), np.arange(len(part.priors))
        compiled.converging().rotate(
            read_only(part.priors.astype(dtype, copy=False)), read_only(ids), self._tiles, out
        )
        return out

    def _settings(self, values: np.ndarray, objective: Objective) -> tuple[Settings, Diagonal]:
        """How to solve rows with these values, and the diagonal part of their equations."""
        largest = max(float(values.max(initial=0)), -float(values.min(initial=0)))
        given, latest = (objective, largest), self._latest
        if latest is None or latest[0] != given:
            dtype, factors, n_source = self._table.dtype, self._table.shape[1], self._n_source
            settings = Settings(
                typed(objective, dtype), 1.0, half_epoch.most_steps(factors),
                largest_weight(objective, (0, largest), dtype), half_epoch.TOLERANCE[dtype.name],
            )  # fmt: skip
            diagonal = half_epoch.diagonal_of(self._spectrum, n_source, factors, settings)
            self._latest = latest = given, settings, diagonal
        return latest[1:]

    def _rotated(self, rows: sparse.csr_matrix, n_threads: int) -> tuple[np.ndarray, np.ndarray]:
        """The rotated source rows (n, P) of the entries, and the one of each entry."""
        ids, n_source = rows.indices, len(self._table)
        if rows.shape[0] == 1:
            needed, positions = ids, np.arange(len(ids), dtype=np.uint32)
        elif len(ids) > _MANY * n_source:
            needed, positions = np.arange(n_source + 1), ids.astype(np.uint32)
        else:
            is_needed = np.zeros(n_source + 1, bool)
            is_needed[ids] = True
            needed = np.flatnonzero(is_needed)
            position = np.empty(n_source + 1, np.uint32)
            position[needed] = np.arange(len(needed))
            positions = position[ids]
        needed = read_only(needed.astype(np.int64))
        shape = len(needed), len(self._spectrum)
        loops, table, size = compiled.converging(), read_only(self._table), math.prod(shape)
        count = min(n_threads, 1 + size * table.shape[1] // _LEAST_ROTATION)
        if count == 1 and size <= _SMALL:
            out = np.empty(shape, table.dtype)
            loops.rotate(table, needed, self._tiles, out)
            return out, positions
        # Blocks of few sizes: the pool keeps one of each.
        room = 1 << (max(size, _LEAST_ROWS * shape[1]) - 1).bit_length()
        out = self._memory.empty(shape, table.dtype, room)
        bounds = np.linspace(0, len(needed), count + 1).astype(int)

        def rotate(at: tuple[int, int]) -> None:
            loops.rotate(table, needed[slice(*at)], self._tiles, out[slice(*at)])

        threads(rotate, list(itertools.pairwise(bounds)), count)
        return out, positions


def _tiles(matrix: np.ndarray) -> np.ndarray:
    """A matrix (K, P) as `vectors.multiply` reads it; zeros fill the last tile."""
    line = LINE // matrix.itemsize
    padded = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % line)))
    return np.ascontiguousarray(padded.reshape(len(matrix), -1, line).transpose(1, 0, 2))
