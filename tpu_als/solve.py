"""Batched solves of one block of rows. Pure functions for one device; docs/math.md has the algebra.

Axis letters: R rows, L padded length, K factors, N source rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from tpu_als.parameters import OBJECTIVES

# Full float32 products: accelerators would otherwise round the operands to bfloat16 or tf32.
PRECISION = lax.Precision.HIGHEST
SOLVERS = ("cg", "cholesky", "subspace")
_PANELS, _LEAST_PANEL = 4, 16  # of the factorisation on CPU; each panel costs compilation


class Objective(NamedTuple):
    """The numbers of equations (1)-(2); all traced, so no value of them recompiles anything."""

    regularization: Any
    alpha: Any
    unobserved_weight: Any
    exponent: Any
    offset: Any


def objective(
    name: str,
    regularization: float,
    alpha: float,
    unobserved_weight: float = 1.0,
    exponent: float | None = None,
) -> Objective:
    """Return the numbers that make equations (1)-(2) the named objective.

    Parameters
    ----------
    name : {"implicit", "ials"}
        Hu, Koren, Volinsky (2008) in implicit's convention, or Rendle et al. (2022).
    regularization, alpha, unobserved_weight : float
        lam, alpha and a0.
    exponent : float, optional
        nu of equation (2). None means 0 for "implicit" and 1 for "ials".

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {OBJECTIVES}, got {name!r}")
    implicit = name == "implicit"
    if exponent is None:
        exponent = 0.0 if implicit else 1.0
    # An observed cell of "implicit" weighs |c| in total; the gramian has given it a0 already.
    offset = unobserved_weight if implicit else 0.0
    return Objective(regularization, alpha, unobserved_weight, exponent, offset)


def confidence(objective: Objective, values: Any) -> tuple[Any, Any]:
    """Weights w and v of equation (1) for stored values; works on NumPy and JAX arrays.

    A negative value is a disliked item: its target is 0 and its weight |alpha x|.
    """
    c = objective.alpha * values
    size = abs(c)
    return size - objective.offset, (size + c) / 2


def ridge(objective: Objective, n_entries: Any, n_source: Any) -> Any:
    """Ridge lam_u of equation (2) for rows of `n_entries`; works on NumPy and JAX arrays."""
    scale = n_entries + objective.unobserved_weight * n_source
    return objective.regularization * scale**objective.exponent


class Basis(NamedTuple):
    """The source side's gramian of a half-epoch, G = Q diag(s) Q^T (equation 3).

    Attributes
    ----------
    rotation : (K, K)
        Eigenvectors Q.
    spectrum : (K,)
        Eigenvalues s, floored at rounding error of the largest.
    n_source : ()
        Number N of source rows, unused slots not counted.
    """

    rotation: Array
    spectrum: Array
    n_source: Any


def gramian(table: Array, dtype: Any) -> Array:
    """Y^T Y of a table (N, K), accumulated in `dtype`."""
    table = table.astype(dtype)
    return jnp.einsum("nk,nj->kj", table, table, precision=PRECISION)


def basis(gram: Array, n_source: Array) -> Basis:
    """Eigenbasis of the gramian (K, K) of a table of N = `n_source` rows."""
    spectrum, rotation = jnp.linalg.eigh(gram)
    # A spectrum that rounding made zero or negative would leave rank-deficient systems singular.
    least = jnp.finfo(gram.dtype).eps * spectrum[-1] + jnp.finfo(gram.dtype).tiny
    return Basis(rotation, jnp.maximum(spectrum, least), n_source)


def rotate(rows: Array, rotation: Array) -> Array:
    """Rows (..., K) times a rotation (K, K), in the rows' storage dtype."""
    turned = jnp.matmul(rows.astype(rotation.dtype), rotation, precision=PRECISION)
    return rounded(turned, rows.dtype)


def rounded(rows: Array, dtype: Any) -> Array:
    """Rows as a table stores them: each number the nearest of the dtype.

    Stochastic rounding to bfloat16 ranked no better (docs/performance.md).
    """
    return rows.astype(dtype)


