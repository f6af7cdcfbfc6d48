"""The k largest of each row, by blocks and without, against a full sort."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from scipy import sparse

from tpu_als.engine.cpu import compiled, ranking
from tpu_als.engine.xla import selection as on_devices

# Few and many columns for the k, also none that a block divides; whole numbers tie.
SIZES = [(1, 1), (40, 3), (40, 40), (1000, 5), (1024, 5), (4096, 20), (4096, 300)]


def _scores(n_columns: int, whole: bool) -> np.ndarray:
    """Scores (5, n), a third of them hidden in one row and nearly all in another."""
    rng = np.random.default_rng(n_columns)
    scores = rng.normal(size=(5, n_columns)).astype(np.float32)
    scores[0, rng.random(n_columns) < 0.3] = -np.inf
    scores[1, 2:] = -np.inf
    return np.rint(scores) if whole else scores


def _check(best: np.ndarray, columns: np.ndarray, scores: np.ndarray) -> None:
    k = best.shape[-1]
    np.testing.assert_array_equal(best, -np.sort(-scores, axis=-1)[..., :k])
    np.testing.assert_array_equal(np.take_along_axis(scores, columns, -1), best)
    for row, values in zip(np.atleast_2d(columns), np.atleast_2d(best), strict=True):
        kept = row[np.isfinite(values)]
        assert len(set(kept)) == len(kept)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n_columns", "k"), SIZES)
def test_on_a_device(n_columns: int, k: int, whole: bool) -> None:
    scores = _scores(n_columns, whole)
    for recall in (None, 0.9):  # XLA has an approximate search for TPUs only
        best, columns = jax.jit(on_devices.largest, static_argnums=(1, 2))(scores, k, recall)
        _check(np.asarray(best), np.asarray(columns), scores)


def _first_of_equals(scores: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n_columns", "k"), [*SIZES, (1009, 5), (4111, 20)])
def test_in_numpy(n_columns: int, k: int, whole: bool) -> None:
    for scores in _scores(n_columns, whole):
        best, columns = ranking.largest(scores, k)
        assert len(best) == k
        _check(best, columns, scores)
        np.testing.assert_array_equal(columns, _first_of_equals(scores, k))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n_columns", "k"), [*SIZES, (1009, 5), (4111, 20)])
def test_compiled(
    n_columns: int, k: int, whole: bool, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block of columns and in several, of scores that are the table's rows."""
    scores = _scores(n_columns, whole).astype(dtype)
    finite = np.where(np.isfinite(scores), scores, 0)
    hidden = sparse.csr_matrix(np.isinf(scores).astype(np.float32))
    table = np.ascontiguousarray(finite.T)
    for most in (1 << 13, 100):
        monkeypatch.setattr(ranking, "_MOST_COLUMNS", most)
        catalog = ranking.Catalog(table, None, 2)
        columns, best = catalog.top_k(np.eye(5, dtype=dtype), k, seen=hidden)
        expected = _first_of_equals(scores, k)
        values = np.take_along_axis(scores, expected, 1)
        is_there = np.isfinite(values)
        np.testing.assert_array_equal(best, np.where(is_there, values, ranking.NO_SCORE))
        np.testing.assert_array_equal(columns, np.where(is_there, expected, -1))


def test_compiled_on_lengths_and_without_some_columns() -> None:
    rng = np.random.default_rng(0)
    table, queries = (rng.normal(size=(n, 8)).astype(np.float32) for n in (20_000, 30))
    lengths, excluded = rng.uniform(1, 2, 20_000).astype(np.float32), np.arange(0, 20_000, 3)
    catalog = ranking.Catalog(table, lengths, 2)
    columns, best = catalog.top_k(queries, 50, excluded=excluded)
    scores = queries @ table.T / lengths
    scores[:, excluded] = -np.inf
    np.testing.assert_allclose(best, -np.sort(-scores)[:, :50], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, columns, 1), best, rtol=1e-5)


@pytest.mark.parametrize("n_queries", [1, 10])
def test_a_score_that_is_not_a_number_comes_first(n_queries: int) -> None:
    table = np.zeros((4000, 2), np.float32)
    table[3000], table[70] = np.nan, np.inf
    table[100] = 5
    found = ranking.Catalog(table, None, 1).top_k(np.ones((n_queries, 2), np.float32), 3)
    for ids, scores in zip(*found, strict=True):
        np.testing.assert_array_equal(ids, [-1, -1, 100])
        np.testing.assert_array_equal(scores, np.float32([np.nan, np.nan, 10]))


def test_numpy_selects_where_numba_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    table, queries = (rng.normal(size=(n, 8)).astype(np.float32) for n in (900, 30))
    expected = ranking.Catalog(table, None, 1).top_k(queries, 7)
    monkeypatch.setattr(compiled, "is_available", lambda: False)
    found = ranking.Catalog(table, None, 1).top_k(queries, 7)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
