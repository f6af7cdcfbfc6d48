"""Tables with a few changed rows, which are not copied until the whole table is read."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.serving import changed
from tpu_als.serving.carried import Carried, after_change
from tpu_als.serving.changed import ChangedTable
from tpu_als.serving.factor_table import FactorTable

COUNTS = random_counts(60, 40, seed=1)


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables count as large, and 20 changed rows as many."""
    monkeypatch.setattr(changed, "_LARGE", 1)
    monkeypatch.setattr(changed, "_MOST", 20)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("seed", range(5))
def test_reads_are_those_of_an_array(seed: int, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    expected = rng.normal(size=(30, 4)).astype(dtype)
    table, n_unread = FactorTable(expected.copy()), 0
    for _ in range(60):
        n_rows = len(expected)
        ids = rng.integers(0, n_rows + rng.integers(1, 5), rng.integers(0, 4))
        rows = rng.normal(size=(len(ids), 4))
        grown = np.zeros((max(n_rows, ids.max(initial=-1) + 1), 4), dtype)
        grown[:n_rows] = expected
        grown[ids] = rows
        before, (table, expected) = (table, expected), (table.changed(ids, rows), grown)
        assert table.shape == expected.shape and table.dtype == dtype
        some = rng.integers(0, len(expected), rng.integers(1, 90))
        n_unread += table._unread is not None
        np.testing.assert_array_equal(table.rows(some), expected[some])
        if rng.random() < 0.1:
            np.testing.assert_array_equal(table.read(), expected)
            lengths = np.linalg.norm(expected, axis=1)
            np.testing.assert_allclose(table.norms(), lengths, rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(copy.deepcopy(before[0]).read(), before[1])
    assert n_unread > 20
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(table)).read(), expected)


def test_the_share_of_changed_rows_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changed, "_SHARE", 0.5)
    table, rows = np.zeros((200, 3), np.float32), np.ones((100, 3))
    half = changed.with_rows(table, np.arange(100), rows)
    assert isinstance(half, ChangedTable)
    whole = changed.with_rows(half, np.array([150]), rows[:1])
    assert isinstance(whole, np.ndarray)
    assert np.flatnonzero(whole[:, 0]).tolist() == [*range(100), 150]
    assert not table.any()


