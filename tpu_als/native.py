"""Half-epochs of "cg" on a CPU by compiled loops (`_loops`), where the optional numba is installed.

XLA makes a pass over the gathered entries of a chunk for every product of a CG step. Here each row
is worked on by itself: its entries are gathered once, without padding, into a core's own cache,
where one pass does both products of a step. docs/math.md has the algebra, which is that of `solve`.

Axis letters: S slots of a shard, P rows of a piece, N source rows, K factors.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from tpu_als import _loops, mesh
from tpu_als.cells import LONG_ROWS, Long
from tpu_als.layout import RowMap
from tpu_als.mesh import Shards, Workplace, precision
from tpu_als.solve import Basis, Objective

log = logging.getLogger("tpu_als")
_PIECES, _LEAST_PIECE = 64, 64  # of a shard, and rows of one; many, so that threads end together
_BLOCK_BYTES = 1 << 22  # of a row's gathered entries; a longer row gathers them in every pass
_ALIGNMENT = 64  # bytes; vectors that straddle cache lines take twice as long to read
_loading = threading.Lock()


class Piece(NamedTuple):
    """Some rows of a shard, and where their entries are.

    Attributes
    ----------
    slots : slice or int array (P,)
        The rows' slots.
    cells, lengths : int array (P,)
        First cell and number of entries of each.
    ids : int32 array
        Source row of each cell of the shard.
    values : array or None
        Value of each, of any dtype; None where all are 1.
    """

    slots: Any
    cells: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    values: np.ndarray | None

    def loaded(self, dtype: Any) -> Piece:
        """The same with values of this dtype, an empty array where all are 1."""
        if self.values is None:
            return self._replace(values=np.empty(0, dtype))
        if self.values.dtype == dtype:
            return self
        low, high = int(self.cells.min()), int((self.cells + self.lengths).max())
        ids, values = self.ids[low:high], self.values[low:high].astype(dtype)
        return self._replace(cells=self.cells - low, ids=ids, values=values)


def serves(place: Workplace, dtype: str, linear_solver: str) -> bool:
    """Whether half-epochs can run here: on a single CPU device, with numba installed."""
    is_cpu = place.platform == "cpu" and place.mesh is None
    is_ours = linear_solver == "cg" and dtype in ("float32", "float64")
    return is_cpu and is_ours and _is_installed()


@functools.cache
def _is_installed() -> bool:
    found = importlib.util.find_spec("numba") is not None
    if not found:
        log.info('numba makes fits on a CPU several times faster: pip install "tpu-als[native]"')
    return found


def begin_loading(dtype: str) -> None:
    """Compile the loops in the background, which takes seconds."""
    threading.Thread(target=_ready, args=(dtype,), daemon=True).start()


def _ready(dtype: str) -> Any:
    """The loop over rows, compiled for a dtype."""
    with _loading:
        return _compiled(dtype)


@functools.cache
def _solver() -> Any:
    """`_loops.solve_rows`, which numba compiles when it is called."""
    import numba

    # Sums may be reordered, so that they are vectorised; infinity and NaN stay what they are.
    math = {"reassoc", "contract", "arcp", "nsz"}
    solver = _loops.compiled(numba.njit(nogil=True, error_model="numpy", fastmath=math))
    if mesh.compilation_cache is not None:
        config: Any = numba.config
        before, config.CACHE_DIR = config.CACHE_DIR, mesh.compilation_cache
        solver.enable_caching()
        config.CACHE_DIR = before
    return solver


@functools.cache
def _compiled(dtype: str) -> Any:
    solver, kind = _solver(), np.dtype(dtype).type
    table, number = _aligned((8, 8), dtype), np.zeros(1, np.int64)
    counts = number.astype(np.int32)
    piece = Piece(slice(0, 1), number, counts, counts, None)
    system = _System(table, table[0], *(kind(1),) * 7)
    _solve(solver, piece, table[:1], table[:1].copy(), system, 1, _Scratch(8, dtype, 1))
    return solver


class _System(NamedTuple):
    """What all rows of a half-epoch share: (N, K), (K,) and numbers of equations (1)-(3)."""

    source: np.ndarray
    spectrum: np.ndarray
    alpha: Any
    offset: Any
    regularization: Any
    unobserved: Any
    exponent: Any
    tiny: Any
    relaxation: Any


class _Scratch:
    """What a thread needs for itself."""

    def __init__(self, factors: int, dtype: str, longest: int) -> None:
        cells = min(_BLOCK_BYTES // (factors * np.dtype(dtype).itemsize), longest)
        cells = max(-(-cells // 16), 1) * 16  # a multiple of `_loops.AT_ONCE`
        self.block = tuple(_aligned(shape, dtype) for shape in ((cells, factors), cells, cells))
        self.vectors = _aligned((5, factors), dtype)


def _solve(
    solve_rows: Any, piece: Piece, before: np.ndarray, out: np.ndarray, system: _System, steps: int,
    scratch: _Scratch,
) -> None:  # fmt: skip
    """Solve a piece from `before` (P, K) into `out`."""
    piece = piece.loaded(out.dtype)
    given: Any = (before, piece.cells, piece.lengths, piece.ids, piece.values, *system[:2])
    before, cells, lengths, ids, values, source, spectrum = map(_read_only, given)
    solve_rows(
        before, out, cells, lengths,
        (source, ids, values, system.alpha, system.offset),
        (spectrum, system.regularization, system.unobserved, system.exponent, system.tiny),
        system.relaxation, steps, scratch.block, scratch.vectors,
    )  # fmt: skip


def _read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written, as those of JAX's arrays: one type, compiled once."""
    view = array.view()
    view.flags.writeable = False
    return view


