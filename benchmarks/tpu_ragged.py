"""Would `ragged_all_to_all` carry the exchange better than messages of one size? Compiled to see.

One group's exchange, either way, for a TPU topology that is not here (see `tpu_plan`): whether it
compiles, and the arrays that the collective is given, as the compiler lays them out.
"""

from __future__ import annotations

import tpu_plan  # first: it sets the environment that libtpu needs

# isort: split
import argparse
import functools
import re
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import tpu_sizes
from jax import Array, lax
from jax.sharding import PartitionSpec

from tpu_als.engine.xla import exchange
from tpu_als.engine.xla.mesh import AXIS

# The collective's operand, or for one that starts and ends apart the first of the pair's parts.
_ARRAY = re.compile(r"= \(*(\w+)\[([\d,]+)\][^=]* (?:ragged-)?all-to-all(?:-start)?\(")


def even(rows: int, own: Array, sends: Array, *_: Array) -> Array:
    """Messages of one size, as the package sends them."""
    return exchange.receive(own, sends, jnp.int32(0), rows, AXIS)


def ragged(_: int, own: Array, sends: Array, *ragged_sizes: Array) -> Array:
    """Messages of their own sizes, one after the other."""
    leaving = own.at[sends].get(mode="promise_in_bounds")
    return lax.ragged_all_to_all(leaving, jnp.zeros_like(leaving), *ragged_sizes, axis_name=AXIS)


def main() -> None:
    """Print one line for each way and topology."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5e:16x16", "v4:2x2x4"])
    parser.add_argument("--factors", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    for topology in args.topologies:
        place = tpu_plan.workplace(topology)
        make, devices = tpu_sizes.sharded(place), place.n_shards
        rows = exchange.GROUP_CELLS // devices
        given = (
            make((1 << 17, args.factors), jnp.dtype(args.dtype)),
            make((rows * devices,), np.int32),
            *(make((devices,), np.int32) for _ in range(4)),
        )
        for way in (even, ragged):
            emit(topology, way.__name__, _program(functools.partial(way, rows), place), given)


def _program(way: Any, place: Any) -> Any:
    def local(*parts: Array) -> Array:
        return way(*(part[0] for part in parts))[None]

    spec = PartitionSpec(AXIS)
    return jax.jit(
        jax.shard_map(local, mesh=place.mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


def emit(topology: str, way: str, program: Any, given: Any) -> None:
    """Print whether a program compiles, and how much its collective is given to send."""
    result = tpu_plan.compiled(way, program, given)
    found = _ARRAY.search(result.get("text", ""))
    rows = given[1].shape[1]
    row_bytes = None
    if found:
        size = jnp.dtype({"bf16": "bfloat16", "f32": "float32"}[found.group(1)]).itemsize
        row_bytes = size * np.prod([int(axis) for axis in found.group(2).split(",")]) / rows
    common.emit(
        benchmark="tpu_ragged", topology=topology, way=way, compiles=result["compiles"],
        error=result.get("error", "").partition("\n")[0] or None, array=found and found.group(2),
        bytes_of_a_row=row_bytes, versions=common.versions(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
