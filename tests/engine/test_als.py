"""Half-epochs, epochs and the loss against the dense oracle: every solver, rung and mesh."""

from __future__ import annotations

import dataclasses

import hypothesis
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy import sparse

from tpu_als.engine import als, layout, reading
from tpu_als.engine.als import AlsState
from tpu_als.engine.data import AlsParams, dtype_named
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend, placing
from tpu_als.engine.xla.data import XlaData
from tpu_als.engine.xla.mesh import DeviceMesh, device_mesh

MeshArgs = tuple[int, int, str]  # devices, threads, layout of the source table
MESHES = [
    (1, 1, "auto"),
    (1, 2, "auto"),
    (2, 0, "auto"),
    (4, 0, "replicated"),
    (4, 0, "sharded"),
]
# Enough steps make "cg" exact.
EXACT = {
    "cg": AlsParams(4, cg_steps=7),
    "cholesky": AlsParams(16, linear_solver="cholesky"),
}
OBJECTIVES = [
    oracle.Objective("implicit", 0.5, 2.0),
    oracle.Objective("implicit", 0.5, 2.0, 0.3, 0.5),
    oracle.Objective("ials", 0.05, 1.5, 0.4),
    oracle.Objective("ials", 0.1, 1.5, 0.4, 0.3),
]
TOLERANCE = {"float32": 2e-3, "float64": 1e-9, "bfloat16": 0.06}


def _mesh(devices: int, threads: int, table_layout: str = "auto") -> DeviceMesh:
    return device_mesh(devices, num_threads=threads, table_layout=table_layout)


def _data(
    matrix: sparse.csr_matrix,
    params: AlsParams,
    mesh: DeviceMesh,
    lengths: tuple[int, ...] = (8, 16),
    chunk: int = 32,
) -> XlaData:
    """Place a matrix on a small ladder, so that a few rows make many chunks and long rows."""
    planned = placing.make_plan

    def small(*args: object, **options: object) -> layout.Plan:
        return dataclasses.replace(planned(*args, **options), lengths=lengths, chunk=chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "make_plan", small)
        data = backend.place(matrix, params, mesh)
    assert data.plan.lengths == lengths
    return data


def _rungs(matrix: sparse.csr_matrix, target: str) -> np.ndarray:
    lengths = np.diff(matrix.indptr) if target == "users" else np.bincount(matrix.indices)
    return np.searchsorted([0, 8, 16], lengths)  # empty, two rungs, long


def _mixed() -> sparse.csr_matrix:
    """60 x 50 with rows, and columns, in every rung: empty, short, middling and long.

    A quarter of the values are negative and some are stored zeros.
    """
    rng = np.random.default_rng(5)
    share = rng.choice([0.02, 0.2, 0.9], (60, 1)) + rng.choice([0.0, 0.1, 0.5], (1, 50))
    stored = rng.random((60, 50)) < share * 0.7
    stored[[3, 31]], stored[:, [0, 17]] = False, False
    rows, columns = np.nonzero(stored)
    values = rng.integers(1, 5, len(rows)) * np.where(rng.random(len(rows)) < 0.25, -1, 1)
    values[rng.random(len(rows)) < 0.03] = 0
    return sparse.csr_matrix((values.astype(np.float32), (rows, columns)), (60, 50))


MIXED = _mixed()


