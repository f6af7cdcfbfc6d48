"""Least time of an epoch by phase on a TPU slice, for the work of the engine's loops.

Flops, bytes of memory and bytes of interconnect are counted from the rungs, chunks and messages of
the plan. They are not taken from the compiler, whose cost analysis counts the body of a loop once.
A phase takes as long as the slowest of the three. Phases are added, without any overlap.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tpu_als.engine.data import AlsParams
from tpu_als.engine.xla import exchange
from tpu_als.engine.xla.data import XlaData as Data
from tpu_als.engine.xla.data import XlaSide as Side
from tpu_als.engine.xla.tile_products import TILE_ROWS

# A product of float32 operands at the highest precision takes six bfloat16 products.
FLOAT32_PASSES = 6


@dataclass(frozen=True)
class Chip:
    """Published rates of a chip, bytes and flops a second.

    Attributes
    ----------
    flops : float
        Peak of bfloat16 products.
    clock : float
        Cycles a second: the peak over the flops of all matrix units in a cycle.
    memory_bandwidth, memory : float
        Bandwidth of HBM in bytes a second, and its size in bytes.
    link : float
        Bytes a second in one direction of one link. The published bandwidth is that of all links
        in both directions.
    links : int
        Neighbours: 4 in a 2D torus, 6 in a 3D one.
    ring : int
        Chips along an axis whose ends are joined; for 3D, a multiple of this.
    pod : int
        Most chips of a slice. Several slices are joined by the data center's network.
    network : float
        Bytes a second of that network, in one direction, for a pod.
    """

    flops: float
    clock: float
    memory_bandwidth: float
    memory: float
    link: float
    links: int
    ring: int
    pod: int
    network: float
    source: str


# https://docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GBps, ICI 400 GBps both ways,
#   2D torus; 256 chips, 1.6 TBps over the bisection, 6.4 Tbps of network per pod.
# https://docs.cloud.google.com/tpu/docs/v4: 275 TFLOPs, 32 GiB, 1200 GBps, 3D, 4096 chips, 24 TB/s
#   over the bisection, which is 50 GB/s one way for each of 512 links, less some.
# https://docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GB, 2765 GBps, ICI 1200 GBps both ways,
#   3D torus; jobs of up to 6144 chips; 50 Gbps of network per chip.
# https://docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1638 GBps, ICI 800 GBps both ways,
#   2D torus; 256 chips, 3.2 TBps over the bisection; 100 Gbps of network per chip.
# Clocks: 4 matrix units of 128 x 128 on v5e, 8 on v4 and v5p, which do 2 flops a cycle and cell.
#   v6e: units of 256 x 256 that do 524,288 flops a cycle. The compiler's cycles of a product of
#   8192 x 8192 matrices agree: 115,000, 243,000, 236,000 and 369,000 flops a cycle.
_DOCS = "https://docs.cloud.google.com/tpu/docs"
CHIPS = {
    "v5e": Chip(197e12, 1.5e9, 819e9, 16e9, 50e9, 4, 16, 256, 0.8e12, f"{_DOCS}/v5e"),
    "v4": Chip(275e12, 1.05e9, 1200e9, 32 * 2**30, 47e9, 6, 4, 4096, 0, f"{_DOCS}/v4"),
    "v5p": Chip(459e12, 1.75e9, 2765e9, 95e9, 100e9, 6, 4, 6144, 0, f"{_DOCS}/v5p"),
    "v6e": Chip(918e12, 1.75e9, 1638e9, 32e9, 100e9, 4, 16, 256, 12.8e12, f"{_DOCS}/v6e"),
}


@dataclass
class Work:
    """Work of a chip in a phase.

    Attributes
    ----------
    flops : float
        On the matrix units, in bfloat16 products.
    vector_flops : float
        On the vector units. Their rate is not published, so the least time excludes them.
    memory : float
        Bytes read and written.
    interconnect : float
        Bytes that leave the chip for others.
    trips : int
        Steps of loops. The least time excludes their overhead.
    """

    flops: float = 0.0
    vector_flops: float = 0.0
    memory: float = 0.0
    interconnect: float = 0.0
    trips: int = 0


@dataclass(frozen=True)
class Slice:
    """Slices of one kind: kind of chip, chips along each axis, and number of slices."""

    chip: Chip
    axes: tuple[int, ...]
    slices: int = 1

    @property
    def n_chips(self) -> int:
        """Chips of all slices."""
        return int(np.prod(self.axes)) * self.slices

    def exchange_seconds(self, sent: float) -> float:
        """Least time of an all-to-all in which each chip sends `sent` bytes, equally to all.

        It is the largest of three bounds: the links of a chip, the links across the middle of the
        longest axis, and the network between slices.
        """
        n_chips, in_slice = self.n_chips, int(np.prod(self.axes))
        to_each = sent / max(n_chips - 1, 1)
        across = self._ends() * in_slice / max(self.axes) * self.chip.link
        bounds = [sent / (self.chip.link * self.chip.links), to_each * (in_slice / 2) ** 2 / across]
        if self.slices > 1:
            bounds.append(to_each * in_slice * (n_chips - in_slice) / self.chip.network)
        return max(bounds)

    def _ends(self) -> int:
        """How often a cut crosses the longest axis: twice if the ends of the axis are joined."""
        if self.chip.links == 4:
            return 2 if max(self.axes) == self.chip.ring else 1
        return 2 if all(length % self.chip.ring == 0 for length in self.axes) else 1

    def seconds(self, work: Work) -> dict[str, float]:
        """Least time of a phase by each bound."""
        return {
            "flops_s": work.flops / self.chip.flops,
            "memory_s": work.memory / self.chip.memory_bandwidth,
            "interconnect_s": self.exchange_seconds(work.interconnect),
        }


def products(params: AlsParams) -> int:
    """How often a solver reads the gathered rows, for products with them or their transpose."""
    if params.linear_solver == "cg":
        return 2 * params.cg_steps + 1  # two for the residual, two a step, one for the last
    return 2 if params.linear_solver == "cholesky" else 3


def phases(side: Side, source: Side, data: Data) -> dict[str, Work]:
    """Work of a chip in the half-epoch of a side."""
    params = data.params
    found = {"rotate": _rotate(side, source, params)}
    found["exchange"] = _exchange(side, data)
    found["solve"], found["write"] = _solve(side, params), _write(side, params)
    if side.long is not None:
        found["long"] = _long(side, data)
    return found


def _table_bytes(side: Side, params: AlsParams) -> float:
    return side.rows.n_slots * params.factors * _stored(params)


def _stored(params: AlsParams) -> int:
    return {"bfloat16": 2, "float32": 4, "float64": 8}[params.dtype]


def _cell(entries: Any) -> int:
    """Bytes of a stored entry: the position of its row, and its value unless all are 1."""
    return entries.ids.dtype.itemsize + (
        0 if entries.values is None else entries.values.dtype.itemsize
    )


def _rotate(side: Side, source: Side, params: AlsParams) -> Work:
    """Gramian and rotation of the source table, rotation of the target table."""
    rows = 2 * source.rows.n_slots + side.rows.n_slots
    moved = 3 * _table_bytes(source, params) + 2 * _table_bytes(side, params)
    # The gramians are summed over the chips: a ring sends each part twice.
    flops = FLOAT32_PASSES * 2 * rows * params.factors**2
    return Work(flops, memory=moved, interconnect=2 * 4 * params.factors**2)


def _exchange(side: Side, data: Data) -> Work:
    """Rows are gathered for the messages, sent and received."""
    assert side.routes is not None
    row = data.params.factors * _stored(data.params)
    pairs = list(zip(side.routes, side.rows.rungs, strict=True))
    groups = sum(route.groups(rung.n_chunks) for route, rung in pairs)
    # Programs that receive groups in advance receive one more than they use.
    ahead = data.mesh.exchanges_in_background
    more = [part[-1].rows for part in exchange.in_programs(side.routes)] if ahead else []
    received = side.received_rows + (data.mesh.n_shards - 1) * sum(more)
    handled = received * data.mesh.n_shards / (data.mesh.n_shards - 1)
    # A position is read; the row is read, written to the message, read from it, and written.
    sent = received * row
    return Work(memory=handled * (4 + 4 * row), interconnect=sent, trips=groups + len(more))


def _solve(side: Side, params: AlsParams) -> Work:
    """Rows are gathered from the received ones, and the systems are solved.

    The gathered chunk is written once and read for every product, in the storage dtype. The
    compiler keeps it in on-chip memory where it fits, so HBM moves less than this.
    """
    chunks = [(rung.n_chunks, rung.rows, rung.length) for rung in side.rows.rungs]
    n_cells = sum(n * rows * length for n, rows, length in chunks)
    factors, reads = params.factors, products(params)
    moved = n_cells * (_cell(side.cells) + _stored(params) * factors * (2 + reads))
    work = Work(memory=moved, trips=sum(n for n, _, _ in chunks))
    if params.linear_solver == "cg":
        # Every product of a tile is with all its rows' vectors, in two bfloat16 parts or three.
        parts = 2 if params.dtype == "bfloat16" else FLOAT32_PASSES
        work.flops = n_cells * 2 * factors * reads * TILE_ROWS * parts
        return work
    systems = sum(n * rows for n, rows, _ in chunks)
    work.flops = FLOAT32_PASSES * n_cells * 2 * factors**2
    work.vector_flops = n_cells * 4 * factors + systems * (factors**3 / 3 + 2 * factors**2)
    # A system is written, factorised, and read again for its two substitutions.
    work.memory += systems * 4 * factors**2 * 5
    return work


def _write(side: Side, params: AlsParams) -> Work:
    """Start rows are read; solved rows are rotated back and written."""
    rows = side.rows.n_slots
    flops = FLOAT32_PASSES * 2 * rows * params.factors**2
    return Work(flops, memory=2 * _table_bytes(side, params) + rows * 4 * params.factors * 2)


def _long(side: Side, data: Data) -> Work:
    """Long rows: their entries are gathered for every product, and the shards' sums are added."""
    assert side.long is not None
    params, n_shards = data.params, data.mesh.n_shards
    n_blocks, length = side.long.ids.shape[1:]
    batches = side.long.starts.shape[1] - 1
    factors, size = params.factors, n_blocks * length
    # CG: residual, steps - 1 products with the matrix, and half a product. Cholesky: one pass.
    passes = 1 if params.linear_solver == "cholesky" else params.cg_steps + 1
    sums = side.long.batch_rows * factors * 4
    work = Work(trips=passes * long_steps(side, data))
    if params.linear_solver == "cholesky":
        work.flops = FLOAT32_PASSES * size * 2 * factors**2
        work.vector_flops = batches * side.long.batch_rows * factors**3 / 3
        sums *= factors + 1
    else:
        work.vector_flops = size * 2 * factors * (2 * params.cg_steps + 1)
    # A row is read, written, and read twice: for a product, and for one with the transpose.
    work.memory = passes * size * (_cell(side.long) + 4 * _stored(params) * factors)
    work.interconnect = 2 * batches * (passes + 1) * sums * (n_shards - 1) / n_shards
    return work


def long_steps(side: Side, data: Data) -> int:
    """Steps of a pass over the blocks of long rows; each batch of rows has a part of a step."""
    assert side.long is not None
    n_blocks, length = side.long.ids.shape[1:]
    batches = side.long.starts.shape[1] - 1
    return batches + n_blocks // min(data.plan.rows(length), n_blocks)


def report(data: Data, where: Slice) -> dict[str, Any]:
    """Phases of both sides with their least times, and their sum."""
    total = 0.0
    sides: dict[str, dict[str, Any]] = {}
    for name, side, source in (
        ("users", data.users, data.items),
        ("items", data.items, data.users),
    ):
        sides[name] = {}
        for phase, work in phases(side, source, data).items():
            bounds = where.seconds(work)
            total += max(bounds.values())
            sides[name][phase] = {**asdict(work), **bounds}
    sent = sum(phase["interconnect"] for side in sides.values() for phase in side.values())
    return {"epoch_s": total, "interconnect_bytes": sent, **sides}
