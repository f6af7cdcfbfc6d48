"""`Recommender` with frames of features of items and users."""

from __future__ import annotations

import json
import logging
import pickle
import warnings

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from shop import events, model
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from tpu_als import DataWarning, ModelFileError, Recommender, tune
from tpu_als.recommender import saving
from tpu_als.weighting import BM25Weighting, LogWeighting, TfidfWeighting

EVENTS = events()
ITEMS = pd.DataFrame(
    {
        "sku": [f"sku{item:02d}" for item in range(24)],
        "group": ["low"] * 10 + ["high"] * 10 + ["low", "high"] * 2,
        "price": np.arange(24) % 5 + 1.0,
    }
)
USERS = pd.DataFrame(
    {
        "customer": [f"c{user:02d}" for user in range(34)],
        "parity": ["even", "odd"] * 17,
    }
)
COLUMNS = ["kind", "item", "feature", "value", "weight", "contribution"]


def make(**params):
    own = {"model": model(), "item_features": ITEMS, "user_features": USERS}
    return Recommender("customer", "sku", "quantity", **{**own, **params})


@pytest.fixture(scope="module")
def rec():
    return make().fit(EVENTS)


def test_the_model_gets_encoded_features(rec):
    """As ColumnTransformer, OneHotEncoder and StandardScaler give them, for the rows of the ids."""
    encode = ColumnTransformer(
        [("a", OneHotEncoder(), ["group"]), ("b", StandardScaler(), ["price"])]
    )
    table = encode.fit_transform(ITEMS)
    order = pd.Index(ITEMS["sku"]).get_indexer(rec.items_)
    rows = rec.model_.item_features_
    np.testing.assert_allclose(rows.toarray(), table[order], rtol=1e-6)
    assert rec.model_.item_feature_names_in_.tolist() == ["group=high", "group=low", "price"]
    assert rec.items_.tolist() == [f"sku{item:02d}" for item in range(24)]  # the last 4 are new
    matrix = rec._state.rows(np.arange(34))
    same = model().fit(matrix, item_features=rows, user_features=rec.model_.user_features_)
    np.testing.assert_array_equal(same.item_factors, rec.model_.item_factors)


def test_new_items_are_recommended_by_their_features(rec):
    found = rec.recommend(["c02", "c03"], n=24)
    new = found[found["item"] > "sku19"]
    assert (new["reason"] == "features").all() and len(new) == 8
    assert (found["reason"][found["item"] <= "sku19"] == "model").all()
    ranks = new.set_index(["user", "item"])["rank"]
    assert ranks["c02", "sku20"] < ranks["c02", "sku21"]  # even users buy from "low"
    assert ranks["c03", "sku21"] < ranks["c03", "sku20"]
    alike = rec.similar_items("sku20", n=3)["similar_item"].tolist()
    assert len(alike) == 3 and all(ITEMS.set_index("sku")["group"][one] == "low" for one in alike)


def test_users_without_events(rec):
    found = rec.recommend(["c32", "c33", "nobody"], n=24)
    parts = dict(list(found.groupby("user")))
    assert (parts["c32"]["reason"] == "features").all() and len(parts["c32"]) == 24
    assert (parts["nobody"]["reason"] == "popular").all()
    group = ITEMS.set_index("sku")["group"]
    assert group[parts["c32"]["item"].iloc[0]] == "low"
    assert group[parts["c33"]["item"].iloc[0]] == "high"
    likes = EVENTS.groupby("sku")["customer"].nunique().max()
    assert parts["nobody"]["score"].iloc[0] == pytest.approx(likes / EVENTS["customer"].nunique())
    assert set(rec.recommend(n=1)["user"]) == set(EVENTS["customer"])  # None is those with events
    assert len(rec.similar_users("c32", n=2)) == 2
    pairs = pd.DataFrame({"user": ["c32", "c32"], "item": ["sku00", "sku22"]})
    assert (rec.recommend("c32", candidates=pairs)["reason"] == "features").all()
    assert len(make(unknown="drop").fit(EVENTS).recommend(["c32", "nobody"], n=1)) == 1
    with pytest.raises(ValueError, match="1 of 2 users have no history, such as 'nobody'"):
        make(unknown="error").fit(EVENTS).recommend(["c32", "nobody"])


