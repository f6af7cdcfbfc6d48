"""What does scikit-learn's grid search cost beyond the fits and scores in it?

A search over 12 candidates of regularization and alpha, on one split of the rows, alternates with
12 fits and scores of the same models by hand. Programs that the search compiles are counted. With
`--folds N` the search runs once over N folds, and the shares of fits and scores are printed.
"""

from __future__ import annotations

import argparse

import common
import jax
import numpy as np
from scipy import sparse
from sklearn.model_selection import GridSearchCV, KFold, ParameterGrid, PredefinedSplit

from tpu_als import TPUAlternatingLeastSquares

GRID = ParameterGrid({"regularization": [0.1, 1.0, 10.0, 30.0], "alpha": [1.0, 10.0, 40.0]})


class Compilations:
    """Counts the programs that XLA compiles."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._record)

    def _record(self, event: str, duration_secs: float, **_: object) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


class Search:
    """The same work twice: by scikit-learn and by hand."""

    def __init__(self, matrix: sparse.csr_matrix, factors: int, iterations: int) -> None:
        self.matrix, self.factors, self.iterations = matrix, factors, iterations
        fold = np.where(np.random.default_rng(0).random(matrix.shape[0]) < 0.1, 0, -1)
        self.split = PredefinedSplit(fold)
        self.train, self.test = next(iter(self.split.split()))

    def model(self) -> TPUAlternatingLeastSquares:
        """An unfitted model."""
        return TPUAlternatingLeastSquares(self.factors, iterations=self.iterations, random_state=0)

    def by_sklearn(self) -> list[float]:
        """Scores of all candidates."""
        grid = {name: sorted({point[name] for point in GRID}) for name in GRID[0]}
        search = GridSearchCV(self.model(), grid, cv=self.split, refit=False)
        search.fit(self.matrix, show_progress=False)
        return list(search.cv_results_["mean_test_score"])

    def by_hand(self) -> list[float]:
        """The same scores, in the order of the grid."""
        train, test = self.matrix[self.train], self.matrix[self.test]
        return [
            self.model().set_params(**point).fit(train, show_progress=False).score(test)
            for point in GRID
        ]


def shares(matrix: sparse.csr_matrix, args: argparse.Namespace) -> None:
    """Seconds of fits and of scores in a search over some folds."""
    model = TPUAlternatingLeastSquares(
        args.factors, iterations=args.iterations, random_state=0, verbose=False
    )
    grid = {name: sorted({point[name] for point in GRID}) for name in GRID[0]}
    search = GridSearchCV(model, grid, cv=KFold(args.folds, shuffle=True, random_state=0))
    search.refit = False
    seconds = common.seconds(lambda: search.fit(matrix))
    parts = {
        name: float(np.sum(search.cv_results_[f"mean_{name}_time"]) * args.folds)
        for name in ("fit", "score")
    }
    common.emit(
        benchmark="grid_search", what="shares", folds=args.folds, candidates=len(GRID),
        factors=args.factors, iterations=args.iterations, seconds=seconds, **parts,
    )  # fmt: skip


def main() -> None:
    """Compare the two."""
    parser = common.parser(__doc__, ("ml1m", "power-law"))
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--folds", type=int, help="run one search over so many folds instead")
    args = parser.parse_args()
    if args.quick:
        args.factors, args.iterations, args.repeats = 8, 2, 1
    name, matrix = common.load(args)
    common.emit(benchmark="grid_search", what="machine", **common.machine())
    if args.folds:
        shares(matrix, args)
        return
    compilations, search = Compilations(), Search(matrix, args.factors, args.iterations)
    once = common.seconds(
        lambda: search.model().fit(matrix[search.train], show_progress=False).score(
            matrix[search.test]
        )
    )  # fmt: skip
    one = compilations.count
    scores = search.by_sklearn()
    taken = common.in_turns({"search": search.by_sklearn, "by hand": search.by_hand}, args.repeats)
    common.emit(
        benchmark="grid_search", dataset=name, shape=matrix.shape, entries=matrix.nnz,
        dtype="float32", factors=args.factors, iterations=args.iterations, candidates=len(scores),
        search_s=taken["search"], fits_and_scores_s=taken["by hand"],
        ratio=taken["search"] / taken["by hand"], cold_fit_and_score_s=once,
        programs_of_one_fit_and_score=one, further_programs=compilations.count - one,
        best_score=max(scores),
        scores_are_equal=bool(np.allclose(sorted(scores), sorted(search.by_hand()))),
    )  # fmt: skip


if __name__ == "__main__":
    main()
