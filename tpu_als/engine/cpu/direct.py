"""Loops that solve rows by a Cholesky factorisation, compiled by numba.

`compiled.direct` imports this module when it is needed. A row's matrix (3) is summed and factorised
in the tables' dtype, in tiles of eight rows whose sums stay in registers. LAPACK and BLAS would
need calls by address of the functions that SciPy has.

Axis letters: R rows, E entries, K factors, P of them and pads to whole cache lines.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tpu_als.engine.cpu.emitter import REGISTER_BYTES
from tpu_als.engine.cpu.jit import compiled, inner
from tpu_als.engine.cpu.loops import BLOCK, Diagonal, Entries, Starts, confidence, scaled
from tpu_als.engine.cpu.memory import LINE
from tpu_als.engine.cpu.vectors import GROUP, add_tile
from tpu_als.engine.objective import Objective

_CHUNK = 32  # entries whose products are summed in registers


class System(NamedTuple):
    """Memory for a row's equation (3), scaled, and for some of its entries.

    Rows of two axes have a cache line more than P numbers: other distances would bring all rows of
    a column to few places of the nearest cache.

    Attributes
    ----------
    matrix : (P, P + a line)
        The upper triangle of the matrix, and then of its factor.
    rhs : (P,)
        The right side, and then the solution.
    diagonal : (P,)
        The diagonal part.
    rows, weighted : (E, P + a line)
        Source rows of entries, and their products with w.
    """

    matrix: np.ndarray
    rhs: np.ndarray
    diagonal: np.ndarray
    rows: np.ndarray
    weighted: np.ndarray


class How(NamedTuple):
    """How rows are solved.

    Attributes
    ----------
    relaxation : number
        As in `xla.solve.relax`.
    factors : int
        Number K of factors.
    """

    relaxation: float
    factors: int


@inner
def _add_rows(
    rows: np.ndarray, factors: np.ndarray, count: int, low: int, sign: float, out: np.ndarray
) -> None:
    """Add sign F^T E to the rows from `low` on of an upper triangle, as many as a group has."""
    lanes, width = REGISTER_BYTES // out.itemsize, len(out)
    for column in range(low // lanes * lanes, width, lanes):
        add_tile(rows, factors, (count, low, column), sign, out)


@inner
def _add_entries(
    entries: Entries, objective: Objective, span: tuple[int, int], scale: float, system: System
) -> None:
    """Add what some entries contribute to a system."""
    source, ids, values, _ = entries
    (first, n), width, kind = span, source.shape[1], source.dtype.type
    w, v = confidence(objective, kind(1))
    for low in range(first, first + n, _CHUNK):
        count = min(first + n - low, _CHUNK)
        for j in range(count):
            i = ids[low + j]
            if len(values):
                w, v = confidence(objective, values[low + j])
            weight, target = w * scale, v * scale
            for k in range(width):
                system.rows[j, k] = source[i, k]
                system.weighted[j, k] = weight * source[i, k]
                system.rhs[k] += target * source[i, k]
        for k in range(0, width, GROUP):
            _add_rows(system.rows, system.weighted, count, k, kind(1), system.matrix)


@inner
def _form(
    entries: Entries,
    objective: Objective,
    span: tuple[int, int],
    scale: float,
    system: System,
    total: np.ndarray,
) -> None:
    """Write a system, whose blocks of entries are summed in float64 if there are several."""
    (first, n), matrix, rhs = span, system.matrix, system.rhs
    width, kind = len(rhs), rhs.dtype.type
    total[: width if n > BLOCK else 0] = 0
    for low in range(0, n, BLOCK):
        matrix[:] = 0
        rhs[:] = 0
        _add_entries(entries, objective, (first + low, min(n - low, BLOCK)), scale, system)
        if n > BLOCK:
            for i in range(width):
                for k in range(i, width):
                    total[i, k] += matrix[i, k]
                total[width, i] = rhs[i] + (total[width, i] if low else 0.0)
    if n > BLOCK:
        for i in range(width):
            for k in range(i, width):
                matrix[i, k] = kind(total[i, k])
            rhs[i] = kind(total[width, i])
    for i in range(width):
        matrix[i, i] += system.diagonal[i]


@inner
def _factorise(system: System) -> bool:
    """Replace the matrix by U with U^T U = matrix; return whether it is positive definite."""
    matrix, width = system.matrix, len(system.matrix)
    for low in range(0, width, GROUP):
        _add_rows(matrix, matrix, low, low, matrix.dtype.type(-1), matrix)
        for i in range(low, low + GROUP):
            for above in range(low, i):
                factor = matrix[above, i]
                for k in range(i, width):
                    matrix[i, k] -= factor * matrix[above, k]
            if not (matrix[i, i] > 0 and matrix[i, i] < np.inf):
                return False
            inverse = 1 / math.sqrt(matrix[i, i])
            for k in range(i, width):
                matrix[i, k] *= inverse
    return True


@inner
def _substitute(system: System) -> None:
    """Replace the right side by the solution."""
    matrix, rhs = system.matrix, system.rhs
    for i in range(len(rhs)):
        rhs[i] /= matrix[i, i]
        value = rhs[i]
        for k in range(i + 1, len(rhs)):
            rhs[k] -= value * matrix[i, k]
    for i in range(len(rhs) - 1, -1, -1):
        value = rhs[i]
        for k in range(i + 1, len(rhs)):
            value -= rhs[k] * matrix[i, k]
        rhs[i] = value / matrix[i, i]


@compiled
def solve_rows(
    rows: np.ndarray,
    starts: Starts,
    entries: Entries,
    objective: Objective,
    diagonal: Diagonal,
    how: How,
) -> None:
    """Solve R rows of equation (3) by Cholesky, as `xla.cholesky.direct` does.

    If a factorisation fails (rank-deficient and no ridge), the matrix is factorised again with a
    ridge of a few rounding errors of its mean diagonal, which gives nearly the least-norm solution.

    Parameters
    ----------
    rows : (R, P)
        The initial rows; they are overwritten with the solved ones, with zeros for rows without
        entries, and with NaN for those whose matrix is not positive definite even with that ridge.
    starts, entries, objective, diagonal
        As in `loops.solve_rows`.
    how : How
        How to solve them.
    """
    (cells, lengths, priors), width, kind = starts, rows.shape[1], rows.dtype.type
    vectors, pitch = np.empty((3, width), rows.dtype), width + LINE // rows.itemsize
    system = System(
        np.empty((width, pitch), rows.dtype), vectors[0], vectors[1],
        np.empty((_CHUNK, pitch), rows.dtype), np.empty((_CHUNK, pitch), rows.dtype),
    )  # fmt: skip
    longest = 0
    for n in lengths:
        longest = max(longest, n)
    total = np.empty((width + 1 if longest > BLOCK else 0, width))
    one, eps = kind(1), np.finfo(rows.dtype).eps
    for row in range(len(lengths)):
        first, n = cells[row], lengths[row]
        if n == 0:
            rows[row] = 0
            continue
        scale, _, _, lam = scaled(objective, diagonal, n, 1, system.diagonal, vectors[2])
        is_solved, jitter = False, kind(0)
        for _ in range(2):
            _form(entries, objective, (first, n), scale, system, total)
            trace = kind(0)
            for k in range(width):
                system.matrix[k, k] += jitter
                trace += system.matrix[k, k] if k < how.factors else 0
                if len(priors):
                    system.rhs[k] += lam * priors[row, k]
            is_solved = _factorise(system)
            if is_solved:
                break
            jitter = kind(4 * eps) * trace + diagonal.tiny
        if is_solved:
            _substitute(system)
        for k in range(width):
            z = system.rhs[k] if is_solved else kind(np.nan)
            if how.relaxation == one:
                rows[row, k] = z
            else:
                rows[row, k] = (one - how.relaxation) * rows[row, k] + how.relaxation * z
