"""Solve batches of symmetric positive semi-definite systems. docs/math.md derives the systems.

Axis letters: R systems, K unknowns, P rows of a panel.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

_PANELS, _LEAST_PANEL = 4, 16  # number and least height of panels on CPU; each must be compiled


def direct(matrix: Array, rhs: Array) -> Array:
    """Solve systems (R, K, K), symmetric and positive semi-definite, by Cholesky.

    If a factorisation fails (rank-deficient and no ridge), the matrix is factorised again with a
    ridge of a few rounding errors of its mean diagonal, which gives nearly the least-norm solution.
    """
    upper = _factorise_semidefinite(matrix)
    return lax.platform_dependent(upper, rhs, cpu=_substitute, default=_triangular)


def _factorise_semidefinite(matrix: Array) -> Array:
    """Like `_factorise`, then again with a ridge where it failed. One loop, compiled once."""
    size = matrix.shape[1]
    mean = jnp.trace(matrix, axis1=1, axis2=2)[:, None, None] / size
    ridge = 4 * size * jnp.finfo(matrix.dtype).eps * mean + jnp.finfo(matrix.dtype).tiny
    ridge = ridge * jnp.eye(size, dtype=matrix.dtype)[None]

    def failed(upper: Array) -> Array:
        return ~jnp.all(jnp.isfinite(upper), axis=(1, 2))

    def again(carry: tuple[int, Array]) -> tuple[int, Array]:
        tries, upper = carry
        factor = _factorise(jnp.where(tries > 0, matrix + ridge, matrix))
        return tries + 1, jnp.where(failed(upper)[:, None, None], factor, upper)

    def unfinished(carry: tuple[int, Array]) -> Array:
        return (carry[0] < 2) & jnp.any(failed(carry[1]))

    return lax.while_loop(unfinished, again, (0, jnp.full_like(matrix, jnp.nan)))[1]


def _factorise(matrix: Array) -> Array:
    """U with U^T U = matrix (R, K, K); NaN where a matrix is not positive definite.

    XLA's Cholesky and triangular solve on CPU wait for XLA's thread pool, and deadlock if several
    programs run at once, as with work shards and CPU devices. So plain loops are used on the CPU.
    """
    return lax.platform_dependent(
        matrix, cpu=_factorise_rows, default=lambda m: jnp.linalg.cholesky(m, upper=True)
    )


def _factorise_rows(matrix: Array) -> Array:
    """Cholesky by panels of rows of U, vectorised over R.

    One product first subtracts the contribution of the panels above from a panel.
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
                "rij,rik->rjk", above[:, :, : high - low], above, precision=lax.Precision.HIGHEST
            )
        upper = upper.at[:, low:high, low:].set(_factorise_panel(panel))
    return upper


def _factorise_panel(panel: Array) -> Array:
    """Factorise the top rows (R, P, n >= P) of U, each from the rows above it."""
    columns = jnp.arange(panel.shape[2])[None]

    def body(k: int, upper: Array) -> Array:
        line = lax.dynamic_index_in_dim(panel, k, 1, keepdims=False)
        above = lax.dynamic_index_in_dim(upper, k, 2, keepdims=False)
        line = line - jnp.einsum("ri,rik->rk", above, upper, precision=lax.Precision.HIGHEST)
        pivot = jnp.sqrt(lax.dynamic_slice_in_dim(line, k, 1, 1))
        line = jnp.where(columns >= k, line / pivot, 0)
        return lax.dynamic_update_slice_in_dim(upper, line[:, None, :], k, 1)

    return lax.fori_loop(0, panel.shape[1], body, jnp.zeros_like(panel))


def _substitute(upper: Array, rhs: Array) -> Array:
    """Solve U^T U z = rhs (R, K) row by row of U."""
    last = upper.shape[1] - 1

    def row(k: int) -> tuple[Array, Array]:
        line = lax.dynamic_index_in_dim(upper, k, 1, keepdims=False)
        return line, lax.dynamic_slice_in_dim(line, k, 1, 1)

    def forward(k: int, y: Array) -> Array:
        line, pivot = row(k)
        value = lax.dynamic_slice_in_dim(y, k, 1, 1) / pivot
        # Entries before k are final: the line is zero there.
        return lax.dynamic_update_slice_in_dim(y - line * value, value, k, 1)

    def backward(step: int, z: Array) -> Array:
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
