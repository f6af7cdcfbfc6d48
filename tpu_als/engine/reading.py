"""Steps of `Backend.place` for both backends: checks, dtype of values, totals, "auto"."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from tpu_als.engine import cells
from tpu_als.engine.cells import Entries, InMemory
from tpu_als.engine.data import BFLOAT16, AlsParams, dtype_named
from tpu_als.host import require_memory
from tpu_als.validation import structure

SIDES = ("user", "item")
_CHECKED = 1 << 20  # values checked at a time
# Bytes per second of reading gathered source rows, and flop per second of products and solves.
_SPEEDS = {"cpu": (1e11, 4e10), "other": (2e12, 2e13)}


def as_entries(user_items: sparse.csr_matrix | Entries) -> Entries:
    """Check a CSR matrix, and transpose it; entries on disk are returned as they are."""
    if not isinstance(user_items, sparse.csr_matrix):
        return user_items
    structure.check_compressed(user_items)
    return InMemory.with_transpose(user_items)


def require_tables(shape: tuple[int, int], params: AlsParams, n_processes: int = 1) -> None:
    """Raise MemoryError if the tables of a fit, and arrays computed from them, do not fit.

    On a CPU a half-epoch needs at least both tables and a copy of the larger one.
    """
    factors, size = int(params.factors), dtype_named(params.dtype).itemsize
    users, items = (int(n) * factors * size // n_processes for n in shape)
    square = factors**2 * np.dtype(params.compute_dtype).itemsize
    parts = {
        "user table": users,
        "item table": items,
        "copy of the larger table": max(users, items),
        "gramian and eigenbasis": 2 * square,
    }
    require_memory(parts, f"fit with fewer factors than {factors}, or with a smaller dtype")


def kept_as(entries: Entries, params: AlsParams) -> np.dtype | None:
    """Choose the dtype of stored values; None if all values are 1, which are not stored.

    It is bfloat16 if the matrix is in memory and bfloat16 represents all its values exactly; else
    it is the dtype of sums.
    """
    if not entries.has_values:
        return None
    narrow = dtype_named(BFLOAT16)
    if isinstance(entries, InMemory):
        data = entries.user_items.data
        parts = (data[low : low + _CHECKED] for low in range(0, len(data), _CHECKED))
        with np.errstate(over="ignore"):  # values that are too large become infinite and differ
            if all(np.array_equal(part.astype(narrow).astype(part.dtype), part) for part in parts):
                return narrow
    return np.dtype(params.compute_dtype)


class Totals:
    """Sum, minimum and maximum of the absolute values of entries.

    Attributes
    ----------
    absolute_sum : float
        The sum.
    magnitudes : (float, float)
        The minimum and the maximum.
    """

    def __init__(self) -> None:
        self.absolute_sum, self.magnitudes = 0.0, (np.inf, -np.inf)

    def passing(self, blocks: cells.Blocks) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Yield the blocks of rows unchanged, and include their values in the totals."""
        for rows, block in blocks:
            sizes, (least, most) = np.abs(block.data), self.magnitudes
            self.absolute_sum += float(sizes.sum(dtype=np.float64))
            self.magnitudes = sizes.min(initial=least), sizes.max(initial=most)
            yield rows, block


def check_digests(users: int, items: int, entries: Entries) -> None:
    """Raise ValueError if the two sides of files have different digests."""
    if users != items:
        raise ValueError(
            f"{getattr(entries, 'path', entries)}: the files by user and the files by item hold "
            "different entries or values, but must hold the same ones; write both again"
        )


def cheapest_solver(
    lengths: tuple[np.ndarray, np.ndarray], params: AlsParams, backend_kind: str
) -> str:
    """Name the solver with the least predicted time for one iteration: "cg" or "cholesky".

    "cg" reads each gathered entry a few times, at the speed of memory; "cholesky" multiplies, at
    the speed of the matrix units. The two speeds of a CPU are of the order measured in
    docs/performance.md, those of accelerators of the order that their makers state.

    Parameters
    ----------
    lengths : two of int array
        Number of entries of each user and of each item.
    params : AlsParams
        Its `factors` and `cg_steps`.
    backend_kind : {"cpu", "other"}
        Which speeds to assume.
    """
    entries = float(sum(side.sum() for side in lengths))
    rows = float(sum(len(side) for side in lengths))
    read, multiply = _SPEEDS[backend_kind]
    by_cg = entries * params.factors * 4 * 2 * (params.cg_steps + 1) / read
    by_cholesky = 2 * entries * params.factors**2 + rows * params.factors**3 / 3
    return "cg" if by_cg <= by_cholesky / multiply else "cholesky"


def cheapest_for(user_items: sparse.csr_matrix | Entries, params: AlsParams) -> str:
    """`cheapest_solver` on a CPU, for a matrix."""
    if isinstance(user_items, sparse.csr_matrix):
        counts = np.bincount(user_items.indices, minlength=user_items.shape[1])
        return cheapest_solver((np.diff(user_items.indptr), counts), params, "cpu")
    users, items = (user_items.lengths(side)[1] for side in SIDES)
    return cheapest_solver((users, items), params, "cpu")
