"""Where does an iteration's time go, and how far is each phase from what the machine can do?

The machine's speeds are measured in the same run, by NumPy, on one core and times the cores: a
matrix-vector product over a matrix in the core's own cache, a matrix product, and a copy of memory.
A phase's floor is the longer of its bytes at the speed of where they come from and its flops at
that of the matrix product.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import common
import jax
import numpy as np
from libraries import Ours, Problem, padded_cells

from tpu_als import host
from tpu_als.engine import als
from tpu_als.engine.cpu import native
from tpu_als.engine.xla import backend, half_epoch, mesh
from tpu_als.engine.xla.data import XlaData as Data


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
    """Bytes, flops and the seconds that they take at least, by phase; both sides together."""
    factors, sides = data.params.factors, (data.users, data.items)
    row, stored = 4.0 * factors, sum(padded_cells(side) for side in sides)
    # XLA's programs work on unused slots as well.
    by_xla = not data.params.native
    rows = sum(s.rows.n_slots * s.rows.n_shards if by_xla else s.n_rows for s in sides)
    products = 2 * data.params.cg_steps + 1
    # One pass does both products of a step, or each is one, and a chunk is written before.
    reads = data.params.cg_steps + 1 if data.params.native else 1 + products
    held = sum(leaf.nbytes for side in sides for leaf in jax.tree.leaves((side.own, side.long)))
    found = {
        # The matrix is read for either side and turned; cells are written.
        "layout": (4 * 8.0 * data.n_entries + held, 0.0, "memory_bytes"),
        "gramian, eigenbasis": (row * rows, 1.0 * rows * factors**2, "memory_bytes"),
        "rotations": (6 * row * rows, 3 * 2.0 * rows * factors**2, "memory_bytes"),
        "solve": (stored * row * reads, stored * 2.0 * factors * products, "cache_bytes"),
        "one product (the loss)": (stored / 2 * row, stored * factors * 1.0, "cache_bytes"),
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
    """Median seconds of the phases of an iteration of `native`; solving is what remains."""
    data, place = model.data, model.data.place
    sides = zip(model.state, (data.users, data.items), strict=True)
    tables = [np.asarray(table[0])[: side.n_rows] for table, side in sides]

    def basis() -> list[Any]:
        sums = [native.gramian(table, place) for table in tables]
        with mesh.precision(data.params.dtype):
            return jax.block_until_ready(
                [
                    native.basis(gram, np.float32(len(t)))
                    for gram, t in zip(sums, tables, strict=True)
                ]
            )

    rotations, turned = [np.asarray(each.rotation) for each in basis()], [t.copy() for t in tables]

    def rotate() -> None:
        for table, rotation, out in zip(tables, rotations, turned, strict=True):
            for _ in range(3):
                native.rotated(table, rotation, place, out)

    with host.single_blas_thread():
        found = common.in_turns(
            {"gramian, eigenbasis": basis, "rotations": rotate, "iteration": model.step}, repeats
        )
    found["solve"] = found["iteration"] - found["gramian, eigenbasis"] - found["rotations"]
    return found


def by_xla(model: Ours, repeats: int) -> dict[str, float]:
    """The same of XLA's programs; those that solve also rotate the rows back."""
    data, place = model.data, model.data.place
    users, items = model.state
    sides = ((data.users, users, items), (data.items, items, users))

    def prepared() -> list[Any]:
        return [
            half_epoch.preparing(data)((source, target, side.own.lengths), np.int32(len(source)))
            for side, target, source in sides
        ]

    ready, solves = prepared(), []
    for _ in range(repeats):
        total = 0.0
        for (side, *_), (basis, held, begin) in zip(sides, ready, strict=True):
            # Copies, as what they start from is written over.
            start = jax.tree.map(lambda part: part.copy(), begin)
            programs = half_epoch.passes(side, data, basis, model.objective)
            run = functools.partial(place.run, programs, start, held, data.params.dtype)
            total += common.seconds(lambda run=run: jax.block_until_ready(run()))  # type: ignore[misc]
        solves.append(total)
    calls = {
        "gramian, eigenbasis, two rotations": lambda: jax.block_until_ready(prepared()),
        "iteration": model.step,
    }
    return {**common.in_turns(calls, repeats), "solve": statistics.median(solves)}


def measured(problem: Problem, by_native: bool, repeats: int) -> tuple[Data, dict[str, float]]:
    """The placed data, and median seconds of each phase."""
    model = Ours(problem, native=by_native)
    data = model.data
    first = common.seconds(model.step)
    found = (by_loops if data.params.native else by_xla)(model, repeats)
    calls = {
        "layout": lambda: backend.place(problem.matrix, data.params, data.place),
        "one product (the loss)": lambda: als.loss(model.state, data, model.objective),
    }
    once = {"compile": first - found["iteration"]}
    return data, {**common.in_turns(calls, repeats), **once, **found}


def main() -> None:
    """A table for each number of factors."""
    parser = common.parser(__doc__, ("ml1m", "power-law"))
    parser.add_argument("--factors", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--xla", action="store_true", help="as where numba is not installed")
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
                benchmark="phases", dataset=name, factors=factors, native=data.params.native,
                phase=phase, seconds=seconds, **floor,
                over_floor=seconds / floor["floor_s"] if floor else None,
            )  # fmt: skip


if __name__ == "__main__":
    main()
