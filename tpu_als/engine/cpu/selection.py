"""Loops that select the k largest scores of each row, compiled by numba.

`compiled.selection` imports this module when it is needed. A row is read twice: once for the
maxima of columns of scores, of which the k-th largest is a lower bound, and once more for the
scores that are at least as large. Arrays are accessed by index and never sliced: numba would count
the references to a slice, in memory that all threads share.

Axis letters: B rows of scores, n columns, C capacity of the lists of candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tpu_als.engine.cpu.comparisons import at_least, maxima
from tpu_als.engine.cpu.emitter import REGISTER_BYTES
from tpu_als.engine.cpu.intrinsics import float_at, lowest_bit, order_of
from tpu_als.engine.cpu.jit import compiled, inner
from tpu_als.engine.cpu.vectors import GROUP, dots_of_table


class Candidates(NamedTuple):
    """The largest scores so far of each row, in the order of their columns.

    Attributes
    ----------
    scores : (B, C)
        C is above k. Infinity stands for a score that is NaN or infinite.
    ids : int32 (B, C)
        Their columns.
    sizes : int64 (B,)
        Number of candidates of each row.
    bounds : (B,)
        Once a row has k candidates: the least of them. Before that, minus infinity.
    """

    scores: np.ndarray
    ids: np.ndarray
    sizes: np.ndarray
    bounds: np.ndarray


class Lengths(NamedTuple):
    """Divisors of the scores; both arrays are empty if scores are not divided.

    Attributes
    ----------
    values, inverses : (n,)
        The lengths and their inverses. Multiplying by an inverse instead of dividing changes a
        score by at most two roundings. Inverses that overflow are NaN.
    """

    values: np.ndarray
    inverses: np.ndarray


class Hidden(NamedTuple):
    """What becomes of the scores before the selection.

    Attributes
    ----------
    lengths : Lengths
        What they are divided by.
    starts, seen : int (B + 1,), int32
        Columns to hide in each row, as in the `indptr` and `indices` of CSR; empty for none.
        Columns outside the block of scores are ignored.
    excluded : int
        Columns to hide in all rows.
    """

    lengths: Lengths
    starts: np.ndarray
    seen: np.ndarray
    excluded: np.ndarray


@inner
def _kth(numbers: np.ndarray, row: int, n: int, counts: tuple[int, int], keys: np.ndarray) -> float:
    """Find by bisection a number x such that at least counts[0] of a row's first n are >= x.

    The result is the largest such x, or any such x for which at most counts[1] are >= x.
    """
    (least, most), low, high = counts, np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for at in range(n):
        keys[at] = order_of(numbers[row, at])
        low, high = min(low, keys[at]), max(high, keys[at])
    high += 1
    while low + 1 < high:
        middle, count = (low >> 1) + (high >> 1) + (low & high & 1), 0
        for at in range(n):
            count += keys[at] >= middle
        if count < least:
            high = middle
        else:
            low = middle
            if count <= most:
                break
    return float_at(low, numbers[row, 0])


@inner
def _keep_k(
    scores: np.ndarray, ids: np.ndarray, row: int, n: int, k: int, keys: np.ndarray
) -> float:
    """Keep the k largest of n candidates of a row, the first ones of equals; return the least."""
    least, larger, kept = _kth(scores, row, n, (k, 0), keys), 0, 0
    for at in range(n):
        larger += scores[row, at] > least
    equals = k - larger
    for at in range(n):
        score = scores[row, at]
        if score > least or (score == least and equals > 0):
            equals -= score == least
            scores[row, kept], ids[row, kept] = score, ids[row, at]
            kept += 1
    return least


@inner
def _depth(n: int, k: int) -> int:
    """Numbers of a column whose maximum is computed, for k of n scores."""
    # With 4k columns, few of the k largest scores are in the same one.
    return max(n // (4 * k), 1)


@inner
def _write_maxima(
    products: np.ndarray, row: int, depth: int, inverses: np.ndarray, first: int, out: np.ndarray
) -> tuple[int, bool]:
    """Write maxima of a row's scores to `out` (1, m).

    Products are multiplied by `inverses[first:]`, unless `first` is negative.
    Returns the number of maxima, and whether a score is NaN or infinite.
    """
    n, lanes = products.shape[1], REGISTER_BYTES // products.itemsize
    n_wide, offset, is_wrong = n - n % lanes, 0, False
    for low in range(0, n_wide, depth * lanes):
        count, factor = min(depth, (n_wide - low) // lanes), first + low if first >= 0 else -1
        is_wrong |= maxima(products, inverses, (row * n + low, count, factor, offset), out)
        offset += lanes
    for column in range(n_wide, n):
        score = products[row, column]
        if first >= 0:
            score *= inverses[first + column]
        is_wrong |= not score < np.inf
        out[0, offset] = score
        offset += 1
    return offset, is_wrong


@inner
def _clean(products: np.ndarray, row: int, lengths: np.ndarray, first: int) -> None:
    """Divide the scores of a row by lengths, if any; infinity replaces NaN."""
    highest = products.dtype.type(np.inf)
    for column in range(products.shape[1]):
        score = products[row, column]
        if len(lengths):
            score /= lengths[first + column]
        products[row, column] = score if score < highest else highest


@inner
def _slack(bound: float) -> float:
    """Bound on the difference of a score of this size and its product with the inverse length."""
    info = np.finfo(type(bound))
    return type(bound)(8 * info.eps * abs(bound) + 4 * info.tiny)


@inner
def _select(
    products: np.ndarray, first: int, hidden: Hidden, k: int, candidates: Candidates
) -> None:
    """`select`, in other compiled functions."""
    # Unpack the tuples once and not for each row: numba counts references at each access.
    (values, inverses), starts, seen, excluded = hidden
    scores, ids, sizes, bounds = candidates
    kind, (n_rows, n), capacity = products.dtype.type, products.shape, scores.shape[1]
    lanes, depth = REGISTER_BYTES // products.itemsize, _depth(n, k)
    room, n_wide = n // depth + 2 * lanes, n - n % lanes
    tops, keys = np.empty((1, room), kind), np.empty(max(room, capacity), np.int64)
    for row in range(n_rows):
        if len(starts):
            for at in range(starts[row], starts[row + 1]):
                column = seen[at] - first
                if 0 <= column < n:
                    products[row, column] = -np.inf
        for at in range(len(excluded)):
            products[row, excluded[at] - first] = -np.inf
        is_scaled, factor = len(values) > 0, first if len(values) else -1
        n_tops, is_wrong = _write_maxima(products, row, depth, inverses, factor, tops)
        if is_wrong:
            _clean(products, row, values, first)
            is_scaled, factor = False, -1
            n_tops, _ = _write_maxima(products, row, depth, inverses, factor, tops)
        size, bound = sizes[row], bounds[row]
        is_full = size >= k
        if not is_full and n_tops >= k:
            top = _kth(tops, 0, n_tops, (k, k + k // 4 + 2), keys)
            bound = max(bound, top - _slack(top) if is_scaled else top)
        least = bound - _slack(bound) if is_scaled else bound
        for low in range(0, n, lanes):
            if low < n_wide:
                offset = row * n + low, factor + low if is_scaled else -1
                bits = at_least(products, inverses, offset, least)
            else:
                bits = (1 << (n - low)) - 1
            while bits:
                column = low + lowest_bit(bits)
                bits &= bits - 1
                score = products[row, column]
                if is_scaled:
                    score /= values[first + column]
                # Of equal scores the first columns are kept.
                if score > bound or (score == bound and not is_full):
                    scores[row, size], ids[row, size] = score, first + column
                    size += 1
                    if size == capacity:
                        bound, size, is_full = _keep_k(scores, ids, row, size, k, keys), k, True
                        least = bound - _slack(bound) if is_scaled else bound
        if size > k:
            bound, size = _keep_k(scores, ids, row, size, k, keys), k
        sizes[row], bounds[row] = size, bound if size == k else kind(-np.inf)


@inner
def _position(scores: np.ndarray, ids: np.ndarray, row: int, k: int, at: int) -> int:
    """Position of a candidate if the first k of a row are sorted: best first, equals by columns."""
    score, column, position = scores[row, at], ids[row, at], 0
    for other in range(k):
        is_before = (scores[row, other] == score) & (ids[row, other] < column)
        position += (scores[row, other] > score) | is_before
    return position


@inner
def _score(table: np.ndarray, query: np.ndarray, products: np.ndarray) -> None:
    """Write the products of the rows of a table (n, K) and a query (K,).

    The rows are read as fast as memory permits, and once. BLAS takes 1.2 to 1.4 times as long.
    """
    (n, width), lanes = table.shape, REGISTER_BYTES // table.itemsize
    if n < GROUP or width < lanes:
        for row in range(n):
            total = table.dtype.type(0)
            for k in range(width):
                total += table[row, k] * query[k]
            products[row] = total
        return
    n_whole = width - width % lanes
    given = np.zeros(n_whole + (lanes if n_whole < width else 0), table.dtype)
    for k in range(n_whole):
        given[k] = query[k]
    for k in range(n_whole, width):  # as `vectors.dots_of_table` reads it
        given[n_whole + lanes - width + k] = query[k]
    for row in range(0, n - GROUP + 1, GROUP):
        dots_of_table(table, row, given, products)
    if n % GROUP:
        dots_of_table(table, n - GROUP, given, products)


@compiled
def best_of_query(
    table: np.ndarray,
    query: np.ndarray,
    lengths: np.ndarray,
    hidden: np.ndarray,
    products: np.ndarray,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Select the rows of a table with the largest products, in order; of equals, the first rows.

    Use it for small k: each result is compared with all others.

    Parameters
    ----------
    table : (n, K)
        The rows.
    query : (K,)
        What they are multiplied by.
    lengths : (n,)
        What the products are divided by; empty for 1.
    hidden : int32
        Rows to hide.
    products : (n,)
        Memory for the scores.
    k : int
        Number of results, at least 1 and at most n.

    Returns
    -------
    ids, scores : int32 (k,), (k,)
        Scores that are NaN or infinite come first, as infinity, and hidden ones last, as minus
        infinity.
    """
    n, kind = len(products), products.dtype.type
    _score(table, query, products)
    inverses, none = np.empty(len(lengths), kind), np.empty(0, np.int32)
    for at in range(len(lengths)):
        inverse = kind(1) / lengths[at]
        inverses[at] = inverse if abs(inverse) < np.inf else kind(np.nan)
    shape = 1, min(2 * k + 32, n + 1)
    candidates = Candidates(
        np.empty(shape, kind), np.empty(shape, np.int32),
        np.zeros(1, np.int64), np.full(1, -np.inf, kind),
    )  # fmt: skip
    limits = Hidden(Lengths(lengths, inverses), none, none, hidden)
    _select(products.reshape((1, n)), 0, limits, k, candidates)
    ids, scores = np.empty(k, np.int32), np.empty(k, kind)
    for at in range(k):
        position = _position(candidates.scores, candidates.ids, 0, k, at)
        ids[position], scores[position] = candidates.ids[0, at], candidates.scores[0, at]
    return ids, scores


