"""Ids of unusual types, in frames, queries and files; and ids that hold missing values."""

from __future__ import annotations

import enum
import warnings
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from ipaddress import ip_address, ip_network
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from shop import model

from tpu_als import Recommender
from tpu_als.datasets import interactions_from_frame
from tpu_als.exceptions import DataWarning, ModelFileError
from tpu_als.recommender import ranking
from tpu_als.storage.npz import NpzFile, write_npz


class Colour(enum.Enum):
    """Ids that a file cannot hold."""

    RED = 1
    BLUE = 2


class Pair(NamedTuple):
    """Ids that are tuples."""

    shop: str
    number: int


# Its offset depends on `fold`, so it equals no time with a fixed offset.
AMBIGUOUS = datetime(2020, 10, 25, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))


def fitted(ids: Any) -> tuple[Recommender, pd.DataFrame]:
    """A recommender of three users with these ids, and its events."""
    frame = pd.DataFrame({"user": pd.Series(ids), "item": ["x", "y", "z"]})
    return Recommender(model=model()).fit(frame), frame


MANY = [
    [frozenset({1}), frozenset({2, "a"}), frozenset()],
    [time(1), time(2, 30, 0, 7), time(3, tzinfo=timezone(timedelta(hours=2)))],
    [timedelta(1), timedelta(microseconds=-5), timedelta(3)],
    [pd.Timedelta(1, "ns"), pd.Timedelta(-1, "ns"), pd.Timedelta(3, "D")],
    list(pd.period_range("2020-01", periods=3, freq="M")),
    list(pd.period_range("1900-01-01 13:00", periods=3, freq="15min")),
    list(pd.interval_range(0, 3)),
    list(pd.interval_range(pd.Timestamp("2020-01-01"), periods=3, closed="left")),
    list(pd.interval_range(pd.Timestamp("2020-03-28", tz="Europe/Berlin"), periods=3)),
    list(pd.interval_range(pd.Timedelta(0), periods=3, freq="h")),
    [Fraction(1, 3), Fraction(1, 2), Fraction(3)],
    [Fraction(1, 3), 2, Decimal(3)],
    [1j, 2.5 - 1j, -3 + 0j],
    [ip_address("10.0.0.1"), ip_address("10.0.0.2"), ip_address("9.0.0.3")],
    [ip_address("::1"), ip_address("::2"), ip_address("fe80::1%eth0")],
    [ip_network("10.0.0.0/8"), ip_network("10.0.0.0/9"), ip_network("9.0.0.0/8")],
    [Path("a"), Path("a/b"), Path("ä")],
    [PurePosixPath("a"), PurePosixPath("b"), PurePosixPath("c")],
    [PureWindowsPath("a\\b"), PureWindowsPath("b"), PureWindowsPath("c")],
    [("a", (1, 2)), ("b", (1, 3)), ("c", ())],
    [("a", date(2020, 1, 1)), ("b", UUID(int=1)), ("c", b"\xff")],
    [(datetime(2020, 1, 1),), (datetime(2021, 1, 1, 2, 3, 4, 5),), (pd.Timestamp(1),)],
    [(np.int64(1), np.float32(0.1)), (np.int64(2), np.str_("x")), (np.bool_(True),)],
    [(pd.Period("2020", "Y"), frozenset({(1, 2)})), (pd.Interval(0.5, 1),), (Decimal("1.50"),)],
    [Pair("a", 1), Pair("a", 2), Pair("b", 1)],
    [10**30, 10**31, 3],
]


@pytest.mark.parametrize("ids", MANY, ids=lambda ids: str(ids[0])[:30])
def test_ids_of_many_types(ids: list[Any], tmp_path: Path) -> None:
    """Queries, updates and files; each id is the same after `load`."""
    rec, frame = fitted(ids)
    rec.save(tmp_path / "shop")
    again = Recommender.load(tmp_path / "shop")
    assert again.users_.dtype == rec.users_.dtype
    assert again.users_.tolist() == rec.users_.tolist()
    if not isinstance(ids[0], Pair):  # they become tuples
        for one, other in zip(again.users_, rec.users_, strict=True):
            assert (
                type(one) is type(other)
                and repr(one).replace("np.", "")
                and hash(one) == hash(other)
            )
    for query in (ids[0], [ids[0]], pd.Series(ids[:1])):
        got = again.recommend(query, n=3)
        pd.testing.assert_frame_equal(got, rec.recommend(query, n=3))
        assert set(got["user"]) == {ids[0]}
    assert len(again.similar_users(ids[0])) == 2
    again.update(frame[::-1])
    assert again.users_.tolist() == rec.users_.tolist()


