"""Loops that select the k largest scores of each row, compiled by numba.

`compiled.selection` imports this module when it is needed. A row is read twice: once for the
maximum of each block of columns, and once more in the blocks whose maximum is large enough.
Arrays are accessed by index and never sliced: numba would count the references to a slice, in
memory that all threads share.

Axis letters: B rows of scores, n columns, C capacity of the lists of candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tpu_als.engine.cpu.jit import compiled, inner, inner_without_nan
from tpu_als.engine.cpu.vectors import GROUP, REGISTER_BYTES, dots_of_table

WIDTHS = 32, 16, 8, 4, 1  # columns of a block
_WIDTH = 16  # of a single row
_FEW = 16  # up to this many numbers are kept in order


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


class Hidden(NamedTuple):
    """What becomes of the scores before the selection.

    Attributes
    ----------
    lengths : (n,)
        What they are divided by; empty for 1.
    starts, seen : int (B + 1,), int32
        Columns to hide in each row, as in the `indptr` and `indices` of CSR; empty for none.
        Columns outside the block of scores are ignored.
    excluded : int
        Columns to hide in all rows.
    """

    lengths: np.ndarray
    starts: np.ndarray
    seen: np.ndarray
    excluded: np.ndarray


@inner
def _kth(numbers: np.ndarray, n: int, k: int) -> float:
    """The k-th largest of n numbers, which are reordered (Hoare's quickselect)."""
    low, high, wanted = 0, n - 1, k - 1
    while low < high:
        a, b, c = numbers[low], numbers[(low + high) // 2], numbers[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while numbers[i] > pivot:
                i += 1
            while numbers[j] < pivot:
                j -= 1
            if i <= j:
                numbers[i], numbers[j] = numbers[j], numbers[i]
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    return numbers[wanted]


@inner
def _keep_k(candidates: Candidates, row: int, n: int, k: int, scratch: np.ndarray) -> float:
    """Keep the k largest of n candidates of a row, the first ones of equals; return the least."""
    scores, ids, _, _ = candidates
    for at in range(n):
        scratch[at] = scores[row, at]
    least, larger, kept = _kth(scratch, n, k), 0, 0
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
def _divide(products: np.ndarray, row: int, lengths: np.ndarray, first: int) -> np.int32:
    """Divide the scores of a row by lengths, if any; return how many are NaN or infinite."""
    n_bad, top = np.int32(0), products.dtype.type(np.inf)
    if len(lengths):
        for column in range(products.shape[1]):
            score = products[row, column] / lengths[first + column]
            products[row, column] = score
            n_bad += np.int32(not score < top)
    else:
        for column in range(products.shape[1]):
            n_bad += np.int32(not products[row, column] < top)
    return n_bad


def _maxima_by(width: int) -> Callable[..., None]:
    """Compile a function that writes the maximum of each block of `width` columns of a row."""

    @inner_without_nan
    def maxima(products: np.ndarray, row: int, out: np.ndarray) -> None:
        n = products.shape[1]
        n_full = n // width
        for block in range(n_full):
            low = block * width
            top = products[row, low]
            for column in range(low, low + width):
                score = products[row, column]
                top = score if score > top else top
            out[block] = top
        if n_full * width < n:
            top = products[row, n_full * width]
            for column in range(n_full * width, n):
                score = products[row, column]
                top = score if score > top else top
            out[n_full] = top

    return maxima


# With a width that the compiler knows, this takes a third of the time.
_maxima_by_32, _maxima_by_16, _maxima_by_8, _maxima_by_4, _maxima_by_1 = map(_maxima_by, WIDTHS)


@inner
def _maxima(products: np.ndarray, row: int, width: int, out: np.ndarray) -> None:
    """Write the maximum of each block of columns of a row; the width is one of `WIDTHS`."""
    if width == 32:
        _maxima_by_32(products, row, out)
    elif width == 16:
        _maxima_by_16(products, row, out)
    elif width == 8:
        _maxima_by_8(products, row, out)
    elif width == 4:
        _maxima_by_4(products, row, out)
    else:
        _maxima_by_1(products, row, out)


@inner
def _kth_kept(numbers: np.ndarray, n: int, k: int, scratch: np.ndarray) -> float:
    """The k-th largest of n numbers, which stay as they are."""
    if k > _FEW:
        for at in range(n):
            scratch[at] = numbers[at]
        return _kth(scratch, n, k)
    for at in range(k):  # the k largest so far, in order
        scratch[at] = -np.inf
    for number in range(n):
        value = numbers[number]
        if value > scratch[k - 1]:
            at = k - 1
            while at > 0 and scratch[at - 1] < value:
                scratch[at] = scratch[at - 1]
                at -= 1
            scratch[at] = value
    return scratch[k - 1]


@inner
def _insert(scores: np.ndarray, ids: np.ndarray, size: int, score: float, column: int) -> None:
    """Insert a score into a list in order, behind its equals; the last one of the list is lost."""
    at = size - 1
    while at > 0 and scores[at - 1] < score:
        scores[at], ids[at] = scores[at - 1], ids[at - 1]
        at -= 1
    scores[at], ids[at] = score, column


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

    It is for few places, as each new score is inserted among the larger ones.

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
        Number of places, at least 1 and at most n.

    Returns
    -------
    ids, scores : int32 (k,), (k,)
        Scores that are NaN or infinite come first, as infinity, and hidden ones last, as minus
        infinity.
    """
    n, kind = len(products), products.dtype.type
    ids, scores = np.zeros(k, np.int32), np.empty(k, kind)
    lowest, highest, row = kind(-np.inf), kind(np.inf), products.reshape((1, n))
    _score(table, query, products)
    n_bad = _divide(row, 0, lengths, 0)
    for at in range(len(hidden)):
        products[hidden[at]] = lowest
    if n_bad:
        for column in range(n):
            if not products[column] < highest:
                products[column] = highest
    n_blocks = (n + _WIDTH - 1) // _WIDTH
    maxima = np.empty(n_blocks, kind)
    _maxima(row, 0, _WIDTH, maxima)
    for at in range(k):
        scores[at] = lowest
    if n_blocks >= k:
        for block in range(n_blocks):
            if maxima[block] > scores[k - 1]:
                _insert(scores, ids, k, maxima[block], 0)
    # At least k scores are as large as the k-th of the maxima.
    bound, size = scores[k - 1], 0
    for block in range(n_blocks):
        if maxima[block] < bound:
            continue
        for column in range(block * _WIDTH, min(block * _WIDTH + _WIDTH, n)):
            score = products[column]
            if score >= bound and (size < k or score > scores[k - 1]):
                size += size < k
                _insert(scores, ids, size, score, column)
    return ids, scores


@compiled
def select(
    products: np.ndarray, first: int, hidden: Hidden, k: int, width: int, candidates: Candidates
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
    width : int
        Columns of a block for which a maximum is computed; one of `WIDTHS`.
    candidates : Candidates
        Those of the columns before; overwritten. At most k are left of each row.
    """
    scores, ids, sizes, bounds = candidates
    lengths, starts, seen, excluded = hidden
    n, capacity, kind = products.shape[1], scores.shape[1], products.dtype.type
    n_blocks, lowest, highest = (n + width - 1) // width, kind(-np.inf), kind(np.inf)
    maxima, scratch = np.empty(n_blocks, kind), np.empty(max(capacity, n_blocks), kind)
    for row in range(len(products)):
        if len(starts):
            for at in range(starts[row], starts[row + 1]):
                column = seen[at] - first
                if 0 <= column < n:
                    products[row, column] = lowest
        for at in range(len(excluded)):
            products[row, excluded[at] - first] = lowest
        if _divide(products, row, lengths, first):
            for column in range(n):
                if not products[row, column] < highest:
                    products[row, column] = highest
        _maxima(products, row, width, maxima)
        size, bound = sizes[row], bounds[row]
        is_full = size >= k
        if not is_full and n_blocks >= k:
            bound = max(bound, _kth_kept(maxima, n_blocks, k, scratch))
        for block in range(n_blocks):
            if maxima[block] < bound:
                continue
            for column in range(block * width, min(block * width + width, n)):
                score = products[row, column]
                # Of equal scores the first columns are kept.
                if score > bound or (score == bound and not is_full):
                    scores[row, size], ids[row, size] = score, first + column
                    size += 1
                    if size == capacity:
                        bound, size, is_full = _keep_k(candidates, row, size, k, scratch), k, True
        if size > k:
            bound, size, is_full = _keep_k(candidates, row, size, k, scratch), k, True
        elif size < k:
            bound = lowest
        sizes[row], bounds[row] = size, bound


@compiled
def finish(candidates: Candidates, k: int, ids: np.ndarray, scores: np.ndarray) -> None:
    """Write the candidates of each row in order, best first; of equal scores, the first columns.

    Parameters
    ----------
    candidates : Candidates
        Those of all columns, at least k of each row. They are reordered.
    k : int
        Number of places of a row; for a few, as each candidate is inserted among the larger ones.
    ids, scores : int32 (B, n), (B, n)
        The results, n at least k. Places of hidden columns are left as they are. Scores that are
        NaN or infinite become NaN, and leave the id as it is.
    """
    best, columns, _, _ = candidates
    kind = scores.dtype.type
    for row in range(len(ids)):
        for at in range(1, k):
            score, column, place = best[row, at], columns[row, at], at
            while place > 0 and best[row, place - 1] < score:
                best[row, place], columns[row, place] = (
                    best[row, place - 1],
                    columns[row, place - 1],
                )
                place -= 1
            best[row, place], columns[row, place] = score, column
        for at in range(k):
            score = best[row, at]
            if not score < kind(np.inf):
                scores[row, at] = kind(np.nan)
            elif score > kind(-np.inf):
                scores[row, at], ids[row, at] = score, columns[row, at]
