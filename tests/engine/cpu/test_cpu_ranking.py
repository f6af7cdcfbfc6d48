"""A single query is ranked alike by the compiled loop and by NumPy, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from tpu_als.engine.cpu import compiled, ranking
from tpu_als.engine.cpu.ranking import Catalog

SIZES = [(1, 1), (2, 5), (15, 3), (16, 16), (17, 2), (170, 10), (900, 64), (900, 65)]


def _by_both(
    catalog: Catalog, queries: np.ndarray, k: int, monkeypatch: pytest.MonkeyPatch, **limits: object
) -> tuple[np.ndarray, np.ndarray]:
    """What the compiled loop finds, and NumPy finds too."""
    found = catalog.top_k(queries, k, **limits)
    with monkeypatch.context() as patch:
        patch.setattr(ranking, "_loaded_selection", lambda *_: None)
        for mine, other in zip(found, catalog.top_k(queries, k, **limits), strict=True):
            assert mine.dtype == other.dtype
            # The loops sum products in another order than BLAS.
            rtol = 0 if mine.dtype == np.int32 else 8 * np.finfo(mine.dtype).eps
            np.testing.assert_allclose(mine, other, rtol, rtol)
    return found


@pytest.fixture(autouse=True)
def _loops() -> None:
    compiled.selection()
    assert ranking._loaded_selection(Catalog(np.ones((4, 4)), None, 1), 1) is not None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n_items", "k"), SIZES)
@pytest.mark.parametrize("has_ties", [False, True])
def test_both_find_the_same(
    n_items: int, k: int, has_ties: bool, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(n_items + k)
    table = rng.standard_normal((n_items, 4)).astype(dtype)
    if has_ties:
        table = rng.integers(-1, 2, (n_items, 4)).astype(dtype)
    queries = rng.integers(-2, 3, (3, 4)).astype(dtype)
    lengths = 1 + rng.random(n_items).astype(dtype)
    seen = sparse.random(3, n_items, 0.3, "csr", rng=rng)
    excluded = np.flatnonzero(rng.random(n_items) < 0.2)
    for divisors in (None, lengths, lengths.astype(np.float64)):
        catalog = Catalog(table, divisors, 1)
        _by_both(catalog, queries, k, monkeypatch)
        ids, scores = _by_both(catalog, queries, k, monkeypatch, seen=seen, excluded=excluded)
        expected = queries @ table.T / (1 if divisors is None else divisors)
        expected[seen.toarray() != 0], expected[:, excluded] = -np.inf, -np.inf
        for row in range(3):
            order = np.argsort(-expected[row], kind="stable")[:k]
            order = order[expected[row][order] > -np.inf]
            np.testing.assert_array_equal(ids[row, len(order) :], -1)
            assert (scores[row, len(order) :] == ranking.NO_SCORE).all()
            np.testing.assert_allclose(scores[row, : len(order)], expected[row][order], 1e-5)
            if has_ties and divisors is None:  # of equal scores, lower ids come first
                np.testing.assert_array_equal(ids[row, : len(order)], order)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_nan(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.arange(1, 41, dtype=np.float32)[:, None]
    table[7] = bad
    ids, scores = _by_both(Catalog(table, None, 1), np.ones((1, 1), np.float32), 3, monkeypatch)
    if bad == -np.inf:  # as if it were hidden
        assert ids.tolist() == [[39, 38, 37]]
    else:
        assert ids.tolist() == [[-1, 39, 38]] and np.isnan(scores[0, 0])
    hidden = np.array([7])
    ids, scores = _by_both(
        Catalog(table, None, 1), np.ones((1, 1), np.float32), 3, monkeypatch, excluded=hidden
    )
    assert ids.tolist() == [[39, 38, 37]] and np.isfinite(scores).all()


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_indices_of_any_dtype_hide_items(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    table, query = np.arange(1, 41, dtype=np.float32)[:, None], np.ones((1, 1), np.float32)
    indices = np.array([39, 37], kind)
    indices.flags.writeable = False
    seen = ranking.Seen(np.array([0, 2]), indices)
    ids, _ = _by_both(Catalog(table, None, 1), query, 3, monkeypatch, seen=seen)
    assert ids.tolist() == [[38, 36, 35]]


def test_the_usual_query_has_the_result_of_others() -> None:
    rng = np.random.default_rng(3)
    table, query = rng.standard_normal((50, 4)), rng.standard_normal((1, 4))
    seen = sparse.random(1, 50, 0.3, "csr", rng=rng)
    for lengths in (None, 1 + rng.random(50)):
        catalog = Catalog(table, lengths, 1)
        for k in (1, 7, 35):
            found = catalog.best_of_one(query[0], k, seen)
            assert found is not None
            for mine, other in zip(found, catalog.top_k(query, k, seen=seen), strict=True):
                np.testing.assert_array_equal(mine, other[0])
    few = Catalog(table, (1 + rng.random(50)).astype(np.float32), 1)
    assert few.best_of_one(query[0], 5) is None  # divided in float64 by NumPy
    catalog = Catalog(table, None, 1)
    assert catalog.best_of_one(query[0], 40, seen) is None  # some places stay empty
    assert catalog.best_of_one(query[0], 65) is None
    assert catalog.best_of_one(query[0], 0) is None
    assert catalog.best_of_one(query[0, :3], 5) is None
    assert catalog.best_of_one(query[0].astype(np.float32), 5) is None
    table[9] = np.nan
    assert catalog.best_of_one(query[0], 5) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_items", [5, 8, 9, 300])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 15, 16, 17, 31, 50, 64, 100])
def test_rows_of_any_width_are_scored(width: int, n_items: int, dtype: type) -> None:
    rng = np.random.default_rng(width)
    table, query = (rng.standard_normal(shape).astype(dtype) for shape in ((n_items, width), width))
    k = min(n_items, ranking._MOST_INSERTED)
    found = Catalog(table, None, 1).best_of_one(query, k)
    assert found is not None
    expected = table.astype(np.float64) @ query.astype(np.float64)
    rounding = 64 * np.finfo(dtype).eps
    np.testing.assert_allclose(found[1], expected[found[0]], rounding, rounding * width)
    assert set(found[0]) == set(np.argsort(-expected)[:k]) and (np.diff(found[1]) <= 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_quotients_that_are_equal_are_ordered_by_id(k: int, dtype: type) -> None:
    """Products with the inverses of lengths differ where the quotients are equal."""
    rng = np.random.default_rng(k)
    numerators = rng.integers(1, 1000, 700).astype(dtype)
    quotients = rng.integers(3, 9, 700).astype(dtype)  # 1 / 3 to 1 / 8
    catalog = Catalog(numerators[:, None], numerators * quotients, 2)
    expected = np.lexsort((np.arange(700), quotients))[:k]
    for n_queries in (1, 30):
        ids, scores = catalog.top_k(np.ones((n_queries, 1), dtype), k)
        np.testing.assert_array_equal(ids, np.tile(expected, (n_queries, 1)))
        np.testing.assert_array_equal(scores[0], 1 / quotients[expected])


@pytest.mark.parametrize("n_queries", [1, 30])
def test_lengths_whose_inverses_overflow(n_queries: int) -> None:
    table, lengths = np.full((300, 1), -0.5, np.float32), np.ones(300, np.float32)
    table[0], table[9], lengths[9] = 1, -1e-41, 1e-40
    ids, scores = Catalog(table, lengths, 2).top_k(np.ones((n_queries, 1), np.float32), 3)
    assert (ids == [0, 9, 1]).all()
    np.testing.assert_allclose(scores, np.tile([1, -0.1, -0.5], (n_queries, 1)), 1e-3)


@given(st.integers(0, 10**6))
def test_random_catalogues_are_ranked_as_by_sorting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_items, n_queries = int(rng.integers(1, 300)), int(rng.integers(1, 40))
    k, width = int(rng.integers(1, n_items + 1)), int(rng.integers(1, 4))
    # Sums of few small numbers are exact, and many of them are equal.
    table = rng.integers(-3, 4, (n_items, width)).astype(np.float32)
    queries = rng.integers(-3, 4, (n_queries, width)).astype(np.float32)
    lengths = None if rng.random() < 0.5 else 2.0 ** rng.integers(-99, 99, n_items)
    seen = sparse.random(n_queries, n_items, rng.random(), "csr", np.float32, rng=rng)
    lengths = None if lengths is None else lengths.astype(np.float32)
    ids, scores = Catalog(table, lengths, 2).top_k(queries, k, seen=seen)
    expected = queries @ table.T / (1 if lengths is None else lengths)
    for row in range(n_queries):
        visible = np.setdiff1d(np.arange(n_items), seen[row].indices)
        order = visible[np.argsort(-expected[row, visible], kind="stable")][:k]
        assert ids[row].tolist() == order.tolist() + [-1] * (k - len(order))
        np.testing.assert_array_equal(scores[row, : len(order)], expected[row, order])


@pytest.mark.parametrize("k", [1, 7, 64, 65, 300])
@pytest.mark.parametrize("has_ties", [False, True])
def test_many_queries_are_ranked_like_few(k: int, has_ties: bool) -> None:
    rng = np.random.default_rng(k)
    table = rng.integers(-2, 3, (300, 3 if has_ties else 8)).astype(np.float64)
    queries = rng.integers(-2, 3, (40, table.shape[1])).astype(np.float64)
    if not has_ties:
        queries += rng.random(queries.shape)
    table[11] = np.nan
    if not has_ties:  # of a narrow table, the product with minus infinity may be NaN
        table[12] = -np.inf
    seen, excluded = sparse.random(40, 300, 0.3, "csr", rng=rng), np.array([3, 4, 299])
    catalog = Catalog(table, None if has_ties else 1 + rng.random(300), 2)
    limits = {"seen": seen, "excluded": excluded}
    ids, scores = catalog.top_k(queries, k, **limits)
    for row in range(40):
        limits["seen"] = seen[row]
        few = catalog.top_k(queries[row : row + 1], k, **limits)
        np.testing.assert_array_equal(ids[row], few[0][0])
        np.testing.assert_allclose(scores[row], few[1][0], 1e-12)


@pytest.mark.parametrize("k", [1, 7, 150, 180])
@pytest.mark.parametrize("n_queries", [5, 16, 40])
def test_parts_of_a_table_are_ranked_like_the_whole(
    n_queries: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also equal scores, scores that are not finite, and places without a result."""
    monkeypatch.setattr(ranking, "_FEW_SCORES", 0)
    monkeypatch.setattr(ranking, "_LEAST_WORK", 1)
    monkeypatch.setattr(ranking, "_LEAST_CHOICE", 1)
    used = []
    merge = ranking._best_of_parts
    monkeypatch.setattr(
        ranking, "_best_of_parts", lambda parts, k: used.append(len(parts)) or merge(parts, k)
    )
    rng = np.random.default_rng(n_queries + k)
    n_items = 5 * 181 + 3
    table = rng.integers(-2, 3, (n_items, 3)).astype(np.float32)
    table[700], table[20], table[300] = np.nan, np.inf, -np.inf
    queries = rng.integers(1, 4, (n_queries, 3)).astype(np.float32)
    is_seen = rng.random((n_queries, n_items)) < 0.3
    is_seen[1, 100:] = True  # fewer than 150 items are left
    seen, excluded = sparse.csr_matrix(is_seen), np.array([3, 181, 182, 907])
    for lengths in (None, 1 + rng.integers(0, 2, n_items).astype(np.float32)):
        found, whole = (
            Catalog(table, lengths, n).top_k(queries, k, seen=seen, excluded=excluded)
            for n in (5, 1)
        )
        for mine, other in zip(found, whole, strict=True):
            assert mine.shape == (n_queries, k) and mine.dtype == other.dtype
            np.testing.assert_array_equal(mine, other)
    assert used == [5, 5]
