"""One block of rows against dense float64 NumPy: objectives, CG and direct solves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_als.engine.objective import Objective, confidence, ridge
from tpu_als.engine.xla import cholesky, solve
from tpu_als.engine.xla.mesh import precision
from tpu_als.engine.xla.solve import Block

R, L, K = 4, 7, 5
SEEDS = st.integers(0, 1 << 32)
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
RTOL = {"float32": 2e-3, "float64": 1e-8}


def _close(ours: Any, theirs: np.ndarray, dtype: str) -> None:
    ours = np.asarray(ours)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=RTOL[dtype] * np.abs(theirs).max())


def _block(seed: int, dtype: str, length: int = L, least: float = 0.0) -> tuple[Block, np.ndarray]:
    """A block with pads in each row, weights of at least `least`, and a diagonal d (R, K)."""
    rng = np.random.default_rng(seed)
    live = np.arange(length) < rng.integers(0, length + 1, (R, 1))
    parts = (
        rng.normal(size=(R, length, K)),
        live * rng.uniform(least, 9, (R, length)),
        live * rng.uniform(0, 9, (R, length)),
    )
    d = rng.uniform(1, 4, (R, K))
    return Block(*(part.astype(dtype) for part in parts)), d.astype(dtype)


def _dense(block: Block, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equation (3) of the block: systems (R, K, K) and right sides (R, K), in float64."""
    rows, w, v = (np.asarray(part, np.float64) for part in block)
    matrix = np.einsum("rlk,rl,rlj->rkj", rows, w, rows) + d[:, :, None] * np.eye(d.shape[1])
    return matrix, np.einsum("rlk,rl->rk", rows, v)


def _exact(block: Block, d: np.ndarray) -> np.ndarray:
    matrix, rhs = _dense(block, d)
    return np.linalg.solve(matrix, rhs[..., None])[..., 0]


def _improve(block: Block, d: Any, z: Any, steps: int) -> Any:
    operator = solve.Operator(lambda p: solve.normal(block, p), lambda p: solve.curvature(block, p))
    return solve.rows_cg(operator, solve.residual(block, z), z, d, steps)


@jax.jit
def _cg(block: Block, d: Any, z: Any) -> Any:
    return _improve(block, d, z, 2 * K)


@jax.jit
def _direct(block: Block, d: Any, _: Any) -> Any:
    return solve.rows_direct(solve.accumulate(block), d)


@jax.jit
def _dual(block: Block, d: Any, _: Any) -> Any:
    return solve.rows_dual(block, d)


@DTYPES
@pytest.mark.parametrize("solver", [_cg, _direct, _dual])
@given(seed=SEEDS)
def test_exact_solvers_equal_dense_numpy(solver: Callable[..., Any], dtype: str, seed: int) -> None:
    block, d = _block(seed, dtype)
    z = np.random.default_rng(seed).normal(size=(R, K)).astype(dtype)
    with precision(dtype):
        _close(solver(block, d, z), _exact(block, d), dtype)


@functools.partial(jax.jit, static_argnums=2)
def _smaller(block: Block, d: Any, positive: bool) -> Any:
    return solve.rows_exact(block, d, positive)


@pytest.mark.parametrize("length", [2, L])
@given(seed=SEEDS, least=st.sampled_from([0.0, -0.2]))
def test_the_smaller_system_serves_weights_of_any_sign(
    length: int, seed: int, least: float
) -> None:
    """A weight below 0 (a cell lighter than an unobserved one) has no dual of real numbers."""
    block, d = _block(seed, "float64", length, least)
    block = block._replace(rows=np.clip(block.rows, -1, 1))  # keeps the systems definite
    with precision("float64"):
        _close(_smaller(block, d + 3, least == 0), _exact(block, d + 3), "float64")


def test_one_step_is_exact_where_cells_add_no_weight() -> None:
    block, d = _block(0, "float32")
    block = block._replace(w=np.zeros_like(block.w))
    z = np.ones((R, K), np.float32)
    ours = _improve(block, d, z, 1)
    _close(ours, _exact(block, d), "float32")


@jax.jit
def _steps(block: Block, d: Any, z: Any) -> tuple[Any, ...]:
    return (z, *(_improve(block, d, z, steps) for steps in range(1, 4)))


def _value(block: Block, d: np.ndarray, z: np.ndarray) -> np.ndarray:
    """What a solve of equation (3) minimises, of each row."""
    matrix, rhs = _dense(block, d)
    return np.einsum("rk,rkj,rj->r", z, matrix, z) - 2 * (rhs * z).sum(axis=1)


@given(seed=SEEDS)
def test_no_step_of_cg_makes_a_row_worse(seed: int) -> None:
    block, d = _block(seed, "float64")
    z = np.random.default_rng(seed).normal(size=(R, K))
    with precision("float64"):
        steps = [np.asarray(step) for step in _steps(block, d, z)]
    np.testing.assert_array_equal(steps[0], z)
    values = [_value(block, d, step) for step in steps]
    for before, after in itertools.pairwise(values):
        assert np.all(after <= before + 1e-9 * np.abs(before))