def _tables(
    matrix: sparse.csr_matrix, factors: int, dtype: type = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    users, items = (0.5 * rng.normal(size=(count, factors)) for count in matrix.shape)
    return users.astype(dtype), items.astype(dtype)


def _close(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> None:
    assert ours.dtype == ("float64" if dtype == "float64" else "float32")
    atol = TOLERANCE[dtype] * np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def _pads(data: XlaData, state: AlsState) -> list[np.ndarray]:
    """Table rows at slots that are no row's."""
    found = []
    for table, side in ((state.users, data.users), (state.items, data.items)):
        rows = data.mesh.get(table).reshape(-1, data.params.factors)
        unused = np.ones(len(rows), bool)
        unused[side.rows.slots] = False
        found.append(rows[unused].astype(np.float32))
    return found


def test_the_mixed_matrix_has_rows_in_every_rung() -> None:
    for target in ("users", "items"):
        assert np.all(np.bincount(_rungs(MIXED, target), minlength=4) > 0)
    assert (MIXED.data < 0).any() and (MIXED.data == 0).any()


@pytest.mark.parametrize(
    ("dtype", "mesh"),
    [
        ("float32", MESHES[-1]),
        *(pytest.param("float32", m, marks=pytest.mark.slow) for m in MESHES[:-1]),
        pytest.param("float64", MESHES[1], marks=pytest.mark.slow),
        pytest.param("bfloat16", MESHES[3], marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("solver", ["cg", pytest.param("cholesky", marks=pytest.mark.slow)])
def test_half_epochs_epochs_and_losses_equal_the_oracles(
    solver: str, dtype: str, mesh: MeshArgs
) -> None:
    params = dataclasses.replace(EXACT[solver], dtype=dtype)
    data = _data(MIXED, params, _mesh(*mesh))
    tables = _tables(MIXED, params.factors, dtype_named(dtype))
    state = als.start(data, *tables)
    for given_objective in OBJECTIVES:
        objective = Objective.of(*given_objective)
        users = als.half_epoch(state.users, state.items, data, objective, target="users")
        items = als.half_epoch(state.items, state.users, data, objective, target="items")
        found = AlsState(users, items)
        wide = [table.astype(np.float64) for table in tables]
        _close(
            als.user_factors(found, data),
            oracle.half_epoch(MIXED, wide[1], given_objective),
            dtype,
        )
        _close(
            als.item_factors(found, data),
            oracle.half_epoch(MIXED.T.tocsr(), wide[0], given_objective),
            dtype,
        )
        # exactly zero, wherever an iterative solver started
        assert not als.user_factors(found, data)[_rungs(MIXED, "users") == 0].any()
        assert not als.item_factors(found, data)[_rungs(MIXED, "items") == 0].any()
        after, failed = als.epoch(state, data, objective)
        assert failed == (0, 0)
        ours = als.user_factors(after, data), als.item_factors(after, data)
        # bfloat16 rounds the users that the items are then solved against
        exact = oracle.half_epoch(MIXED.T.tocsr(), ours[0], given_objective)
        _close(ours[1], exact, dtype)
        np.testing.assert_array_equal(ours[0], als.user_factors(found, data))
        for some in (state, found, after):
            own = als.user_factors(some, data), als.item_factors(some, data)
            expected = oracle.loss(MIXED, *own, given_objective)
            rel = 1e-10 if dtype == "float64" else 1e-5
            assert als.loss(some, data, objective) == pytest.approx(expected, rel=rel)
            assert not any(pads.any() for pads in _pads(data, some))


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "mesh"), list(zip(EXACT, MESHES[1:3], strict=True)), ids=str)
@pytest.mark.parametrize(("weight", "sign"), [(1.0, 1), (0.4, -1)])
def test_rows_without_weights_are_solved_by_division(
    solver: str,
    mesh: MeshArgs,
    weight: float,
    sign: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the solver, and though a single step is asked for."""
    signs = np.where(np.arange(MIXED.nnz) % 3 == 0, sign, 1)
    matrix = sparse.csr_matrix((signs * np.float32(2), MIXED.indices, MIXED.indptr), MIXED.shape)
    params = dataclasses.replace(EXACT[solver], factors=12, cg_steps=1)
    data = _data(matrix, params, _mesh(*mesh))
    tables = _tables(matrix, 12)
    state = als.start(data, *tables)
    exact = oracle.Objective("implicit", 0.5, weight / 2, weight)
    objective = Objective.of(*exact)
    compiled_in, compiled = [], DeviceMesh.per_shard_program

    def spy(mesh: DeviceMesh, fn: object, static: object) -> object:
        compiled_in.append(static)
        return compiled(mesh, fn, static)

    monkeypatch.setattr(DeviceMesh, "per_shard_program", spy)
    for target, source, one in (
        ("users", tables[1], matrix),
        ("items", tables[0], matrix.T.tocsr()),
    ):
        pair = (state.users, state.items)[:: 1 if target == "users" else -1]
        found = als.half_epoch(*pair, data, objective, target=target)
        state_of = (
            AlsState(found, state.items) if target == "users" else AlsState(state.users, found)
        )
        table = (als.user_factors if target == "users" else als.item_factors)(state_of, data)
        _close(table, oracle.half_epoch(one, source.astype(np.float64), exact), "float32")
    assert compiled_in and all("'diagonal'" in repr(static) for static in compiled_in)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "mesh"), list(zip(EXACT, MESHES[2:4], strict=True)), ids=str)
def test_rows_longer_than_the_longest_rung(solver: str, mesh: MeshArgs) -> None:
    """Real lengths: over 4096 entries, on the plan that `place` makes itself."""
    rng = np.random.default_rng(0)
    stored = rng.random((5, 9000)) < np.array([[0.99], [0.6], [0.001], [0], [0.4]])
    matrix = sparse.csr_matrix(np.where(stored, rng.integers(1, 4, stored.shape), 0), dtype="f4")
    assert np.count_nonzero(np.diff(matrix.indptr) > layout.LONGEST) == 2
    params = EXACT[solver]
    data = backend.place(matrix, params, _mesh(*mesh))
    tables = _tables(matrix, params.factors)
    state = als.start(data, *tables)
    objective = oracle.Objective("ials", 0.01, 2.0, 0.1)
    ours = als.half_epoch(state.users, state.items, data, Objective.of(*objective), target="users")
    expected = oracle.half_epoch(matrix, tables[1], objective)
    _close(als.user_factors(AlsState(ours, state.items), data), expected, "float32")
    loss = als.loss(state, data, Objective.of(*objective))
    assert loss == pytest.approx(oracle.loss(matrix, *tables, objective), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["cg", "cholesky"])
def test_tables_do_not_depend_on_the_mesh_or_the_ladder(solver: str) -> None:
    """Neither does a solve that stops before it is exact."""
    params = AlsParams(6, linear_solver=solver, cg_steps=2)
    objective = Objective.of("implicit", 0.5, 4.0)
    # In the first all but the shortest rows are long; in the second none is.
    ladders = [((8,), 32), ((64,), 256)]
    found = []
    for mesh, (lengths, chunk) in zip((MESHES[1], MESHES[3]), ladders, strict=True):
        data = _data(MIXED, params, _mesh(*mesh), lengths, chunk)
        state = als.start(data, *_tables(MIXED, 6))
        for _ in range(2):
            state, _ = als.epoch(state, data, objective)
        found.append((als.user_factors(state, data), als.item_factors(state, data)))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-4 * np.abs(one).max())


@st.composite
def _small(draw: st.DrawFn) -> sparse.csr_matrix:
    """10 x 10, one shape for all: any values, signs, density, stored zeros."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    stored = rng.random((10, 10)) < draw(st.sampled_from([0.05, 0.3, 1.0]))
    rows, columns = np.nonzero(stored)
    least = draw(st.sampled_from([-4, 0, 1]))
    values = rng.integers(least, 5, len(rows)) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    return sparse.csr_matrix((values, (rows, columns)), (10, 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "steps", "relaxation"),
    [
        ("cg", 1, 1.0),
        ("cg", 3, 1.5),
        ("cholesky", 1, 1.0),
        ("cholesky", 1, 1.9),
    ],
)
@hypothesis.settings(max_examples=15)
@given(
    matrix=_small(),
    objective=st.builds(
        oracle.Objective,
        st.sampled_from(["implicit", "ials"]),
        st.sampled_from([0.001, 0.1, 5.0]),
        st.sampled_from([0.5, 1.0, 40.0]),
        st.sampled_from([0.1, 1.0]),
        st.sampled_from([None, 0.0, 0.4, 1.0]),
    ),
)
def test_the_loss_never_rises(
    solver: str,
    steps: int,
    relaxation: float,
    matrix: sparse.csr_matrix,
    objective: oracle.Objective,
) -> None:
    """Not from one half-epoch to the next, not where a solve stops early, nor where it goes on."""
    params = AlsParams(4, "float64", solver, steps)
    data = _data(matrix, params, _mesh(1, 2), (8,), 256)
    state = als.start(data, *_tables(matrix, 4, np.float64))
    ours = Objective.of(*objective)
    losses = [als.loss(state, data, ours)]
    for _ in range(3):
        for target in ("users", "items"):
            source = "items" if target == "users" else "users"
            table = als.half_epoch(
                getattr(state, target), getattr(state, source), data, ours, relaxation,
                target=target,
            )  # fmt: skip
            state = state._replace(**{target: table})
            losses.append(als.loss(state, data, ours))
    assert np.all(np.isfinite(losses))
    assert np.all(np.diff(losses) <= 1e-10 * np.maximum(losses[:-1], 1e-3))
    expected = oracle.loss(
        matrix, als.user_factors(state, data), als.item_factors(state, data), objective
    )
    assert losses[-1] == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "mesh"), list(zip(EXACT, MESHES[3:], strict=True)), ids=str)
def test_relaxed_rows_extend_the_step_beyond_the_solution(solver: str, mesh: MeshArgs) -> None:
    data = _data(MIXED, EXACT[solver], _mesh(*mesh))
    tables = _tables(MIXED, EXACT[solver].factors)
    objective, exact = Objective.of("implicit", 0.5, 2.0), oracle.Objective("implicit", 0.5, 2.0)
    state, failed = als.epoch(als.start(data, *tables), data, objective, 1.5)
    assert failed == (0, 0)
    users, items = als.user_factors(state, data), als.item_factors(state, data)
    for matrix, before, source, after in (
        (MIXED, tables[0], tables[1], users),
        (MIXED.T.tocsr(), tables[1], users, items),
    ):
        solved = oracle.half_epoch(matrix, source.astype(np.float64), exact)
        expected = np.where(solved.any(axis=1)[:, None], 1.5 * solved - 0.5 * before, 0)
        _close(after, expected, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MESHES[1], MESHES[-1]], ids=str)
def test_an_epoch_leaves_the_old_state_valid(mesh: MeshArgs) -> None:
    data = _data(MIXED, EXACT["cg"], _mesh(*mesh))
    tables = _tables(MIXED, 4)
    state = als.start(data, *tables)
    objective = Objective.of("implicit", 0.5, 2.0)
    first, _ = als.epoch(state, data, objective)
    users, items = als.user_factors(first, data), als.item_factors(first, data)
    again, _ = als.epoch(state, data, objective)
    als.epoch(first, data, objective)
    np.testing.assert_array_equal(als.user_factors(state, data), tables[0])
    np.testing.assert_array_equal(als.item_factors(state, data), tables[1])
    for after in (first, again):
        np.testing.assert_array_equal(als.user_factors(after, data), users)
        np.testing.assert_array_equal(als.item_factors(after, data), items)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_tables_are_fetched_as_they_were_placed(dtype: str) -> None:
    data = _data(MIXED, AlsParams(6, dtype), _mesh(1, 2))
    users, items = _tables(MIXED, 6, np.float64)
    state = als.start(data, users, items)
    for ours, theirs in (
        (als.user_factors(state, data), users),
        (als.item_factors(state, data), items),
    ):
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        np.testing.assert_array_equal(ours, theirs.astype(kind).astype(ours.dtype))
        assert ours.dtype == ("float64" if dtype == "float64" else "float32")
        ours[:] = 9  # a copy, and writeable
    assert not (als.user_factors(state, data) == 9).any()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_devices_have_equal_parts_of_tables_and_cells(devices: int) -> None:
    mesh = _mesh(devices, 0)
    data = _data(MIXED, EXACT["cg"], mesh)
    state = als.start(data, *_tables(MIXED, 4))
    after, _ = als.epoch(state, data, Objective.of("implicit", 0.5, 2.0))
    assert mesh.jax_mesh is not None
    for array in (*state, *after, *data.users.cells, *data.items.cells):
        expected = NamedSharding(mesh.jax_mesh, PartitionSpec(mesh.jax_mesh.axis_names[0]))
        assert array.sharding.is_equivalent_to(expected, array.ndim)
        assert [shard.device for shard in array.addressable_shards] == list(mesh.devices)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MESHES[1], MESHES[-1]], ids=str)
