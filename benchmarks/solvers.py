"""Which solver is best for many factors? Seconds per iteration, and loss after equal iterations.

The data are MovieLens-1M's training part in the split of He et al. (2017). The objective is "ials"
with the hyperparameters of `quality_ml1m.py`. The loss of Cholesky is that of an exact solver.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import common
import quality_ml1m
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares

SOLVERS = ("cholesky", "cg")


def main() -> None:
    """Run all solvers for each number of factors."""
    named = os.environ.get("TPU_ALS_DATA")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(named) if named else None)
    parser.add_argument("--factors", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--iterations", type=int, default=quality_ml1m.ITERATIONS)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--quick", action="store_true", help="a test with few factors")
    args = parser.parse_args()
    if args.quick:
        args.factors, args.iterations = [16], 2
    train = quality_ml1m.load(args.data).train
    common.emit(benchmark="solvers", what="machine", **common.machine())
    for factors in args.factors:
        exact = None
        for solver in args.solvers:
            seconds, loss = fitted(train, factors, solver, args.iterations)
            exact = loss if solver == "cholesky" else exact
            common.emit(
                benchmark="solvers", factors=factors, solver=solver, iterations=args.iterations,
                iteration_s=seconds, loss=loss, above_cholesky=loss / exact - 1 if exact else None,
            )  # fmt: skip


def fitted(
    train: sparse.csr_matrix, factors: int, solver: str, iterations: int
) -> tuple[float, float]:
    """Median seconds of an iteration, without the first, and the loss after the last."""
    model = TPUAlternatingLeastSquares(
        factors, quality_ml1m.REGULARIZATION, iterations=iterations, random_state=0,
        objective="ials", unobserved_weight=quality_ml1m.UNOBSERVED_WEIGHT, linear_solver=solver,
        calculate_training_loss=True,
    )  # fmt: skip
    model.fit(train, show_progress=False)
    seconds, losses = model.history_["seconds"], model.history_["loss"]
    return statistics.median(seconds[1:]), losses[-1]


if __name__ == "__main__":
    main()
