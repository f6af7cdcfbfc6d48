"""Half-epochs of "cg" and losses on a CPU, by the compiled `loops`.

The source table is rotated into the eigenbasis of its gramian; parts of the target table are
rotated, solved and rotated back by the threads that solve them.

Axis letters: R rows of a part, M target rows, N source rows, K factors, P of them and what fills up
a cache line.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from scipy import linalg, sparse

from tpu_als.engine.cpu import compiled
from tpu_als.engine.cpu.compiled import numbers_of, read_only
from tpu_als.engine.cpu.memory import LINE, Memory
from tpu_als.engine.data import BFLOAT16
from tpu_als.engine.objective import DOMINANT, Objective, without_offset
from tpu_als.host import threads

if TYPE_CHECKING:
    from tpu_als.engine.cpu.loops import Diagonal

# Bounds on the error's energy as a multiple of the solution's, for which errors stay below 1e-5
# and 1e-10 of the solution's length.
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
_PARTS = 16  # for each thread; many, so that threads end together and scratch is small
_LEAST_PART = 1 << 19  # least entries times factors of a part, a fifth of a millisecond of work
_LEAST_PRODUCT = 1 << 22  # least multiplications for which a thread pays
_GRAMIAN_PARTS = 8
_GRAMIAN_ROWS = 1 << 13  # rows of a table that one product of BLAS sums over
_ROW_ENTRIES = 4  # cost of a row in addition to its entries, in entries; that of its rotations
_LARGE = 1 << 23  # bytes of a source table that does not fit into a core's cache
_AHEAD = 1 << 13  # bytes of such a table to prefetch


def most_steps(factors: int) -> int:
    """Steps of CG after which a direct solve is expected to be cheaper."""
    return max(factors, 32)


class Rows(NamedTuple):
    """The rows of a side, with the entries of consecutive rows stored one after the other.

    Attributes
    ----------
    cells, lengths : int array (M,)
        First entry and number of entries of each row.
    ids : uint32 array
        Source row of each entry; unsigned, since numba asks whether others count from the end.
    values : array or None
        Value of each, of any dtype; None where all are 1.
    priors : array (M, K) or None
        What each row is drawn to; None for zero.
    """

    cells: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    values: np.ndarray | None
    priors: np.ndarray | None = None

    def part(self, at: slice, dtype: DTypeLike) -> Rows:
        """Some rows, with values of this dtype; an empty array of values if all are 1."""
        cells, lengths, ids, values = self.cells[at], self.lengths[at], self.ids, self.values
        if values is None:
            values = np.empty(0, dtype)
        elif values.dtype != dtype:
            low, high = int(cells[0]), int(cells[-1] + lengths[-1])
            cells, ids, values = cells - low, ids[low:high], values[low:high].astype(dtype)
        priors = None if self.priors is None else self.priors[at]
        cells, lengths, ids, values = map(read_only, (cells, lengths, ids, values))
        return Rows(cells, lengths, ids, values, priors)

    def some(self, at: np.ndarray, n_source: int) -> sparse.csr_matrix:
        """Some rows, as a matrix over `n_source` columns."""
        lengths = self.lengths[at]
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.repeat(self.cells[at] - indptr[:-1], lengths) + np.arange(indptr[-1])
        values = np.ones(len(entries), np.float32) if self.values is None else self.values[entries]
        shape = len(at), n_source
        return sparse.csr_matrix((values.astype(np.float64), self.ids[entries], indptr), shape)

    def parts(self, n_threads: int, factors: int) -> list[slice]:
        """Split the rows into parts of about equal cost, if there is enough work."""
        n_rows = len(self.lengths)
        if n_rows * _ROW_ENTRIES + len(self.ids) < _LEAST_PART // factors:
            return [slice(0, n_rows)] if n_rows else []
        ends = np.cumsum(self.lengths + _ROW_ENTRIES, dtype=np.int64)
        count = min(_PARTS * n_threads, 1 + int(ends[-1]) * factors // _LEAST_PART)
        bounds = np.searchsorted(ends, np.linspace(0, ends[-1], count + 1)[1:-1]) + 1
        bounds = np.unique([0, *bounds[bounds < len(ends)], len(ends)])
        return [slice(low, high) for low, high in itertools.pairwise(bounds)]


def prefetched(source: np.ndarray) -> int:
    """How many entries ahead rows are prefetched; 0 for a table that may fit into a cache."""
    return max(_AHEAD // source[0].nbytes, 4) if source.nbytes >= _LARGE else 0


class Settings(NamedTuple):
    """What a half-epoch needs besides the tables and the rows.

    Attributes
    ----------
    objective : Objective
        Equations (1)-(2), in the dtype of sums.
    relaxation : float
        As in `xla.solve.relax`.
    steps : int
        Steps of CG; 0 where every weight w is 0.
    weight : float
        Bound on the weights w.
    tolerance : float, default=0
        0 for exactly so many steps. Otherwise rows are solved to convergence, as in
        `converging.Limits`; rows that did not converge are NaN.
    is_direct : bool, default=False
        Whether rows are solved by a factorisation, and not by CG.
    """

    objective: Objective
    relaxation: float
    steps: int
    weight: float
    tolerance: float = 0.0
    is_direct: bool = False


def solve_side(
    target: np.ndarray,
    source: np.ndarray,
    rows: Rows,
    settings: Settings,
    memory: Memory,
    n_threads: int,
) -> np.ndarray:
    """Solve all rows of a side.

    Parameters
    ----------
    target : array (M, K)
        The side's table, float32, float64 or bfloat16; stays valid.
    source : array (N, K)
        The other one, of the same dtype.
    rows : Rows
        The rows and their entries.
    settings : Settings
        The equations, and how to solve them.
    memory : Memory
        Memory for tables; that of unused tables is reused.
    n_threads : int
        Number of threads.

    Returns
    -------
    array (M, K)
        The new table.
    """
    dtype, factors = compute_dtype(source), target.shape[1]
    is_exact = settings.is_direct or settings.tolerance > 0
    # Exact solutions need more digits than bfloat16 has.
    stored = dtype if is_exact else source.dtype
    gram = gramian(source, n_threads, np.float64 if is_exact else dtype)
    rotation, spectrum = eigenbasis_of(gram, dtype, stored.itemsize)
    width, largest = len(spectrum), max(len(source), len(target))
    rotated_source = memory.empty((len(source), width), stored, largest * width)
    rotate(source, rotation, n_threads, rotated_source)
    rotation = np.asarray(rotation, dtype)
    loops = compiled.ready(stored.name)
    no_priors = np.empty((0, width), dtype)
    diagonal = diagonal_of(spectrum, len(source), factors, settings)
    solve_rows, how = _solver(settings, dtype, factors)
    fixed, ahead = numbers_of(rotated_source), prefetched(rotated_source)
    parts = rows.parts(n_threads, factors)
    out = memory.empty(target.shape, target.dtype, largest * width)
    most = max((at.stop - at.start for at in parts), default=0)
    scratch = deque(memory.empty((most, width), dtype) for _ in range(min(n_threads, len(parts))))

    def work(at: slice) -> None:
        own = scratch.pop()
        part, rotated = rows.part(at, dtype), own[: at.stop - at.start]
        np.matmul(target[at].astype(dtype, copy=False), rotation, out=rotated)
        priors = no_priors if part.priors is None else part.priors @ rotation
        solve_rows(
            rotated, loops.Starts(part.cells, part.lengths, read_only(priors)),
            loops.Entries(fixed, part.ids, part.values, ahead),
            settings.objective, diagonal, how,
        )  # fmt: skip
        if out.dtype == dtype:
            np.matmul(rotated, rotation.T, out=out[at])
        else:
            out[at] = rotated @ rotation.T
        scratch.append(own)

    threads(work, parts, n_threads)
    return out


def _solver(settings: Settings, dtype: np.dtype, factors: int) -> tuple[Callable[..., None], Any]:
    """The loop that solves rows, and its last argument."""
    relaxation, steps, kind = settings.relaxation, settings.steps, dtype.type
    if settings.is_direct:
        direct = compiled.direct()
        return direct.solve_rows, direct.How(kind(relaxation), factors)
    if settings.tolerance > 0:
        converging = compiled.converging()
        limits = converging.Limits(settings.tolerance, steps, float(relaxation))
        return converging.solve_rows, limits
    loops = compiled.loops()
    return loops.solve_rows, loops.Solver(kind(relaxation), steps)


def diagonal_of(spectrum: np.ndarray, n_source: int, factors: int, settings: Settings) -> Diagonal:
    """`loops.Diagonal` for a spectrum (P,), in its dtype; no sum of two numbers overflows."""
    loops, kind, limits = compiled.loops(), spectrum.dtype.type, np.finfo(spectrum.dtype)
    most, wide = limits.max / 4, spectrum.astype(np.float64)

    def bounded(number: np.ndarray | np.floating) -> np.ndarray:
        return np.minimum(number, most).astype(spectrum.dtype)

    scaled = bounded(np.float64(settings.objective.unobserved_weight) * wide)
    reach = bounded(np.float64(DOMINANT * settings.weight) * wide[factors - 1])
    return loops.Diagonal(
        read_only(scaled), scaled[factors - 1], kind(n_source),
        bounded(np.float64(settings.weight)), reach, kind(limits.tiny), kind(most),
    )  # fmt: skip


def measure_side(
    target: np.ndarray, source: np.ndarray, rows: Rows, objective: Objective, n_threads: int
) -> float:
    """Contribution of the rows' entries to the loss, as `xla.solve.cells_loss`, in float64."""
    dtype, out = compute_dtype(source), np.empty(len(rows.lengths))
    loops, fixed = compiled.ready(source.dtype.name), numbers_of(source)
    offset, by_size = objective.offset, without_offset(objective)
    ahead, measure_rows = prefetched(source) if len(source) else 0, compiled.loss().measure_rows

    def work(at: slice) -> None:
        part = rows.part(at, dtype)
        entries = loops.Entries(fixed, part.ids, part.values, ahead)
        starts = part.cells, part.lengths
        measured = read_only(target[at].astype(dtype, copy=False))
        measure_rows(measured, starts, entries, by_size, offset, out[at])

    threads(work, rows.parts(n_threads, target.shape[1]), n_threads)
    return float(out.sum())


