"""Place a matrix on the devices: plan shapes, fill cells, place both orientations.

Axis letters: M and N rows and columns of the matrix, W work shards, K factors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import Array
from scipy import sparse

from tpu_als.engine import cells, layout
from tpu_als.engine.cells import Entries, InMemory, LongCells, LongRows
from tpu_als.engine.data import AlsParams, dtype_named
from tpu_als.engine.digests import EntriesDigest
from tpu_als.engine.layout import Plan, RowMap
from tpu_als.engine.reading import (
    SIDES,
    Totals,
    as_entries,
    cheapest_solver,
    check_digests,
    kept_as,
    require_tables,
)
from tpu_als.engine.xla import exchange, row_kernels, table_checksums
from tpu_als.engine.xla.data import XlaData, XlaSide, device_products, long_shape
from tpu_als.engine.xla.exchange import Messages, Route
from tpu_als.engine.xla.mesh import Collectives, DeviceMesh, Shards, precision
from tpu_als.engine.xla.programs import SHARDED
from tpu_als.engine.xla.row_kernels import RowKernels
from tpu_als.engine.xla.sweep import ShardCells
from tpu_als.engine.xla.tile_products import TileProducts
from tpu_als.host import give_back_memory, require_memory
from tpu_als.validation import structure

if TYPE_CHECKING:
    from tpu_als.engine.backends import Backend

# Bytes of a gathered chunk; on a CPU, those of a core's own cache.
_SCRATCH = {"cpu": 1 << 20, "other": 1 << 26}
_LANES = 128  # numbers in a row of a TPU's registers
_SYSTEMS = {"cpu": 1 << 22, "other": 1 << 28}  # bytes of the K x K systems of a chunk
# Cells of the longest rung; longer rows are solved by all shards together.
_LONGEST = {"cpu": layout.LONGEST, "other": 1 << 16}
# Factors times cells whose work in a few fits takes as long as compiling one more rung.
_RUNG_CELLS = {"cpu": 4e6, "other": 1e8}
_BATCH_ROWS = 1 << 10  # rows of a batch that the kernels' chunks are planned for
_GATHERED = 1 << 20  # row lengths of each process gathered at once
# Bytes of unused slots that sharing programs between the sides may cost.
_SHARED_WASTE = 1 << 26
_MANY = 1 << 20  # with more entries, freed memory is returned to the system; it takes milliseconds


def make_plan(lengths: np.ndarray, params: AlsParams, mesh: DeviceMesh) -> Plan:
    """Choose chunk sizes for the devices' memory, and rungs for the rows of both sides.

    The plan depends on the arguments only, never on earlier fits of the process.
    """
    rung_cells = _RUNG_CELLS[backend_kind(mesh)] / params.factors
    rungs = layout.ladder(lengths, rung_cells, longest=_longest_rung(params, mesh))
    return plan_of(rungs, int(lengths.sum()), params, mesh)


def plan_of(rungs: tuple[int, ...], n_entries: int, params: AlsParams, mesh: DeviceMesh) -> Plan:
    """The plan with rungs of these lengths, for a matrix with this number of entries."""
    chunk, most_rows = chunk_sizes(params, mesh)
    if isinstance(device_products(params, mesh), RowKernels):
        chunk, most_rows = row_kernels.chunk_sizes(n_entries // mesh.n_shards)
    return Plan(rungs, chunk, most_rows, mesh.n_shards, len(mesh.processes))


def _longest_rung(params: AlsParams, mesh: DeviceMesh) -> int:
    """Bound on the rungs' lengths; longer rows are solved by all shards together."""
    chunk, _ = chunk_sizes(params, mesh)
    longest = min(max(chunk, layout.LONGEST), _LONGEST[backend_kind(mesh)])
    if isinstance(device_products(params, mesh), TileProducts):
        longest = min(longest, chunk // layout.ROWS_MULTIPLE)  # a chunk has whole tiles
    return longest


def backend_kind(mesh: DeviceMesh) -> str:
    """Key of the measured constants: "cpu", or "other" for accelerators."""
    return "cpu" if mesh.platform == "cpu" else "other"


def chunk_sizes(params: AlsParams, mesh: DeviceMesh) -> tuple[int, int]:
    """Cells of a chunk, a power of two, and the maximum number of its rows."""
    kind, size = backend_kind(mesh), np.dtype(params.compute_dtype).itemsize
    # A TPU pads rows to its lanes. A chunk that does not fit into on-chip memory is much slower.
    lanes = _LANES if mesh.platform == "tpu" else 1
    width = -(-params.factors // lanes) * lanes
    chunk = max(_SCRATCH[kind] // (width * size), 256)
    system = {"cg": 0, "cholesky": params.factors}
    system_bytes = system[params.linear_solver] ** 2 * size
    most_rows = max(_SYSTEMS[kind] // system_bytes, 1) if system_bytes else 1 << 30
    return 1 << (chunk.bit_length() - 1), most_rows


def lay_out(
    user_items: sparse.csr_matrix | Entries,
    params: AlsParams,
    mesh: DeviceMesh,
    backend: Backend,
    *,
    with_digest: bool = False,
) -> XlaData:
    """Lay out a matrix in both orientations and put it on the devices.

    Parameters
    ----------
    user_items : CSR matrix (M, N) or Entries
        A matrix is canonical: sorted indices, no duplicates. Stored zeros are entries. If there are
        several processes, each passes the whole matrix; each reads only its part of `Entries` on
        disk.
    params : AlsParams
        Determines chunk sizes and dtypes.
    mesh : DeviceMesh
        The devices to place it on.
    backend : XlaBackend
        The backend that the data are for.
    with_digest : bool, default=False
        Whether to compute the digest of a matrix in memory, which checkpoints need. The digest of
        `Entries` on disk is always computed.

    Raises
    ------
    MemoryError
        If the tables cannot fit into memory; raised before any work.
    ValueError
        If processes passed different matrices, or the sides of `Entries` differ.
    """
    if mesh.platform == "cpu":  # other devices raise an error themselves if their memory is full
        require_tables(user_items.shape, params, len(mesh.processes))
    entries = as_entries(user_items)
    if isinstance(user_items, sparse.csr_matrix):
        _check_same(user_items, mesh)
    lengths, owners = zip(*(_lengths(entries, side, mesh) for side in SIDES), strict=True)
    if params.linear_solver == "exact":
        params = replace(params, linear_solver="cholesky")
    if params.linear_solver == "auto":
        solver = cheapest_solver(lengths, params, backend_kind(mesh))
        params = replace(params, linear_solver=solver)
    row_bytes = params.factors * dtype_named(params.dtype).itemsize
    mesh = mesh.with_layout(max(entries.shape) * row_bytes)
    plan = make_plan(np.concatenate(lengths), params, mesh)
    pairs = zip(lengths, owners, strict=True)
    users, items = (layout.map_rows(n, plan, owner) for n, owner in pairs)
    users, items = layout.share_shapes(users, items, _SHARED_WASTE // row_bytes)
    if not mesh.collectives.is_sharded:  # else messages differ, so sides cannot share programs
        users, items = layout.share_rungs(users, items)
    with_digest = with_digest or not isinstance(entries, InMemory)
    dtype, is_divided = kept_as(entries, params), owners[0] is not None
    builder = _SideBuilder(plan, params, mesh, dtype, is_divided, with_digest)
    # Items first: the transposed matrix is freed before the users' cells are filled.
    item_side = builder.build("item", entries, items, users, lengths[1])
    if isinstance(entries, InMemory):
        entries = replace(entries, item_users=None)
    user_side = builder.build("user", entries, users, items, lengths[0])
    if entries.nnz > _MANY:
        give_back_memory()
    return XlaData(
        users=user_side,
        items=item_side,
        params=params,
        backend=backend,
        n_entries=entries.nnz,
        absolute_sum=builder.totals.absolute_sum,
        magnitudes=builder.totals.magnitudes,
        digest=_agreed_digest(builder.digests, entries, mesh),
        plan=plan,
        mesh=mesh,
    )


def _agreed_digest(
    digests: dict[str, EntriesDigest], entries: Entries, mesh: DeviceMesh
) -> int | None:
    """Digest of all entries; raise ValueError if the two sides of files have different ones."""
    if isinstance(entries, InMemory):
        return digests["user"].total if digests else None
    users, items = (table_checksums.total(digests[side].total, mesh) for side in SIDES)
    check_digests(users, items, entries)
    return users


def _check_same(matrix: sparse.csr_matrix, mesh: DeviceMesh) -> None:
    """Raise ValueError if the processes were given different matrices."""
    if len(mesh.processes) == 1:
        return
    parts = (matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data)
    sums = [*matrix.shape, *(zlib.crc32(part.tobytes()) for part in parts)]
    of_all = mesh.gather_processes(np.array(sums, np.int64))
    if (of_all != of_all[0]).any():
        raise ValueError(
            "the processes were given different matrices: pass the whole matrix in each, or "
            "directories of shards (tpu_als.shards.open_shards), of which each reads its part"
        )


def place_rows(
    rows: sparse.csr_matrix, source: RowMap, params: AlsParams, mesh: DeviceMesh
) -> XlaData:
    """Lay out the rows of a matrix to be solved against an item table on the devices.

    Parameters
    ----------
    rows : CSR matrix (M, N) or (M, N + 1)
        Canonical. If there are several processes, each passes the whole matrix. Column N means a
        row of zeros.
    source : RowMap
        The slots of the table's rows.
    params : AlsParams
        As in `lay_out`.
    mesh : DeviceMesh
        The devices of the table.
    """
    structure.check_compressed(rows, "rows")
    entries, lengths = InMemory(rows, None), np.diff(rows.indptr).astype(np.int64)
    # The rungs depend only on the longest row, so that batches of rows share programs.
    longest = int(lengths.max(initial=0))
    rungs = layout.doubling(longest, _longest_rung(params, mesh), growth=4)
    plan = plan_of(rungs, longest * _BATCH_ROWS, params, mesh)
    items = XlaSide(rows=source, lengths=np.zeros(0, np.int64))
    # The dtype of values does not depend on the values, so that all calls use the same programs.
    builder = _SideBuilder(plan, params, mesh, np.dtype(params.compute_dtype), False)
    columns = replace(source, slots=np.append(source.slots, source.pad_slot))
    users = builder.build("user", entries, layout.map_rows(lengths, plan), columns, lengths)
    return XlaData(
        users=users, items=items, params=params, backend=None, n_entries=rows.nnz,
        absolute_sum=builder.totals.absolute_sum, plan=plan, mesh=mesh,
    )  # fmt: skip


def _lengths(entries: Entries, side: str, mesh: DeviceMesh) -> tuple[np.ndarray, np.ndarray | None]:
    """Number of entries (M,) of all rows of a side and, if rows are divided, the owner of each.

    Rows are divided among processes if there are several and the entries are on disk.
    """
    n_rows = entries.shape[SIDES.index(side)]
    if not isinstance(entries, InMemory):
        require_memory(
            {f"lengths and places of {n_rows} rows by {side}": 40 * n_rows},
            "check the numbers of users and items",
        )
    rows, counts = entries.lengths(side, mesh.process, len(mesh.processes))
    if isinstance(entries, InMemory):
        return counts, None
    lengths = np.zeros(n_rows, np.int64)
    if len(mesh.processes) == 1:
        lengths[rows] = counts
        return lengths, None
    pairs = np.full((mesh.agree(len(rows)), 2), -1, np.int64)
    pairs[: len(rows)] = np.stack([rows, counts], axis=1)
    # Rows without entries are in no file; any process may own them.
    owners = np.arange(n_rows) % len(mesh.processes)
    # In pieces, because gathered arrays pass through the devices.
    for low in range(0, len(pairs), _GATHERED):
        for process, found in enumerate(mesh.gather_processes(pairs[low : low + _GATHERED])):
            found = found[found[:, 0] >= 0]
            lengths[found[:, 0]], owners[found[:, 0]] = found[:, 1], process
    if lengths.sum() != entries.nnz:
        raise ValueError(
            f"{getattr(entries, 'path', entries)}: the rows of the files by {side} have "
            f"{lengths.sum()} entries, but {entries.nnz} are expected"
        )
    return lengths, owners


class _SideBuilder:
    """Fills the cells of a side and places them.

    Parameters
    ----------
    plan, params, mesh
        As in `lay_out`.
    dtype : dtype or None
        Dtype of values; with None no values are stored.
    is_divided : bool
        Whether each process reads only its own rows.
    with_digest : bool, default=False
        Whether to compute digests.

    Attributes
    ----------
    totals : Totals
        Totals of the values, once the user side is built.
    digests : dict of EntriesDigest
        Digest by side.
    """

    def __init__(
        self,
        plan: Plan,
        params: AlsParams,
        mesh: DeviceMesh,
        dtype: np.dtype | None,
        is_divided: bool,
        with_digest: bool = False,
    ) -> None:
        self._plan, self._params, self._mesh = plan, params, mesh
        self._with_digest, self.digests = with_digest, dict[str, EntriesDigest]()
        self._dtype, self._is_divided = dtype, is_divided
        self.totals = Totals()

    def build(
        self, name: str, entries: Entries, rows: RowMap, source: RowMap, lengths: np.ndarray
    ) -> XlaSide:
        """Lay out and place one side."""
        mesh, local = self._mesh, self._mesh.local_shards
        blocks = self._blocks(name, entries)
        if name == "user":
            blocks = self.totals.passing(blocks)
        # The other side of a matrix in memory is made from the first.
        if self._with_digest and (name == "user" or not isinstance(entries, InMemory)):
            self.digests[name] = EntriesDigest(name, len(source.slots))
            blocks = self.digests[name].passing(iter(blocks))
        ids, values = cells.fill(blocks, rows, source.slots, source.pad_slot, local, self._dtype)
        if name == "user" and self._is_divided:
            self._add_totals_of_processes()
        routes, sends = None, np.zeros((len(local), 0), np.int32)
        if mesh.collectives.is_sharded:
            routes, sends = exchange.plan(
                ids, rows.rungs, mesh.n_shards, source.n_slots, mesh.agree,
                mesh.exchanges_in_background,
            )  # fmt: skip
        with precision(self._params.dtype):
            counts = layout.to_slots(lengths.astype(np.int32), rows, local)
            placed = ShardCells(*jax.tree.map(mesh.put, (ids, values, counts, sends)))
            if routes is not None:
                exchanged = requests_program(rows, routes, mesh)(placed.sends, None)
                placed = placed._replace(sends=exchanged)
            del ids, values
            long = self._long(name, entries, rows, source, lengths) if len(rows.long) else None
        return XlaSide(rows=rows, cells=placed, long=long, routes=routes, lengths=lengths)

    def _add_totals_of_processes(self) -> None:
        totals = self.totals
        found = np.array([totals.absolute_sum, *totals.magnitudes])
        sums, least, most = self._mesh.gather_processes(found).T
        totals.absolute_sum = float(sums.sum())
        totals.magnitudes = least.min(), most.max()

    def _blocks(self, name: str, entries: Entries) -> cells.Blocks:
        return entries.blocks(name, self._mesh.process, len(self._mesh.processes))

    def _long(
        self, name: str, entries: Entries, rows: RowMap, source: RowMap, lengths: np.ndarray
    ) -> LongRows:
        """Fill and place the blocks of long rows.

        On a single device an entry is on the shard of its row, else on that of its source row.
        """
        mesh = self._mesh
        other = SIDES[name == "user"]
        # If rows are divided, a process reads these entries as rows of the other side.
        blocks = self._blocks(other if self._is_divided else name, entries)
        found = cells.long_entries(blocks, rows, self._is_divided, self._dtype)
        slots = source.slots[found.source]
        if mesh.jax_mesh is None:
            shard = (rows.slots[rows.long] // rows.n_slots)[found.long]
        else:
            shard = slots // source.n_slots
        ids = slots % source.n_slots if mesh.collectives.is_sharded else slots
        long = cells.fill_long(
            LongCells(found, shard, ids), rows, lengths,
            long_shape(self._plan, self._params, mesh), mesh.local_shards, mesh.agree,
        )  # fmt: skip
        return jax.tree.map(mesh.put, long)


def requests_program(
    rows: RowMap, routes: tuple[Route, ...], mesh: DeviceMesh
) -> Callable[..., Shards]:
    """Compile the program (requests, None) -> sends of a side; see `exchange_requests`."""
    pairs = zip(routes, rows.rungs, strict=True)
    rungs = tuple(Messages(route.groups(rung.n_chunks), route.rows) for route, rung in pairs)
    return mesh.all_shards_program(_exchange_requests, rungs, SHARDED)


def _exchange_requests(
    rungs: tuple[Messages, ...], collectives: Collectives, requests: Array, _: None
) -> Array:
    assert collectives.axis is not None
    return exchange.exchange_requests(rungs, requests, collectives.axis)
