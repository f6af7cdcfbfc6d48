"""The interface of backends, and the choice of one: a CPU's loops without JAX, or XLA's programs.

`choose` imports JAX only if an argument needs it, if numba is needed and not available, or if JAX
may have an accelerator or other processes. JAX then reports its devices.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike
from scipy import sparse

from tpu_als.engine.als import AlsState, Step
from tpu_als.engine.cells import Entries
from tpu_als.engine.cpu import compiled
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.data import AlsParams, KnownTable, LossParts
from tpu_als.engine.features import Features
from tpu_als.engine.objective import Objective
from tpu_als.host import thread_count
from tpu_als.parameters import LAYOUTS

if TYPE_CHECKING:
    from tpu_als.engine.xla.data import XlaData

log = logging.getLogger("tpu_als")


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

    def best_of_one(
        self, query: np.ndarray, k: int, seen: sparse.csr_matrix | None = None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """`top_k` of a single query (K,), or None if only `top_k` can rank it."""


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


@dataclass(frozen=True)
class Wishes:
    """A caller's requirements for the backend; the attributes are the estimator's parameters."""

    devices: object = None
    num_threads: int = 0
    use_gpu: bool | None = None
    table_layout: str = "auto"
    use_native: bool = True


def choose(wishes: Wishes, linear_solver: str | None = "cg") -> Backend:
    """Choose a backend.

    Parameters
    ----------
    wishes : Wishes
        Devices and threads.
    linear_solver : str or None, default="cg"
        How `fit` solves rows, for which the CPU backend needs numba. None means that the backend is
        not for a fit, but to rank tables and to solve rows exactly.

    Raises
    ------
    ValueError
        For an unknown layout, or devices that do not exist, repeat or are of another type.
    RuntimeError
        If `use_gpu` is True and JAX has no GPU, and in a process that was forked from one in which
        XLA has started.
    """
    if wishes.table_layout not in LAYOUTS:
        raise ValueError(f"table_layout must be one of {LAYOUTS}, got {wishes.table_layout!r}")
    fits = wishes.use_native and wishes.table_layout == "auto"
    if linear_solver is not None:
        fits = fits and compiled.is_available()
    is_plain = wishes.devices is None or (wishes.devices == 1 and wishes.devices is not True)
    if fits and is_plain and not wishes.use_gpu and not may_have_accelerator():
        return CpuBackend(thread_count(wishes.num_threads))
    from tpu_als.engine.xla.backend import XlaBackend
    from tpu_als.engine.xla.mesh import device_mesh

    mesh = device_mesh(wishes.devices, wishes.num_threads, wishes.use_gpu, wishes.table_layout)
    if fits and mesh.platform == "cpu" and len(mesh.processes) == 1:
        return CpuBackend(mesh.as_threads.n_threads)
    return XlaBackend(mesh)


def may_have_accelerator() -> bool:
    """Whether JAX may have other devices than this machine's CPU, or other processes.

    This does not import JAX: plugins for GPUs and TPUs are separate packages. The environment
    variable JAX_PLATFORMS, and JAX's option of that name if JAX is imported already, can exclude
    them.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        return True
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if jax is not None:
        platforms = jax.config.jax_platforms or platforms
    if platforms:
        return platforms.split(",")[0].strip() != "cpu"
    if not _has_plugin():
        _tell_of_gpu()
        return False
    return True


@functools.cache
def _tell_of_gpu() -> None:
    """Log once that an NVIDIA GPU is not used because JAX has no plugin for it."""
    if os.path.exists("/dev/nvidiactl"):
        log.warning(
            "this machine has an NVIDIA GPU, but JAX's plugin for it is not installed, so that the "
            "CPU is used: pip install 'jax[cuda13]', or set JAX_PLATFORMS=cpu to hide this"
        )


@functools.cache
def _has_plugin() -> bool:
    """Whether a plugin for JAX is installed: a package in ``jax_plugins``, or ``libtpu``."""
    libtpu = importlib.util.find_spec("libtpu")
    if libtpu is not None and libtpu.origin is not None:  # else a folder of that name
        return True
    plugins = importlib.util.find_spec("jax_plugins")
    folders = () if plugins is None else plugins.submodule_search_locations or ()
    if any(name != "__pycache__" for folder in folders for name in os.listdir(folder)):
        return True
    return bool(importlib.metadata.entry_points(group="jax_plugins"))
