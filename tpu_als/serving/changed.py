"""A table with a few changed rows, which is not copied until the whole table is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

FEW = 64  # rows to read without a copy of the table
# A table is not copied for up to so many changed rows or, if that is more, this share of its rows.
_MOST, _SHARE = 1024, 1 / 16
_NEEDED = 4  # rows are solved against a copy of the rows they need, if these are fewer than 1 / 4
_LARGE = 1 << 18  # numbers of a table; the copy of a smaller one takes no time that matters


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
    """

    base: np.ndarray
    rows: dict[int, np.ndarray]
    n_rows: int
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
        table = np.empty(self.shape, self.dtype)
        table[: len(self.base)] = self.base
        table[len(self.base) :] = 0
        for number, row in self.rows.items():
            table[number] = row
        return table

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
    is_small = base.size < _LARGE or n_rows > 2 * len(base)
    if is_small or len(changed.rows) > max(_MOST, _SHARE * len(base)):
        return changed.fetch()
    return changed