@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("row", [int(np.argmax(_rungs(MIXED, "users") == n)) for n in (1, 2, 3)])
def test_rows_that_failed_are_counted(solver: str, mesh: MeshArgs, row: int) -> None:
    """A weight that overflows spoils its own row, and the next half-epoch's gramian."""
    matrix = MIXED.copy()
    matrix.data[matrix.indptr[row]] = 3e38
    data = _data(matrix, EXACT[solver], _mesh(*mesh))
    state = als.start(data, *_tables(matrix, EXACT[solver].factors))
    objective = Objective.of("implicit", 0.5, 100.0)
    after, failed = als.epoch(state, data, objective)
    users = np.flatnonzero(~np.isfinite(als.user_factors(after, data)).all(axis=1))
    np.testing.assert_array_equal(users, [row])
    assert failed == (1, np.count_nonzero(np.bincount(matrix.indices, minlength=50)))
    assert not _pads(data, after)[0].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "mesh"), list(zip(EXACT, (MESHES[1], MESHES[-1]), strict=True)), ids=str
)
def test_other_values_compile_nothing(solver: str, mesh: MeshArgs, new_compilations) -> None:
    """Neither other data of about the same lengths, nor any number of either objective.

    The direct solver has a program for each objective: only "ials" never has a negative weight.
    """
    params = dataclasses.replace(EXACT[solver], factors=4)

    def fit(matrix: sparse.csr_matrix, objective: Objective) -> float:
        data = backend.place(matrix, params, _mesh(*mesh))
        state = als.start(data, *_tables(matrix, 4))
        for _ in range(2):
            state, _ = als.epoch(state, data, objective)
        als.user_factors(state, data), als.item_factors(state, data)
        return als.loss(state, data, objective)

    fit(MIXED, Objective.of("implicit", 0.5, 2.0))
    fit(MIXED, Objective.of("ials", 0.5, 2.0))
    other = MIXED[::-1].tocsr()
    other.data[:] = np.abs(other.data[::-1]) + 0.5
    with new_compilations() as count:
        fit(MIXED, Objective.of("ials", 0.01, 7.0, 0.3, 0.6))
        fit(other, Objective.of("implicit", 5, 1, 0.5))
    assert count.programs == 0


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "mesh"), list(zip(EXACT, MESHES[1:3], strict=True)), ids=str)
def test_a_matrix_without_entries_gives_zero_tables(solver: str, mesh: MeshArgs) -> None:
    matrix = sparse.csr_matrix((6, 5), dtype=np.float32)
    params = EXACT[solver]
    data = backend.place(matrix, params, _mesh(*mesh))
    state = als.start(data, *_tables(matrix, params.factors))
    objective = oracle.Objective("implicit", 0.5, 2.0)
    ours = Objective.of(*objective)
    expected = oracle.loss(matrix, *_tables(matrix, params.factors), objective)
    assert als.loss(state, data, ours) == pytest.approx(expected, rel=1e-5)
    after, failed = als.epoch(state, data, ours)
    assert failed == (0, 0)
    assert not als.user_factors(after, data).any() and not als.item_factors(after, data).any()
    assert als.loss(after, data, ours) == 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_matrices_of_one_row_or_column(shape: tuple[int, int]) -> None:
    matrix = sparse.csr_matrix(np.arange(1, 1 + shape[0] * shape[1], dtype="f4").reshape(shape))
    data = backend.place(matrix, EXACT["cholesky"], _mesh(4, 0))
    tables = _tables(matrix, 16)
    objective = oracle.Objective("ials", 0.1, 2.0, 0.5)
    after, failed = als.epoch(als.start(data, *tables), data, Objective.of(*objective))
    assert failed == (0, 0)
    users, items = oracle.epoch(matrix, *tables, objective)
    _close(als.user_factors(after, data), users, "float32")
    _close(als.item_factors(after, data), items, "float32")


