"""Wrong calls of a fitted model, and the error that each must raise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matrices import planted_groups
from scipy import sparse
from sklearn.exceptions import NotFittedError

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.datasets import Interactions
from tpu_als.shards import ShardedMatrix

ROWS = planted_groups()  # the data of the fit: 24 users by 18 items
N_USERS, N_ITEMS = ROWS.shape
COLUMNS = sparse.csr_matrix(ROWS.T)
BAD_IDS = (IndexError, ValueError, TypeError)
WRONG_OBJECT = (TypeError, ValueError)


class Case(NamedTuple):
    """A call that must fail.

    Attributes
    ----------
    name : str
        The id of the test.
    call : callable
        Takes the fitted model.
    error : type or tuple of types
        The class of the error.
    message : str
        Regular expression that the message must match.
    settings : mapping
        Attributes to set on the model before the call; the test restores them.
    """

    name: str
    call: Callable[[Any], object]
    error: Any
    message: str
    settings: Mapping[str, Any] = MappingProxyType({})


def fit(matrix: Any, **parameters: Any) -> Callable[[Any], object]:
    """Fit the model again to other data."""
    return lambda model: model.set_params(**parameters).fit(matrix, show_progress=False)


def with_value(value: Any, dtype: Any = np.float32) -> sparse.csr_matrix:
    """The fitted matrix with another first value."""
    wrong = ROWS.astype(dtype)
    wrong.data[0] = value
    return wrong


def _parameters() -> list[Case]:
    """For each parameter, a value of another type, NaN, and a value out of range."""
    nan = float("nan")
    wrong: dict[str, list[Any]] = {
        "factors": [0, 8.0, "8", nan],
        "regularization": [-0.1, nan, "0.1"],
        "alpha": [-5, nan, "x", None],
        "iterations": [-1, 1.5, nan],
        "num_threads": [-1, "all"],
        "unobserved_weight": [-1.0, nan, "1"],
        "regularization_exponent": [-0.5, nan, "1"],
        "linear_solver": ["gauss", "subspace", 3],
        "objective": ["explicit", None],
        "cg_steps": [0, 2.5],
        "over_relaxation": [0, 2.0, nan, "1.6"],
        "validation_fraction": [0, 1.0, nan],
        "n_iter_no_change": [0, 1.5],
        "tol": [-1e-9, nan],
        "approximate_recall": [1.5, nan, "0.9"],
        "checkpoint_dir": [3],
        "checkpoint_every": [0, 1.5],
        "table_layout": ["sideways", None],
        "devices": [0, 10_000, "gpu"],
        "dtype": [np.float16, "int8", "x", -1],
        "random_state": [-1, "x", 1.5],
    }
    return [
        Case(f"fit, {name}={getattr(value, '__name__', value)!r}", fit(ROWS),
             (ValueError, TypeError), rf"\b{name}\b.*{_shown(value)}", {name: value})
        for name, values in wrong.items()
        for value in values
    ]  # fmt: skip


def _shown(value: Any) -> str:
    """Pattern for the value as a message shows it."""
    return "float16" if value is np.float16 else repr(value).strip("'").replace(".", r"\.")


CHANGED = {
    "transform": lambda model: model.transform(ROWS),
    "transform of one row": lambda model: model.transform(ROWS[:1]),
    "recalculate_user": lambda model: model.recalculate_user(0, ROWS[0]),
    "recalculate_item": lambda model: model.recalculate_item([0, 1], COLUMNS[:2]),
    "recommend with recalculate_user": lambda model: model.recommend(
        0, ROWS[0], recalculate_user=True
    ),
    "similar_items with recalculate_item": lambda model: model.similar_items(
        0, recalculate_item=True, item_users=COLUMNS[0]
    ),
    "partial_fit_users": lambda model: model.partial_fit_users([0], ROWS[:1]),
    "partial_fit_items": lambda model: model.partial_fit_items([0], COLUMNS[:1]),
    "explain": lambda model: model.explain(0, ROWS, 1),
    "score": lambda model: model.score(ROWS),
    "save": lambda model: model.save("must-not-be-written.npz"),
}


def _changed_after_fit() -> list[Case]:
    """Every call that uses a parameter, after the parameter was changed to a wrong value."""
    cases = [
        Case(f"{name}, alpha={value!r}", call, ValueError, rf"^alpha must be .*got {value!r}",
             {"alpha": value})
        for name, call in CHANGED.items()
        for value in (-5, float("nan"), "x")
    ]  # fmt: skip
    for parameter, value in (
        ("regularization", -1.0), ("regularization", float("nan")), ("regularization", "x"),
        ("unobserved_weight", float("inf")), ("regularization_exponent", "1"),
        ("objective", "explicit"),
    ):  # fmt: skip
        for name in ("transform", "recalculate_user", "partial_fit_items", "explain", "save"):
            cases.append(
                Case(f"{name}, {parameter}={value!r}", CHANGED[name], ValueError,
                     rf"^{parameter} must be .*got {value!r}", {parameter: value})
            )  # fmt: skip
    cases += [
        Case("save, factors='x'", CHANGED["save"], ValueError, "^factors must be .*got 'x'",
             {"factors": "x"}),
        Case("save, dtype='x'", CHANGED["save"], ValueError, "^dtype must be .*got 'x'",
             {"dtype": "x"}),
        Case("recommend, approximate_recall=7",
             lambda model: model.recommend(np.arange(N_USERS), ROWS), ValueError,
             "approximate_recall .*got 7", {"approximate_recall": 7}),
        Case("recommend, devices=10000", lambda model: model.recommend(np.arange(N_USERS), ROWS),
             ValueError, "devices.*10000", {"devices": 10_000}),
        Case("transform, devices='gpu'", CHANGED["transform"], ValueError, "devices.*gpu",
             {"devices": "gpu"}),
        Case("solver, cg_steps=0",
             lambda model: model.solver(ROWS, model.user_factors.copy(), model.item_factors, 0.1),
             ValueError, "^cg_steps must be .*got 0", {"cg_steps": 0}),
        Case("solver, regularization=-1",
             lambda model: model.solver(ROWS, model.user_factors.copy(), model.item_factors, -1),
             ValueError, "regularization must be .*got -1"),
    ]  # fmt: skip
    square = r"_YtY .*\(6, 6\)"
    for shape, pattern in (((3, 3), r"\(3, 3\)"), ((6,), r"\(6,\)"), ((6, 5), r"\(6, 5\)")):
        for name in ("transform", "recalculate_user"):
            cases.append(
                Case(f"{name}, _YtY of shape {shape}", CHANGED[name], ValueError,
                     f"{square}.*{pattern}|_YtY .*{pattern}.*", {"_YtY": np.ones(shape)})
            )  # fmt: skip
    similar, users = (lambda m: m.similar_items(0)), (lambda m: m.similar_users(0))
    return [
        *cases,
        Case("transform, _YtY with NaN", CHANGED["transform"], ValueError, r"_YtY .*(NaN|finite)",
             {"_YtY": np.full((6, 6), np.nan, np.float32)}),
        Case("recalculate_item, _XtX of shape (7, 7)", CHANGED["recalculate_item"], ValueError,
             r"_XtX .*\(7, 7\)", {"_XtX": np.ones((7, 7), np.float32)}),
        Case("similar_items, _item_norms too short", similar, ValueError,
             r"_item_norms .*\b3\b", {"_item_norms": np.ones(3, np.float32)}),
        Case("similar_items, _item_norms of two axes", similar, ValueError,
             r"_item_norms .*\(18, 1\)", {"_item_norms": np.ones((N_ITEMS, 1), np.float32)}),
        Case("similar_users, _user_norms too long", users, ValueError,
             r"_user_norms .*\b99\b", {"_user_norms": np.ones(99, np.float32)}),
    ]  # fmt: skip


def _matrices() -> list[Case]:
    """Invalid values and shapes, in each call that takes a matrix."""
    values = {
        "NaN": (with_value(np.nan), "NaN"),
        "infinity": (with_value(np.inf), "infinity"),
        "1e300": (with_value(1e300, np.float64), "too large|infinity"),
        "complex values": (with_value(1j, np.complex64), "(?i)complex"),
    }
    calls: dict[str, Callable[[Any], Callable[[Any], object]]] = {
        "fit": fit,
        "transform": lambda x: lambda model: model.transform(x),
        "score": lambda x: lambda model: model.score(x),
        "recommend of all": lambda x: lambda model: model.recommend(np.arange(N_USERS), x),
        "recommend of one": lambda x: lambda model: model.recommend(0, x[0]),
        "recalculate_user": lambda x: lambda model: model.recalculate_user(np.arange(N_USERS), x),
        "partial_fit_users": lambda x: lambda model: model.partial_fit_users([0], x[:1]),
        "explain": lambda x: lambda model: model.explain(0, x, 1),
        "solver": lambda x: (
            lambda model: model.solver(x, model.user_factors.copy(), model.item_factors, 0.1)
        ),
    }
    cases = [
        Case(f"{name}, {what}", make(matrix), (ValueError, TypeError), message)
        for name, make in calls.items()
        for what, (matrix, message) in values.items()
    ]
    dense = ROWS.toarray()
    return [
        *cases,
        Case("fit, an array of one axis", fit(dense[0]), ValueError, "(?i)2D array.*1D array"),
        Case("fit, an array of three axes", fit(dense[None]), ValueError, "dim 3|3-?D|three"),
        Case("fit, an empty array", fit(np.zeros((0, 3))), ValueError, "0 sample"),
        Case("fit, an array of text", fit(np.array([["a", "b"]])), WRONG_OBJECT,
             "(?i)text|str|numbers|matrix|array"),
        Case("fit, an array of objects", fit(np.array([[{}, 1], [2, 3]], object)), WRONG_OBJECT,
             "(?i)dict|object|number"),
        Case("transform, an array of three axes", lambda m: m.transform(dense[None]), ValueError,
             "dim 3|3-?D|three"),
        Case("transform, fewer columns", lambda m: m.transform(ROWS[:, :5]), ValueError,
             "5 features.*18 features"),
        Case("transform, more columns", lambda m: m.transform(COLUMNS), ValueError,
             "24 features.*18 features"),
        Case("score, fewer columns", lambda m: m.score(ROWS[:, :5]), ValueError,
             "5 features.*18 features"),
        Case("score, an array of one axis", lambda m: m.score(dense[0]), ValueError, "2D array"),
        Case("inverse_transform, other factors", lambda m: m.inverse_transform(np.ones((2, 5))),
             ValueError, "5 columns, expected 6 factors"),
        Case("inverse_transform, NaN",
             lambda m: m.inverse_transform(np.full((2, 6), np.nan)), ValueError, "NaN"),
        Case("warm start, fewer rows", fit(ROWS[:10], warm_start=True), ValueError,
             r"(?i)fewer|user_factors.*\(24, 6\).*\(10, 6\)"),
        Case("warm start, fewer columns", fit(ROWS[:, :9], warm_start=True), ValueError,
             r"(?i)fewer|item_factors.*\(18, 6\).*\(9, 6\)"),
        Case("warm start, other factors", fit(ROWS, warm_start=True, factors=9), ValueError,
             r"factors.*\(24, 9\)|factors.*\b9\b"),
    ]  # fmt: skip


def _ids() -> list[Case]:
    """Unknown and invalid ids, in each call that takes ids."""
    wrong: dict[str, tuple[Any, str]] = {
        "-1": (-1, "-1"),
        "one too many": (99, "99"),
        "2**63": (2**63, r"9223372036854775808|integers"),
        "2**64 - 1": ([2**64 - 1], r"18446744073709551615|integers"),
        "a float": (1.5, "integers.*float"),
        "NaN": (float("nan"), "integers.*nan"),
        "text": ("1", "integers"),
        "None": (None, "integers"),
        "True": (True, "integers.*bool"),
        "nested lists": ([[0, 1]], r"\(1, 2\)"),
        "lists of several lengths": ([[0], [1, 2]], "integers|1-D|inhomogeneous"),
        "a mask of another length": ([True, False], "mask of length 2"),
    }
    calls: dict[str, tuple[str, Callable[[Any], Callable[[Any], object]]]] = {
        "recommend": (
            "userid",
            lambda i: lambda m: m.recommend(i, None, filter_already_liked_items=False),
        ),
        "similar_items": ("itemid", lambda i: lambda m: m.similar_items(i)),
        "similar_users": ("userid", lambda i: lambda m: m.similar_users(i)),
        "score_pairs": ("itemids", lambda i: lambda m: m.score_pairs(0, i)),
    }
    cases = [
        Case(f"{name}, {what}", make(ids), BAD_IDS, f"(?s)(?=.*{argument}).*(?:{message})")
        for name, (argument, make) in calls.items()
        for what, (ids, message) in wrong.items()
    ]
    two = ROWS[:2]
    cases += [
        Case("score_pairs, unequal lengths", lambda m: m.score_pairs([0, 1], [0, 1, 2]),
             ValueError, "equal length, got 2 and 3"),
        Case("partial_fit_users, -1", lambda m: m.partial_fit_users([0, -1], two), IndexError,
             "userids.*-1"),
        Case("partial_fit_items, -1", lambda m: m.partial_fit_items([-1], COLUMNS[:1]), IndexError,
             "itemids.*-1"),
        Case("partial_fit_users, a float", lambda m: m.partial_fit_users([0.5], two[:1]), BAD_IDS,
             "userid.*integers.*float"),
        Case("partial_fit_users, 2**63", lambda m: m.partial_fit_users([2**63], two[:1]), BAD_IDS,
             "userid.*(9223372036854775808|integers)"),
        Case("partial_fit_users, 2**63 - 1", lambda m: m.partial_fit_users([2**63 - 1], two[:1]),
             (*BAD_IDS, MemoryError), "userid.*9223372036854775807"),
        Case("partial_fit_users, a gap", lambda m: m.partial_fit_users([5_000_000], two[:1]),
             BAD_IDS, "userid.*5000000"),
        Case("partial_fit_items, a gap", lambda m: m.partial_fit_items([5_000_000], COLUMNS[:1]),
             BAD_IDS, "itemid.*5000000"),
        Case("partial_fit_users, fewer rows", lambda m: m.partial_fit_users([0, 1, 2], two),
             ValueError, "2 rows .* for 3 ids"),
        Case("partial_fit_items, more rows", lambda m: m.partial_fit_items([0], COLUMNS[:2]),
             ValueError, "2 rows .* for 1 ids"),
        Case("recalculate_user, fewer rows", lambda m: m.recalculate_user([0, 1, 2], two),
             ValueError, "2 rows .* for 3 ids"),
        Case("recalculate_item, no rows", lambda m: m.recalculate_item(0, None), ValueError,
             "item_users needs to be a CSR sparse matrix, got NoneType"),
        Case("recalculate_user, text", lambda m: m.recalculate_user("0", ROWS[0]), BAD_IDS,
             "userid must hold integers"),
    ]  # fmt: skip
    return cases


def _selections() -> list[Case]:
    """Whitelists and blacklists."""
    wrong: dict[str, tuple[Any, str]] = {
        "out of range": ([0, 99], "99"),
        "below 0": ([-1], "-1"),
        "floats": ([0.5], "integers.*float"),
        "text": (["a"], "integers"),
        "nested": ([[0], [1]], r"\(2, 1\)"),
        "2**63": ([2**63], "9223372036854775808|integers"),
    }

    def recommend(**given: Any) -> Callable[[Any], object]:
        return lambda model: model.recommend(0, ROWS[0], **given)

    cases = [
        Case(f"recommend, {name} {what}", recommend(**{name: ids}), BAD_IDS,
             f"(?s)(?=.*{name}).*(?:{message})")
        for name in ("items", "filter_items")
        for what, (ids, message) in wrong.items()
    ]  # fmt: skip
    both = "Can't set both"
    return [
        *cases,
        Case("recommend, both lists", recommend(items=[1], filter_items=[2]), ValueError, both),
        Case("similar_items, both lists",
             lambda m: m.similar_items(0, items=[1], filter_items=np.array([2, 3])), ValueError,
             both),
        Case("similar_users, both lists",
             lambda m: m.similar_users(0, users=[1], filter_users=[2]), ValueError, both),
        Case("similar_users, users out of range", lambda m: m.similar_users(0, users=[99]),
             IndexError, "users 99"),
        Case("similar_users, filter_users below 0", lambda m: m.similar_users(0, filter_users=[-1]),
             IndexError, "filter_users -1"),
        Case("similar_items, items of floats", lambda m: m.similar_items(0, items=[0.5]), BAD_IDS,
             "items must hold integers"),
        Case("rank_items, out of range", lambda m: m.rank_items(0, ROWS[0], [99]), IndexError,
             "items 99"),
    ]  # fmt: skip


def _numbers_of_results() -> list[Case]:
    wrong: dict[str, tuple[Any, str]] = {
        "-1": (-1, "N must be .*got -1"),
        "1.5": (1.5, "N must be an integer, got float"),
        "text": ("10", "N must be an integer, got str"),
        "None": (None, "N must be an integer, got NoneType"),
        "2**62": (2**62, rf"\bN\b.*{2**62}|{2**62}.*\bN\b"),
    }
    calls: dict[str, Callable[[Any], Callable[[Any], object]]] = {
        "recommend": lambda n: lambda m: m.recommend(0, ROWS[0], N=n),
        "similar_items": lambda n: lambda m: m.similar_items(0, N=n),
        "similar_users": lambda n: lambda m: m.similar_users(0, N=n),
    }
    error = (ValueError, TypeError, MemoryError)
    cases = [
        Case(f"{name}, N {what}", make(n), error, message)
        for name, make in calls.items()
        for what, (n, message) in wrong.items()
    ]
    # More results than fit into the memory of any machine.
    many = np.zeros(10_000, np.int64)
    return [
        *cases,
        Case("explain, N -1", lambda m: m.explain(0, ROWS, 1, N=-1), ValueError, "N must be"),
        Case("explain, N 1.5", lambda m: m.explain(0, ROWS, 1, N=1.5), TypeError, "N must be"),
        Case("recommend, N 10**9 for 10,000 users",
             lambda m: m.recommend(many, None, N=10**9, filter_already_liked_items=False), error,
             r"\bN\b"),
        Case("similar_items, N 10**9 for 10,000 items",
             lambda m: m.similar_items(many, N=10**9), error, r"\bN\b"),
        Case("recommend_all, N -1", lambda m: m.recommend_all(ROWS, N=-1), ValueError, "N must be"),
    ]  # fmt: skip


def _user_items() -> list[Case]:
    """Rows passed with ids."""
    csr = "user_items needs to be a CSR sparse matrix, got"
    wide = sparse.csr_matrix(([1.0], [40], [0, 1]), shape=(1, 50))
    two = "must contain 1 row for every user in userids: got 24 rows .* for 2 ids"
    return [
        Case("recommend, no rows", lambda m: m.recommend(0, None), ValueError, f"{csr} NoneType"),
        Case("recommend, CSC", lambda m: m.recommend([0], ROWS[:1].tocsc()), ValueError,
             rf"{csr} csc_matrix: pass user_items.tocsr\(\)"),
        Case("recommend, COO", lambda m: m.recommend([0], ROWS[:1].tocoo()), ValueError, csr),
        Case("recommend, dense", lambda m: m.recommend([0], ROWS[:1].toarray()), ValueError, csr),
        Case("recommend, a list", lambda m: m.recommend(0, [1, 2]), ValueError, f"{csr} list"),
        Case("recommend, all rows for one user", lambda m: m.recommend(0, ROWS), ValueError,
             r"24 rows .* for 1 ids.*Use user_items\[userids\]"),
        Case("recommend, all rows for two users", lambda m: m.recommend([0, 1], ROWS), ValueError,
             two),
        Case("recommend, an item beyond the table", lambda m: m.recommend(0, wide), ValueError,
             "column 40.*18 items"),
        Case("recommend with recalculate_user, an item beyond the table",
             lambda m: m.recommend(0, wide, recalculate_user=True), ValueError,
             "column 40.*18 items"),
        Case("recommend with recalculate_user, no rows",
             lambda m: m.recommend(0, None, recalculate_user=True), ValueError, csr),
        Case("recommend, item_users in their place", lambda m: m.recommend([0], COLUMNS[17]),
             ValueError, "column .*18 items.*transposed"),
        Case("similar_items with recalculate_item, no rows",
             lambda m: m.similar_items(0, recalculate_item=True), ValueError, "item_users needs"),
        Case("recommend_all, CSC", lambda m: m.recommend_all(ROWS.tocsc()), ValueError, csr),
        Case("recommend_all, an offset beyond the users",
             lambda m: m.recommend_all(ROWS, users_items_offset=5), IndexError, "userid 28"),
    ]  # fmt: skip


def _explain() -> list[Case]:
    return [
        Case("explain, several users", lambda m: m.explain([0, 1], ROWS, 1), BAD_IDS, "userid"),
        Case("explain, several items", lambda m: m.explain(0, ROWS, [1, 2]), BAD_IDS, "itemid"),
        Case("explain, no user", lambda m: m.explain([], ROWS, 1), BAD_IDS, "userid"),
        Case("explain, an item beyond the table", lambda m: m.explain(0, ROWS, 18), IndexError,
             "itemid 18"),
        Case("explain, an item below 0", lambda m: m.explain(0, ROWS, -1), IndexError, "itemid -1"),
        Case("explain, a user beyond the matrix", lambda m: m.explain(23, ROWS[:5], 1), BAD_IDS,
             "userid.*23"),
        Case("explain, a user below 0", lambda m: m.explain(-1, ROWS, 1), IndexError, "userid"),
        Case("explain, text", lambda m: m.explain("0", ROWS, 1), BAD_IDS, "userid.*integers"),
        Case("explain, no matrix", lambda m: m.explain(0, None, 1), ValueError, "user_items needs"),
        Case("explain, a matrix that is too wide",
             lambda m: m.explain(0, sparse.csr_matrix(np.ones((1, 30))), 1), ValueError,
             "column 29.*18 items"),
        Case("explain, weights of another shape",
             lambda m: m.explain(0, ROWS, 1, user_weights=(np.eye(3), False)), ValueError,
             r"user_weights.*\(3, 3\)"),
        Case("explain, weights that are none",
             lambda m: m.explain(0, ROWS, 1, user_weights="x"), WRONG_OBJECT, "user_weights"),
    ]  # fmt: skip


def _assigned_tables() -> list[Case]:
    one_nan = np.ones((N_ITEMS, 6), np.float32)
    one_nan[4, 2] = np.nan
    wrong: dict[str, tuple[Any, str]] = {
        "with NaN": (one_nan, "NaN"),
        "with infinity": (np.full((4, 6), np.inf), "[Ii]nf"),
        "of one axis": (np.ones(6), r"2-D array.*\(6,\)"),
        "of three axes": (np.ones((2, 3, 4)), r"2-D array.*\(2, 3, 4\)"),
        "of text": ([["a", "b"]], "2-D array of numbers"),
        "of objects": (np.array([[None, 1.0]]), "2-D array of numbers"),
        "of complex numbers": (np.ones((2, 6), complex), "numbers.*complex"),
        "of several lengths": ([[1.0], [1.0, 2.0]], "(2-D array|inhomogeneous)"),
    }
    cases = [
        Case(f"{name} {what}", lambda m: None, ValueError, f"(?s)(?=.*{name}).*{message}",
             {name: table})
        for name in ("user_factors", "item_factors")
        for what, (table, message) in wrong.items()
    ]  # fmt: skip
    narrow, widths = np.ones((N_USERS, 4), np.float32), r"(?s)(?=.*\b4\b)(?=.*\b6\b).*factors"
    uses: dict[str, Callable[[Any], object]] = {
        "recommend": lambda m: m.recommend(0, ROWS[0]),
        "recommend of all": lambda m: m.recommend(np.arange(N_USERS), ROWS),
        "score_pairs": lambda m: m.score_pairs(0, 1),
        "partial_fit_users": lambda m: m.partial_fit_users([0], ROWS[:1]),
    }
    return cases + [
        Case(f"{name}, tables of two widths", use, ValueError, widths, {"user_factors": narrow})
        for name, use in uses.items()
    ]


class _Polars:
    """Looks like a frame of polars, without a dependency on polars."""

    columns = ("user", "item")
    dtypes = ("String", "String")
    shape = (3, 2)

    def to_pandas(self) -> pd.DataFrame:
        return EVENTS

    def to_numpy(self) -> np.ndarray:
        return EVENTS.to_numpy()


_Polars.__module__, _Polars.__qualname__, _Polars.__name__ = (
    "polars.dataframe.frame", "DataFrame", "DataFrame",
)  # fmt: skip
EVENTS = pd.DataFrame({"user": ["ann", "bob", "ann"], "item": ["tea", "tea", "cup"]})
PURCHASES = Interactions(ROWS, pd.RangeIndex(N_USERS), pd.RangeIndex(N_ITEMS))
SHARDED = ShardedMatrix(Path("/no/such/directory"), ROWS.shape, ROWS.nnz, 2, True)


def _table_of_arrow() -> Any:
    import pyarrow

    return pyarrow.Table.from_pandas(EVENTS)


def _wrong_objects() -> list[Case]:
    """Objects meant for another call. The message names that call."""
    wrong: dict[str, tuple[Any, str]] = {
        "a path": ("/data/plays.npz", "path|str|text"),
        "a Path": (Path("/data/plays.npz"), "path|Path"),
        "a frame of events": (EVENTS, "interactions_from_frame"),
        "a frame of polars": (_Polars(), r"interactions_from_frame|to_pandas"),
        "a table of pyarrow": (_table_of_arrow(), r"interactions_from_frame|to_pandas"),
        "Interactions": (PURCHASES, r"\.matrix"),
        "None": (None, "(?i)None"),
        "a dict": ({0: [1, 2]}, "dict"),
        "a generator": ((row for row in ROWS), "generator"),
        "a model": (TPUAlternatingLeastSquares(), "TPUAlternatingLeastSquares"),
        "a number": (3, r"(?i)int|scalar|\b3\b"),
    }
    calls: dict[str, Callable[[Any], Callable[[Any], object]]] = {
        "fit": fit,
        "transform": lambda x: lambda m: m.transform(x),
        "score": lambda x: lambda m: m.score(x),
        "recommend": lambda x: lambda m: m.recommend([0], x),
    }
    cases = [
        Case(f"{name}, {what}", make(given), WRONG_OBJECT, message)
        for name, make in calls.items()
        for what, (given, message) in wrong.items()
        if not (name == "recommend" and given is None)
    ]
    to_csr = r"(?i)ShardedMatrix.*(to_csr|blocks)"
    return [
        *cases,
        Case("transform, a ShardedMatrix", lambda m: m.transform(SHARDED), WRONG_OBJECT, to_csr),
        Case("score, a ShardedMatrix", lambda m: m.score(SHARDED), WRONG_OBJECT, to_csr),
        Case("recommend, a ShardedMatrix", lambda m: m.recommend(0, SHARDED), WRONG_OBJECT, to_csr),
        Case("fit, a callback that is none",
             lambda m: m.fit(ROWS, show_progress=False, callback=3), TypeError,
             "callback must be callable.*got int"),
        Case("set_params, an unknown name", lambda m: m.set_params(facters=3), ValueError,
             "facters"),
        Case("fit, early stopping without anything to hold out",
             fit(sparse.csr_matrix(np.eye(4, dtype=np.float32)), early_stopping=True), ValueError,
             "early_stopping.*hold out"),
    ]  # fmt: skip


def _files() -> list[Case]:
    load = TPUAlternatingLeastSquares.load
    return [
        Case("load, no such file", lambda m: load("/no/such/model.npz"), FileNotFoundError,
             "/no/such/model"),
        Case("load, no file", lambda m: load(None), WRONG_OBJECT, "NoneType|None"),
        Case("load, a number", lambda m: load(3), WRONG_OBJECT, "int"),
        Case("save, no such directory", lambda m: m.save("/no/such/model.npz"), OSError,
             "/no/such"),
        Case("save, no file", lambda m: m.save(None), WRONG_OBJECT, "NoneType|None"),
    ]  # fmt: skip


def _unfitted() -> list[Case]:
    new = TPUAlternatingLeastSquares
    calls: dict[str, Callable[[], object]] = {
        "recommend": lambda: new().recommend(0, ROWS[0]),
        "transform": lambda: new().transform(ROWS),
        "score": lambda: new().score(ROWS),
        "similar_items": lambda: new().similar_items(0),
        "similar_users": lambda: new().similar_users(0),
        "recalculate_user": lambda: new().recalculate_user(0, ROWS[0]),
        "partial_fit_items": lambda: new().partial_fit_items([0], COLUMNS[:1]),
        "explain": lambda: new().explain(0, ROWS, 1),
        "score_pairs": lambda: new().score_pairs(0, 0),
        "inverse_transform": lambda: new().inverse_transform(np.ones((1, 100))),
    }
    return [
        Case(f"{name}, unfitted", lambda m, call=call: call(), NotFittedError, "(?i)fit")
        for name, call in calls.items()
    ]


def cases() -> list[Case]:
    """All cases."""
    return [
        *_parameters(), *_changed_after_fit(), *_matrices(), *_ids(), *_selections(),
        *_numbers_of_results(), *_user_items(), *_explain(), *_assigned_tables(),
        *_wrong_objects(), *_files(), *_unfitted(),
    ]  # fmt: skip