def test_partial_fits_do_not_copy_the_table() -> None:
    plain, model = (
        TPUAlternatingLeastSquares(6, alpha=5.0, iterations=2, random_state=0).fit(
            COUNTS, show_progress=False
        )
        for _ in range(2)
    )
    base, served = model.user_factors, []
    for user in (3, 7, 61, 3):
        model.partial_fit_users([user], COUNTS[(user + 5) % 60])
        served.append(model.recommend(user, None, filter_already_liked_items=False))
        unread = model._fitted.user._unread
        assert isinstance(unread, ChangedTable) and unread.base is base
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changed, "_LARGE", 1 << 30)
        for user, found in zip((3, 7, 61, 3), served, strict=True):
            plain.partial_fit_users([user], COUNTS[(user + 5) % 60])
            assert plain._fitted.user._unread is None
            expected = plain.recommend(user, None, filter_already_liked_items=False)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)
    for one, other in zip(model.similar_users(61), plain.similar_users(61), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(model.user_factors, plain.user_factors)
    assert model.user_factors.flags.writeable and model._fitted.user._unread is None


def test_many_changed_rows_are_written_into_a_new_table() -> None:
    table = FactorTable(np.zeros((100, 2), np.float32))
    for number in range(50):
        table = table.changed(np.array([number]), np.full((1, 2), 1 + number))
        unread = table._unread
        assert unread is None or len(unread.rows) <= 20
    np.testing.assert_array_equal(table.read()[:, 0], np.r_[1:51, np.zeros(50)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scales", [1.0, np.array([1e3, 1.0, 1.0, 1e-3])])
def test_the_gramian_is_carried_over_changes(dtype: Any, scales: Any) -> None:
    """Over 200 changes of a frozen table the systems stay those of the table."""
    rng = np.random.default_rng(0)
    model = TPUAlternatingLeastSquares(4, alpha=5.0, dtype=dtype, random_state=0)
    model.item_factors = np.ones((40, 4), dtype)
    model.user_factors = (rng.normal(size=(400, 4)) * scales).astype(dtype)
    model._fitted = model._fitted.frozen()
    some = random_counts(5, 400, seed=2)
    n_carried = 0
    for step in range(200):
        ids = rng.integers(0, 410, 3) if step != 101 else np.arange(3)
        rows = rng.normal(size=(3, 4)) * scales
        if step == 100:  # huge rows come, and go in the next step
            ids, rows = np.arange(3), rows * 1e5
        model._fitted = model._fitted.with_rows("user", ids, rows)
        n_carried += model._fitted.user._carried is not None
        width = model.user_factors.shape[0]
        some = sparse.csr_matrix((some.data, some.indices, some.indptr), shape=(5, width))
        got = model.recalculate_item(np.arange(5), some)
        fresh = copy.deepcopy(model).recalculate_item(np.arange(5), some)
        error = np.abs((got - fresh) * scales).max() / np.abs(fresh * scales).max()
        # The systems with huge rows are badly conditioned.
        assert error < (1e-5 if dtype == np.float32 else 1e-10) * (1e3 if step == 100 else 1)
    assert n_carried > 150


def test_a_table_that_may_be_written_to_carries_nothing() -> None:
    """As in implicit, a partial fit computes the gramian of what has been written."""
    rng = np.random.default_rng(0)
    model = TPUAlternatingLeastSquares(16, regularization=0.5, alpha=3.0)
    model.item_factors = rng.normal(size=(400, 16), scale=0.3).astype(np.float32)
    model.user_factors = rng.normal(size=(300, 16), scale=0.3).astype(np.float32)
    rows = random_counts(300, 400, seed=3)
    model.recalculate_user(0, rows[0])
    model.item_factors[5] = 3
    model.partial_fit_items([5], rows.T.tocsr()[[5]])
    expected = copy.deepcopy(model).recalculate_user(0, rows[0])
    np.testing.assert_array_equal(model.recalculate_user(0, rows[0]), expected)
    table = model._fitted.frozen().item
    for one in (
        table,
        pickle.loads(pickle.dumps(table)),
        table.changed(np.array([1]), rows[:1, :16].toarray()),
    ):
        with pytest.raises(ValueError, match="read-only"):
            one.read()[0] = 1


@pytest.mark.parametrize("objective", ["implicit", "ials"])
def test_rows_are_solved_against_the_rows_they_need(objective: str) -> None:
    """As against the whole table, whose number of rows is in the ridge of "ials"."""
    rng = np.random.default_rng(0)
    model = TPUAlternatingLeastSquares(4, regularization=1e-3, objective=objective, random_state=0)
    model.item_factors = np.ones((40, 4), np.float32)
    model.user_factors = rng.normal(size=(400, 4)).astype(np.float32)
    model._fitted = model._fitted.frozen()
    model.recalculate_item(0, random_counts(1, 400, seed=2))
    model._fitted = model._fitted.with_rows("user", np.array([3, 405]), rng.normal(size=(2, 4)))
    columns = np.array([3, 7, 405, 3, 12, 90])
    entries = np.ones(6, np.float32), (np.array([0, 0, 0, 1, 1, 1]), columns)
    few = sparse.csr_matrix(entries, shape=(2, 406))
    got = model.recalculate_item(np.arange(2), few)
    assert model._fitted.user._unread is not None  # not copied
    np.testing.assert_allclose(
        got, copy.deepcopy(model).recalculate_item(np.arange(2), few), rtol=1e-5, atol=1e-6
    )
    unknown = sparse.csr_matrix((np.ones(1, np.float32), ([0], [500])), shape=(1, 501))
    model.partial_fit_items([0], unknown + sparse.csr_matrix(few[0], shape=(1, 501)))
    assert np.isfinite(model.item_factors).all()


def frozen(n_rows: int) -> np.ndarray:
    """A read-only table of zeros."""
    table = np.zeros((n_rows, 2), np.float32)
    table.flags.writeable = False
    return table


def test_read_only_tables_are_copied_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No change copies much of the table, and no old state sees a newer one."""
    monkeypatch.setattr(changed, "_SHARE", 0.25)
    rng = np.random.default_rng(0)
    table: Any = frozen(400)
    expected, states, parts = np.zeros((400, 2), np.float32), [], []
    n_base, copied, n_copies = 400, 0, 0
    for step in range(120):
        ids = np.unique(rng.integers(0, len(expected), 5))
        ids = np.append(ids, len(expected)) if step % 5 == 0 else ids
        rows = rng.normal(size=(len(ids), 2))
        expected = np.pad(expected, ((0, max(0, ids[-1] + 1 - len(expected))), (0, 0)))
        expected[ids] = rows
        table = changed.with_rows(table, ids, rows)
        if isinstance(table, np.ndarray):
            table.flags.writeable = False
            parts.append(n_base - copied)
            n_base, copied, n_copies = len(table), 0, n_copies + 1
            continue
        done = table.copies[0].n_copied if table.copies else 0
        parts.append(done - copied)
        copied = done
        np.testing.assert_array_equal(table.take(np.arange(len(expected))), expected)
        states.append((table, expected.copy()))
    assert n_copies > 3 and max(parts) < 400 / 4
    for state, rows in states:
        np.testing.assert_array_equal(state.take(np.arange(len(rows))), rows)
        np.testing.assert_array_equal(state.fetch(), rows)
        np.testing.assert_array_equal(state.fetch(), rows)


@pytest.mark.parametrize("reads", [False, True])
def test_two_changes_of_one_table_share_no_copy(reads: bool) -> None:
    """As after an update that failed, or of two copies of an estimator."""
    table = changed.with_rows(frozen(100), np.arange(15), np.ones((15, 2)))
    assert isinstance(table, ChangedTable) and table.copies
    if reads:
        assert table.fetch().sum() == 30
    ones = [changed.with_rows(table, np.array([number]), np.full((1, 2), 7)) for number in (1, 99)]
    for at, number in enumerate((1, 99)):
        made = ones[at]
        for more in range(20, 40):
            made = changed.with_rows(made, np.array([more]), np.full((1, 2), number))
        whole = made if isinstance(made, np.ndarray) else made.fetch()
        expected = np.zeros((100, 2))
        expected[:15], expected[number], expected[20:40] = 1, 7, number
        np.testing.assert_array_equal(whole, expected)


def test_a_table_that_others_may_write_into_is_not_copied_early() -> None:
    base = np.zeros((100, 2), np.float32)
    table: Any = changed.with_rows(base, np.arange(19), np.ones((19, 2)))
    base[99] = 5
    assert not table.copies
    table = changed.with_rows(table, np.arange(19, 30), np.ones((11, 2)))
    assert table[99].tolist() == [5, 5]


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-11), (np.float64, 1e-13)])
def test_a_carried_gramian_is_exact_after_many_changes(dtype: Any, bound: float) -> None:
    """In float32 it is carried over more changes; its error stays below that of the table."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(200, 4)).astype(dtype)
    known, n_anew = Carried(_exact_gramian(table), np.zeros(4)), 0
    for _ in range(20_000):
        ids = rng.choice(200, 5, replace=False)
        rows = rng.normal(size=(5, 4)).astype(dtype)
        made = after_change(known, 200, table[ids], rows)
        table[ids] = rows
        n_anew += made is None
        known = made or Carried(_exact_gramian(table), np.zeros(4))
    exact = _exact_gramian(table)
    assert np.abs(known.gram - exact).max() < bound * np.abs(exact).max()
    assert n_anew == 0 if dtype == np.float32 else n_anew > 10


def _exact_gramian(table: np.ndarray) -> np.ndarray:
    return table.T.astype(np.float64) @ table.astype(np.float64)
