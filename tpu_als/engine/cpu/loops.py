"""Loops that solve rows by conjugate gradients, compiled by numba.

`compiled.loops` imports this module when it is needed. Each row is processed by itself, without
padding. One pass over its entries computes both products of a CG step. The algebra is in
docs/math.md; `engine.xla.solve` has the same.

Source rows are accessed by index and never sliced: numba would count the references to a slice, in
memory that all threads share. Statements are unrolled by hand: inner loops or functions would make
the work take 1.5 times as long.

Axis letters: R rows, E entries, N source rows, K factors including pads to whole cache lines.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tpu_als.engine import objective as equations
from tpu_als.engine.cpu.intrinsics import prefetch, widen
from tpu_als.engine.cpu.jit import compiled, inner
from tpu_als.engine.objective import Objective

# Number of entries that are summed in the rows' dtype, before a float64 total adds the sum.
# A multiple of four. It bounds the rounding error of a row's sums, whatever the row's length.
BLOCK = 1024


class Entries(NamedTuple):
    """The entries of some rows, and the source rows that they refer to.

    Attributes
    ----------
    source : (N, K)
        Source rows: float32, float64, or the bits of bfloat16 numbers as uint16.
    ids : uint32 (E,)
        Source row of each entry.
    values : (E,)
        Values in the dtype of the solved rows; empty if all are 1.
    ahead : int
        How many entries ahead source rows are prefetched; 0 for no prefetching.
    """

    source: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    ahead: int


class Starts(NamedTuple):
    """Where the entries of R rows are, and what the rows are drawn to.

    Attributes
    ----------
    cells, lengths : int (R,)
        First entry and number of entries of each row.
    priors : (R, K) or (0, K)
        The vectors that the ridge draws the rows to, in the eigenbasis; none for zero vectors.
    """

    cells: np.ndarray
    lengths: np.ndarray
    priors: np.ndarray


class Diagonal(NamedTuple):
    """The diagonal part of equation (3), and the bounds that keep its numbers finite.

    Attributes
    ----------
    spectrum : (K,)
        Eigenvalues of the source's gramian times the unobserved weight.
    top : number
        The largest of them, pads not counted.
    n_source : number
        Number N of source rows.
    weight : number
        Bound on the weights w.
    reach : number
        CG starts at zero if the least element of the diagonal is above this number
        (`objective.DOMINANT`).
    tiny, most : number
        The least divisor, and the largest number.
    """

    spectrum: np.ndarray
    top: float
    n_source: float
    weight: float
    reach: float
    tiny: float
    most: float


class Sums(NamedTuple):
    """Where the products of a row's entries are summed.

    Attributes
    ----------
    out : (K,)
        The vector that they are added to.
    block : (K,)
        Scratch, for the sum of a block of a long row.
    total : float64 (K,)
        Scratch, for the sum of all blocks.
    """

    out: np.ndarray
    block: np.ndarray
    total: np.ndarray


confidence = inner(equations.confidence)
_ridge = inner(equations.ridge)


@inner
def add_products(
    entries: Entries,
    objective: Objective,
    span: tuple[int, int],
    scales: tuple[float, float],
    p: np.ndarray,
    out: np.ndarray,
) -> None:
    """Add E^T s of some entries to `out`, with s = scales[0] v + scales[1] W t and t = E p.

    `span` has the first entry and the number of entries.

    Four entries are handled at a time, so that their rows are still in the nearest cache for the
    second of two products.
    """
    source, ids, values, ahead = entries
    (first, n), (on_targets, on_predictions) = span, scales
    kind = p.dtype.type
    address, row_bytes = source.ctypes.data, len(p) * source.itemsize
    zero, one, end = kind(0), kind(1), first + n
    w, v = confidence(objective, one)
    w0 = w1 = w2 = w3 = on_predictions * kind(w)
    v0 = v1 = v2 = v3 = on_targets * kind(v)
    for at in range(first, end - 3, 4):
        i0, i1, i2, i3 = ids[at], ids[at + 1], ids[at + 2], ids[at + 3]
        if ahead:
            for soon in range(at + ahead, min(at + ahead + 4, len(ids))):
                for byte in range(0, row_bytes, 64):
                    prefetch(address + ids[soon] * row_bytes + byte)
        t0, t1, t2, t3 = zero, zero, zero, zero
        if on_predictions != zero:
            for k in range(len(p)):
                t0 += widen(source[i0, k]) * p[k]
                t1 += widen(source[i1, k]) * p[k]
                t2 += widen(source[i2, k]) * p[k]
                t3 += widen(source[i3, k]) * p[k]
        if len(values):
            w, v = confidence(objective, values[at])
            w0, v0 = on_predictions * kind(w), on_targets * kind(v)
            w, v = confidence(objective, values[at + 1])
            w1, v1 = on_predictions * kind(w), on_targets * kind(v)
            w, v = confidence(objective, values[at + 2])
            w2, v2 = on_predictions * kind(w), on_targets * kind(v)
            w, v = confidence(objective, values[at + 3])
            w3, v3 = on_predictions * kind(w), on_targets * kind(v)
        s0, s1, s2, s3 = w0 * t0 + v0, w1 * t1 + v1, w2 * t2 + v2, w3 * t3 + v3
        for k in range(len(p)):
            out[k] += (
                s0 * widen(source[i0, k])
                + s1 * widen(source[i1, k])
                + s2 * widen(source[i2, k])
                + s3 * widen(source[i3, k])
            )
    for at in range(end - n % 4, end):
        i0, t0 = ids[at], zero
        for k in range(len(p)):
            t0 += widen(source[i0, k]) * p[k]
        w, v = confidence(objective, values[at] if len(values) else one)
        s0 = on_predictions * kind(w) * t0 + on_targets * kind(v)
        for k in range(len(p)):
            out[k] += s0 * widen(source[i0, k])


@inner
def _curvature(
    entries: Entries, objective: Objective, first: int, n: int, scale: float, p: np.ndarray
) -> float:
    """scale p^T E^T W E p of n entries: half the work of `add_products`."""
    source, ids, values, ahead = entries
    kind = p.dtype.type
    address, row_bytes = source.ctypes.data, len(p) * source.itemsize
    zero, one, end = kind(0), kind(1), first + n
    total, (w, _) = zero, confidence(objective, one)
    w0 = w1 = w2 = w3 = scale * kind(w)
    for at in range(first, end - 3, 4):
        i0, i1, i2, i3 = ids[at], ids[at + 1], ids[at + 2], ids[at + 3]
        if ahead:
            for soon in range(at + ahead, min(at + ahead + 4, len(ids))):
                for byte in range(0, row_bytes, 64):
                    prefetch(address + ids[soon] * row_bytes + byte)
        t0, t1, t2, t3 = zero, zero, zero, zero
        for k in range(len(p)):
            t0 += widen(source[i0, k]) * p[k]
            t1 += widen(source[i1, k]) * p[k]
            t2 += widen(source[i2, k]) * p[k]
            t3 += widen(source[i3, k]) * p[k]
        if len(values):
            w0 = scale * kind(confidence(objective, values[at])[0])
            w1 = scale * kind(confidence(objective, values[at + 1])[0])
            w2 = scale * kind(confidence(objective, values[at + 2])[0])
            w3 = scale * kind(confidence(objective, values[at + 3])[0])
        total += w0 * t0 * t0 + w1 * t1 * t1 + w2 * t2 * t2 + w3 * t3 * t3
    for at in range(end - n % 4, end):
        i0, t0 = ids[at], zero
        for k in range(len(p)):
            t0 += widen(source[i0, k]) * p[k]
        w, _ = confidence(objective, values[at] if len(values) else one)
        total += scale * kind(w) * t0 * t0
    return total


@inner
def _add_all_products(
    entries: Entries,
    objective: Objective,
    span: tuple[int, int],
    scales: tuple[float, float],
    p: np.ndarray,
    sums: Sums,
) -> None:
    """`add_products` of a whole row, whose sums may be long.

    The sums of a long row's blocks are added in float64. Compensated sums cannot be used, because
    the compiler may reorder them.
    """
    (first, n), (out, part, total) = span, sums
    kind, is_long = out.dtype.type, n > BLOCK
    target = part if is_long else out
    if is_long:
        for k in range(len(out)):
            total[k] = out[k]
    for low in range(first, first + n, BLOCK):
        if is_long:
            for k in range(len(out)):
                part[k] = kind(0)
        count = min(first + n - low, BLOCK)
        add_products(entries, objective, (low, count), scales, p, target)
        if is_long:
            for k in range(len(out)):
                total[k] += part[k]
    if is_long:
        for k in range(len(out)):
            out[k] = kind(total[k])


@inner
def _whole_curvature(
    entries: Entries, objective: Objective, span: tuple[int, int], scale: float, p: np.ndarray
) -> float:
    """`_curvature` of a whole row; the sums of its blocks are added in float64."""
    (first, n), total = span, np.float64(0)
    for low in range(first, first + n, BLOCK):
        count = min(first + n - low, BLOCK)
        total += _curvature(entries, objective, low, count, scale, p)
    return p.dtype.type(total)


@inner
def scaled(
    objective: Objective, diagonal: Diagonal, n: int, steps: int, d: np.ndarray, inverse: np.ndarray
) -> tuple[float, float, bool, float]:
    """Write a row's scaled diagonal part D to `d`, and a multiple of D^-1 to `inverse`.

    Returns the scale (`xla.solve.equation_scale`), the multiple, whether CG starts at zero
    (`xla.solve.initial_rows`), and the scaled ridge.
    """
    spectrum, top, n_source, weight, reach, tiny, most = diagonal
    kind = d.dtype.type
    one, lam = kind(1), kind(0)
    if objective.regularization > lam:  # the power may overflow
        lam = min(kind(_ridge(objective, kind(n), n_source)), most)
    # A power of two, so that a bound of other rows' weights does not change the last bits.
    _, exponent = math.frexp(min(max(top + lam + weight, tiny), most / kind(64)))
    scale = kind(math.ldexp(1.0, -exponent))
    unit = (top + lam) * scale if steps else one
    for k in range(len(d)):
        d[k] = (spectrum[k] + lam) * scale
        inverse[k] = (unit + tiny) / (d[k] + tiny)
    return scale, unit, steps == 0 or spectrum[0] + lam > reach, lam * scale


class Solver(NamedTuple):
    """How rows are solved.

    Attributes
    ----------
    relaxation : number
        As in `xla.solve.relax`.
    steps : int
        Steps of CG; 0 where every weight w is 0.
    """

    relaxation: float
    steps: int


@inner
def _write(rows: np.ndarray, row: int, z: np.ndarray, relaxation: float) -> None:
    """Write the solution z of a row, relaxed."""
    one = z.dtype.type(1)
    for k in range(len(z)):
        if relaxation == one:  # reordered sums would lose precision if the old row is large
            rows[row, k] = z[k]
        else:
            rows[row, k] = (one - relaxation) * rows[row, k] + relaxation * z[k]


@compiled
def solve_rows(
    rows: np.ndarray,
    starts: Starts,
    entries: Entries,
    objective: Objective,
    diagonal: Diagonal,
    solver: Solver,
) -> None:
    """Solve R rows, as `xla.sweep.solve_block` does in the eigenbasis.

    Parameters
    ----------
    rows : (R, K)
        The initial rows; they are overwritten with the solved ones, and with zeros for rows without
        entries.
    starts : Starts
        Where their entries are, and what they are drawn to.
    entries : Entries
        The entries.
    objective : Objective
        Equations (1)-(2), in the dtype of the rows.
    diagonal : Diagonal
        The diagonal part of equation (3).
    solver : Solver
        How to solve them.
    """
    (cells, lengths, priors), (relaxation, steps) = starts, solver
    vectors = np.empty((7, rows.shape[1]), rows.dtype)
    z, p, r, image = vectors[0], vectors[1], vectors[2], vectors[3]
    d, inverse = vectors[4], vectors[5]
    part, total = vectors[6], np.empty(rows.shape[1])
    zero, tiny = z.dtype.type(0), diagonal.tiny
    for row in range(len(lengths)):
        first, n = cells[row], lengths[row]
        if n == 0:
            for k in range(len(z)):
                rows[row, k] = zero
            continue
        scale, _, is_new, lam = scaled(objective, diagonal, n, steps, d, inverse)
        size = bend = zero
        for k in range(len(z)):
            z[k] = zero if is_new else rows[row, k]
            r[k] = -d[k] * z[k]
        if len(priors):
            for k in range(len(z)):
                r[k] += lam * priors[row, k]
        scales = scale, zero if is_new else -scale
        # Pass -1 computes the residual at z; passes 0, 1, ... are the steps of CG. There is one
        # call of each function, because each call is inlined and compiled anew.
        for step in range(-1, steps):
            is_last = step == steps - 1 and step >= 0
            given, out = (vectors[0], vectors[2]) if step < 0 else (vectors[1], vectors[3])
            bend = zero
            if is_last:
                bend = _whole_curvature(entries, objective, (first, n), scale, given)
            else:
                sums = Sums(out, part, total)
                _add_all_products(entries, objective, (first, n), scales, given, sums)
            if step < 0:
                for k in range(len(z)):
                    p[k] = r[k] * inverse[k]
                    size += r[k] * p[k]
                    if not steps:
                        z[k] = p[k]
                    image[k] = d[k] * p[k]
                scales = zero, scale
                continue
            for k in range(len(z)):
                bend += image[k] * p[k]
            a, last = size / max(bend, tiny), size
            size = zero
            for k in range(len(z)):
                z[k] += a * p[k]
                r[k] -= a * image[k]
                size += r[k] * r[k] * inverse[k]
            b = size / max(last, tiny)
            for k in range(len(z)):
                p[k] = r[k] * inverse[k] + b * p[k]
                image[k] = d[k] * p[k]
        _write(rows, row, z, relaxation)
