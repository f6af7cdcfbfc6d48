"""Batched solves of one block of rows. Pure functions for one device; docs/math.md has the algebra.

Axis letters: R rows, L padded length, K factors, N source rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from tpu_als.engine.objective import DOMINANT, Objective, confidence, ridge
from tpu_als.engine.xla.cholesky import direct

Dtype = str | np.dtype

# Full float32 products: accelerators would otherwise round the operands to bfloat16 or tf32.
PRECISION = lax.Precision.HIGHEST
_SMALL = 1e-3  # a diagonal of the scaled equation below this is far below the weights
_BLOCK = 1 << 12  # rows, or entries of a row, that a program sums one after the other
_GRAMIANS = 1 << 24  # numbers in the blocks' gramians that are in memory together


class Basis(NamedTuple):
    """The source side's gramian of a half-epoch, G = Q diag(s) Q^T (equation 3).

    Attributes
    ----------
    rotation : (K, K)
        Eigenvectors Q.
    spectrum : (K,)
        Eigenvalues s, at least the rounding error of the largest.
    n_source : ()
        Number N of source rows, unused slots not counted.
    """

    rotation: Array
    spectrum: Array
    n_source: Array | np.floating


def gramian(table: Array, dtype: Dtype) -> Array:
    """Y^T Y of a table (N, K), accumulated in `dtype`, over blocks of rows.

    One product over millions of rows would be a running sum, whose error grows with its length.
    """
    n_rows, n_factors = table.shape
    size = _block_rows(n_rows, max(min(_GRAMIANS // n_factors**2, 256), 1))
    blocks = table.astype(dtype).reshape(n_rows // size, size, n_factors)
    return jnp.einsum("bnk,bnj->bkj", blocks, blocks, precision=PRECISION).sum(axis=0)


def _block_rows(n_rows: int, most: int) -> int:
    """Rows per block, a divisor of `n_rows`: about `_BLOCK`, or more for at most `most` blocks.

    The number of rows of a long table is divisible by a large power of two (`layout.round_up`).
    """
    size = n_rows & -n_rows
    if n_rows <= _BLOCK or n_rows // size > most:
        return max(n_rows, 1)
    while size > _BLOCK and 2 * (n_rows // size) <= most:
        size //= 2
    return size


def basis(gram: Array, n_source: Array | np.floating) -> Basis:
    """Eigenbasis of the gramian (K, K) of a table of N = `n_source` rows."""
    spectrum, rotation = jnp.linalg.eigh(gram)
    # Rounding may make eigenvalues zero or negative, which would make the systems singular.
    least = jnp.finfo(gram.dtype).eps * spectrum[-1] + jnp.finfo(gram.dtype).tiny
    return Basis(rotation, jnp.maximum(spectrum, least), n_source)


def rotate(rows: Array, rotation: Array) -> Array:
    """Rows (..., K) times a rotation (K, K), in the rows' storage dtype."""
    rotated = jnp.matmul(rows.astype(rotation.dtype), rotation, precision=PRECISION)
    return rounded(rotated, rows.dtype)


def rounded(rows: Array, dtype: Dtype) -> Array:
    """Rows rounded to the nearest numbers of a table's dtype.

    Stochastic rounding to bfloat16 ranked no better (docs/performance.md).
    """
    return rows.astype(dtype)


def diagonal(basis: Basis, objective: Objective, lengths: Array | np.ndarray) -> Array:
    """Diagonal part a0 s + lam_u of equation (3) for rows of `lengths` (R,): (R, K)."""
    spectrum = objective.unobserved_weight * basis.spectrum
    lam = ridges(objective, lengths, basis.n_source)
    return jnp.minimum(spectrum, jnp.finfo(spectrum.dtype).max / 4)[None, :] + lam[:, None]


def ridges(
    objective: Objective, lengths: Array | np.ndarray, n_source: Array | np.floating
) -> Array:
    """Ridges lam_u (R,) of equation (2) for rows of `lengths` (R,), in the dtype of `n_source`."""
    lam = ridge(objective, lengths.astype(n_source.dtype), n_source)
    # The power in the ridge may overflow. Any such ridge makes rows zero; with lam = 0 it is 0.
    most = jnp.finfo(lam.dtype).max / 4
    return jnp.where(objective.regularization == 0, jnp.zeros_like(lam), jnp.minimum(lam, most))


