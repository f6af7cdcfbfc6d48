"""The estimator with features of users and items, against the dense oracle and scikit-learn."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import feature_oracle
import numpy as np
import oracle
import pandas as pd
import pytest
import sklearn
from matrices import random_counts
from scipy import sparse
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline

from tpu_als import FeatureTable, RecommenderPipeline, ServedModel, TPUAlternatingLeastSquares
from tpu_als.evaluation import make_ranking_scorer
from tpu_als.exceptions import ModelFileError
from tpu_als.implicit_api import new_rows
from tpu_als.storage import model_file
from tpu_als.validation import features
from tpu_als.weighting import LogWeighting

OBJECTIVE = oracle.Objective("ials", 0.05, 1.5, 0.4)
SETTINGS: dict[str, Any] = {
    "objective": "ials", "regularization": 0.05, "alpha": 1.5, "unobserved_weight": 0.4,
    "factors": 4, "iterations": 3, "dtype": np.float64, "linear_solver": "exact",
    "random_state": 0, "feature_regularization": 0.7, "feature_weight": 1.5, "verbose": False,
}  # fmt: skip
DEVICES = [{}, {"use_native": False}, {"devices": 2}, {"devices": 4, "table_layout": "sharded"}]


def _matrix() -> sparse.csr_matrix:
    dense = random_counts(30, 20, density=0.3, seed=5).toarray()
    dense[[7, 21]], dense[:, [4, 11]] = 0, 0
    return sparse.csr_matrix(dense)


MATRIX = _matrix()
RNG = np.random.default_rng(0)
USERS = sparse.csr_matrix(RNG.normal(size=(30, 5)) * (RNG.random((30, 5)) < 0.5))
ITEMS = sparse.csr_matrix(RNG.normal(size=(20, 6)) * (RNG.random((20, 6)) < 0.5))
NAMES = np.array([f"kind {number}" for number in range(6)])
BOTH = {"user_features": USERS, "item_features": ITEMS}


def _fitted(**changes: Any) -> TPUAlternatingLeastSquares:
    model = TPUAlternatingLeastSquares(**{**SETTINGS, **changes})
    return model.fit(MATRIX, **BOTH)


@pytest.fixture(scope="module")
def model() -> TPUAlternatingLeastSquares:
    return _fitted()


def _expected() -> tuple[np.ndarray, ...]:
    """Tables and weights of the oracle."""
    rng = np.random.default_rng(0)
    scale = 0.1 / np.sqrt(4)
    users, items = (rng.standard_normal((n, 4)) * scale for n in (30, 20))
    of_users = feature_oracle.Features(USERS.toarray(), 0.7, 1.5)
    of_items = feature_oracle.Features(ITEMS.toarray(), 0.7, 1.5)
    for _ in range(3):
        users = feature_oracle.half_epoch(MATRIX, users, items, OBJECTIVE, of_users)
        items = feature_oracle.half_epoch(MATRIX.T, items, users, OBJECTIVE, of_items)
    user_weights = feature_oracle.best_weights(MATRIX, users, OBJECTIVE, of_users)
    item_weights = feature_oracle.best_weights(MATRIX.T, items, OBJECTIVE, of_items)
    users[[7, 21]] = (USERS @ user_weights)[[7, 21]]
    items[[4, 11]] = (ITEMS @ item_weights)[[4, 11]]
    return users, items, user_weights, item_weights


@pytest.mark.parametrize("devices", DEVICES, ids=str)
def test_fit_equals_the_oracle(devices: dict[str, Any]) -> None:
    found = _fitted(**devices)
    users, items, user_weights, item_weights = _expected()
    for ours, theirs in (
        (found.user_factors, users),
        (found.item_factors, items),
        (found.user_feature_weights_, user_weights),
        (found.item_feature_weights_, item_weights),
        (found.embed_items(ITEMS), ITEMS @ item_weights),
        (found.embed_users(USERS[:3]), USERS[:3] @ user_weights),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("devices", DEVICES, ids=str)
def test_every_call_draws_rows_to_their_features(devices: dict[str, Any]) -> None:
    found = _fitted(**devices)
    users, items, user_weights, item_weights = _expected()
    expected = feature_oracle.solve(MATRIX, USERS @ user_weights, items, OBJECTIVE, 1.5)
    expected[[7, 21]] = (USERS @ user_weights)[[7, 21]]
    of_items = feature_oracle.solve(MATRIX.T, ITEMS @ item_weights, users, OBJECTIVE, 1.5)
    of_items[[4, 11]] = (ITEMS @ item_weights)[[4, 11]]
    every, transposed = np.arange(30), MATRIX.T.tocsr()
    for solved in (
        found.transform(MATRIX, user_features=USERS),
        found.recalculate_user(every, MATRIX, user_features=USERS),
    ):
        np.testing.assert_allclose(solved, expected, rtol=1e-6, atol=1e-8)
    solved = found.recalculate_item(np.arange(20), transposed, item_features=ITEMS)
    np.testing.assert_allclose(solved, of_items, rtol=1e-6, atol=1e-8)
    ids, scores = found.recommend(
        every, MATRIX, N=20, recalculate_user=True, filter_already_liked_items=False,
        user_features=USERS,
    )  # fmt: skip
    best = expected @ items.T
    np.testing.assert_allclose(scores, np.take_along_axis(best, ids, 1), rtol=1e-5, atol=1e-7)
    found.partial_fit_users([3, 32], MATRIX[[3, 7]], user_features=USERS[[3, 5]])
    np.testing.assert_allclose(found.user_factors[3], expected[3], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found.user_factors[32], found.embed_users(USERS[[5]])[0], rtol=1e-6)
    assert not found.user_factors[31].any()
    stored = found.user_features_[[3, 32]].toarray()
    np.testing.assert_array_equal(stored, USERS[[3, 5]].toarray())
    before = found.user_factors[32].copy()
    found.partial_fit_users([32], MATRIX[[7]])  # by the features that are stored
    np.testing.assert_array_equal(found.user_factors[32], before)
    found.partial_fit_items([20], transposed[[2]], item_features=ITEMS[[2]])
    found.partial_fit_items([20], transposed[[2]])


def test_rows_without_entries_are_recommended_and_compared(model: Any) -> None:
    ids, scores = model.recommend(7, MATRIX[7], N=20)
    expected = model.embed_users(USERS[[7]])[0] @ model.item_factors.T
    np.testing.assert_allclose(scores, np.sort(expected)[::-1], rtol=1e-6)
    assert set(ids) == set(range(20))
    neighbours, cosines = model.similar_items(4, N=20)
    assert neighbours[0] == 4 and cosines[0] == pytest.approx(1)


def test_explanations_add_up(model: Any) -> None:
    for user, item in ((0, 3), (0, 4), (7, 3), (7, 11)):
        given = {"user_features": USERS[[user]]}
        factors = model.recalculate_user(user, MATRIX[user], **given)
        score = float(factors @ model.item_factors[item])
        total, items, weights = model.explain(user, MATRIX, item, N=20, **given)
        assert total == pytest.approx(score)
        again = model.explain(user, MATRIX, item, user_weights=weights, **given)
        assert again[0] == pytest.approx(score)
        found = model.explain_features(user, MATRIX, item, N=20, **given)
        assert found.score == pytest.approx(score)
        assert [i for i, _ in found.items] == [i for i, _ in items]
        assert [v for _, v in found.items] == pytest.approx([v for _, v in items])
        history = sum(value for _, value in found.items)
        assert history + sum(value for _, value in found.user_features) == pytest.approx(score)
        said = sum(value for _, value in found.item_features)
        assert said + found.item_entries == pytest.approx(score)
        if item in (4, 11):
            assert found.item_entries == pytest.approx(0, abs=1e-9)
        for part in found[1:4]:
            values = [value for _, value in part]
            assert values == sorted(values, reverse=True)
    assert found.item_features[0][0] in range(6)


def test_explanations_of_a_model_without_features() -> None:
    model = TPUAlternatingLeastSquares(**SETTINGS).fit(MATRIX)
    found = model.explain_features(0, MATRIX, 3)
    assert found.user_features == found.item_features == []
    assert found.score == found.item_entries == pytest.approx(model.explain(0, MATRIX, 3)[0])


def test_feature_effects_are_the_nearest_items() -> None:
    frame = pd.DataFrame(ITEMS.toarray(), columns=NAMES)
    model = TPUAlternatingLeastSquares(**SETTINGS)
    model.fit(MATRIX, user_features=USERS, item_features=frame)
    effects = model.feature_effects(N=3)
    assert list(effects.columns) == ["feature", "rank", "item", "score"]
    assert list(effects["feature"].unique()) == list(NAMES)
    weights, items = model.item_feature_weights_, model.item_factors
    cosines = (weights / np.linalg.norm(weights, axis=1)[:, None]) @ (
        items / np.linalg.norm(items, axis=1)[:, None]
    ).T
    np.testing.assert_allclose(
        effects["score"].to_numpy().reshape(6, 3), -np.sort(-cosines, axis=1)[:, :3], rtol=1e-6
    )
    of_users = model.feature_effects("user", N=2)
    products = model.user_feature_weights_ @ items.T
    np.testing.assert_allclose(
        of_users["score"].to_numpy().reshape(5, 2), -np.sort(-products, axis=1)[:, :2], rtol=1e-6
    )
    assert of_users["feature"].tolist() == np.repeat(np.arange(5), 2).tolist()
    with pytest.raises(ValueError, match="side must be 'item' or 'user', got 'items'"):
        model.feature_effects("items")


def test_names_are_kept_and_compared() -> None:
    frame = pd.DataFrame(ITEMS.toarray(), columns=NAMES)
    model = TPUAlternatingLeastSquares(**SETTINGS).fit(MATRIX, item_features=frame)
    assert model.item_feature_names_in_.tolist() == NAMES.tolist()
    model.embed_items(frame)
    model.embed_items(ITEMS)
    with pytest.raises(ValueError, match="column 0 is 'kind 5', and was 'kind 0'"):
        model.embed_items(frame[NAMES[::-1]])
    assert not hasattr(model, "user_feature_names_in_")
    named = FeatureTable(ITEMS, names=NAMES)
    again = TPUAlternatingLeastSquares(**SETTINGS).fit(MATRIX, item_features=named)
    np.testing.assert_array_equal(again.item_factors, model.item_factors)
    assert again.item_feature_names_in_.tolist() == NAMES.tolist()


@pytest.mark.parametrize("serve", [False, True])
def test_a_file_keeps_the_features(tmp_path: Path, serve: bool) -> None:
    named = FeatureTable(ITEMS, names=NAMES)
    model = TPUAlternatingLeastSquares(**SETTINGS)
    model.fit(MATRIX, user_features=USERS, item_features=named)
    model.save(tmp_path / "model.npz")
    loaded = (ServedModel if serve else TPUAlternatingLeastSquares).load(tmp_path / "model.npz")
    solved = loaded.recalculate_user(np.arange(30), MATRIX, user_features=USERS)
    np.testing.assert_array_equal(solved, model.transform(MATRIX, USERS))
    assert loaded.item_feature_names_in_.tolist() == NAMES.tolist()
    of_user = {"user_features": USERS[[0]]}
    again = loaded.explain_features(0, MATRIX, 4, **of_user)
    assert again == model.explain_features(0, MATRIX, 4, **of_user)
    implicit = pytest.importorskip("implicit.cpu.als")
    theirs = implicit.AlternatingLeastSquares.load(os.fspath(tmp_path / "model.npz"))
    np.testing.assert_array_equal(theirs.item_factors, model.item_factors)


def test_a_file_without_features_has_the_earlier_format(tmp_path: Path) -> None:
    model = TPUAlternatingLeastSquares(**SETTINGS).fit(MATRIX)
    model.save(tmp_path / "plain.npz")
    assert np.load(tmp_path / "plain.npz")["tpu_als_format"] == 1
    _fitted().save(tmp_path / "model.npz")
    assert np.load(tmp_path / "model.npz")["tpu_als_format"] == 2 == model_file.FORMAT


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("indices", None, "item_feature_indices is missing"),
        ("indices", np.full(99, 7, np.int32), "item_feature_indices"),
        ("weights", np.zeros((6, 3)), "does not go with item_factors"),
        ("weights", np.full((6, 4), np.nan), "must be finite"),
        ("weights", np.zeros(6), "must be a 2-D array"),
        ("indptr", np.zeros(99, np.int32), "does not go with item_factors"),
        ("names_in_", np.array(["a"]), "must have 6 names, got 1"),
    ],
)
def test_a_damaged_file_is_refused(
    tmp_path: Path, model: Any, key: str, value: np.ndarray | None, message: str
) -> None:
    model.save(tmp_path / "model.npz")
    with np.load(tmp_path / "model.npz") as file:
        values = dict(file)
    name = f"tpu_als_item_feature_{key}"
    if value is None:
        del values[name]
    else:
        values[name] = value if key != "indices" else value[: len(values[name])]
    np.savez(tmp_path / "damaged.npz", **values)
    with pytest.raises(ModelFileError, match=message):
        TPUAlternatingLeastSquares.load(tmp_path / "damaged.npz")


def test_copies_keep_the_features(model: Any) -> None:
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(twin.embed_items(ITEMS), model.embed_items(ITEMS))
    assert clone(model).get_params()["feature_weight"] == 1.5


def test_assigned_tables_have_no_features(model: Any) -> None:
    twin = copy.deepcopy(model)
    twin.item_factors = twin.item_factors  # as after a write into the array
    assert hasattr(twin, "item_feature_weights_")
    twin.item_factors = twin.item_factors.copy()
    assert not hasattr(twin, "item_feature_weights_") and hasattr(twin, "user_feature_weights_")
    with pytest.raises(ValueError, match="the model has no item_features"):
        twin.embed_items(ITEMS)


def test_a_fit_without_features_removes_those_of_the_last(model: Any) -> None:
    twin = copy.deepcopy(model).fit(MATRIX)
    assert not hasattr(twin, "item_feature_weights_")
    plain = TPUAlternatingLeastSquares(**SETTINGS).fit(MATRIX)
    np.testing.assert_array_equal(twin.user_factors, plain.user_factors)


def test_callbacks_see_the_features_of_their_iteration() -> None:
    seen = []
    model = TPUAlternatingLeastSquares(**SETTINGS)
    model.fit(MATRIX, callback=lambda *_: seen.append(model.embed_items(ITEMS[[4]])[0]), **BOTH)
    assert len(seen) == 3 and not np.allclose(seen[0], seen[1])
    np.testing.assert_array_equal(seen[-1], model.item_factors[4])


def test_early_stopping_keeps_the_features_of_the_best_tables() -> None:
    model = _fitted(early_stopping=True, iterations=30, validation_fraction=0.3)
    np.testing.assert_allclose(model.item_factors[4], model.embed_items(ITEMS[[4]])[0])
    assert model.n_iter_ <= 30


@pytest.mark.parametrize("devices", DEVICES[:2], ids=str)
def test_checkpoints_resume_with_the_same_features_only(
    tmp_path: Path, devices: dict[str, Any]
) -> None:
    def stop(iteration: int, *_: object) -> None:
        if iteration == 1:
            raise InterruptedError

    settings = {**SETTINGS, **devices, "checkpoint_dir": tmp_path}
    model = TPUAlternatingLeastSquares(**settings)
    with pytest.raises(InterruptedError):
        model.fit(MATRIX, callback=stop, **BOTH)
    calls: list[int] = []
    resumed = TPUAlternatingLeastSquares(**settings)
    resumed.fit(MATRIX, callback=lambda i, *_: calls.append(i), **BOTH)
    assert calls == [2]
    whole = _fitted(**devices)
    np.testing.assert_allclose(resumed.item_factors, whole.item_factors, rtol=1e-9, atol=1e-12)
    calls.clear()
    resumed.fit(MATRIX, callback=lambda i, *_: calls.append(i), user_features=USERS)
    assert calls == [0, 1, 2]


def test_warm_start_continues() -> None:
    model = _fitted(warm_start=True, iterations=1)
    for _ in range(2):
        model.fit(MATRIX, **BOTH)
    np.testing.assert_allclose(model.item_factors, _fitted().item_factors, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("devices", DEVICES[:2], ids=str)
def test_dependent_features_without_a_ridge(dtype: type, devices: dict[str, Any]) -> None:
    """Columns that add up to each other change the weights, and not what they predict."""
    kinds, colours = np.eye(4)[np.arange(20) % 4], np.eye(3)[np.arange(20) // 3 % 3]
    basis = np.hstack([kinds, colours[:, 1:]])
    settings = {**SETTINGS, **devices, "dtype": dtype, "feature_regularization": 0.0}
    found, expected = (
        TPUAlternatingLeastSquares(**settings).fit(MATRIX, item_features=table).item_factors
        for table in (np.hstack([kinds, colours, np.ones((20, 1))]), basis)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_values_beyond_the_dtype_are_refused() -> None:
    model = _fitted(dtype=np.float32, linear_solver="cg")
    before, huge = model.item_factors.copy(), np.full((1, 6), 1e39)
    for call in (
        lambda: model.partial_fit_items([20], sparse.csr_matrix((1, 30)), item_features=huge),
        lambda: model.embed_items(huge),
        lambda: model.fit(MATRIX, item_features=np.full((20, 2), 1e39)),
    ):
        with pytest.raises(ValueError, match="which float32 cannot represent: scale them"):
            call()
    with pytest.raises(ValueError, match="row 0 of item_features is too large"):
        features.finite_products(np.array([[np.inf]]), "item_features")
    np.testing.assert_array_equal(model.item_factors, before)


def test_a_row_is_solved_again_if_its_features_change_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, transposed = _fitted(), MATRIX.T.tocsr()
    solve, calls = new_rows.folded_in, []

    def slow(*args: Any) -> np.ndarray:
        solved = solve(*args)
        calls.append(1)
        if len(calls) == 1:  # another writer, before the first result is stored
            model.partial_fit_items([0], transposed[[0]], item_features=ITEMS[[5]])
        return solved

    monkeypatch.setattr(new_rows, "folded_in", slow)
    model.partial_fit_items([0], transposed[[0]])
    monkeypatch.undo()
    expected = model.recalculate_item(0, transposed[[0]], item_features=ITEMS[[5]])
    np.testing.assert_array_equal(model.item_factors[0], expected)


def test_names_are_text_and_copied() -> None:
    for names, message in (
        (range(6), "names must be text, got 0"),
        (["a"] * 6, "names must not repeat, got 'a'"),
        (["a"], "one name for each of the 6 features"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureTable(ITEMS, names=names)
    names = NAMES.astype(object)
    table = FeatureTable(ITEMS, names=names)
    names[0] = "other"
    assert table.names is not None and table.names[0] == "kind 0"


def test_a_pipeline_does_not_drop_features(model: Any) -> None:
    pipeline = RecommenderPipeline([("als", model)])
    with pytest.raises(ValueError, match="score passes user_features on with scikit-learn's"):
        pipeline.score(MATRIX, user_features=USERS)


def test_deprecated_methods_take_features(model: Any) -> None:
    for call in (
        lambda **given: model.recommend_all(MATRIX, recalculate_user=True, **given),
        lambda **given: model.rank_items(np.arange(30), MATRIX, [1, 2], True, **given)[0],
    ):
        with pytest.warns(DeprecationWarning):
            assert len(call(user_features=USERS)) == 30


def test_a_search_cuts_user_features_and_not_item_features() -> None:
    square = MATRIX[:20]
    with sklearn.config_context(enable_metadata_routing=True):
        model = TPUAlternatingLeastSquares(**SETTINGS)
        model.set_fit_request(user_features=True, item_features=True)
        model.set_score_request(user_features=True)
        grid = {"feature_weight": [0.5, 2.0]}
        search = GridSearchCV(model, grid, cv=KFold(2), error_score="raise")
        with pytest.raises(ValueError, match="pass tpu_als.FeatureTable"):
            search.fit(square, user_features=USERS[:20], item_features=ITEMS)
        search.fit(square, user_features=USERS[:20], item_features=FeatureTable(ITEMS))
        search.fit(MATRIX, user_features=USERS, item_features=ITEMS)
        fold = clone(model).set_params(feature_weight=0.5)
        fold.fit(MATRIX[15:], user_features=USERS[15:], item_features=ITEMS)
        expected = fold.score(MATRIX[:15], user_features=USERS[:15])
        assert search.cv_results_["split0_test_score"][0] == expected


def test_pipelines_route_features() -> None:
    with sklearn.config_context(enable_metadata_routing=True):
        model = TPUAlternatingLeastSquares(**SETTINGS)
        model.set_fit_request(user_features=True, item_features=True)
        model.set_transform_request(user_features=True)
        pipeline = make_pipeline(LogWeighting(), model)
        pipeline.fit(MATRIX, user_features=USERS, item_features=ITEMS)
        found = pipeline.transform(MATRIX, user_features=USERS)
    weighted = LogWeighting().fit_transform(MATRIX)
    expected = TPUAlternatingLeastSquares(**SETTINGS).fit_transform(weighted, **BOTH)
    np.testing.assert_array_equal(found, expected)


FEATURE_ERRORS = {
    "rows": (ITEMS[:19], "item_features must have one row for each of the 20 items, got shape (19"),
    "text": (pd.DataFrame({"a": ["x"] * 20}), "column 'a' has dtype .*: encode text"),
    "objects": (np.full((20, 1), "x", object), "must hold numbers, got objects"),
    "missing": (np.full((20, 2), np.nan), "row 0, column 0 is nan: fill in missing values"),
    "infinite": (np.full((20, 2), np.inf), "row 0, column 0 is inf"),
    "one axis": (np.ones(20), "must be a table of shape .*, got ndarray of shape \\(20,\\)"),
    "no columns": (np.ones((20, 0)), "must have at least one column"),
}


@pytest.mark.parametrize("case", FEATURE_ERRORS)
def test_features_that_cannot_be_used_are_refused_before_any_work(case: str) -> None:
    given, message = FEATURE_ERRORS[case]
    model = _fitted()
    before = model.item_factors.copy()
    with pytest.raises(ValueError, match=message.replace("(19", "\\(19")):
        model.fit(MATRIX, item_features=given)
    np.testing.assert_array_equal(model.item_factors, before)


def test_calls_without_the_features_that_they_need_are_refused(model: Any) -> None:
    for call in (
        lambda: model.transform(MATRIX),
        lambda: model.score(MATRIX),
        lambda: model.recalculate_user([4], MATRIX[4]),
        lambda: model.recommend([4], MATRIX[4], recalculate_user=True),
        lambda: model.explain(4, MATRIX, 3),
        lambda: model.explain_features(4, MATRIX, 3),
        lambda: model.partial_fit_users([30], MATRIX[0]),
    ):
        with pytest.raises(ValueError, match="fitted with user_features.*pass user_features"):
            call()
    with pytest.raises(ValueError, match="with recalculate_user=True only"):
        model.recommend(0, MATRIX[0], user_features=USERS[0])
    with pytest.raises(ValueError, match="user_features must have 1 rows, got shape \\(30, 5\\)"):
        model.recalculate_user(0, MATRIX[0], user_features=USERS)
    with pytest.raises(ValueError, match="must have the 6 columns of the features in fit"):
        model.embed_items(USERS)
    plain = TPUAlternatingLeastSquares(**SETTINGS).fit(MATRIX)
    with pytest.raises(ValueError, match="user_features was given, but the model has none"):
        plain.transform(MATRIX, user_features=USERS)
    with pytest.raises(ValueError, match="regularization must be above 0 with user_features"):
        TPUAlternatingLeastSquares(**{**SETTINGS, "regularization": 0}).fit(MATRIX, **BOTH)
    for name, value in (("feature_regularization", -1.0), ("feature_weight", 0.0)):
        with pytest.raises(ValueError, match=f"{name} must be a finite number"):
            TPUAlternatingLeastSquares(**{**SETTINGS, name: value}).fit(MATRIX, **BOTH)


def test_series_and_missing_values_of_pandas_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a table of shape"):
        FeatureTable(pd.Series([1.0, 2.0]))
    frame = pd.DataFrame({"is": pd.array([True, None], "boolean")})
    with pytest.raises(ValueError, match="row 1, column 0 is nan: fill in missing values"):
        FeatureTable(frame)


@pytest.mark.parametrize("kind", ["frame", "dense", "coo", "bool", "polars", "sparse frame"])
def test_kinds_of_tables(model: Any, kind: str) -> None:
    dense = (ITEMS.toarray() > 0).astype(float) if kind == "bool" else ITEMS.toarray()
    given: Any = {
        "frame": lambda: pd.DataFrame(dense),
        "dense": lambda: dense,
        "coo": lambda: sparse.coo_array(dense),
        "bool": lambda: dense.astype(bool),
        "polars": lambda: pytest.importorskip("polars").DataFrame(dense),
        "sparse frame": lambda: pd.DataFrame.sparse.from_spmatrix(sparse.csr_matrix(dense)),
    }[kind]()
    found = TPUAlternatingLeastSquares(**SETTINGS).fit(MATRIX, item_features=given)
    expected = TPUAlternatingLeastSquares(**SETTINGS).fit(MATRIX, item_features=dense)
    np.testing.assert_array_equal(found.item_factors, expected.item_factors)


def test_features_with_repeated_and_zero_entries_stay_as_they_are() -> None:
    parts = np.array([1.0, 2.0, 0.0]), np.array([1, 1, 0]), np.arange(21).clip(0, 1) * 3
    given = sparse.csr_matrix(parts, shape=(20, 2))
    table = FeatureTable(given)
    assert table.matrix.toarray()[0].tolist() == [0, 3] and table.matrix.nnz == 1
    for ours, theirs in zip((given.data, given.indices, given.indptr), parts, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_features_cost_nothing_and_change_nothing() -> None:
    """Features of zeros draw rows to zero, as no features do."""
    zeros = sparse.csr_matrix((20, 3))
    plain = TPUAlternatingLeastSquares(**SETTINGS).fit(MATRIX)
    found = TPUAlternatingLeastSquares(**{**SETTINGS, "feature_weight": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.fit(MATRIX, item_features=zeros)
    np.testing.assert_array_equal(found.item_factors, plain.item_factors)


def test_scorers_refuse_a_model_with_user_features(model: Any) -> None:
    with pytest.raises(ValueError, match="the model was fitted with user_features"):
        make_ranking_scorer("ndcg", k=5)(model, MATRIX)


def test_a_pipeline_that_recommends_passes_features_on(model: Any) -> None:
    pipeline = RecommenderPipeline([("als", copy.deepcopy(model))])
    every, given = np.arange(30), {"user_features": USERS}
    found = pipeline.recommend(every, MATRIX, recalculate_user=True, **given)
    expected = model.recommend(every, MATRIX, recalculate_user=True, **given)
    np.testing.assert_array_equal(found[0], expected[0])
    solved = pipeline.recalculate_user(every, MATRIX, **given)
    np.testing.assert_array_equal(solved, model.transform(MATRIX, USERS))
    of_one = {"user_features": USERS[[0]]}
    assert pipeline.explain(0, MATRIX, 3, **of_one)[0] == model.explain(0, MATRIX, 3, **of_one)[0]
    pipeline.partial_fit_users([30], MATRIX[[0]], **of_one)


def test_features_find_new_items() -> None:
    """Items of two groups; a new item is recommended to the users of its group."""
    groups = np.repeat([0, 1], 20)
    dense = (groups[:, None] == np.repeat([0, 1], 15)[None, :]).astype(np.float32)
    dense[:, [0, 29]] = 0
    features = np.eye(2)[np.repeat([0, 1], 15)]
    model = TPUAlternatingLeastSquares(
        factors=4, regularization=0.1, alpha=5, random_state=0, verbose=False
    ).fit(sparse.csr_matrix(dense), item_features=features)
    scores = model.user_factors @ model.item_factors.T
    assert (scores[groups == 0, 0] > 0.5).all() and (scores[groups == 0, 29] < 0.2).all()
    assert (scores[groups == 1, 29] > 0.5).all() and (scores[groups == 1, 0] < 0.2).all()
