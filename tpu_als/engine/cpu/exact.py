"""Solutions of equation (1) against a fixed table on a CPU: fold-in, and the callable `solver`.

Compiled loops solve the rows by conjugate gradients, to convergence. A row that does not converge
is solved in float64 by BLAS and LAPACK. So are all rows if a gramian was assigned that is not the
table's, or if numba does not load. The bits of a row's result do not depend on the other rows. With
the solver "cg" the number of steps is fixed, as in `fit`.

Axis letters: M rows to solve, N source rows, K factors.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
from scipy import sparse

from tpu_als.engine.cpu import compiled
from tpu_als.engine.cpu.eigenbasis import Eigenbasis
from tpu_als.engine.cpu.half_epoch import Rows, Settings, gramian, solve_side
from tpu_als.engine.cpu.memory import Memory
from tpu_als.engine.cpu.systems import solved_row
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective, largest_weight, ridge, typed
from tpu_als.host import single_blas_thread, threads
from tpu_als.validation import structure
from tpu_als.validation.refusals import all_finite

_Kept = TypeVar("_Kept")
_PARTS = 8  # for each thread, so that threads end together
_LEAST = 1 << 22  # least multiplications of a part for which a thread pays


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
                    drawn_to = None if prior is None else prior[row]
                    entries = ids, values
                    out[row] = solved_row(self.table, entries, wide, objective, lam, drawn_to)

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
