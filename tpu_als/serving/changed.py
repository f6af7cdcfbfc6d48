"""A table with a few changed rows, which is not copied until the whole table is read.

Many changed rows are written into a new table. For a read-only table this copy is made in parts:
after half of the permitted changes, each change copies another part, so that no change is slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import sparse

FEW = 64  # rows to read without a copy of the table
# A table is not copied for up to so many changed rows or, if that is more, this share of its rows.
_MOST, _SHARE = 1024, 1 / 16
_NEEDED = 4  # rows are solved against a copy of the rows they need, if these are fewer than 1 / 4
_LARGE = 1 << 18  # numbers of a table; the copy of a smaller one takes no time that matters


class Copy(NamedTuple):
    """Unfinished copy of a changed table.

    Attributes
    ----------
    table : array (capacity, K)
        Rows below `n_copied` are done, and so are the rows that were added to the base.
    n_copied : int
        Number of rows of the base that are done.
    """

    table: np.ndarray
    n_copied: int


@dataclass(frozen=True)
class ChangedTable:
    """A table (n, K) with some rows replaced or added. It does not change.

    Attributes
    ----------
    base : array (n_base, K)
        The table before.
    rows : dict of int to array (K,)
        Changed rows. Added rows that are not in it are zero.
    n_rows : int
        Number n of rows.
    copies : list of Copy
        At most one. `fetch` or the next changed table removes it from the list, and then may
        write into it. So two tables that are made from this one share no memory.
    """

    base: np.ndarray
    rows: dict[int, np.ndarray]
    n_rows: int
    copies: list[Copy] = field(default_factory=list, repr=False, compare=False)
    is_resident = False

    @property
    def shape(self) -> tuple[int, int]:
        """(n, K)."""
        return self.n_rows, self.base.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the values."""
        return self.base.dtype

    def __len__(self) -> int:
        return self.n_rows

    def fetch(self) -> np.ndarray:
        """The whole table, in new memory."""
        copy = self._taken() or self._started(0)
        return self._continued(copy, len(self.base)).table[: self.n_rows]

    def copied_from(
        self, before: ChangedTable, changes: dict[int, np.ndarray], n_copied: int, n_spare: int
    ) -> Copy:
        """Take the copy of the table before these changes, or start one, and continue it.

        `n_copied` is the number of rows of the base that must be copied after this call. A new copy
        has memory for `n_spare` rows more than this table.
        """
        copy, n_base = before._taken(), len(self.base)
        if copy is None or len(copy.table) < self.n_rows:
            copy = self._started(n_spare)
        else:
            copy.table[before.n_rows : self.n_rows] = 0
            for number, row in changes.items():
                if number < copy.n_copied or number >= n_base:
                    copy.table[number] = row
        return self._continued(copy, max(n_copied, copy.n_copied))

    def _taken(self) -> Copy | None:
        try:
            return self.copies.pop()  # another thread may be first
        except IndexError:
            return None

    def _started(self, n_spare: int) -> Copy:
        """A copy with the added rows only."""
        n_base = len(self.base)
        table = np.empty((self.n_rows + n_spare, self.base.shape[1]), self.dtype)
        table[n_base : self.n_rows] = 0
        for number, row in self.rows.items():
            if number >= n_base:
                table[number] = row
        return Copy(table, 0)

    def _continued(self, copy: Copy, end: int) -> Copy:
        """The copy with the rows of the base up to `end`."""
        table, start = copy
        table[start:end] = self.base[start:end]
        for number, row in self.rows.items():
            if start <= number < end:
                table[number] = row
        return Copy(table, end)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Copies of a few rows; the ids must be in range."""
        found = np.zeros((len(ids), self.base.shape[1]), self.dtype)
        is_base = ids < len(self.base)
        found[is_base] = self.base[ids[is_base]]
        for at, number in enumerate(ids.tolist()):
            if number in self.rows:
                found[at] = self.rows[number]
        return found

    def needed(self, rows: sparse.csr_matrix) -> tuple[np.ndarray, sparse.csr_matrix] | None:
        """The table's rows (m, K) that entries refer to, and the entries with ids of these.

        None if these are many, or an entry's id is n, which stands for a row of zeros.
        """
        ids, positions = np.unique(rows.indices, return_inverse=True)
        if len(ids) * _NEEDED > self.n_rows or (len(ids) and ids[-1] >= self.n_rows):
            return None
        shape = rows.shape[0], len(ids)
        entries = rows.data, positions.astype(rows.indices.dtype), rows.indptr
        return self.take(ids), sparse.csr_matrix(entries, shape=shape)


def rows_of(table: np.ndarray | ChangedTable, ids: np.ndarray) -> np.ndarray:
    """Copies (m, K) of rows; zeros for ids past the end."""
    if isinstance(table, ChangedTable):
        return table.take(ids)
    found = np.zeros((len(ids), table.shape[1]), table.dtype)
    is_row = ids < len(table)
    found[is_row] = table[ids[is_row]]
    return found


def with_rows(
    table: np.ndarray | ChangedTable, ids: np.ndarray, rows: np.ndarray
) -> np.ndarray | ChangedTable:
    """A table with some rows replaced. Ids past the end add rows, with zeros in the gaps.

    Parameters
    ----------
    table : array (n, K) or ChangedTable
        The table, which stays as it is.
    ids : int array (m,)
        At least 0. If an id repeats, its last row is kept.
    rows : array (m, K)
        Their rows.
    """
    if not isinstance(table, ChangedTable):
        table = ChangedTable(table, {}, len(table))
    base = table.base
    changes = dict(zip(ids.tolist(), rows.astype(base.dtype), strict=True))
    n_rows = max(table.n_rows, 1 + max(changes, default=-1))
    changed = ChangedTable(base, {**table.rows, **changes}, n_rows)
    if base.size < _LARGE or n_rows > 2 * len(base):
        return changed.fetch()
    most = max(_MOST, int(_SHARE * len(base)))
    is_full = len(changed.rows) > most
    share = min(2 * len(changed.rows) / most - 1, 1.0)
    # The caller may still write into a table that is not read-only, so it is copied at once.
    if share > 0 and not base.flags.writeable:
        copy = changed.copied_from(table, changes, int(share * len(base)), most)
        if not is_full:
            changed.copies.append(copy)
            return changed
        return copy.table[:n_rows]
    return changed.fetch() if is_full else changed