def diagonal(basis: Basis, objective: Objective, lengths: Array) -> Array:
    """Diagonal part a0 s + lam_u of equation (3) for rows of `lengths` (R,): (R, K)."""
    spectrum = objective.unobserved_weight * basis.spectrum
    lam = ridge(objective, lengths.astype(spectrum.dtype), basis.n_source)
    return spectrum[None, :] + lam[:, None]


class Block(NamedTuple):
    """Gathered entries of R rows: source rows E (R, L, K) and the weights w, v (R, L)."""

    rows: Array
    w: Array
    v: Array


def gather(
    table: Array, objective: Objective, ids: Array, values: Array | None, left: Array, dtype: Any
) -> Block:
    """Gather the rows of a table for cells (R, L), of which the first `left` (R,) are entries.

    `values` (R, L) may be of a narrower dtype; None means that all are 1.
    """
    # Ids come from the layout, so they are in bounds; any other mode costs a select per element.
    rows = table.at[ids].get(mode="promise_in_bounds").astype(dtype)
    live = lax.broadcasted_iota(jnp.int32, ids.shape, 1) < left[:, None]
    values = jnp.ones(ids.shape, dtype) if values is None else values.astype(dtype)
    w, v = confidence(objective, values)
    zero = jnp.zeros((), dtype)
    return Block(rows, jnp.where(live, w, zero), jnp.where(live, v, zero))


def predict(block: Block, z: Array) -> Array:
    """E z: predictions (R, L) of the block's cells for rows z (R, K)."""
    return jnp.einsum("rlk,rk->rl", block.rows, z, precision=PRECISION)


def project(block: Block, t: Array) -> Array:
    """E^T t: (R, K) of cell values t (R, L)."""
    return jnp.einsum("rlk,rl->rk", block.rows, t, precision=PRECISION)


def normal(block: Block, p: Array) -> Array:
    """E^T W E p, the data part of the matrix of equation (1) times p (R, K)."""
    return project(block, block.w * predict(block, p))


def curvature(block: Block, p: Array) -> Array:
    """p^T E^T W E p of each row (R, 1)."""
    return jnp.sum(block.w * jnp.square(predict(block, p)), axis=1, keepdims=True)


def residual(block: Block, z: Array) -> Array:
    """E^T (v - W E z), the data part of the residual of equation (1) at z (R, K)."""
    return project(block, block.v - block.w * predict(block, z))


def rows_diagonal(rhs: Array, d: Array) -> Array:
    """Equation (3) where every w is 0: E^T v (R, K) over the diagonal part d."""
    return rhs / d


def rows_cg(
    normal: Callable[[Array], Array],
    curvature: Callable[[Array], Array],
    r: Array,
    z: Array,
    d: Array,
    steps: int,
) -> Array:
    """Conjugate gradients on equation (3), preconditioned by its diagonal part (R, K).

    Parameters
    ----------
    normal : callable
        p -> E^T W E p.
    curvature : callable
        p -> p^T E^T W E p, (R, 1): half the work, and all that the last step needs.
    r : (R, K)
        Data part of the residual at `z`.
    z : (R, K)
        Start.
    d : (R, K)
        That diagonal part, a0 s + lam_u.
    steps : int
        Steps to take, 1 or more.
    """
    tiny = jnp.finfo(z.dtype).tiny
    r = r - d * z
    y = r / d
    p, size = y, jnp.sum(r * y, axis=1, keepdims=True)
    for _ in range(steps - 1):
        image = d * p + normal(p)
        a = size / jnp.maximum(jnp.sum(p * image, axis=1, keepdims=True), tiny)
        z, r = z + a * p, r - a * image
        y = r / d
        last, size = size, jnp.sum(r * y, axis=1, keepdims=True)
        p = y + size / jnp.maximum(last, tiny) * p
    bend = jnp.sum(d * p * p, axis=1, keepdims=True) + curvature(p)
    return z + size / jnp.maximum(bend, tiny) * p


