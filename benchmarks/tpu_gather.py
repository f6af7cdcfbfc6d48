"""How should a TPU read the source rows of a chunk? Cycles and bytes of an entry. Needs no TPU.

gather : the gather that a fit uses.
sorted : the same with ids that are declared to be sorted.
one-hot N : products with one-hot rows, for entries whose rows are among N popular ones.

The compiler does not estimate gathers. Their cycles are those to read and write each row once at
HBM's bandwidth. For one-hot products the larger of this bound and the compiler's estimate is
printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import common
import hlo_cycles
import jax
import jax.numpy as jnp
import tpu_cycles
import tpu_plan
import tpu_roofline
from jax import Array
from jax.sharding import SingleDeviceSharding

CELLS = 1 << 17


def gather(table: Array, ids: Array, *, is_sorted: bool = False) -> Array:
    """Rows of a table."""
    return table.at[ids].get(mode="promise_in_bounds", indices_are_sorted=is_sorted)


def one_hot(table: Array, ids: Array) -> Array:
    """The same by a product on the matrix units."""
    chosen = jax.nn.one_hot(ids, len(table), dtype=table.dtype)
    return jnp.matmul(chosen, table, preferred_element_type=jnp.float32).astype(table.dtype)


def main() -> None:
    """Print a line for each chip and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=tpu_roofline.CHIPS, default=["v5e", "v5p"])
    parser.add_argument("--factors", type=int, default=128)
    parser.add_argument("--popular", type=int, nargs="+", default=[128, 512, 2048])
    args = parser.parse_args()
    ways: list[tuple[str, Callable[..., Array], int]] = [
        ("gather", gather, tpu_cycles.N_SOURCE),
        ("sorted", lambda *given: gather(*given, is_sorted=True), tpu_cycles.N_SOURCE),
        *((f"one-hot {count}", one_hot, count) for count in args.popular),
    ]
    for chip in args.chips:
        mesh = tpu_plan.device_mesh(tpu_cycles.TOPOLOGIES[chip])
        rates, sharding = tpu_roofline.CHIPS[chip], SingleDeviceSharding(mesh.devices[0])
        for name, way, n_rows in ways:

            def array(shape: tuple[int, ...], dtype: Any, sharding: Any = sharding) -> Any:
                return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

            given = array((n_rows, args.factors), jnp.bfloat16), array((CELLS,), jnp.int32)
            text = jax.jit(way).lower(*given).compile().as_text()
            assert text is not None
            row, is_gather = 2 * args.factors, n_rows == tpu_cycles.N_SOURCE
            moved = 4 + 2 * row if is_gather else 4 + row
            model = moved / rates.memory_bandwidth * rates.clock
            cycles = 0.0 if is_gather else hlo_cycles.of_program(text).cycles / CELLS
            common.emit(
                benchmark="tpu_gather", chip=chip, way=name, bytes_per_entry=moved,
                cycles_per_entry=max(cycles, model), compiler_cycles_per_entry=cycles,
            )  # fmt: skip


if __name__ == "__main__":
    main()