def test_items_of_unusual_types(tmp_path: Path) -> None:
    sets = [frozenset({"tea"}), frozenset({"tea", "milk"}), frozenset({"jam"})]
    rec = Recommender(model=model()).fit(pd.DataFrame({"user": [1, 1, 2], "item": sets}))
    assert rec.recommend(2, candidates=sets[:1])["item"].tolist() == sets[:1]
    assert set(rec.recommend_for_history(sets[:1])["item"]) == set(sets[1:])
    assert rec.explain(1, sets[0])["item"].tolist()
    assert len(rec.similar_items(sets[0], n=1)) == 1
    with pytest.raises(TypeError, match="candidates must be a list of items"):
        rec.recommend(2, candidates=sets[0])


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        ([Colour.RED, Colour.BLUE, Colour.RED], "Colour objects"),
        ([(1, Colour.RED), (1, 2), (1, 3)], "Colour objects"),
        ([("a", (frozenset({Colour.RED}),)), ("b",), ("c",)], "Colour objects"),
        ([("a", np.datetime64(1, "ns")), ("b",), ("c",)], "datetime64 objects"),
        ([(AMBIGUOUS,), ("b",), ("c",)], "written exactly"),
    ],
)
def test_ids_that_save_refuses_are_told_before_the_fit(
    ids: list[Any], what: str, tmp_path: Path
) -> None:
    with pytest.warns(DataWarning, match=rf"ids of column 'user'.*{what}.*astype\(str\)") as found:
        rec, _ = fitted(ids)
    assert len(found) == 1 and found[0].filename == __file__
    assert len(rec.recommend([ids[0]], n=1)) == 1
    with pytest.raises(ValueError, match=f"ids of user_ids cannot be saved.*{what}"):
        rec.save(tmp_path / "shop")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ids", "form", "wrong"),
    [
        ([time(1), time(2), time(3)], "times of day", '["01:00:00", "02:00:00", "x"]'),
        ([1j, 2j, 3j], "complex numbers", '["1j", "2j", "nan"]'),
        ([("a", (1,)), ("b",), ("c",)], "nested", '[["tuple", 1], ["tuple", 2], ["other", 3]]'),
        ([("a", (1,)), ("b",), ("c",)], "nested", '[["tuple", 1], ["tuple", 2], []]'),
        ([("a", (1,)), ("b",), ("c",)], "nested", '[["tuple", 1], ["tuple", 2], ["tuple", null]]'),
        ([("a", (1,)), ("b",), ("c",)], "nested", '[["tuple", 1], ["tuple", 2], ["tuple", {}]]'),
        (list(pd.period_range("2020", periods=3, freq="D")), "periods", '["1 D", "2 D", "3 Q9"]'),
        ([timedelta(1), timedelta(2), timedelta(3)], "spans", "x"),
        (list(pd.interval_range(0, 3)), "intervals", '["[0,1]", "[1,2]", "[2,3]"]'),
    ],
)
def test_damaged_ids(ids: list[Any], form: str, wrong: str, tmp_path: Path) -> None:
    """Format 4, which earlier versions refuse; nothing else than ModelFileError is raised."""
    rec, _ = fitted(ids)
    rec.save(tmp_path / "shop")
    with open(tmp_path / "shop", "rb") as file, NpzFile(file, "shop", lambda _: True) as found:
        arrays = {key: found.read(key) for key in found.headers}
    about = arrays["recommender"].tobytes()
    assert b'"format": 4' in about and form.encode() in about
    with open(tmp_path / "shop", "wb") as file:
        write_npz(file, {**arrays, "user_ids": np.frombuffer(wrong.encode(), np.uint8)})
    with pytest.raises(ModelFileError, match="damaged"):
        Recommender.load(tmp_path / "shop")


