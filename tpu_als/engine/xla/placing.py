"""A matrix on its way to the devices: shapes planned, cells filled, both orientations placed.

Axis letters: M and N rows and columns of the matrix, W work shards, K factors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import Array
from scipy import sparse

from tpu_als.engine import cells, layout
from tpu_als.engine.cells import Entries, InMemory, Long
from tpu_als.engine.data import DTYPES, AlsParams
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
from tpu_als.engine.xla import exchange, table_checksums
from tpu_als.engine.xla.data import XlaData, XlaSide
from tpu_als.engine.xla.exchange import Route
from tpu_als.engine.xla.mesh import Together, Workplace, precision
from tpu_als.engine.xla.sweep import Own
from tpu_als.host import give_back_memory, require_memory
from tpu_als.validation import structure

# Bytes of a gathered chunk; a core's own cache on CPU.
_SCRATCH = {"cpu": 1 << 20, "other": 1 << 26}
_SYSTEMS = {"cpu": 1 << 22, "other": 1 << 28}  # bytes of the K x K systems of a chunk
# Cells of the longest rung; longer rows are solved by all shards together.
_LONGEST = {"cpu": layout.LONGEST, "other": 1 << 16}
_SHORTEST_BLOCK = 128  # cells of a block of a long row, of which each shard has a share
# Factors times cells that take as long, over a fit or a few, as compiling one more rung.
_RUNG_CELLS = {"cpu": 4e6, "other": 1e8}
_GATHERED = 1 << 20  # row lengths of each process gathered at once
# Bytes of unused slots that sharing programs between the sides may cost.
_SHARED_WASTE = 1 << 26
_MANY = 1 << 20  # entries whose temporaries are worth the milliseconds of giving them back


def make_plan(lengths: np.ndarray, params: AlsParams, place: Workplace) -> Plan:
    """Choose chunk sizes for the backend's memory, and rungs for the rows of both sides.

    The plan depends on the arguments only, never on earlier fits of the process.
    """
    rung_cells = _RUNG_CELLS[backend_kind(place)] / params.factors
    rungs = layout.ladder(lengths, rung_cells, longest=_longest_rung(params, place))
    return _plan_of(rungs, params, place)


def _plan_of(rungs: tuple[int, ...], params: AlsParams, place: Workplace) -> Plan:
    chunk, most_rows = chunk_sizes(params, place)
    return Plan(rungs, chunk, most_rows, place.n_shards, len(place.processes))


def _longest_rung(params: AlsParams, place: Workplace) -> int:
    """Bound on the rungs' lengths; longer rows are solved by all shards together."""
    chunk, _ = chunk_sizes(params, place)
    return min(max(chunk, layout.LONGEST), _LONGEST[backend_kind(place)])


def backend_kind(place: Workplace) -> str:
    """Which of the measured constants hold: "cpu", or "other" for accelerators."""
    return "cpu" if place.platform == "cpu" else "other"


