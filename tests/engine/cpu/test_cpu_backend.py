"""The CPU backend: it gives what XLA's programs give, for every kind of row and value."""

from __future__ import annotations

import gc
import importlib
import itertools
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numba
import numpy as np
import oracle
import pytest
import threadpoolctl
from matrices import random_counts
from scipy import sparse

from tpu_als import DataWarning, ModelFitError, TPUAlternatingLeastSquares, host
from tpu_als.engine import als, choice
from tpu_als.engine.cpu import compiled, half_epoch, jit, memory
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.data import AlsParams, Data
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend, mesh
from tpu_als.engine.xla.backend import XlaBackend
from tpu_als.engine.xla.mesh import DeviceMesh, device_mesh
from tpu_als.shards import write_shards

# Imported in this way, its compiled code is that of all other tests.
loops = compiled.loops()
COUNTS = random_counts(90, 60, density=0.3, negatives=True, seed=2)
COUNTS.data[::17] = 0  # stored zeros
COUNTS = sparse.vstack([COUNTS, sparse.csr_matrix((3, 60), dtype=np.float32)], "csr")
VALUES = {"counts": 1.0, "fractions": 0.123, "ones": 0.0}
STEPS = 3


def _matrix(values: str) -> sparse.csr_matrix:
    matrix = COUNTS.copy()
    matrix.data = np.ones_like(matrix.data) if values == "ones" else matrix.data * VALUES[values]
    matrix.data = matrix.data.astype(np.float32)
    return matrix


