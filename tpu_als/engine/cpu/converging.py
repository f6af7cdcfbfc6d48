"""Loops that solve rows to convergence, compiled by numba.

`compiled.converging` imports this module when it is needed. Conjugate gradients run in the tables'
dtype until they have reduced the residual by as much as the dtype allows. Then the residual is
computed in float64, and they run again on what is left (iterative refinement).

Rows are rotated here and not by BLAS, whose last bits depend on the number of rows. So the bits of
a solution do not depend on the other rows.

Axis letters: R rows, E entries, N source rows, K factors, P of them and pads to whole cache lines.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tpu_als.engine.cpu.jit import compiled, inner
from tpu_als.engine.cpu.loops import BLOCK, Diagonal, Entries, add_products, scaled
from tpu_als.engine.objective import Objective

_ROUNDS = 8  # computations of the residual in float64; two are usual


class Limits(NamedTuple):
    """When CG ends.

    Attributes
    ----------
    tolerance : float
        CG ends when the norm of the preconditioned residual, which bounds the norm of the error, is
        at most this multiple of the solution's norm. Norms are those of the diagonal part of
        equation (3): the error's energy is at least z^T D z.
    steps : int
        Most steps of a row. A row that needs more becomes NaN.
    relaxation : float
        As in `xla.solve.relax`.
    """

    tolerance: Any
    steps: Any
    relaxation: Any


@compiled
def rotate(table: Any, ids: Any, rotation: Any, out: Any) -> None:
    """Write the products of n rows of a table (N, K) and a rotation (K, P) to `out` (n, P).

    n is a multiple of four, and so many rows are processed at once, as the rotation does not fit
    into the nearest cache. The id N stands for a row of zeros.
    """
    n_rows, n_factors, zero = len(table), table.shape[1], table.dtype.type(0)
    scalars = np.empty((4, n_factors + n_factors % 2), table.dtype)
    for at in range(0, len(ids), 4):
        for j in range(4):
            row = ids[at + j]
            scalars[j, n_factors - 1 + n_factors % 2] = zero
            for k in range(n_factors):
                scalars[j, k] = table[row, k] if row < n_rows else zero
            for p in range(rotation.shape[1]):
                out[at + j, p] = zero
        for k in range(0, n_factors, 2):
            k2 = min(k + 1, n_factors - 1)
            a0, a1, a2, a3 = scalars[0, k], scalars[1, k], scalars[2, k], scalars[3, k]
            b0, b1, b2, b3 = (
                scalars[0, k + 1], scalars[1, k + 1], scalars[2, k + 1], scalars[3, k + 1],
            )  # fmt: skip
            for p in range(rotation.shape[1]):
                first, second = rotation[k, p], rotation[k2, p]
                out[at, p] += a0 * first + b0 * second
                out[at + 1, p] += a1 * first + b1 * second
                out[at + 2, p] += a2 * first + b2 * second
                out[at + 3, p] += a3 * first + b3 * second


@inner
def _reduce(
    entries: Entries, objective: Objective, span: Any, vectors: Any, numbers: Any, limits: Any
) -> Any:
    """Steps of CG on the scaled system, from zero.

    `vectors` are the residual r, the scaled diagonal d, the multiple of its inverse, and the
    solution to add to; then memory for p, A p and a part of A p. `numbers` are the scale, the least
    divisor and the float64 sums of a long row. `limits` are the target for r^T D^-1 r and the
    number of steps. Returns the number of steps taken.
    """
    (first, n), (scale, tiny, total), (target, most) = span, numbers, limits
    r, d, inverse, x, p, image, part = vectors
    zero = r.dtype.type(0)
    size = zero
    for k in range(len(r)):
        p[k] = r[k] * inverse[k]
        size += r[k] * p[k]
    for step in range(most):
        if not size > target:
            return step
        for k in range(len(r)):
            image[k] = d[k] * p[k]
        is_long = n > BLOCK
        if is_long:  # blocks of a long row are summed in float64, as in `loops.solve_rows`
            for k in range(len(r)):
                total[k] = image[k]
        for low in range(first, first + n, BLOCK):
            if is_long:
                for k in range(len(r)):
                    part[k] = zero
            count = min(first + n - low, BLOCK)
            target_of_sum = part if is_long else image
            add_products(entries, objective, (low, count), (zero, scale), p, target_of_sum)
            if is_long:
                for k in range(len(r)):
                    total[k] += part[k]
        if is_long:
            for k in range(len(r)):
                image[k] = r.dtype.type(total[k])
        bend = zero
        for k in range(len(r)):
            bend += image[k] * p[k]
        a, last = size / max(bend, tiny), size
        size = zero
        for k in range(len(r)):
            x[k] += a * p[k]
            r[k] -= a * image[k]
            size += r[k] * r[k] * inverse[k]
        b = size / max(last, tiny)
        for k in range(len(r)):
            p[k] = r[k] * inverse[k] + b * p[k]
    return most


@compiled
def solve_rows(
    rows: Any, starts: Any, entries: Entries, objective: Objective, diagonal: Diagonal,
    limits: Limits,
) -> None:  # fmt: skip
    """Solve R rows of equation (3) to convergence.

    Parameters
    ----------
    rows : (R, P)
        The initial rows; they are overwritten with the solved ones, with zeros for rows without
        entries, and with NaN for rows that did not converge.
    starts, entries, objective, diagonal
        As in `loops.solve_rows`.
    limits : Limits
        When CG ends.
    """
    (cells, lengths), (tolerance, most, relaxation) = starts, limits
    width, kind = rows.shape[1], rows.dtype.type
    vectors, wide = np.empty((7, width), rows.dtype), np.zeros((3, width))
    r, d, inverse, x, p, image, part = (
        vectors[0], vectors[1], vectors[2], vectors[3], vectors[4], vectors[5], vectors[6],
    )  # fmt: skip
    z, residual, total = wide[0], wide[1], wide[2]
    zero, tiny, eps = kind(0), diagonal.tiny, np.finfo(rows.dtype).eps
    for row in range(len(lengths)):
        first, n = cells[row], lengths[row]
        if n == 0:
            for k in range(width):
                rows[row, k] = zero
            continue
        scale, unit, is_new = scaled(objective, diagonal, n, 1, d, inverse)
        for k in range(width):
            z[k] = 0.0 if is_new else rows[row, k]
        left, is_solved = most, False
        for turn in range(_ROUNDS):
            size = energy = np.float64(0)
            for k in range(width):
                residual[k] = -d[k] * z[k]
                energy += d[k] * z[k] * z[k]
            on_targets, on_predictions = np.float64(scale), -np.float64(scale)
            if energy == 0:
                on_predictions = np.float64(0)
            span, scales = (first, n), (on_targets, on_predictions)
            add_products(entries, objective, span, scales, z, residual)
            for k in range(width):
                size += residual[k] * residual[k] * inverse[k]
                r[k], x[k] = kind(residual[k]), zero
            goal = tolerance * tolerance * unit * energy
            is_solved = size <= goal
            if is_solved or left == 0:
                break
            steps = _reduce(
                entries, objective, span, (r, d, inverse, x, p, image, part),
                (scale, tiny, total), (kind(max(goal / 4, eps * size)), left),
            )  # fmt: skip
            for k in range(width):
                z[k] += x[k]
            # In the first round, errors of rounding may exceed the goal; in later ones, which start
            # from a small residual, they cannot.
            is_solved = turn > 0 and steps < left and eps * size <= goal / 4
            if is_solved:
                break
            left -= steps
        for k in range(width):
            if not is_solved:
                rows[row, k] = np.nan
            elif relaxation == 1:
                rows[row, k] = kind(z[k])
            else:
                rows[row, k] += kind(relaxation * (z[k] - rows[row, k]))


@compiled
def rotate_back(rows: Any, rotation: Any, out: Any) -> None:
    """Write the products of rows (R, P) and the transpose of a rotation (K, P) to `out` (R, K)."""
    for row in range(len(rows)):
        for k in range(out.shape[1]):
            total = rows[row, 0] * rotation[k, 0]
            for p in range(1, rotation.shape[1]):
                total += rows[row, p] * rotation[k, p]
            out[row, k] = total