@compiled
def select(
    products: np.ndarray, first: int, hidden: Hidden, k: int, candidates: Candidates
) -> None:
    """Add the scores of a block of columns to the candidates of each row.

    Parameters
    ----------
    products : (B, n)
        Scores, which are overwritten.
    first : int
        Column of the first score in the whole table.
    hidden : Hidden
        Columns to hide, which count from the first of the whole table.
    k : int
        Number of candidates to keep, at least 1.
    candidates : Candidates
        Those of the columns before; overwritten. At most k are left of each row.
    """
    _select(products, first, hidden, k, candidates)


@compiled
def finish(candidates: Candidates, k: int, ids: np.ndarray, scores: np.ndarray) -> None:
    """Write the candidates of each row in order, best first; of equal scores, the first columns.

    Parameters
    ----------
    candidates : Candidates
        Those of all columns, at least k of each row.
    k : int
        Number of results of a row; a small one, as each candidate is compared with all others.
    ids, scores : int32 (B, n), (B, n)
        The results, n at least k. Places of hidden columns are left as they are. Scores that are
        NaN or infinite become NaN, and leave the id as it is.
    """
    (best, columns, _, _), kind = candidates, scores.dtype.type
    for row in range(len(ids)):
        for at in range(k):
            score, position = best[row, at], _position(best, columns, row, k, at)
            if not score < kind(np.inf):
                scores[row, position] = kind(np.nan)
            elif score > kind(-np.inf):
                scores[row, position], ids[row, position] = score, columns[row, at]
