"""`Recommender`: frames of events in, frames of recommendations out."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
import warnings
from datetime import date
from decimal import Decimal
from uuid import UUID

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scipy import sparse
from shop import events, model
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.exceptions import NotFittedError, UndefinedMetricWarning
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    RandomizedSearchCV,
    TimeSeriesSplit,
)

from tpu_als import DataWarning, ModelFileError, Recommender
from tpu_als.storage.npz import NpzFile, write_npz
from tpu_als.weighting import BM25Weighting, LogWeighting, TfidfWeighting

EVENTS = events()
COLUMNS = ["user", "item", "rank", "score", "reason"]


def make(**params):
    return Recommender("customer", "sku", "quantity", **{"model": model(), **params})


@pytest.fixture(scope="module")
def rec():
    return make().fit(EVENTS)


def test_matrix_is_that_of_a_groupby(rec):
    sums = EVENTS.groupby(["customer", "sku"])["quantity"].sum()
    cells = rec._state.history.all_cells()
    users = rec.users_[np.repeat(np.arange(len(rec.users_)), cells.lengths)]
    got = pd.Series(cells.values, pd.MultiIndex.from_arrays([users, rec.items_[cells.items]]))
    assert got.sort_index().tolist() == sums.sort_index().tolist()
    matrix = sparse.csr_matrix((cells.weights, cells.items, cells.indptr))
    same = model().fit(matrix, show_progress=False)
    np.testing.assert_array_equal(same.item_factors, rec.model_.item_factors)


def test_recommend_equals_the_model(rec):
    found = rec.recommend(["c03", "c00"], n=4)
    assert found.columns.tolist() == COLUMNS
    assert found["user"].tolist() == ["c03"] * 4 + ["c00"] * 4
    assert found["rank"].tolist() == [1, 2, 3, 4] * 2
    assert (found["reason"] == "model").all()
    users = rec.users_.get_indexer(["c03", "c00"])
    rows = rec._state.rows(users)
    ids, scores = rec.model_.recommend(users, rows, N=4)
    assert found["item"].tolist() == rec.items_[ids.ravel()].tolist()
    assert found["score"].tolist() == scores.ravel().tolist()


def test_everybody_without_seen_items_or_fillers(rec):
    found = rec.recommend(n=50)
    seen = set(zip(EVENTS["customer"], EVENTS["sku"], strict=True))
    pairs = set(zip(found["user"], found["item"], strict=True))
    everything = {(user, item) for user in rec.users_ for item in rec.items_}
    assert pairs == everything - seen
    assert np.isfinite(found["score"]).all() and found["score"].min() > -100
    assert len(rec.recommend(n=50, exclude_seen=False)) == len(everything)


def test_single_ids_series_and_no_users(rec):
    whole = rec.recommend(["c03"], n=2)
    for users in ("c03", pd.Series(["c03"], index=[9]), np.array(["c03"]), pd.Index(["c03"])):
        pd.testing.assert_frame_equal(rec.recommend(users, n=2), whole)
    assert rec.recommend(pl.Series(["c03"]), n=2).equals(whole)
    empty = rec.recommend([], n=2)
    assert empty.columns.tolist() == COLUMNS and not len(empty)
    assert not len(rec.recommend(["c03"], n=0))


@pytest.mark.parametrize("unknown", ["popular", "drop", "error"])
def test_unknown_users(unknown):
    rec = make(unknown=unknown).fit(EVENTS)
    if unknown == "error":
        with pytest.raises(ValueError, match="1 of 2 users have no history, such as 'nobody'"):
            rec.recommend(["c03", "nobody"])
        return
    found = rec.recommend(["nobody", "c03"], n=3)
    own = found[found["user"] == "nobody"]
    if unknown == "drop":
        assert not len(own) and len(found) == 3
        return
    likes = EVENTS.groupby("sku")["customer"].nunique()
    best = likes.sort_values(ascending=False, kind="stable")[:3]
    assert own["score"].tolist() == pytest.approx((best / len(rec.users_)).tolist())
    assert own["item"].tolist() == best.index.tolist()
    assert (own["reason"] == "popular").all() and found["user"].tolist() == ["nobody"] * 3 + [
        "c03"
    ] * 3


def test_users_of_whom_nothing_was_learnt_get_popular_items():
    dislikes = pd.DataFrame({"customer": ["sad", "sad"], "sku": ["sku00", "sku01"], "quantity": -1})
    rec = make().fit(pd.concat([EVENTS, dislikes]))
    found = rec.recommend(["sad"], n=30)
    assert (found["reason"] == "popular").all()
    assert set(found["item"]) == set(rec.items_) - {"sku00", "sku01"}


def test_exclude_and_candidates(rec):
    plain = rec.recommend(["c03", "c04"], n=20)
    best = plain.groupby("user")["item"].first().to_dict()
    listed = rec.recommend(["c03", "c04"], n=20, exclude=[best["c03"]])
    assert best["c03"] not in set(listed["item"]) and len(listed) < len(plain)
    pairs = pd.DataFrame({"customer": ["c03", "nobody"], "sku": [best["c03"], "sku00"]})
    limited = rec.recommend(["c03", "c04"], n=20, exclude=pairs)
    is_gone = (plain["user"] == "c03") & (plain["item"] == best["c03"])
    expected = plain[~is_gone].drop(columns="rank").reset_index(drop=True)
    pd.testing.assert_frame_equal(limited.drop(columns="rank"), expected)
    assert limited["rank"].tolist() == limited.groupby("user").cumcount().add(1).tolist()
    some = plain["item"].unique()[:3].tolist()
    chosen = rec.recommend(["c03", "c04"], n=20, candidates=some)
    expected = plain[plain["item"].isin(some)].drop(columns="rank").reset_index(drop=True)
    pd.testing.assert_frame_equal(chosen.drop(columns="rank"), expected)
    both = rec.recommend(["c03", "c04"], n=20, candidates=some, exclude=some[:1])
    assert set(both["item"]) == set(expected["item"]) - {some[0]}


def test_candidates_by_user_equal_the_whole_ranking(rec):
    plain = rec.recommend(["c03", "c04", "nobody"], n=20)
    rng = np.random.default_rng(0)
    pairs = pd.DataFrame(
        {"user": rng.choice(["c03", "c04"], 40), "item": rng.choice(rec.items_, 40)}
    )
    chosen = rec.recommend(["c03", "c04", "nobody"], n=20, candidates=pairs)
    wanted = set(zip(pairs["user"], pairs["item"], strict=True))
    is_wanted = [pair in wanted for pair in zip(plain["user"], plain["item"], strict=True)]
    expected = plain[is_wanted].drop(columns="rank").reset_index(drop=True)
    got = chosen.drop(columns="rank")
    pd.testing.assert_frame_equal(got.drop(columns="score"), expected.drop(columns="score"))
    np.testing.assert_allclose(got["score"], expected["score"], rtol=1e-5)
    assert len(rec.recommend(["c03"], n=1, candidates=pairs)) == 1


def test_unknown_candidates_are_reported_once(rec, tmp_path, caplog):
    """By a warning at the line of the call, and not in the log too."""
    pairs = pd.DataFrame({"user": ["c03"], "item": ["other"]})
    for call in (
        lambda: rec.recommend(["c03", "c04"], candidates=["sku19", "other"]),
        lambda: rec.recommend(["c03", "c04"], candidates=pairs),
        lambda: rec.recommend_to_parquet(tmp_path / "x", ["c03"], candidates=["sku19", "other"]),
        lambda: rec.recommend_to_parquet(tmp_path / "x", ["c03"], candidates=pairs),
        lambda: rec.recommend_for_history(["sku01"], candidates=["sku19", "other"]),
        lambda: rec.recommend_for_history(["other"]),
    ):
        with caplog.at_level(logging.DEBUG, "tpu_als"), pytest.warns(DataWarning) as found:
            call()
        line = call.__code__.co_firstlineno
        assert [(one.filename, one.lineno) for one in found] == [(__file__, line)]
    assert not caplog.records


def test_unknown_candidates_are_counted(rec):
    with pytest.warns(DataWarning, match="1 of 2 candidate items have ids that are not in"):
        found = rec.recommend(["c03"], candidates=["sku19", "other"], exclude_seen=False)
    assert found["item"].tolist() == ["sku19"]
    with pytest.warns(DataWarning, match="1 of 1 candidate pairs"):
        assert not len(
            rec.recommend("c03", candidates=pd.DataFrame({"user": ["x"], "item": ["y"]}))
        )
    with pytest.warns(DataWarning):
        assert not len(rec.recommend(["c03", "nobody"], candidates=["other"]))


def test_parameters_set_after_fit_are_checked(tmp_path):
    rec = make().fit(EVENTS)
    rec.save(tmp_path / "shop")
    before = (tmp_path / "shop").read_bytes()
    rec.set_params(unknown="nonsense")
    for call in (
        lambda: rec.recommend(["zz"]),
        lambda: rec.recommend_to_parquet(tmp_path / "x", ["c03"]),
        lambda: rec.save(tmp_path / "shop"),
    ):
        with pytest.raises(ValueError, match=r"unknown must be one of .*, got 'nonsense'"):
            call()
    assert (tmp_path / "shop").read_bytes() == before and not (tmp_path / "x").exists()


def test_min_score(rec):
    plain = rec.recommend(["c03"], n=20)
    least = plain["score"].iloc[4]
    assert len(rec.recommend(["c03"], n=20, min_score=least)) == 5
    with pytest.raises(ValueError, match="min_score must be a number"):
        rec.recommend(["c03"], min_score="high")


def test_history_of_a_stranger_equals_that_of_a_user():
    rec = make(weighting=LogWeighting()).fit(EVENTS)
    own = EVENTS[EVENTS["customer"] == "c05"]
    records = [{"item": i, "value": v} for i, v in zip(own["sku"], own["quantity"], strict=True)]
    found = rec.recommend_for_history(records, n=5)
    assert found.columns.tolist() == COLUMNS[1:]
    row = rec._state.rows(rec.users_.get_indexer(["c05"]))
    ids, scores = rec.model_.recommend(0, row, N=5, recalculate_user=True)
    assert found["item"].tolist() == rec.items_[ids].tolist()
    np.testing.assert_allclose(found["score"], scores, rtol=1e-5)
    pd.testing.assert_frame_equal(rec.recommend_for_history(own, n=5), found)
    listed = rec.recommend_for_history(own["sku"].tolist(), n=30)
    assert set(listed["item"]) == set(rec.items_) - set(own["sku"])


def test_history_of_unknown_items(rec):
    with pytest.warns(DataWarning, match="1 of 2 events of the history have items that are not"):
        found = rec.recommend_for_history([{"item": "sku00"}, {"item": "new"}], n=3)
    assert (found["reason"] == "model").all()
    with pytest.warns(DataWarning):
        assert (rec.recommend_for_history(["new"], n=3)["reason"] == "popular").all()
    assert len(rec.recommend_for_history([], n=3)) == 3
    mixed = rec.recommend_for_history([{"item": "sku00", "value": 2}, {"item": "sku01"}], n=3)
    whole = [{"item": "sku00", "value": 2}, {"item": "sku01", "value": 1}]
    pd.testing.assert_frame_equal(mixed, rec.recommend_for_history(whole, n=3))
    with pytest.raises(ValueError, match="history must have a column 'sku' or 'item'"):
        rec.recommend_for_history(pd.DataFrame({"product": ["sku00"]}))
    with pytest.raises(
        ValueError, match="history has .'qty'., which this recommender does not use"
    ):
        rec.recommend_for_history([{"item": "sku00", "qty": -500}])
    with pytest.raises(ValueError, match="history must hold the events of one user, got 30"):
        rec.recommend_for_history(EVENTS)


def test_similar_and_explain(rec):
    items = rec.similar_items(["sku00", "sku11"], n=3)
    assert items.columns.tolist() == ["item", "similar_item", "rank", "score"]
    assert items["item"].tolist() == ["sku00"] * 3 + ["sku11"] * 3
    assert not (items["item"] == items["similar_item"]).any()
    ids, scores = rec.model_.similar_items(rec.items_.get_loc("sku00"), N=4)
    assert items["similar_item"][:3].tolist() == rec.items_[ids[1:]].tolist()
    assert items["score"][:3].tolist() == scores[1:].tolist()
    users = rec.similar_users("c03", n=29)
    assert sorted(users["similar_user"]) == sorted(set(rec.users_) - {"c03"})
    why = rec.explain("c03", "sku00", n=100)
    assert why.columns.tolist() == ["item", "value", "weight", "contribution"]
    own = EVENTS[EVENTS["customer"] == "c03"].groupby("sku")["quantity"].sum()
    assert why.set_index("item")["value"].sort_index().to_dict() == own.to_dict()
    row = rec._state.rows(rec.users_.get_indexer(["c03"]))
    factors = rec.model_.recalculate_user(0, row)
    expected = factors @ rec.model_.item_factors[rec.items_.get_loc("sku00")]
    assert why["contribution"].sum() == pytest.approx(expected, rel=1e-4)
    for call in (rec.similar_items, rec.similar_users):
        with pytest.raises(ValueError, match="must be in the data of fit or update: 1 of 1"):
            call(["other"])
    with pytest.raises(TypeError, match="item must be one id, got list"):
        rec.explain("c03", ["sku00"])


def test_event_weights_half_life_and_repeated():
    frame = pd.DataFrame(
        {
            "user": ["a", "a", "a", "b"],
            "item": ["x", "x", "y", "x"],
            "kind": ["view", "buy", "dislike", "bot"],
            "day": [0, 10, 20, 20],
        }
    )
    weights = {"view": 1, "buy": 5, "dislike": -1, "bot": 0}
    params = dict(timestamp="day", event="kind", event_weights=weights, model=model())
    expected = {
        ("sum", None): [6.0, -1.0], ("last", None): [5.0, -1.0], ("max", None): [5.0, -1.0],
        ("sum", 10): [0.25 + 2.5, -1.0], ("last", 10): [2.5, -1.0], ("max", 10): [2.5, -1.0],
    }  # fmt: skip
    for (repeated, half_life), values in expected.items():
        rec = Recommender(repeated=repeated, half_life=half_life, **params).fit(frame)
        assert rec.users_.tolist() == ["a"]  # an ignored event makes no user
        assert rec._state.history.all_cells().values.tolist() == values
        later = pd.DataFrame({"user": ["a"], "item": ["x"], "kind": ["view"], "day": [30]})
        rec.update(later)
        value = {"sum": values[0] + (2 if half_life else 1), "last": 2 if half_life else 1}
        value["max"] = max(values[0], 2 if half_life else 1)
        assert rec._state.history.all_cells().values[0] == value[repeated]


def test_last_event_is_the_latest_not_the_last_row():
    frame = pd.DataFrame(
        {"user": ["a", "a", "b"], "item": ["x", "x", "y"], "v": [1, 2, 3], "t": [5, 4, 1]}
    )
    rec = Recommender(value="v", timestamp="t", repeated="last", model=model()).fit(frame)
    assert rec._state.history.all_cells().values.tolist() == [1, 3]
    rec.update(pd.DataFrame({"user": ["a"], "item": ["x"], "v": [9], "t": [3]}))
    assert rec._state.history.all_cells().values.tolist() == [1, 3]
    untimed = Recommender(value="v", repeated="last", model=model()).fit(frame)
    assert untimed._state.history.all_cells().values.tolist() == [2, 3]


@pytest.mark.parametrize("weighting", [None, LogWeighting(), TfidfWeighting()])
def test_update_equals_the_same_history(weighting):
    parts = [EVENTS[low : low + 100] for low in range(0, 400, 100)]
    rec = make(weighting=weighting).fit(parts[0])
    for part in parts[1:]:
        rec.update(part)
    fresh = make(weighting=weighting).fit(EVENTS)
    assert sorted(rec.users_) == sorted(fresh.users_)
    order = rec.users_.get_indexer(fresh.users_), rec.items_.get_indexer(fresh.items_)
    got = rec._state.history.all_cells()
    for of in ("values", "weights"):
        mine = got.matrix(len(rec.items_), of=of).toarray()[np.ix_(*order)]
        theirs = fresh._state.history.all_cells().matrix(len(fresh.items_), of=of).toarray()
        if of == "values" or not isinstance(weighting, TfidfWeighting):  # its n_items is of fit
            np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    # The users of the last events have exact factors.
    touched = rec.users_.get_indexer(parts[3]["customer"].unique())
    exact = rec.model_.recalculate_user(touched, rec._state.rows(touched))
    np.testing.assert_allclose(rec.model_.user_factors[touched], exact, rtol=1e-4, atol=1e-5)


def test_update_changes_nothing_unrelated():
    many = pd.concat([events(seed=seed) for seed in range(30)], ignore_index=True)
    rec = make().fit(many)
    before, users, items = rec.recommend(n=5), rec.users_, rec.items_
    new = pd.DataFrame({"customer": ["c03", "c99"], "sku": ["sku00", "sku01"], "quantity": 1})
    rec.update(new)
    assert rec.users_.tolist() == [*users, "c99"] and rec.items_.equals(items)
    after = rec.recommend(n=5)
    others = ~before["user"].isin(["c03"])
    pd.testing.assert_frame_equal(
        after[~after["user"].isin(["c03", "c99"])].reset_index(drop=True),
        before[others].reset_index(drop=True),
    )
    assert (rec.recommend("c99")["reason"] == "model").all()


def test_a_failed_call_changes_nothing(rec):
    rec, state = copy.deepcopy(rec), None
    state = rec._state
    bad = [
        pd.DataFrame({"customer": ["c01"], "sku": [None], "quantity": [1]}),
        pd.DataFrame({"customer": [1], "sku": ["sku00"], "quantity": [1]}),
        pd.DataFrame({"customer": ["c01"], "sku": ["sku00"], "quantity": ["x"]}),
        pd.DataFrame({"customer": ["c01"], "sku": ["sku00"]}),
    ]
    for frame in bad:
        for call in (rec.update, rec.fit):
            if call == rec.fit and frame is bad[1]:
                continue  # a fit may change the type of ids
            with pytest.raises(ValueError):
                call(frame)
            assert rec._state is state
    with pytest.raises(
        ValueError, match="column 'customer' holds numbers .such as 1., but the ids"
    ):
        rec.update(bad[1])
    with pytest.raises(ValueError, match="users holds numbers"):
        rec.recommend([1])


def test_readers_see_one_state(rec):
    """An update in one thread, and eight readers that must see it before or after."""
    rec = copy.deepcopy(rec)
    answers = {rec.recommend(["c03"], n=5).to_json()}
    twin = copy.deepcopy(rec)
    batches = [EVENTS.sample(20, random_state=seed) for seed in range(5)]
    for part in batches:
        answers.add(twin.update(part).recommend(["c03"], n=5).to_json())
    found, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            found.add(rec.recommend(["c03"], n=5).to_json())

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    for part in batches:
        rec.update(part)
    stop.set()
    for reader in readers:
        reader.join()
    assert found <= answers


@pytest.mark.parametrize("library", ["pandas", "polars", "pyarrow", "duckdb"])
def test_answers_have_the_library_of_the_events(library):
    convert = {
        "pandas": lambda frame: frame,
        "polars": pl.from_pandas,
        "pyarrow": pa.Table.from_pandas,
        "duckdb": duckdb.from_df,
    }[library]
    frame = EVENTS.drop(columns="time")
    rec = make().fit(convert(frame))
    kind = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "pyarrow": pa.Table}
    expected = make().fit(frame)
    calls = {
        "recommend": ["c03"], "similar_items": ["sku00"], "similar_users": ["c03"],
        "recommend_for_history": ["sku00"],
    }  # fmt: skip
    for name, argument in calls.items():
        got = getattr(rec, name)(argument, n=3)
        assert isinstance(got, kind.get(library, duckdb.DuckDBPyRelation)), name
        as_pandas = {"duckdb": lambda r: r.df(), "pandas": lambda f: f}.get(
            library, lambda f: f.to_pandas()
        )(got)
        pd.testing.assert_frame_equal(
            as_pandas, getattr(expected, name)(argument, n=3), check_dtype=False
        )
    rec.update(convert(frame[:20]))


def test_lazy_polars():
    frame = EVENTS.drop(columns="time")
    rec = make().fit(pl.from_pandas(frame).lazy())
    assert isinstance(rec.recommend("c03"), pl.DataFrame)


def test_files(tmp_path):
    expected = make().fit(EVENTS).recommend()
    halves = EVENTS[:200], EVENTS[200:]
    for at, half in enumerate(halves):
        half.to_csv(tmp_path / f"{at}.csv", index=False)
        half.to_parquet(tmp_path / f"{at}.parquet")
    for path in (
        str(tmp_path / "*.csv"), tmp_path / "*.parquet",
        [tmp_path / "0.csv", tmp_path / "1.parquet"],
    ):  # fmt: skip
        pd.testing.assert_frame_equal(make().fit(path).recommend(), expected)
    with pytest.raises(FileNotFoundError, match="no CSV or Parquet files at"):
        make().fit(str(tmp_path / "*.tsv"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="must be a CSV or Parquet file"):
        make().fit(tmp_path / "notes.txt")


def test_ids_in_csv_files(tmp_path):
    """Whole numbers become integers; "007" and "NA" stay what they are."""
    path = tmp_path / "events.csv"

    def ids(users, items):
        pd.DataFrame({"customer": users, "sku": items, "quantity": 1}).to_csv(path, index=False)
        fitted = make().fit(path)
        return fitted, fitted.users_.tolist(), fitted.items_.tolist()

    rec, users, items = ids(["2", "10"], ["007", "NA"])
    assert users == [2, 10] and items == ["007", "NA"]
    pd.DataFrame({"customer": [3], "sku": ["12"], "quantity": 1}).to_csv(path, index=False)
    rec.update(path)
    assert rec.users_.tolist() == [2, 10, 3] and rec.items_.tolist() == ["007", "NA", "12"]
    assert ids(["1.5", "2"], ["9" * 30, "1"])[1:] == (["1.5", "2"], ["1", "9" * 30])
    pd.DataFrame({"customer": ["1", ""], "sku": ["a", "b"], "quantity": 1}).to_csv(
        path, index=False
    )
    with pytest.raises(ValueError, match="column 'customer' must have no missing values"):
        make().fit(path)


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 2], [1.5, 0.5, 2.5], [True, False, True], [("a", 1), ("b", 2), ("a", 2)],
        pd.to_datetime(["2026-01-03", "2026-01-01", "2026-01-02"]),
        pd.to_datetime(["2026-01-03", "2026-01-01", "2026-01-02"]).tz_localize("Europe/Berlin"),
        [date(2026, 1, 3), date(2026, 1, 1), date(1, 1, 1)], [b"\xff", b"", b"a\0"],
        [Decimal(10) ** 25, Decimal(3), Decimal("-2.50")],
        [UUID(int=1 << 127), UUID(int=3), UUID(int=2)],
        ["ä\0ö", "b", "c"], ["z", "", "x"], pd.Categorical(["b", "a", "b"]),
    ],
)  # fmt: skip
def test_kinds_of_ids(ids, tmp_path):
    frame = pd.DataFrame({"user": pd.Series(ids), "item": ["x", "y", "z"]})
    rec = Recommender(model=model()).fit(frame)
    assert rec.users_.tolist() == sorted(set(frame["user"].tolist()))
    rec.save(tmp_path / "shop")
    again = Recommender.load(tmp_path / "shop")
    assert again.users_.tolist() == rec.users_.tolist()
    one = frame["user"].iloc[0]
    got = again.recommend([one], n=3)
    pd.testing.assert_frame_equal(got, rec.recommend([one], n=3))
    assert set(got["user"]) <= {one}
    again.update(frame)


@pytest.mark.parametrize(
    ("ids", "form", "wrong"),
    [
        ([UUID(int=1), UUID(int=2)], "uuids", '["1", "2"]'),
        ([Decimal(1), Decimal(2)], "decimals", '["1", "x"]'),
        ([Decimal(1), Decimal(2)], "decimals", '["1", "sNaN"]'),
        ([date(2026, 1, 1), date(2026, 1, 2)], "dates", '["2026-01-01", "2026-13-01"]'),
        ([b"a", b"b"], "bytes", '["a", "\u0100"]'),
    ],
)
def test_files_with_ids_that_are_objects(ids, form, wrong, tmp_path):
    """They have format 3, which earlier versions refuse; damaged ids are a ModelFileError."""
    rec = Recommender(model=model()).fit(pd.DataFrame({"user": ids, "item": ["x", "y"]}))
    rec.save(tmp_path / "shop")
    with open(tmp_path / "shop", "rb") as file, NpzFile(file, "shop", lambda _: True) as found:
        arrays = {key: found.read(key) for key in found.headers}
    about = arrays["recommender"].tobytes()
    assert b'"format": 3' in about and form.encode() in about
    changed = (
        {"user_ids": wrong.encode()},
        {"recommender": about.replace(form.encode(), b"x" * len(form))},
        {"recommender": about.replace(b'"format": 3', b'"format": 9')},
    )
    for parts in changed:
        given = {name: np.frombuffer(part, np.uint8) for name, part in parts.items()}
        with open(tmp_path / "shop", "wb") as file:
            write_npz(file, {**arrays, **given})
        with pytest.raises(ModelFileError):
            Recommender.load(tmp_path / "shop")


def test_save_and_load(tmp_path):
    params = dict(
        timestamp="time", event="kind", event_weights={"view": 1, "buy": 5, "dislike": -1},
        half_life="3D", repeated="last", weighting=LogWeighting(0.5), unknown="drop",
    )  # fmt: skip
    rec = make(**params).fit(EVENTS[:300])
    rec.update(EVENTS[300:350])
    rec.save(tmp_path / "shop.tpuals")
    assert [path.name for path in tmp_path.iterdir()] == ["shop.tpuals"]
    again, later = Recommender.load(tmp_path / "shop.tpuals"), events(seed=7)
    for one, other in ((rec, again), (pickle.loads(pickle.dumps(rec)), copy.deepcopy(rec))):
        pd.testing.assert_frame_equal(one.recommend(), other.recommend())
        one.update(EVENTS[350:])
        other.update(EVENTS[350:])
        pd.testing.assert_frame_equal(one.recommend(), other.recommend())
        assert one.score(later) == other.score(later) > 0
    assert (
        again.get_params()["half_life"] == "3D" and again.event_weights == params["event_weights"]
    )
    assert again.weighting.epsilon == 0.5 and again.model.factors == 4
    pd.testing.assert_frame_equal(
        clone(again).fit(EVENTS).recommend(), clone(rec).fit(EVENTS).recommend()
    )


def test_what_a_file_cannot_hold(tmp_path):
    class Halving(TransformerMixin, BaseEstimator):
        def fit(self, X, y=None):
            return self

        def transform(self, X):
            return X / 2

    rec = make(weighting=Halving()).fit(EVENTS)
    with pytest.raises(ValueError, match="transformers of tpu_als.weighting, got Halving"):
        rec.save(tmp_path / "shop")
    assert not list(tmp_path.iterdir())


def test_damaged_files(rec, tmp_path):
    """Each byte that changes something is noticed; nothing else than ModelFileError is raised."""
    path = tmp_path / "shop"
    rec.save(path)
    content = path.read_bytes()
    expected = rec.recommend()
    rng = np.random.default_rng(0)
    n_refused = 0
    for at in rng.integers(0, len(content), 150):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            again = Recommender.load(path)
        except ModelFileError:
            n_refused += 1
        else:
            pd.testing.assert_frame_equal(again.recommend(), expected)
    assert n_refused > 100
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelFileError):
        Recommender.load(path)
    rec.model_.save(tmp_path / "model.npz")
    with pytest.raises(ModelFileError, match="expected a file that Recommender.save wrote"):
        Recommender.load(tmp_path / "model.npz")
    with pytest.raises(FileNotFoundError):
        Recommender.load(tmp_path / "absent")


def test_parquet_of_everybody(rec, tmp_path):
    n_rows = rec.recommend_to_parquet(tmp_path / "all.parquet", n=4)
    found = pd.read_parquet(tmp_path / "all.parquet")
    expected = rec.recommend(n=4)
    assert len(found) == n_rows == len(expected)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    empty = tmp_path / "none.parquet"
    assert rec.recommend_to_parquet(empty, users=[]) == 0
    assert pd.read_parquet(empty).columns.tolist() == COLUMNS


def test_score_is_the_ndcg_of_new_items():
    rec = make().fit(EVENTS[:300])
    later = EVENTS[300:]
    seen = set(zip(EVENTS["customer"][:300], EVENTS["sku"][:300], strict=True))
    unseen_item = pd.DataFrame({"customer": ["c03"], "sku": ["brand new"], "quantity": [1]})
    stranger = pd.DataFrame({"customer": ["stranger"], "sku": ["sku00"], "quantity": [1]})
    later = pd.concat([later, unseen_item, stranger])
    values = []
    for user in rec.users_:
        wanted = set(later["sku"][later["customer"] == user])
        wanted -= {item for owner, item in seen if owner == user}
        if wanted:
            ranked = rec.recommend([user], n=10)["item"].tolist()
            gains = [1 / np.log2(2 + at) for at, item in enumerate(ranked) if item in wanted]
            best = sum(1 / np.log2(2 + at) for at in range(min(10, len(wanted))))
            values.append(sum(gains) / best)
    assert rec.score(later) == pytest.approx(np.mean(values), rel=1e-6)
    assert np.isnan(rec.score(EVENTS[:200]))  # no item is new
    with pytest.warns(UndefinedMetricWarning, match="no user of the 1 events has a history"):
        assert np.isnan(rec.score(stranger))


def test_the_score_of_the_events_of_fit_ranks_all_items():
    kinds = {"view": 1, "buy": 5, "dislike": -50}
    rec = make(event="kind", event_weights=kinds).fit(EVENTS)
    values = EVENTS.assign(value=EVENTS["kind"].map(kinds) * EVENTS["quantity"])
    totals = values.groupby(["customer", "sku"])["value"].sum()
    scores = []
    for user in rec.users_:
        wanted = set(totals[user].index[totals[user] > 0])
        if wanted:
            ranked = rec.recommend([user], n=10, exclude_seen=False)["item"].tolist()
            gains = [1 / np.log2(2 + at) for at, item in enumerate(ranked) if item in wanted]
            best = sum(1 / np.log2(2 + at) for at in range(min(10, len(wanted))))
            scores.append(sum(gains) / best)
    assert rec.score(EVENTS) == pytest.approx(np.mean(scores), rel=1e-6)
    more = pd.concat([EVENTS, EVENTS[:1].assign(sku="brand new")])
    assert rec.score(more) == 0  # now only what is new counts


def test_time_series_search_is_quiet_and_sees_no_later_event():
    """An item that is bought only in the last fold is never recommended before."""
    frame = EVENTS.copy()
    frame.loc[frame.index[-40:], "sku"] = "future"
    seen = []

    class Watching(Recommender):
        def fit(self, events, y=None, show_progress=None):
            seen.append((len(events), events["time"].max(), "future" in set(events["sku"])))
            return super().fit(events, y, show_progress)

        def score(self, events, y=None):
            assert events["time"].min() > seen[-1][1]
            return super().score(events, y)

    watching = Watching(
        "customer", "sku", "quantity", "time", weighting=LogWeighting(), model=model()
    )
    grid = {"model__alpha": [1, 10], "weighting__epsilon": [0.1, 1, 10]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search = GridSearchCV(watching, grid, cv=TimeSeriesSplit(5), error_score="raise").fit(frame)
    assert not any(has_future for n, _, has_future in seen if n < len(frame) - 60)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(search.best_estimator_.recommend(["c03"], n=3)) == 3
    folds = KFold(3, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GridSearchCV(make(), {"model__alpha": [1, 10]}, cv=folds, error_score="raise").fit(frame)


@pytest.mark.parametrize("cv", [2, TimeSeriesSplit(2)])
def test_a_search_over_a_path_says_that_it_needs_a_frame(cv, tmp_path):
    """scikit-learn passes the characters of the path to fit; with `error_score` it wraps errors."""
    path = tmp_path / "events.csv"
    EVENTS.to_csv(path, index=False)
    search = GridSearchCV(make(), {"unknown": ["drop"]}, cv=cv, error_score="raise")
    with pytest.raises(TypeError, match=r"divide a path into its characters. Pass them a frame"):
        search.fit(str(path))
    with pytest.raises(ValueError, match=r"divide a path into its characters. Pass them a frame"):
        search.set_params(error_score=np.nan).fit(str(path))
    with pytest.raises(TypeError, match="single characters"):
        make().fit(EVENTS).score(list("/no/such"))
    assert search.fit(pd.read_csv(path)).best_score_ > 0
    for one in (["x"], ["x", "no such.csv"]):
        with pytest.raises(FileNotFoundError, match="no CSV or Parquet files at 'x'"):
            make().fit(one)


def test_nested_parameters_without_a_model():
    rec = Recommender().set_params(model__alpha=3, item="sku")
    assert rec.model.alpha == 3 and rec.item == "sku"
    assert Recommender().model is None
    assert clone(rec).model.alpha == 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"user": None}, "user must be the name of a column, got None"),
        ({"value": 3}, "value must be the name of a column, got 3"),
        ({"item": "customer"}, "must name different columns"),
        ({"repeated": "mean"}, "repeated must be one of"),
        ({"unknown": "x"}, "unknown must be one of"),
        ({"half_life": "3D"}, "half_life='3D' needs times"),
        ({"half_life": "soon", "timestamp": "time"}, "half_life must be a duration"),
        ({"half_life": 0, "timestamp": "time"}, "half_life must be above 0"),
        ({"half_life": 3, "timestamp": "time"}, "half_life must be a duration such as '30D'"),
        ({"event": "kind"}, "event needs event_weights too"),
        ({"event_weights": {"a": 1}}, "event_weights needs event too"),
        ({"event": "kind", "event_weights": {"view": "x"}}, "must be a finite number, got 'x'"),
        ({"event": "kind", "event_weights": {"view": 1}}, "which is not a key of event_weights"),
        ({"value": "price"}, "column.* not in the frame"),
        ({"weighting": BM25Weighting(K1=-1)}, "K1 must be"),
    ],
)
def test_refused_parameters(params, message):
    rec = Recommender(**{"user": "customer", "item": "sku", "model": model(), **params})
    with pytest.raises(ValueError, match=message):
        rec.fit(EVENTS)
    with pytest.raises(NotFittedError, match="This Recommender has no data yet"):
        rec.recommend()


def test_refused_events():
    with pytest.raises(TypeError, match="model must be a TPUAlternatingLeastSquares or None"):
        make(model=LogWeighting()).fit(EVENTS)
    rec = make()
    for bad in (EVENTS["sku"], 3, None, {"a": 1}, [1, 2]):
        with pytest.raises(TypeError, match="events must be a DataFrame of pandas"):
            rec.fit(bad)
    with pytest.raises(ValueError, match="fit needs an event with a weight"):
        rec.fit(EVENTS[:0])
    fitted = make(timestamp="time").fit(EVENTS)
    with pytest.raises(ValueError, match="column 'time' holds numbers, but the data of fit hold"):
        fitted.update(EVENTS.assign(time=range(len(EVENTS))))
    with pytest.raises(ValueError, match="in row 2"):
        fitted.update(EVENTS.assign(quantity=EVENTS["quantity"].where(EVENTS.index != 2)))


def test_weighting_must_keep_entries():
    class Dropping(TransformerMixin, BaseEstimator):
        def fit(self, X, y=None):
            return self

        def transform(self, X):
            return X[:, ::2]

    with pytest.raises(ValueError, match="weighting must give a sparse matrix of the shape"):
        make(weighting=Dropping()).fit(EVENTS)


@pytest.mark.parametrize(
    "search",
    [
        "randomized",
        "halving",
        "train scores",
        "polars",
        pytest.param("parallel", marks=pytest.mark.slow),
    ],
)
def test_other_searches(search):
    grid, cv = {"model__alpha": [1, 10], "half_life": [None, "5D"]}, TimeSeriesSplit(3)
    rec, frame = make(timestamp="time"), EVENTS.drop(columns="kind")
    made = {
        "randomized": lambda: RandomizedSearchCV(rec, grid, n_iter=3, cv=cv, random_state=0),
        "halving": lambda: HalvingGridSearchCV(rec, grid, cv=cv, random_state=0),
        "train scores": lambda: GridSearchCV(rec, grid, cv=cv, return_train_score=True),
        "parallel": lambda: GridSearchCV(rec, grid, cv=cv, n_jobs=2),
        "polars": lambda: GridSearchCV(rec, grid, cv=cv),
    }[search]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.set_params(error_score="raise").fit(
            pl.from_pandas(frame) if search == "polars" else frame
        )
    assert np.isfinite(made.best_score_)
    assert len(made.best_estimator_.recommend(["c03"], n=3)) == 3


def test_broken_csv_files(tmp_path):
    """Fields that do not match the header are errors, and not other columns."""
    path = tmp_path / "events.csv"
    bad = {
        "customer,sku\nann,tea,1\nbob,milk,2\n": "cannot be read as a CSV file",
        "customer,sku\nann,tea\nbob,tea, green\n": "cannot be read as a CSV file.*line 3",
        "customer,sku,customer\nann,tea,bob\n": "has 2 columns named 'customer'",
        "customer;sku\nann;tea\n": "has no column 'customer', only",
        "": "cannot be read as a CSV file",
        'customer,sku\nann,"tea\n': "cannot be read as a CSV file",
    }
    for text, message in bad.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            Recommender("customer", "sku", model=model()).fit(path)
        assert str(path) in str(error.value)
    path.write_bytes("customer,sku\nänn,tea\n".encode("latin-1"))
    with pytest.raises(ValueError, match="in UTF-8"):
        Recommender("customer", "sku", model=model()).fit(path)
    path.write_text("\ufeffcustomer,other,sku\nann,1,tea\nbob,2,milk\n")
    assert Recommender("customer", "sku", model=model()).fit(path).users_.tolist() == ["ann", "bob"]


def test_directories_without_hidden_files(tmp_path):
    EVENTS[:300].to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "_temporary").mkdir()
    EVENTS.to_csv(tmp_path / "_temporary" / "b.csv", index=False)
    EVENTS.to_csv(tmp_path / ".c.csv", index=False)
    rec = make().fit(tmp_path)
    assert rec._state.history.all_cells().values.sum() == EVENTS["quantity"][:300].sum()


def test_integers_stay_exact():
    """Floats that are whole numbers are those integers; others are refused."""
    large = 2**60 + np.arange(20)
    rec = Recommender(model=model()).fit(pd.DataFrame({"user": large, "item": ["a", "b"] * 10}))
    rec.update(pd.DataFrame({"user": [5.0, 6.0], "item": ["a", "b"]}))
    assert rec.users_.tolist() == [*large.tolist(), 5, 6] and rec.users_.dtype == np.int64
    assert rec.recommend([5.0], exclude_seen=False)["user"].tolist() == [5.0] * 2
    with pytest.raises(ValueError, match="which is not an id of the type of the data of fit"):
        rec.update(pd.DataFrame({"user": [5.5], "item": ["a"]}))
    assert len(rec.users_) == 22
    rec.update(pd.DataFrame({"user": np.array([2**63], np.uint64), "item": ["a"]}))
    assert rec.users_.tolist() == [*large.tolist(), 5, 6, 2**63]


def test_times_of_another_zone_are_the_same_ids(tmp_path):
    times = pd.to_datetime(["2026-01-01 12:00", "2026-01-02 12:00"], utc=True)
    rec = Recommender(model=model()).fit(pd.DataFrame({"user": times, "item": ["a", "b"]}))
    berlin = times.append(times[:1] + pd.Timedelta("9D")).tz_convert("Europe/Berlin")
    rec.update(pd.DataFrame({"user": berlin, "item": ["a", "b", "a"]}))
    assert rec.users_.tolist() == berlin.tolist() and str(rec.users_.tz) == "UTC"
    rec.save(tmp_path / "shop")
    assert Recommender.load(tmp_path / "shop").users_.equals(rec.users_)


def test_limits_of_unknown_users(rec):
    every = pd.DataFrame({"user": "nobody", "item": rec.items_[:-1]})
    found = rec.recommend(["nobody", "c03"], n=50, exclude=every)
    assert found["item"][found["user"] == "nobody"].tolist() == [rec.items_[-1]]
    assert len(found) == 1 + len(rec.recommend(["c03"], n=50))
    some = pd.DataFrame({"user": ["nobody"], "item": ["sku05"]})
    assert rec.recommend(["c03", "nobody"], candidates=some)["item"].tolist() == ["sku05"]


@pytest.mark.parametrize("convert", [pa.Table.from_pandas, pl.from_pandas, duckdb.from_df])
def test_limits_and_histories_in_other_frames(rec, convert):
    pairs = pd.DataFrame({"customer": ["c03"], "sku": [rec.recommend(["c03"], n=1)["item"][0]]})
    expected = rec.recommend(["c03"], n=3, exclude=pairs)
    pd.testing.assert_frame_equal(rec.recommend(["c03"], n=3, exclude=convert(pairs)), expected)
    own = EVENTS[["sku", "quantity"]][:5]
    pd.testing.assert_frame_equal(
        rec.recommend_for_history(convert(own), n=3), rec.recommend_for_history(own, n=3)
    )


def test_ids_in_a_column_of_pyarrow(rec):
    column = pa.chunked_array([["c03", "c04"]])
    pd.testing.assert_frame_equal(rec.recommend(column), rec.recommend(["c03", "c04"]))


def test_times_of_all_years(tmp_path):
    """9999-12-31 is later than today, and not an overflow."""
    frame = pd.DataFrame({"user": ["a", "a", "b"], "item": ["x", "x", "y"], "v": [1, 2, 3]}).assign(
        t=np.array(["9999-12-31", "2026-01-01", "1200-01-01"], "datetime64[s]")
    )
    rec = Recommender(value="v", timestamp="t", repeated="last", model=model()).fit(frame)
    assert rec._state.history.all_cells().values.tolist() == [1, 3]
    users = Recommender("t", "item", model=model()).fit(frame)
    users.save(tmp_path / "shop")
    assert Recommender.load(tmp_path / "shop").users_.equals(users.users_)


def test_quiet_days_and_short_half_lives(tmp_path):
    rec = make(timestamp="time", half_life="1h", model=model()).fit(EVENTS[:200])
    state = rec._state
    rec.update(EVENTS[:0])
    assert rec._state is state
    with pytest.warns(UndefinedMetricWarning):
        assert np.isnan(rec.score(EVENTS[:0]))
    late = EVENTS[200:].assign(time=EVENTS["time"][200:] + pd.Timedelta("900D"))
    assert rec.score(late) > 0
    with pytest.raises(ValueError, match="beyond float32"):
        rec.update(late)
    numbers = EVENTS.assign(time=np.arange(len(EVENTS)))
    for half_life in (np.int64(100), np.float32(100)):
        timed = make(timestamp="time", half_life=half_life).fit(numbers)
        timed.save(tmp_path / "shop")
        again = Recommender.load(tmp_path / "shop")
        assert again.half_life == 100
        for one in (timed, again):
            one.update(numbers[:5])
        pd.testing.assert_frame_equal(again.recommend(), timed.recommend())


def test_the_columns_are_those_of_fit():
    """Parameters that are changed after a fit have an effect from the next fit on."""
    rec = make().fit(EVENTS[:200])
    twin = copy.deepcopy(rec).set_params(timestamp="time", half_life="1h", value=None)
    rec.update(EVENTS[200:])
    twin.update(EVENTS[200:])
    pd.testing.assert_frame_equal(rec.recommend(), twin.recommend())


def test_neighbours_beside_items_without_factors():
    frame = pd.concat(
        [
            EVENTS,
            pd.DataFrame({"customer": "c01", "sku": ["bad0", "bad1", "bad2"], "quantity": -1}),
        ]
    )
    rec = make().fit(frame)
    table = rec.model_.item_factors.copy()
    table[rec.items_.get_indexer(["bad0", "bad1", "bad2"])] = 0
    rec.model_.item_factors = table
    for n in (3, 18, 19, 50):
        found = rec.similar_items(["sku00"], n=n)
        assert len(found) == min(n, 19) and not found["similar_item"].str.startswith("bad").any()
    assert not len(rec.similar_items(["bad0"], n=3))


def test_parquet_whose_first_block_is_empty(rec, tmp_path, monkeypatch):
    monkeypatch.setattr("tpu_als.recommender.ranking._BLOCK", 4)
    pairs = pd.DataFrame({"user": ["c20", "c25"], "item": ["sku00", "sku01"]})
    limits = dict(candidates=pairs, exclude_seen=False)
    assert rec.recommend_to_parquet(tmp_path / "some.parquet", **limits) == 2
    found = pd.read_parquet(tmp_path / "some.parquet")
    pd.testing.assert_frame_equal(found, rec.recommend(**limits), check_dtype=False)


@pytest.mark.parametrize("convert", [pa.Table.from_pandas, pl.from_pandas])
def test_empty_answers_have_types(convert):
    rec = make().fit(convert(EVENTS.drop(columns="time")))
    some, none = rec.recommend(["c03"], n=2), rec.recommend(["c03"], n=2, min_score=1e9)
    assert len(some) == 2 and not len(none)
    both = [one if isinstance(one, pa.Table) else one.to_arrow() for one in (some, none)]
    assert pa.concat_tables(both, promote_options="none").num_rows == 2
