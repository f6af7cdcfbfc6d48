"""The data of a fit as the XLA backend lays them out. Axis letters: M rows of a side."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tpu_als.engine.cells import LONG_ROWS, LongRows, LongShape
from tpu_als.engine.data import AlsParams, Data, Side
from tpu_als.engine.layout import Plan, RowMap
from tpu_als.engine.xla import exchange, row_kernels, tile_products
from tpu_als.engine.xla.exchange import Route
from tpu_als.engine.xla.mesh import DeviceMesh
from tpu_als.engine.xla.sweep import DeviceProducts, ShardCells, Static

_SHORTEST_BLOCK = 128  # least cells of a block if long rows are divided over shards
_MOST_LONG_ROWS = 1 << 10  # of a batch
_WITH_PRODUCTS = ("cg", "diagonal")  # solvers that devices may have products for

NO_CELLS = ShardCells(None, None, None, None)


@dataclass(frozen=True, kw_only=True)
class XlaSide(Side):
    """One orientation: the map of its rows and its placed cells.

    Attributes
    ----------
    rows : RowMap
        The slot of each row.
    cells : ShardCells
        The entries, without long rows; each field is `Shards`. A side that is only read has none.
    long : LongRows or None
        The entries of long rows, if any.
    routes : tuple of Route or None
        How source rows are received for each rung; None if every device has all of them.
    """

    rows: RowMap
    cells: ShardCells = NO_CELLS
    long: LongRows | None = None
    routes: tuple[Route, ...] | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows of the table, without unused slots."""
        return len(self.rows.slots)

    @property
    def received_rows(self) -> int:
        """Number of source rows that a device receives from others in a half-epoch."""
        if self.routes is None:
            return 0
        return exchange.received_rows(self.routes, self.rows.rungs, self.rows.n_shards)


@dataclass(frozen=True, kw_only=True)
class XlaData(Data):
    """Both orientations of a matrix, placed on devices.

    Attributes
    ----------
    users, items : XlaSide
        The orientations.
    plan : Plan
        Shapes of chunks.
    mesh : DeviceMesh
        The devices.
    """

    users: XlaSide
    items: XlaSide
    plan: Plan
    mesh: DeviceMesh

    @functools.cached_property
    def products(self) -> DeviceProducts | None:
        """See `device_products`."""
        return device_products(self.params, self.mesh)


def device_products(params: AlsParams, mesh: DeviceMesh) -> DeviceProducts | None:
    """Products for the kind of device, or None for those of `solve`.

    There are such products for "cg" and "diagonal" with float32 sums.
    """
    if params.linear_solver not in _WITH_PRODUCTS or params.compute_dtype != "float32":
        return None
    return row_kernels.kernels_for(mesh) or tile_products.tiles_for(mesh)


def static_of(params: AlsParams, rows: int, length: int) -> Static:
    """Static arguments of the program of a rung with chunks of `rows` rows of this length."""
    is_diagonal = params.linear_solver == "diagonal"
    return Static(
        params.linear_solver,
        0 if is_diagonal else params.cg_steps,
        params.compute_dtype,
        rows,
        length,
        params.positive and params.linear_solver == "cholesky",
    )


def long_shape(plan: Plan, params: AlsParams, mesh: DeviceMesh) -> LongShape:
    """Cells of a block of long rows, and rows of a batch.

    A block holds about one shard's entries of the shortest long row, at least 128. A batch has
    enough rows to fill a step with blocks; with "cholesky" it has few, because each row needs a
    K x K system.
    """
    block = plan.lengths[-1]
    if mesh.jax_mesh is not None:
        block = min(max(block // mesh.n_shards, _SHORTEST_BLOCK), block)
    if params.linear_solver == "cholesky":
        return LongShape(block)
    return LongShape(block, min(LONG_ROWS * plan.rows(block), _MOST_LONG_ROWS))