@pytest.mark.filterwarnings("ignore:Constructing a DataFrame from a list of sequences")
@pytest.mark.parametrize(
    "null",
    [
        ("a", None), ("a", float("nan")), (pd.NaT, 1), ("a", pd.NA), ("a", np.datetime64("NaT")),
        ("a", ("b", (None,))), ("a", Decimal("NaN")), frozenset({None}), ("a", frozenset({None})),
        (np.float32("nan"),), (complex("nan"),),
    ],
    ids=str,
)  # fmt: skip
def test_ids_that_hold_missing_values_are_missing(null: Any) -> None:
    good = [("a", "b"), ("a", ("b", 1))] if isinstance(null, tuple) else [frozenset("a")] * 2
    frame = pd.DataFrame({"user": pd.Series([*good, null], dtype=object), "item": ["x", "y", "z"]})
    message = r"column 'user' must have no missing values, got 1, the first in row 2 \(counted"
    for given in (frame, frame.astype({"user": "category"})):
        with pytest.raises(ValueError, match=message) as error:
            Recommender(model=model()).fit(given)
        assert repr(null)[:20] in str(error.value)
        with pytest.raises(ValueError, match=message):
            interactions_from_frame(given, "user", "item")
    rec = Recommender(model=model()).fit(frame[:2])
    with pytest.raises(ValueError, match=message):
        rec.update(frame)
    with pytest.raises(ValueError, match=r"users must have no missing ids, got .* at position 1"):
        rec.recommend([good[0], null])
    with pytest.raises(ValueError, match="users must have no missing ids"):
        rec.similar_users(null)
    with pytest.raises(ValueError, match="users= must have no missing values, got 1"):
        interactions_from_frame(frame[:2], "user", "item", users=[*good[:1], null])
    features = pd.DataFrame({"user": pd.Series([good[0], null], dtype=object), "age": [1, 2]})
    with pytest.raises(ValueError, match="must have no missing values"):
        Recommender(model=model(), user_features=features).fit(frame[:2])


def test_a_missing_id_is_shown() -> None:
    frame = pd.DataFrame({"user": ["a", None], "item": ["x", "y"]})
    with pytest.raises(
        ValueError, match=r"the first in row 1 \(counted from 0\), (nan|None): drop"
    ):
        Recommender(model=model()).fit(frame)


@pytest.mark.parametrize(
    "zone",
    [
        "dateutil/Europe/Berlin",
        timezone(timedelta(hours=1), "XX"),
        timezone(timedelta(hours=1, seconds=30)),
    ],
    ids=str,
)
def test_time_zones_that_a_file_cannot_hold(zone: Any, tmp_path: Path) -> None:
    rec, _ = fitted(pd.date_range("2026", periods=3, tz="Europe/Berlin"))
    rec.save(tmp_path / "shop")
    assert Recommender.load(tmp_path / "shop").users_.equals(rec.users_)
    before = (tmp_path / "shop").read_bytes()
    try:
        times = pd.date_range("2026", periods=3, tz=zone)
    except AttributeError:
        pytest.skip("this pandas cannot read the time zones of dateutil")
    with pytest.warns(DataWarning, match="hold times with the time zone .*dt.tz_convert"):
        rec, _ = fitted(times)
    with pytest.raises(ValueError, match=r"ids of user_ids cannot be saved.* times with the time"):
        rec.save(tmp_path / "shop")
    assert (tmp_path / "shop").read_bytes() == before


def test_integers_beyond_the_type_of_fit_are_new_ids(tmp_path: Path) -> None:
    rec, _ = fitted(np.array([1, 2, 3], np.int16))
    assert rec.users_.dtype == np.int64
    assert set(rec.recommend([40000])["reason"]) == {"popular"}
    assert set(rec.recommend([2**63 + 1])["reason"]) == {"popular"}
    rec.update(pd.DataFrame({"user": np.array([40000], np.int32), "item": ["x"]}))
    assert rec.users_.tolist() == [1, 2, 3, 40000]
    rec.update(pd.DataFrame({"user": np.array([2**63 + 1], np.uint64), "item": ["x"]}))
    rec.update(pd.DataFrame({"user": [-1], "item": ["x"]}))
    assert rec.users_.tolist() == [1, 2, 3, 40000, 2**63 + 1, -1]
    assert set(rec.recommend([2**63 + 1, -1, 2])["reason"]) == {"model"}
    rec.save(tmp_path / "shop")
    assert Recommender.load(tmp_path / "shop").users_.tolist() == rec.users_.tolist()


def test_times_that_have_no_common_unit() -> None:
    old = pd.DatetimeIndex(np.array(["1000-01-01", "1001-01-01", "1002-01-01"], "datetime64[s]"))
    rec, _ = fitted(old)
    new = pd.DatetimeIndex(["2026-01-01"]).as_unit("ns")
    assert set(rec.recommend(new)["reason"]) == {"popular"}
    with pytest.raises(ValueError, match=r"cannot be compared with the ids .*dt.as_unit\('us'\)"):
        rec.recommend(new + pd.Timedelta(1, "ns"))
    rec.update(pd.DataFrame({"user": new, "item": ["x"]}))
    assert rec.users_.tolist() == [*old, new[0]]
    rec, _ = fitted(new.repeat(3))
    with pytest.raises(ValueError, match="cannot be compared"):
        rec.recommend(old)


