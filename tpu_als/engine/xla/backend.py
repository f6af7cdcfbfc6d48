"""The XLA backend: `engine.backends.Backend` over devices that JAX drives."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import sparse

from tpu_als.engine import layout
from tpu_als.engine.als import AlsState, Step
from tpu_als.engine.cells import Entries
from tpu_als.engine.data import AlsParams, KnownTable, LossParts
from tpu_als.engine.features import Features
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import features, fold_in, half_epoch, placing, ranking
from tpu_als.engine.xla.data import XlaData, XlaSide
from tpu_als.engine.xla.features import FeatureCells
from tpu_als.engine.xla.mesh import DeviceMesh, Shards, precision
from tpu_als.engine.xla.resident import Table


@dataclass(frozen=True)
class XlaBackend:
    """Runs compiled programs on the devices of a mesh.

    Attributes
    ----------
    mesh : DeviceMesh
        The devices, and how arrays are divided among them.
    """

    mesh: DeviceMesh
    accepts_part: ClassVar[bool] = False

    @property
    def process(self) -> int:
        """Index of this process among those of the mesh."""
        return self.mesh.process

    @property
    def n_processes(self) -> int:
        """Number of processes that have devices of the mesh."""
        return len(self.mesh.processes)

    @property
    def alone(self) -> XlaBackend:
        """The backend on this process's devices only."""
        return XlaBackend(self.mesh.alone)

    @property
    def placement(self) -> DeviceMesh:
        """The mesh."""
        return self.mesh

    def agree(self, number: int) -> int:
        """Return the maximum of a number over all processes."""
        return self.mesh.agree(number)

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Context in which collective failures become a RuntimeError."""
        return self.mesh.watched()

    def place(
        self,
        user_items: sparse.csr_matrix | Entries,
        params: AlsParams,
        *,
        with_digest: bool = False,
    ) -> XlaData:
        """Lay out a matrix in both orientations, and put it on the devices."""
        return placing.lay_out(user_items, params, self.mesh, self, with_digest=with_digest)

    def put(self, table: np.ndarray, side: XlaSide, data: XlaData) -> Shards:
        """Put a table (M, K) in the caller's order on the devices, in slot order."""
        slots = layout.to_slots(table, side.rows, data.mesh.local_shards)
        with precision(data.params.dtype):
            return data.mesh.put(slots)

    def draw(self, data: XlaData, seed: int, scale: float, normal: bool) -> list[Shards]:
        """See `als.draw`."""
        return half_epoch.draw(data, seed, scale, normal)

    def half_epoch(
        self,
        target_table: Shards,
        source_table: Shards,
        data: XlaData,
        step: Step,
    ) -> Shards:
        """See `als.half_epoch`."""
        return half_epoch.half_epoch(target_table, source_table, data, step)

    def place_features(self, given: Features, side: XlaSide, data: XlaData) -> FeatureCells:
        """Place the features (M, P) of a side's rows where the rows are."""
        return features.place(given, side, data)

    def feature_sums(
        self, table: Shards, side: XlaSide, data: XlaData, objective: Objective
    ) -> np.ndarray:
        """F^T L Z (P, K) in float64, summed over all shards."""
        assert side.features is not None
        return features.sums(side.features, table, side, data, objective)

    def prior(self, weights: np.ndarray, side: XlaSide, data: XlaData) -> Shards:
        """F W of the side's rows, in slot order."""
        assert side.features is not None
        return features.prior(side.features, weights, side, data)

    def filled(self, table: Shards, prior: Shards, side: XlaSide, data: XlaData) -> Shards:
        """A table with the rows of `prior` in place of those without entries."""
        return features.filled(table, prior, side, data)

    def count_failed(self, table: Shards, side: XlaSide, data: XlaData) -> int:
        """Number of rows of a table that are not finite."""
        return half_epoch.count_failed(table, side, data)

    def loss_parts(self, state: AlsState, data: XlaData, objective: Objective) -> LossParts:
        """Compute the terms of `als.loss`."""
        return half_epoch.loss_parts(state, data, objective)

    def table(self, table: Shards, side: XlaSide, data: XlaData) -> Table:
        """Return a table of a state, without the matrix; it stays on the devices until `fetch`."""
        return Table(table, side.rows, data.params, data.mesh)

    def source(
        self, table: np.ndarray, params: AlsParams, known: KnownTable | None = None
    ) -> fold_in.Source:
        """Place a fixed table (N, K), to solve rows against; the device computes its gramian."""
        return fold_in.source(table, params, self.mesh)

    def shared(self, source: fold_in.Source) -> fold_in.Source:
        """Return the source: its mesh, which is this one, has the threads."""
        return source

    def catalog(self, table: np.ndarray, lengths: np.ndarray | None = None) -> ranking.Catalog:
        """Place a table (N, K), to rank its rows by product, divided by `lengths` if given."""
        return ranking.catalog(table, self.mesh, lengths=lengths)

    def release(self, data: XlaData) -> None:
        """Do nothing: no memory is kept between half-epochs."""

    def describe_for_checkpoint(self, data: XlaData) -> XlaData:
        """Return the data: checkpoints have the form of this backend."""
        return data

    def to_checkpoint(self, state: AlsState, data: XlaData) -> AlsState:
        """Return the state: checkpoints have the form of this backend."""
        return state

    def from_checkpoint(self, state: AlsState, data: XlaData) -> AlsState:
        """Return the state: checkpoints have the form of this backend."""
        return state


def place(
    user_items: sparse.csr_matrix | Entries,
    params: AlsParams,
    mesh: DeviceMesh,
    *,
    with_digest: bool = False,
) -> XlaData:
    """Lay out a matrix on the devices of a mesh; see `placing.lay_out`."""
    return XlaBackend(mesh).place(user_items, params, with_digest=with_digest)