def drawn_to(
    prior: Array, d: Array, objective: Objective, lengths: Array | np.ndarray, basis: Basis
) -> Array:
    """D^-1 lam_u p (R, K), the solutions of (3) for rows that are drawn to p and have no entries.

    Substitute z = q + e in (3) for rows that are drawn to p, with q = D^-1 lam_u p. Then e solves
    (3) with v - w t in place of v, where t are the predictions of q.
    """
    return prior * (ridges(objective, lengths, basis.n_source)[:, None] / d)


def equation_scale(d: Array, weight: ArrayLike) -> Array:
    """Factor (R, 1) that brings the numbers of equation (3) near 1, so that no product overflows.

    Multiplying both sides by it does not change the solution. `d` (R, K) is the diagonal part, and
    `weight` is at least the largest weight w.
    """
    kind = jnp.finfo(d.dtype)
    size = jnp.max(d, axis=1, keepdims=True) + weight
    return 1 / jnp.clip(size, kind.tiny, kind.max / 256)


def initial_rows(z: Array, d: Array, weight: ArrayLike, basis: Basis) -> Array:
    """Initial rows of CG: the rows z (R, K), or zero where the diagonal part d dominates.

    If d dominates, three steps from zero are exact. Steps from a z that is far too large would
    leave its rounding error.
    """
    reach = DOMINANT * weight * basis.spectrum[-1]
    dominates = jnp.min(d, axis=1, keepdims=True) > reach
    return jnp.where(dominates, jnp.zeros_like(z), z)


class Cells(NamedTuple):
    """Cells of R rows.

    Attributes
    ----------
    ids : int32 array (R, L)
        Source row of each cell.
    values : array (R, L) or None
        Stored values, maybe of a narrower dtype; None where all are 1.
    n_entries : int32 array (R,)
        Number of entries of each row: its first cells. The others are pads.
    """

    ids: Array | np.ndarray
    values: Array | np.ndarray | None
    n_entries: Array | np.ndarray


class Block(NamedTuple):
    """Gathered entries of R rows: source rows E (R, L, K) and the weights w, v (R, L)."""

    rows: Array
    w: Array
    v: Array


class IndexedBlock(NamedTuple):
    """Entries of R rows: source table (N, K), ids and weights w, v (R, L), and lengths (R,)."""

    table: Array
    ids: Array | np.ndarray
    w: Array
    v: Array
    n_entries: Array | np.ndarray


AnyBlock = TypeVar("AnyBlock", Block, IndexedBlock)


def gather(table: Array, objective: Objective, cells: Cells, dtype: Dtype) -> Block:
    """Gather the rows of a table, and the weights, for cells (R, L)."""
    # Ids from the layout are in bounds; any other mode would cost a select per element.
    rows = table.at[cells.ids].get(mode="promise_in_bounds").astype(dtype)
    return Block(rows, *weights(objective, cells, dtype))


def weights(objective: Objective, cells: Cells, dtype: Dtype) -> tuple[Array, Array]:
    """Weights w and v (R, L) of cells; 0 in pads."""
    shape, values = cells.ids.shape, cells.values
    is_entry = entry_mask(shape, cells.n_entries)
    values = jnp.ones(shape, dtype) if values is None else values.astype(dtype)
    zero = jnp.zeros((), dtype)
    w, v = (jnp.where(is_entry, weight, zero) for weight in confidence(objective, values))
    return w, v


def largest_weight(block: Block | IndexedBlock) -> Array:
    """Largest absolute weight (R, 1) of a row's cells."""
    return jnp.max(jnp.maximum(jnp.abs(block.w), block.v), axis=1, keepdims=True)


def scale_weights(block: AnyBlock, factor: Array) -> AnyBlock:
    """Multiply the weights of a block, and so its equations, by a factor (R, 1) for each row."""
    return block._replace(w=block.w * factor, v=block.v * factor)