@pytest.mark.parametrize(
    "ids",
    [
        [timedelta(hours=i) for i in range(3)],
        [timedelta(days=200000 * i) for i in range(-1, 2)],
        list(pd.period_range("2026-01", periods=3, freq="M")),
        [pd.Interval(0, 3), pd.Interval(1, 4), pd.Interval(0, 3, closed="left")],
        [1j, 2j, 3j],
        [Pair("a", 1), Pair("a", 2), Pair("b", 1)],
    ],
    ids=lambda ids: str(ids[0]),
)
def test_objects_are_the_ids_that_their_array_holds(ids: list[Any], tmp_path: Path) -> None:
    """A column of objects, a list and an array of pandas match, whichever of them `fit` got."""
    frame = pd.DataFrame({"user": pd.Series(ids, dtype=object), "item": ["x", "y", "z"]})
    rec = Recommender(model=model()).fit(frame)
    rec.update(frame)
    assert rec.users_.tolist() == ids or sorted(rec.users_) == sorted(ids)
    assert not np.isnan(rec.score(frame))
    for query in (frame["user"], ids, pd.Series(ids), ids[0]):
        assert set(rec.recommend(query)["reason"]) == {"model"}
    rec.save(tmp_path / "shop")
    again = Recommender.load(tmp_path / "shop").update(frame)
    assert again.users_.tolist() == rec.users_.tolist()
    assert set(again.recommend([tuple(ids[0]) if isinstance(ids[0], Pair) else ids[0]])["rank"])


def test_periods_of_another_frequency_are_refused() -> None:
    months = pd.period_range("2026-01", periods=3, freq="M")
    rec, _ = fitted(months)
    with pytest.raises(ValueError, match="periods of the frequency D .*of the frequency M"):
        rec.recommend(months.asfreq("D"))
    mixed = pd.Series([months[0], pd.Period("2026", "Y"), months[1]], dtype=object)
    with pytest.raises(ValueError, match="different types.*frequency M .*frequency Y"):
        fitted(mixed)


def test_overlapping_intervals(tmp_path: Path) -> None:
    ids = pd.IntervalIndex.from_tuples([(0, 3), (1, 4), (2, 5)])
    rec, frame = fitted(ids)
    assert set(rec.recommend([ids[0]])["reason"]) == {"model"}
    assert set(rec.recommend(ids.astype("interval[float64]"))["reason"]) == {"model"}
    excluded = pd.DataFrame({"user": ids[:1], "item": ["y"]})
    got = rec.recommend(ids, exclude=excluded)
    assert got.loc[got["user"] == ids[0], "item"].tolist() == ["z"]
    rec, _ = fitted(pd.interval_range(0, 3))
    rec.update(frame)
    assert rec.users_.tolist() == [*pd.interval_range(0, 3), *ids]
    rec.save(tmp_path / "shop")
    assert Recommender.load(tmp_path / "shop").users_.tolist() == rec.users_.tolist()


def test_halves_of_surrogate_pairs_are_refused() -> None:
    ids = pd.Series(["a", "b\udc80", "c"], dtype=object)
    with pytest.raises(ValueError, match=r"column 'user' holds 'b\\udc80' in row 1 .*Unicode"):
        fitted(ids)
    rec, _ = fitted(["a", "b", "c"])
    with pytest.raises(ValueError, match=r"users holds 'b\\udc80' in row 1 .*Unicode"):
        rec.recommend(["a", "b\udc80"])
    with pytest.raises(ValueError, match="holds 'b.*Unicode"):
        interactions_from_frame(pd.DataFrame({"user": ids, "item": [1, 2, 3]}), "user", "item")


def test_float16() -> None:
    ids = np.array([1, 2.5, 3], np.float16)
    rec, _ = fitted(ids)
    pairs = pd.DataFrame({"user": ids[:1], "item": ["y"]})
    for users in (ids, list(ids), [1, 2.5, 3]):
        got = rec.recommend(users, exclude=pairs)
        assert got.loc[got["user"] == 1, "item"].tolist() == ["z"]


