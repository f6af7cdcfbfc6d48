"""Cycles per entry of solving a chunk of rows on a TPU, by length and product. Needs no TPU.

libtpu compiles the program of one rung (``pip install "tpu-als[plan]"``), as a fit runs it, for one
chip; the cycles are those that the compiler estimates for a chunk (`hlo_cycles`). The gather of the
source rows has no estimate, and is not included.

With --shape, the lengths are the rungs that a fit of data of that size has, and the mean is
weighted by their cells. --check compares with the recorded cycles, and fails if any rose by more
than a fifth.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import common
import hlo_cycles
import jax
import jax.numpy as jnp
import numpy as np
import tpu_plan
import tpu_sizes
from jax.sharding import SingleDeviceSharding

from tpu_als.engine.data import AlsParams, dtype_named
from tpu_als.engine.objective import typed
from tpu_als.engine.xla import placing, sweep
from tpu_als.engine.xla.data import device_products, static_of
from tpu_als.engine.xla.mesh import DeviceMesh
from tpu_als.engine.xla.solve import Basis

# The smallest topologies that libtpu knows. A device of tpu7x is half a chip.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
LENGTHS = (8, 16, 24, 32, 64, 128, 256, 1024, 4096, 16384)
# Rows, columns, entries, deviation and exponent of the lengths, and the topology of the fit.
SHAPES = {
    "webgraph-sparse": (365.4e6, 365.4e6, 30e9, 1.1, 0.88, "v5e:16x16"),
    "ml-20m": (138_493, 26_744, 20_000_263, 1.1, 0.88, "v5e:2x2"),
}
N_SOURCE = 1 << 19  # source rows; they do not fit into on-chip memory
RECORDS = Path(__file__).with_suffix(".json")
_MOST_RISE = 1.2


def rungs(name: str, params: AlsParams) -> dict[int, int]:
    """Cells by rung of both sides, for data of a named shape."""
    rows, cols, entries, deviation, exponent, topology = SHAPES[name]
    problem = tpu_sizes.Problem(
        tpu_sizes.activity(int(rows), entries, int(cols), deviation),
        tpu_sizes.popularity(int(cols), entries, int(rows), exponent),
        params,
    )
    data = tpu_sizes.data(problem, tpu_plan.device_mesh(topology))
    found: dict[int, int] = {}
    for side in (data.users, data.items):
        for rung in side.rows.rungs:
            cells = rung.n_chunks * rung.rows * rung.length
            found[rung.length] = found.get(rung.length, 0) + cells
    return found


def chunk_cycles(params: AlsParams, mesh: DeviceMesh, length: int, products: str) -> dict[str, Any]:
    """Cycles of a chunk of rows of this length, and its cells."""
    chunk, _ = placing.chunk_sizes(params, mesh)
    rows = placing.plan_of((length,), 0, params, mesh).rows(length)
    static = static_of(params, rows, length)
    if products == "tiles":
        static = static._replace(device_products=device_products(params, mesh))
        assert static.device_products is not None
    sharding = SingleDeviceSharding(mesh.devices[0])

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def scalars(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: array((), np.asarray(leaf).dtype), tree)

    factors, table = params.factors, dtype_named(params.dtype)
    basis = Basis(
        array((factors, factors), jnp.float32), array((factors,), jnp.float32),
        array((), jnp.float32),
    )  # fmt: skip
    number = array((), jnp.int32)
    span = sweep.Span(number, number, number, number)
    one = array((), jnp.float32)
    objective = scalars(typed(tpu_plan.OBJECTIVE, "float32"))
    shared = sweep.SharedInputs(basis, objective, one, one, (span,))
    cells = sweep.ShardCells(
        array((8 * chunk,), jnp.int32), None, array((8 * rows,), jnp.int32), None
    )
    program = jax.jit(partial(sweep.solve_rungs, (static,)), donate_argnums=0)
    given = (
        array((8 * rows, factors), table), sweep.RungInputs(cells),
        array((N_SOURCE, factors), table), shared,
    )  # fmt: skip
    text = program.lower(*given).compile().as_text()
    assert text is not None
    [loop] = hlo_cycles.of_program(text).loops
    return {"cycles": loop.cycles, "rows": rows, "cells": rows * length}


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=["v5e", "v5p"])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--shape", choices=SHAPES, help="take the lengths of its rungs")
    parser.add_argument("--factors", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--products", nargs="+", choices=("xla", "tiles"), default=["xla", "tiles"],
        help="products of `solve`, or on tiles",
    )  # fmt: skip
    parser.add_argument("--record", action="store_true", help=f"write to {RECORDS.name}")
    parser.add_argument("--check", action="store_true", help="compare with the recorded cycles")
    return parser.parse_args()


def main() -> None:
    """Print the cycles of each chip, product and length, and their mean for the shape."""
    args = parse()
    params = AlsParams(args.factors, args.dtype, "cg")
    weights = rungs(args.shape, params) if args.shape else dict.fromkeys(args.lengths, 0)
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    risen = []
    for chip in args.chips:
        mesh = tpu_plan.device_mesh(TOPOLOGIES[chip])
        for products in args.products:
            total = 0.0
            for length, weight in weights.items():
                found = chunk_cycles(params, mesh, length, products)
                mean = found["cycles"] / found["cells"]
                total += mean * weight
                key = f"{chip} {args.dtype} {args.factors} {products} {length}"
                if args.check and mean > _MOST_RISE * records[key]:
                    risen.append(f"{key}: {records[key]} -> {mean:.2f}")
                if args.record:
                    records[key] = round(mean, 3)
                common.emit(
                    benchmark="tpu_cycles", chip=chip, dtype=args.dtype, factors=args.factors,
                    products=products, length=length, cycles_per_cell=mean, **found,
                )  # fmt: skip
            if args.shape:
                common.emit(
                    benchmark="tpu_cycles", chip=chip, dtype=args.dtype, factors=args.factors,
                    products=products, shape=args.shape,
                    mean_cycles_per_cell=total / sum(weights.values()),
                )  # fmt: skip
    if args.record:
        RECORDS.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
    if risen:
        sys.exit("estimated cycles rose by more than a fifth: " + "; ".join(risen))


if __name__ == "__main__":
    main()
