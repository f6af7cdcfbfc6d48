"""Shapes of a training run on data too large for this machine, from distributions of row lengths.

The package's planner chooses rungs, chunks and groups from a sample of the lengths. The rows of
each rung, the distinct source rows of a group and the blocks of long rows are expected counts over
all rows. No array is allocated: each is a shape, a dtype and a sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from scipy import special, stats

from tpu_als.engine import layout, reading
from tpu_als.engine.cells import LongRows
from tpu_als.engine.data import AlsParams
from tpu_als.engine.layout import Plan, RowMap, Rung
from tpu_als.engine.xla import exchange, placing
from tpu_als.engine.xla.data import XlaData as Data
from tpu_als.engine.xla.data import XlaSide as Side
from tpu_als.engine.xla.data import long_shape
from tpu_als.engine.xla.exchange import Route
from tpu_als.engine.xla.mesh import AXIS, DeviceMesh
from tpu_als.engine.xla.sweep import ShardCells

SAMPLE = 1 << 20  # rows of a side that the planner sees
_BUCKETS = 20_000


@dataclass(frozen=True)
class Lengths:
    """Row lengths of a side as a histogram.

    Attributes
    ----------
    values : array (B,)
        Entries of a row, ascending.
    counts : array (B,)
        Expected number of rows of that length, which may be a fraction.
    """

    values: np.ndarray
    counts: np.ndarray

    @property
    def n_rows(self) -> float:
        """Rows."""
        return float(self.counts.sum())

    @property
    def n_entries(self) -> float:
        """Entries."""
        return float(self.values @ self.counts)

    def sample(self, size: int = SAMPLE) -> np.ndarray:
        """Lengths of evenly spaced rows, shortest first."""
        at = (np.arange(size) + 0.5) / size * self.n_rows
        found = np.searchsorted(np.cumsum(self.counts), at)
        return np.rint(self.values[np.minimum(found, len(self.values) - 1)]).astype(np.int64)

    def over(self, length: int) -> Lengths:
        """Rows longer than this."""
        longer = self.values > length
        return Lengths(self.values[longer], self.counts[longer])


def activity(n_rows: int, n_entries: float, most: int, deviation: float = 1.1) -> Lengths:
    """Log-normal lengths, as those of the users of `datasets.power_law`."""
    edges = np.linspace(-8, 8, _BUCKETS + 1)
    counts = n_rows * np.diff(special.ndtr(edges))
    values = np.exp(deviation * (edges[1:] + edges[:-1]) / 2)
    return _scaled(values, counts, n_entries, most)


def popularity(n_rows: int, n_entries: float, most: int, exponent: float) -> Lengths:
    """Lengths that fall as rank ** -exponent, as those of the items of `datasets.power_law`."""
    edges = np.unique(np.geomspace(1, n_rows + 1, _BUCKETS).astype(np.int64))
    power = 1 - exponent
    # The mean of the continuous curve over each bucket.
    values = np.diff((edges - 0.5) ** power) / (power * np.diff(edges))
    return _scaled(values[::-1], np.diff(edges)[::-1].astype(float), n_entries, most)


def _scaled(values: np.ndarray, counts: np.ndarray, n_entries: float, most: int) -> Lengths:
    """Scale the lengths to a sum of `n_entries`, with no row longer than `most`."""
    scale = n_entries / (values @ counts)
    for _ in range(100):
        scale *= n_entries / (np.minimum(values * scale, most) @ counts)
    return Lengths(np.minimum(values * scale, most), counts)


@dataclass(frozen=True)
class Problem:
    """The training problem.

    Attributes
    ----------
    users, items : Lengths
        Row lengths of both sides.
    params : AlsParams
        The parameters.
    values : dtype or None
        Dtype of the stored values; None if all are 1.
    """

    users: Lengths
    items: Lengths
    params: AlsParams
    values: Any = None


def solver(problem: Problem, mesh: DeviceMesh) -> AlsParams:
    """The parameters, with "auto" replaced as `placing.lay_out` does."""
    params = problem.params
    if params.linear_solver != "auto":
        return params
    # The choice depends only on the lengths of rows, so a sample is enough.
    lengths = (problem.users.sample(), problem.items.sample())
    name = reading.cheapest_solver(lengths, params, placing.backend_kind(mesh))
    return AlsParams(params.factors, params.dtype, name, params.cg_steps)


def data(problem: Problem, mesh: DeviceMesh, shape: Callable[..., Any] | None = None) -> Data:
    """Return the result of `placing.lay_out`, with shapes instead of arrays.

    `shape` makes an abstract array of the shape of a shard and a dtype; by default one that is
    sharded over the mesh.
    """
    params = solver(problem, mesh)
    problem = replace(problem, params=params)
    samples = problem.users.sample(), problem.items.sample()
    plan = placing.make_plan(np.concatenate(samples), params, mesh)
    shape = shape or sharded(mesh)
    sides = (problem.users, problem.items)
    users, items = (
        _side(target, source, plan, mesh, shape, problem)
        for target, source in zip(sides, sides[::-1], strict=True)
    )
    return Data(
        users=users, items=items, params=params, backend=None,
        n_entries=int(problem.users.n_entries), absolute_sum=0.0, plan=plan, mesh=mesh,
    )  # fmt: skip


def sharded(mesh: DeviceMesh) -> Callable[..., Any]:
    """Maker of abstract arrays with a leading axis of shards."""
    assert mesh.jax_mesh is not None
    sharding = NamedSharding(mesh.jax_mesh, PartitionSpec(AXIS))

    def make(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((mesh.n_shards, *shape), dtype, sharding=sharding)

    return make


def _side(
    target: Lengths,
    source: Lengths,
    plan: Plan,
    mesh: DeviceMesh,
    shape: Callable[..., Any],
    problem: Problem,
) -> Side:
    values = problem.values
    rung_of = np.searchsorted(plan.lengths, np.rint(target.values))
    rows = np.bincount(rung_of, target.counts, minlength=len(plan.lengths) + 1)
    most = [math.ceil(count / plan.n_shards) for count in rows]
    rungs, n_slots, n_cells = layout.stack(most, plan)
    routes = _routes(rungs, source, mesh)
    long = target.over(plan.lengths[-1])
    row_map = RowMap(
        np.empty(0, np.int64), np.empty(0, np.int64), np.empty(round(long.n_rows), np.int8),
        rungs, n_slots, n_cells, mesh.n_shards,
    )  # fmt: skip
    sends = sum(
        route.groups(rung.n_chunks) * route.rows * mesh.n_shards
        for route, rung in zip(routes, rungs, strict=True)
    )
    entries = ShardCells(
        shape((n_cells,), np.int32), None if values is None else shape((n_cells,), values),
        shape((n_slots,), np.int32), shape((sends,), np.int32),
    )  # fmt: skip
    blocks = _long(long, plan, problem, mesh, shape) if len(row_map.long) else None
    return Side(
        lengths=np.broadcast_to(np.int64(0), round(target.n_rows)),
        rows=row_map, cells=entries, long=blocks, routes=routes,
    )  # fmt: skip


def _routes(rungs: tuple[Rung, ...], source: Lengths, mesh: DeviceMesh) -> tuple[Route, ...]:
    """The routes that `exchange.plan` would make."""
    found = [_route(rung, source, mesh.n_shards) for rung in rungs]
    if not mesh.exchanges_in_background:
        return tuple(found)
    levelled: list[Route] = []
    for routes in exchange.in_programs(found):
        rows = max(route.rows for route in routes)
        levelled += [route._replace(rows=rows) for route in routes]
    return tuple(levelled)


def _route(rung: Rung, source: Lengths, n_devices: int) -> Route:
    """The route that `exchange.plan` would make, with rows for the longest message."""
    chunks = exchange.group_chunks(rung, n_devices)
    route = Route(chunks, 0)
    mean = distinct(source, chunks * rung.rows * rung.length) / n_devices
    messages = n_devices**2 * route.groups(rung.n_chunks)
    # The rows of a message are about Poisson distributed; this is the expected maximum.
    most = mean + math.sqrt(2 * math.log(messages) * mean) + 1
    return Route(chunks, exchange.message_rows(math.ceil(most)))


def distinct(source: Lengths, draws: int) -> float:
    """Expected distinct source rows among `draws` entries; rows are drawn by their lengths."""
    chance = source.values / source.n_entries
    return float(source.counts @ -np.expm1(-draws * chance))


def _long(
    long: Lengths, plan: Plan, problem: Problem, mesh: DeviceMesh, shape: Callable[..., Any]
) -> LongRows:
    """Blocks of long rows, whose entries are on the shards of their source rows."""
    length, batch_rows = long_shape(plan, problem.params, mesh)
    values = problem.values
    share = long.values / mesh.n_shards
    full = share / length
    blocks = full + 0.5
    few = full < 8
    edges = np.arange(20)[:, None] * length
    blocks[few] = stats.poisson.sf(edges, share[few]).sum(axis=0)
    count = float(long.counts @ blocks)
    n_blocks = layout.round_up(math.ceil(count + 6 * math.sqrt(count)))
    n_rows = -(-round(long.n_rows) // batch_rows) * batch_rows
    return LongRows(
        shape((n_blocks, length), np.int32),
        None if values is None else shape((n_blocks, length), values),
        shape((n_blocks,), np.int32), shape((n_blocks,), np.int32),
        shape((n_rows // batch_rows + 1,), np.int32),
        shape((n_rows,), np.int32), shape((n_rows,), np.int32),
    )  # fmt: skip
