"""Exact top-k against a full sort in NumPy, with any items excluded, on one device and on four."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tpu_als.engine import layout
from tpu_als.engine.cpu import ranking as cpu_ranking
from tpu_als.engine.data import dtype_named
from tpu_als.engine.layout import RowMap
from tpu_als.engine.xla import ranking
from tpu_als.engine.xla.mesh import DeviceMesh, Shards, device_mesh

LOWEST = np.float32(-np.finfo(np.float32).max)
MESHES = [(1, 1), (1, 2), (4, 0)]


def _mesh(devices: int, threads: int) -> DeviceMesh:
    return device_mesh(devices, num_threads=threads)


def _scores(
    queries: np.ndarray,
    table: np.ndarray,
    seen: sparse.csr_matrix | None,
    excluded: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (B, N) in float64, and which of them may not be recommended."""
    scores = queries.astype(np.float64) @ table.astype(np.float64).T
    hidden = np.zeros(scores.shape, bool)
    if seen is not None:
        coo = seen.tocoo()
        hidden[coo.row, coo.col] = True
    if excluded is not None:
        hidden[:, excluded] = True
    return scores, hidden


def _check(
    found: tuple[np.ndarray, np.ndarray],
    k: int,
    scores: np.ndarray,
    hidden: np.ndarray,
    dtype: str,
) -> None:
    ids, values = found
    assert ids.shape == values.shape == (len(scores), k)
    assert ids.dtype == np.int32 and values.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    for row in range(len(scores)):
        shown = np.flatnonzero(~hidden[row])
        count = min(k, len(shown))
        best = np.sort(scores[row, shown])[::-1][:count]
        mine = ids[row, :count]
        np.testing.assert_allclose(values[row, :count], best, rtol=tolerance, atol=tolerance)
        assert len(set(mine)) == count and set(mine) <= set(shown)
        # among ties any order will do, but an id must go with its own score
        np.testing.assert_allclose(
            values[row, :count], scores[row, mine], rtol=tolerance, atol=tolerance
        )
        assert np.all(ids[row, count:] == -1) and np.all(values[row, count:] == LOWEST)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, sparse.csr_matrix | None, object]:
    """Queries, table, seen and excluded; sizes are few, so that programs are."""
    n_queries, n_items = draw(st.sampled_from([1, 2, 5, 20])), draw(st.sampled_from([1, 7, 40]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    queries, table = rng.normal(size=(n_queries, 3)), rng.normal(size=(n_items, 3))
    if draw(st.booleans()):  # whole numbers tie, and are exact
        queries, table = np.rint(queries), np.rint(table)
    seen = excluded = None
    share = draw(st.sampled_from([None, 0, 0.3, 0.95, 1]))
    if share is not None:
        seen = sparse.csr_matrix((rng.random((n_queries, n_items)) < share).astype(np.float32))
    share = draw(st.sampled_from([None, 0, 0.3, 1]))
    if share is not None:
        some = np.flatnonzero(rng.random(n_items) < share)
        excluded = rng.permutation(np.concatenate([some, some[:2]]))  # repeats are harmless
    return queries, table, seen, excluded


@pytest.mark.parametrize(("devices", "threads"), MESHES)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@given(problem=problems(), k=st.sampled_from([1, 3, 10, 45]))
def test_top_k_equals_a_full_sort(
    devices: int, threads: int, dtype: str, problem: tuple, k: int
) -> None:
    queries, table, seen, excluded = problem
    queries, table = queries.astype(dtype), table.astype(dtype)
    catalog = ranking.catalog(table, _mesh(devices, threads))
    expected = _scores(queries, table, seen, excluded)
    hidden = {"seen": seen, "excluded": excluded}
    _check(catalog.top_k(queries, k, **hidden), k, *expected, dtype)
    by_cpu = cpu_ranking.Catalog(table, None, threads or 2)
    _check(by_cpu.top_k(queries, k, **hidden), k, *expected, dtype)


@pytest.mark.parametrize(("devices", "threads"), MESHES)
@pytest.mark.parametrize(("k", "lanes"), [(10, 1), (100, 1), (10, 128)])
def test_a_large_catalog_with_much_seen(
    devices: int, threads: int, k: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best items are the seen ones, so a search that stops early would miss the rest."""
    monkeypatch.setattr(ranking, "_LANES", {"cpu": lanes})
    rng = np.random.default_rng(0)
    n_queries, n_items = 70, 5000
    queries = rng.normal(size=(n_queries, 8)).astype(np.float32)
    table = rng.normal(size=(n_items, 8)).astype(np.float32)
    scores = queries @ table.T
    top = np.argsort(-scores, axis=1)[:, :600]
    kept = top[np.arange(n_queries)[:, None], rng.integers(0, 600, (n_queries, 550))]
    stored = np.zeros(scores.shape, np.float32)
    stored[np.arange(n_queries)[:, None], kept] = 1
    seen = sparse.csr_matrix(stored)
    excluded = rng.choice(n_items, 300, replace=False)
    catalogs = ranking.catalog(table, _mesh(devices, threads)), cpu_ranking.Catalog(table, None, 2)
    for catalog in catalogs:
        found = catalog.top_k(queries, k, seen=seen, excluded=excluded)
        _check(found, k, *_scores(queries, table, seen, excluded), "float32")


@pytest.mark.parametrize("devices", [1, 4])
def test_best_items_in_consecutive_rows(devices: int) -> None:
    """All the best in one stretch of the catalog, as items sorted by popularity stand."""
    table = np.linspace(1, 0, 3000, dtype=np.float32)[:, None]
    catalog = ranking.catalog(table, _mesh(devices, 2))
    ids, scores = catalog.top_k(np.ones((9, 1), np.float32), 150)
    np.testing.assert_array_equal(ids, np.tile(np.arange(150), (9, 1)))
    np.testing.assert_array_equal(scores, np.tile(table[:150, 0], (9, 1)))


@pytest.mark.parametrize("n_queries", [1, 9])
@pytest.mark.parametrize("devices", [1, 4])
def test_equal_scores_of_all_items(devices: int, n_queries: int) -> None:
    catalog = ranking.catalog(np.zeros((500, 2), np.float32), _mesh(devices, 1))
    ids, scores = catalog.top_k(np.ones((n_queries, 2), np.float32), 20)
    assert all(len(set(row)) == 20 for row in ids)
    assert ids.min() >= 0 and ids.max() < 500 and not scores.any()


def test_results_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(37, 4)).astype(np.float32)
    seen = sparse.csr_matrix((rng.random((37, 200)) < 0.3).astype(np.float32))
    catalog = ranking.catalog(rng.normal(size=(200, 4)).astype(np.float32), _mesh(1, 2))
    together = catalog.top_k(queries, 10, seen=seen)
    single = [catalog.top_k(queries[[n]], 10, seen=seen[n]) for n in range(37)]
    monkeypatch.setitem(ranking._BATCH_BYTES, "cpu", 1 << 10)
    small = catalog.top_k(queries, 10, seen=seen)
    for other in (small, tuple(np.concatenate(part) for part in zip(*single, strict=True))):
        np.testing.assert_array_equal(other[0], together[0])
        np.testing.assert_allclose(other[1], together[1], rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    ("n_queries", "n_items", "k"), [(0, 7, 3), (2, 0, 3), (9, 0, 3), (9, 7, 0)]
)
def test_nothing_to_rank(devices: int, n_queries: int, n_items: int, k: int) -> None:
    catalog = ranking.catalog(np.ones((n_items, 2), np.float32), _mesh(devices, 1))
    ids, scores = catalog.top_k(np.ones((n_queries, 2), np.float32), k)
    assert ids.shape == scores.shape == (n_queries, k)
    assert np.all(ids == -1) and np.all(scores == LOWEST)


@pytest.mark.parametrize("n_queries", [1, 9])
def test_a_call_changes_nothing_that_it_was_given(n_queries: int) -> None:
    rng = np.random.default_rng(0)
    queries, table = rng.normal(size=(n_queries, 3)), rng.normal(size=(40, 3))
    seen = sparse.csr_matrix((rng.random((n_queries, 40)) < 0.3).astype(np.float32))
    before = queries.copy(), table.copy(), seen.copy()
    catalog = ranking.catalog(table, _mesh(1, 1))
    catalog.top_k(queries, 5, seen=seen, excluded=np.arange(3))
    np.testing.assert_array_equal(queries, before[0])
    np.testing.assert_array_equal(table, before[1])
    assert (seen != before[2]).nnz == 0


def test_a_catalog_is_reused_without_compiling(new_compilations) -> None:
    rng = np.random.default_rng(0)
    mesh = _mesh(1, 2)
    queries = rng.normal(size=(60, 3)).astype(np.float32)
    catalog = ranking.catalog(rng.normal(size=(300, 3)).astype(np.float32), mesh)
    catalog.top_k(queries, 10)
    again = ranking.catalog(rng.normal(size=(300, 3)).astype(np.float32), mesh)
    seen = sparse.csr_matrix((rng.random((60, 300)) < 0.1).astype(np.float32))
    with new_compilations() as count:
        catalog.top_k(-queries, 9, excluded=np.arange(4))
        again.top_k(queries[:59], 10, seen=seen[:59])
    assert count.programs == 0


def _in_slots(table: np.ndarray, mesh: DeviceMesh, dtype: str) -> tuple[Shards, RowMap, np.ndarray]:
    """A table in slot order on the devices, its map, and the rows in float64 as they are stored."""
    lengths = np.random.default_rng(1).integers(0, 40, len(table))
    rows = layout.map_rows(lengths, layout.Plan((8, 16, 32), 64, 16, mesh.n_shards))
    stored = table.astype(dtype_named(dtype))
    with ranking.precision(dtype):
        shards = mesh.put(layout.to_slots(stored, rows, mesh.local_shards))
    return shards, rows, stored.astype(np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(1, 1), (1, 3), (1, 8), (2, 0), (4, 0)], ids=str)
@pytest.mark.parametrize(
    "dtype",
    ["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float64", "bfloat16"))],
)
@settings(max_examples=6)
@given(problem=problems(), k=st.sampled_from([1, 10, 45]))
def test_a_table_on_the_devices_is_ranked_without_a_copy(
    devices: tuple[int, int], dtype: str, problem: tuple, k: int
) -> None:
    queries, table, seen, excluded = problem
    mesh = _mesh(*devices)
    shards, rows, stored = _in_slots(table, mesh, dtype)
    catalog = ranking.catalog_of(shards, rows, mesh)
    assert catalog.rows is shards
    wide = "float64" if dtype == "float64" else "float32"
    found = catalog.top_k(queries.astype(wide), k, seen=seen, excluded=excluded)
    _check(found, k, *_scores(queries.astype(wide), stored, seen, excluded), wide)


@pytest.mark.parametrize("devices", [(1, 3), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_cosines(devices: tuple[int, int], dtype: str) -> None:
    rng, mesh = np.random.default_rng(0), _mesh(*devices)
    wide = "float64" if dtype == "float64" else "float32"
    table = rng.normal(size=(300, 5)).astype(wide)
    table[7] = 0  # has no direction, and a cosine of 0
    shards, rows, stored = _in_slots(table, mesh, dtype)
    lengths = np.linalg.norm(stored, axis=1)
    lengths[7] = 1e-10
    queries = stored[:20] / lengths[:20, None]
    expected = _scores(queries, stored / lengths[:, None], None, None)
    for catalog in (
        ranking.catalog_of(shards, rows, mesh, cosine=True),
        ranking.catalog_of(shards, rows, mesh, lengths=lengths),
        ranking.catalog(stored.astype(wide), mesh, lengths=lengths),
    ):
        found = catalog.top_k(queries.astype(wide), 25)
        _check(found, 25, *expected, wide)
        np.testing.assert_array_equal(found[0][:7, 0], np.arange(7))


def test_devices_exchange_only_the_best_of_each_part() -> None:
    """No array that a collective makes is as large as a part of the table, or of its scores."""
    mesh = _mesh(4, 0)
    shards, rows, _ = _in_slots(np.ones((20_000, 8)), mesh, "float32")
    catalog = ranking.catalog_of(shards, rows, mesh)
    program = ranking.top_k_program(catalog, 16)
    queries = ranking.Queries(np.ones((8, 8), np.float32), ranking._seen_items(None, catalog))
    text = program.lower(ranking._parts_of(catalog, None), queries).as_text()
    gathered = [line for line in text.splitlines() if "stablehlo.all_gather" in line]
    assert len(gathered) == 2 and all("-> tensor<4x8x16x" in line for line in gathered)
    assert not any(
        name in text for name in ("all_to_all", "all_reduce", "collective_permute", "all-gather")
    )


@pytest.mark.parametrize("devices", [(1, 2), (4, 0)], ids=str)
def test_approximate_search_is_exact_where_there_is_no_approximate_one(
    devices: tuple[int, int],
) -> None:
    rng = np.random.default_rng(0)
    queries, table = rng.normal(size=(9, 8)), rng.normal(size=(3000, 8))
    catalog = ranking.catalog(table.astype(np.float32), _mesh(*devices))
    found = catalog.top_k(queries.astype(np.float32), 50, approximate_recall=0.9)
    _check(found, 50, *_scores(queries, table, None, None), "float32")
    for wrong in (0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="approximate_recall must be a number between 0 and 1"):
            catalog.top_k(queries, 5, approximate_recall=wrong)


def test_tpus_get_the_approximate_search_when_asked() -> None:
    catalog = ranking.catalog(np.ones((20_000, 8), np.float32), _mesh(4, 0))
    queries = ranking.Queries(np.ones((8, 8), np.float32), ranking._seen_items(None, catalog))
    args = ranking._parts_of(catalog, None), queries
    for recall, expected in ((None, 0), (0.95, 1)):
        traced = ranking.top_k_program(catalog, 16, recall).trace(*args)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("@ApproxTopK(") == expected
        assert text.count("recall_target = 0.9499") == expected


_PROCESS = """
    import sys
    import jax, numpy as np
    from scipy import sparse
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    from tpu_als.engine import layout
    from tpu_als.engine.xla import ranking
    from tpu_als.engine.xla.mesh import device_mesh

    mesh = device_mesh()
    assert len(mesh.devices) == 8 and len(mesh.processes) == 2
    rng = np.random.default_rng(0)
    table = rng.normal(size=(500, 6)).astype(np.float32)
    queries = rng.normal(size=(30, 6)).astype(np.float32)
    stored = rng.random((30, 500)) < 0.2
    seen, excluded = sparse.csr_matrix(stored.astype(np.float32)), np.arange(0, 500, 7)
    rows = layout.map_rows(rng.integers(0, 40, 500), layout.Plan((8, 32), 64, 16, 8, 2))
    shards = mesh.put(layout.to_slots(table, rows, mesh.local_shards))
    scores = queries.astype(float) @ table.T.astype(float)
    cosines = scores / np.linalg.norm(table, axis=1)
    for expected, found in (
        (scores, ranking.catalog_of(shards, rows, mesh)),
        (cosines, ranking.catalog_of(shards, rows, mesh, cosine=True)),
        (scores, ranking.catalog(table, mesh)),
    ):
        expected[stored] = expected[:, excluded] = -np.inf
        ids, best = found.top_k(queries, 12, seen=seen, excluded=excluded)
        np.testing.assert_array_equal(ids, np.argsort(-expected, axis=1)[:, :12])
        np.testing.assert_allclose(best, -np.sort(-expected, axis=1)[:, :12], rtol=1e-4)
    print("answered")
"""


@pytest.mark.slow
def test_every_process_gets_the_whole_answer() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = textwrap.dedent(_PROCESS)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(number)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        for process in running:
            out, errors = process.communicate(timeout=120)
            assert process.returncode == 0 and "answered" in out, errors[-3000:]
    finally:
        for process in running:
            process.kill()
