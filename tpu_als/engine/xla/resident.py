"""Factor tables that stay on the devices: read in part, measured, and solved against.

Nothing here brings a whole table to one device or to a host, save `Table.fetch`. With several
processes all of them have to make the same calls, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import sparse

from tpu_als.engine import layout
from tpu_als.engine.data import DTYPES, AlsParams
from tpu_als.engine.layout import RowMap
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import half_epoch, placing, ranking
from tpu_als.engine.xla.mesh import Shards, Together, Workplace, precision


@dataclass(frozen=True)
class Table:
    """A factor table (M, K) as training leaves it on the devices, without the matrix.

    Attributes
    ----------
    shards : Shards
        The rows in slot order.
    rows : RowMap
        Which row is where.
    params : AlsParams
        Those it was trained with.
    place : Workplace
        Where it is.
    """

    shards: Shards
    rows: RowMap
    params: AlsParams
    place: Workplace

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return len(self.rows.slots), self.params.factors

    @property
    def dtype(self) -> np.dtype:
        """Of rows as they are read: float32 or float64."""
        return np.dtype(self.params.compute_dtype)

    @property
    def is_resident(self) -> bool:
        """Whether it may be more than one process, or one device, should hold."""
        return self.place.together.sharded or len(self.place.processes) > 1

    def fetch(self) -> np.ndarray:
        """Bring it to the caller's order: a writeable copy (M, K)."""
        rows = layout.from_slots(self.place.get(self.shards), self.rows)
        return rows.astype(self.dtype, copy=False)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Fetch some rows (n, K)."""
        padded = np.full(layout.round_up(len(ids)), -1, np.int64)
        padded[: len(ids)] = self.rows.slots[ids]
        shard, slot = (each.astype(np.int32) for each in np.divmod(padded, self.rows.n_slots))
        first = np.arange(self.place.n_shards, dtype=np.int32)[list(self.place.local)]
        with precision(self.params.dtype):
            program = self.place.whole(_take, self.params.compute_dtype)
            own = self.shards, self.place.put(first[:, None])
            return np.array(program(own, (shard, slot))[0])[: len(ids)]

    def gramian(self) -> np.ndarray:
        """Compute the gramian (K, K) of its rows."""
        return self._summarised()[0]

    def norms(self) -> np.ndarray:
        """Compute the Euclidean length (M,) of each row."""
        return np.sqrt(self._summarised()[1])

    def catalog(self, lengths: np.ndarray | None = None) -> ranking.Catalog:
        """The table where it is, to rank its rows by product, divided by `lengths` if given."""
        return ranking.catalog_of(self.shards, self.rows, self.place, lengths=lengths)

    def _summarised(self) -> tuple[np.ndarray, np.ndarray]:
        with precision(self.params.dtype):
            program = self.place.whole(half_epoch.gramian_and_squares, self.params.compute_dtype)
            gramian, _, squares = program(self.shards, None)
            return np.array(gramian), self.place.get(squares).ravel()[self.rows.slots]

    def solve(self, rows: sparse.csr_matrix, objective: Objective) -> np.ndarray:
        """Solve canonical rows (n, M) exactly against it: (n, K)."""
        params = replace(self.params, linear_solver="cholesky")
        data = placing.place_rows(rows, self.rows, params, self.place)
        with precision(params.dtype):
            zero = self.place.zeros((data.users.rows.n_slots, params.factors), DTYPES[params.dtype])
        solved = half_epoch.half_epoch(zero, self.shards, data, objective, 1.0, target="users")
        return Table(solved, data.users.rows, params, self.place).fetch()


def _take(
    dtype: str, together: Together, own: tuple[Shards, Shards], at: tuple[Array, Array]
) -> tuple[Array, None, None]:
    shard, slot = at

    def part(table: Array, number: Array) -> Array:
        rows = table.at[slot].get(mode="clip").astype(dtype)
        return jnp.where((shard == number)[:, None], rows, 0)

    parts = jax.tree.map(part, *own)
    mine = sum(parts[1:], parts[0]) if isinstance(parts, list) else parts
    return together.total(mine), None, None
