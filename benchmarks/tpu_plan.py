"""Does training fit into a TPU slice, and what is the least time of an epoch? Needs no TPU.

libtpu compiles the programs of training and ranking for the slice's topology (``pip install
"tpu-als[plan]"``). The package's planner makes their shapes from given distributions of row
lengths. No program runs. Memory is what the compiler reports. Times are lower bounds: the counted
work at the published rates.
"""

from __future__ import annotations

import os

# Set before JAX starts: libtpu must not look for a TPU or a metadata server, or lock a TPU.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-256",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
)

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import common
import hlo_cycles
import jax
import numpy as np
import tpu_prediction
import tpu_roofline
import tpu_sizes
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from tpu_als.engine.data import AlsParams, dtype_named
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import half_epoch, placing, ranking
from tpu_als.engine.xla.data import XlaData as Data
from tpu_als.engine.xla.data import XlaSide as Side
from tpu_als.engine.xla.mesh import DeviceMesh
from tpu_als.engine.xla.sweep_long import LongInputs
from tpu_als.parameters import LINEAR_SOLVERS

_ALL_TO_ALL = re.compile(r"= (?:\(\()?(\w+\[[\d,]+\])[^=]* all-to-all(?:-start)?\(")
OBJECTIVE = Objective.of("ials", 1e-3, 1.0, 1e-3)


def device_mesh(topology: str, slices: int = 1) -> DeviceMesh:
    """The chips of a topology as a mesh whose tables are sharded."""
    kind = topology.partition(":")[0]
    # Both cores of a v4 chip are one device, as on a real TPU.
    config: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if slices > 1:
        config["num_slices"] = slices
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **config)
    return DeviceMesh(tuple(found.devices), len(found.devices), "sharded")


def programs(data: Data) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Name, program and abstract arguments of all programs of an epoch and of placing the data."""
    make = tpu_sizes.sharded(data.mesh)
    assert data.mesh.jax_mesh is not None
    everywhere = NamedSharding(data.mesh.jax_mesh, PartitionSpec())
    tables = [
        make((side.rows.n_slots, data.params.factors), dtype_named(data.params.dtype))
        for side in (data.users, data.items)
    ]
    found: list[tuple[str, Any, tuple[Any, ...]]] = []
    pairs = (data.users, tables[0], tables[1], "users"), (data.items, tables[1], tables[0], "items")
    for side, target, source, name in pairs:
        count = np.int32(side.n_rows)
        prepare, given = (
            half_epoch.prepare_program(data),
            (half_epoch.Tables(source, target, side.cells.lengths), count),
        )
        found.append((f"{name}: rotate", prepare, given))
        prepared = jax.eval_shape(prepare, *given)
        basis = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            prepared.basis,
        )
        prepared = prepared._replace(basis=basis)
        for number, (program, entries, shared) in enumerate(
            half_epoch.passes(side, data, prepared, OBJECTIVE)
        ):
            long = isinstance(entries, LongInputs)
            label = "long rows" if long else f"solve {number}"
            found.append((f"{name}: {label}", program, (target, entries, source, shared)))
        assert side.routes is not None
        requests = placing.requests_program(side.rows, side.routes, data.mesh)
        found.append((f"{name}: requests, once", requests, (side.cells.sends, None)))
    return found


def ranking_program(
    data: Data, k: int, n_queries: int
) -> tuple[dict[str, Any], tuple[str, Any, tuple[Any, ...]]]:
    """The program that ranks queries against the sharded item table, and its work."""
    make, mesh, rows = tpu_sizes.sharded(data.mesh), data.mesh, data.items.rows
    dtype = dtype_named(data.params.dtype)
    slots = (mesh.n_shards, rows.n_slots)
    catalog = ranking.Catalog(
        make((rows.n_slots, data.params.factors), dtype), None, make((rows.n_slots,), bool),
        np.empty(0, np.int64), np.broadcast_to(np.int32(0), slots), mesh, "float32",
    )  # fmt: skip
    batch = ranking.batch_size(n_queries, catalog)
    vectors: Any = jax.ShapeDtypeStruct((batch, data.params.factors), np.float32)
    items: Any = jax.ShapeDtypeStruct((ranking.SEEN,), np.int32)
    queries = ranking.Queries(vectors, ranking.SeenItems(items, items, items))
    parts = ranking.CatalogParts(catalog.rows, catalog.lengths, catalog.shown)
    work = {
        "batch": batch,
        "k": k,
        "flops": tpu_roofline.FLOAT32_PASSES * 2 * batch * rows.n_slots * data.params.factors,
        # The table is read once; scores are written, and read for the largest of each block.
        "memory": rows.n_slots * (data.params.factors * dtype.itemsize + 2 * 4 * batch),
    }
    return work, ("rank", ranking.top_k_program(catalog, k), (parts, queries))


def compiled(name: str, program: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """Compile one program; return bytes per chip and the compiler's counts, or its error."""
    started = time.perf_counter()
    try:
        done = program.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"program": name, "compiles": False, "error": str(error)}
    memory, cost, text = done.memory_analysis(), done.cost_analysis(), done.as_text()
    return {
        "program": name,
        "compiles": True,
        "compile_s": time.perf_counter() - started,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "scratch_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops_bodies_once": cost.get("flops"),
        "bytes_bodies_once": cost.get("bytes accessed"),
        "all_to_all_bodies_once": _ALL_TO_ALL.findall(text),
        "text": text,
    }