def entry_mask(shape: tuple[int, ...], n_entries: Array | np.ndarray) -> Array:
    """Which cells (R, L) are entries, and not pads: the first `n_entries` (R,) of each row."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) < n_entries[:, None]


def _in_blocks(cells: Array) -> Array:
    """Reshape cells (R, L, ...) to B blocks (R, B, L / B, ...), which are summed separately.

    B is 1 for rows of ordinary length. It is larger in a fold-in, whose rows are whole and of any
    length; long rows of a fit are divided into blocks by `sweep.solve_long`.
    """
    length = cells.shape[1]
    size = _BLOCK if length > _BLOCK and length % _BLOCK == 0 else max(length, 1)
    return cells.reshape(cells.shape[0], length // size, size, *cells.shape[2:])


def predict(block: Block, z: Array) -> Array:
    """E z: predictions (R, L) of the block's cells for rows z (R, K)."""
    return jnp.einsum("rlk,rk->rl", block.rows, z, precision=PRECISION)


def project(block: Block, t: Array) -> Array:
    """E^T t: (R, K) of cell values t (R, L)."""
    rows, t = _in_blocks(block.rows), _in_blocks(t)
    if rows.shape[1] > 1:
        return jnp.einsum("rblk,rbl->rbk", rows, t, precision=PRECISION).sum(axis=1)
    return jnp.einsum("rlk,rl->rk", block.rows, t[:, 0], precision=PRECISION)


def normal(block: Block, p: Array) -> Array:
    """E^T W E p, the data part of the matrix of equation (1) times p (R, K)."""
    return project(block, block.w * predict(block, p))


def curvature(block: Block, p: Array) -> Array:
    """p^T E^T W E p of each row (R, 1)."""
    return _row_sums(block.w * jnp.square(predict(block, p)))[:, None]


def _row_sums(cells: Array) -> Array:
    """Sum (R,) of the cells (R, L) of each row."""
    return jnp.sum(jnp.sum(_in_blocks(cells), axis=2), axis=1)


def residual(block: Block, z: Array) -> Array:
    """E^T (v - W E z), the data part of the residual of equation (1) at z (R, K)."""
    return project(block, block.v - block.w * predict(block, z))


def rows_diagonal(rhs: Array, d: Array) -> Array:
    """Equation (3) where every w is 0: E^T v (R, K) over the diagonal part d."""
    return rhs / d


class Operator(NamedTuple):
    """Products with the data part of the matrix of equation (3), for R rows.

    Attributes
    ----------
    normal : callable
        p (R, K) -> E^T W E p (R, K).
    curvature : callable
        p -> p^T E^T W E p, (R, 1) or (R, K): half the work of `normal`, and enough for the last
        step.
    row_sums : callable
        Sums over each row of an array (R, K), (R, 1) or (R, K).
    """

    normal: Callable[[Array], Array]
    curvature: Callable[[Array], Array]
    row_sums: Callable[[Array], Array] = lambda p: jnp.sum(p, axis=1, keepdims=True)


def rows_cg(operator: Operator, r: Array, z: Array, d: Array, steps: int) -> Array:
    """Conjugate gradients on equation (3), preconditioned by its diagonal part (R, K).

    Parameters
    ----------
    operator : Operator
        Its other part.
    r : (R, K)
        Data part of the residual at `z`.
    z : (R, K)
        Start.
    d : (R, K)
        That diagonal part, a0 s + lam_u.
    steps : int
        Steps to take, 1 or more.
    """
    normal, curvature, row_sums = operator
    tiny = jnp.finfo(z.dtype).tiny
    # If d is far below the weights, it is normalised, because division by d would overflow. If d
    # is 0, this is CG without a preconditioner.
    most = jnp.max(d, axis=1, keepdims=True)
    shape = (d + tiny) / jnp.where(most < _SMALL, most + tiny, jnp.ones_like(most))
    r = r - d * z
    y = r / shape
    p, size = y, row_sums(r * y)
    for _ in range(steps - 1):
        image = d * p + normal(p)
        a = size / jnp.maximum(row_sums(p * image), tiny)
        z, r = z + a * p, r - a * image
        y = r / shape
        last, size = size, row_sums(r * y)
        p = y + size / jnp.maximum(last, tiny) * p
    bend = row_sums(d * p * p) + curvature(p)
    return z + size / jnp.maximum(bend, tiny) * p