def test_without_user_features_new_users_get_popular_items():
    rec = make(user_features=None).fit(EVENTS)
    found = rec.recommend(["c32"], n=24)
    assert (found["reason"] == "popular").all() and found["item"].max() <= "sku19"
    some = USERS[USERS["customer"] != "c31"].assign(
        parity=lambda f: f["parity"].where(f.index < 32)
    )
    rec = make(user_features=some).fit(EVENTS)
    assert (rec.recommend(["c32"])["reason"] == "popular").all()  # its only feature is missing


def test_recommend_for_history(rec):
    def best(**given):
        found = rec.recommend_for_history([], n=1, **given)
        return found["item"].iloc[0], found["reason"].iloc[0]

    assert best(user_features={"parity": "even"}) == (best_of(rec, "c32"), "features")
    assert best(user_features=USERS[33:]) == (best_of(rec, "c33"), "features")
    assert best()[1] == best(user_features={})[1] == best(user_features={"parity": None})[1]
    assert best()[1] == "popular"
    own = EVENTS[EVENTS["customer"] == "c05"]
    found = rec.recommend_for_history(own, n=5, user_features={"parity": "odd"})
    row = rec._state.rows(rec.users_.get_indexer(["c05"]))
    ids, scores = rec.model_.recommend(
        5, row, N=5, recalculate_user=True, user_features=rec.model_.user_features_[[5]]
    )
    assert found["item"].tolist() == rec.items_[ids].tolist()
    np.testing.assert_allclose(found["score"], scores, rtol=1e-5)
    for wrong, message in (
        ({"partiy": "odd"}, r"has \['partiy'\], which is not among those of fit: \['parity'\]"),
        (USERS, "must be the features of one user, got 34 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            rec.recommend_for_history([], user_features=wrong)
    with pytest.raises(TypeError, match="user_features must be a DataFrame"):
        rec.recommend_for_history([], user_features=3)
    with pytest.raises(ValueError, match="the recommender was fitted without"):
        make(user_features=None).fit(EVENTS).recommend_for_history([], user_features={})


def best_of(rec, user):
    return rec.recommend([user], n=1)["item"].iloc[0]


def test_explain_splits_the_score(rec):
    why = rec.explain("c03", "sku12", n=100)
    assert why.columns.tolist() == COLUMNS
    row = rec._state.rows(rec.users_.get_indexer(["c03"]))
    own = rec.model_.user_features_[[3]]
    score = rec.model_.recalculate_user(3, row, user_features=own) @ rec.model_.item_factors[12]
    parts = why.groupby("kind")["contribution"].sum()
    assert parts["history"] + parts["user feature"] == pytest.approx(score, rel=1e-4)
    assert parts["item feature"] + parts["item events"] == pytest.approx(score, rel=1e-4)
    own = EVENTS[EVENTS["customer"] == "c03"].groupby("sku")["quantity"].sum()
    assert (
        why[why["kind"] == "history"].set_index("item")["value"].sort_index().to_dict()
        == own.to_dict()
    )
    assert set(why["feature"].dropna()) == {"parity=odd", "group=high", "price"}
    cold = rec.explain("c32", "sku20")
    assert set(cold["kind"]) == {"user feature", "item feature"} and cold["item"].isna().all()
    assert len(rec.explain("c03", "sku12", n=1)) == 4
    one_side = make(user_features=None).fit(EVENTS).explain("c03", "sku12", n=100)
    assert set(one_side["kind"]) == {"history", "item feature", "item events"}
    sums = one_side.groupby("kind")["contribution"].sum()
    assert sums["history"] == pytest.approx(sums["item feature"] + sums["item events"])
    plain = make(item_features=None, user_features=None).fit(EVENTS).explain("c03", "sku12")
    assert plain.columns.tolist() == ["item", "value", "weight", "contribution"]


def test_an_id_without_a_row_has_zeros(caplog):
    some = ITEMS[ITEMS["sku"] != "sku03"]
    with caplog.at_level(logging.INFO, "tpu_als"):
        rec = make(item_features=some, user_features=None).fit(EVENTS)
    assert (
        "1 of 20 items with events have no row in item_features: their features are 0"
        in caplog.text
    )
    at = rec.items_.get_loc("sku03")
    assert not rec.model_.item_features_[at].nnz
    assert rec.model_.item_factors[at].any()
    others = ITEMS.assign(sku="other " + ITEMS["sku"])
    caplog.clear()
    message = "20 of 20 items with events have no row in item_features"
    with caplog.at_level(logging.INFO, "tpu_als"), pytest.warns(DataWarning, match=message):
        make(item_features=others).fit(EVENTS)
    assert message not in caplog.text  # reported once


def test_what_is_missing_says_nothing():
    """Missing values and new categories are zeros; so is a number that is missing, or constant."""
    frame = ITEMS.assign(
        group=ITEMS["group"].where(ITEMS.index != 1),
        price=ITEMS["price"].where(ITEMS.index != 2),
        organic=[True, None, False] * 8,
        size=pd.Categorical([1, 2, None] * 8),
        constant=7,
        empty=None,
    )
    rec = make(item_features=frame, user_features=None).fit(EVENTS)
    names = ["group=high", "group=low", "organic=False", "organic=True", "size=1", "size=2"]
    assert rec.model_.item_feature_names_in_.tolist() == [*names, "price", "constant"]
    rows = rec.model_.item_features_.toarray()
    mean, deviation = frame["price"].mean(), frame["price"].std(ddof=0)
    assert rows[1, :6].tolist() == [0, 0, 0, 0, 0, 1]
    assert rows[2].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert rows[0, 6] == pytest.approx((frame["price"][0] - mean) / deviation, rel=1e-6)
    new = pd.DataFrame(
        {"sku": ["new"], "group": ["middle"], "price": [None], "organic": [True], "size": [2.0],
         "constant": [np.nan], "empty": ["now known"], "more": [1]}
    )  # fmt: skip
    rec.update(item_features=new)
    assert rec.model_.item_features_[-1].toarray()[0].tolist() == [
        0,
        0,
        0,
        1,
        0,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize("library", ["polars", "lazy", "pyarrow", "nullable", "category"])
def test_frames_of_other_libraries(rec, library):
    convert = {
        "polars": pl.from_pandas,
        "lazy": lambda frame: pl.from_pandas(frame).lazy(),
        "pyarrow": pa.Table.from_pandas,
        "nullable": lambda frame: frame.convert_dtypes(),
        "category": lambda frame: frame.astype(
            dict.fromkeys(frame.select_dtypes(exclude="number"), "category")
        ),
    }[library]
    made = make(item_features=convert(ITEMS), user_features=convert(USERS))
    pd.testing.assert_frame_equal(clone(made).fit(EVENTS).recommend(), rec.recommend())
    new = pd.DataFrame({"sku": ["new"], "group": ["low"], "price": [2]})
    made.fit(EVENTS).update(item_features=convert(new))
    assert made.items_[-1] == "new"


def test_integer_ids():
    numbers = EVENTS.assign(sku=EVENTS["sku"].str[3:].astype(int))
    frame = ITEMS.assign(sku=ITEMS["sku"].str[3:].astype(int))
    rec = make(item_features=frame).fit(numbers)
    assert rec.items_.tolist() == list(range(24))
    why = rec.explain("c03", 12)
    assert why["item"].dropna().map(type).eq(int).all()
    assert rec.explain("c03", 22, n=1)["item"].tolist()[0] in set(range(20))


def test_update_with_features(rec):
    rec = pickle.loads(pickle.dumps(rec))
    before = rec.recommend(["c02"], n=24).set_index("item")["score"]
    new = pd.DataFrame({"sku": ["new", "sku00"], "group": ["low", "high"], "price": [1.0, 5.0]})
    rec.update(item_features=new)
    assert rec.items_[-1] == "new" and len(rec.items_) == 25
    weights = rec.model_.item_feature_weights_
    rows = rec.model_.item_features_
    np.testing.assert_allclose(rec.model_.item_factors[24], (rows[[24]] @ weights)[0], rtol=1e-5)
    assert rows[0, :2].toarray()[0].tolist() == [1, 0]
    found = rec.recommend(["c02"], n=25).set_index("item")
    assert found["reason"]["new"] == "features"
    others = before.drop("sku00", errors="ignore")
    pd.testing.assert_series_equal(found["score"][others.index], others)
    users = pd.DataFrame({"customer": ["x", "y"], "parity": ["odd", "even"]})
    bought = pd.DataFrame({"customer": ["y", "z"], "sku": ["new", "unheard"], "quantity": 1})
    rec.update(bought, user_features=users)
    assert rec.users_[-3:].tolist() == ["y", "z", "x"] and rec.items_[-1] == "unheard"
    reasons = rec.recommend(["x", "y", "z"], n=3).groupby("user")["reason"].agg(set)
    assert reasons["x"] == {"features"} and "model" in reasons["y"]
    assert rec.recommend(["c02"], n=26).set_index("item")["reason"]["new"] == "model"
    at = rec.users_.get_indexer(["y"])
    own = rec.model_.user_features_[at]
    exact = rec.model_.recalculate_user(at, rec._state.rows(at), user_features=own)
    np.testing.assert_allclose(rec.model_.user_factors[at], exact, rtol=1e-4)


def test_refused_updates(rec):
    state = rec._state
    for frame, error, message in (
        (ITEMS.drop(columns="price"), ValueError, "item_features has no column 'price', which"),
        (
            ITEMS.assign(price="dear"),
            ValueError,
            "'price' of item_features holds text, but held numbers",
        ),
        (
            ITEMS.assign(sku=1),
            ValueError,
            "holds numbers .such as 1., but the ids of the data of fit are",
        ),
        (ITEMS[:0], ValueError, "item_features must have rows"),
        (
            "items.csv",
            TypeError,
            "item_features must be a DataFrame of pandas, polars or PyArrow, got",
        ),
    ):
        with pytest.raises(error, match=message):
            rec.update(EVENTS[:3], item_features=frame)
        assert rec._state is state
    with pytest.raises(ValueError, match="update needs events or features, got none"):
        rec.update()
    with pytest.raises(ValueError, match="item_features was given, but the recommender was fitted"):
        make(item_features=None).fit(EVENTS).update(item_features=ITEMS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: pd.concat([f, f[3:4]]), "row for each id, got 'sku03' more than once"),
        (lambda f: f.assign(sku=range(24)), "column 'sku' of item_features holds numbers .such as"),
        (lambda f: f.rename(columns={"sku": "id"}), "item_features: column 'sku' is not in the"),
        (lambda f: f.set_index("sku"), r"in the index: pass item_features.reset_index\(\)"),
        (lambda f: f.assign(sku=f["sku"].where(f.index != 4)), "'sku' must have no missing"),
        (lambda f: f[:0], r"item_features must have rows, and .* beside 'sku', got .*\(0, 3\)"),
        (lambda f: f[["sku"]], r"must have rows, and columns beside 'sku', got shape \(24, 1\)"),
        (lambda f: f.assign(group=None, price=np.nan), "item_features has no values: all of"),
        (lambda f: f.assign(price=np.inf), "item_features: column 'price' holds inf .float. in"),
        (
            lambda f: f.assign(day=pd.Timestamp("2026")),
            "'day' of item_features holds times without",
        ),
        (lambda f: f.assign(tags=[["a"]] * 24), "'tags' of item_features holds .*be hashed"),
        (lambda f: f.assign(group=["a", 1] * 12), "'group' of item_features holds values of diff"),
        (lambda f: f.rename(columns={"price": 3}), "columns with text as names, each once"),
        (lambda f: f.rename(columns={"price": "group"}), "columns with text as names, each once"),
        (lambda f: f.to_numpy(), "must be a DataFrame of pandas, polars or PyArrow, got ndarray"),
        (duckdb.from_df, "got DuckDBPyRelation: convert or read it first"),
    ],
)
def test_refused_frames(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(item_features=change(ITEMS)).fit(EVENTS)


def _is_odd(frame):
    return frame == "odd"


def test_own_encoder(tmp_path):
    words = ColumnTransformer([("words", CountVectorizer(), "group")])
    rec = make(item_encoder=words, user_encoder=make_pipeline(FunctionTransformer(_is_odd)))
    assert rec.get_params()["item_encoder__words__binary"] is False
    rec.set_params(item_encoder__words__binary=True)
    fitted = clone(rec).fit(EVENTS)
    assert fitted.model_.item_feature_names_in_.tolist() == ["words__high", "words__low"]
    assert fitted.model_.user_feature_names_in_.tolist() == ["parity"]
    assert fitted.item_encoder.get_params()["words__binary"] is True
    assert not hasattr(fitted.item_encoder, "transformers_")  # it was cloned
    fitted.update(item_features=pd.DataFrame({"sku": ["new"], "group": ["low"], "price": [1]}))
    assert fitted.model_.item_features_[-1].toarray()[0].tolist() == [0, 1]
    with pytest.warns(DataWarning, match="a file cannot hold .*_encoder") as record:
        fitted.save(tmp_path / "shop")
    assert {str(one.filename) for one in record} == {__file__}
    again = Recommender.load(tmp_path / "shop")
    pd.testing.assert_frame_equal(again.recommend(n=25), fitted.recommend(n=25))
    again.update(EVENTS[:20])
    with pytest.raises(ValueError, match="the encoder of fit is not one of this package, so the"):
        again.update(item_features=ITEMS)
    with pytest.raises(ValueError, match="user_features cannot be encoded"):
        again.recommend_for_history([], user_features={"parity": "odd"})


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("one-hot", "encoder of item_features must be a transformer of .*, got str"),
        (FunctionTransformer(lambda f: f), "must hold numbers, but column 'group'"),
        (FunctionTransformer(lambda f: np.ones((3, 1))), "a row for each of the 24 rows, got 3"),
        (FunctionTransformer(lambda f: f[["price"]] * np.nan), "features must hold finite numbers"),
    ],
)
def test_refused_encoders(encoder, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(item_encoder=encoder).fit(EVENTS)
    with pytest.raises(ValueError, match="item_encoder needs item_features, got None"):
        make(item_features=None, item_encoder=encoder).fit(EVENTS)


def test_save_and_load(rec, tmp_path):
    rec = pickle.loads(pickle.dumps(rec))
    rec.save(tmp_path / "shop")
    again = Recommender.load(tmp_path / "shop")
    new = pd.DataFrame({"sku": ["new"], "group": ["low"], "price": [1.7]})
    for one in (rec, again):
        one.update(EVENTS[:50], item_features=new, user_features=USERS[5:6])
    everybody = rec.users_.tolist()
    pd.testing.assert_frame_equal(again.recommend(everybody), rec.recommend(everybody))
    pd.testing.assert_frame_equal(again.explain("c03", "new"), rec.explain("c03", "new"))
    assert again.item_features is None
    with pytest.warns(DataWarning, match="last fit used item_features, but this parameter is None"):
        again.set_params(user_features=USERS).fit(EVENTS)
    assert again._state.encoders.keys() == {"user"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.set_params(item_features=ITEMS).fit(EVENTS)
    pd.testing.assert_frame_equal(again.recommend(), make().fit(EVENTS).recommend())


def test_formats_of_files(rec, tmp_path):
    """Files without features keep format 1, which earlier versions read."""
    plain = make(item_features=None, user_features=None).fit(EVENTS)
    for one, number in ((plain, b'"format": 1'), (rec, b'"format": 2')):
        one.save(tmp_path / "shop")
        with np.load(tmp_path / "shop") as file:
            assert number in file["recommender"].tobytes()
    saving_format, saving.FORMAT = saving.FORMAT, 1
    try:
        with pytest.raises(ModelFileError, match="format 2 is later than 1"):
            Recommender.load(tmp_path / "shop")
    finally:
        saving.FORMAT = saving_format


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.pop("encoders"), "features of users in the model or the encoders"),
        (lambda about: about["encoders"]["item"][1]["group"].pop(), "2 features of items, but 3"),
        (lambda about: about["encoders"]["item"][0].pop(), "damaged"),
        (lambda about: about.update(weighting=["Real", {}, []]), "weighting 'Real'"),
    ],
)  # fmt: skip
def test_changed_files(rec, tmp_path, change, message):
    rec.save(tmp_path / "shop")
    with np.load(tmp_path / "shop") as file:
        arrays = dict(file)
    about = json.loads(arrays["recommender"].tobytes())
    change(about)
    arrays["recommender"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with open(tmp_path / "shop", "wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ModelFileError, match=message):
        Recommender.load(tmp_path / "shop")


def test_score_counts_users_with_a_history(rec):
    """Scores with and without features are of the same users, and so comparable."""
    found = rec.recommend(n=10)
    by_features = found[found["reason"] == "features"].iloc[0]
    bought = pd.DataFrame({"customer": "c32", "sku": ["sku00", by_features["item"]], "quantity": 1})
    bought.loc[1, "customer"] = by_features["user"]
    expected = 1 / np.log2(1 + by_features["rank"])
    assert rec.score(bought[1:]) == rec.score(bought) == pytest.approx(expected)
    assert make(item_features=None, user_features=None).fit(EVENTS).score(bought) == 0
    with pytest.warns(UndefinedMetricWarning):
        assert np.isnan(rec.score(bought[:1]))


def test_searches(rec):
    grid = {"model__feature_weight": [1, 4], "item_features": [None, ITEMS]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Some versions of pandas, whose attributes scikit-learn's check of parameters reads.
        warnings.filterwarnings("ignore", "DataFrame._data", DeprecationWarning)
        search = GridSearchCV(rec, grid, cv=TimeSeriesSplit(3), error_score="raise").fit(EVENTS)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and len(set(scores)) == 4


@pytest.mark.parametrize("timestamp", [None, "time"])
def test_tune(timestamp):
    shop = make(timestamp=timestamp)
    found = tune(
        EVENTS, recommender=shop, budget=None, n_candidates=3, max_factors=8, k=5, random_state=0
    )
    assert set(found.estimator.recommend(["c32"])["reason"]) == {"features"}
    assert "item_features=item_features, user_features=user_features" in found.code
    again = Recommender(**found.estimator.get_params(deep=False)).fit(EVENTS)
    pd.testing.assert_frame_equal(again.recommend(), found.estimator.recommend())


@pytest.mark.parametrize("library", ["polars", "pyarrow", "duckdb"])
def test_explanations_in_other_libraries(rec, library):
    own = duckdb.connect()
    own.register("events", EVENTS)
    made = {
        "polars": lambda: pl.from_pandas(EVENTS),
        "pyarrow": lambda: pa.Table.from_pandas(EVENTS),
        "duckdb": lambda: own.sql("from events"),
    }
    found = make().fit(made[library]()).explain("c03", "sku21")
    columns = found.columns
    names = found.column_names if library == "pyarrow" else list(columns)
    assert names == COLUMNS


@pytest.mark.parametrize("weighting", [LogWeighting(), TfidfWeighting(), BM25Weighting()], ids=str)
def test_items_without_events_do_not_change_weights(weighting):
    """Nor do they stop an update that has features only."""
    plain = make(weighting=weighting, item_features=None, user_features=None).fit(EVENTS)
    found = make(weighting=weighting).fit(EVENTS)
    n_users, n_items = len(plain.users_), len(plain.items_)
    expected = plain._state.rows(np.arange(n_users))
    got = found._state.rows(np.arange(n_users))
    np.testing.assert_array_equal(got.toarray()[:, :n_items], expected.toarray())
    row = ITEMS[ITEMS["sku"] == "sku22"].assign(group="low")
    found.update(item_features=row)
    found.update(EVENTS.head(3))
    history = [{"item": "sku01", "value": 2}]
    with_new, without = (
        ranked.recommend_for_history(
            history, **({"user_features": {"parity": "odd"}} if ranked is found else {})
        )
        for ranked in (found, plain)
    )
    assert len(with_new) and len(without)


def test_an_encoder_that_makes_other_features_later():
    dummies = FunctionTransformer(pd.get_dummies)
    own = make(item_features=ITEMS[["sku", "group"]], item_encoder=dummies).fit(EVENTS)
    before = own.model_.item_factors.copy()
    for groups in (["new", "newer"], ["low", "mid", "high"]):
        frame = pd.DataFrame({"sku": [f"x{at}" for at in range(len(groups))], "group": groups})
        with pytest.raises(ValueError, match="the encoded item_features must have"):
            own.update(item_features=frame)
    np.testing.assert_array_equal(own.model_.item_factors, before)


def test_a_fit_after_load_says_that_the_encoder_is_lost(tmp_path):
    own = make(item_encoder=OneHotEncoder(handle_unknown="ignore")).fit(EVENTS)
    with pytest.warns(DataWarning, match="cannot hold item_encoder"):
        own.save(tmp_path / "shop")
    again = Recommender.load(tmp_path / "shop").set_params(item_features=ITEMS, user_features=USERS)
    with pytest.warns(DataWarning, match="used a item_encoder, which load does not restore"):
        again.fit(EVENTS)


def test_items_of_which_nothing_is_known_are_not_recommended():
    more = pd.concat([ITEMS, pd.DataFrame({"sku": ["blank"]})])
    found = make(item_features=more).fit(EVENTS)
    assert "blank" in set(found.items_)
    ranked = found.recommend(["c02", "c33"], n=30)
    assert "blank" not in set(ranked["item"]) and "sku22" in set(ranked["item"])
    assert not len(found.recommend(["c02"], candidates=["blank"]))


def test_names_of_features_that_collide_or_need_escapes(tmp_path):
    frame = ITEMS[["sku"]].assign(**{"a": "b=c", "a=b": "c"})
    with pytest.raises(ValueError, match="two columns of item_features make a feature 'a=b=c'"):
        make(item_features=frame).fit(EVENTS)
    odd = ITEMS[["sku"]].assign(group=["a\0", "b"] * 12)
    found = make(item_features=odd).fit(EVENTS)
    assert found.model_.item_feature_names_in_.tolist() == ["group=a\\0", "group=b"]
    found.save(tmp_path / "odd")
    again = Recommender.load(tmp_path / "odd")
    pd.testing.assert_frame_equal(again.recommend(["c02"]), found.recommend(["c02"]))
