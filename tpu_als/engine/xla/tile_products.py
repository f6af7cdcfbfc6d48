"""Products with gathered source rows on the matrix units of a TPU.

A matrix unit multiplies bfloat16 numbers exactly and adds in float32. So a float32 array is divided
into bfloat16 parts, whose sum it is, and the parts are multiplied one after the other. A product of
one row with its own entries would use one column of the unit. Here a *tile* has the entries of
`TILE_ROWS` rows, and is multiplied by the vectors of all of them; only the part of each result that
belongs to a row's own entries is kept. Loading the entries takes most of the time, so the unused
results are almost free, and cells of a tile fill the lanes of the vector units for any length L.

Axis letters: R rows, L padded length, K factors, N source rows, T tiles, G rows of a tile, S = G L
cells of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from tpu_als.engine import layout
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import solve
from tpu_als.engine.xla.mesh import DeviceMesh
from tpu_als.engine.xla.solve import Cells, Dtype, Operator

# Rows of a tile: as many as a float32 register has sublanes, so reshaping to tiles does not copy.
TILE_ROWS = layout.ROWS_MULTIPLE


def tiles_for(mesh: DeviceMesh) -> TileProducts | None:
    """The products for TPUs, or None on other devices."""
    return TileProducts() if mesh.platform == "tpu" else None


def bfloat16_parts(values: Array, count: int) -> list[Array]:
    """Divide float32 values into bfloat16 arrays whose sum they are, up to 8 `count` bits."""
    parts = []
    for _ in range(count):
        # Unlike a conversion to bfloat16 and back, this is not removed by XLA's simplifier.
        part = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        values = values - part
    return parts


class TiledBlock(NamedTuple):
    """Gathered entries of R rows.

    Attributes
    ----------
    parts : tuple of bfloat16 arrays (R * L, K)
        Their sum is the source rows: one part if the table is bfloat16, three if it is float32.
    w, v : (R, L)
        The weights.
    """

    parts: tuple[Array, ...]
    w: Array
    v: Array


@dataclass(frozen=True)
class TileProducts:
    """The functions of `solve` that `sweep` calls, for `TiledBlock`."""

    def gather(self, table: Array, objective: Objective, cells: Cells, dtype: Dtype) -> TiledBlock:
        """Gather the rows of a table, and the weights, for cells (R, L)."""
        rows = table.at[cells.ids.reshape(-1)].get(mode="promise_in_bounds")
        is_exact = rows.dtype == jnp.bfloat16
        parts = [rows] if is_exact else bfloat16_parts(rows.astype(dtype), 3)
        return TiledBlock(tuple(parts), *solve.weights(objective, cells, dtype))

    def predict(self, block: TiledBlock, z: Array) -> Array:
        """E z: predictions (R, L) of the block's cells for rows z (R, K)."""
        return _predict(block, z).reshape(block.w.shape)

    def project(self, block: TiledBlock, t: Array) -> Array:
        """E^T t: (R, K) of cell values t (R, L)."""
        return _project(block, _in_tiles(t))

    def residual(self, block: TiledBlock, z: Array) -> Array:
        """E^T (v - W E z), the data part of the residual of equation (1) at z (R, K)."""
        w, v = _in_tiles(block.w), _in_tiles(block.v)
        return _project(block, v - w * _predict(block, z))

    def normal(self, block: TiledBlock, p: Array) -> Array:
        """E^T W E p, the data part of the matrix of equation (1) times p (R, K)."""
        return _project(block, _in_tiles(block.w) * _predict(block, p))

    def curvature(self, block: TiledBlock, p: Array) -> Array:
        """p^T E^T W E p of each row: (R, K), the same number K times."""
        return row_sums(p * self.normal(block, p))

    def cg(self, block: TiledBlock, z: Array, d: Array, steps: int) -> Array:
        """Solve equation (3) by `solve.rows_cg` from z (R, K), with the diagonal part d (R, K)."""
        operator = Operator(
            lambda p: self.normal(block, p), lambda p: self.curvature(block, p), row_sums
        )
        return solve.rows_cg(operator, self.residual(block, z), z, d, steps)


def row_sums(values: Array) -> Array:
    """Sum of each row of float32 `values` (R, K): (R, K), the same number K times.

    The compiler estimates a third of the cycles of a sum over lanes.
    """
    ones = jnp.ones((values.shape[1],) * 2, values.dtype)
    return jnp.einsum("rk,kj->rj", values, ones, precision=solve.PRECISION)


def _in_tiles(cells: Array) -> Array:
    """Reshape cells (R, L) to tiles (T, S)."""
    n_rows, length = cells.shape
    size = math.gcd(n_rows, TILE_ROWS)
    return cells.reshape(n_rows // size, size * length)


def _own_cells(size: int, length: int) -> Array:
    """Which cells (G, S) of a tile belong to each of its rows."""
    shape = size, size * length
    row, cell = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return cell // length == row


def _predict(block: TiledBlock, z: Array) -> Array:
    """E z in tiles (T, S), for rows z (R, K)."""
    (n_rows, length), n_factors = block.w.shape, z.shape[1]
    size = math.gcd(n_rows, TILE_ROWS)
    vectors = z.reshape(n_rows // size, size, n_factors)
    found = _product("tgk,tsk->tgs", block, vectors)
    return jnp.sum(jnp.where(_own_cells(size, length)[None], found, 0), axis=1)


def _project(block: TiledBlock, t: Array) -> Array:
    """E^T t (R, K) of cell values t (T, S)."""
    n_rows, length = block.w.shape
    size = math.gcd(n_rows, TILE_ROWS)
    own = jnp.where(_own_cells(size, length)[None], t[:, None, :], 0)
    return _product("tgs,tsk->tgk", block, own).reshape(n_rows, -1)


def _product(subscripts: str, block: TiledBlock, vectors: Array) -> Array:
    """Product of float32 vectors with the tiles' entries.

    Products of parts below float32's rounding error are left out. bfloat16 tables are exact, so two
    parts of the vectors (16 bits) are enough.
    """
    count = max(len(block.parts), 2)
    total = None
    for order, part in enumerate(block.parts):
        entries = part.reshape(vectors.shape[0], -1, part.shape[1])
        for vector in bfloat16_parts(vectors, count - order):
            found = jnp.einsum(subscripts, vector, entries, preferred_element_type=vectors.dtype)
            total = found if total is None else total + found
    assert total is not None
    return total