def _epochs(
    data: Data, objective: Objective, relaxation: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Tables after two epochs, and the loss of them."""
    rng = np.random.default_rng(1)
    state = als.start(
        data,
        *(
            rng.normal(size=(n, data.params.factors))
            for n in (data.users.n_rows, data.items.n_rows)
        ),
    )
    for _ in range(2):
        state, failed = als.epoch(state, data, objective, relaxation)
        assert failed == (0, 0)
    tables = als.user_factors(state, data), als.item_factors(state, data)
    return *tables, als.loss(state, data, objective)


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices fall into several parts, and products into one for each thread."""
    monkeypatch.setattr(half_epoch, "_LEAST_PART", 64)
    monkeypatch.setattr(half_epoch, "_LEAST_PRODUCT", 64)


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where a half-epoch is run by XLA."""

    def refuse(*_: Any) -> None:
        raise AssertionError("XLA was asked to solve rows")

    with monkeypatch.context() as patch:
        patch.setattr(DeviceMesh, "run", refuse)
        yield


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("kind", "relaxation"), [("implicit", 1.0), ("ials", 1.4)])
def test_tables_and_losses_are_those_of_xla(
    values: str, dtype: str, kind: str, relaxation: float
) -> None:
    matrix, objective = _matrix(values), Objective.of(kind, 0.3, 2.0, 0.7, 0.5)
    params = AlsParams(5, dtype, cg_steps=STEPS)
    by_xla = backend.place(matrix, params, device_mesh(1, num_threads=2))
    *theirs, their_loss = _epochs(by_xla, objective, relaxation)
    data = CpuBackend(2).place(matrix, params)
    assert len(data.items.entries.parts(2, params.factors)) == 2 * half_epoch._PARTS
    *ours, our_loss = _epochs(data, objective, relaxation)
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == dtype and own.flags.writeable
        atol = (1e-11 if dtype == "float64" else 2e-4) * np.abs(other).max()
        np.testing.assert_allclose(own, other, rtol=0, atol=atol)
    assert not ours[0][-3:].any()
    assert our_loss == pytest.approx(their_loss, rel=1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("solver", ["cg", "exact"])
@pytest.mark.parametrize("values", VALUES)
def test_bfloat16_tables_are_rounded_ones(
    values: str, solver: str, no_programs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables take half the memory; half-epochs differ from float32 by rounding."""
    matrix, objective = _matrix(values), Objective.of("ials", 0.3, 2.0, 0.7, 0.5)
    rng, bound = np.random.default_rng(1), 2.0**-8
    tables = [rng.normal(size=(n, 5)).astype(ml_dtypes.bfloat16) for n in matrix.shape]
    found = {}
    for dtype in ("bfloat16", "float32"):
        data = CpuBackend(2).place(matrix, AlsParams(5, dtype, solver, cg_steps=STEPS))
        state = als.start(data, *(table.astype(np.float32) for table in tables))
        assert state.users.itemsize == (2 if dtype == "bfloat16" else 4)
        users = als.half_epoch(*state, data, objective, 1.4, target="users")
        assert users.dtype == state.users.dtype
        losses = (
            als.loss(state, data, objective),
            als.loss(state._replace(users=users), data, objective),
        )
        found[dtype] = als.user_factors(state._replace(users=users), data), losses
    (ours, our_losses), (wide, wide_losses) = found["bfloat16"], found["float32"]
    assert ours.dtype == np.float32 and ours.flags.writeable
    assert not (ours.view(np.uint32) & 0xFFFF).any()
    # The rotated source table is rounded too, unless rows are solved exactly.
    atol = (1 if solver == "exact" else 8) * bound * np.abs(wide).max()
    np.testing.assert_allclose(ours, wide, rtol=0, atol=atol)
    assert our_losses[0] == pytest.approx(wide_losses[0], rel=1e-5)  # of the same tables
    assert our_losses[1] == pytest.approx(wide_losses[1], rel=0.01)


def test_bfloat16_fits_have_the_loss_of_xla() -> None:
    matrix, objective = _matrix("counts"), Objective.of("implicit", 0.3, 2.0)
    params = AlsParams(5, "bfloat16", cg_steps=STEPS)
    *_, their_loss = _epochs(
        backend.place(matrix, params, device_mesh(1, num_threads=2)), objective, 1.0
    )
    *_, our_loss = _epochs(CpuBackend(2).place(matrix, params), objective, 1.0)
    assert our_loss == pytest.approx(their_loss, rel=0.01)


@pytest.mark.parametrize("bits", [0x0000, 0x8000, 0x3F80, 0x0001, 0x7F7F, 0x7F80, 0xFFC0])
def test_bits_of_bfloat16_are_widened(bits: int) -> None:
    widen = numba.njit(lambda numbers: loops.widen(numbers[0]))
    expected = np.array([bits << 16], np.uint32).view(np.float32)[0]
    np.testing.assert_array_equal(widen(np.array([bits], np.uint16)), expected)


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_a_pass_is_enough_where_weights_vanish(weight: float, no_programs: None) -> None:
    """Though a single step of CG, which would not be exact, is asked for."""
    matrix, rng = _matrix("ones"), np.random.default_rng(3)
    data = CpuBackend(2).place(matrix, AlsParams(12, cg_steps=1))
    tables = [0.5 * rng.normal(size=(n, 12)).astype(np.float32) for n in matrix.shape]
    state, exact = als.start(data, *tables), oracle.Objective("implicit", 0.5, weight, weight)
    found = als.half_epoch(*state, data, Objective.of(*exact), target="users")
    users = als.user_factors(als.AlsState(found, state.items), data)
    expected = oracle.half_epoch(matrix, tables[1].astype(np.float64), exact)
    np.testing.assert_allclose(users, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # the table that was solved is as it was
    np.testing.assert_array_equal(als.user_factors(state, data), tables[0])


@pytest.mark.parametrize("threads", [1, 3, 50])
def test_threads_change_nothing(threads: int, no_programs: None) -> None:
    found = []
    for number in (2, threads):
        data = CpuBackend(number).place(COUNTS, AlsParams(7))
        state = als.draw(data, 0, 0.1, normal=True)
        state, _ = als.epoch(state, data, Objective.of("implicit", 0.1, 3.0))
        found.append(als.item_factors(state, data))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("factors", [1, 7, 40, 600])
def test_rows_fetched_ahead_change_nothing(
    factors: int, monkeypatch: pytest.MonkeyPatch, no_programs: None
) -> None:
    """Nor does it matter that there are fewer entries than would be fetched."""
    found = []
    for large in (1 << 40, 0):
        monkeypatch.setattr(half_epoch, "_LARGE", large)
        assert (half_epoch.prefetched(np.zeros((9, factors), np.float32)) == 0) == bool(large)
        data = CpuBackend(2).place(COUNTS, AlsParams(factors))
        state, objective = (
            als.draw(data, 0, 0.1, normal=True),
            Objective.of("implicit", 0.1, 3.0),
        )
        state, _ = als.epoch(state, data, objective)
        found.append((als.item_factors(state, data), als.loss(state, data, objective)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.slow
def test_memory_of_tables_is_used_again(monkeypatch: pytest.MonkeyPatch, no_programs: None) -> None:
    """After two epochs, whose tables take turns with two more, nothing new is allocated."""
    data = CpuBackend(2).place(COUNTS, AlsParams(7))
    state, objective = als.draw(data, 0, 0.1, normal=True), Objective.of("implicit", 0.1, 3.0)
    allocated, empty = [], np.empty
    spy = types.SimpleNamespace(**vars(np))
    spy.empty = lambda *args: allocated.append(args) or empty(*args)
    monkeypatch.setattr(memory, "np", spy)
    counts = []
    for _ in range(6):
        state, _ = als.epoch(state, data, objective)
        gc.collect()
        counts.append(len(allocated))
    assert counts[0] > 0 and counts[2:] == counts[2:3] * 4


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (3, 2)])
def test_matrices_without_entries(shape: tuple[int, int], no_programs: None) -> None:
    model = TPUAlternatingLeastSquares(factors=3, iterations=2)
    model.fit(sparse.csr_matrix(shape, dtype=np.float32), show_progress=False)
    assert model.user_factors.shape == (shape[0], 3) and not model.user_factors.any()
    assert model.item_factors.shape == (shape[1], 3) and not model.item_factors.any()


@pytest.mark.slow
def test_reads_matrices_from_disk(tmp_path: Path) -> None:
    settings = dict(factors=4, iterations=2, random_state=0, alpha=2.0, devices=1)
    rows = write_shards(COUNTS, tmp_path / "counts", n_shards=3)
    by_loops, by_xla = (
        TPUAlternatingLeastSquares(**settings, use_native=native).fit(rows, show_progress=False)
        for native in (True, False)
    )
    for name in ("user_factors", "item_factors"):
        own, other = getattr(by_loops, name), getattr(by_xla, name)
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-4 * np.abs(other).max())


def test_stops_early(no_programs: None) -> None:
    settings = dict(factors=4, random_state=0, alpha=2.0, early_stopping=True, n_iter_no_change=1)
    model = TPUAlternatingLeastSquares(**settings, iterations=30)
    model.fit(COUNTS, show_progress=False)
    assert 1 < model.n_iter_ < 30


def test_starts_warm(no_programs: None) -> None:
    settings = dict(factors=4, random_state=0, alpha=2.0, calculate_training_loss=True)
    model = TPUAlternatingLeastSquares(**settings, iterations=3, warm_start=True)
    losses = []
    for _ in range(2):
        losses += model.fit(COUNTS, show_progress=False).history_["loss"]
    assert all(after < before for before, after in itertools.pairwise(losses))


def test_where_it_serves() -> None:
    def kind(linear_solver: str = "cg", **wishes: Any) -> type:
        return type(choice.choose(choice.Wishes(**wishes), linear_solver))

    assert kind() is kind(devices=1) is kind(devices=2) is CpuBackend
    assert kind("exact") is kind("cholesky") is CpuBackend
    assert kind(use_native=False) is XlaBackend
    for layout in ("replicated", "sharded"):
        assert kind(devices=2, table_layout=layout) is XlaBackend


@pytest.mark.parametrize(("factors", "expected"), [(2, "cholesky"), (400, "cg")])
def test_auto_is_replaced_when_data_are_placed(factors: int, expected: str) -> None:
    backend = choice.choose(choice.Wishes(), "auto")
    assert isinstance(backend, CpuBackend)
    data = backend.place(COUNTS, AlsParams(factors, linear_solver="auto"))
    assert data.params.linear_solver == expected


def test_several_cpu_devices_are_threads() -> None:
    assert choice.choose(choice.Wishes(devices=3, num_threads=1)) == CpuBackend(3)


@pytest.mark.parametrize(
    ("platforms", "expected"), [("cpu", False), ("cuda,cpu", True), ("tpu", True)]
)
def test_an_accelerator_is_asked_for_where_one_may_be(
    platforms: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)  # as if it were not imported
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert choice.may_have_accelerator() == expected


def test_a_plugin_of_jax_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choice._has_plugin.__wrapped__()
    (tmp_path / "libtpu").mkdir()  # a folder of that name is no package
    monkeypatch.syspath_prepend(tmp_path)
    assert not choice._has_plugin.__wrapped__()
    (tmp_path / "jax_plugins" / "xla_cuda13").mkdir(parents=True)
    importlib.invalidate_caches()
    assert choice._has_plugin.__wrapped__()


def test_the_estimator_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, solve_side = [], half_epoch.solve_side
    monkeypatch.setattr(
        half_epoch, "solve_side", lambda *args: calls.append(args) or solve_side(*args)
    )
    settings = dict(factors=4, iterations=3, devices=1, random_state=0)
    by_loops = TPUAlternatingLeastSquares(**settings).fit(COUNTS, show_progress=False)
    assert len(calls) == 6
    by_xla = TPUAlternatingLeastSquares(**settings, use_native=False)
    by_xla.fit(COUNTS, show_progress=False)
    assert len(calls) == 6
    np.testing.assert_allclose(by_loops.item_factors, by_xla.item_factors, atol=1e-4)


@pytest.fixture
def numba_anew() -> Iterator[None]:
    """Whether numba loads is asked again, before and after."""
    compiled.is_available.cache_clear()
    yield
    compiled.is_available.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        None,
        "raise ImportError('numba needs another NumPy')",
        "raise SystemError('numba needs another NumPy')",
        "raise AttributeError('numba needs another NumPy')",
    ],
)
def test_works_without_numba(
    text: str | None, numba_anew: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where it is not installed, and where it does not load, there is one warning."""
    if text is None:
        monkeypatch.setitem(sys.modules, "numba", None)
    else:
        (tmp_path / "numba.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "numba", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
    model = TPUAlternatingLeastSquares(factors=4, iterations=1, devices=1)
    with pytest.warns(DataWarning, match=f"numba does not load.*{'needs' if text else ''}"):
        model.fit(COUNTS, show_progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        model.fit(COUNTS, show_progress=False)


@pytest.mark.usefixtures("numba_anew")
def test_leaves_the_work_to_xla_where_numba_must_not_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert isinstance(choice.choose(choice.Wishes()), XlaBackend)


def test_loading_leaves_numbas_options_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert compiled.loops.__wrapped__() is loops
    assert str(tmp_path) == numba.config.CACHE_DIR


def test_works_where_nothing_can_be_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If the cache cannot be written, there is a warning and functions are compiled anyway."""
    made, njit = [], numba.njit

    def refuse(**options: Any) -> Any:
        made.append(options.get("cache", False))
        if made[-1]:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="tpu_als"):
        patch.setattr(numba, "njit", refuse)  # numba decorates its own functions when it compiles
        double = jit.compiled(lambda number: 2 * number)
    assert double(3) == 6 and made == [True, False]
    assert "no locator available" in caplog.text


