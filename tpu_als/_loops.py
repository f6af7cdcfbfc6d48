"""The loops that `native` runs, in the part of Python that numba compiles. Imports no numba.

Axis letters: R rows, E cells, N source rows, K factors, B cells of a block.
"""

from __future__ import annotations

from typing import Any

AT_ONCE = 4  # cells whose products are computed together, as `_pass` spells out


def _gather(block: Any, entries: Any, first: int, count: int) -> None:
    """Gather `count` entries from `first` on, and zeros up to a multiple of AT_ONCE."""
    rows, w, v = block
    held, ids, values, alpha, offset = entries
    zero = rows.dtype.type(0)
    for cell in range((count + AT_ONCE - 1) // AT_ONCE * AT_ONCE):
        # What the last ones point at is of no importance, as their weights are 0.
        entry = first + min(cell, count - 1)
        source, own = held[ids[entry]], rows[cell]
        for k in range(len(own)):
            own[k] = source[k]
        c = alpha * values[entry] if len(values) else alpha
        w[cell] = abs(c) - offset if cell < count else zero
        v[cell] = max(c, zero) if cell < count else zero


def _pass(
    block: Any, entries: Any, first: int, n: int, fresh: bool, p: Any, out: Any,
    on_targets: Any, on_predictions: Any, is_last: bool,
) -> Any:  # fmt: skip
    """Add E^T t of n entries to `out`, with t = on_targets v + on_predictions W E p.

    Where it `is_last`, only returns p^T E^T W E p times `on_predictions`. `fresh` says
    that the block does not have the entries yet; where they are more than it holds, it never has.
    """
    rows, w, v = block
    zero = rows.dtype.type(0)
    bend = zero
    for low in range(0, n, len(rows)):
        count = min(len(rows), n - low)
        if fresh or n > len(rows):
            _gather(block, entries, first + low, count)
        for cell in range(0, count, AT_ONCE):
            e0, e1, e2, e3 = rows[cell], rows[cell + 1], rows[cell + 2], rows[cell + 3]
            t0, t1, t2, t3 = zero, zero, zero, zero
            if on_predictions != zero:
                for k in range(len(p)):
                    t0 += e0[k] * p[k]
                    t1 += e1[k] * p[k]
                    t2 += e2[k] * p[k]
                    t3 += e3[k] * p[k]
            s0 = on_predictions * w[cell] * t0
            s1 = on_predictions * w[cell + 1] * t1
            s2 = on_predictions * w[cell + 2] * t2
            s3 = on_predictions * w[cell + 3] * t3
            if is_last:
                bend += s0 * t0 + s1 * t1 + s2 * t2 + s3 * t3
                continue
            s0 += on_targets * v[cell]
            s1 += on_targets * v[cell + 1]
            s2 += on_targets * v[cell + 2]
            s3 += on_targets * v[cell + 3]
            for k in range(len(p)):
                out[k] += s0 * e0[k] + s1 * e1[k] + s2 * e2[k] + s3 * e3[k]
    return bend


def solve_rows(
    before: Any, out: Any, cells: Any, lengths: Any, entries: Any, diagonal: Any, relaxation: Any,
    steps: int, block: Any, vectors: Any,
) -> None:  # fmt: skip
    """Solve R rows, as `sweep.solve_block` does in the eigenbasis.

    Parameters
    ----------
    before : (R, K)
        Where the rows begin.
    out : (R, K)
        Where the solved ones are written; zeros for rows without entries.
    cells, lengths : (R,)
        First cell and number of entries of each row.
    entries : tuple
        Source rows (N, K), ids (E,) and values (E,), or none of these where all are 1; alpha and
        the offset of `solve.Objective`.
    diagonal : tuple
        Spectrum (K,) times the unobserved weight, and of the ridge the factor, what is added to a
        row's entries, and the exponent; and the least number to divide by.
    relaxation : float
        As in `solve.relax`.
    steps : int
        Steps of CG; 0 where every weight w is 0.
    block : tuple
        Scratch: rows (B, K), with B a multiple of AT_ONCE, and their weights w and v (B,).
    vectors : (5, K)
        Scratch.
    """
    spectrum, ridge, others, exponent, tiny = diagonal
    r, p, image, d, z = vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]
    zero, one = z.dtype.type(0), z.dtype.type(1)
    for row in range(len(lengths)):
        first, n = cells[row], lengths[row]
        if n == 0:
            out[row, :] = zero
            continue
        lam = ridge * (zero + n + others) ** exponent
        start = before[row]
        size = zero
        for k in range(len(z)):
            d[k] = spectrum[k] + lam
            z[k] = start[k] if steps else zero
            r[k] = -d[k] * z[k]
        # Not literals, for each of which `_pass` would be compiled once more.
        yes, no = n > 0, n < 0
        _pass(block, entries, first, n, yes, z, r, one, zero - one if steps else zero, no)
        for k in range(len(z)):
            p[k] = r[k] / d[k]
            size += r[k] * p[k]
            if not steps:
                z[k] = p[k]
        for step in range(steps):
            bend, is_last = zero, step == steps - 1
            for k in range(len(z)):
                image[k] = d[k] * p[k]
            bend += _pass(block, entries, first, n, no, p, image, zero, one, is_last)
            for k in range(len(z)):
                bend += image[k] * p[k]
            a, last = size / max(bend, tiny), size
            size = zero
            for k in range(len(z)):
                z[k] += a * p[k]
                r[k] -= a * image[k]
                size += r[k] * r[k] / d[k]
            b = size / max(last, tiny)
            for k in range(len(z)):
                p[k] = r[k] / d[k] + b * p[k]
        for k in range(len(z)):
            out[row, k] = (one - relaxation) * start[k] + relaxation * z[k]


def compiled(compiler: Any) -> Any:
    """`solve_rows`, compiled with all that it calls, when it is called with other types."""
    for each in (_gather, _pass, solve_rows):
        globals()[each.__name__] = compiler(each)
    return solve_rows
