"""The interface of backends: `engine.cpu` and `engine.xla` implement it, `choice` chooses one."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike
from scipy import sparse

from tpu_als.engine.als import AlsState, Step
from tpu_als.engine.cells import Entries
from tpu_als.engine.data import AlsParams, KnownTable, LossParts
from tpu_als.engine.features import Features
from tpu_als.engine.objective import Objective

if TYPE_CHECKING:
    from tpu_als.engine.xla.data import XlaData


class Catalog(Protocol):
    """A table whose rows can be ranked."""

    @property
    def dtype(self) -> DTypeLike:
        """Dtype of queries and scores."""

    def top_k(
        self,
        queries: np.ndarray,
        k: int,
        *,
        seen: sparse.csr_matrix | None = None,
        excluded: np.ndarray | None = None,
        approximate_recall: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores (B, k) of the best rows for each query (B, K)."""


class Source(Protocol):
    """A table that rows can be solved against.

    Attributes
    ----------
    wants_gramian : bool
        Whether `solve` is faster if the caller passes the table's gramian as `gram`. If False,
        callers pass `gram` only to replace the table's own gramian.
    """

    wants_gramian: ClassVar[bool]

    def solve(
        self,
        rows: sparse.csr_matrix,
        objective: Objective,
        *,
        start: np.ndarray | None = None,
        gram: np.ndarray | None = None,
        prior: np.ndarray | None = None,
    ) -> np.ndarray:
        """Solutions (M, K) of equation (1), drawn to the rows of `prior` (M, K) if given."""


class Table(Protocol):
    """A table of a state. It has no reference to the matrix, which may be freed."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""

    @property
    def is_resident(self) -> bool:
        """Whether it stays on the devices, because it may be too large for one host."""

    def fetch(self) -> np.ndarray:
        """Copy it to the host, in the caller's order."""


_TableT = TypeVar("_TableT")  # a table in the backend's form
_DataT = TypeVar("_DataT")  # the backend's subclass of `engine.data.Data`
_SideT = TypeVar("_SideT", contravariant=True)  # its subclass of `engine.data.Side`
_SourceT = TypeVar("_SourceT", bound=Source)  # its form of a fixed table


class Backend(Protocol[_TableT, _SideT, _DataT, _SourceT]):
    """Operations that `als`, training and serving need of a backend.

    The tables of a state are in the backend's own form.

    Attributes
    ----------
    accepts_part : bool
        Whether `source` accepts only those rows of a table that are needed, if the gramian of the
        whole table is known.
    """

    accepts_part: ClassVar[bool]

    @property
    def process(self) -> int:
        """Number of this process among those that work together."""

    @property
    def n_processes(self) -> int:
        """Number of those processes."""

    @property
    def alone(self) -> Backend[_TableT, _SideT, _DataT, _SourceT]:
        """The backend on this process's devices only."""

    @property
    def placement(self) -> Hashable:
        """Where `source` places tables. Backends with equal placements can share a source."""

    def agree(self, number: int) -> int:
        """Return the maximum of `number` over all processes."""

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Context in which failures of other processes become a RuntimeError."""

    def place(
        self,
        user_items: sparse.csr_matrix | Entries,
        params: AlsParams,
        *,
        with_digest: bool = False,
    ) -> _DataT:
        """Lay out a matrix in both orientations: `engine.data.Data`.

        The linear solver "auto" of `params` is replaced by "cg" or "cholesky".
        """

    def put(self, table: np.ndarray, side: _SideT, data: _DataT) -> _TableT:
        """Place a table (M, K) in the caller's order."""

    def draw(self, data: _DataT, seed: int, scale: float, normal: bool) -> list[_TableT]:
        """See `als.draw`."""

    def half_epoch(
        self,
        target_table: _TableT,
        source_table: _TableT,
        data: _DataT,
        step: Step,
    ) -> _TableT:
        """See `als.half_epoch`."""

    def place_features(self, features: Features, side: _SideT, data: _DataT) -> object:
        """Place the features (M, P) of a side's rows, given in the caller's order."""

    def feature_sums(
        self, table: _TableT, side: _SideT, data: _DataT, objective: Objective
    ) -> np.ndarray:
        """F^T L Z (P, K) in float64: factors times features, summed with the ridges (2)."""

    def prior(self, weights: np.ndarray, side: _SideT, data: _DataT) -> _TableT:
        """F W (M, K), what the features of a side's rows say, for weights W (P, K)."""

    def filled(self, table: _TableT, prior: _TableT, side: _SideT, data: _DataT) -> _TableT:
        """A table with the rows of `prior` in place of those without entries."""

    def count_failed(self, table: _TableT, side: _SideT, data: _DataT) -> int:
        """Number of rows of a table that are not finite."""

    def loss_parts(self, state: AlsState, data: _DataT, objective: Objective) -> LossParts:
        """Compute the terms of `als.loss`."""

    def table(self, table: _TableT, side: _SideT, data: _DataT) -> Table:
        """Return a table of a state, without a reference to the matrix."""

    def source(
        self, table: np.ndarray, params: AlsParams, known: KnownTable | None = None
    ) -> _SourceT:
        """Place a fixed table (N, K), or the part of one, to solve rows against.

        `known` saves the backend the computation of a gramian, if it can use the given one.
        """

    def shared(self, source: _SourceT) -> _SourceT:
        """A source of a backend with the same `placement`, for the threads of this one."""

    def catalog(self, table: np.ndarray, lengths: np.ndarray | None = None) -> Catalog:
        """Place a table (N, K), to rank its rows by product, divided by `lengths` if given."""

    def release(self, data: _DataT) -> None:
        """Free memory that is kept between half-epochs."""

    def describe_for_checkpoint(self, data: _DataT) -> XlaData:
        """Return the data in the form that checkpoints have."""

    def to_checkpoint(self, state: AlsState, data: _DataT) -> AlsState:
        """Convert a state from this backend's form to the form that checkpoints have."""

    def from_checkpoint(self, state: AlsState, data: _DataT) -> AlsState:
        """Convert a state from the form that checkpoints have to this backend's form."""
