"""Each device gets the rows its chunks need, and no more of them the more devices there are."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from matrices import random_counts
from scipy import sparse

from tpu_als.datasets import power_law
from tpu_als.engine import als, layout
from tpu_als.engine.data import AlsParams
from tpu_als.engine.layout import Plan, RowMap
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend, exchange, half_epoch, placing
from tpu_als.engine.xla.data import XlaData
from tpu_als.engine.xla.mesh import device_mesh


def _planned(
    matrix: sparse.csr_matrix, plan: Plan
) -> tuple[RowMap, RowMap, np.ndarray, np.ndarray, tuple[exchange.Route, ...], np.ndarray]:
    from tpu_als.engine import cells

    transposed = matrix.T.tocsr()
    rows, source = (layout.map_rows(np.diff(m.indptr), plan) for m in (matrix, transposed))
    blocks = cells.InMemory(matrix, transposed).blocks("user")
    every = range(plan.n_shards)
    ids, _ = cells.fill(blocks, rows, source.slots, source.pad_slot, every, np.float32)
    before = ids.copy()
    routes, requests = exchange.plan(ids, rows.rungs, plan.n_shards, source.n_slots, int)
    return rows, source, before, ids, routes, requests


@given(
    seed=st.integers(0, 1000), devices=st.integers(1, 4), cells=st.sampled_from([8, 64, 1 << 17])
)
def test_ids_refer_to_the_requested_rows(seed: int, devices: int, cells: int) -> None:
    matrix = random_counts(60, 40, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "GROUP_CELLS", cells)
        plan = Plan((8, 16, 64), 32, 4, devices)
        rows, source, before, after, routes, requests = _planned(matrix, plan)
    first = 0
    for rung, route in zip(rows.rungs, routes, strict=True):
        size, n_groups = rung.rows * rung.length, route.groups(rung.n_chunks)
        for group in range(n_groups):
            asked = requests[:, first : first + devices * route.rows]
            first += devices * route.rows
            arrives = asked.reshape(devices, devices, route.rows)
            arrives = arrives + np.arange(devices)[None, :, None] * source.n_slots
            low = rung.first_cell + group * route.chunks * size
            high = min(low + route.chunks * size, rung.first_cell + rung.n_chunks * size)
            for shard in range(devices):
                got = arrives[shard].ravel()[after[shard, low:high]]
                np.testing.assert_array_equal(got, before[shard, low:high])
    assert first == requests.shape[1]


@pytest.mark.parametrize("devices", [2, 4])
def test_requested_rows_are_received(devices: int) -> None:
    groups, rows, n_slots = 3, 8, 10
    rng = np.random.default_rng(0)
    requests = rng.integers(0, n_slots, (devices, groups, devices, rows)).astype(np.int32)
    table = rng.normal(size=(devices, n_slots, 2)).astype(np.float32)
    mesh = Mesh(np.array(jax.devices()[:devices]), ("d",))

    def local(requests: jax.Array, table: jax.Array) -> jax.Array:
        sends = exchange.exchange_requests(
            (exchange.Messages(groups, rows),), requests.reshape(-1), "d"
        )
        size = devices * rows
        arrived = [
            exchange.receive(table[0], sends, np.int32(group * size), rows, "d")
            for group in range(groups)
        ]
        return jax.numpy.stack(arrived)[None]

    spec = PartitionSpec("d")
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
    arrived = np.asarray(run(requests, table)).reshape(devices, groups, devices, rows, 2)
    for receiver, group, sender in np.ndindex(devices, groups, devices):
        expected = table[sender, requests[receiver, group, sender]]
        np.testing.assert_array_equal(arrived[receiver, group, sender], expected)


def _sharded(matrix: sparse.csr_matrix, devices: int, factors: int = 24) -> XlaData:
    mesh = device_mesh(devices, table_layout="sharded")
    return backend.place(matrix, AlsParams(factors), mesh)


@pytest.mark.slow
def test_no_device_holds_a_full_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither placed nor inside a compiled program: no array has the rows of a whole table."""
    matrix, factors = power_law(60_000, 50_000, 200_000, random_state=0), 24
    data = _sharded(matrix, 4, factors)
    assert data.users.routes is not None and data.users.rows.n_slots == data.items.rows.n_slots
    texts = []
    compiled = type(data.mesh).compile

    def spy(self: object, calls: object, dtype: str) -> None:
        calls = list(calls)  # type: ignore[call-overload]
        texts.extend(program.lower(*args).compile().as_text() for program, args in calls)
        compiled(data.mesh, calls, dtype)

    monkeypatch.setattr(type(data.mesh), "compile", spy)
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(n, factors)).astype(np.float32) for n in matrix.shape]
    state = als.start(data, *tables)
    objective = Objective.of("implicit", 0.1, 2.0)
    state, failed = als.epoch(state, data, objective)
    als.loss(state, data, objective)
    assert failed == (0, 0) and len(texts) >= 3
    prepare = half_epoch.prepare_program(data)
    tables = half_epoch.Tables(state.items, state.users, data.users.cells.lengths)
    args = tables, np.int32(matrix.shape[1])
    texts.append(prepare.lower(*args).compile().as_text())
    part, full = data.items.rows.n_slots, 4 * data.items.rows.n_slots
    assert min(matrix.shape) > part
    for text in texts:
        shapes = [tuple(map(int, s.split(","))) for s in _shapes(text)]
        rows = [s[0] for s in shapes if len(s) == 2 and s[1] == factors]
        rows += [s[0] * s[1] for s in shapes if len(s) == 3 and s[2] == factors]
        assert part in rows and max(rows) < full
    for table in state:
        assert all(shard.data.shape == (1, part, factors) for shard in table.addressable_shards)


def _shapes(text: str) -> list[str]:
    import re

    return re.findall(r"f32\[(\d+(?:,\d+)*)\]", text)


@pytest.mark.slow
def test_received_bytes_fall_with_the_devices() -> None:
    """As 1/D, but for what rounding message sizes up leaves unused."""
    matrix = power_law(200_000, 100_000, 1_000_000, random_state=0)
    received = {}
    for devices in (1, 2, 4, 8):
        plan = placing.make_plan(
            np.diff(matrix.indptr), AlsParams(64), device_mesh(1, num_threads=devices)
        )
        rows, _, _, _, routes, _ = _planned(matrix, plan)
        received[devices] = exchange.received_rows(routes, rows.rungs, devices)
    assert received[1] == 0
    # (D - 1) / D of what is needed comes from others
    for devices in (4, 8):
        ideal = received[2] * 2 * (devices - 1) / devices * 2 / devices
        assert received[devices] < 1.15 * ideal


@pytest.mark.slow
def test_messages_stay_long_with_many_devices() -> None:
    """What a device receives for its share of the entries: no more a cell with many devices."""
    rng, n_slots = np.random.default_rng(0), 1 << 22
    received = {}
    for devices in (64, 1024):
        n_chunks = devices // 64
        rung = layout.Rung(64, 1 << 11, 0, 0, n_chunks)
        ids = rng.integers(0, n_slots, (1, n_chunks << 17)).astype(np.int32)
        routes, requests = exchange.plan(ids, (rung,), devices, n_slots // devices, int)
        assert requests.size == routes[0].groups(n_chunks) * devices * routes[0].rows
        received[devices] = exchange.received_rows(routes, (rung,), devices) / n_chunks
    assert received[1024] < 1.05 * received[64]
