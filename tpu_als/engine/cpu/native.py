"""Half-epochs of "cg" on a CPU by compiled loops (`loops`), where the optional numba is installed.

XLA makes a pass over the gathered entries of a padded chunk for every product of a CG step. Here
each row is worked on by itself, without padding, and one pass does both products of a step; tables
are rotated by BLAS, part by part in the threads that solve them. docs/math.md has the algebra,
which is that of `solve`.

Axis letters: R rows of a part, M target rows, N source rows, K factors, P of them and what fills up
a cache line.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np

from tpu_als.engine.cpu import loops
from tpu_als.engine.xla import programs, solve
from tpu_als.engine.xla.mesh import Workplace
from tpu_als.engine.xla.solve import Objective
from tpu_als.host import LINE, Memory

log = logging.getLogger("tpu_als")
_PARTS = 16  # for each thread; many, so that threads end together and scratch is small
_LEAST_PART = 1 << 19  # least entries times factors of a part, a fifth of a millisecond of work
_LEAST_PRODUCT = 1 << 22  # least multiplications for which a thread pays
_GRAMIAN_ROWS = 1 << 13  # rows of a table that one product of BLAS sums over
_ROW_ENTRIES = 4  # cost of a row in addition to its entries, in entries; that of its rotations
_LARGE = 1 << 23  # bytes of a source table that does not fit into a core's cache
_AHEAD = 1 << 13  # bytes of such a table to prefetch
basis = jax.jit(solve.basis)
_loading = threading.Lock()


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
    """

    cells: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    values: np.ndarray | None

    def part(self, at: slice, dtype: Any) -> Rows:
        """Some rows, with values of this dtype; an empty array of values if all are 1."""
        cells, lengths, ids, values = self.cells[at], self.lengths[at], self.ids, self.values
        if values is None:
            values = np.empty(0, dtype)
        elif values.dtype != dtype:
            low, high = int(cells[0]), int(cells[-1] + lengths[-1])
            cells, ids, values = cells - low, ids[low:high], values[low:high].astype(dtype)
        return Rows(*map(_read_only, (cells, lengths, ids, values)))

    def parts(self, n_threads: int, factors: int) -> list[slice]:
        """Split the rows into parts of about equal cost, if there is enough work."""
        ends = np.cumsum(self.lengths + _ROW_ENTRIES, dtype=np.int64)
        if not len(ends):
            return []
        count = min(_PARTS * n_threads, 1 + int(ends[-1]) * factors // _LEAST_PART)
        bounds = np.searchsorted(ends, np.linspace(0, ends[-1], count + 1)[1:-1]) + 1
        bounds = np.unique([0, *bounds[bounds < len(ends)], len(ends)])
        return [slice(low, high) for low, high in itertools.pairwise(bounds)]


def serves(place: Workplace, dtype: str, linear_solver: str) -> bool:
    """Whether half-epochs can run here: on a CPU, by one process, with numba installed.

    Several CPU devices are used as threads of one, unless `table_layout` is set.
    """
    is_cpu = place.platform == "cpu" and len(place.processes) == 1
    is_cpu = is_cpu and (place.mesh is None or place.table_layout == "auto")
    is_ours = linear_solver == "cg" and dtype in ("float32", "float64")
    return is_cpu and is_ours and _numba() is not None


@functools.cache
def _numba() -> Any:
    """numba; None if it is not installed, cannot be loaded, or is configured not to compile."""
    try:
        import numba
    except ModuleNotFoundError:
        log.info('numba makes fits on a CPU faster: pip install "tpu-als[native]"')
    except (ImportError, OSError) as error:
        log.warning("numba, with which fits would be faster, does not load: %s", error)
    else:
        config: Any = numba.config
        return None if config.DISABLE_JIT else numba
    return None


def begin_loading(dtype: str) -> None:
    """Compile the loops in the background, which takes seconds."""
    threading.Thread(target=_ready, args=(dtype,)).start()


@functools.cache
def _loaded() -> tuple[Any, Any]:
    """The loops, which numba compiles when they are called."""
    numba = _numba()
    if programs.compilation_cache is None:
        return loops.compiled(numba.njit, cached=False)
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, programs.compilation_cache
    try:
        return loops.compiled(numba.njit, cached=True)
    except RuntimeError as error:  # numba finds no directory that it can write to
        log.warning("what numba compiles is not kept: %s", error)
        return loops.compiled(numba.njit, cached=False)
    finally:
        numba.config.CACHE_DIR = before


def _ready(dtype: str) -> tuple[Any, Any]:
    """The loops, with the one that solves rows compiled for a dtype."""
    with _loading:
        return _compiled(dtype)


@functools.cache
def _compiled(dtype: str) -> tuple[Any, Any]:
    loops, number = _loaded(), np.zeros(1, np.int64)
    rows = Rows(number, number, number.astype(np.uint32), None)
    table, one = np.zeros((1, 1), dtype), np.dtype(dtype).type(1)
    system = _System(_read_only(table), _read_only(table[0]), *(one,) * 11)
    _solve(loops[0], rows.part(slice(0, 1), dtype), table, system, 1, np.zeros((7, 1), dtype))
    return loops


class _System(NamedTuple):
    """Inputs shared by all rows of a half-epoch: (N, P), (P,) and numbers of equations (1)-(3)."""

    source: np.ndarray
    spectrum: np.ndarray
    alpha: Any
    offset: Any
    regularization: Any
    unobserved: Any
    exponent: Any
    tiny: Any
    top: Any
    weight: Any
    reach: Any
    most: Any
    relaxation: Any


def _solve(
    solve_rows: Any, part: Rows, rows: np.ndarray, system: _System, steps: int, vectors: np.ndarray
) -> None:
    """Solve a part in place, starting from its rows (R, P), with scratch (7, P)."""
    source, spectrum, alpha, offset, *diagonal, relaxation = system
    solve_rows(
        rows, part.cells, part.lengths,
        (source, part.ids, part.values, alpha, offset, _ahead(source)),
        (spectrum, *diagonal), relaxation, steps, vectors, np.empty(vectors.shape[1]),
    )  # fmt: skip


def _ahead(source: np.ndarray) -> int:
    """How many entries ahead rows are prefetched; 0 for a table that may fit into a cache."""
    return max(_AHEAD // source[0].nbytes, 4) if source.nbytes >= _LARGE else 0


def solve_side(
    target: Any, source: Any, n_source: int, rows: Rows, place: Workplace, memory: Memory,
    objective: Objective, relaxation: Any, steps: int, weight: float,
) -> jax.Array:  # fmt: skip
    """Solve all rows of a side.

    Parameters
    ----------
    target : array (S, K)
        The side's table, of M rows and unused ones; stays valid.
    source : array
        The other one.
    n_source : int
        Its rows N, which come before unused ones.
    rows : Rows
        The rows and their entries.
    place : Workplace
        A single CPU device, and a number of threads.
    memory : Memory
        Memory for tables; that of unused tables is reused.
    objective : Objective
        Equations (1)-(2), in the dtype of the tables.
    relaxation : float
        As in `solve.relax`, likewise.
    steps : int
        Steps of CG; 0 where every weight w is 0.
    weight : float
        Bound on the weights w.
    """
    n_slots, source, target = len(source), np.asarray(source)[:n_source], np.asarray(target)
    dtype = source.dtype
    rotation, spectrum = _eigenbasis(source, place)
    width = len(spectrum)
    turned_source = memory.empty((n_source, width), dtype, n_slots * width)
    rotated(source, rotation, place, turned_source)
    system = _system(turned_source, spectrum, target.shape[1], objective, weight, relaxation)
    solve_rows, n_threads = _ready(dtype.name)[0], place.n_threads
    parts = rows.parts(n_threads, target.shape[1])
    out = memory.empty(target.shape, dtype, len(target) * width)
    out[len(rows.lengths) :] = 0
    most = max((at.stop - at.start for at in parts), default=0)
    blocks = range(min(n_threads, len(parts)))
    scratch = deque(memory.empty((most + 7, width), dtype) for _ in blocks)

    def work(at: slice) -> None:
        own = scratch.pop()
        turned, vectors = own[7 : 7 + at.stop - at.start], own[:7]
        np.matmul(target[at], rotation, out=turned)
        _solve(solve_rows, rows.part(at, dtype), turned, system, steps, vectors)
        np.matmul(turned, rotation.T, out=out[at])
        scratch.append(own)

    place.threads(work, parts, n_threads)
    return jax.device_put(out, place.devices[0])


def _system(
    source: np.ndarray, spectrum: np.ndarray, factors: int, objective: Objective, weight: float,
    relaxation: Any,
) -> _System:  # fmt: skip
    """Shared inputs, from the rotated table (N, P), its spectrum (P,) and the largest weight.

    All are in the dtype of the table, and so small that a sum of two does not overflow.
    """
    kind = source.dtype.type
    most = np.finfo(source.dtype).max / 4

    def bounded(number: Any) -> Any:
        return np.minimum(number, most).astype(source.dtype)

    wide, unobserved = spectrum.astype(np.float64), np.float64(objective.unobserved_weight)
    diagonal = _read_only(bounded(unobserved * wide))
    return _System(
        _read_only(source), diagonal, objective.alpha, objective.offset, objective.regularization,
        bounded(unobserved * len(source)), objective.exponent, np.finfo(source.dtype).tiny,
        diagonal[factors - 1], bounded(np.float64(weight)),
        bounded(np.float64(solve.DOMINANT * weight) * wide[factors - 1]), kind(most), relaxation,
    )  # fmt: skip


def measure_side(
    target: Any, source: Any, rows: Rows, place: Workplace, objective: Objective
) -> np.ndarray:
    """Contribution of each row's entries to the loss (M,), as `solve.cells_loss`, in float64."""
    source, target = _read_only(np.asarray(source)), _read_only(np.asarray(target))
    dtype, out = source.dtype, np.empty(len(rows.lengths))
    measure_rows = _ready(dtype.name)[1]

    def work(at: slice) -> None:
        part = rows.part(at, dtype)
        entries = source, part.ids, part.values, objective.alpha, objective.offset, _ahead(source)
        measure_rows(target[at], part.cells, part.lengths, entries, out[at])

    place.threads(work, rows.parts(place.n_threads, target.shape[1]), place.n_threads)
    return out


def _eigenbasis(table: np.ndarray, place: Workplace) -> tuple[np.ndarray, np.ndarray]:
    """Rotation (K, P) into the eigenbasis of a table's gramian, and its spectrum (P,).

    Columns beyond K, which pad a row to whole cache lines, are zero; their spectrum is one.
    """
    given = gramian(table, place), table.dtype.type(len(table))
    turn = basis(*jax.device_put(given, place.devices[0]))
    pads = 0, -table.shape[1] % (LINE // table.itemsize)
    return np.pad(turn.rotation, ((0, 0), pads)), np.pad(turn.spectrum, pads, constant_values=1)


def gramian(table: np.ndarray, place: Workplace) -> np.ndarray:
    """Y^T Y of a table (N, K): products of blocks of rows, summed in float64."""

    def work(at: slice) -> np.ndarray:
        total = np.zeros((table.shape[1],) * 2)
        for low in range(at.start, at.stop, _GRAMIAN_ROWS):
            rows = table[low : min(low + _GRAMIAN_ROWS, at.stop)]
            total += rows.T @ rows
        return total

    parts = place.threads(work, _even(table, place), place.n_threads)
    return sum(parts[1:], parts[0]).astype(table.dtype)


def rotated(table: np.ndarray, rotation: np.ndarray, place: Workplace, out: np.ndarray) -> None:
    """Write the product of a table (N, K) and a rotation, which may have pads, to `out`."""

    def work(at: slice) -> None:
        np.matmul(table[at], rotation, out=out[at])

    place.threads(work, _even(table, place), place.n_threads)


def _even(table: np.ndarray, place: Workplace) -> list[slice]:
    """Consecutive rows for each thread, if their product with a (K, K) matrix is large enough."""
    count = min(place.n_threads, 1 + table.size * table.shape[1] // _LEAST_PRODUCT)
    bounds = np.linspace(0, len(table), count + 1).astype(int)
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]


def _read_only(array: np.ndarray) -> np.ndarray:
    """A read-only view, like those of JAX's arrays, so that numba compiles for one type only."""
    view = array.view()
    view.flags.writeable = False
    return view
