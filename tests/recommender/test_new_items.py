"""Weightings that learn a number for each item, while updates bring new items."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pandas as pd
import pytest
from shop import events, model
from sklearn.feature_extraction.text import TfidfTransformer

from tpu_als import Recommender
from tpu_als.exceptions import DataWarning
from tpu_als.weighting import BM25Weighting, LogWeighting, TfidfWeighting

K1, B = 20.0, 0.7
EVENTS = events()
FIRST = EVENTS[EVENTS["sku"] < "sku15"]


def make(weighting: Any, **params: Any) -> Recommender:
    """A recommender with quantities as values."""
    ours = model(regularization=0.1, alpha=2.0, dtype=np.float64)
    return Recommender("customer", "sku", "quantity", weighting=weighting, model=ours, **params)


class Slow:
    """BM25 and TF-IDF weights by dictionaries, one event at a time."""

    def __init__(self, frame: pd.DataFrame, is_bm25: bool) -> None:
        self.values: dict[tuple[str, str], float] = {}
        self.weights: dict[tuple[str, str], float] = {}
        self.is_bm25, self.lengths = is_bm25, {}
        users = self.add(frame)
        sums = self.sums()
        self.n_items, self.mean = len(sums), sum(sums.values()) / len(sums)
        self.weigh(users)

    def add(self, frame: pd.DataFrame) -> set[str]:
        """Add events; return their users."""
        for user, item, value in frame[["customer", "sku", "quantity"]].itertuples(index=False):
            self.values[user, item] = self.values.get((user, item), 0) + value
        return set(frame["customer"])

    def sums(self) -> dict[str, float]:
        """Sum of the values of each item."""
        found: dict[str, float] = {}
        for (_, item), value in self.values.items():
            found[item] = found.get(item, 0) + value
        return found

    def update(self, frame: pd.DataFrame) -> None:
        """Only new items get a length, and only the users of the events other weights."""
        self.weigh(self.add(frame))

    def weigh(self, users: set[str]) -> None:
        """Weights of all items of some users."""
        for item, total in self.sums().items():
            self.lengths.setdefault(item, 1 - B + B * total / self.mean)
        for user, item in self.values:
            if user in users:
                self.weights[user, item] = self.weight(user, item)

    def weight(self, user: str, item: str) -> float:
        """The formula of the documents."""
        value, n = self.values[user, item], sum(owner == user for owner, _ in self.values)
        idf = math.log(self.n_items) - math.log(1 + n)
        if not self.is_bm25:
            return math.sqrt(value) * idf
        return (K1 + 1) * value / (K1 * self.lengths[item] + value) * idf


def check(rec: Recommender, slow: Slow, changed: set[str]) -> None:
    """Weights, explanations, strangers and the factors of changed users."""
    cells, users, items = rec._state.history.all_cells(), rec.users_, rec.items_
    owners = np.repeat(np.arange(len(users)), cells.lengths)
    got = {
        (users[user], items[item]): weight
        for user, item, weight in zip(owners, cells.items, cells.weights, strict=True)
    }
    assert got == pytest.approx(slow.weights, rel=1e-5)
    matrix, objective = (
        rec._state.rows(np.arange(len(users))),
        oracle.Objective(regularization=0.1, alpha=2.0),
    )
    at = users.get_indexer(sorted(changed))
    exact = oracle.half_epoch(matrix[at].astype(np.float64), rec.model_.item_factors, objective)
    np.testing.assert_allclose(rec.model_.user_factors[at], exact, rtol=1e-6, atol=1e-9)
    for user in sorted(changed)[:3]:
        why = rec.explain(user, items[-1], n=100).set_index("item")["weight"]
        assert why.to_dict() == pytest.approx(
            {item: weight for (owner, item), weight in slow.weights.items() if owner == user},
            rel=1e-5,
        )
        own = [{"item": i, "value": v} for (owner, i), v in slow.values.items() if owner == user]
        one, other = rec.recommend_for_history(own, n=5), rec.recommend([user], n=5)
        assert one["item"].tolist() == other["item"].tolist()
        np.testing.assert_allclose(one["score"], other["score"], rtol=1e-4)


@pytest.mark.parametrize("weighting", [BM25Weighting(K1, B), TfidfWeighting()], ids=["bm25", "idf"])
def test_updates_with_new_items_equal_a_slow_reference(weighting: Any, tmp_path: Path) -> None:
    rec = make(weighting).fit(FIRST)
    slow = Slow(FIRST, isinstance(weighting, BM25Weighting))
    for step in range(6):
        part = events(12, seed=10 + step)
        part.loc[:2, "sku"] = [f"new{step}", f"new{step}", f"new{step - 1}"]
        part.loc[5:6, "customer"] = f"n{step}"
        before = rec.weighting_
        rec.update(part)
        slow.update(part)
        check(rec, slow, set(part["customer"]))
        if step % 2:
            rec.save(tmp_path / "shop")
            rec = Recommender.load(tmp_path / "shop")
            check(rec, slow, set(part["customer"]))
        if slow.is_bm25:
            lengths = rec.weighting_.length_
            np.testing.assert_allclose(lengths, [slow.lengths[item] for item in rec.items_])
            np.testing.assert_array_equal(before.length_, lengths[: len(before.length_)])
            assert len(before.length_) < len(lengths)


def test_other_users_keep_their_answers() -> None:
    rec = make(BM25Weighting()).fit(FIRST)
    before, factors = rec.recommend(["c05"]), rec.model_.user_factors[5].copy()
    new = pd.DataFrame({"customer": ["c01"] * 2, "sku": ["new", "sku01"], "quantity": 1})
    rec.update(new)
    np.testing.assert_array_equal(rec.model_.user_factors[5], factors)
    found = rec.recommend(["c05"], exclude=["new", "sku01"], n=9)
    expected = before[before["item"] != "sku01"]
    assert found["item"].tolist()[: len(expected)] == expected["item"].tolist()


def test_items_known_by_features_get_a_length_with_their_first_events(tmp_path: Path) -> None:
    skus = [*sorted(FIRST["sku"].unique()), "later", "never"]
    features = pd.DataFrame({"sku": skus, "size": np.arange(len(skus)) % 5})
    rec = make(BM25Weighting(K1, B), item_features=features).fit(FIRST)
    slow = Slow(FIRST, True)
    at = [rec.items_.get_loc("later"), rec.items_.get_loc("never")]
    np.testing.assert_allclose(rec.weighting_.length_[at], [1 - B] * 2)
    found = rec.recommend_for_history(["later", "sku01"])
    assert len(found)  # an item without events counts like one with a sum of 0
    rec.update(item_features=pd.DataFrame({"sku": ["last"], "size": [2]}))
    part = pd.DataFrame({"customer": ["c01", "x"], "sku": ["later", "last"], "quantity": [30, 2]})
    rec.update(part)
    slow.update(part)
    for item in ("later", "last", "sku03"):
        length = rec.weighting_.length_[rec.items_.get_loc(item)]
        assert length == pytest.approx(slow.lengths[item])
    rec.save(tmp_path / "shop")
    again = Recommender.load(tmp_path / "shop")
    np.testing.assert_array_equal(again.weighting_.length_, rec.weighting_.length_)
    again.update(part.assign(sku="newest"))


def test_a_transformer_with_a_fixed_number_of_items_refuses_new_ones() -> None:
    """scikit-learn's learns the popularity of each item and has no `with_items`."""
    rec = make(TfidfTransformer(norm=None)).fit(FIRST)
    state = rec._state
    new = pd.DataFrame({"customer": ["c01"], "sku": ["brand new"], "quantity": [1]})
    with pytest.raises(ValueError, match="X has 16 features, but TfidfTransformer is expecting 15"):
        rec.update(new)
    assert rec._state is state
    rec.update(FIRST[:10])


def test_with_items_of_another_transformer() -> None:
    class Own(LogWeighting):
        known = 0

        def with_items(self, X: Any, items: Any) -> Any:
            made = Own()
            made.known, made.n_features_in_ = X.shape[1], self.n_features_in_
            return made

    rec = make(Own()).fit(FIRST)
    assert rec.weighting_.known == 15
    rec.update(pd.DataFrame({"customer": ["c01"], "sku": ["new"], "quantity": [1]}))
    assert rec.weighting_.known == 16


def test_a_failed_update_keeps_the_lengths() -> None:
    rec = make(BM25Weighting()).fit(FIRST)
    before = rec.weighting_
    wrong = pd.DataFrame({"customer": ["c01"], "sku": ["new"], "quantity": [-1]})
    with pytest.raises(ValueError, match="Negative values in data passed to BM25Weighting"):
        rec.update(wrong)
    assert rec.weighting_ is before and len(before.length_) == len(rec.items_)
    with pytest.warns(DataWarning, match="1 of 2 events of the history"):
        assert len(rec.recommend_for_history(["new", "sku01"]))
