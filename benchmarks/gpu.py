"""How long do fits and ranking on an accelerator take, compared with implicit's CUDA kernels?

The time of an iteration is also compared with the least time to move the bytes. Both libraries
start from the same tables. Losses are not timed. The engine computes them for both libraries;
implicit's CPU function computes the last one again, to show that they agree. The target is 1.001
times the loss of the reference after `--iterations`. `--what` chooses the parts:

fit : seconds to the target and of an iteration; peak memory of the device.
parity : the largest difference of tables after two iterations from those of the CPU backend.
ranking : the best ten unseen items of all users, in batches.
profile : time of the 20 longest kernels of an iteration.
variants : time of an iteration with other kernels, chunks, precisions and solvers.

Without a GPU only tpu_als runs, on the available device. implicit needs the packages
librmm-cu13==26.4.* and rapids-logger==0.2.* beside CUDA 13.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import common
import jax
import numpy as np
from jax import lax
from libraries import Ours, Problem, Run, available, race

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.engine import als
from tpu_als.engine.xla import placing, programs, row_kernels, solve

REFERENCE = "tpu_als cholesky"
DEFAULT = ["tpu_als cg", "tpu_als relaxed", "tpu_als without kernels", REFERENCE, "implicit gpu"]
# bytes a second of device memory, as published by the vendor
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12, "L4": 0.3e12, "T4": 0.32e12}


def judge_of(problem: Problem) -> Callable[[tuple[np.ndarray, np.ndarray]], float]:
    """Return a function that computes the engine's loss of given tables."""
    judge = Ours(problem)
    return lambda tables: als.loss(als.start(judge.data, *tables), judge.data, judge.objective)


def floor_bytes(problem: Problem, itemsize: int) -> float:
    """Least number of bytes that an iteration moves.

    For each side, every entry's id, its value unless all are 1, and its source row are read once.
    Both tables are read and written.
    """
    row = problem.factors * itemsize
    entry = row + (4 if np.all(problem.matrix.data == 1) else 8)
    return 2.0 * problem.matrix.nnz * entry + 3.0 * sum(problem.matrix.shape) * row


def bandwidth(given: float | None) -> float | None:
    """Bytes a second of this device, or None if they are not known."""
    if given is not None:
        return given * 1e9
    kind = jax.devices()[0].device_kind
    return next((rate for name, rate in BANDWIDTH.items() if name in kind), None)


def agreement(problem: Problem, tables: tuple[np.ndarray, np.ndarray], loss: float) -> float | None:
    """Relative difference between a loss and the one that implicit computes."""
    if not common.installed("implicit"):
        return None
    from implicit.cpu.als import calculate_loss

    theirs = calculate_loss(problem.confidences(), *tables, problem.regularization, 0)
    return abs(loss / theirs - 1)


def report(
    runs: list[Run], problem: Problem, target: float, rate: float | None, about: dict[str, Any]
) -> None:
    """Print a line for each run, and the speed-up over implicit."""
    least = floor_bytes(problem, 4)
    for run in runs:
        taken = statistics.median(run.steps)
        common.emit(
            **about, library=run.name, setup_s=run.setup, iteration_s=taken, loss=run.losses[-1],
            target=target, iterations_to_target=run.reached(target),
            seconds_to_target=run.seconds_to(target), iterations_run=len(run.steps),
            floor_bytes=least, floor_s=least / rate if rate else None,
            times_floor=taken * rate / least if rate else None,
            loss_differs_from_implicits_by=agreement(
                problem, run.library.tables(), run.losses[-1]
            ),
        )  # fmt: skip
    reached = {run.name: run.seconds_to(target) for run in runs}
    ours_s = min(
        (s for name, s in reached.items() if name.startswith("tpu_als") and s), default=None
    )
    peer = next((run for run in runs if run.name == "implicit gpu"), None)
    if ours_s and peer:
        theirs = reached[peer.name] or peer.setup + sum(peer.steps)
        common.emit(
            **about, what="summary", times_faster_than_implicit_gpu_at_least=theirs / ours_s,
            implicit_gpu_reached_the_target=reached[peer.name] is not None,
        )  # fmt: skip