def solve_side(
    begin: list[Any], held: Any, basis: Basis, side: Any, place: Workplace, objective: Objective,
    relaxation: Any, steps: int,
) -> Shards:  # fmt: skip
    """Solve all rows of a side in the eigenbasis, in which the result stays.

    Parameters
    ----------
    begin : list of array (S, K)
        Where each shard's rows begin.
    held : array (N, K)
        The source table.
    basis : Basis
        Its eigenbasis, which both are in.
    side : Side
        The rows and their entries.
    place : Workplace
        A single CPU device, whose shards are threads.
    objective : Objective
        Equations (1)-(2), in the dtype of the tables.
    relaxation : float
        As in `solve.relax`, likewise.
    steps : int
        Steps of CG; 0 where every weight w is 0.
    """
    source, before = np.asarray(held), [np.asarray(part) for part in begin]
    dtype = source.dtype
    weight = dtype.type(objective.unobserved_weight)
    system = _System(
        source, weight * np.asarray(basis.spectrum), objective.alpha, objective.offset,
        objective.regularization, weight * dtype.type(basis.n_source), objective.exponent,
        np.finfo(dtype).tiny, relaxation,
    )  # fmt: skip
    out = [_aligned(part.shape, dtype) for part in before]
    pieces, solve_rows = deque(_pieces(side)), _ready(dtype.name)
    longest = int(side.lengths.max(initial=0))

    def work(_: int) -> None:
        scratch = _Scratch(source.shape[1], dtype.name, longest)
        while True:
            try:
                shard, piece = pieces.popleft()
            except IndexError:
                return
            rows = out[shard][piece.slots]
            _solve(solve_rows, piece, before[shard][piece.slots], rows, system, steps, scratch)
            if not isinstance(piece.slots, slice):  # then the rows are a copy
                out[shard][piece.slots] = rows

    place.threads(work, range(place.n_shards))
    with precision(dtype.name):
        return [jax.device_put(part, place.devices[0]) for part in out]


def _pieces(side: Any) -> list[tuple[int, Piece]]:
    """Pieces of all rows, each with its shard; those with most entries first."""
    pieces = []
    cells = _first_cells(side.rows)
    size = max(len(cells) // _PIECES, _LEAST_PIECE)
    for shard, (ids, lengths) in enumerate(zip(side.own.ids, side.own.lengths, strict=True)):
        values = side.own.values
        arrays = np.asarray(ids), None if values is None else np.asarray(values[shard])
        for low in range(0, len(cells), size):
            at = slice(low, min(low + size, len(cells)))
            pieces.append((shard, Piece(at, cells[at], np.asarray(lengths)[at], *arrays)))
        if side.long is not None:
            own = jax.tree.map(
                lambda parts, shard=shard: np.asarray(parts[shard]), side.long,
                is_leaf=lambda node: isinstance(node, list),
            )  # fmt: skip
            pieces += [(shard, piece) for piece in _long_pieces(own, side.rows.n_slots)]
    return sorted(pieces, key=lambda each: -int(each[1].lengths.sum(dtype=np.int64)))


def _first_cells(rows: RowMap) -> np.ndarray:
    """First cell of every slot of the rungs, the same in all shards."""
    counts = [rung.rows * rung.n_chunks for rung in rows.rungs]
    cells = np.zeros(sum(counts), np.int64)
    for rung, count in zip(rows.rungs, counts, strict=True):
        own = rung.first_cell + rung.length * np.arange(count)
        cells[rung.first_slot : rung.first_slot + count] = own
    return cells


def _long_pieces(long: Long, n_slots: int) -> Iterator[Piece]:
    """The long rows of a shard; the blocks of a row follow each other."""
    blocks = np.arange(long.starts[-1])
    batch = np.searchsorted(long.starts, blocks, side="right") - 1
    first = np.searchsorted(
        batch * LONG_ROWS + long.rows[: len(blocks)], np.arange(len(long.slots))
    )
    cells = first.astype(np.int64) * long.ids.shape[1]
    mine = np.flatnonzero(long.slots < n_slots)
    values = None if long.values is None else long.values.reshape(-1)
    for low in range(0, len(mine), LONG_ROWS):
        at = mine[low : low + LONG_ROWS]
        yield Piece(long.slots[at], cells[at], long.lengths[at], long.ids.reshape(-1), values)


def _aligned(shape: int | tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that begin at a cache line."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    low = -memory.ctypes.data % _ALIGNMENT
    return memory[low : low + size].view(dtype).reshape(shape)
