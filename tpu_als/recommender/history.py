"""The history of all users: one cell for a user and an item, with its value and its weight.

Axis letters: M users, N items, E cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from scipy import sparse

_BLOCK = 1 << 18  # cells that are searched at a time
_SHARE = 16  # changed rows are merged when they are more than 1/16 of all rows, and 1,024


class Cells(NamedTuple):
    """Rows of cells, as in CSR: ascending items in each row, each at most once.

    Attributes
    ----------
    indptr : int64 array (rows + 1,)
        Where each row begins.
    items : int32 array (E,)
        Item of each cell.
    values : float64 array (E,)
        Combined values of its events.
    weights : float32 array (E,)
        What the model is trained on.
    times : int64 or float64 array (E,), or None
        Time of its last event; only with ``repeated="last"`` and timestamps.
    """

    indptr: np.ndarray
    items: np.ndarray
    values: np.ndarray
    weights: np.ndarray
    times: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Number of cells of each row."""
        return np.diff(self.indptr)

    def rows(self, at: np.ndarray) -> Cells:
        """Some rows, in this order."""
        counts = self.indptr[at + 1] - self.indptr[at]
        return self.at(_span(self.indptr[at], counts), counts)

    def at(self, cells: np.ndarray, counts: np.ndarray) -> Cells:
        """Some cells, in this order, as rows of these lengths."""
        times = None if self.times is None else self.times[cells]
        indptr = np.append(0, np.cumsum(counts))
        return Cells(indptr, self.items[cells], self.values[cells], self.weights[cells], times)

    def matrix(self, n_items: int, *, of: str = "weights") -> sparse.csr_matrix:
        """CSR matrix (rows, n_items) of weights or values."""
        shape = len(self.indptr) - 1, n_items
        return sparse.csr_matrix((getattr(self, of), self.items, self.indptr), shape=shape)


def _span(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Positions of `counts` elements from each start, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)


def _positions(is_wanted: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Positions of wanted items; a block at a time, whose mask stays in a cache."""
    found = [
        low + np.flatnonzero(is_wanted[items[low : low + _BLOCK]])
        for low in range(0, len(items), _BLOCK)
    ]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def joined(first: Cells, second: Cells) -> Cells:
    """The rows of both, one after the other."""
    times = None
    if first.times is not None and second.times is not None:
        times = np.append(first.times, second.times)
    return Cells(
        np.append(first.indptr, first.indptr[-1] + second.indptr[1:]),
        np.append(first.items, second.items),
        np.append(first.values, second.values),
        np.append(first.weights, second.weights),
        times,
    )


@dataclass(frozen=True)
class History:
    """Cells (M, N) of all users. It does not change: an update makes another one.

    Attributes
    ----------
    base : Cells
        Rows of the users of `fit`.
    changed : Cells
        Rows that updates have changed or added.
    place : int32 array (M,)
        For each user the row of `changed`, or -1.
    n_items : int
        Number N of items.
    """

    base: Cells
    changed: Cells
    place: np.ndarray = field(repr=False)
    n_items: int

    @classmethod
    def of(cls, base: Cells, n_items: int) -> History:
        """The history of a fit."""
        no_cells = base.rows(np.empty(0, np.int64))
        return cls(base, no_cells, np.full(len(base.indptr) - 1, -1, np.int32), n_items)

    @property
    def n_users(self) -> int:
        """Number M of users."""
        return len(self.place)

    def rows(self, users: np.ndarray) -> Cells:
        """Rows of some users, which must be in range."""
        if not len(self.changed.items):
            return self.base.rows(users)
        place = self.place[users]
        is_changed, base = place >= 0, self.base
        counts = np.where(is_changed, 0, base.indptr[users + 1] - base.indptr[users])
        before = base.at(_span(base.indptr[users], counts), counts)
        after = self.changed.rows(place[is_changed])
        starts = before.indptr[:-1].copy()
        starts[is_changed] = len(before.items) + after.indptr[:-1]
        counts[is_changed] = after.lengths
        return joined(before, after).at(_span(starts, counts), counts)

    def lengths(self) -> np.ndarray:
        """Number of cells (M,) of each user."""
        lengths = self.base.lengths
        is_changed = self.place >= 0
        lengths[is_changed] = self.changed.lengths[self.place[is_changed]]
        return lengths

    def whole(self) -> Cells:
        """All rows."""
        return self.base if not len(self.changed.items) else self.rows(np.arange(self.n_users))

    def changed_to(self, users: np.ndarray, rows: Cells, n_users: int, n_items: int) -> History:
        """Replace or add rows.

        Parameters
        ----------
        users : int array (m,)
            Ascending, each once.
        rows : Cells
            Their rows.
        n_users, n_items : int
            The new numbers of users and items. New users without a row get an empty one.
        """
        place = np.full(n_users, -1, np.int32)
        place[: self.n_users] = self.place
        stays = np.setdiff1d(np.flatnonzero(place >= 0), users, assume_unique=True)
        kept = self.changed.rows(place[stays])
        place[stays] = np.arange(len(stays))
        place[users] = len(stays) + np.arange(len(users))
        changed = joined(kept, rows)
        base = self.base
        missing = n_users - (len(base.indptr) - 1)
        if missing:
            base = base._replace(indptr=np.append(base.indptr, np.repeat(base.indptr[-1], missing)))
        made = replace(self, base=base, changed=changed, place=place, n_items=n_items)
        if len(changed.indptr) - 1 > max(n_users // _SHARE, 1024):
            return History.of(made.whole(), n_items)
        return made

    def columns(self, items: np.ndarray) -> sparse.csr_matrix:
        """Weights (m, M) of some items, in ascending order and each once."""
        wanted, is_wanted = np.zeros(self.n_items, np.int32), np.zeros(self.n_items, bool)
        wanted[items], is_wanted[items] = np.arange(len(items)), True
        found = []
        for cells, users in ((self.base, None), (self.changed, np.flatnonzero(self.place >= 0))):
            at = _positions(is_wanted, cells.items)
            rows = np.searchsorted(cells.indptr, at, side="right") - 1
            if users is None:
                is_current = self.place[rows] < 0
                at, rows = at[is_current], rows[is_current]
            else:
                rows = users[np.argsort(self.place[users])][rows]
            found.append((cells.weights[at], wanted[cells.items[at]], rows))
        weights, at, users = (np.concatenate(parts) for parts in zip(*found, strict=True))
        matrix = sparse.csr_matrix((weights, (at, users)), shape=(len(items), self.n_users))
        matrix.sort_indices()
        return matrix