def peak_bytes() -> int | None:
    """Largest number of bytes of the device's memory that JAX has used in this process."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def parity(problem: Problem, _: argparse.Namespace, about: dict[str, Any]) -> None:
    """Print how far tables after two iterations are from those of the CPU backend."""
    runs = [Ours(problem), Ours(problem, devices=jax.devices("cpu")[:1])]
    for run in runs:
        run.step()
        run.step()
    for name, ours, cpu in zip(("users", "items"), *(run.tables() for run in runs), strict=True):
        differs = np.abs(ours - cpu).max() / np.abs(cpu).max()
        common.emit(**about, what="parity", table=name, largest_relative_difference=differs)


def ranking(problem: Problem, args: argparse.Namespace, about: dict[str, Any]) -> None:
    """Print the seconds to rank all items for all users, in batches."""
    model = TPUAlternatingLeastSquares(problem.factors, iterations=1, random_state=0)
    model.fit(problem.matrix, show_progress=False)
    models: dict[str, Any] = {"tpu_als": model}
    batch = args.batch
    if available(["implicit gpu"]):
        import implicit.gpu
        from implicit.gpu.als import AlternatingLeastSquares

        models["implicit gpu"] = peer = AlternatingLeastSquares(problem.factors)
        peer.user_factors = implicit.gpu.Matrix(np.array(model.user_factors))
        peer.item_factors = implicit.gpu.Matrix(np.array(model.item_factors))
    starts = range(0, problem.matrix.shape[0], batch)
    batches = [np.arange(low, min(low + batch, problem.matrix.shape[0])) for low in starts]
    rows = [problem.matrix[users] for users in batches]

    def rank(name: str) -> list[Any]:
        model = models[name]
        return [model.recommend(users, row) for users, row in zip(batches, rows, strict=True)]

    taken = common.in_turns({name: functools.partial(rank, name) for name in models}, 3)
    flops = 2.0 * problem.factors * np.prod(problem.matrix.shape)
    for name, seconds in taken.items():
        common.emit(
            **about, what="ranking", library=name, seconds=seconds, batch=batch,
            us_per_user=1e6 * seconds / problem.matrix.shape[0], tflops=flops / seconds / 1e12,
        )  # fmt: skip


def profile(problem: Problem, _: argparse.Namespace, about: dict[str, Any]) -> None:
    """Print the device time of the 20 longest kernels of an iteration."""
    run = Ours(problem)
    run.step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run.step()
        file = next(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
    spent: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for plane in planes:
        for line in plane.lines if plane.name.startswith("/device:GPU") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                spent[event.name] += int(event.duration_ns)
                calls[event.name] += 1
    total = sum(spent.values())
    common.emit(**about, what="profile", device_ms=total / 1e6, calls=sum(calls.values()))
    for name, ns in spent.most_common(20):
        common.emit(what="profile", program=name[:80], ms=ns / 1e6, calls=calls[name])


def fit(problem: Problem, args: argparse.Namespace, about: dict[str, Any]) -> None:
    """Step the libraries in turns, and print a line for each."""
    names = available(args.libraries)
    runs, target = race(problem, names, judge_of(problem), REFERENCE, args.iterations, args.most)
    report(runs, problem, target, bandwidth(args.bandwidth), about)
    common.emit(**about, what="memory", peak_bytes=peak_bytes())


class Variant(NamedTuple):
    """Constants of modules of the engine to replace, and options of `Ours`."""

    constants: dict[str, Any]
    options: dict[str, Any]


VARIANTS = {
    "kernels": Variant({}, {}),
    "kernels, tiles of 2048 numbers": Variant({"row_kernels._TILE": 1 << 11}, {}),
    "kernels, tiles of 8192 numbers, 8 warps": Variant(
        {"row_kernels._TILE": 1 << 13, "row_kernels._WARPS": 8}, {}
    ),
    "kernels, 4 chunks": Variant({"row_kernels._CHUNKS": 4}, {}),
    "kernels, 64 chunks": Variant({"row_kernels._CHUNKS": 64}, {}),
    "kernels, bfloat16": Variant({}, {"dtype": "bfloat16"}),
    "XLA": Variant({}, {"with_kernels": False}),
    "XLA, products of 3 bfloat16 passes or tf32": Variant(
        {"solve.PRECISION": lax.Precision.HIGH}, {"with_kernels": False}
    ),
    "XLA, default precision": Variant(
        {"solve.PRECISION": lax.Precision.DEFAULT}, {"with_kernels": False}
    ),
    "XLA, chunks of 1 GiB": Variant(
        {"placing._SCRATCH": {"cpu": 1 << 20, "other": 1 << 30}}, {"with_kernels": False}
    ),
    "tiles on matrix units": Variant({}, {"with_kernels": False, "with_tiles": True}),
    "tiles on matrix units, bfloat16": Variant(
        {}, {"with_kernels": False, "with_tiles": True, "dtype": "bfloat16"}
    ),
    "gramians and batched Cholesky": Variant({}, {"solver": "cholesky"}),
}
MODULES = {"row_kernels": row_kernels, "solve": solve, "placing": placing}


def variants(problem: Problem, args: argparse.Namespace, about: dict[str, Any]) -> None:
    """Print seconds of an iteration for each variant, and the loss after all of them."""
    for name, (constants, options) in VARIANTS.items():
        with contextlib.ExitStack() as stack:
            for path, value in constants.items():
                module, _, constant = path.partition(".")
                stack.enter_context(mock.patch.object(MODULES[module], constant, value))
            programs.CACHE.clear()  # its keys do not have these constants
            try:
                ours, seconds = Ours(problem, native=False, **options), list[float]()
                for _ in range(args.repeats + 1):  # the first compiles
                    begin = time.perf_counter()
                    ours.step()
                    seconds.append(time.perf_counter() - begin)
                loss = als.loss(ours.state, ours.data, ours.objective)
            except (jax.errors.JaxRuntimeError, FloatingPointError, ValueError) as error:
                common.emit(**about, what="variant", variant=name, error=str(error)[:300])
                continue
        common.emit(
            **about, what="variant", variant=name, iteration_s=statistics.median(seconds[1:]),
            loss=loss,
        )  # fmt: skip
    programs.CACHE.clear()


PARTS = {
    "parity": parity,
    "fit": fit,
    "ranking": ranking,
    "profile": profile,
    "variants": variants,
}


def main() -> None:
    """Run all cases that the arguments choose."""
    parser = common.parser(__doc__, ("power-law", "ml1m"))
    parser.add_argument("--factors", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--most", type=int, default=100, help="largest number of iterations")
    parser.add_argument("--alpha", type=float, default=40.0)
    parser.add_argument("--regularization", type=float, default=10.0)
    parser.add_argument("--libraries", nargs="+", default=DEFAULT)
    parser.add_argument("--bandwidth", type=float, help="GB/s of the device, if not known here")
    parser.add_argument("--what", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--batch", type=int, default=10_000, help="users ranked in a call")
    args = parser.parse_args()
    if args.quick:
        args.factors, args.iterations, args.most = [16], 3, 6
    name, matrix = common.load(args)
    missing = sorted(set(args.libraries) - set(available(args.libraries)))
    common.emit(benchmark="gpu", what="machine", not_installed=missing, **common.machine())
    for factors in args.factors:
        problem = Problem(matrix, factors, args.alpha, args.regularization)
        about = {
            "benchmark": "gpu", "dataset": name, "shape": matrix.shape, "entries": matrix.nnz,
            "dtype": "float32", "factors": factors, "alpha": args.alpha,
            "regularization": args.regularization,
        }  # fmt: skip
        for part in args.what:
            PARTS[part](problem, args, about)


if __name__ == "__main__":
    main()
