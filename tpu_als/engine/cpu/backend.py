"""The CPU backend: `engine.backends.Backend` on the threads of one process, without JAX."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy import sparse

from tpu_als.engine import cells, layout
from tpu_als.engine.als import AlsState, Step
from tpu_als.engine.cells import Entries, InMemory
from tpu_als.engine.cpu import compiled, exact, half_epoch, ranking
from tpu_als.engine.cpu.half_epoch import Rows, Settings
from tpu_als.engine.cpu.memory import Memory
from tpu_als.engine.data import AlsParams, Data, KnownTable, LossParts, Side
from tpu_als.engine.digests import EntriesDigest
from tpu_als.engine.features import Features, row_ridges
from tpu_als.engine.objective import Objective, largest_weight, typed, weights_vanish
from tpu_als.engine.reading import (
    SIDES,
    Totals,
    as_entries,
    cheapest_for,
    check_digests,
    kept_as,
    require_tables,
)
from tpu_als.host import give_back_memory, require_memory, single_blas_thread

if TYPE_CHECKING:
    from tpu_als.engine.xla.data import XlaData

_BLOCK = 1 << 13  # rows whose products with features are summed in the dtype of sums
_MANY = 1 << 20  # with more entries, freed memory is returned to the system; it takes milliseconds


@dataclass(frozen=True, kw_only=True)
class CpuSide(Side):
    """One orientation of a matrix, its rows and entries as they come.

    Attributes
    ----------
    entries : Rows
        The rows with their entries.
    """

    entries: Rows


@dataclass(frozen=True, kw_only=True)
class CpuData(Data):
    """Both orientations of a matrix, and memory for tables.

    Attributes
    ----------
    memory : Memory
        Memory of unused tables, which the next half-epoch uses again.
    """

    users: CpuSide
    items: CpuSide
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)


@dataclass(frozen=True)
class Table:
    """A table (M, K) of a state, which is copied when it is fetched.

    Attributes
    ----------
    rows : array (M, K)
        The table. The next half-epoch does not change it.
    """

    rows: np.ndarray
    is_resident = False

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return self.rows.shape[0], self.rows.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """float32 or float64; that of `fetch`."""
        return half_epoch.compute_dtype(self.rows)

    def fetch(self) -> np.ndarray:
        """A writeable copy; bfloat16 becomes float32."""
        return np.array(self.rows, self.dtype)


@dataclass(frozen=True)
class CpuBackend:
    """Runs compiled loops and BLAS on threads.

    Attributes
    ----------
    n_threads : int
        Number of threads.
    """

    n_threads: int
    process = 0
    n_processes = 1
    placement = "host"
    accepts_part: ClassVar[bool] = True

    @property
    def alone(self) -> CpuBackend:
        """The backend of this process, which is this one."""
        return self

    def agree(self, number: int) -> int:
        """Return `number`: there is only one process."""
        return number

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: there are no other processes."""
        return contextlib.nullcontext()

    def place(
        self,
        user_items: sparse.csr_matrix | Entries,
        params: AlsParams,
        *,
        with_digest: bool = False,
    ) -> CpuData:
        """Lay out a matrix in both orientations.

        Parameters
        ----------
        user_items : CSR matrix (M, N) or Entries
            A matrix is canonical: sorted indices, no duplicates. Stored zeros are entries.
        params : AlsParams
            Decides the dtype. The linear solver "auto" is replaced by "cg" or "cholesky".
        with_digest : bool, default=False
            Whether to compute the digest of a matrix in memory, which checkpoints need. The digest
            of `Entries` on disk is always computed.

        Raises
        ------
        MemoryError
            If the tables, or the row lengths of `Entries` on disk, do not fit into memory.
        ValueError
            If the two sides of `Entries` differ.
        """
        require_tables(user_items.shape, params)
        entries = as_entries(user_items)
        if params.linear_solver == "auto":
            params = replace(params, linear_solver=cheapest_for(user_items, params))
        compiled.begin_loading(params.dtype)
        totals, values_dtype = Totals(), kept_as(entries, params)
        with_digest = with_digest or not isinstance(entries, InMemory)
        digests: dict[str, EntriesDigest] = {}
        sides = {}
        # Items first: the transposed matrix is freed before the users' entries are laid out.
        for name in reversed(SIDES):
            blocks = entries.blocks(name)
            if name == "user":
                blocks = totals.passing(blocks)
            # The other side of a matrix in memory is made from the first.
            if with_digest and (name == "user" or not isinstance(entries, InMemory)):
                digests[name] = EntriesDigest(name, entries.shape[name == "user"])
                blocks = digests[name].passing(iter(blocks))
            sides[name] = _side(blocks, _lengths(entries, name), entries.shape, name, values_dtype)
            if isinstance(entries, InMemory):
                entries = replace(entries, item_users=None)
        if entries.nnz > _MANY:
            give_back_memory()
        if len(digests) > 1:
            check_digests(digests["user"].total, digests["item"].total, entries)
        return CpuData(
            users=sides["user"],
            items=sides["item"],
            params=params,
            backend=self,
            n_entries=entries.nnz,
            absolute_sum=totals.absolute_sum,
            magnitudes=totals.magnitudes,
            digest=digests["user"].total if digests else None,
        )

    def put(self, table: np.ndarray, side: CpuSide, data: CpuData) -> np.ndarray:
        """Copy a table (M, K)."""
        return np.array(table)

    def draw(self, data: CpuData, seed: int, scale: float, normal: bool) -> list[np.ndarray]:
        """See `als.draw`; brings JAX in, whose generator it is."""
        from tpu_als.engine.xla import bridge

        return bridge.draw(data, seed, scale, normal)

    def half_epoch(
        self,
        target_table: np.ndarray,
        source_table: np.ndarray,
        data: CpuData,
        step: Step,
    ) -> np.ndarray:
        """See `als.half_epoch`."""
        params, side, dtype = data.params, getattr(data, step.target), data.params.compute_dtype
        numbers = step.objective, data.magnitudes, dtype
        settings = Settings(
            typed(step.objective, dtype),
            step.relaxation,
            0 if weights_vanish(*numbers) else params.cg_steps,
            largest_weight(*numbers),
        )
        if params.linear_solver == "exact" and settings.steps:
            steps, tolerance = half_epoch.most_steps(params.factors), half_epoch.TOLERANCE[dtype]
            settings = settings._replace(steps=steps, tolerance=tolerance)
        if params.linear_solver == "cholesky" and settings.steps:
            settings = settings._replace(is_direct=True)
        rows = side.entries._replace(priors=step.prior)
        with single_blas_thread():
            solved = half_epoch.solve_side(
                target_table, source_table, rows, settings, data.memory, self.n_threads
            )
        if settings.tolerance:
            wide = source_table.astype(dtype, copy=False)
            source = exact.Source(wide, params, self.n_threads)
            exact.solve_failed(solved, target_table, source, rows, settings)
        return solved

    def place_features(self, features: Features, side: CpuSide, data: CpuData) -> sparse.csr_matrix:
        """The features in the dtype of sums."""
        return features.matrix.astype(data.params.compute_dtype, copy=False)

    def feature_sums(
        self, table: np.ndarray, side: CpuSide, data: CpuData, objective: Objective
    ) -> np.ndarray:
        """F^T L Z (P, K): blocks are summed in float64."""
        assert side.features is not None
        n_source = (data.items if side is data.users else data.users).n_rows
        ridges, dtype = row_ridges(objective, side.lengths, n_source), data.params.compute_dtype
        total = np.zeros((side.features.matrix.shape[1], table.shape[1]))
        for low in range(0, side.n_rows, _BLOCK):
            at = slice(low, low + _BLOCK)
            weighted = table[at].astype(dtype) * ridges[at, None].astype(dtype)
            total += side.features.placed[at].T @ weighted
        return total

    def prior(self, weights: np.ndarray, side: CpuSide, data: CpuData) -> np.ndarray:
        """F W (M, K)."""
        assert side.features is not None
        prior: np.ndarray = side.features.placed @ weights.astype(data.params.compute_dtype)
        return prior

    def filled(
        self, table: np.ndarray, prior: np.ndarray, side: CpuSide, data: CpuData
    ) -> np.ndarray:
        """A table with the rows of `prior` in place of those without entries."""
        is_empty = side.lengths == 0
        filled = np.array(table)
        filled[is_empty] = prior[is_empty]
        return filled

    def count_failed(self, table: np.ndarray, side: CpuSide, data: CpuData) -> int:
        """Number of rows of a table that are not finite."""
        return int(len(table) - np.count_nonzero(np.isfinite(table).all(axis=1)))

    def loss_parts(self, state: AlsState, data: CpuData, objective: Objective) -> LossParts:
        """What `als.loss` adds up."""
        own = typed(objective, data.params.compute_dtype)
        with single_blas_thread():
            entries = half_epoch.measure_side(*state, data.users.entries, own, self.n_threads)
            users, items = (
                half_epoch.gramian(table, self.n_threads, np.float64) for table in state
            )
        dtype = data.params.compute_dtype
        wide = (table.astype(dtype, copy=False) for table in state)
        squares = [np.einsum("nk,nk->n", table, table) for table in wide]
        return LossParts(entries, (users, items), (squares[0], squares[1]))

    def table(self, table: np.ndarray, side: CpuSide, data: CpuData) -> Table:
        """A table of a state, without the matrix."""
        return Table(table)

    def source(
        self, table: np.ndarray, params: AlsParams, known: KnownTable | None = None
    ) -> exact.Source:
        """A fixed table (N, K), or its rows that are needed, to solve rows against."""
        if known is None:
            return exact.Source(table, params, self.n_threads)
        source = exact.Source(table, params, self.n_threads, known.n_rows)
        return source.knowing(known.gramian)

    def shared(self, source: exact.Source) -> exact.Source:
        """The same source, for this number of threads."""
        return source.on(self.n_threads)

    def catalog(self, table: np.ndarray, lengths: np.ndarray | None = None) -> ranking.Catalog:
        """A table (N, K), to rank its rows by product, divided by `lengths` if given."""
        return ranking.Catalog(table, lengths, self.n_threads)

    def release(self, data: CpuData) -> None:
        """Free the memory that is kept between half-epochs."""
        data.memory.clear()

    def describe_for_checkpoint(self, data: CpuData) -> XlaData:
        """The data in the form that checkpoints have, which is that of the XLA backend."""
        from tpu_als.engine.xla import bridge

        return bridge.describe(data)

    def to_checkpoint(self, state: AlsState, data: CpuData) -> AlsState:
        """A state in that form."""
        from tpu_als.engine.xla import bridge

        return bridge.to_xla(state, data)

    def from_checkpoint(self, state: AlsState, data: CpuData) -> AlsState:
        """A state in this backend's form, from that form."""
        from tpu_als.engine.xla import bridge

        return bridge.from_xla(state, data)


def _lengths(entries: Entries, name: str) -> np.ndarray:
    """Number of entries (M,) of each row of a side."""
    n_rows = entries.shape[SIDES.index(name)]
    if not isinstance(entries, InMemory):
        require_memory(
            {f"lengths and places of {n_rows} rows by {name}": 40 * n_rows},
            "check the numbers of users and items",
        )
    rows, counts = entries.lengths(name)
    lengths = np.zeros(n_rows, np.int64)
    lengths[rows] = counts
    return lengths


def _side(
    blocks: cells.Blocks,
    lengths: np.ndarray,
    shape: tuple[int, int],
    name: str,
    dtype: np.dtype | None,
) -> CpuSide:
    """Lay out one side: the entries of row after row."""
    rows, n_source = layout.in_order(lengths), shape[name == "user"]
    ids, values = cells.fill(blocks, rows, np.arange(n_source), n_source, range(1), dtype)
    entries = Rows(
        rows.cells, lengths, ids[0].view(np.uint32), None if values is None else values[0]
    )
    return CpuSide(lengths=lengths, entries=entries)