def test_without_a_ridge_the_solutions_still_fit() -> None:
    """Fewer items than factors leave equation (1) singular: any solution predicts the same."""
    matrix = sparse.csr_matrix(np.random.default_rng(0).integers(0, 3, (8, 4)).astype(np.float64))
    params = AlsParams(6, "float64", "cholesky")
    data = backend.place(matrix, params, _mesh(1, 2))
    tables = _tables(matrix, 6, np.float64)
    objective = oracle.Objective("implicit", 0.0, 2.0)
    state = als.start(data, *tables)
    users = als.half_epoch(state.users, state.items, data, Objective.of(*objective), target="users")
    ours = als.user_factors(AlsState(users, state.items), data)
    expected = oracle.half_epoch(matrix, tables[1], objective) @ tables[1].T
    np.testing.assert_allclose(ours @ tables[1].T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("entries", [0.05, 0.9])
def test_the_cheapest_solver_is_one_of_the_solvers(entries: float) -> None:
    matrix = sparse.random(40, 30, entries, "csr", np.float32, random_state=0)
    data = backend.place(matrix, AlsParams(6, linear_solver="auto"), _mesh(1, 2))
    assert data.params.linear_solver in ("cg", "cholesky")
    _, failed = als.epoch(
        als.start(data, *_tables(matrix, 6)), data, Objective.of("ials", 0.1, 2.0)
    )
    assert failed == (0, 0)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("kind", ["cpu", "other"])
def test_auto_chooses_cg_or_cholesky(kind: str, positive: bool) -> None:
    lengths = (np.full(10_000, 150), np.full(2_000, 750))
    params = AlsParams(256, linear_solver="auto", positive=positive)
    assert reading.cheapest_solver(lengths, params, kind) in ("cg", "cholesky")


@pytest.mark.parametrize("which", [0, 1])
def test_a_table_of_another_shape_is_refused(which: int) -> None:
    data = _data(MIXED, EXACT["cg"], _mesh(1, 1))
    tables = list(_tables(MIXED, 4))
    tables[which] = tables[which][:-1]
    with pytest.raises(ValueError, match="initial table has shape .* expected"):
        als.start(data, *tables)
