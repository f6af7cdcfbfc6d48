"""How long does a fit take per iteration and to a given loss, compared with implicit and irspack?

The script first shows that all libraries solve the same problem. Then it steps them alternately
from the same initial tables, and measures each loss after every iteration by implicit's function.
The target is 1.001 times the loss of `--reference`, an exact solver, after `--iterations`.

"relaxed" has `over_relaxation=1.6`, "relaxed-4" 1.5 and 4 steps of CG, and "relaxed-xla" 1.6 and
`use_native=False`, which runs XLA's programs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import common
import numpy as np
from implicit.cpu.als import calculate_loss
from libraries import Problem, Run, available, race

REFERENCE = "implicit cholesky"
DEFAULT = [
    "tpu_als cg", "tpu_als relaxed", "tpu_als relaxed-4", "tpu_als relaxed-xla",
    "tpu_als cholesky", "tpu_als auto",
    "implicit cg", REFERENCE, "irspack cg", "irspack cholesky", "irspack ialspp",
]  # fmt: skip
SETTINGS = [(40.0, 10.0), (1.0, 0.01)]


def judge_of(problem: Problem) -> Callable[[tuple[np.ndarray, np.ndarray]], float]:
    """Return a function that computes implicit's loss of given tables."""
    confidences = problem.confidences()
    return lambda tables: calculate_loss(confidences, *tables, problem.regularization, 0)


def show_same_problem(problem: Problem, names: list[str], iterations: int) -> None:
    """Print how exact solvers differ after one iteration, and their losses after many."""
    judge, first, last = judge_of(problem), {}, {}
    for name in [name for name in names if name.endswith("cholesky")]:
        run = Run.prepared(name, problem)
        run.library.step()
        first[name] = [np.array(table) for table in run.library.tables()]
        for _ in range(iterations - 1):
            run.library.step()
        last[name] = judge(run.library.tables())
    scale = max(np.abs(table).max() for table in first[REFERENCE])
    distance = {
        name: max(np.abs(a - b).max() for a, b in zip(tables, first[REFERENCE], strict=True))
        / scale
        for name, tables in first.items()
    }
    common.emit(
        benchmark="fit", what="same problem", factors=problem.factors, alpha=problem.alpha,
        regularization=problem.regularization, iterations=iterations, loss=last,
        difference_of_tables_after_one_exact_iteration=distance,
    )  # fmt: skip


def report(runs: list[Run], target: float, iterations: int, about: dict[str, Any]) -> None:
    """Print a line for each library, and one that compares tpu_als with the best peer."""
    for run in runs:
        common.emit(
            **about, library=run.name, setup_s=run.setup,
            iteration_s=statistics.median(run.steps), loss=run.losses[iterations - 1],
            target=target, iterations_to_target=run.reached(target),
            seconds_to_target=run.seconds_to(target), iterations_run=len(run.steps),
            steps_s=run.steps, losses=run.losses,
        )  # fmt: skip
    ours = [run for run in runs if run.name.startswith("tpu_als")]
    peers = [run for run in runs if not run.name.startswith("tpu_als")]
    ours_s = min((s for run in ours if (s := run.seconds_to(target))), default=None)
    best_peer = min(peers, key=lambda run: run.least_seconds_to(target), default=None)
    plain = [run for run in peers if run.name.endswith(" cg")]
    default_peer = next((run for run in peers if run.name == "implicit cg"), None)
    common.emit(
        **about, what="summary",
        fastest_peer=best_peer.name if best_peer else None,
        fastest_peer_reached_the_target=(
            best_peer is not None and best_peer.reached(target) is not None
        ),
        times_faster_than_fastest_peer=(
            best_peer.least_seconds_to(target) / ours_s if ours_s and best_peer else None
        ),
        times_faster_than_implicit_cg_at_least=(
            default_peer.least_seconds_to(target) / ours_s if ours_s and default_peer else None
        ),
        fastest_iteration_s=min((statistics.median(run.steps) for run in ours), default=None),
        fastest_plain_cg_iteration_s=min(
            (statistics.median(run.steps) for run in plain), default=None
        ),
    )  # fmt: skip


def main() -> None:
    """Run all cases that the arguments choose."""
    parser = common.parser(__doc__, ("ml1m", "power-law"))
    parser.add_argument("--factors", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--most", type=int, default=100, help="largest number of iterations")
    parser.add_argument("--settings", type=int, nargs="+", default=[0, 1], help=str(SETTINGS))
    parser.add_argument("--libraries", nargs="+", default=DEFAULT)
    parser.add_argument(
        "--reference",
        default=REFERENCE,
        help="library whose final loss sets the target",
    )
    args: argparse.Namespace = parser.parse_args()
    if args.quick:
        args.factors, args.iterations, args.most = [16], 5, 10
    name, matrix = common.load(args)
    names = available(list(dict.fromkeys([*args.libraries, args.reference])))
    missing = sorted(set(args.libraries) - set(names))
    common.emit(benchmark="fit", what="machine", not_installed=missing, **common.machine())
    for alpha, regularization in [SETTINGS[i] for i in args.settings]:
        for i, factors in enumerate(args.factors):
            problem = Problem(matrix, factors, alpha, regularization)
            if i == 0 and REFERENCE in names:
                show_same_problem(problem, names, args.iterations)
            runs, target = race(
                problem, names, judge_of(problem), args.reference, args.iterations, args.most
            )
            about = {
                "benchmark": "fit", "dataset": name, "shape": matrix.shape, "entries": matrix.nnz,
                "dtype": "float32", "factors": factors, "alpha": alpha,
                "regularization": regularization,
            }  # fmt: skip
            report(runs, target, args.iterations, about)


if __name__ == "__main__":
    main()
