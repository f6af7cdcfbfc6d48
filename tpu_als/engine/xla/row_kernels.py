"""Kernels for NVIDIA GPUs that solve rows without a copy of their source rows.

XLA gathers the source rows of a chunk into memory, and each of the seven products of CG reads this
copy. A program of these kernels solves one row. It reads its source rows from the table by tiles,
once for the residual and once in each step. Later reads of a short row's entries hit the caches.

The kernels are written in Pallas and compiled by Triton. JAX can also interpret them on any device,
for tests. Axis letters: R rows, L padded length, K factors, N source rows, T entries of a tile, K'
factors padded to a power of two.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import solve
from tpu_als.engine.xla.mesh import DeviceMesh
from tpu_als.engine.xla.solve import Block, Cells, Dtype, IndexedBlock, Operator

try:
    from jax.experimental.pallas import triton
except ImportError:  # an experimental module; XLA's own programs are used without it
    triton = None  # type: ignore[assignment]

Ref: TypeAlias = Any  # Pallas's reference to an array; its type does not allow indexing
_TILE = 1 << 12  # numbers of a tile of source rows, which are in the registers of a program
_MOST_ENTRIES = 64  # of a tile
_WARPS = 4
_PART = 1 << 11  # entries of a row that one program reads; longer rows are divided
_SHORTEST_PART = 1 << 8
_CHUNKS = 16  # chunks that the entries are divided into
_CHUNK = 1 << 15, 1 << 21  # least and greatest cells of a chunk
_MOST_ROWS = 1 << 14  # of a chunk
_PROGRAMS = 1 << 10  # programs that keep all processors busy


def kernels_for(mesh: DeviceMesh) -> RowKernels | None:
    """The kernels, or None: they are used on NVIDIA GPUs that have the whole source table."""
    if mesh.platform != "gpu" or mesh.collectives.is_sharded or triton is None:
        return None
    if "cuda" not in mesh.devices[0].client.platform_version.lower():
        return None
    # All processes must run the same programs.
    failed = mesh.agree(int(not works_on(mesh.devices[mesh.local_shards.start], RowKernels())))
    return None if failed else RowKernels()


@functools.cache
def works_on(device: jax.Device, kernels: RowKernels) -> bool:
    """Whether the kernels compile for a device, and solve a small example as XLA does.

    A failure is reported once in a warning. A fit then uses XLA's own programs.
    """
    rng = np.random.default_rng(0)
    n_rows, length, n_factors = 8, 40, 12
    ids = rng.integers(0, 16, (n_rows, length)).astype(np.int32)
    n_entries = rng.integers(0, length + 1, n_rows).astype(np.int32)
    shapes = (n_rows, length), (n_rows, n_factors), (16, n_factors)
    w, z, table = (jnp.asarray(rng.random(shape), jnp.float32) for shape in shapes)
    block = IndexedBlock(table, ids, w, w + 1, n_entries)
    is_entry = solve.entry_mask(ids.shape, n_entries).astype(jnp.float32)
    gathered = Block(block.table[ids], w * is_entry, (w + 1) * is_entry)
    try:
        block, gathered, z = jax.device_put((block, gathered, z), device)
        found, expected = (
            (
                np.asarray(products.cg(b, z, jnp.ones_like(z), 3)),
                np.asarray(products.residual(b, z)),
                np.asarray(products.predict(b, z) * is_entry),
            )
            for products, b in ((kernels, block), (solve, gathered))
        )
    except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
        problem = f"do not run there ({type(error).__name__}: {error})"
    else:
        pairs = zip(found, expected, strict=True)
        if all(np.allclose(*pair, rtol=1e-3, atol=1e-3) for pair in pairs):
            return True
        problem = "solve a small example wrongly there"
    warnings.warn(
        f"fits on {device} are slower than they could be, because the kernels for NVIDIA GPUs "
        f"{problem}. XLA's own programs are used instead",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def chunk_sizes(n_entries: int) -> tuple[int, int]:
    """Cells and maximum rows of a chunk, for a shard with this number of entries.

    A chunk is large enough to keep a GPU busy, and small enough that the unused rows of the rungs'
    last chunks are few.
    """
    wanted = min(max(n_entries // _CHUNKS, _CHUNK[0]), _CHUNK[1])
    return 1 << (wanted.bit_length() - 1), _MOST_ROWS


@dataclass(frozen=True)
class RowKernels:
    """The functions of `solve` that `sweep` calls, for `IndexedBlock`.

    Attributes
    ----------
    is_interpreted : bool
        Whether JAX interprets the kernels, which works on any device.
    """

    is_interpreted: bool = False

    def gather(
        self, table: Array, objective: Objective, cells: Cells, dtype: Dtype
    ) -> IndexedBlock:
        """The weights of cells (R, L). Their source rows stay in the table (N, K)."""
        w, v = solve.weights(objective, cells, dtype)
        return IndexedBlock(table, cells.ids, w, v, cells.n_entries)

    def cg(self, block: IndexedBlock, z: Array, d: Array, steps: int) -> Array:
        """Solve equation (3) by CG from z (R, K), with the diagonal part d (R, K)."""
        length = block.ids.shape[1]
        if length > _PART:
            operator = Operator(lambda p: self.normal(block, p), lambda p: self.curvature(block, p))
            return solve.rows_cg(operator, self.residual(block, z), z, d, steps)
        kernel = functools.partial(_solve_row, length=length, steps=steps)
        return self._call(kernel, len(z), block, (block.w, block.v), (z, d), z.shape)

    def residual(self, block: IndexedBlock, z: Array) -> Array:
        """E^T (v - W E z), the data part of the residual of equation (1) at z (R, K)."""
        return self._image(block, -block.w, block.v, z)

    def normal(self, block: IndexedBlock, p: Array) -> Array:
        """E^T W E p, the data part of the matrix of equation (1) times p (R, K)."""
        return self._image(block, block.w, jnp.zeros_like(block.w), p)

    def curvature(self, block: IndexedBlock, p: Array) -> Array:
        """p^T E^T W E p of each row (R, 1)."""
        return jnp.sum(p * self.normal(block, p), axis=1, keepdims=True)

    def project(self, block: IndexedBlock, t: Array) -> Array:
        """E^T t: (R, K) of cell values t (R, L)."""
        zero = jnp.zeros((len(t), block.table.shape[1]), t.dtype)
        return self._image(block, jnp.zeros_like(t), t, zero)

    def predict(self, block: IndexedBlock, z: Array) -> Array:
        """E z: predictions (R, L) of the block's cells for rows z (R, K); 0 in pads."""
        n_rows, length = block.ids.shape
        parts = _Parts.of(n_rows, length)
        kernel = functools.partial(_predict_part, parts=parts)
        flat = self._call(kernel, n_rows * parts.number, block, (), (z,), (n_rows * length,))
        is_entry = solve.entry_mask(block.ids.shape, block.n_entries)
        return jnp.where(is_entry, flat.reshape(n_rows, length), jnp.zeros((), flat.dtype))

    def _image(self, block: IndexedBlock, a: Array, b: Array, p: Array) -> Array:
        """E^T (a * E p + b) for cell values a, b (R, L): (R, K)."""
        n_rows, length = block.ids.shape
        parts = _Parts.of(n_rows, length)
        kernel = functools.partial(_image_of_part, parts=parts)
        n_programs = n_rows * parts.number
        sums = self._call(kernel, n_programs, block, (a, b), (p,), (n_programs, p.shape[1]))
        return sums.reshape(n_rows, parts.number, -1).sum(axis=1)

    def _call(
        self,
        kernel: Callable[..., None],
        n_programs: int,
        block: IndexedBlock,
        values: tuple[Array, ...],
        rows: tuple[Array, ...],
        shape: tuple[int, ...],
    ) -> Array:
        """Run programs of a kernel, whose output has this shape.

        Its refs are ids and values (R * L,), lengths (R,), the table, rows (R, K) and the output.
        """
        flat = (cells.reshape(-1) for cells in (block.ids, *values))
        call = pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(shape, block.w.dtype),
            grid=(n_programs,),
            interpret=self.is_interpreted,
            compiler_params=triton.CompilerParams(num_warps=_WARPS),
        )
        return call(*flat, block.n_entries, block.table, *rows)


