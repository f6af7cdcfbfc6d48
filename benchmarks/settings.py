"""What do objective, alpha, weighting, regularization and factors change? NDCG@10 of many settings.

The data sets are those of `tune.py`, by default MovieLens-1M with a fifth of each user's entries
held out at random, and a year of grocery purchases with the last fifth of the time held out. The
same test part measures all settings, so a small difference between two of them means nothing. The
settings whose names begin with "start" are those that docs/choosing.md advises to start with. With
--ranges, the settings around them are measured that docs/choosing.md advises to try next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import common
import tune
import tune_data
from sklearn.model_selection import ParameterGrid

from tpu_als import RecommenderPipeline, TPUAlternatingLeastSquares
from tpu_als.baselines import PopularityRecommender
from tpu_als.evaluation import ranking_metrics_at_k
from tpu_als.weighting import BM25Weighting, LogWeighting, TfidfWeighting

WEIGHTINGS = {"log": LogWeighting, "tfidf": TfidfWeighting, "bm25": BM25Weighting}
_IALS: dict[str, dict[str, Any]] = {
    name: dict(objective="ials", **hand) for name, hand in tune.BY_HAND.items()
}

# The lines of docs/choosing.md that a reader can start with, the same for all data sets.
START: dict[str, tuple[str | None, dict[str, Any]]] = {
    "counts": (
        "log",
        dict(factors=64, objective="ials", regularization=0.003, unobserved_weight=0.7),
    ),
    "ones": (None, dict(factors=64, objective="ials", regularization=0.003)),
    "as with implicit": (None, dict(factors=64, regularization=10)),
    "few items": (
        "log",
        dict(factors=16, objective="ials", regularization=0.003, unobserved_weight=0.7),
    ),
}

# Around each of these lines: parameters to try, in all combinations.
_WEIGHTED = dict(regularization=(0.001, 0.002, 0.003))
RANGES: dict[str, list[dict[str, Any]]] = {
    "counts": [_WEIGHTED | dict(unobserved_weight=(0.4, 0.7, 1.0))],
    "ones": [_WEIGHTED | dict(unobserved_weight=(0.7, 1.0, 2.0))],
    "as with implicit": [
        dict(regularization=(1, 3, 10, 20, 30)),
        dict(regularization=(10, 20), alpha=(0.5, 1, 2)),
    ],
    "few items": [dict(factors=(16, 32))],
}


def ranges() -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Name, weighting and parameters of each setting around the start lines."""
    yield "defaults", None, {}
    for case, grids in RANGES.items():
        weighting, given = START[case]
        for changed in ParameterGrid(grids):
            named = ", ".join(f"{parameter} {value:g}" for parameter, value in changed.items())
            yield f"{case}, {named}", weighting, given | changed


def settings(name: str) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Name, weighting and parameters of each setting."""
    ials = _IALS[name]
    yield "defaults", None, {}
    for case, (weighting, given) in START.items():
        yield f"start, {case}", weighting, given
    yield (
        "factors 64, alpha 40, regularization 10",
        None,
        dict(factors=64, alpha=40, regularization=10),
    )
    for alpha in (1, 5, 10, 40):
        yield f"alpha {alpha}", None, dict(factors=64, alpha=alpha)
    for regularization in (1, 10, 100):
        yield (
            f"regularization {regularization}",
            None,
            dict(factors=64, regularization=regularization),
        )
    for weighting in ("log", "tfidf"):
        yield f"{weighting}, regularization 10", weighting, dict(factors=64, regularization=10)
    yield "ials", None, dict(factors=64, **ials)
    for weighting in WEIGHTINGS:
        yield f"ials, {weighting}", weighting, dict(factors=64, **ials)
    for factors in (16, 32, 128, 256):
        yield f"ials, log, factors {factors}", "log", dict(factors=factors, **ials)


def main() -> None:
    """Fit and measure every setting; print a line for each."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--dataset", nargs="+", choices=tune.DATASETS, default=["ml1m", "groceries"]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranges", action="store_true", help="settings around the start lines")
    args = parser.parse_args()
    common.emit(benchmark="settings", what="machine", **common.machine())
    for name in tune.chosen(args):
        split = tune_data.load(name, args.data, quick=args.quick)
        _report(name, "popularity", PopularityRecommender().fit(split.train), split, 0.0)
        for setting, weighting, given in ranges() if args.ranges else settings(name):
            if args.quick and (weighting or given.get("factors") != 64):
                continue
            model: Any = TPUAlternatingLeastSquares(random_state=args.seed, verbose=False, **given)
            if weighting is not None:
                steps = [("weighting", WEIGHTINGS[weighting]()), ("model", model)]
                model = RecommenderPipeline(steps)
            begin = time.perf_counter()
            model.fit(split.train)
            _report(name, setting, model, split, time.perf_counter() - begin)


def _report(name: str, setting: str, model: Any, split: tune_data.Split, seconds: float) -> None:
    """Print NDCG@10 of a fitted model."""
    found = ranking_metrics_at_k(model, split.train, split.test, K=10)["ndcg"]
    common.emit(benchmark="settings", dataset=name, setting=setting, ndcg=found, fit_s=seconds)


if __name__ == "__main__":
    main()
