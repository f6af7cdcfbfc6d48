"""Objects passed by mistake: the message says what to pass, and the model does not change."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from models import make
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares, evaluation
from tpu_als.datasets import Interactions
from tpu_als.shards import ShardedMatrix
from tpu_als.validation import arguments
from tpu_als.validation.refusals import refuse_misplaced, require_finite

MATRIX = sparse.csr_matrix(np.array([[1, 0, 2], [0, 3, 0]], np.float32))
EVENTS = pd.DataFrame({"who": ["ann", "bob"], "what": [1, 2]})
EXPECTED = "must be a matrix of users by items, got"
SHARDED = ShardedMatrix(Path("nowhere"), (2, 3), 3, 1, True)
CONVERT = r"tpu_als.datasets.interactions_from_frame\({}, user, item\)\.matrix"


def named(name: str, **attributes: Any) -> Any:
    """An object whose type has this name, as one of a library that is not installed."""
    module, _, kind = name.rpartition(".")
    return type(kind, (), {"__module__": module, **attributes})()


MISTAKES: dict[str, tuple[Any, str]] = {
    "interactions": (
        Interactions(MATRIX, pd.Index(["a", "b"]), pd.Index([1, 2, 3])),
        r"an Interactions: pass {name}\.matrix$",
    ),
    "text column": (EVENTS, "a frame of events: .* " + CONVERT.format("{name}")),
    "text of pandas": (EVENTS.astype({"who": "string"}), "a frame of events"),
    "objects": (EVENTS.astype(object), "a frame of events"),
    "categories": (EVENTS.astype("category"), "a frame of events"),
    "times": (pd.DataFrame({"a": [1], "b": pd.to_datetime(["2020"])}), "a frame of events"),
    "dates": (pd.DataFrame({"a": [1], "b": [datetime.date(2020, 1, 1)]}), "a frame of events"),
    "periods": (pd.DataFrame({"a": pd.PeriodIndex(["2020"], freq="Y")}), "a frame of events"),
    "user and item": (pd.DataFrame({"user_id": [1], "item_id": [2]}), "a frame of events"),
    "customers": (pd.DataFrame({"CustomerID": [1], "n": 1, "product": [2]}), "a frame of events"),
    "polars events": (
        named("polars.dataframe.frame.DataFrame", columns=["a", "b"], dtypes=["Int64", "String"]),
        "a polars frame of events: .* " + CONVERT.format(r"{name}.to_pandas\(\)"),
    ),
    "polars ids": (
        named("polars.dataframe.frame.DataFrame", columns=["uid", "iid"], dtypes=["Int64"] * 2),
        "a polars frame of events",
    ),
    "polars lazy": (
        named("polars.lazyframe.frame.LazyFrame"),
        "a polars LazyFrame: .* " + CONVERT.format(r"{name}.collect\(\).to_pandas\(\)"),
    ),
    "pyarrow table": (
        named("pyarrow.lib.Table"),
        "a pyarrow table: .* " + CONVERT.format(r"{name}.to_pandas\(\)"),
    ),
    "pyarrow batch": (named("pyarrow.lib.RecordBatch"), "a pyarrow table"),
    "path": (Path("plays.npz"), "a path or text .*plays.npz.*scipy.sparse.load_npz, or.*open_"),
    "text": ("plays", "a path or text \\('plays'\\): read the file"),
    "bytes": (b"plays", "a path or text"),
    "tuple": ((MATRIX, MATRIX), "a tuple of 2 matrices: pass one of them"),
    "list": ([MATRIX], "a list of 1 matrices: pass one"),
    "array of text": (EVENTS.to_numpy(str), "an array of text or records"),
    "array of objects": (EVENTS.to_numpy(object), "an array of text or records"),
    "records": (
        EVENTS.to_records(),
        "an array of text or records: .* " + CONVERT.format(r"pandas.DataFrame\({name}\)"),
    ),
}
SHARDS = {
    "shards": (
        SHARDED,
        r"a ShardedMatrix, which only `fit` takes: .* {name}\.to_csr\(\) or those",
    )
}


@pytest.fixture(scope="module")
def model() -> TPUAlternatingLeastSquares:
    return make(TPUAlternatingLeastSquares).fit(MATRIX, show_progress=False)


@pytest.mark.parametrize("mistake", [*MISTAKES, *SHARDS])
def test_messages(mistake: str) -> None:
    wrong, message = {**MISTAKES, **SHARDS}[mistake]
    with pytest.raises(TypeError, match=f"^rows {EXPECTED} " + message.replace("{name}", "rows")):
        refuse_misplaced(wrong, "rows")


@pytest.mark.parametrize(
    "fine",
    [
        MATRIX,
        sparse.csr_array(MATRIX),
        sparse.csr_array(MATRIX)[0],
        MATRIX.toarray(),
        MATRIX.toarray().tolist(),
        MATRIX.toarray().astype(object),
        pd.DataFrame(MATRIX.toarray()),
        pd.DataFrame(MATRIX.toarray(), columns=["user", "tea", "rice"]),
        pd.DataFrame(MATRIX.toarray().astype(object)),
        pd.DataFrame(MATRIX.toarray() > 0),
        pd.DataFrame(MATRIX.toarray()).astype("Int64"),
        pd.DataFrame(MATRIX.toarray()).astype("category"),
        pd.DataFrame.sparse.from_spmatrix(MATRIX),
        pd.DataFrame(np.ones((1, 20)), columns=["user", "item", *map(str, range(18))]),
        named("polars.dataframe.frame.DataFrame", columns=["a", "b"], dtypes=["UInt8", "Float64"]),
        None,
    ],
    ids=lambda fine: type(fine).__name__,
)
def test_matrices_and_frames_of_numbers_are_accepted(fine: Any) -> None:
    refuse_misplaced(fine)


def test_shards_are_accepted_by_fit() -> None:
    refuse_misplaced(SHARDED, takes_shards=True)


CALLS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "fit": ("user_items", lambda model, X: make(TPUAlternatingLeastSquares).fit(X)),
    "transform": ("X", lambda model, X: model.transform(X)),
    "score": ("X", lambda model, X: model.score(X)),
    "recommend": ("user_items", lambda model, X: model.recommend(0, X)),
    "recalculate_user": ("user_items", lambda model, X: model.recalculate_user([0], X)),
    "recalculate_item": ("item_users", lambda model, X: model.recalculate_item([0], X)),
    "partial_fit_users": ("user_items", lambda model, X: model.partial_fit_users([0], X)),
    "partial_fit_items": ("item_users", lambda model, X: model.partial_fit_items([0], X)),
    "explain": ("user_items", lambda model, X: model.explain(0, X, 1)),
    "similar_items": ("item_users", lambda model, X: model.similar_items(0, 1, True, X)),
}


@pytest.mark.parametrize(
    ("call", "mistake"),
    [
        (call, mistake)
        for call in CALLS
        for mistake in ("interactions", "text column", "pyarrow table", "path", "tuple", "shards")
        if (call, mistake) != ("fit", "shards")  # fit accepts shards
    ],
)
def test_calls(model: TPUAlternatingLeastSquares, call: str, mistake: str) -> None:
    name, function = CALLS[call]
    wrong, message = {**MISTAKES, **SHARDS}[mistake]
    before = model.user_factors.copy(), model.item_factors.copy()
    expected = f"^{name} {EXPECTED} "
    if name == "item_users":
        expected = expected.replace("users by items", "items by users")
    with pytest.raises(TypeError, match=expected + message.replace("{name}", name)):
        function(model, wrong)
    np.testing.assert_array_equal(model.user_factors, before[0])
    np.testing.assert_array_equal(model.item_factors, before[1])


class TestFinite:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (
                np.nan,
                "contains NaN: 1 of 3 stored values .* .1 NaN., the first is nan in row 1,",
            ),
            (-np.inf, "contains infinity, .* too large for float32: .* the first is -inf in row 1"),
            (1e300, "contains infinity, .* the first is 1e\\+300 in row 1, column 1 .*replace"),
        ],
    )
    def test_position_and_number(self, value: float, message: str) -> None:
        wrong = MATRIX.astype(np.float64)
        wrong.data[2] = value
        for call in (
            arguments.canonical_csr,
            lambda X: make(TPUAlternatingLeastSquares).fit(X),
            lambda X: make(TPUAlternatingLeastSquares).fit(X.toarray()),
        ):
            with pytest.raises(ValueError, match=f"^user_items {message}") as error:
                call(wrong)
            assert "HistGradientBoosting" not in str(error.value)

    def test_of_a_fitted_model(self, model: TPUAlternatingLeastSquares) -> None:
        wrong = MATRIX.copy()
        wrong.data[:2] = np.nan, np.inf
        message = "^X contains NaN: 2 of 3 .* \\(1 NaN\\), the first is nan in row 0, column 0"
        for call in (model.transform, model.score):
            with pytest.raises(ValueError, match=message):
                call(wrong)
        with pytest.raises(ValueError, match="^item_users contains NaN"):
            model.recalculate_item([0], sparse.csr_matrix([[np.nan, 1.0]]))

    def test_missing_values_of_pandas(self) -> None:
        frame = pd.DataFrame({"tea": [1, 2], "rice": pd.array([1, None], "Int64")})
        with pytest.raises(ValueError, match="contains NaN: .* in row 1, column 1"):
            make(TPUAlternatingLeastSquares).fit(frame)

    def test_sums_of_repeated_entries(self) -> None:
        parts = (np.full(2, 3e38, np.float32), np.array([1, 1]), np.array([0, 0, 2]))
        twice = sparse.csr_matrix(parts, shape=(2, 2))
        with pytest.raises(ValueError, match="contains infinity, .* row 1, column 1"):
            arguments.canonical_csr(twice)

    def test_finite_values_pass(self) -> None:
        require_finite(MATRIX, MATRIX.data)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "an object of dict: pass a sparse matrix"),
        (iter([1]), "an object of list_iterator"),
        (TPUAlternatingLeastSquares(), "an object of TPUAlternatingLeastSquares"),
        (TPUAlternatingLeastSquares, "the class TPUAlternatingLeastSquares"),
        (np.ma.masked_array([[1.0, 2.0]], mask=[[True, False]]), r"masked values: .*filled\(0\)"),
    ],
    ids=["dict", "iterator", "model", "class", "masked"],
)
def test_other_objects(wrong: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"user_items {EXPECTED} {message}|{message}"):
        make(TPUAlternatingLeastSquares).fit(wrong)


def test_masks_of_tables() -> None:
    model = TPUAlternatingLeastSquares(2)
    with pytest.raises(ValueError, match="item_factors must have no masked values"):
        model.item_factors = np.ma.masked_array(np.ones((3, 2)), mask=np.eye(3, 2))


def test_masks_of_ids_and_values(model: TPUAlternatingLeastSquares) -> None:
    ids = np.ma.array([0, 1], mask=[False, True])
    before = model.user_factors.copy()
    for call in (
        lambda: model.partial_fit_users(ids, MATRIX),
        lambda: model.recommend(ids, MATRIX),
        lambda: model.recommend(0, MATRIX[0], items=ids),
        lambda: model.recommend(0, MATRIX[0], filter_items=ids),
        lambda: model.similar_items(ids),
    ):
        with pytest.raises(IndexError, match=r"no masked values: pass \w+.compressed"):
            call()
    np.testing.assert_array_equal(model.user_factors, before)
    values = MATRIX.copy()
    values.data = np.ma.array(values.data, mask=[True, False, False])
    for refused in (model.transform, arguments.canonical_csr):
        with pytest.raises(ValueError, match="must have no masked values"):
            refused(values)
    with pytest.raises(ValueError, match="ids must have no masked values"):
        evaluation.metrics_of_rankings(np.ma.array([[0, 2], [0, 1]], mask=np.eye(2)), MATRIX)
    with pytest.raises(ValueError, match="popularity must be finite numbers"):
        evaluation.metrics_of_rankings(np.eye(2, dtype=int), MATRIX, ids, 9)
    own = copy.deepcopy(model)
    own._YtY = np.ma.array(np.eye(own.factors), mask=np.eye(own.factors))
    with pytest.raises(ValueError, match="_YtY must hold finite numbers"):
        own.transform(MATRIX)


@pytest.mark.parametrize("name", ["filter_already_liked_items", "recalculate_user"])
@pytest.mark.parametrize("value", ["False", "no", 2, None, np.ones(2)])
def test_flags(model: TPUAlternatingLeastSquares, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got"):
        model.recommend(0, MATRIX[0], **{name: value})
    if name == "recalculate_user":
        with pytest.raises(ValueError, match="recalculate_item must be True or False, got"):
            model.similar_items(0, recalculate_item=value)


def test_masks_of_ids_have_a_place_for_each_row(model: TPUAlternatingLeastSquares) -> None:
    with pytest.raises(IndexError, match="userids is a mask of length 5, expected 2"):
        model.partial_fit_users(np.ones(5, bool), sparse.vstack([MATRIX[0]] * 5, "csr"))
