"""How does an iteration's time grow with entries, rows, factors, threads and devices?

One thing varies at a time. To see whether the time is linear in the entries, a straight line is
fitted, and the slopes between neighbouring sizes are compared with its slope.
"""

from __future__ import annotations

import common
import jax
import numpy as np
from libraries import Ours, Problem, padded_cells

ENTRIES = [1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000]


def iterations(cases: dict[str, Problem], repeats: int) -> dict[str, tuple[float, int]]:
    """Median seconds of a compiled iteration of each case, and its padded cells."""
    models = {name: Ours(case) for name, case in cases.items()}
    taken = common.in_turns({name: model.step for name, model in models.items()}, repeats)
    sides = {name: (model.data.users, model.data.items) for name, model in models.items()}
    return {name: (taken[name], sum(map(padded_cells, sides[name]))) for name in cases}


def problem(entries: int, factors: int = 64, rows: float = 1.0) -> Problem:
    """A problem of ML-20M's shape, its rows and columns scaled by `rows`."""
    n_users, n_items, _ = common.ML20M_SHAPE
    matrix = common.power_law(int(n_users * rows), int(n_items * rows), entries)
    return Problem(matrix, factors, 40.0, 10.0)


def by_entries(entries: list[int], factors: int, rows: float, repeats: int) -> None:
    """Vary the entries, with the same table sizes; fit a straight line to the times."""
    cases = {str(count): problem(count, factors, rows) for count in entries}
    counts = [case.matrix.nnz for case in cases.values()]
    found = list(iterations(cases, repeats).values())
    seconds = [taken for taken, _ in found]
    for case, (taken, cells) in zip(cases.values(), found, strict=True):
        count = case.matrix.nnz
        common.emit(
            benchmark="scaling", over="entries", shape=case.matrix.shape, entries=count,
            rows_with_entries=[int((case.matrix.getnnz(axis) > 0).sum()) for axis in (1, 0)],
            factors=factors, iteration_s=taken, ns_per_entry=1e9 * taken / count,
            cells_per_entry=cells / 2 / count, ns_per_cell=1e9 * taken / cells,
        )  # fmt: skip
    slopes = np.diff(seconds) / np.diff(counts)
    overall = np.polyfit(counts, seconds, 1)[0]
    common.emit(
        benchmark="scaling", over="entries", what="slope", factors=factors,
        ns_per_entry=1e9 * overall, largest_deviation=np.abs(slopes / overall - 1).max(),
        deviations=list(slopes / overall - 1),
    )  # fmt: skip


def by_rows_and_factors(entries: int, factors: list[int], rows: list[float], repeats: int) -> None:
    """Vary the rows of the tables, and then the factors, with the same number of entries."""
    cases = {str(scale): problem(entries, 64, scale) for scale in rows}
    for name, (taken, _) in iterations(cases, repeats).items():
        matrix = cases[name].matrix
        common.emit(
            benchmark="scaling", over="rows", shape=matrix.shape, entries=matrix.nnz, factors=64,
            iteration_s=taken,
        )  # fmt: skip
    matrix = cases[str(rows[0])].matrix
    cases = {str(k): Problem(matrix, k, 40.0, 10.0) for k in factors}
    for name, (taken, _) in iterations(cases, repeats).items():
        k = cases[name].factors
        common.emit(
            benchmark="scaling", over="factors", shape=matrix.shape, entries=matrix.nnz, factors=k,
            iteration_s=taken, ns_per_entry_and_factor=1e9 * taken / (matrix.nnz * k),
        )  # fmt: skip


def by_workers(case: Problem, repeats: int) -> None:
    """Compare one worker with several: threads of one device, and devices of a mesh."""
    counts = [n for n in (1, 2, 4, 8) if n <= common.machine()["cores"]]
    # By default a single CPU device uses a thread for each core. The CPU backend uses several
    # devices as threads, so devices are measured on the XLA backend too.
    kinds: dict[str, dict[int, Ours]] = {
        name: {
            n: Ours(case, devices=n, num_threads=1, native=native)
            for n in counts
            if n <= len(jax.devices())
        }
        for name, native in (("devices", True), ("devices by XLA", False))
    }
    if jax.default_backend() == "cpu":
        kinds["threads"] = {n: Ours(case, devices=1, num_threads=n) for n in counts}
    for kind, models in kinds.items():
        taken = common.in_turns({str(n): model.step for n, model in models.items()}, repeats)
        common.emit(
            benchmark="scaling", over=kind, shape=case.matrix.shape, entries=case.matrix.nnz,
            factors=case.factors, iteration_s=taken,
            throughput_over_one={n: taken["1"] / seconds for n, seconds in taken.items()},
        )  # fmt: skip


def main() -> None:
    """Run all parts."""
    parser = common.parser(__doc__)
    parser.add_argument("--cpu-devices", type=int, help="devices that a CPU presents")
    args = parser.parse_args()
    if args.cpu_devices:
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    entries, factors, rows, size = ENTRIES, [32, 64, 128, 256, 512], [0.25, 1.0, 4.0], 2_000_000
    if args.quick:
        entries, factors, rows, size = [10_000, 20_000, 40_000], [8, 16], [0.01, 0.02], 20_000
        args.repeats = 1
    common.emit(benchmark="scaling", what="machine", **common.machine())
    by_entries(entries, 64, rows[0] if args.quick else 1.0, args.repeats)
    by_rows_and_factors(size, factors, rows, args.repeats)
    by_workers(problem(size, 64, rows[0]), args.repeats)


if __name__ == "__main__":
    main()