def compute_dtype(table: np.ndarray) -> np.dtype:
    """Dtype of sums and solves for a table: its own, or float32 for bfloat16."""
    return np.dtype(np.float32) if table.dtype.name == BFLOAT16 else table.dtype


def eigenbasis_of(
    gram: np.ndarray, dtype: np.dtype, itemsize: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Rotation (K, P) into the eigenbasis of a gramian (K, K), and its spectrum (P,) in a dtype.

    Columns beyond K are zero; their spectrum is one. They pad rows of numbers of `itemsize` bytes
    (by default the dtype's) to whole cache lines. If the gramian is not finite, the result is not.
    The rotation has the dtype of the gramian.
    """
    limits = np.finfo(gram.dtype)
    try:
        spectrum, rotation = linalg.eigh(gram, driver="evd")
    except (linalg.LinAlgError, ValueError):  # not finite
        spectrum, rotation = gram[0] * np.nan, gram * np.nan
    # Rounding may make eigenvalues zero or negative, which would make the systems singular.
    spectrum = np.maximum(spectrum, limits.eps * spectrum[-1] + limits.tiny)
    pads = 0, -len(gram) % (LINE // (itemsize or dtype.itemsize))
    spectrum = spectrum.astype(dtype)
    return np.pad(rotation, ((0, 0), pads)), np.pad(spectrum, pads, constant_values=1)


def gramian(table: np.ndarray, n_threads: int, dtype: DTypeLike) -> np.ndarray:
    """Y^T Y of a table (N, K): products of blocks of rows in a dtype, summed in float64.

    The number of threads does not change a bit of it.
    """

    def work(at: slice) -> np.ndarray:
        total = np.zeros((table.shape[1],) * 2)
        for low in range(at.start, at.stop, _GRAMIAN_ROWS):
            # In one order, since BLAS's sums depend on that of the memory.
            rows = np.ascontiguousarray(table[low : min(low + _GRAMIAN_ROWS, at.stop)], dtype)
            total += rows.T @ rows
        return total

    parts = threads(work, _even(table, _GRAMIAN_PARTS), n_threads)
    return np.asarray(sum(parts[1:], parts[0]).astype(dtype))


def rotate(table: np.ndarray, rotation: np.ndarray, n_threads: int, out: np.ndarray) -> None:
    """Write the product of a table (N, K) and a rotation, which may have pads, to `out`."""

    def work(at: slice) -> None:
        for low in range(at.start, at.stop, _GRAMIAN_ROWS):
            rows = slice(low, min(low + _GRAMIAN_ROWS, at.stop))
            wide = table[rows].astype(rotation.dtype, copy=False)
            if out.dtype.name == BFLOAT16:
                out[rows] = wide @ rotation
            else:
                np.matmul(wide, rotation, out=out[rows], casting="same_kind")

    threads(work, _even(table, n_threads), n_threads)


def _even(table: np.ndarray, most: int) -> list[slice]:
    """At most so many parts of consecutive rows, each a product large enough for a thread."""
    count = min(most, 1 + table.size * table.shape[1] // _LEAST_PRODUCT)
    bounds = np.linspace(0, len(table), count + 1).astype(int)
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]
