"""Factor tables that stay on the devices: read rows, compute norms, solve rows against them.

Only `Table.fetch` copies a whole table to one device or to the host. If there are several
processes, all must make the same calls, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import sparse

from tpu_als.engine import layout
from tpu_als.engine.als import Step
from tpu_als.engine.data import AlsParams, dtype_named
from tpu_als.engine.layout import RowMap
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import half_epoch, placing, ranking
from tpu_als.engine.xla.mesh import Collectives, DeviceMesh, Shards, precision
from tpu_als.engine.xla.programs import REPLICATED


@dataclass(frozen=True)
class Table:
    """A factor table (M, K) on the devices after training, without the matrix.

    Attributes
    ----------
    shards : Shards
        The rows in slot order.
    rows : RowMap
        The slots of the rows.
    params : AlsParams
        The parameters that it was trained with.
    mesh : DeviceMesh
        The devices.
    """

    shards: Shards
    rows: RowMap
    params: AlsParams
    mesh: DeviceMesh

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return len(self.rows.slots), self.params.factors

    @property
    def dtype(self) -> np.dtype:
        """Dtype of rows on the host: float32 or float64."""
        return np.dtype(self.params.compute_dtype)

    @property
    def is_resident(self) -> bool:
        """Whether the table may be too large for one device or one process."""
        return self.mesh.collectives.is_sharded or len(self.mesh.processes) > 1

    def fetch(self) -> np.ndarray:
        """Copy the table to the host, in the caller's order: a writeable array (M, K)."""
        rows = layout.from_slots(self.mesh.get(self.shards), self.rows)
        return rows.astype(self.dtype, copy=False)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Fetch some rows (n, K)."""
        padded = np.full(layout.round_up(len(ids)), -1, np.int64)
        padded[: len(ids)] = self.rows.slots[ids]
        shard, slot = (part.astype(np.int32) for part in np.divmod(padded, self.rows.n_slots))
        numbers = np.array(self.mesh.local_shards, np.int32)
        with precision(self.params.dtype):
            program = self.mesh.all_shards_program(_take, self.params.compute_dtype, REPLICATED)
            sharded = self.shards, self.mesh.put(numbers[:, None])
            return np.array(program(sharded, (shard, slot)))[: len(ids)]

    def gramian(self) -> np.ndarray:
        """Compute the gramian (K, K) of its rows."""
        return np.array(self._summary().gramian)

    def norms(self) -> np.ndarray:
        """Compute the Euclidean length (M,) of each row."""
        with precision(self.params.dtype):
            squares = self.mesh.get(self._summary().squares).ravel()
        return np.sqrt(squares[self.rows.slots])

    def catalog(self, lengths: np.ndarray | None = None) -> ranking.Catalog:
        """Rank its rows by product, divided by `lengths` if given, without a copy."""
        return ranking.catalog_of(self.shards, self.rows, self.mesh, lengths=lengths)

    def _summary(self) -> half_epoch.Summary:
        with precision(self.params.dtype):
            program = self.mesh.all_shards_program(
                half_epoch.summarise, self.params.compute_dtype, half_epoch.SUMMARY_SPECS
            )
            return program(self.shards, None)

    def solve(
        self, rows: sparse.csr_matrix, objective: Objective, prior: np.ndarray | None = None
    ) -> np.ndarray:
        """Solve canonical rows (n, M) exactly against it, drawn to `prior` (n, K): (n, K)."""
        params = replace(self.params, linear_solver="cholesky")
        data = placing.place_rows(rows, self.rows, params, self.mesh)
        with precision(params.dtype):
            zero = self.mesh.zeros(
                (data.users.rows.n_slots, params.factors), dtype_named(params.dtype)
            )
        priors = None
        if prior is not None:
            wide = prior.astype(params.compute_dtype, copy=False)
            slots = layout.to_slots(wide, data.users.rows, self.mesh.local_shards)
            with precision(params.dtype):
                priors = self.mesh.put(slots)
        step = Step(objective, "users", prior=priors)
        solved = half_epoch.half_epoch(zero, self.shards, data, step)
        return Table(solved, data.users.rows, params, self.mesh).fetch()


def _take(
    dtype: str,
    collectives: Collectives,
    sharded: tuple[Shards, Shards],
    wanted: tuple[Array, Array],
) -> Array:
    """Rows of a table at the wanted shards and slots (n,), given the parts and their numbers."""
    shard, slot = wanted

    def part(table: Array, number: Array) -> Array:
        rows = table.at[slot].get(mode="clip").astype(dtype)
        return jnp.where((shard == number)[:, None], rows, 0)

    parts = jax.tree.map(part, *sharded)
    local = collectives.local_parts(parts)
    return collectives.sum(sum(local[1:], local[0]))
