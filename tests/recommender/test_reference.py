"""Any sequence of fit, update, save, load and recommend equals a slow reference."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import examples
from shop import Reference, feature_frame, model

from tpu_als import Recommender

NAMES = ["customer", "sku", "quantity", "kind", "time"]
KINDS = {"view": 1.0, "buy": 3.0, "dislike": -1.0, "bot": 0.0}
USERS, ITEMS = [f"c{at}" for at in range(8)], [f"sku{at}" for at in range(7)]
event = st.tuples(
    st.sampled_from(USERS), st.sampled_from(ITEMS), st.integers(1, 4), st.sampled_from(list(KINDS)),
    st.integers(0, 50),
)  # fmt: skip
batch = st.lists(event, min_size=1, max_size=12)
steps = st.lists(st.one_of(batch, st.just("save"), st.just("recommend")), max_size=5)
first = st.lists(event, min_size=8, max_size=25).filter(
    lambda rows: any(KINDS[row[3]] > 0 for row in rows)
)


row = st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from([None, 1.0, 2.0, 5.0]))
feature_rows = st.fixed_dictionaries(
    {
        "user": st.dictionaries(st.sampled_from([*USERS, "cx"]), row, min_size=1),
        "item": st.dictionaries(st.sampled_from([*ITEMS, "skux"]), row, min_size=1),
    }
)
known_rows = feature_rows.map(
    lambda rows: {s: {"c0" if s == "user" else "sku0": ("a", 3.0), **r} for s, r in rows.items()}
).filter(lambda rows: all(_is_known(side) for side in rows.values()))
with_features = st.lists(
    st.one_of(st.tuples(batch | st.just([]), feature_rows), batch, st.just("save")), max_size=4
)


def _is_known(rows):
    """Whether a feature frame has a category and a number."""
    return all(any(one[at] is not None for one in rows.values()) for at in (0, 1))


@settings(max_examples=examples(25, 1000))
@given(first, steps, st.sampled_from(["sum", "last", "max"]), st.sampled_from([None, 20]))
def test_equals_the_reference(rows, todo, repeated, half_life):
    """Histories to 1e-9, factors after each step to 1e-3, scores to 1e-4."""
    reference = Reference(repeated, half_life, KINDS)
    rec = Recommender(
        "customer", "sku", "quantity", "time", "kind", event_weights=KINDS, half_life=half_life,
        repeated=repeated, model=model(regularization=0.1, alpha=2.0),
    )  # fmt: skip
    reference.fit(rows)
    rec.fit(pd.DataFrame(rows, columns=NAMES))
    _check(rec, reference)
    for step in todo:
        if step == "save":
            with TemporaryDirectory() as folder:
                path = Path(folder, "shop.tpuals")
                rec.save(path)
                rec = Recommender.load(path)
        elif step != "recommend":
            rec.update(pd.DataFrame(step, columns=NAMES))
            reference.update(step)
        _check(rec, reference)


@pytest.mark.filterwarnings("ignore:.*have no row in .*_features")
@settings(max_examples=examples(25, 1000))
@given(first, known_rows, with_features, st.sampled_from(["sum", "last"]))
def test_equals_the_reference_with_features(rows, features, todo, repeated):
    """Users and items with features and without events, and features that change."""
    reference = Reference(repeated, None, KINDS, features)
    rec = Recommender(
        "customer", "sku", "quantity", "time", "kind", event_weights=KINDS, repeated=repeated,
        model=model(regularization=0.1, alpha=2.0, dtype=np.float64), **_frames(features),
    )  # fmt: skip
    reference.fit(rows)
    rec.fit(pd.DataFrame(rows, columns=NAMES))
    _check(rec, reference)
    for step in todo:
        if step == "save":
            with TemporaryDirectory() as folder:
                path = Path(folder, "shop.tpuals")
                rec.save(path)
                rec = Recommender.load(path)
            continue
        events, new = step if isinstance(step, tuple) else (step, None)
        given_events = pd.DataFrame(events, columns=NAMES) if events else None
        rec.update(given_events, **_frames(new or {}))
        reference.update(events, new)
        _check(rec, reference)


def _frames(features):
    columns = {"user": "customer", "item": "sku"}
    return {
        f"{side}_features": feature_frame(columns[side], rows) for side, rows in features.items()
    }


def _check(rec: Recommender, reference: Reference) -> None:
    assert rec.users_.tolist() == reference.users
    assert rec.items_.tolist() == reference.items
    cells = rec._state.history.all_cells()
    rows = np.repeat(np.arange(len(reference.users)), cells.lengths)
    got = {
        (reference.users[user], reference.items[item]): value
        for user, item, value in zip(rows, cells.items, cells.values, strict=True)
    }
    assert got == pytest.approx(reference.values, rel=1e-9)
    for name in ("user_factors", "item_factors"):
        table, expected = getattr(rec.model_, name), getattr(reference, name)
        np.testing.assert_allclose(table, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        # Almost parallel rows amplify rounding from update to update, so each one starts afresh.
        setattr(reference, name, table.astype(np.float64))
    found = rec.recommend(reference.users if reference.features else None, n=3)
    assert not found.duplicated(["user", "item"]).any()
    for user, block in found.groupby("user"):
        scores = reference.scores(user)
        assert set(block["item"]) <= set(scores)
        assert block["rank"].tolist() == list(range(1, len(block) + 1))
        if (block["reason"] != "popular").all():
            best = sorted(scores.values(), reverse=True)[:3]
            np.testing.assert_allclose(block["score"], best, rtol=1e-4, atol=1e-5)
            assert len(block) == min(3, len(scores))
            assert block["reason"].tolist() == [reference.reason(user, i) for i in block["item"]]
        else:  # the model has learnt nothing of this user
            at = reference.users.index(user)
            assert not np.abs(reference.user_factors[at]).max() > 1e-6
