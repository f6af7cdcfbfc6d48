"""Does the "ials" objective rank as published? MovieLens-1M in the split of He et al. (2017).

Each user's latest rating is held out and ranked among the 99 negatives that were published with
the split. HR@10 and NDCG@10 are means over the users. For 156 users one of the published negatives
is the held-out item itself. As in the original evaluation, which keys scores by item, it is
ignored, so these users have 98 negatives. A tie counts against the held-out item.

The hyperparameters are those that Rendle et al. (2022) tuned on this split: regularization 0.007,
unobserved weight 0.3, exponent 1, 12 iterations, and tables drawn from a normal distribution with
deviation 0.1 / sqrt(factors). irspack's "IALSPP" loss with nu 1 is the same objective.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.engine.xla import solve, tile_products

REGULARIZATION, UNOBSERVED_WEIGHT, EXPONENT, ITERATIONS = 0.007, 0.3, 1.0, 12
FILES = ("ml1m_ncf_train.npz", "ml1m_ncf_test.npz", "ml1m_ncf_test_negatives.npy")
Tables = tuple[np.ndarray, np.ndarray]


class Split(NamedTuple):
    """Training matrix, held-out item of each user, and the user's negatives (n_users, 99)."""

    train: sparse.csr_matrix
    held_out: np.ndarray
    negatives: np.ndarray


def load(directory: Path | None) -> Split:
    """Read the split, or exit with a message if files are missing."""
    lacking = [name for name in FILES if directory is None or not (directory / name).exists()]
    if directory is None or lacking:
        print(f"skipped: no {', '.join(lacking)} in --data {directory} (TPU_ALS_DATA)", flush=True)
        sys.exit(0)
    train, test = (sparse.load_npz(directory / name).tocsr() for name in FILES[:2])
    if not np.array_equal(np.diff(test.indptr), np.ones(train.shape[0])):
        sys.exit(f"{FILES[1]} must hold out one item of each user")
    return Split(train.astype(np.float32), test.indices, np.load(directory / FILES[2]))


def measure(users: np.ndarray, items: np.ndarray, split: Split) -> dict[str, float]:
    """HR@10 and NDCG@10 of the held-out items, each ranked among the user's negatives."""
    targets = np.einsum("uk,uk->u", users, items[split.held_out])
    scores = np.einsum("uk,unk->un", users, items[split.negatives])
    before = (scores >= targets[:, None]) & (split.negatives != split.held_out[:, None])
    rank = before.sum(axis=1)
    hits = rank < 10
    return {"hr": float(hits.mean()), "ndcg": float(np.mean(hits / np.log2(rank + 2.0)))}


def fit_ours(train: sparse.csr_matrix, factors: int, seed: int, args: argparse.Namespace) -> Tables:
    """Tables of the estimator."""
    model = TPUAlternatingLeastSquares(
        factors, REGULARIZATION, iterations=args.iterations, random_state=seed, dtype=args.dtype,
        objective="ials", unobserved_weight=UNOBSERVED_WEIGHT, linear_solver=args.solver,
        table_layout=args.table_layout, over_relaxation=args.over_relaxation,
        use_native=not args.tiles,
    )  # fmt: skip
    model.fit(train, show_progress=False)
    return np.asarray(model.user_factors), np.asarray(model.item_factors)


def fit_irspack(
    train: sparse.csr_matrix, factors: int, seed: int, args: argparse.Namespace
) -> Tables:
    """Tables of irspack's trainer, stepped as its `learn` does, without a progress bar."""
    from irspack.recommenders.ials import IALSRecommender

    make: Any = IALSRecommender
    recommender = make(
        train, n_components=factors, reg=REGULARIZATION, alpha0=UNOBSERVED_WEIGHT, nu=EXPONENT,
        loss_type="IALSPP", solver_type=args.irspack_solver, max_cg_steps=3, init_std=0.1,
        random_seed=seed, n_threads=os.cpu_count(),
    )  # fmt: skip
    trainer = recommender._create_trainer()
    for _ in range(args.iterations):
        trainer.run_epoch()
    return np.array(trainer.core_trainer.user), np.array(trainer.core_trainer.item)


