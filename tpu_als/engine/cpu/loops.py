"""The loops that `native` runs, in the subset of Python that numba compiles. Imports numba late.

Source rows are accessed by index and never sliced: numba would count the references to a slice, in
memory that all threads share. Statements are unrolled by hand: loops or functions would take half
as long again.

Axis letters: R rows, E entries, N source rows, K factors including pads to whole cache lines.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# Number of entries that are summed in the tables' dtype, before a float64 total adds the sum.
# A multiple of four. It bounds the rounding error of a row's sums, whatever the row's length.
BLOCK = 1024


def prefetch(address: Any) -> None:
    """Prefetch the cache line at an address; compiled as `_hint`."""


def _pass(
    entries: Any, first: Any, n: Any, p: Any, out: Any,
    on_targets: Any, on_predictions: Any, is_last: Any,
) -> Any:  # fmt: skip
    """Add E^T t of n entries to `out`, with t = on_targets v + on_predictions W E p.

    If `is_last`, only return t^T E p. Four entries are handled at a time, so that their rows are
    still in the nearest cache for the second of two products.
    """
    held, ids, values, alpha, offset, ahead = entries
    address, row_bytes = held.ctypes.data, len(p) * held.itemsize
    zero = p.dtype.type(0)
    bend = zero
    w0 = w1 = w2 = w3 = on_predictions * (abs(alpha) - offset)
    v0 = v1 = v2 = v3 = on_targets * max(alpha, zero)
    end = first + n
    for at in range(first, end - 3, 4):
        i0, i1, i2, i3 = ids[at], ids[at + 1], ids[at + 2], ids[at + 3]
        if ahead:
            for soon in range(at + ahead, min(at + ahead + 4, len(ids))):
                for byte in range(0, row_bytes, 64):
                    prefetch(address + ids[soon] * row_bytes + byte)
        t0, t1, t2, t3 = zero, zero, zero, zero
        if on_predictions != zero:
            for k in range(len(p)):
                t0 += held[i0, k] * p[k]
                t1 += held[i1, k] * p[k]
                t2 += held[i2, k] * p[k]
                t3 += held[i3, k] * p[k]
        if len(values):
            c0, c1 = alpha * values[at], alpha * values[at + 1]
            c2, c3 = alpha * values[at + 2], alpha * values[at + 3]
            w0, v0 = on_predictions * (abs(c0) - offset), on_targets * max(c0, zero)
            w1, v1 = on_predictions * (abs(c1) - offset), on_targets * max(c1, zero)
            w2, v2 = on_predictions * (abs(c2) - offset), on_targets * max(c2, zero)
            w3, v3 = on_predictions * (abs(c3) - offset), on_targets * max(c3, zero)
        s0, s1, s2, s3 = w0 * t0 + v0, w1 * t1 + v1, w2 * t2 + v2, w3 * t3 + v3
        if is_last:
            bend += s0 * t0 + s1 * t1 + s2 * t2 + s3 * t3
            continue
        for k in range(len(p)):
            out[k] += s0 * held[i0, k] + s1 * held[i1, k] + s2 * held[i2, k] + s3 * held[i3, k]
    for at in range(end - n % 4, end):
        i0, t0 = ids[at], zero
        for k in range(len(p)):
            t0 += held[i0, k] * p[k]
        c0 = alpha * values[at] if len(values) else alpha
        w0, v0 = on_predictions * (abs(c0) - offset), on_targets * max(c0, zero)
        s0 = w0 * t0 + v0
        if is_last:
            bend += s0 * t0
            continue
        for k in range(len(p)):
            out[k] += s0 * held[i0, k]
    return bend


def _long_pass(
    entries: Any, first: Any, n: Any, p: Any, out: Any,
    on_targets: Any, on_predictions: Any, is_last: Any, part: Any, total: Any,
) -> Any:  # fmt: skip
    """`_pass` for more entries than a block has: adds block sums `part` (K,) to `total` (K,).

    The total is float64. Compensated sums cannot be used, because the compiler may reorder them.
    """
    zero, bend, end = p.dtype.type(0), np.float64(0), first + n
    for k in range(len(p)):
        total[k] = zero
    for low in range(first, end, BLOCK):
        for k in range(len(p)):
            part[k] = zero
        count = min(end - low, BLOCK)
        bend += _pass(entries, low, count, p, part, on_targets, on_predictions, is_last)
        if not is_last:
            for k in range(len(p)):
                total[k] += part[k]
    if not is_last:
        for k in range(len(p)):
            out[k] += p.dtype.type(total[k])
    return p.dtype.type(bend)


def _scaled(ridge: Any, n: Any, diagonal: Any, d: Any, inverse: Any, steps: int) -> Any:
    """Write the diagonal part of a row's equation, scaled, and the inverse of its preconditioner.

    Returns the scale (`solve.scale`), and whether CG starts at zero (`solve.begin`).
    """
    spectrum, _, others, exponent, tiny, top, weight, reach, most = diagonal
    one = d.dtype.type(1)
    lam = min(ridge * min((d.dtype.type(n) + others) ** exponent, most), most)
    scale = one / min(max(top + lam + weight, tiny), most / d.dtype.type(64))
    unit = (top + lam) * scale if steps else one
    for k in range(len(d)):
        d[k] = (spectrum[k] + lam) * scale
        inverse[k] = (unit + tiny) / (d[k] + tiny)
    return scale, steps == 0 or spectrum[0] + lam > reach


def solve_rows(
    rows: Any, cells: Any, lengths: Any, entries: Any, diagonal: Any, relaxation: Any, steps: int,
    vectors: Any, total: Any,
) -> None:  # fmt: skip
    """Solve R rows, as `sweep.solve_block` does in the eigenbasis.

    Parameters
    ----------
    rows : (R, K)
        The initial rows; they are overwritten with the solved ones, and with zeros for rows without
        entries.
    cells, lengths : (R,)
        First entry and number of entries of each row.
    entries : tuple
        Source rows (N, K); their indices (E,), unsigned; values (E,), empty if all are 1; alpha and
        the offset of `solve.Objective`; how many entries ahead source rows are prefetched, 0 for
        no prefetching.
    diagonal : tuple
        Spectrum (K,) times the unobserved weight; the ridge's factor, the number added to a row's
        entries, and the exponent; the least divisor; the largest number of that spectrum; the
        largest weight w; the diagonal above which CG starts at zero; and the largest number.
    relaxation : float
        As in `solve.relax`.
    steps : int
        Steps of CG; 0 where every weight w is 0.
    vectors, total : (7, K)
        Scratch arrays; `total` (K,) is float64.
    """
    ridge, tiny = diagonal[1], diagonal[4]
    r, p, image, part = vectors[0], vectors[1], vectors[2], vectors[6]
    d, inverse, z = vectors[3], vectors[4], vectors[5]
    zero, one = z.dtype.type(0), z.dtype.type(1)
    # Variables instead of literals: `_pass` would be compiled again for each literal.
    yes = steps == steps
    no = not yes
    for row in range(len(lengths)):
        first, n = cells[row], lengths[row]
        if n == 0:
            for k in range(len(z)):
                rows[row, k] = zero
            continue
        scale, is_new = _scaled(ridge, n, diagonal, d, inverse, steps)
        size = zero
        for k in range(len(z)):
            z[k] = zero if is_new else rows[row, k]
            r[k] = -d[k] * z[k]
        on_z = zero if is_new else -scale
        if n <= BLOCK:
            _pass(entries, first, n, z, r, scale, on_z, no)
        else:
            _long_pass(entries, first, n, z, r, scale, on_z, no, part, total)
        for k in range(len(z)):
            p[k] = r[k] * inverse[k]
            size += r[k] * p[k]
            if not steps:
                z[k] = p[k]
        for step in range(steps):
            is_last = yes if step == steps - 1 else no
            for k in range(len(z)):
                image[k] = d[k] * p[k]
            if n <= BLOCK:
                bend = _pass(entries, first, n, p, image, zero, scale, is_last)
            else:
                bend = _long_pass(entries, first, n, p, image, zero, scale, is_last, part, total)
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
        for k in range(len(z)):
            if relaxation == one:  # reordered sums would lose precision if the old row is large
                rows[row, k] = z[k]
            else:
                rows[row, k] = (one - relaxation) * rows[row, k] + relaxation * z[k]


def measure_rows(rows: Any, cells: Any, lengths: Any, entries: Any, out: Any) -> None:
    """Write the loss of the entries of R rows into `out`, as in `solve.cells_loss`.

    Sums are float64. Each entry is computed as a square, because sums of (w t - 2 v) t and of
    constants would nearly cancel.
    """
    held, ids, values, alpha, offset, ahead = entries
    address, row_bytes = held.ctypes.data, rows.shape[1] * held.itemsize
    zero, one = rows.dtype.type(0), rows.dtype.type(1)
    for row in range(len(lengths)):
        total = np.float64(0)
        for at in range(cells[row], cells[row] + lengths[row]):
            if ahead and at + ahead < len(ids):
                for byte in range(0, row_bytes, 64):
                    prefetch(address + ids[at + ahead] * row_bytes + byte)
            t, i = zero, ids[at]
            for k in range(rows.shape[1]):
                t += held[i, k] * rows[row, k]
            c = alpha * values[at] if len(values) else alpha
            liked, disliked = max(c, zero), max(-c, zero)
            total += liked * (one - t) ** 2 + disliked * (one + t * t)
            total -= offset * t * t
        out[row] = total


def _hint() -> Any:
    """The compiled form of `prefetch`: LLVM's intrinsic, because Python has none."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    read, nearest, data = number(0), number(3), number(1)

    def emit(context: Any, builder: Any, _: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        word = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(word, [builder.inttoptr(args[0], pointer), read, nearest, data])
        return context.get_dummy_value()

    return intrinsic(lambda _, __: (types.void(types.uintp), emit))


def compiled(njit: Any, cached: bool) -> tuple[Any, Any]:
    """`solve_rows` and `measure_rows` by `numba.njit`, which compiles them when they are called.

    Parameters
    ----------
    njit : callable
        That decorator.
    cached : bool
        Whether to read and write numba's cache, which is valid for the content of this file only.
    """
    # Sums may be reordered, to vectorise them; infinity and NaN are preserved.
    math = {"reassoc", "contract", "arcp", "nsz"}
    options = {"nogil": True, "error_model": "numpy", "fastmath": math, "cache": cached}
    made = {each.__name__: njit(**options)(each) for each in _PLAIN}
    globals().update(made, prefetch=_hint())  # the loops call each other by these names
    return made["solve_rows"], made["measure_rows"]


_PLAIN = (_pass, _long_pass, _scaled, solve_rows, measure_rows)