@pytest.mark.slow
def test_goes_on_from_a_checkpoint_of_xla(tmp_path: Path) -> None:
    settings = dict(factors=4, random_state=0, alpha=3.0)
    whole = TPUAlternatingLeastSquares(**settings, iterations=4).fit(COUNTS, show_progress=False)
    settings |= dict(checkpoint_dir=str(tmp_path))
    TPUAlternatingLeastSquares(
        **settings, iterations=2, use_native=False, devices=3, table_layout="sharded"
    ).fit(COUNTS, show_progress=False)
    model = TPUAlternatingLeastSquares(**settings, iterations=4).fit(COUNTS, show_progress=False)
    assert len(model.history_["seconds"]) == 4
    scale = np.abs(whole.item_factors).max()
    np.testing.assert_allclose(model.item_factors, whole.item_factors, rtol=0, atol=1e-4 * scale)


def test_an_overflow_is_told(no_programs: None) -> None:
    matrix = COUNTS.copy()
    matrix.data[0] = 3e38
    model = TPUAlternatingLeastSquares(factors=4, iterations=1, alpha=100.0, devices=1)
    with pytest.raises(ModelFitError):
        model.fit(matrix, show_progress=False)


@pytest.mark.parametrize("count", [1, 3, 16])
def test_parts_have_every_row_once_and_share_the_entries(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.random.default_rng(0).integers(0, 40, 500)
    lengths[7] = 4000
    ids = np.zeros(lengths.sum(), np.uint32)
    rows = half_epoch.Rows(np.cumsum(lengths) - lengths, lengths, ids, None)
    monkeypatch.setattr(half_epoch, "_PARTS", count)
    monkeypatch.setattr(half_epoch, "_LEAST_PART", least := 1 << 14)
    parts = rows.parts(n_threads=1, factors=8)
    costs = lengths + half_epoch._ROW_ENTRIES
    most = min(count, 1 + costs.sum() * 8 // least)
    assert most // 2 < len(parts) <= most
    np.testing.assert_array_equal(np.concatenate([np.arange(500)[at] for at in parts]), range(500))
    # a row that is longer than a share is a part's last
    assert all(costs[at][:-1].sum() <= costs.sum() / most + 1 for at in parts)


def _blas_threads() -> set[int]:
    pools = threadpoolctl.threadpool_info()
    return {pool["num_threads"] for pool in pools if pool["user_api"] == "blas"}


def test_scopes_of_one_blas_thread_may_overlap() -> None:
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        assert _blas_threads() == {2}
        first, second = host.single_blas_thread(), host.single_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert _blas_threads() == {1}
        second.__exit__(None, None, None)
        assert _blas_threads() == {2}


@pytest.mark.parametrize("by_xla", [False, True])
def test_a_half_epoch_keeps_blas_to_one_thread(
    by_xla: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_xla:
        data: Any = backend.place(COUNTS, AlsParams(4), device_mesh(1, num_threads=2))
    else:
        data = CpuBackend(2).place(COUNTS, AlsParams(4))
    state, seen, threads = als.draw(data, 0, 0.1, normal=True), [], host.threads

    def spy(*args: Any) -> Any:
        seen.append(_blas_threads())
        return threads(*args)

    monkeypatch.setattr(mesh if by_xla else half_epoch, "threads", spy)
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        als.half_epoch(*state, data, Objective.of("implicit", 0.1, 3.0), target="users")
        assert _blas_threads() == {2}
    assert seen and all(each == {1} for each in seen)