def relax(before: Array, solved: Array, relaxation: Any) -> Array:
    """Go `relaxation` times the way from the rows before to the solved ones (R, K).

    Block by block, ALS is Gauss-Seidel on the loss; this makes it successive over-relaxation. The
    loss is quadratic in the rows, so between 0 and 2 it still cannot rise. See docs/math.md.
    """
    return (1 - relaxation) * before + relaxation * solved


def accumulate(block: Block) -> tuple[Array, Array]:
    """Data parts of equation (1): E^T W E (R, K, K) and E^T v (R, K)."""
    weighted = block.rows * block.w[:, :, None]
    matrix = jnp.einsum("rlk,rlj->rkj", weighted, block.rows, precision=PRECISION)
    return matrix, project(block, block.v)


def direct(matrix: Array, rhs: Array) -> Array:
    """Solve systems (R, K, K), symmetric and positive semi-definite, by Cholesky.

    Where a factorisation fails (rank-deficient and no ridge), the block is factored again with a
    ridge of a few rounding errors of its mean diagonal, which picks nearly the least-norm solution.
    """
    upper = _factorise_semidefinite(matrix)
    return lax.platform_dependent(upper, rhs, cpu=_substitute, default=_triangular)


def _factorise_semidefinite(matrix: Array) -> Array:
    """Factorise as `_factorise`, again with a ridge where that failed. One loop, compiled once."""
    size = matrix.shape[1]
    mean = jnp.trace(matrix, axis1=1, axis2=2)[:, None, None] / size
    ridge = 4 * size * jnp.finfo(matrix.dtype).eps * mean + jnp.finfo(matrix.dtype).tiny
    ridge = ridge * jnp.eye(size, dtype=matrix.dtype)[None]

    def failed(upper: Array) -> Array:
        return ~jnp.all(jnp.isfinite(upper), axis=(1, 2))

    def again(carry: tuple[Any, Array]) -> tuple[Any, Array]:
        tries, upper = carry
        factor = _factorise(jnp.where(tries > 0, matrix + ridge, matrix))
        return tries + 1, jnp.where(failed(upper)[:, None, None], factor, upper)

    def unfinished(carry: tuple[Any, Array]) -> Array:
        return (carry[0] < 2) & jnp.any(failed(carry[1]))

    return lax.while_loop(unfinished, again, (0, jnp.full_like(matrix, jnp.nan)))[1]


def _factorise(matrix: Array) -> Array:
    """U with U^T U = matrix (R, K, K); NaN where a matrix is not positive definite.

    XLA's Cholesky and triangular solve on CPU wait for a thread pool of its own, and deadlock where
    several programs run at once, as work shards and CPU devices do. So the CPU has plain loops.
    """
    return lax.platform_dependent(
        matrix, cpu=_factorise_rows, default=lambda m: jnp.linalg.cholesky(m, upper=True)
    )


