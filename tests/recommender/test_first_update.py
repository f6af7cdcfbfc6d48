"""The first update of a large model does nothing in proportion to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from shop import many_users, model

from tpu_als import Recommender
from tpu_als.engine.cpu import exact
from tpu_als.recommender import first_update
from tpu_als.serving import changed
from tpu_als.serving.changed import ChangedTable


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and tables count as large."""
    monkeypatch.setattr(first_update, "_LARGE", 1)
    monkeypatch.setattr(changed, "_LARGE", 1)


def shop(source: str, folder: Path, **params: Any) -> Recommender:
    """A recommender after `fit` or after `load`."""
    rec = Recommender("customer", "sku", "quantity", model=model(**params)).fit(many_users())
    if source == "load":
        rec.save(folder / "shop.tpuals")
        rec = Recommender.load(folder / "shop.tpuals")
    return rec


def some_events() -> pd.DataFrame:
    """Events of a known and a new user, and of a known and a new item."""
    users, items = ["c001", "c001", "new"], ["sku010", "new", "sku020"]
    return pd.DataFrame({"customer": users, "sku": items, "quantity": [1, 2, 3]})


@pytest.mark.parametrize("source", ["fit", "load"])
def test_it_computes_no_gramian_and_copies_no_table(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rec = shop(source, tmp_path)
    tables, ids = (rec.model_.user_factors, rec.model_.item_factors), rec._state.users.first

    def refuse(*_: object) -> None:
        raise AssertionError("an update must not read the whole table")

    monkeypatch.setattr(exact, "gramian", refuse)
    monkeypatch.setattr(ChangedTable, "fetch", refuse)
    rec.update(some_events())
    fitted = rec.model_._fitted
    assert fitted.user._unread.base is tables[0]
    assert fitted.item._unread.base is tables[1]
    assert rec._state.users.first is ids
    assert len(rec.users_) == 301 and len(rec.items_) == 201


@pytest.mark.parametrize("source", ["fit", "load"])
def test_the_hash_tables_of_ids_are_there(source: str, tmp_path: Path) -> None:
    rec = shop(source, tmp_path)
    for ids in (rec._state.users, rec._state.items):
        assert ids.first._engine.is_mapping_populated


@pytest.mark.parametrize("params", [{}, {"objective": "ials"}, {"dtype": "float64"}])
def test_the_answers_are_those_without_preparation(
    params: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = shop("fit", tmp_path, **params).update(some_events())
    monkeypatch.setattr(first_update, "_LARGE", np.inf)
    plain = shop("fit", tmp_path, **params).update(some_events())
    for side in ("user_factors", "item_factors"):
        given, expected = (getattr(rec.model_, side) for rec in (prepared, plain))
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_models_that_xla_solves_and_models_of_others_are_not_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nothing is solved in fit")

    monkeypatch.setattr("tpu_als.serving.fitted.FactorTable.solve", refuse)
    shop("fit", tmp_path, use_native=False)
    Recommender("customer", "sku").fit_by(many_users(), lambda matrix: object())