@pytest.mark.parametrize("library", ["polars", "pyarrow", "duckdb"])
def test_dates_of_other_libraries_stay_dates(library: str, tmp_path: Path) -> None:
    made, pa, pl = map(pytest.importorskip, (library, "pyarrow", "polars"))
    dates = [date(2026, 1, day) for day in (1, 2, 3, 1, 2)]
    table = pa.table({"user": dates, "item": dates[::-1]})
    features = pl.DataFrame({"item": dates[:3], "price": [1.0, 2.0, 4.0]})
    frame = table if library == "pyarrow" else made.from_arrow(table)
    rec = Recommender(model=model(), item_features=features).fit(frame)
    rec.update(frame, item_features=features)
    assert rec.users_.tolist() == rec.items_.tolist() == dates[:3]
    for users in (pl.from_arrow(table)["user"], table["user"], dates, pd.Series(dates)):
        answer = rec.recommend(users, exclude_seen=False, candidates=frame)
        answer = answer.pl() if library == "duckdb" else pl.DataFrame(answer)
        assert answer.schema["user"] == answer.schema["item"] == pl.Date
        assert set(answer["user"]) == set(dates)
    with warnings.catch_warnings():  # the item is known
        warnings.simplefilter("error")
        rec.recommend_for_history(pl.DataFrame({"item": dates[:1]}))
    rec.save(tmp_path / "shop")
    assert Recommender.load(tmp_path / "shop").users_.tolist() == dates[:3]


@pytest.mark.parametrize(
    "ids",
    [
        [Decimal(1), Decimal(12345), Decimal("1.25")],
        [UUID(int=1), UUID(int=2), UUID(int=3)],
        [date(2026, 1, 1), date(2026, 1, 2), date(2026, 1, 3)],
        [b"\xff", b"b", b""],
        [time(1), time(2), time(3)],
        [timedelta(1), timedelta(2), timedelta(days=200000)],
        list(pd.date_range("2026", periods=3, tz="Europe/Berlin")),
        [1.5, 2.0, 3.0],
        ["a", "b", "c"],
    ],
    ids=lambda ids: str(ids[0]),
)
def test_parquet_has_one_type_for_all_ids(
    ids: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the ids of the first block of users fit into a narrower type."""
    pq, pa = (pytest.importorskip(name) for name in ("pyarrow.parquet", "pyarrow"))
    if isinstance(ids[0], UUID) and not hasattr(pa, "uuid"):
        pytest.skip("this PyArrow has no type for UUIDs")
    monkeypatch.setattr(ranking, "_BLOCK", 1)
    frame = pd.DataFrame({"user": ids, "item": ids[::-1]})
    rec = Recommender(model=model()).fit(frame)
    expected = rec.recommend()
    assert rec.recommend_to_parquet(tmp_path / "x", ids) == len(rec.recommend(ids))
    assert rec.recommend_to_parquet(tmp_path / "x") == len(expected)
    found = pq.read_table(tmp_path / "x").to_pydict()
    for name in ("user", "item", "rank", "reason"):
        assert found[name] == expected[name].tolist()


@pytest.mark.parametrize(
    "ids",
    [
        [("a", 1), ("a", 2), ("b", 1)],
        [frozenset({1}), frozenset({2}), frozenset({3})],
        [Fraction(1, 3), Fraction(1, 2), Fraction(3)],
        [1j, 2j, 3j],
        [ip_address("10.0.0.1"), ip_address("10.0.0.2"), ip_address("9.0.0.3")],
        [Path("a"), Path("b"), Path("c")],
        [10**30, 10**31, 3],
        [2.5, Decimal(3), 2],
    ],
    ids=lambda ids: str(ids[0]),
)
def test_ids_that_parquet_has_no_type_for(ids: list[Any], tmp_path: Path) -> None:
    """An error before users are ranked, and an existing file stays."""
    pytest.importorskip("pyarrow")
    (tmp_path / "x").write_text("old")
    frame = pd.DataFrame({"one": pd.Series(ids, dtype=object), "other": ["x", "y", "z"]})
    for user, item, name in (("one", "other", "users"), ("other", "one", "items")):
        rec = Recommender(user, item, model=model()).fit(frame)
        with pytest.raises(ValueError, match=rf"cannot write the ids of {name}, .*astype\(str\)"):
            rec.recommend_to_parquet(tmp_path / "x")
        assert (tmp_path / "x").read_text() == "old"
        assert len(rec.recommend())
