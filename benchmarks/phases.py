"""How long does each phase of an iteration take, compared with the limits of the machine?

NumPy measures the limits in the same run: a matrix-vector product of a matrix in the core's cache
and a matrix product, both on one core and multiplied by the cores, and a copy of memory. The lower
bound of a phase is the longer of two times: its bytes at the speed of the cache or the memory that
they come from, and its flops at the speed of the matrix product.

On the CPU backend it also times ranking and fold-in for all users, and an exact iteration. The
bound of the fold-in, and of an exact iteration, is a single pass over the entries. It cannot be
reached, and the ratio to it is the number of passes that would take as long.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import common
import jax
import numpy as np
from libraries import Ours, Problem, padded_cells

from tpu_als import host
from tpu_als.engine import als
from tpu_als.engine.cpu import half_epoch as cpu_half_epoch
from tpu_als.engine.data import Data
from tpu_als.engine.xla import half_epoch as xla_half_epoch
from tpu_als.engine.xla.data import XlaData


def speeds(n_cores: int, repeats: int) -> dict[str, float]:
    """Bytes and flops a second."""
    rng = np.random.default_rng(0)
    near = rng.random((1024, 128), dtype=np.float32)  # half a megabyte
    vector, square = near[0], rng.random((768, 768), dtype=np.float32)
    far, copy = np.zeros(1 << 25, np.float32), np.zeros(1 << 25, np.float32)

    def best(call: Callable[[], Any], count: int) -> float:
        """Seconds of one of `count` calls in a row, the fastest of some tries."""
        tries = [common.seconds(lambda: [call() for _ in range(count)]) for _ in range(3 * repeats)]
        return min(tries) / count

    return {
        "cache_bytes": n_cores * near.nbytes / best(lambda: near @ vector, 500),
        "flops": n_cores * 2 * 768**3 / best(lambda: square @ square, 3),
        "memory_bytes": 2 * far.nbytes / best(lambda: np.copyto(copy, far), 1),
    }


def floors(data: Data, rate: dict[str, float]) -> dict[str, dict[str, float]]:
    """Bytes, flops and lower bound in seconds of each phase, for both sides together."""
    factors, sides = data.params.factors, (data.users, data.items)
    row, stored = 4.0 * factors, sum(padded_cells(side) for side in sides)
    products = 2 * data.params.cg_steps + 1
    if isinstance(data, XlaData):
        # Unused slots are processed too. A chunk is written once, and read for each product.
        rows, reads = sum(s.rows.n_slots * s.rows.n_shards for s in sides), 1 + products
        kept = [(side.cells, side.long) for side in sides]
    else:
        # One pass over the entries does both products of a step.
        rows, reads = sum(s.n_rows for s in sides), data.params.cg_steps + 1
        kept = [side.entries for side in sides]
    stored_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
    found = {
        # The matrix is read once for each side and twice to transpose it; cells are written.
        "layout": (4 * 8.0 * data.n_entries + stored_bytes, 0.0, "memory_bytes"),
        "gramian, eigenbasis": (row * rows, 1.0 * rows * factors**2, "memory_bytes"),
        "rotations": (6 * row * rows, 3 * 2.0 * rows * factors**2, "memory_bytes"),
        "solve": (stored * row * reads, stored * 2.0 * factors * products, "cache_bytes"),
        "one product (the loss)": (stored / 2 * row, stored * factors * 1.0, "cache_bytes"),
        "exact iteration": (stored * row, stored * 2.0 * factors * 2, "cache_bytes"),
        "fold-in of all users": (stored / 2 * row, stored * factors * 2.0, "cache_bytes"),
        "ranking for all users": (
            4.0 * data.users.n_rows * data.items.n_rows,
            2.0 * data.users.n_rows * data.items.n_rows * factors,
            "cache_bytes",
        ),
    }
    return {
        phase: {
            "bytes": moved,
            "flops": flops,
            "floor_s": max(moved / rate[of], flops / rate["flops"]),
        }
        for phase, (moved, flops, of) in found.items()
    }


def by_loops(model: Ours, repeats: int) -> dict[str, float]:
    """Median seconds of the phases on the CPU backend; the solve is the remaining time."""
    tables, n_threads = model.state, model.data.backend.n_threads

    def bases() -> list[tuple[np.ndarray, np.ndarray]]:
        grams = (cpu_half_epoch.gramian(table, n_threads, table.dtype) for table in tables)
        return [cpu_half_epoch.eigenbasis_of(gram, gram.dtype) for gram in grams]

    rotations = [rotation for rotation, _ in bases()]
    rotated = [t @ rotation for t, rotation in zip(tables, rotations, strict=True)]

    def rotate() -> None:
        for table, rotation, out in zip(tables, rotations, rotated, strict=True):
            for _ in range(3):
                cpu_half_epoch.rotate(table, rotation, n_threads, out)

    with host.single_blas_thread():
        found = common.in_turns(
            {"gramian, eigenbasis": bases, "rotations": rotate, "iteration": model.step}, repeats
        )
    found["solve"] = found["iteration"] - found["gramian, eigenbasis"] - found["rotations"]
    return found


def after_a_fit(model: Ours, repeats: int) -> dict[str, float]:
    """Median seconds of ranking, of fold-in, and of an exact iteration, on the CPU backend."""
    data, matrix = model.data, model.problem.matrix
    users, items = model.tables()
    catalog = data.backend.catalog(items)
    source = data.backend.source(items, replace(data.params, linear_solver="exact"))
    exact = Ours(model.problem, "exact")
    exact.state = model.state
    return common.in_turns(
        {
            "ranking for all users": lambda: catalog.top_k(users, 10, seen=matrix),
            "fold-in of all users": lambda: source.solve(matrix, model.objective),
            "exact iteration": exact.step,
        },
        repeats,
    )


def by_xla(model: Ours, repeats: int) -> dict[str, float]:
    """Median seconds of the phases on the XLA backend; its solve includes a rotation."""
    data, mesh = model.data, model.data.mesh
    users, items = model.state
    sides = (
        (data.users, users, items, data.items.n_rows),
        (data.items, items, users, data.users.n_rows),
    )

    def run_prepare() -> list[Any]:
        return [
            xla_half_epoch.prepare_program(data)(
                xla_half_epoch.Tables(source, target, side.cells.lengths), np.int32(n_source)
            )
            for side, target, source, n_source in sides
        ]

    ready, solves = run_prepare(), []
    for _ in range(repeats):
        total = 0.0
        for (side, *_), prepared in zip(sides, ready, strict=True):
            # Copies, because the programs overwrite their input.
            start = jax.tree.map(lambda part: part.copy(), prepared.start)
            passes = xla_half_epoch.passes(side, data, prepared, model.objective)
            run = functools.partial(
                mesh.run, passes, start, prepared.source_table, data.params.dtype
            )
            total += common.seconds(lambda run=run: jax.block_until_ready(run()))  # type: ignore[misc]
        solves.append(total)
    calls = {
        "gramian, eigenbasis, two rotations": lambda: jax.block_until_ready(run_prepare()),
        "iteration": model.step,
    }
    return {**common.in_turns(calls, repeats), "solve": statistics.median(solves)}


def measured(problem: Problem, native: bool, repeats: int) -> tuple[Data, dict[str, float]]:
    """The placed data, and median seconds of each phase."""
    model = Ours(problem, native=native)
    data = model.data
    first = common.seconds(model.step)
    found = (by_xla if isinstance(data, XlaData) else by_loops)(model, repeats)
    calls = {
        "layout": lambda: data.backend.place(problem.matrix, data.params),
        "one product (the loss)": lambda: als.loss(model.state, data, model.objective),
    }
    once = {"compile": first - found["iteration"]}
    if not isinstance(data, XlaData):
        found.update(after_a_fit(model, repeats))
    return data, {**common.in_turns(calls, repeats), **once, **found}


def main() -> None:
    """Print a line for each phase and number of factors."""
    parser = common.parser(__doc__, ("ml1m", "power-law"))
    parser.add_argument("--factors", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--xla", action="store_true", help="measure the XLA backend")
    args = parser.parse_args()
    if args.quick:
        args.factors, args.repeats = [16], 1
    name, matrix = common.load(args)
    machine = common.machine()
    common.emit(benchmark="phases", what="machine", **machine)
    rate = speeds(machine["cores"], args.repeats)
    common.emit(benchmark="phases", what="speeds", **rate)
    for factors in args.factors:
        problem = Problem(matrix, factors, 40.0, 10.0)
        data, taken = measured(problem, not args.xla, args.repeats)
        least = floors(data, rate)
        for phase, seconds in taken.items():
            floor = least.get(phase, {})
            common.emit(
                benchmark="phases", dataset=name, factors=factors,
                backend=type(data.backend).__name__, phase=phase, seconds=seconds, **floor,
                over_floor=seconds / floor["floor_s"] if floor else None,
            )  # fmt: skip


if __name__ == "__main__":
    main()