def _factorise_rows(matrix: Array) -> Array:
    """Cholesky by panels of rows of U, vectorised over R.

    A panel first loses, by one product, what the panels above account for.
    """
    size = matrix.shape[1]
    height = max(-(-size // _PANELS), _LEAST_PANEL)
    upper = jnp.zeros_like(matrix)
    for low in range(0, size, height):
        high = min(low + height, size)
        panel = matrix[:, low:high, low:]
        if low:
            above = upper[:, :low, low:]
            panel = panel - jnp.einsum(
                "rij,rik->rjk", above[:, :, : high - low], above, precision=PRECISION
            )
        upper = upper.at[:, low:high, low:].set(_factorise_panel(panel))
    return upper


def _factorise_panel(panel: Array) -> Array:
    """The top rows (R, P, n >= P) of U, row by row, each from the rows above it."""
    columns = jnp.arange(panel.shape[2])[None]

    def body(k: Any, upper: Array) -> Array:
        line = lax.dynamic_index_in_dim(panel, k, 1, keepdims=False)
        above = lax.dynamic_index_in_dim(upper, k, 2, keepdims=False)
        line = line - jnp.einsum("ri,rik->rk", above, upper, precision=PRECISION)
        pivot = jnp.sqrt(lax.dynamic_slice_in_dim(line, k, 1, 1))
        line = jnp.where(columns >= k, line / pivot, 0)
        return lax.dynamic_update_slice_in_dim(upper, line[:, None, :], k, 1)

    return lax.fori_loop(0, panel.shape[1], body, jnp.zeros_like(panel))


def _substitute(upper: Array, rhs: Array) -> Array:
    """Solve U^T U z = rhs (R, K) row by row of U."""
    last = upper.shape[1] - 1

    def row(k: Any) -> tuple[Array, Array]:
        line = lax.dynamic_index_in_dim(upper, k, 1, keepdims=False)
        return line, lax.dynamic_slice_in_dim(line, k, 1, 1)

    def forward(k: Any, y: Array) -> Array:
        line, pivot = row(k)
        value = lax.dynamic_slice_in_dim(y, k, 1, 1) / pivot
        # Entries before k are final: the line is zero there.
        return lax.dynamic_update_slice_in_dim(y - line * value, value, k, 1)

    def backward(step: Any, z: Array) -> Array:
        k = last - step
        line, pivot = row(k)
        # Entries of z up to k are still zero, so the whole line may be summed.
        rest = jnp.sum(line * z, axis=1, keepdims=True)
        value = (lax.dynamic_slice_in_dim(y, k, 1, 1) - rest) / pivot
        return lax.dynamic_update_slice_in_dim(z, value, k, 1)

    y = lax.fori_loop(0, last + 1, forward, rhs)
    return lax.fori_loop(0, last + 1, backward, jnp.zeros_like(rhs))


def _triangular(upper: Array, rhs: Array) -> Array:
    z = lax.linalg.triangular_solve(upper, rhs[..., None], left_side=True, transpose_a=True)
    return lax.linalg.triangular_solve(upper, z, left_side=True)[..., 0]


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


def rows_subspace(block: Block, d: Array, z: Array, block_size: int) -> Array:
    """One sweep of iALS++ over blocks of factors, each solved exactly with the others fixed.

    Predictions of the stored cells are kept and corrected, not recomputed. In the eigenbasis the
    unobserved cells add the diagonal d alone, so a block costs no product with the gramian.

    References
    ----------
    Rendle, Krichene, Zhang, Koren (2021), arXiv 2110.14044, algorithm 2.
    """
    n_factors = z.shape[1]
    size = min(block_size, n_factors)
    spare = -n_factors % size
    rows = jnp.pad(block.rows, ((0, 0), (0, 0), (0, spare)))
    d = jnp.pad(d, ((0, 0), (0, spare)), constant_values=1)
    z = jnp.pad(z, ((0, 0), (0, spare)))

    def body(step: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        z, t = carry
        own, own_d, own_z = (
            lax.dynamic_slice_in_dim(a, step * size, size, -1) for a in (rows, d, z)
        )
        part = Block(own, block.w, block.v - block.w * t)
        matrix, rhs = accumulate(part)
        change = rows_direct((matrix, rhs - own_d * own_z), own_d)
        z = lax.dynamic_update_slice_in_dim(z, own_z + change, step * size, 1)
        return z, t + predict(part, change)

    start = (z, predict(Block(rows, block.w, block.v), z))
    return lax.fori_loop(0, z.shape[1] // size, body, start)[0][:, :n_factors]


def cells_loss(block: Block, z: Array) -> Array:
    """What stored cells add to the loss beyond the unobserved term and a constant |c| each (R,)."""
    t = predict(block, z)
    return jnp.sum((block.w * t - 2 * block.v) * t, axis=1)


def finite_rows(z: Array) -> Array:
    """Whether each row (R,) of a table is free of NaN and infinity."""
    return jnp.all(jnp.isfinite(z), axis=-1)


def zero_empty(z: Array, lengths: Array) -> Array:
    """Rows without entries, and unused ones, are zero: equation (1) has right-hand side 0."""
    return jnp.where(lengths[..., None] > 0, z, jnp.zeros((), z.dtype))