def chunk_sizes(params: AlsParams, place: Workplace) -> tuple[int, int]:
    """Cells of a chunk, a power of two, and the most rows that its scratch allows."""
    kind, size = backend_kind(place), np.dtype(params.compute_dtype).itemsize
    chunk = max(_SCRATCH[kind] // (params.factors * size), 256)
    system = {"cg": 0, "cholesky": params.factors}
    system_bytes = system[params.linear_solver] ** 2 * size
    most_rows = max(_SYSTEMS[kind] // system_bytes, 1) if system_bytes else 1 << 30
    return 1 << (chunk.bit_length() - 1), most_rows


def lay_out(
    user_items: sparse.csr_matrix | Entries,
    params: AlsParams,
    place: Workplace,
    backend: Any,
    *,
    with_digest: bool = False,
) -> XlaData:
    """Lay out a matrix in both orientations and put it on the devices.

    Parameters
    ----------
    user_items : CSR matrix (M, N) or Entries
        A matrix is canonical: sorted indices, no duplicates. Stored zeros are entries. With several
        processes each passes the whole matrix; of `Entries` on disk each reads its part only.
    params : AlsParams
        Decides chunk sizes and dtype.
    place : Workplace
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
    if place.platform == "cpu":  # devices of other kinds report when they are full
        require_tables(user_items.shape, params, len(place.processes))
    entries = as_entries(user_items)
    if isinstance(user_items, sparse.csr_matrix):
        _check_same(user_items, place)
    lengths, owners = zip(*(_lengths(entries, side, place) for side in SIDES), strict=True)
    if params.linear_solver == "exact":
        params = replace(params, linear_solver="cholesky")
    if params.linear_solver == "auto":
        solver = cheapest_solver(lengths, params, backend_kind(place))
        params = replace(params, linear_solver=solver)
    row_bytes = params.factors * np.dtype(DTYPES[params.dtype]).itemsize
    place = place.with_layout(max(entries.shape) * row_bytes)
    plan = make_plan(np.concatenate(lengths), params, place)
    pairs = zip(lengths, owners, strict=True)
    users, items = (layout.map_rows(n, plan, own) for n, own in pairs)
    users, items = layout.share_shapes(users, items, _SHARED_WASTE // row_bytes)
    if not place.together.sharded:  # else the sides' messages differ, and so do their programs
        users, items = layout.share_rungs(users, items)
    with_digest = with_digest or not isinstance(entries, InMemory)
    dtype, is_divided = kept_as(entries, params), owners[0] is not None
    fill = _Filling(plan, params, place, dtype, is_divided, with_digest)
    # Items first: the transposed matrix is freed before the users' cells are filled.
    item_side = fill.side("item", entries, items, users, lengths[1])
    if isinstance(entries, InMemory):
        entries = replace(entries, item_users=None)
    user_side = fill.side("user", entries, users, items, lengths[0])
    if entries.nnz > _MANY:
        give_back_memory()
    return XlaData(
        users=user_side,
        items=item_side,
        params=params,
        backend=backend,
        n_entries=entries.nnz,
        absolute_sum=fill.totals.absolute_sum,
        magnitudes=fill.totals.magnitudes,
        digest=_agreed_digest(fill.digests, entries, place),
        plan=plan,
        place=place,
    )


def _agreed_digest(
    digests: dict[str, EntriesDigest], entries: Entries, place: Workplace
) -> int | None:
    """Digest of all entries; raise ValueError if the two sides of files have different ones."""
    if isinstance(entries, InMemory):
        return digests["user"].total if digests else None
    users, items = (table_checksums.total(digests[side].total, place) for side in SIDES)
    check_digests(users, items, entries)
    return users


def _check_same(matrix: sparse.csr_matrix, place: Workplace) -> None:
    """Raise where the processes were given different matrices."""
    if len(place.processes) == 1:
        return
    parts = (matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data)
    sums = [*matrix.shape, *(zlib.crc32(part.tobytes()) for part in parts)]
    every = place.gather_processes(np.array(sums, np.int64))
    if (every != every[0]).any():
        raise ValueError(
            "the processes were given different matrices: pass the whole matrix in each, or "
            "directories of shards (tpu_als.shards.open_shards), of which each reads its part"
        )


def place_rows(
    rows: sparse.csr_matrix, source: RowMap, params: AlsParams, place: Workplace
) -> XlaData:
    """Lay out the rows of a matrix to be solved against an item table that is there already.

    Parameters
    ----------
    rows : CSR matrix (M, N) or (M, N + 1)
        Canonical; with several processes each passes all of it. Column N stands for a row of zeros.
    source : RowMap
        Where the rows of the table are.
    params : AlsParams
        As in `place`.
    place : Workplace
        That of the table.
    """
    structure.check_compressed(rows, "rows")
    entries, lengths = InMemory(rows, None), np.diff(rows.indptr).astype(np.int64)
    # The rungs depend only on the longest row, so that batches of rows share programs.
    longest = int(lengths.max(initial=0))
    rungs = layout.doubling(longest, _longest_rung(params, place), growth=4)
    plan = _plan_of(rungs, params, place)
    items = XlaSide(rows=source, lengths=np.zeros(0, np.int64))
    # Values as they come, so that one program serves all calls.
    fill = _Filling(plan, params, place, np.dtype(params.compute_dtype), False)
    columns = replace(source, slots=np.append(source.slots, source.pad_slot))
    users = fill.side("user", entries, layout.map_rows(lengths, plan), columns, lengths)
    return XlaData(
        users=users, items=items, params=params, backend=None, n_entries=rows.nnz,
        absolute_sum=fill.totals.absolute_sum, plan=plan, place=place,
    )  # fmt: skip


def _lengths(entries: Entries, side: str, place: Workplace) -> tuple[np.ndarray, np.ndarray | None]:
    """Entries (M,) of all rows of a side and, if each process has its part, whose they are."""
    n_rows = entries.shape[SIDES.index(side)]
    if not isinstance(entries, InMemory):
        require_memory(
            {f"lengths and places of {n_rows} rows by {side}": 40 * n_rows},
            "check the numbers of users and items",
        )
    rows, counts = entries.lengths(side, place.process, len(place.processes))
    if isinstance(entries, InMemory):
        return counts, None
    lengths = np.zeros(n_rows, np.int64)
    if len(place.processes) == 1:
        lengths[rows] = counts
        return lengths, None
    pairs = np.full((place.agree(len(rows)), 2), -1, np.int64)
    pairs[: len(rows)] = np.stack([rows, counts], axis=1)
    # Rows without entries are in no file; any process may own them.
    owners = np.arange(n_rows) % len(place.processes)
    # In pieces, because gathered arrays pass through the devices.
    for low in range(0, len(pairs), _GATHERED):
        for process, found in enumerate(place.gather_processes(pairs[low : low + _GATHERED])):
            found = found[found[:, 0] >= 0]
            lengths[found[:, 0]], owners[found[:, 0]] = found[:, 1], process
    if lengths.sum() != entries.nnz:
        raise ValueError(
            f"{getattr(entries, 'path', entries)}: the rows of the files by {side} have "
            f"{lengths.sum()} entries, but {entries.nnz} are expected"
        )
    return lengths, owners


class _Filling:
    """Fills and places one side after the other, with values of a dtype, or None of them."""

    def __init__(
        self,
        plan: Plan,
        params: AlsParams,
        place: Workplace,
        dtype: Any,
        divided: bool,
        with_digest: bool = False,
    ) -> None:
        self._plan, self._params, self._place = plan, params, place
        self._with_digest, self.digests = with_digest, dict[str, EntriesDigest]()
        self._dtype, self._divided = dtype, divided
        self.totals = Totals()

    def side(
        self, name: str, entries: Entries, rows: RowMap, source: RowMap, lengths: np.ndarray
    ) -> XlaSide:
        """Lay out and place one side."""
        place, local = self._place, self._place.local
        blocks = self._blocks(name, entries)
        if name == "user":
            blocks = self.totals.passing(blocks)
        # The other side of a matrix in memory is made from the first.
        if self._with_digest and (name == "user" or not isinstance(entries, InMemory)):
            self.digests[name] = EntriesDigest(name, len(source.slots))
            blocks = self.digests[name].passing(iter(blocks))
        ids, values = cells.fill(blocks, rows, source.slots, source.pad_slot, local, self._dtype)
        if name == "user" and self._divided:
            totals = self.totals
            found = np.array([totals.absolute_sum, *totals.magnitudes])
            sums, least, most = place.gather_processes(found).T
            totals.absolute_sum = float(sums.sum())
            totals.magnitudes = least.min(), most.max()
        routes, sends = None, np.zeros((len(local), 0), np.int32)
        if place.together.sharded:
            routes, sends = exchange.plan(
                ids, rows.rungs, place.n_shards, source.n_slots, place.agree
            )
        with precision(self._params.dtype):
            counts = layout.to_slots(lengths.astype(np.int32), rows, local)
            own = Own(*jax.tree.map(place.put, (ids, values, counts, sends)))
            if routes is not None:
                _, _, sends = turning(rows, routes, place)(own.sends, None)
                own = own._replace(sends=sends)
            del ids, values
            long = self._long(name, entries, rows, source, lengths) if len(rows.long) else None
        return XlaSide(rows=rows, own=own, long=long, routes=routes, lengths=lengths)

    def _blocks(self, name: str, entries: Entries) -> cells.Blocks:
        return entries.blocks(name, self._place.process, len(self._place.processes))

    def _long(
        self, name: str, entries: Entries, rows: RowMap, source: RowMap, lengths: np.ndarray
    ) -> Long:
        """Entries of long rows: with their row on a single device, else with their source row."""
        place = self._place
        other = SIDES[name == "user"]
        # A process that has read only its own rows finds them in those of the other side.
        blocks = self._blocks(other if self._divided else name, entries)
        found = cells.long_entries(blocks, rows, self._divided, self._dtype)
        slots = source.slots[found.source]
        if place.mesh is None:
            shard = (rows.slots[rows.long] // rows.n_slots)[found.long]
        else:
            shard = slots // source.n_slots
        ids = slots % source.n_slots if place.together.sharded else slots
        long = cells.fill_long(
            found, shard, ids, rows, lengths, long_block(self._plan, place), place.local,
            place.agree,
        )  # fmt: skip
        return jax.tree.map(place.put, long)


def long_block(plan: Plan, place: Workplace) -> int:
    """Cells of a block of long rows: about a shard's part of the shortest possible long row."""
    if place.mesh is None:
        return plan.lengths[-1]
    return min(max(plan.lengths[-1] // place.n_shards, _SHORTEST_BLOCK), plan.lengths[-1])


def turning(rows: RowMap, routes: tuple[Route, ...], place: Workplace) -> Callable[..., Any]:
    """Program (requests, None) -> (None, None, sends) of a side."""
    pairs = zip(routes, rows.rungs, strict=True)
    groups = tuple((route.groups(rung.n_chunks), route.rows) for route, rung in pairs)
    return place.whole(_turn, groups)


def _turn(
    groups: tuple[tuple[int, int], ...], together: Together, requests: Array, _: None
) -> tuple[None, None, Array]:
    assert together.axis is not None
    return None, None, exchange.turn(groups, requests, together.axis)