def test_cg_stays_where_it_starts_exact() -> None:
    block, d = _block(1, "float64")
    z = _exact(block, d)
    with precision("float64"):
        _close(_cg(block, d, z), z, "float64")


@DTYPES
@given(seed=SEEDS)
def test_factors_and_substitution_equal_numpys(dtype: str, seed: int) -> None:
    """The plain loops that stand in for XLA's on CPU."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(R, K, 2 * K))
    matrix = (root @ root.transpose(0, 2, 1) + np.eye(K)).astype(dtype)
    rhs = rng.normal(size=(R, K)).astype(dtype)
    with precision(dtype):
        upper = _factorise(matrix)
        _close(upper, np.linalg.cholesky(matrix.astype(np.float64)).transpose(0, 2, 1), dtype)
        exact = np.linalg.solve(matrix.astype(np.float64), rhs[..., None])[..., 0]
        _close(_substitute(upper, rhs), exact, dtype)


_factorise = jax.jit(cholesky._factorise_rows)
_substitute = jax.jit(cholesky._substitute)
_solve_direct = jax.jit(cholesky.direct)


def test_a_matrix_that_is_not_definite_has_no_factor() -> None:
    matrix = np.stack([np.eye(K), np.diag([1.0, 1, -1, 1, 1])]).astype(np.float32)
    upper = np.asarray(_factorise(matrix))
    np.testing.assert_array_equal(upper[0], np.eye(K))
    assert not np.isfinite(upper[1]).all()


@DTYPES
@given(seed=SEEDS, rank=st.integers(0, K - 1))
def test_singular_systems_are_solved_and_others_untouched(dtype: str, seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    # the rank-deficient matrix is exact in floating point, so its last pivots are zero
    root = rng.integers(-3, 4, (K, max(rank, 1))) * (rank > 0)
    good = rng.normal(size=(K, K))
    matrices = [root @ root.T, good @ good.T + np.eye(K), 1e6 * root @ root.T, np.zeros((K, K))]
    matrix = np.stack(matrices).astype(dtype)
    z = rng.normal(size=(R, K))
    rhs = np.einsum("rkj,rj->rk", matrix.astype(np.float64), z)
    rhs = rhs.astype(dtype)
    with precision(dtype):
        ours = np.asarray(_solve_direct(matrix, rhs))
        alone = np.asarray(_solve_direct(np.stack([matrix[1]] * R), np.stack([rhs[1]] * R)))
    assert np.all(np.isfinite(ours))
    np.testing.assert_array_equal(ours[1], alone[0])
    again = np.einsum("rkj,rj->rk", matrix.astype(np.float64), ours)
    for row in range(R):
        scale = np.linalg.norm(matrix[row].astype(np.float64), 2) * np.linalg.norm(z[row])
        tolerance = 0.02 if dtype == "float32" else 1e-7
        assert np.linalg.norm(again[row] - rhs[row]) <= tolerance * scale
    assert not ours[3].any()


@DTYPES
@given(seed=SEEDS, scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_a_rotated_table_keeps_its_products(dtype: str, seed: int, scale: float) -> None:
    table = (scale * np.random.default_rng(seed).normal(size=(9, K))).astype(dtype)
    with precision(dtype):
        basis, rotated = _rotated(table, np.dtype(dtype).type(9))
    rotation = np.asarray(basis.rotation, np.float64)
    _close(basis.rotation, rotation, dtype)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(K), atol=1e-5)
    _close(rotated, table.astype(np.float64) @ rotation, dtype)
    gram = rotation * np.asarray(basis.spectrum, np.float64) @ rotation.T
    wide = table.astype(np.float64)
    _close(gram.astype(dtype), wide.T @ wide, dtype)


@jax.jit
def _rotated(table: Any, count: Any) -> tuple[solve.Basis, jax.Array]:
    basis = solve.basis(solve.gramian(table, table.dtype), count)
    return basis, solve.rotate(table, basis.rotation)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_spectrum_of_a_deficient_table_is_positive(rank: int) -> None:
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(9, rank)) @ rng.normal(size=(rank, K))).astype(np.float32)
    basis, rotated = _rotated(table, np.float32(9))
    assert np.all(np.asarray(basis.spectrum) > 0)
    assert np.all(np.isfinite(np.asarray(rotated)))


def test_pad_cells_have_zero_weights() -> None:
    objective = Objective(*(np.float32(n) for n in Objective.of("implicit", 0.1, 2.0, 3)))
    table = jnp.ones((6, K))
    ids, values = np.zeros((2, 3), np.int32), np.full((2, 3), 5, np.float32)
    cells = solve.Cells(ids, values, np.array([0, 2], np.int32))
    block = solve.gather(table, objective, cells, "float32")
    np.testing.assert_array_equal(block.w, [[0, 0, 0], [7, 7, 0]])
    np.testing.assert_array_equal(block.v, [[0, 0, 0], [10, 10, 0]])


@given(seed=SEEDS, offset=st.sampled_from([0.0, 0.7]))
def test_cells_loss_is_the_square_error(seed: int, offset: float) -> None:
    """Of an entry with c > 0 that is c (1 - t)^2, else |c| (1 + t^2); less what all cells have."""
    rng = np.random.default_rng(seed)
    n_entries = rng.integers(0, L + 1, R).astype(np.int32)
    is_entry = np.arange(L) < n_entries[:, None]
    c = is_entry * rng.integers(-3, 9, (R, L)).astype(np.float64)
    block = Block(rng.normal(size=(R, L, K)), np.abs(c), np.maximum(c, 0))
    z = rng.normal(size=(R, K))
    t = np.einsum("rlk,rk->rl", block.rows, z)
    losses = np.where(c > 0, c * (1 - t) ** 2, np.abs(c) * (1 + t**2)) - offset * t**2
    with precision("float64"):
        ours = np.asarray(_cells_loss(block, z, solve.entry_mask((R, L), n_entries), offset))
    np.testing.assert_allclose(ours, (is_entry * losses).sum(axis=1), rtol=1e-9, atol=1e-9)


@jax.jit
def _cells_loss(block: Block, z: np.ndarray, is_entry: jax.Array, offset: float) -> jax.Array:
    return solve.cells_loss(block, solve.predict(block, z), is_entry, offset)


@pytest.mark.parametrize("rows", [1, 3])
def test_predictions_of_one_row_equal_those_of_many(rows: int) -> None:
    block, _ = _block(2, "float32")
    block = Block(*(np.asarray(part)[:rows] for part in block))
    z = np.random.default_rng(0).normal(size=(rows, K)).astype(np.float32)
    expected = np.einsum("rlk,rk->rl", block.rows, z)
    np.testing.assert_allclose(solve.predict(block, z), expected, rtol=1e-5, atol=1e-5)


@given(
    seed=SEEDS,
    name=st.sampled_from(["implicit", "ials"]),
    alpha=st.sampled_from([0.0, 0.5, 40.0]),
    weight=st.sampled_from([0.1, 1.0]),
    exponent=st.sampled_from([None, 0.0, 0.3, 1.0]),
)
def test_weights_and_ridges_equal_the_oracles(
    seed: int, name: str, alpha: float, weight: float, exponent: float | None
) -> None:
    theirs = oracle.Objective(name, 0.7, alpha, weight, exponent)
    ours = Objective.of(*theirs)
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, 12).astype(np.float64)
    w, v = confidence(ours, x)
    c = alpha * x
    # w comes on top of the unobserved weight: all of |c|, or in its place
    np.testing.assert_allclose(w + (weight if name == "implicit" else 0), np.abs(c), atol=1e-12)
    np.testing.assert_allclose(v, np.where(c > 0, c, 0))
    n_entries = rng.integers(0, 99, 12)
    expected = oracle.ridge(n_entries, 50, theirs)
    np.testing.assert_allclose(ridge(ours, n_entries, 50), expected)
    single = Objective(*(np.float32(number) for number in ours))
    traced = jax.jit(ridge)(single, n_entries.astype(np.float32), np.float32(50))
    np.testing.assert_allclose(traced, expected, rtol=1e-5)
    numbers = jax.jit(confidence)(single, x.astype(np.float32))
    np.testing.assert_allclose(numbers, (w, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "exponent", "offset"), [("implicit", 0, 0.4), ("ials", 1, 0)])
def test_each_objective_has_its_own_exponent(name: str, exponent: float, offset: float) -> None:
    assert Objective.of(name, 0.1, 2.0, 0.4) == (0.1, 2.0, 0.4, exponent, offset)
    assert Objective.of(name, 0.1, 2.0, 0.4, 0.25).exponent == 0.25
    assert Objective.of(name, 0.1, 2.0).unobserved_weight == 1.0


@pytest.mark.parametrize("name", ["als", "", "IALS", None])
def test_an_unknown_objective_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="objective must be one of .*implicit.*ials"):
        Objective.of(name, 0.1, 1.0)


def test_rows_with_a_value_that_is_not_finite_are_found() -> None:
    table = np.zeros((4, K), np.float32)
    table[1, 2], table[3, 0] = np.nan, -np.inf
    np.testing.assert_array_equal(solve.finite_rows(table), [True, False, True, False])


def test_rows_without_entries_become_zero_even_from_nan() -> None:
    table = np.full((3, K), np.nan, np.float32)
    ours = np.asarray(solve.zero_empty(jnp.asarray(table), np.array([0, 2, 0])))
    assert not ours[[0, 2]].any() and np.all(np.isnan(ours[1]))
