"""Exact solutions of rows in the eigenbasis of a table, where equation (3) holds.

The loops of `converging` solve rows against rotated source rows. They are rotated in each call, or
once where a table is small and many of its rows are needed.

Axis letters: M rows to solve, N source rows, K factors, P of them and pads to whole cache lines.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse

from tpu_als.engine.cpu import compiled, half_epoch
from tpu_als.engine.cpu.compiled import read_only
from tpu_als.engine.cpu.half_epoch import Rows, Settings
from tpu_als.engine.cpu.memory import Memory
from tpu_als.engine.objective import Objective, largest_weight, typed
from tpu_als.host import threads

if TYPE_CHECKING:
    from tpu_als.engine.cpu.loops import Diagonal

_LEAST_ROWS = 4  # rows for which there is memory
_SMALL = 1 << 15  # numbers of rotated rows that take no memory of the pool
_LEAST_ROTATION = 1 << 21  # multiplications for which a thread pays
_MANY = 4  # all source rows are rotated if there are more entries than this for each of them
_KEPT_BYTES = 1 << 25  # of each of the two copies of a table whose rotated rows are kept
_FIRST = read_only(np.arange(1))


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
        # In float64: if the ridge is small, the solution depends on the small components in the
        # directions of small eigenvalues.
        tiles_of = compiled.rotation().tiles_of
        self._tiles = read_only(tiles_of(rotation))
        self._tiles_back = read_only(tiles_of(rotation.T.astype(table.dtype)))
        self._dtype, self._factors, self._spectrum = table.dtype, table.shape[1], spectrum
        self._source = _RotatedRows(table, self._tiles, len(spectrum))
        self._no_priors = read_only(np.empty((0, len(spectrum)), table.dtype))
        # The latest call's objective and largest value, and its settings and diagonal part.
        self._latest: tuple[tuple[Objective, float], Settings, Diagonal] | None = None

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
        values, n_rows = rows.data, rows.shape[0]
        least, most = (values.min(), values.max()) if len(values) else (1, 1)
        settings, diagonal = self._settings(max(float(most), -float(least)), objective)
        source, ids = self._source.of(rows, n_threads)
        cells = rows.indptr.astype(np.int64)
        known = None if least == 1 == most else values
        given = Rows(cells[:-1], cells[1:] - cells[:-1], ids, known, prior)
        out = np.empty((n_rows, self._factors), self._dtype)

        def work(at: slice) -> None:
            self._solve(given.part(at, self._dtype), source, (settings, diagonal), out[at])

        # A single row, the usual call of a service, needs no queue of parts.
        parts = [slice(0, 1)] if n_rows == 1 else given.parts(n_threads, self._factors)
        if len(parts) == 1:
            work(parts[0])
        else:
            threads(work, parts, n_threads)
        return out

    def _solve(
        self, part: Rows, source: np.ndarray, how: tuple[Settings, Diagonal], out: np.ndarray
    ) -> None:
        """Write the solutions of some rows to `out`, with rotated source rows."""
        loops, (settings, diagonal) = compiled.converging(), how
        rotated = np.zeros((len(out), source.shape[1]), self._dtype)
        loops.solve_rows(
            rotated,
            compiled.loops().Starts(part.cells, part.lengths, self._priors(part)),
            loops.Entries(source, part.ids, part.values, half_epoch.prefetched(source)),
            settings.objective, diagonal,
            loops.Limits(settings.tolerance, settings.steps, settings.relaxation),
        )  # fmt: skip
        ids = _FIRST if len(rotated) == 1 else read_only(np.arange(len(rotated)))
        compiled.rotation().rotate(read_only(rotated), ids, self._tiles_back, out)

    def _priors(self, part: Rows) -> np.ndarray:
        """The rotated priors (R, P) of some rows, or an empty array."""
        dtype, width = self._dtype, len(self._spectrum)
        if part.priors is None:
            return self._no_priors
        out, ids = np.zeros((len(part.priors), width), dtype), np.arange(len(part.priors))
        compiled.rotation().rotate(
            read_only(part.priors.astype(dtype, copy=False)), read_only(ids), self._tiles, out
        )
        return read_only(out)

    def _settings(self, largest: float, objective: Objective) -> tuple[Settings, Diagonal]:
        """How to solve rows with values up to this one, and the diagonal part of the equations."""
        given, latest = (objective, largest), self._latest
        if latest is None or latest[0] != given:
            settings = Settings(
                typed(objective, self._dtype), 1.0, half_epoch.most_steps(self._factors),
                largest_weight(objective, (0, largest), self._dtype),
                half_epoch.TOLERANCE[self._dtype.name],
            )  # fmt: skip
            diagonal = half_epoch.diagonal_of(
                self._spectrum, self._n_source, self._factors, settings
            )
            self._latest = latest = given, settings, diagonal
        return latest[1:]


class _Kept(NamedTuple):
    """All rows of a table.

    Attributes
    ----------
    raw : (N, K)
        The rows as they were.
    rotated : (N + 1, P)
        The same rows rotated, and a row of zeros.
    """

    raw: np.ndarray
    rotated: np.ndarray


class _RotatedRows:
    """Rows of a table (N, K) times a matrix (K, P).

    For a small table, all rotated rows are kept once as many rows were rotated as the table has.
    If someone writes into the table later, they are rotated again: results follow the table.

    Parameters
    ----------
    table : array (N, K)
        The rows.
    tiles : array
        The matrix, as `rotation.tiles_of` writes it.
    width : int
        P.
    """

    def __init__(self, table: np.ndarray, tiles: np.ndarray, width: int) -> None:
        self._table, self._tiles, self._width = read_only(table), tiles, width
        self._memory, self._all = Memory(), read_only(np.arange(len(table), dtype=np.uint32))
        self._kept: _Kept | None = None
        self._n_rotated = 0

    def of(self, rows: sparse.csr_matrix, n_threads: int) -> tuple[np.ndarray, np.ndarray]:
        """The rotated rows (n, P) that a matrix needs, and the position of each entry's row."""
        ids, n_source, kept = rows.indices, len(self._table), self._kept
        if kept is not None:
            positions = read_only(ids.astype(np.uint32))
            # Compare each row at most once: a batch may have more entries than the table has rows.
            used = positions if len(ids) < n_source else self._all
            if not compiled.rotation().differ(self._table, kept.raw, used):
                return kept.rotated, positions
            self._kept, self._n_rotated = None, 0  # someone wrote into the table
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
        self._n_rotated += len(needed)
        is_small = n_source * self._width * self._table.itemsize <= _KEPT_BYTES
        if is_small and self._n_rotated >= n_source:
            raw = read_only(self._table.copy())
            kept = _Kept(raw, self._rotated(raw, np.arange(n_source + 1), n_threads))
            self._kept = kept
            return kept.rotated, read_only(ids.astype(np.uint32))
        return self._rotated(self._table, needed.astype(np.int64), n_threads), positions

    def _rotated(self, table: np.ndarray, ids: np.ndarray, n_threads: int) -> np.ndarray:
        """The rotated rows (n, P) of a table."""
        shape, loops = (len(ids), self._width), compiled.rotation()
        size = len(ids) * self._width
        count = min(n_threads, 1 + size * table.shape[1] // _LEAST_ROTATION)
        if count == 1 and size <= _SMALL:
            out = np.empty(shape, table.dtype)
            loops.rotate(table, read_only(ids), self._tiles, out)
            return read_only(out)
        # Blocks of few sizes: the pool keeps one of each.
        room = 1 << (max(size, _LEAST_ROWS * self._width) - 1).bit_length()
        out, ids = self._memory.empty(shape, table.dtype, room), read_only(ids)

        def rotate(at: tuple[int, int]) -> None:
            loops.rotate(table, ids[slice(*at)], self._tiles, out[slice(*at)])

        bounds = np.linspace(0, len(ids), count + 1).astype(int)
        threads(rotate, list(itertools.pairwise(bounds)), count)
        return read_only(out)
