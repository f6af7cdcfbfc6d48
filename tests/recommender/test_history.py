"""Histories over many updates equal dictionaries, and no update copies most of the cells."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
from shop import many_users, model

from tpu_als import Recommender
from tpu_als.recommender import history, state
from tpu_als.recommender.history import Cells, History
from tpu_als.serving import changed

N_ITEMS = 12
Row = dict[int, tuple[float, float, int]]  # value, weight and time by item


def cells_of(rows: list[Row], has_times: bool) -> Cells:
    """Rows as cells."""
    items = [item for row in rows for item in sorted(row)]
    found = np.array([row[item] for row in rows for item in sorted(row)], np.float64).reshape(-1, 3)
    return Cells(
        np.append(0, np.cumsum([len(row) for row in rows])).astype(np.int64),
        np.array(items, np.int32),
        found[:, 0],
        found[:, 1].astype(np.float32),
        found[:, 2].astype(np.int64) if has_times else None,
    )


def random_row(rng: np.random.Generator) -> Row:
    """A row with up to all items."""
    items = rng.choice(N_ITEMS, rng.integers(0, N_ITEMS) ** 2 // N_ITEMS, replace=False)
    return {int(item): (rng.normal(), rng.normal(), int(rng.integers(9))) for item in items}


def assert_equal(got: Cells, expected: Cells) -> None:
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one is None) == (other is None) and (one is None or one.dtype == other.dtype)


def check(made: History, rows: list[Row], has_times: bool, rng: np.random.Generator) -> None:
    """All that a history answers."""
    expected = cells_of(rows, has_times)
    assert made.n_users == len(rows)
    assert_equal(made.all_cells(), expected)
    assert made.lengths().tolist() == [len(row) for row in rows]
    some = rng.integers(0, len(rows), rng.integers(0, 8))
    assert_equal(made.rows(some), cells_of([rows[user] for user in some], has_times))
    items = np.unique(rng.integers(0, N_ITEMS, 4))
    columns = expected.matrix(N_ITEMS)[:, items].T.toarray()
    np.testing.assert_array_equal(made.columns(items).toarray(), columns)


@pytest.mark.parametrize("has_times", [False, True])
@pytest.mark.parametrize(("least", "seed"), [(1 << 16, 0), (16, 1), (16, 2), (4, 3), (1, 4)])
def test_updates_equal_a_list_of_rows(
    least: int, seed: int, has_times: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in several; older histories keep their answers."""
    monkeypatch.setattr(history, "_LEAST", least)
    rng = np.random.default_rng(seed)
    rows = [random_row(rng) for _ in range(40)]
    made, before, n_pieces = History.of(cells_of(rows, has_times), N_ITEMS), [], set()
    for step in range(80):
        if step % 9 == 0:
            before.append((made, rows))
        n_users = len(rows) + rng.integers(0, 3)
        users = np.unique(rng.integers(0, n_users, rng.integers(0, 25 if step % 20 == 19 else 5)))
        rows = [*rows, *[{} for _ in range(n_users - len(rows))]]
        new = [random_row(rng) for _ in users]
        for user, row in zip(users, new, strict=True):
            rows[user] = row
        made = made.changed_to(users, cells_of(new, has_times), n_users, N_ITEMS)
        check(made, rows, has_times, rng)
        n_pieces.add(len(made.pieces))
    assert (n_pieces == {1}) == (least == 1 << 16) and len(made.groups) == len(made.pieces)
    for one, expected in before:
        check(one, expected, has_times, rng)
    for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        check(twin, rows, has_times, rng)


def test_no_update_copies_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells written by an update, and those kept beside the pieces, are bounded."""
    monkeypatch.setattr(history, "_LEAST", 64)
    rng = np.random.default_rng(0)
    rows = [dict.fromkeys(range(8), (1.0, 1.0, 0)) for _ in range(1000)]
    made, most, n_turns = History.of(cells_of(rows, False), N_ITEMS), 0, 0
    for step in range(400):
        added = [2000 + step] if step % 10 == 0 else []
        known = np.unique(rng.integers(0, made.n_users, 4))
        users = np.append(known, np.full(len(added), made.n_users))
        n_users = made.n_users + len(added)
        new = cells_of(rows[: len(users)], False)
        after = made.changed_to(users, new, n_users, N_ITEMS)
        earlier = {id(part.cells.items) for part in (*made.pieces, *made.groups)}
        if step:  # the first one cuts the cells of the fit, without a copy
            parts = (*after.pieces, *after.groups)
            most = max(
                most, sum(len(p.cells.items) for p in parts if id(p.cells.items) not in earlier)
            )
        n_turns += after.turn != made.turn
        made = after
        beside = sum(len(group.cells.items) for group in made.groups)
        assert beside <= made._n_cells() / 7
    assert n_turns > 100 and len(made.pieces) >= 32
    assert most < 8000 / 10


def test_new_users_get_pieces_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last piece, which has the users that updates add, does not grow without a bound."""
    monkeypatch.setattr(history, "_LEAST", 64)
    row = dict.fromkeys(range(8), (1.0, 1.0, 0))
    made = History.of(cells_of([row] * 100, False), N_ITEMS)
    for _ in range(300):
        made = made.changed_to(
            np.array([made.n_users]), cells_of([row], False), made.n_users + 1, N_ITEMS
        )
    assert max(len(piece.cells.items) for piece in made.pieces) < 8 * 400 / 8
    np.testing.assert_array_equal(made.lengths(), np.full(400, 8))


def test_a_recommender_that_copies_in_parts_equals_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over 60 updates with failed ones, copies and readers of the whole table between them."""
    start, parts = many_users(), []
    for step in range(60):
        part = start.sample(6, random_state=step).assign(quantity=1 + step % 3)
        if step % 4 == 0:
            part.iloc[0, :2] = f"new{step}"
        parts.append(part)
    made = [Recommender("customer", "sku", "quantity", model=model()).fit(start) for _ in range(2)]
    monkeypatch.setattr(history, "_LEAST", 64)
    monkeypatch.setattr(changed, "_MOST", 40)
    n_pieces, n_copies = set(), 0
    for step, part in enumerate(parts):
        for at, large in enumerate((1, 1 << 30)):
            monkeypatch.setattr(changed, "_LARGE", large)
            if step % 5 == 4:  # fails after rows of users were changed
                with monkeypatch.context() as patch:
                    patch.setattr(state, "replace", None)
                    with pytest.raises(TypeError, match="not callable"):
                        made[at].update(part)
            made[at].update(part)
        n_pieces.add(len(made[0]._state.history.pieces))
        n_copies += bool(getattr(made[0].model_._fitted.user._unread, "copies", None))
        if step in (25, 45):
            made[0] = copy.deepcopy(made[0]) if step == 25 else pickle.loads(pickle.dumps(made[0]))
        if step % 20 == 10:
            pd.testing.assert_frame_equal(made[0].recommend(), made[1].recommend())
    assert min(n_pieces) >= 32 and n_copies > 10
    for name in ("user_factors", "item_factors"):
        one, other = (getattr(rec.model_, name) for rec in made)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert_equal(made[0]._state.history.all_cells(), made[1]._state.history.all_cells())
    pd.testing.assert_frame_equal(made[0].recommend(n=5), made[1].recommend(n=5))