class _Parts(NamedTuple):
    """How rows are divided: cells of a row, entries of a part, and parts of a row."""

    length: int
    size: int
    number: int

    @classmethod
    def of(cls, n_rows: int, length: int) -> _Parts:
        """Parts of R rows, short enough that programs keep all processors busy."""
        wanted = max(n_rows * length // _PROGRAMS, _SHORTEST_PART)
        size = min(1 << (wanted.bit_length() - 1), _PART)
        return cls(length, size, -(-length // size))


class _Tiles(NamedTuple):
    """The entries of a program, and the refs to read them from.

    Attributes
    ----------
    ids : ref (R * L,)
        Source row of each cell.
    table : ref (N, K)
        The source table.
    first, n_entries : int32
        The program's first cell, and its number of entries.
    length : int
        Bound on that number.
    dtype : dtype
        Dtype of sums.
    """

    ids: Ref
    table: Ref
    first: Array
    n_entries: Array
    length: int
    dtype: Dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (T, K') of a tile; both are powers of two, as Triton requires."""
        width = _power_of_two(self.table.shape[1])
        return min(max(_TILE // width, 1), _MOST_ENTRIES, _power_of_two(self.length)), width

    def fold(
        self, function: Callable[..., Array], width: int, values: tuple[Ref, ...] = ()
    ) -> Array:
        """Sum (1, width) over all entries of function(E (T, K'), *values (T, 1)): (T, width)."""
        zero = jnp.zeros((self.shape[0], width), self.dtype)

        def body(tile: Array, sums: Array) -> Array:
            rows, cells, _, _ = self.read(tile, values)
            return sums + function(rows, *cells)

        return jnp.sum(lax.fori_loop(0, self.n_tiles, body, zero), axis=0, keepdims=True)

    @property
    def n_tiles(self) -> Array:
        """Number of tiles that have entries."""
        return (self.n_entries + self.shape[0] - 1) // self.shape[0]

    def read(self, tile: Array, values: tuple[Ref, ...]) -> tuple[Array, list[Array], Array, Array]:
        """A tile: E (T, K'), values (T, 1), its cells (T,) and which of them are entries (T,)."""
        size, width = self.shape
        at = tile * size + jnp.arange(size)
        is_entry, at = at < self.n_entries, self.first + at
        ids = triton.load(self.ids.at[at], mask=is_entry, other=0)
        columns = jnp.arange(width)[None, :]
        mask = is_entry[:, None] & (columns < self.table.shape[1])
        rows = triton.load(self.table.at[ids[:, None], columns], mask=mask, other=0)
        cells = [triton.load(ref.at[at], mask=is_entry, other=0)[:, None] for ref in values]
        return rows.astype(self.dtype), cells, at, is_entry


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _row_at(ref: Ref, row: Array) -> tuple[Ref, Array]:
    """A ref to row (1, K') of a table (R, K), and which of its columns exist."""
    columns = jnp.arange(_power_of_two(ref.shape[1]))[None, :]
    return ref.at[jnp.full_like(columns, row), columns], columns < ref.shape[1]


def _read_row(ref: Ref, row: Array) -> Array:
    at, mask = _row_at(ref, row)
    return triton.load(at, mask=mask, other=0)


def _write_row(ref: Ref, row: Array, values: Array) -> None:
    at, mask = _row_at(ref, row)
    triton.store(at, values, mask=mask)


def _predict(rows: Array, p: Array) -> Array:
    """E p (T, 1) for source rows E (T, K') and a row p (1, K')."""
    return jnp.sum(rows * p, axis=1, keepdims=True)


def _solve_row(*refs: Ref, length: int, steps: int) -> None:
    """Kernel: solve the row of this program, which has at most `length` entries."""
    ids, w, v, n_entries, table, start, diagonal, out = refs
    row = pl.program_id(0)
    tiles = _Tiles(ids, table, row * length, n_entries[row], length, out.dtype)
    z, d = _read_row(start, row), _read_row(diagonal, row)
    width = z.shape[1]

    def residual(rows: Array, w: Array, v: Array) -> Array:
        return rows * (v - w * _predict(rows, z))

    def normal(p: Array) -> Array:
        return tiles.fold(lambda rows, w: rows * (w * _predict(rows, p)), width, (w,))

    def curvature(p: Array) -> Array:
        return tiles.fold(lambda rows, w: w * jnp.square(_predict(rows, p)), 1, (w,))

    r = tiles.fold(residual, width, (w, v))
    _write_row(out, row, solve.rows_cg(Operator(normal, curvature), r, z, d, steps))


def _part_of(
    ids: Ref, n_entries: Ref, table: Ref, dtype: Dtype, parts: _Parts
) -> tuple[Array, _Tiles]:
    """The row of this program, and the entries of its part of the row."""
    row, before = pl.program_id(0) // parts.number, pl.program_id(0) % parts.number * parts.size
    count = jnp.clip(n_entries[row] - before, 0, parts.size)
    return row, _Tiles(ids, table, row * parts.length + before, count, parts.size, dtype)


def _image_of_part(*refs: Ref, parts: _Parts) -> None:
    """Kernel: E^T (a * E p + b) over a part of a row."""
    ids, a, b, n_entries, table, rows, out = refs
    row, tiles = _part_of(ids, n_entries, table, out.dtype, parts)
    p = _read_row(rows, row)

    def image(rows: Array, a: Array, b: Array) -> Array:
        return rows * (a * _predict(rows, p) + b)

    _write_row(out, pl.program_id(0), tiles.fold(image, p.shape[1], (a, b)))


def _predict_part(*refs: Ref, parts: _Parts) -> None:
    """Kernel: E z over a part of a row; pads are not written."""
    ids, n_entries, table, rows, out = refs
    row, tiles = _part_of(ids, n_entries, table, out.dtype, parts)
    z = _read_row(rows, row)

    def body(tile: Array, carried: int) -> int:
        source, _, at, is_entry = tiles.read(tile, ())
        triton.store(out.at[at], _predict(source, z)[:, 0], mask=is_entry)
        return carried

    lax.fori_loop(0, tiles.n_tiles, body, 0)
