"""Solutions of equation (1) against a fixed table on a CPU: fold-in, and the callable `solver`.

Compiled loops solve the rows by conjugate gradients, to convergence. A row that does not converge
is solved in float64 by BLAS and LAPACK. So are all rows if a gramian was assigned that is not the
table's, or if numba does not load. The bits of a row's result do not depend on the other rows. With
the solver "cg" the number of steps is fixed, as in `fit`.

Axis letters: M rows to solve, N source rows, K factors, P of them and pads to whole cache lines.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from scipy import sparse

from tpu_als.engine.cpu import compiled, half_epoch
from tpu_als.engine.cpu.compiled import read_only
from tpu_als.engine.cpu.half_epoch import Rows, Settings, gramian, solve_side
from tpu_als.engine.cpu.memory import LINE, Memory
from tpu_als.engine.cpu.systems import solution, system
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective, largest_weight, ridge, typed
from tpu_als.host import single_blas_thread, threads
from tpu_als.validation import structure
from tpu_als.validation.refusals import all_finite

if TYPE_CHECKING:
    from tpu_als.engine.cpu.loops import Diagonal

_Kept = TypeVar("_Kept")
_PARTS = 8  # for each thread, so that threads end together
_LEAST = 1 << 22  # least multiplications of a part for which a thread pays
_LEAST_ROWS = 4  # rows for which there is memory
_MANY = 4  # entries for each source row from which all source rows are rotated
_SMALL = 1 << 15  # numbers of rotated rows that take no memory of the pool
_LEAST_ROTATION = 1 << 21  # multiplications for which a thread pays


@dataclass(frozen=True)
class Source:
    """A table (N, K) to solve rows against.

    Attributes
    ----------
    table : array (N, K)
        float32 or float64; read when rows are solved.
    params : AlsParams
        The solver: "cholesky", or "cg", which starts from given rows.
    n_threads : int
        Number of threads.
    n_source : int, optional
        N of equation (2), if the table has only those of N rows that are needed. Its gramian must
        then be set by `knowing`.
    """

    table: np.ndarray
    params: AlsParams
    n_threads: int
    n_source: int | None = None
    wants_gramian: ClassVar[bool] = False
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def solve(
        self,
        rows: sparse.csr_matrix,
        objective: Objective,
        *,
        start: np.ndarray | None = None,
        gram: np.ndarray | None = None,
        prior: np.ndarray | None = None,
    ) -> np.ndarray:
        """Solve equation (1) for the rows of a matrix.

        Parameters
        ----------
        rows : CSR matrix (M, N) or, for "cholesky" only, (M, N + 1)
            Stored entries of each row. Column N stands for a source row of zeros: its entries are
            counted in n_u of (2) and change nothing else.
        objective : Objective
            Equations (1)-(2).
        start : array (M, K), optional
            Start of "cg"; zero by default.
        gram : array (K, K), optional
            Used in place of the table's own gramian.
        prior : array (M, K), optional
            What each row is drawn to; zero by default. Rows without entries are zero all the same.

        Returns
        -------
        array (M, K)
            In the table's dtype. A row that could not be solved is not finite.
        """
        structure.check_compressed(rows, "rows")
        n_source, by_cg = len(self.table), self.params.linear_solver == "cg"
        if rows.shape[1] > n_source + (not by_cg):
            raise ValueError(f"rows have {rows.shape[1]} columns for a table of {n_source} rows")
        if by_cg:
            if gram is not None:
                raise ValueError('"cg" uses the gramian of the table, and takes no other one')
            return self._by_cg(rows, objective, start, prior)
        if gram is not None or not compiled.is_available():
            return self.directly(rows, objective, gram, prior)
        out = self._eigenbasis().solve(rows, objective, self.n_threads, prior)
        if not all_finite(out):
            failed = np.flatnonzero(~np.isfinite(out).all(axis=1))
            of_failed = None if prior is None else prior[failed]
            out[failed] = self.directly(rows[failed], objective, prior=of_failed)
        return out

    def on(self, n_threads: int) -> Source:
        """The same source for another number of threads."""
        return self if n_threads == self.n_threads else replace(self, n_threads=n_threads)

    @property
    def known_gramian(self) -> np.ndarray | None:
        """The table's gramian in float64 if a call has computed it."""
        return self._kept.get("gramian")

    def knowing(self, gram: np.ndarray) -> Source:
        """The same source with a known gramian (K, K), float64, so that none is computed."""
        self._kept["gramian"] = gram
        return self

    def _eigenbasis(self) -> Eigenbasis:
        gram = self._gramian()

        def compute() -> Eigenbasis:
            with single_blas_thread():
                return Eigenbasis(self.table, gram, self.n_source)

        return self._once("eigenbasis", compute)

    def _gramian(self) -> np.ndarray:
        """The table's gramian in float64."""

        def compute() -> np.ndarray:
            with single_blas_thread():
                return gramian(self.table, self.n_threads, np.float64)

        return self._once("gramian", compute)

    def _once(self, name: str, compute: Callable[[], _Kept]) -> _Kept:
        """A value that is computed in the first call."""
        if name not in self._kept:
            with self._lock:
                if name not in self._kept:
                    self._kept[name] = compute()
        return self._kept[name]

    def _by_cg(
        self,
        rows: sparse.csr_matrix,
        objective: Objective,
        start: np.ndarray | None,
        prior: np.ndarray | None,
    ) -> np.ndarray:
        dtype, lengths = self.table.dtype, np.diff(rows.indptr).astype(np.int64)
        shape = rows.shape[0], self.table.shape[1]
        begin = np.zeros(shape, dtype) if start is None else np.asarray(start, dtype)
        sizes = np.abs(rows.data)
        magnitudes = sizes.min(initial=np.inf), sizes.max(initial=0)
        settings = Settings(
            typed(objective, dtype),
            1.0,
            self.params.cg_steps,
            largest_weight(objective, magnitudes, dtype),
        )
        given = Rows(
            rows.indptr[:-1].astype(np.int64),
            lengths,
            rows.indices.astype(np.uint32),
            rows.data.astype(dtype),
            None if prior is None else prior.astype(dtype, copy=False),
        )
        with single_blas_thread():
            return solve_side(begin, self.table, given, settings, Memory(), self.n_threads)

    def directly(
        self,
        rows: sparse.csr_matrix,
        objective: Objective,
        gram: np.ndarray | None = None,
        prior: np.ndarray | None = None,
    ) -> np.ndarray:
        """`solve` by LAPACK, in float64, without `start`."""
        n_source, factors = self.table.shape
        wide = self._gramian() if gram is None else gram.astype(np.float64)
        out = np.zeros((rows.shape[0], factors), self.table.dtype)

        def work(at: tuple[int, int]) -> None:
            with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for non-finite
                for row in range(*at):
                    own = slice(rows.indptr[row], rows.indptr[row + 1])
                    ids, values = rows.indices[own], rows.data[own]
                    if not len(ids):
                        continue
                    lam = ridge(objective, float(len(ids)), float(self.n_source or n_source))
                    if ids[-1] == n_source:  # ids ascend
                        known = ids < n_source
                        ids, values = ids[known], values[known]
                    matrix, rhs = system(self.table, ids, values, wide, objective, lam)
                    if prior is not None:
                        rhs += lam * prior[row]
                    out[row] = solution(matrix, rhs)

        ends = np.cumsum((np.diff(rows.indptr) + factors / 3) * factors**2)
        total = float(ends[-1]) if len(ends) else 0.0
        count = min(self.n_threads * _PARTS, 1 + int(total / _LEAST))
        bounds = np.searchsorted(ends, np.linspace(0, total, count + 1)[1:-1]) + 1
        bounds = np.unique([0, *bounds[bounds < len(ends)], len(ends)])
        with single_blas_thread():
            threads(work, list(itertools.pairwise(bounds.tolist())), self.n_threads)
        return out


def solve_failed(
    solved: np.ndarray, before: np.ndarray, source: Source, rows: Rows, settings: Settings
) -> None:
    """Solve the rows of a half-epoch that are not finite by LAPACK, in place.

    Parameters
    ----------
    solved, before : array (M, K)
        The side's table after and before the half-epoch.
    source : Source
        The other table.
    rows : Rows
        The rows and their entries.
    settings : Settings
        The equations and the relaxation.
    """
    failed = np.flatnonzero(~np.isfinite(solved).all(axis=1))
    if len(failed):
        priors = None if rows.priors is None else rows.priors[failed]
        matrix = rows.some(failed, len(source.table))
        found = source.directly(matrix, settings.objective, prior=priors)
        solved[failed] = before[failed] + settings.relaxation * (found - before[failed])


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