def cg(block: Block, z: Array, d: Array, steps: int) -> Array:
    """Solve equation (3) by `rows_cg` from z (R, K), with the diagonal part d (R, K)."""
    operator = Operator(lambda p: normal(block, p), lambda p: curvature(block, p))
    return rows_cg(operator, residual(block, z), z, d, steps)


def relax(before: Array, solved: Array, relaxation: Array | np.floating) -> Array:
    """Move from the rows `before` towards `solved` (R, K), by `relaxation` times the distance.

    ALS is a block Gauss-Seidel method; this makes it successive over-relaxation. The loss is
    quadratic in the rows, so with a relaxation between 0 and 2 it cannot rise. See docs/math.md.
    """
    return (1 - relaxation) * before + relaxation * solved


def accumulate(block: Block) -> tuple[Array, Array]:
    """Data parts of equation (1): E^T W E (R, K, K) and E^T v (R, K)."""
    weighted, rows = _in_blocks(block.rows * block.w[:, :, None]), _in_blocks(block.rows)
    if rows.shape[1] > 1:
        matrix = jnp.einsum("rblk,rblj->rbkj", weighted, rows, precision=PRECISION).sum(axis=1)
    else:
        matrix = jnp.einsum("rlk,rlj->rkj", weighted[:, 0], block.rows, precision=PRECISION)
    return matrix, project(block, block.v)


def rows_direct(parts: tuple[Array, Array], d: Array) -> Array:
    """Solve equation (3) exactly from the data parts of `accumulate` and its diagonal d (R, K)."""
    matrix, rhs = parts
    return direct(matrix + d[:, :, None] * jnp.eye(d.shape[1], dtype=d.dtype)[None], rhs)


def rows_dual(block: Block, d: Array) -> Array:
    """Solve equation (3) exactly through an L x L system, for L well below K and w >= 0.

    With D = diag(d) and S = E D^-1 E^T, Woodbury's identity turns (3) into z = D^-1 E^T y where
    y = v - W^1/2 u and (I + W^1/2 S W^1/2) u = W^1/2 S v. See docs/math.md.
    """
    root = jnp.sqrt(block.w)
    scaled = block.rows / d[:, None, :]
    inner = jnp.einsum("rlk,rmk->rlm", scaled, block.rows, precision=PRECISION)
    system = root[:, :, None] * inner * root[:, None, :]
    system = system + jnp.eye(root.shape[1], dtype=root.dtype)[None]
    u = direct(system, root * jnp.einsum("rlm,rm->rl", inner, block.v, precision=PRECISION))
    return jnp.einsum("rlk,rl->rk", scaled, block.v - root * u, precision=PRECISION)


def rows_exact(block: Block, d: Array, positive: bool) -> Array:
    """Solve equation (3) exactly, by the smaller system where all w are known to be `positive`.

    Not decided from the weights: a row's result must not depend on what else is in its block.
    """
    if positive and 2 * block.rows.shape[1] <= block.rows.shape[2]:
        return rows_dual(block, d)
    return rows_direct(accumulate(block), d)


def cells_loss(block: Block | IndexedBlock, t: Array, is_entry: Array, offset: ArrayLike) -> Array:
    """Contribution of stored cells to the loss beyond the unobserved term: (R,).

    Each cell is computed as a square. Sums of (w t - 2 v) t and of |c| nearly cancel if a model
    fits well, so that rounding errors would dominate.

    Parameters
    ----------
    block : Block or IndexedBlock
        Read with an objective whose offset is 0, so that w is abs(c).
    t : (R, L)
        Predictions of the cells.
    is_entry : (R, L)
        `entry_mask` of the block.
    offset : scalar
        The offset of the objective.
    """
    liked, disliked = block.v * jnp.square(1 - t), (block.w - block.v) * (1 + jnp.square(t))
    unobserved = jnp.where(is_entry, offset * jnp.square(t), jnp.zeros((), t.dtype))
    return _row_sums(liked + disliked - unobserved)


def finite_rows(z: Array) -> Array:
    """Whether each row (R,) of a table is free of NaN and infinity."""
    return jnp.all(jnp.isfinite(z), axis=-1)


def zero_empty(z: Array, lengths: Array | np.ndarray) -> Array:
    """Rows without entries, and unused ones, are zero: equation (1) has right-hand side 0."""
    return jnp.where(lengths[..., None] > 0, z, jnp.zeros((), z.dtype))
