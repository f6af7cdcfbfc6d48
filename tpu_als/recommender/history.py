"""The history of all users: one cell for a user and an item, with its value and its weight.

Axis letters: M users, N items, E cells.

An update must not copy all cells. So the cells of `fit` are divided into pieces, each with the rows
of consecutive users. Updates write rows into groups, of which there are as many as pieces. When the
group in use is full, the next piece is copied with the newest rows of its users, and the next group
is emptied and used. Pieces and groups take turns. Between the time when a group is full and the
time when it is emptied, every piece is copied, so all rows of the group are then in the pieces.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from scipy import sparse

_BLOCK = 1 << 18  # cells that are searched at a time
_SHARE = 8  # the groups have at most 1/8 of all cells
_PIECES, _LEAST = 32, 1 << 16  # most pieces of a fit's cells, and cells of a piece


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


def joined(parts: list[Cells]) -> Cells:
    """The rows of several, one after the other; at least one."""
    if len(parts) == 1:
        return parts[0]
    lengths = [part.lengths for part in parts]
    times = [part.times for part in parts if part.times is not None]
    return Cells(
        np.append(0, np.cumsum(np.concatenate(lengths))),
        np.concatenate([part.items for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.weights for part in parts]),
        np.concatenate(times) if len(times) == len(parts) else None,
    )


class Part(NamedTuple):
    """Rows of some users.

    Attributes
    ----------
    users : int32 array (m,)
        The user of each row.
    cells : Cells
        The rows. One is valid only if `part` and `row` of the history point to it.
    """

    users: np.ndarray
    cells: Cells

    def cut(self, rows: np.ndarray) -> tuple[Part, ...]:
        """Parts that begin at row 0 and at these rows, without copies."""
        users, (indptr, items, values, weights, times) = self
        bounds = np.unique(np.concatenate([[0], rows, [len(users)]])).tolist()
        parts = []
        for low, high in itertools.pairwise(bounds):
            some = slice(indptr[low], indptr[high])
            own = None if times is None else times[some]
            cells = Cells(
                indptr[low : high + 1] - indptr[low], items[some], values[some], weights[some], own
            )
            parts.append(Part(users[low:high], cells))
        return tuple(parts)


def _no_rows(cells: Cells) -> Part:
    """No rows, of the types of some cells."""
    return Part(np.empty(0, np.int32), cells.rows(np.empty(0, np.int64)))


@dataclass(frozen=True)
class History:
    """Cells (M, N) of all users. It does not change: an update makes another one.

    Attributes
    ----------
    pieces : tuple of Part
        Rows of consecutive users, as in `fit` or copied since.
    groups : tuple of Part
        As many, with rows that updates have changed or added.
    part : int16 array (M,)
        Where the row of each user is: p for a piece, ~p for a group.
    row : int32 array (M,)
        The user's row there.
    turn : int
        The group in use.
    n_items : int
        Number N of items.
    """

    pieces: tuple[Part, ...]
    groups: tuple[Part, ...]
    part: np.ndarray = field(repr=False)
    row: np.ndarray = field(repr=False)
    turn: int
    n_items: int

    @classmethod
    def of(cls, cells: Cells, n_items: int) -> History:
        """The history of a fit, in one piece."""
        users = np.arange(len(cells.indptr) - 1, dtype=np.int32)
        pieces = (Part(users, cells),)
        return cls(pieces, (_no_rows(cells),), np.zeros(len(users), np.int16), users, 0, n_items)

    @property
    def n_users(self) -> int:
        """Number M of users."""
        return len(self.part)

    def rows(self, users: np.ndarray) -> Cells:
        """Rows of some users, which must be in range."""
        part, row = self.part[users], self.row[users]
        order = np.argsort(part, kind="stable")
        present, counts = np.unique(part, return_counts=True)
        if len(present) < 2:
            return self._cells(present[0] if len(present) else 0).rows(row)
        ends = np.cumsum(counts)
        found = [
            self._cells(one).rows(row[order[end - count : end]])
            for one, count, end in zip(present, counts, ends, strict=True)
        ]
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return joined(found).rows(place)

    def _n_cells(self) -> int:
        """Number of cells in the pieces."""
        return sum(len(piece.cells.items) for piece in self.pieces)

    def _cells(self, part: int) -> Cells:
        return (self.pieces[part] if part >= 0 else self.groups[~part]).cells

    def lengths(self) -> np.ndarray:
        """Number of cells (M,) of each user."""
        lengths = [part.cells.lengths for part in (*self.pieces, *self.groups)]
        starts = np.cumsum([0, *map(len, lengths)])
        part = np.where(self.part >= 0, self.part, len(self.pieces) - 1 - self.part)
        return np.concatenate(lengths)[starts[part] + self.row]

    def all_cells(self) -> Cells:
        """All rows."""
        if len(self.pieces) == 1 and not len(self.groups[0].users):
            return self.pieces[0].cells
        return joined([self.rows(self._users_of(piece)) for piece in range(len(self.pieces))])

    def _users_of(self, piece: int) -> np.ndarray:
        """Users of a piece; the last one gets the users that updates have added."""
        users = self.pieces[piece].users
        if piece < len(self.pieces) - 1 or not len(users):
            return users
        return np.arange(users[0], self.n_users, dtype=np.int32)

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
        without = np.setdiff1d(np.arange(self.n_users, n_users), users, assume_unique=True)
        users = np.append(users, without).astype(np.int32)
        indptr = np.append(rows.indptr, np.repeat(rows.indptr[-1], len(without)))
        rows = rows._replace(indptr=indptr)
        before = self._in_pieces()
        turn, group = before.turn, before.groups[before.turn]
        part, row = np.empty(n_users, np.int16), np.empty(n_users, np.int32)
        part[: self.n_users], row[: self.n_users] = before.part, before.row
        part[users], row[users] = ~turn, -1
        is_newest = (part[group.users] == ~turn) & (row[group.users] == np.arange(len(group.users)))
        kept = np.flatnonzero(is_newest)
        owners = np.append(group.users[kept], users)
        row[owners] = np.arange(len(owners))
        groups = list(before.groups)
        groups[turn] = Part(owners, joined([group.cells.rows(kept), rows]))
        made = History(before.pieces, tuple(groups), part, row, turn, n_items)
        return made._after_turns()

    def _in_pieces(self) -> History:
        """The cells of a fit in several pieces, if they are many."""
        indptr = self.pieces[0].cells.indptr
        n_pieces = min(int(indptr[-1]) // _LEAST, _PIECES)
        if len(self.pieces) > 1 or n_pieces < 2 or len(self.groups[0].users):
            return self
        part, row = self.part.copy(), self.row.copy()
        costs = indptr + np.arange(len(indptr))  # of copying the rows before: cells and rows
        rows = np.searchsorted(costs, np.linspace(0, costs[-1], n_pieces + 1)[1:-1])
        pieces = self.pieces[0].cut(rows)
        for number, piece in enumerate(pieces):
            part[piece.users], row[piece.users] = number, np.arange(len(piece.users))
        return replace(self, pieces=pieces, groups=self.groups * len(pieces), part=part, row=row)

    def _after_turns(self) -> History:
        """The history after the turns that are due. Its `part` and `row` are written to."""
        made, n_pieces = self, len(self.pieces)
        total = self._n_cells()
        # A group is full at half of its share, since one update may add more than the other half.
        if len(self.groups[self.turn].cells.items) * _SHARE * n_pieces * 2 >= total:
            made = made._with_next_piece_copied()
        for _ in range(n_pieces):
            if sum(len(group.cells.items) for group in made.groups) * _SHARE <= total:
                break
            made = made._with_next_piece_copied()
        return made

    def _with_next_piece_copied(self) -> History:
        """Copy the next piece with the newest rows of its users, and empty the next group."""
        turn = (self.turn + 1) % len(self.pieces)
        users, groups = self._users_of(turn), list(self.groups)
        piece = Part(users, self.rows(users))
        groups[turn] = _no_rows(piece.cells)
        made: tuple[Part, ...] = (piece,)
        n_cells, is_last = len(piece.cells.items), turn + 1 == len(self.pieces)
        if is_last and n_cells >= 2 * max(_LEAST, self._n_cells() // len(self.pieces)):
            made = piece.cut(np.searchsorted(piece.cells.indptr, [n_cells // 2]))
        for number, one in enumerate(made, turn):
            self.part[one.users], self.row[one.users] = number, np.arange(len(one.users))
        groups += [groups[turn]] * (len(made) - 1)
        pieces = self.pieces[:turn] + made + self.pieces[turn + 1 :]
        return replace(self, pieces=pieces, groups=tuple(groups), turn=turn)

    def columns(self, items: np.ndarray) -> sparse.csr_matrix:
        """Weights (m, M) of some items, in ascending order and each once."""
        wanted, is_wanted = np.zeros(self.n_items, np.int32), np.zeros(self.n_items, bool)
        wanted[items], is_wanted[items] = np.arange(len(items)), True
        found = []
        groups = ((~number, group) for number, group in enumerate(self.groups))
        for number, (users, cells) in (*enumerate(self.pieces), *groups):
            at = _positions(is_wanted, cells.items)
            rows = np.searchsorted(cells.indptr, at, side="right") - 1
            owners = users[rows]
            is_current = (self.part[owners] == number) & (self.row[owners] == rows)
            at, owners = at[is_current], owners[is_current]
            found.append((cells.weights[at], wanted[cells.items[at]], owners))
        weights, at, users = (np.concatenate(parts) for parts in zip(*found, strict=True))
        matrix = sparse.csr_matrix((weights, (at, users)), shape=(len(items), self.n_users))
        matrix.sort_indices()
        return matrix