def resident(data: Data) -> dict[str, int]:
    """Bytes per chip of all arrays of a half-epoch, by kind, computed from shapes."""

    def size(tree: Any) -> int:
        return sum(
            int(np.prod(leaf.shape[1:])) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
        )

    row = data.params.factors * dtype_named(data.params.dtype).itemsize
    slots = data.users.rows.n_slots + data.items.rows.n_slots
    sides: tuple[Side, ...] = (data.users, data.items)
    return {
        "tables": slots * row,
        # The rotated source, and the target that is being written.
        "tables_of_a_half_epoch": slots * row,
        "entries": size([(side.cells.ids, side.cells.values) for side in sides]),
        "long_entries": size([side.long for side in sides if side.long is not None]),
        "messages": size([side.cells.sends for side in sides]),
        "lengths": size([side.cells.lengths for side in sides]),
    }


def totals(kept: dict[str, int], results: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes per chip while an epoch runs, while data are placed, and while a batch is ranked."""

    def most(field: str, named: Callable[[str], bool]) -> int:
        found = (result.get(field, 0) for result in results if named(result["program"]))
        return max(found, default=0)

    def in_epoch(name: str) -> bool:
        return name != "rank" and not name.endswith("once")

    scratch = most("scratch_bytes", in_epoch)
    code = sum(result.get("code_bytes", 0) for result in results)
    total = sum(kept.values()) + scratch + code
    tables = kept["tables"] + kept["tables_of_a_half_epoch"]
    once = ("argument_bytes", "scratch_bytes")
    placing = sum(most(field, lambda name: name.endswith("once")) for field in once)
    ranking_ = most("scratch_bytes", lambda name: name == "rank")
    return {
        "scratch": scratch,
        "code": code,
        "total": total,
        "total_gib": total / 2**30,
        # Without tables, which do not exist yet, but with the requests.
        "total_placing": total - tables - scratch + placing,
        "total_ranking": total - kept["tables_of_a_half_epoch"] - scratch + ranking_,
    }


def layout_of(data: Data) -> dict[str, Any]:
    """Sizes of the plan, for each side."""
    found: dict[str, Any] = {"chunk": data.plan.chunk, "most_rows": data.plan.most_rows}
    for name, side in (("users", data.users), ("items", data.items)):
        assert side.routes is not None
        found[name] = {
            "rungs": [[r.length, r.rows, r.n_chunks] for r in side.rows.rungs],
            "routes": [list(route) for route in side.routes],
            "slots": side.rows.n_slots,
            "cells": side.rows.n_cells,
            "long_rows": len(side.rows.long),
            "long_blocks": list(side.long.ids.shape[1:]) if side.long is not None else None,
            "received_rows": side.received_rows,
        }
    return found


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:16x16", help="such as v5e:16x16 or v4:2x2x4")
    parser.add_argument(
        "--slices", type=int, default=1, help="number of slices, joined by the network"
    )
    parser.add_argument("--rows", type=float, default=365.4e6)
    parser.add_argument("--cols", type=float, default=365.4e6)
    parser.add_argument("--entries", type=float, default=30e9)
    parser.add_argument("--factors", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--values",
        choices=("float32", "bfloat16"),
        help="dtype of values that are not all 1",
    )
    parser.add_argument("--linear-solver", choices=LINEAR_SOLVERS, default="cg")
    parser.add_argument(
        "--deviation",
        type=float,
        default=1.1,
        help="of the log of row lengths",
    )
    parser.add_argument(
        "--exponent", type=float, default=0.88,
        help="columns' lengths fall as rank ** -exponent; 0 is uniform",
    )  # fmt: skip
    parser.add_argument("--k", type=int, default=100, help="items ranked for a query")
    parser.add_argument("--queries", type=int, default=1024, help="queries, ranked in batches")
    parser.add_argument("--no-compile", action="store_true", help="only the arithmetic")
    parser.add_argument("--hlo", help="directory for the compiled programs' text")
    return parser.parse_args()


def main() -> None:
    """Print the assumptions, each program, the memory, and the least time of an epoch."""
    args = parse()
    kind, _, shape = args.topology.partition(":")
    where = tpu_roofline.Slice(
        tpu_roofline.CHIPS[kind], tuple(int(axis) for axis in shape.split("x")), args.slices
    )
    rows, cols = int(args.rows), int(args.cols)
    problem = tpu_sizes.Problem(
        tpu_sizes.activity(rows, args.entries, cols, args.deviation),
        tpu_sizes.popularity(cols, args.entries, rows, args.exponent),
        # No weight is negative with this objective. Cholesky is nevertheless counted with K x K
        # systems, not with the smaller dual ones.
        AlsParams(
            args.factors, args.dtype, args.linear_solver, positive=args.linear_solver != "cholesky"
        ),
        None if args.values is None else dtype_named(args.values),
    )
    mesh = device_mesh(args.topology, args.slices)
    data = tpu_sizes.data(problem, mesh)
    common.emit(
        benchmark="tpu_plan", what="assumptions", topology=args.topology, slices=args.slices,
        n_chips=where.n_chips, shape=[rows, cols], entries=args.entries, factors=args.factors,
        dtype=args.dtype, values=args.values, linear_solver=data.params.linear_solver,
        rows_log_normal_deviation=args.deviation, columns_rank_exponent=args.exponent,
        longest_row=problem.users.values[-1], longest_column=problem.items.values[-1],
        published=asdict(where.chip), versions=common.versions(),
    )  # fmt: skip
    common.emit(benchmark="tpu_plan", what="layout", **layout_of(data))
    work, rank = ranking_program(data, args.k, args.queries)
    seconds = where.seconds(tpu_roofline.Work(flops=work["flops"], memory=work["memory"]))
    common.emit(
        benchmark="tpu_plan", what="ranking", **work, **seconds,
        most_users_a_second=work["batch"] / max(seconds.values()),
    )  # fmt: skip
    results, cycles = [], {}
    for name, program, given in [] if args.no_compile else [rank, *programs(data)]:
        result = compiled(name, program, given)
        text = result.pop("text", None)
        if text and not name.endswith("once"):  # an exchange alone may have no estimate
            cycles[name] = hlo_cycles.of_program(text)
            result["cycles"] = asdict(cycles[name])
        if args.hlo and text:
            os.makedirs(args.hlo, exist_ok=True)
            with open(f"{args.hlo}/{name.replace(': ', '-').replace(' ', '-')}.txt", "w") as file:
                file.write(text)
        common.emit(benchmark="tpu_plan", what="program", **result)
        results.append(result)
    kept = resident(data)
    common.emit(
        benchmark="tpu_plan", what="memory", topology=args.topology, **kept,
        **totals(kept, results), of=where.chip.memory,
    )  # fmt: skip
    common.emit(
        benchmark="tpu_plan", what="epoch", topology=args.topology, n_chips=where.n_chips,
        **tpu_roofline.report(data, where),
    )  # fmt: skip
    if cycles:
        common.emit(
            benchmark="tpu_plan", what="prediction", topology=args.topology,
            **tpu_prediction.report(data, where, cycles),
        )  # fmt: skip
    if not all(result["compiles"] for result in results):
        sys.exit("a program does not compile for this topology: see its error above")


if __name__ == "__main__":
    main()
