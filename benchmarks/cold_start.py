"""How long do the import, the first fit and the first recommendation of a fresh process take?

Every figure is the median over fresh processes. tpu_als and implicit alternate. tpu_als runs with
an empty cache of numba, with the cache that the package keeps, and with `enable_compilation_cache`.
An untimed process fills the caches first. Other processes load a saved model and recommend once.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares

SIZE = (943, 1_682, 100_000)
SERVED = (50_000, 27_000)  # rows of the tables of a saved model
FIT = {"factors": 64, "iterations": 15, "alpha": 40.0, "regularization": 10.0, "random_state": 0}


def medians(calls: dict[str, tuple[str, dict[str, Any]]], repeats: int) -> dict[str, Any]:
    """Run pieces of `fresh.py` alternately; return the medians of what each prints."""
    printed: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, (piece, arguments) in calls.items():
            printed[name].append(common.fresh(piece, **arguments))
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in printed.items()
    }


def serving(sizes: tuple[int, int], repeats: int) -> None:
    """Load a model and recommend once, in a process that does nothing else."""
    model, rng = TPUAlternatingLeastSquares(64), np.random.default_rng(0)
    model.user_factors, model.item_factors = (
        rng.normal(0, 0.1, (n, 64)).astype(np.float32) for n in sizes
    )
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.npz")
        model.save(file)
        calls = {
            name: ("serve", {"library": name, "file": file})
            for name in ["ServedModel", "tpu_als", *common.installed("implicit")]
        }
        medians(calls, 1)
        for name, row in medians(calls, repeats).items():
            common.emit(
                benchmark="cold_start", what="load and recommend", rows=sizes, factors=64,
                library=name, **row,
            )  # fmt: skip


def main() -> None:
    """Run all parts."""
    args = common.parser(__doc__).parse_args()
    repeats, size = (1, common.QUICK_SHAPE) if args.quick else (args.repeats, SIZE)
    common.emit(benchmark="cold_start", what="machine", **common.machine())

    imports = medians({"ours": ("import_package", {}), "floor": ("import_floor", {})}, repeats)
    mine, floor = imports["ours"]["import_s"], imports["floor"]["import_s"]
    common.emit(
        benchmark="cold_start", what="import", seconds=mine, sklearn_base_s=floor,
        ratio=mine / floor,
    )  # fmt: skip

    serving((100, 50) if args.quick else SERVED, repeats)

    matrix = common.power_law(*size)
    about = {"benchmark": "cold_start", "shape": matrix.shape, "entries": matrix.nnz, **FIT}
    with tempfile.TemporaryDirectory() as folder:
        file, cache = str(Path(folder) / "matrix.npz"), str(Path(folder) / "cache")
        sparse.save_npz(file, matrix)
        job = {"file": file, "fit": FIT}
        jobs = {
            name: ("full_job", {**job, "library": name, "empty_in": folder})
            for name in ["tpu_als", *common.installed("implicit")]
        }
        for name, row in medians(jobs, repeats).items():
            common.emit(**about, what="nothing cached", library=name, **row)
        jobs = {
            "loops cached": ("full_job", {**job, "library": "tpu_als"}),
            "persistent cache": ("full_job", {**job, "library": "tpu_als", "cache": cache}),
        }
        medians(jobs, 1)
        for what, row in medians(jobs, repeats).items():
            common.emit(**about, what=what, library="tpu_als", **row)

    if args.data is not None and (args.data / common.ML1M).exists():
        file = str(args.data / common.ML1M)
        for native in (True, False):
            row = common.fresh("programs", file=file, fit={**FIT, "use_native": native})
            common.emit(
                benchmark="cold_start", what="XLA's programs of a first fit", dataset="ml1m-80",
                use_native=native, **row,
            )  # fmt: skip


if __name__ == "__main__":
    main()
