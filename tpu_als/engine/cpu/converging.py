"""Loops that solve rows to convergence, compiled by numba.

`compiled.converging` imports this module when it is needed. Conjugate gradients run in the tables'
dtype until they have reduced the residual by as much as the dtype allows. Then the residual is
computed in float64, and they run again on what is left (iterative refinement).

Axis letters: R rows, E entries, N source rows, K factors, P of them and pads to whole cache lines.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tpu_als.engine.cpu.intrinsics import prefetch
from tpu_als.engine.cpu.jit import compiled, inner
from tpu_als.engine.cpu.loops import BLOCK, Diagonal, Entries, Starts, confidence, scaled
from tpu_als.engine.cpu.memory import LINE
from tpu_als.engine.cpu.vectors import GROUP, add_rows, dots
from tpu_als.engine.objective import Objective

_ROUNDS = 8  # computations of the residual in float64; two are usual
_LARGEST_COPY = 1 << 21  # bytes of source rows; longer rows are copied by blocks, in each step


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

    tolerance: float
    steps: int
    relaxation: float


class Block(NamedTuple):
    """Copies of the entries of a row, one after the other: scratch.

    The elements after the last entry, up to a multiple of `GROUP`, are zero.

    Attributes
    ----------
    rows : (E, P)
        Source rows.
    weights, targets : (E,)
        The numbers w and v of equation (1), scaled.
    """

    rows: np.ndarray
    weights: np.ndarray
    targets: np.ndarray


@inner
def _copy(
    entries: Entries, objective: Objective, span: tuple[int, int], scale: float, block: Block
) -> None:
    """Copy some entries and their source rows, which the steps of CG then read from a cache."""
    source, ids, values, ahead = entries
    rows, weights, targets = block
    first, n = span
    address, row_bytes = source.ctypes.data, source.shape[1] * source.itemsize
    w, v = confidence(objective, source.dtype.type(1))
    for at in range(n):
        if ahead and first + at + ahead < len(ids):
            for byte in range(0, row_bytes, 64):
                prefetch(address + ids[first + at + ahead] * row_bytes + byte)
        i = ids[first + at]
        for k in range(source.shape[1]):
            rows[at, k] = source[i, k]
        if len(values):
            w, v = confidence(objective, values[first + at])
        weights[at], targets[at] = w * scale, v * scale
    for at in range(n, n + -n % GROUP):
        weights[at] = targets[at] = 0
        for k in range(source.shape[1]):
            rows[at, k] = 0


@inner
def _add_products(
    block: Block,
    span: tuple[int, int],
    factors: tuple[float, float],
    p: np.ndarray,
    s: np.ndarray,
    out: np.ndarray,
) -> None:
    """Add E^T s of some copied entries to `out`, with s = factors[0] v + factors[1] W E p.

    `s` is memory for a group of its elements.
    """
    rows, weights, targets = block
    (first, n), (on_targets, on_predictions) = span, factors
    for j in range(GROUP):
        s[j] = 0
    for at in range(first, first + n, GROUP):
        if on_predictions != 0:
            dots(rows, at, p, s)
        for j in range(GROUP):
            s[j] = on_predictions * weights[at + j] * s[j] + on_targets * targets[at + j]
        add_rows(rows, at, s, out)


@inner
def _weights_of(entries: Entries, objective: Objective, first: int, n: int) -> tuple[float, float]:
    """The least weight w of a row, and its largest absolute one."""
    values = entries.values
    w, _ = confidence(objective, values[first] if len(values) else entries.source.dtype.type(1))
    least = most = w
    if len(values):
        for at in range(first + 1, first + n):
            w, _ = confidence(objective, values[at])
            least, most = min(least, w), max(most, w)
    return least, max(most, -least)


class Round(NamedTuple):
    """What a round of CG starts from, and when it ends.

    Attributes
    ----------
    scale, tiny : number
        The scale of the system, and the least divisor.
    target : number
        CG ends when r^T D^-1 r is at most this.
    steps : int
        Most steps.
    """

    scale: float
    tiny: float
    target: float
    steps: int


@inner
def _reduce(
    entries: Entries,
    objective: Objective,
    span: tuple[int, int],
    block: Block,
    memory: tuple[np.ndarray, np.ndarray],
    turn: Round,
) -> tuple[int, float]:
    """Steps of CG on the scaled system, from zero.

    `memory` has vectors, and the float64 sums of a long row. The vectors are the residual r, the
    scaled diagonal d, the multiple of its inverse, and the solution to add to; then memory for p,
    A p, a part of A p and a group of numbers. Returns the number of steps taken, and the least
    p^T A p / p^T D p seen.
    """
    (first, n), (vectors, total), (scale, tiny, target, most) = span, memory, turn
    r, d, inverse, x, p, image, part, s = (
        vectors[0], vectors[1], vectors[2], vectors[3], vectors[4], vectors[5], vectors[6],
        vectors[7],
    )  # fmt: skip
    zero, one = r.dtype.type(0), r.dtype.type(1)
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
        for low in range(0, n, BLOCK):
            if is_long:
                for k in range(len(r)):
                    part[k] = zero
            count, at = min(n - low, BLOCK), low
            if n > len(block.weights):
                _copy(entries, objective, (first + low, count), scale, block)
                at = 0
            _add_products(block, (at, count), (zero, one), p, s, part if is_long else image)
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
    entries: Entries,
    objective: Objective,
    span: tuple[int, int],
    block: Block,
    scale: float,
    vectors: np.ndarray,
) -> tuple[float, float, float, float, float]:
    """Write the residual r at z in float64.

    `vectors` are z, the scaled diagonal d, the multiple of its inverse, r, memory for a group of
    numbers, and what the prior adds to the right side. Returns r^T D^-1 r, z^T D z and the squared
    lengths of D^-1 r and z; the first has the multiple as a factor, the third its square. The last
    number is the largest element of r.
    """
    (first, n), (z, d, inverse, residual, s, pull) = span, vectors
    size = energy = error = length = largest = np.float64(0)
    for k in range(len(z)):
        residual[k] = pull[k] - d[k] * z[k]
        energy += d[k] * z[k] * z[k]
        length += z[k] * z[k]
    factors = np.float64(1), np.float64(0 if energy == 0 else -1)
    for low in range(0, n, BLOCK):
        count, at = min(n - low, BLOCK), low
        if n > len(block.weights):
            _copy(entries, objective, (first + low, count), scale, block)
            at = 0
        _add_products(block, (at, count), factors, z, s, residual)
    for k in range(len(z)):
        size += residual[k] * residual[k] * inverse[k]
        error += (residual[k] * inverse[k]) ** 2
        largest = max(largest, abs(residual[k]))
    return size, energy, error, length, largest


@inner
def _block_for(lengths: np.ndarray, rows: np.ndarray) -> Block:
    """Memory for the copies of the longest row, or of a part of it if it is very long."""
    width, line, longest = rows.shape[1], LINE // rows.itemsize, 0
    for n in lengths:
        longest = max(longest, n)
    if longest * width * rows.itemsize > _LARGEST_COPY:
        longest = max(_LARGEST_COPY // (width * rows.itemsize), BLOCK)
    room = longest + -longest % GROUP
    memory = np.empty(room * width + line, rows.dtype)  # to begin at a cache line
    skipped = (LINE - memory.ctypes.data % LINE) % LINE // rows.itemsize
    copies = memory[skipped : skipped + room * width].reshape(room, width)
    numbers = np.empty((2, room), rows.dtype)
    return Block(copies, numbers[0], numbers[1])


@inner
def _begin(
    tables: tuple[np.ndarray, np.ndarray],
    row: int,
    is_new: bool,
    lam: float,
    z: np.ndarray,
    pull: np.ndarray,
) -> None:
    """Write the start of a row to `z`, and what its prior adds to the right side to `pull`.

    `tables` are the initial rows and the priors, if there are any.
    """
    rows, priors = tables
    for k in range(len(z)):
        z[k] = 0.0 if is_new else rows[row, k]
        if len(priors):
            pull[k] = np.float64(lam) * priors[row, k]


@inner
def _write(rows: np.ndarray, row: int, z: np.ndarray, is_solved: bool, relaxation: float) -> None:
    """Write the solution z of a row, relaxed, or NaN."""
    kind = rows.dtype.type
    for k in range(len(z)):
        if not is_solved:
            rows[row, k] = np.nan
        elif relaxation == 1:
            rows[row, k] = kind(z[k])
        else:
            rows[row, k] += kind(relaxation * (z[k] - rows[row, k]))


@compiled
def solve_rows(
    rows: np.ndarray, starts: Starts, entries: Entries,
    objective: Objective, diagonal: Diagonal, limits: Limits,
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
    (cells, lengths, priors), (tolerance, most, relaxation) = starts, limits
    width, kind = rows.shape[1], rows.dtype.type
    vectors, wide = np.empty((8, width), rows.dtype), np.zeros((5, width))
    r, d, inverse, x = vectors[0], vectors[1], vectors[2], vectors[3]
    z, residual, total, pull = wide[0], wide[1], wide[2], wide[4]
    zero, eps = kind(0), np.finfo(rows.dtype).eps
    spectrum, top, n_source, bound, reach, tiny, _ = diagonal
    block = _block_for(lengths, rows)
    for row in range(len(lengths)):
        first, n = cells[row], lengths[row]
        if n == 0:
            rows[row] = zero
            continue
        # Only the row's own weights count, so that those of other rows change nothing.
        least_weight, weight = _weights_of(entries, objective, first, n)
        own = Diagonal(spectrum, top, n_source, min(weight, bound), reach, tiny, diagonal.most)
        scale, unit, is_new, lam = scaled(objective, own, n, 1, d, inverse)
        _begin((rows, priors), row, is_new, lam, z, pull)
        span, left, share = (first, n), most, np.float64(1)
        if n <= len(block.weights):
            _copy(entries, objective, span, scale, block)
        is_solved: bool | np.bool_ = False
        for turn in range(_ROUNDS):
            size, energy, error, length, largest = _residual(
                entries, objective, span, block, scale, (z, d, inverse, residual, wide[3], pull)
            )
            # A - share D has no negative eigenvalue. Negative weights make the share small.
            goal = (share * tolerance) ** 2 * unit * energy
            # The error may be longer, for its energy, than the solution: D^-1 r is about the error.
            if error * energy > length * size * unit:
                goal *= length * size * unit / (error * energy)
            if not share * tolerance > 8 * eps:  # rounding of the source rows may change too much
                break
            is_solved = size == 0 or (size <= goal and (turn > 0 or least_weight >= 0))
            if is_solved or left == 0:
                break
            # CG runs on a residual of about 1, whose squares neither overflow nor underflow.
            raised = math.ldexp(1.0, -math.frexp(largest)[1])
            for k in range(width):
                r[k], x[k] = kind(residual[k] * raised), zero
            target = max(goal / 4, eps * size) * raised * raised
            steps, least = _reduce(
                entries, objective, span, block, (vectors, total),
                Round(scale, tiny, kind(target), left),
            )  # fmt: skip
            error = np.float64(0)
            for k in range(width):
                z[k] += x[k] / raised
                error += (r[k] * inverse[k]) ** 2
            before, share = share, min(share, np.float64(least))
            is_short = error <= (share * tolerance * unit * raised) ** 2 * length
            # In the first round, errors of rounding may exceed the goal; later residuals are small.
            is_accurate = turn > 0 and steps < left and eps * size <= goal / 4
            is_near = before <= 2 * share and share * tolerance > 8 * eps
            is_solved = is_accurate and is_short and is_near
            if is_solved:
                break
            left -= steps
        _write(rows, row, z, is_solved, relaxation)