def stochastic(rows: Array, dtype: Any) -> Array:
    """Round to bfloat16 stochastically: up with a probability equal to the part cut off."""
    if dtype != jnp.bfloat16:
        return rows.astype(dtype)
    bits = lax.bitcast_convert_type(rows.astype(jnp.float32), jnp.uint32)
    # The key depends on the rows. Random low bits carry into the high half before it is kept.
    key = jax.random.key(jnp.sum(bits, dtype=jnp.uint32))
    noise = jax.random.bits(key, rows.shape, jnp.uint16).astype(jnp.uint32)
    cut = (bits + noise) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(cut, jnp.float32).astype(dtype)


LIBRARIES: dict[str, Callable[..., Tables]] = {"tpu_als": fit_ours, "irspack": fit_irspack}


def run(library: str, factors: int, split: Split, args: argparse.Namespace) -> None:
    """Fit and measure once per seed; print means and standard deviations."""
    results, seconds = [], []
    for seed in range(args.seeds):
        begin = time.perf_counter()
        tables = LIBRARIES[library](split.train, factors, seed, args)
        seconds.append(time.perf_counter() - begin)
        results.append(measure(*tables, split))
    ours = library == "tpu_als"
    figures: dict[str, Any] = {}
    for name in ("hr", "ndcg"):
        values = [result[name] for result in results]
        figures[f"{name}_at_10"] = statistics.fmean(values)
        figures[f"{name}_at_10_deviation"] = statistics.stdev(values) if args.seeds > 1 else None
        figures[f"{name}_at_10_by_seed"] = values
    common.emit(
        benchmark="quality_ml1m", library=library, factors=factors, seeds=args.seeds,
        dtype=args.dtype if ours else "float32", rounding=args.rounding if ours else None,
        tiles=args.tiles if ours else None,
        solver=args.solver or "default" if ours else args.irspack_solver,
        regularization=REGULARIZATION, unobserved_weight=UNOBSERVED_WEIGHT, exponent=EXPONENT,
        iterations=args.iterations, over_relaxation=args.over_relaxation if ours else None,
        devices=args.cpu_devices if ours else 1,
        table_layout=args.table_layout if ours else None, fit_s=statistics.median(seconds),
        **figures, machine=common.machine(),
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the script."""
    named = os.environ.get("TPU_ALS_DATA")
    parser.add_argument(
        "--data", type=Path, default=Path(named) if named else None,
        help="directory of ml1m_ncf_* (TPU_ALS_DATA)",
    )  # fmt: skip
    parser.add_argument("--factors", type=int, nargs="+", default=[64, 128, 192])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--over-relaxation", type=float, default=1.0, help="of tpu_als")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], default="float32")
    parser.add_argument("--rounding", choices=["nearest", "stochastic"], default="nearest")
    parser.add_argument("--cpu-devices", type=int, default=1, help="devices that a CPU presents")
    parser.add_argument("--table-layout", choices=["auto", "replicated", "sharded"], default="auto")
    parser.add_argument("--solver", help="linear_solver of tpu_als; by default its default")
    parser.add_argument("--irspack-solver", choices=["CG", "CHOLESKY", "IALSPP"], default="CG")
    parser.add_argument(
        "--tiles", action="store_true", help="compute products of tpu_als as a TPU does; slow"
    )
    parser.add_argument("--ours-only", action="store_true", help="do not run irspack")
    parser.add_argument("--quick", action="store_true", help="a test with few factors")


def main() -> None:
    """Run tpu_als and irspack alternately, for all numbers of factors."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.factors, args.seeds, args.iterations = [16], 1, 2
    if args.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.rounding == "stochastic":
        solve.rounded = stochastic  # before any program is compiled
    if args.tiles:  # before any fit
        tile_products.tiles_for = lambda *_: tile_products.TileProducts()
    split = load(args.data)
    libraries = ["tpu_als"] + common.installed("irspack") * (not args.ours_only)
    for factors in args.factors:
        for library in libraries:
            run(library, factors, split, args)


if __name__ == "__main__":
    main()
