"""Wrong calls of the package's functions, and the error that each must raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from bad_models import COLUMNS, EVENTS, N_ITEMS, N_USERS, ROWS, WRONG_OBJECT, Case, with_value
from scipy import sparse

from tpu_als import evaluation, shards
from tpu_als.datasets import interactions_from_frame, power_law, split_by_time, web_graph
from tpu_als.weighting import BM25Weighting, LogWeighting, TfidfWeighting

EITHER = (ValueError, TypeError)
NO_FOLDER = Path("/no/such/directory")


def _case(name: str, call: Callable[[], object], error: Any, message: str) -> Case:
    return Case(name, lambda model: call(), error, message)


def _splits() -> list[Case]:
    split, leave = evaluation.train_test_split, evaluation.leave_k_out_split
    strong, by_time = evaluation.strong_generalization_split, evaluation.time_split
    nan = float("nan")
    cases = [
        _case(f"train_test_split, {value!r}", lambda v=value: split(ROWS, v), EITHER,
              f"train_percentage must be .*{value!r}")
        for value in (1.5, -0.1, nan, "0.8", None)
    ] + [
        _case(f"leave_k_out_split, K={value!r}", lambda v=value: leave(ROWS, K=v), EITHER,
              f"K must be .*{value!r}")
        for value in (0, -1, 1.5, "1", nan)
    ] + [
        _case(f"leave_k_out_split, train_only_size={value!r}",
              lambda v=value: leave(ROWS, train_only_size=v), EITHER,
              f"train_only_size must be .*{value!r}")
        for value in (1.0, -0.1, nan, "x")
    ] + [
        _case(f"strong_generalization_split, {name}={value!r}",
              lambda n=name, v=value: strong(ROWS, **{n: v}), EITHER, f"{name} must be .*{value!r}")
        for name in ("test_users", "fold_in")
        for value in (0, 1.0, nan, "x")
    ] + [
        _case(f"time_split, fraction={value!r}", lambda v=value: by_time(ROWS, ROWS, v), EITHER,
              f"fraction must be .*{value!r}")
        for value in (0, 1.0, nan, "x")
    ]  # fmt: skip
    for name, function in (("train_test_split", split), ("leave_k_out_split", leave),
                           ("strong_generalization_split", strong)):  # fmt: skip
        cases += [
            _case(f"{name}, NaN", lambda f=function: f(with_value(np.nan)), ValueError, "NaN"),
            _case(f"{name}, a seed that is none", lambda f=function: f(ROWS, random_state="x"),
                  EITHER, "random_state"),
            _case(f"{name}, a path", lambda f=function: f("/data/plays.npz"), EITHER,
                  "(?i)path|str|matrix"),
        ]  # fmt: skip
    times = ROWS.copy()
    times.data[3] = nan
    return [
        *cases,
        _case("strong_generalization_split, nobody to hold out",
              lambda: strong(sparse.csr_matrix(np.eye(4))), ValueError, "two positive entries"),
        _case("time_split, other entries", lambda: by_time(ROWS, ROWS[:, ::-1]), ValueError,
              "timestamps must"),
        _case("time_split, another shape", lambda: by_time(ROWS, COLUMNS), ValueError,
              "timestamps must"),
        _case("time_split, a missing time", lambda: by_time(ROWS, times), ValueError, "NaN"),
    ]  # fmt: skip


def _metrics() -> list[Case]:
    measure, rankings = evaluation.ranking_metrics_at_k, evaluation.metrics_of_rankings
    ids = np.tile(np.arange(5), (N_USERS, 1))
    popular = np.full(N_ITEMS, 9)
    cases = [
        Case(f"ranking_metrics_at_k, K={k!r}", lambda m, k=k: measure(m, ROWS, ROWS, K=k), EITHER,
             r"\b[KN]\b must be")
        for k in (-1, 1.5, "10", None)
    ] + [
        _case(f"make_ranking_scorer, k={k!r}",
              lambda k=k: evaluation.make_ranking_scorer("ndcg", k), EITHER, f"k must be .*{k!r}")
        for k in (0, 1.5, "10", None)
    ]  # fmt: skip
    scorer = evaluation.make_ranking_scorer("ndcg")
    return [
        *cases,
        Case("ranking_metrics_at_k, two shapes", lambda m: measure(m, ROWS, ROWS[:, :9]),
             ValueError, r"\(24, 18\).*\(24, 9\)"),
        Case("ranking_metrics_at_k, NaN in the test part",
             lambda m: measure(m, ROWS, with_value(np.nan)), ValueError, "NaN"),
        Case("ranking_metrics_at_k, infinity in the test part",
             lambda m: measure(m, ROWS, with_value(np.inf)), ValueError, "(?i)infinit|finite"),
        Case("ranking_metrics_at_k, a path", lambda m: measure(m, "train.npz", "test.npz"), EITHER,
             "(?i)path|str|matrix"),
        _case("metrics_of_rankings, NaN", lambda: rankings(ids, with_value(np.nan)), ValueError,
              "NaN"),
        _case("metrics_of_rankings, ids of one axis", lambda: rankings(np.arange(5), ROWS), EITHER,
              r"ids .*\(5,\)"),
        _case("metrics_of_rankings, ids of another number of rows", lambda: rankings(ids[:3], ROWS),
              ValueError, r"(?s)(?=.*\b3\b).*\b24\b"),
        _case("metrics_of_rankings, ids of floats", lambda: rankings(ids + 0.5, ROWS),
              (*EITHER, IndexError), "ids .*(integer|float)"),
        _case("metrics_of_rankings, popularity without n_users",
              lambda: rankings(ids, ROWS, popular), ValueError, "n_users must be .*got None"),
        _case("metrics_of_rankings, n_users below the popularity",
              lambda: rankings(ids, ROWS, popular, 3), ValueError, "n_users must be .*got 3"),
        _case("make_ranking_scorer, an unknown metric",
              lambda: evaluation.make_ranking_scorer("f1"), ValueError, "metric must be .*'f1'"),
        _case("make_ranking_scorer, no name", lambda: evaluation.make_ranking_scorer(None), EITHER,
              "metric must be .*None"),
        Case("scorer, NaN", lambda m: scorer(m, with_value(np.nan)), ValueError, "NaN"),
        Case("scorer, a frame of events", lambda m: scorer(m, EVENTS), EITHER,
             "interactions_from_frame|matrix|number|string"),
        Case("scorer, fewer columns", lambda m: scorer(m, COLUMNS), ValueError, r"18 (items|feat)"),
    ]  # fmt: skip


def _weightings() -> list[Case]:
    nan = float("nan")
    cases = [
        _case(f"{made().__class__.__name__}, {name}={value!r}",
              lambda made=made, n=name, v=value: made(**{n: v}).fit(ROWS), ValueError,
              f"{name} must be .*got {value!r}")
        for made, name, values in (
            (LogWeighting, "epsilon", (0, -1, nan, "1", None)),
            (BM25Weighting, "K1", (-1, nan, "1")),
            (BM25Weighting, "B", (-0.1, 1.1, nan, "1")),
        )
        for value in values
    ]  # fmt: skip
    for kind in (LogWeighting, TfidfWeighting, BM25Weighting):
        name = kind.__name__
        cases += [
            _case(f"{name}, NaN", lambda k=kind: k().fit(with_value(np.nan)), ValueError, "NaN"),
            _case(f"{name}, fewer columns",
                  lambda k=kind: k().fit(ROWS).transform(ROWS[:, :5]), ValueError,
                  "5 features.*18 features"),
        ]  # fmt: skip
    cases += [
        _case(f"{kind.__name__}, negative values", lambda k=kind: k().fit(-ROWS), ValueError,
              "Negative values")
        for kind in (TfidfWeighting, BM25Weighting)
    ]  # fmt: skip
    return [
        *cases,
        _case("BM25Weighting, more columns",
              lambda: BM25Weighting().fit(ROWS).transform(np.ones((1, 30))), ValueError,
              "30 features.*18 features"),
        _case("BM25Weighting, unfitted", lambda: BM25Weighting().transform(ROWS), ValueError,
              "not fitted"),
    ]  # fmt: skip


def _frames() -> list[Case]:
    def made(**changes: Any) -> Callable[[], object]:
        given = dict(frame=EVENTS, user="user", item="item")
        return lambda: interactions_from_frame(**{**given, **changes})

    mixed = pd.DataFrame({"user": [1, "ann"], "item": ["a", "b"]})
    lacking = EVENTS.assign(item=["tea", None, "cup"])
    values = EVENTS.assign(count=[1.0, float("nan"), 2.0], text=["1", "x", "3"])
    infinite = EVENTS.assign(count=[1.0, float("inf"), 2.0])
    numbers = pd.DataFrame({"user": [1, 2], "item": [10, 20]})
    dates = EVENTS.assign(when=["2020-01-01", "yesterday", "2020-01-03"])
    mixed_times = EVENTS.assign(when=[1, "2020-01-01", 3.0])
    some = pd.Index(["tea"])
    return [
        _case("interactions_from_frame, no such column", made(user="who"), ValueError, "'who'"),
        _case("interactions_from_frame, a missing item", made(frame=lacking), ValueError,
              "item.*missing"),
        _case("interactions_from_frame, a missing value", made(frame=values, value="count"),
              ValueError, "count.*missing"),
        _case("interactions_from_frame, values of text", made(frame=values, value="text"),
              ValueError, "(?s)(?=.*text).*x"),
        _case("interactions_from_frame, an infinite value", made(frame=infinite, value="count"),
              ValueError, "(?s)(?=.*count).*inf"),
        _case("interactions_from_frame, mixed types", made(frame=mixed), ValueError,
              "(?s)(?=.*user)(?=.*row).*ann"),
        _case("interactions_from_frame, items of another type",
              made(frame=numbers, items=pd.Index(["10", "20"])), ValueError, "items.*item"),
        _case("interactions_from_frame, users of another type",
              made(users=[1, 2]), ValueError, "users.*user"),
        _case("interactions_from_frame, unknown ids that are an error",
              made(items=some, unknown="error"), ValueError, r"(?s)(?=.*\b1\b).*item"),
        _case("interactions_from_frame, another way with unknown ids",
              made(items=some, unknown="ignore"), ValueError, "unknown must be .*'ignore'"),
        _case("interactions_from_frame, no frame", made(frame="events.csv"), WRONG_OBJECT,
              "(?i)DataFrame|frame"),
        _case("interactions_from_frame, a matrix", made(frame=ROWS), WRONG_OBJECT,
              "(?i)DataFrame|frame"),
        _case("split_by_time, no such column", lambda: split_by_time(EVENTS, "when"), ValueError,
              "'when' is not in the frame"),
        _case("split_by_time, a missing time",
              lambda: split_by_time(values, "count"), ValueError, "count.*missing"),
        _case("split_by_time, dates that are not dates",
              lambda: split_by_time(dates, "when"), ValueError,
              "(?s)(?=.*when)(?=.*row).*yesterday"),
        _case("split_by_time, mixed types", lambda: split_by_time(mixed_times, "when"), ValueError,
              "(?s)(?=.*when)(?=.*row).*2020-01-01"),
        *(_case(f"split_by_time, fraction={value!r}",
                lambda v=value: split_by_time(values, "user", v), EITHER,
                f"fraction must be .*{value!r}")
          for value in (0, 1, 1.5, float("nan"), "x")),
    ]  # fmt: skip


def _generators() -> list[Case]:
    return [
        _case("power_law, no entries", lambda: power_law(9, 9, 0), ValueError, "n_entries .*got 0"),
        _case("power_law, too many entries", lambda: power_law(9, 9, 80), ValueError, "got 80"),
        _case("power_law, exponent=1", lambda: power_law(9, 9, 9, exponent=1), ValueError,
              "exponent must be .*got 1"),
        _case("power_law, exponent NaN", lambda: power_law(9, 9, 9, exponent=float("nan")),
              ValueError, "exponent must be .*got nan"),
        _case("power_law, users below 0", lambda: power_law(-9, -9, 9), ValueError, "n_users|-9"),
        _case("power_law, half an entry", lambda: power_law(9, 9, 2.5), EITHER, "n_entries.*2.5"),
        _case("web_graph, too many links", lambda: web_graph(9, 80), ValueError,
              "n_links .*got 80"),
        _case("web_graph, no sites", lambda: web_graph(9, 9, n_sites=0), ValueError,
              "n_sites must be .*got 0"),
        _case("web_graph, two nodes", lambda: web_graph(2, 1), ValueError, "(n_links|n_nodes) "),
    ]  # fmt: skip


def _shards() -> list[Case]:
    write = shards.write_shards
    sharded = shards.ShardedMatrix(NO_FOLDER, (4, 4), 3, 2, True)
    cases = [
        _case(f"write_shards, {name}={value!r}",
              lambda n=name, v=value: write(ROWS, NO_FOLDER, **{n: v}), ValueError,
              f"{name} must be .*got {value!r}")
        for name, values in (
            ("n_shards", (0, 1.5, "8")), ("memory_entries", (0, 1.5)),
            ("compression", ("zip", None)),
        )
        for value in values
    ]  # fmt: skip
    return [
        *cases,
        _case("write_shards, NaN", lambda: write(with_value(np.nan), NO_FOLDER), ValueError,
              "(?i)NaN|finite"),
        _case("write_shards, a path", lambda: write("plays.npz", NO_FOLDER), EITHER,
              "(?i)str|matrix"),
        _case("write_shards, a dense array", lambda: write(ROWS.toarray(), NO_FOLDER), EITHER,
              "(?i)csr"),
        _case("write_shards, a shape that is too small",
              lambda: write(ROWS, NO_FOLDER, shape=(3, 3)), ValueError, "shape"),
        _case("write_shards, held_out of another shape",
              lambda: write(ROWS, NO_FOLDER, held_out=ROWS[:3]), ValueError, "held_out"),
        _case("open_shards, no such directory", lambda: shards.open_shards(NO_FOLDER),
              FileNotFoundError, "/no/such/directory"),
        _case("files, another side", lambda: sharded.files("users"), ValueError,
              "side must be .*'users'"),
        _case("files, a part out of range", lambda: sharded.files("user", 2, 2), ValueError,
              "part must be .*got part 2 of 2"),
        _case("files, no parts", lambda: sharded.files("user", 0, 0), ValueError, "part 0 of 0"),
        _case("blocks, no entries", lambda: sharded.blocks("user", entries=0), ValueError,
              "entries must be .*got 0"),
        _case("to_csr, no such directory", lambda: sharded.to_csr(), (ValueError, OSError),
              "/no/such/directory"),
    ]  # fmt: skip


def cases() -> list[Case]:
    """All cases."""
    return [*_splits(), *_metrics(), *_weightings(), *_frames(), *_generators(), *_shards()]
