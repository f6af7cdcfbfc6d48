"""Loops that solve rows to convergence, compiled by numba.

`compiled.converging` imports this module when it is needed. Conjugate gradients run in the tables'
dtype until they have reduced the residual by as much as the dtype allows. Then the residual is
computed in float64, and they run again on what is left (iterative refinement).

Rows are rotated here and not by BLAS, whose last bits depend on the number of rows. So the bits of
a solution do not depend on the other rows.

Axis letters: R rows, E entries, N source rows, K factors, P of them and pads to whole cache lines.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from tpu_als.engine.cpu.jit import compiled, inner
from tpu_als.engine.cpu.loops import BLOCK, Diagonal, Entries, add_products, confidence, scaled
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

    Sums are float64, so that small components are as accurate as large ones: those in the
    directions of small eigenvalues decide the solution where the ridge is small. Four rows are
    processed at once, as the rotation does not fit into the nearest cache; n is a multiple of four.
    The id N stands for a row of zeros.
    """
    n_rows, n_factors, width = len(table), table.shape[1], rotation.shape[1]
    scalars, sums = np.empty((4, n_factors + n_factors % 2)), np.empty((4, width))
    for at in range(0, len(ids), 4):
        for j in range(4):
            row = ids[at + j]
            scalars[j, n_factors - 1 + n_factors % 2] = 0.0
            for k in range(n_factors):
                scalars[j, k] = table[row, k] if row < n_rows else 0.0
            for p in range(width):
                sums[j, p] = 0.0
        for k in range(0, n_factors, 2):
            k2 = min(k + 1, n_factors - 1)
            a0, a1, a2, a3 = scalars[0, k], scalars[1, k], scalars[2, k], scalars[3, k]
            b0, b1, b2, b3 = (
                scalars[0, k + 1], scalars[1, k + 1], scalars[2, k + 1], scalars[3, k + 1],
            )  # fmt: skip
            for p in range(width):
                first, second = rotation[k, p], rotation[k2, p]
                sums[0, p] += a0 * first + b0 * second
                sums[1, p] += a1 * first + b1 * second
                sums[2, p] += a2 * first + b2 * second
                sums[3, p] += a3 * first + b3 * second
        for j in range(4):
            for p in range(width):
                out[at + j, p] = sums[j, p]


@inner
def _weights_of(entries: Entries, objective: Objective, first: Any, n: Any) -> Any:
    """The least weight w of a row, and its largest absolute one."""
    values = entries.values
    w, _ = confidence(objective, values[first] if len(values) else entries.source.dtype.type(1))
    least = most = w
    if len(values):
        for at in range(first + 1, first + n):
            w, _ = confidence(objective, values[at])
            least, most = min(least, w), max(most, w)
    return least, max(most, -least)


@inner
def _reduce(
    entries: Entries, objective: Objective, span: Any, vectors: Any, numbers: Any, limits: Any
) -> Any:
    """Steps of CG on the scaled system, from zero.

    `vectors` are the residual r, the scaled diagonal d, the multiple of its inverse, and the
    solution to add to; then memory for p, A p and a part of A p. `numbers` are the scale, the least
    divisor and the float64 sums of a long row. `limits` are the target for r^T D^-1 r and the
    number of steps. Returns the number of steps taken, and the least p^T A p / p^T D p seen.
    """
    (first, n), (scale, tiny, total), (target, most) = span, numbers, limits
    r, d, inverse, x, p, image, part = vectors
    zero = r.dtype.type(0)
    size, least = zero, r.dtype.type(np.inf)
    for k in range(len(r)):
        p[k] = r[k] * inverse[k]
        size += r[k] * p[k]
    for step in range(most):
        if not size > target:
            return step, least
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
        bend = straight = zero
        for k in range(len(r)):
            bend += image[k] * p[k]
            straight += d[k] * p[k] * p[k]
        least = min(least, bend / max(straight, tiny))
        a, last = size / max(bend, tiny), size
        size = zero
        for k in range(len(r)):
            x[k] += a * p[k]
            r[k] -= a * image[k]
            size += r[k] * r[k] * inverse[k]
        b = size / max(last, tiny)
        for k in range(len(r)):
            p[k] = r[k] * inverse[k] + b * p[k]
    return most, least


@inner
def _residual(
    entries: Entries, objective: Objective, span: Any, scale: Any, vectors: Any
) -> tuple[Any, Any, Any, Any, Any]:
    """Write the residual r at z in float64.

    `vectors` are z, the scaled diagonal d, the multiple of its inverse, and r. Returns r^T D^-1 r,
    z^T D z and the squared lengths of D^-1 r and z; the first has the multiple as a factor, the
    third its square. The last number is the largest element of r.
    """
    z, d, inverse, residual = vectors
    size = energy = error = length = largest = np.float64(0)
    for k in range(len(z)):
        residual[k] = -d[k] * z[k]
        energy += d[k] * z[k] * z[k]
        length += z[k] * z[k]
    on_targets, on_predictions = np.float64(scale), -np.float64(scale)
    if energy == 0:
        on_predictions = np.float64(0)
    add_products(entries, objective, span, (on_targets, on_predictions), z, residual)
    for k in range(len(z)):
        size += residual[k] * residual[k] * inverse[k]
        error += (residual[k] * inverse[k]) ** 2
        largest = max(largest, abs(residual[k]))
    return size, energy, error, length, largest


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
        # Only the row's own weights count, so that those of other rows change nothing.
        least_weight, weight = _weights_of(entries, objective, first, n)
        own = Diagonal(
            diagonal.spectrum, diagonal.top, diagonal.n_source, min(weight, diagonal.weight),
            diagonal.reach, tiny, diagonal.most,
        )  # fmt: skip
        scale, unit, is_new = scaled(objective, own, n, 1, d, inverse)
        for k in range(width):
            z[k] = 0.0 if is_new else rows[row, k]
        span, left, share = (first, n), most, np.float64(1)
        is_solved: Any = False
        for turn in range(_ROUNDS):
            size, energy, error, length, largest = _residual(
                entries, objective, span, scale, (z, d, inverse, residual)
            )
            # A - share D has no negative eigenvalue. Negative weights make the share small.
            goal = (share * tolerance) ** 2 * unit * energy
            # The error may be longer, for its energy, than the solution: D^-1 r is about the error.
            if error * energy > length * size * unit:
                goal *= length * size * unit / (error * energy)
            is_solved = size == 0 or (size <= goal and (turn > 0 or least_weight >= 0))
            if is_solved or left == 0 or not share * tolerance > 4 * eps:
                break
            # CG runs on a residual of about 1, whose squares neither overflow nor underflow.
            raised = math.ldexp(1.0, -math.frexp(largest)[1])
            for k in range(width):
                r[k], x[k] = kind(residual[k] * raised), zero
            target = max(goal / 4, eps * size) * raised * raised
            steps, least = _reduce(
                entries, objective, span, (r, d, inverse, x, p, image, part),
                (scale, tiny, total), (kind(target), left),
            )  # fmt: skip
            error = np.float64(0)
            for k in range(width):
                z[k] += x[k] / raised
                error += (r[k] * inverse[k]) ** 2
            before, share = share, min(share, np.float64(least))
            is_short = error <= (share * tolerance * unit * raised) ** 2 * length
            # In the first round, errors of rounding may exceed the goal; in later ones, which start
            # from a small residual, they cannot.
            is_accurate = turn > 0 and steps < left and eps * size <= goal / 4
            is_solved = is_accurate and is_short and before <= 2 * share
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
