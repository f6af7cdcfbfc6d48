"""Products with the features of a side's rows, over the shards of a mesh.

The weights are small and every device has all of them. Each device multiplies the features of the
rows of its own shards; sums over rows are added over the devices.

Axis letters: S slots of a shard, P features, K factors, E stored features of a shard's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy import sparse

from tpu_als.engine import layout
from tpu_als.engine.features import Features
from tpu_als.engine.objective import Objective, typed
from tpu_als.engine.xla import solve
from tpu_als.engine.xla.data import XlaData, XlaSide
from tpu_als.engine.xla.mesh import Collectives, DeviceMesh, Shards, precision
from tpu_als.engine.xla.programs import REPLICATED, SHARDED

_Sums = TypeVar("_Sums")  # arrays
_CHUNK = 1 << 12  # stored features of a partial sum


class FeatureCells(NamedTuple):
    """The stored features of a shard's rows; each field is `Shards`.

    Attributes
    ----------
    slots : int32 array (E,)
        Slot of the row of each. Pads have the number of slots, which is out of range.
    ids : int32 array (E,)
        Which feature it is.
    values : array (E,)
        Its value.
    """

    slots: Any
    ids: Any
    values: Any


class SumInputs(NamedTuple):
    """Inputs of `_sums` that each shard has: its table, the lengths of its rows, its features."""

    table: Any
    lengths: Any
    cells: FeatureCells


class Ridge(NamedTuple):
    """Inputs of `_sums` that all shards share: equation (2), and the rows of the other table."""

    objective: Objective
    n_source: Any


def place(features: Features, side: XlaSide, data: XlaData) -> FeatureCells:
    """Place the features of a side's rows where the rows are."""
    return placed(features.matrix, side.rows, data.params.compute_dtype, data.mesh)


def placed(
    matrix: sparse.csr_matrix, rows: layout.RowMap, dtype: str, mesh: DeviceMesh
) -> FeatureCells:
    """Place features (M, P) of rows, in the caller's order, in the slots of a map."""
    at = np.repeat(rows.slots, np.diff(matrix.indptr))
    shard, slot = np.divmod(at, rows.n_slots)
    counts = np.bincount(shard, minlength=rows.n_shards)
    size = layout.round_up(max(int(counts.max(initial=0)), 1))
    size += -size % min(size, _CHUNK)
    shape = len(mesh.local_shards), size
    slots, ids = np.full(shape, rows.n_slots, np.int32), np.zeros(shape, np.int32)
    values = np.zeros(shape, dtype)
    for number, local in enumerate(mesh.local_shards):
        found = np.flatnonzero(shard == local)
        found = found[np.argsort(slot[found], kind="stable")]
        slots[number, : len(found)] = slot[found]
        ids[number, : len(found)] = matrix.indices[found]
        values[number, : len(found)] = matrix.data[found]
    with precision(dtype):
        return FeatureCells(*map(mesh.put, (slots, ids, values)))


def sums(
    features: Features, table: Shards, side: XlaSide, data: XlaData, objective: Objective
) -> np.ndarray:
    """F^T L Z (P, K) of a table, in float64; sums of chunks are compensated."""
    params, mesh = data.params, data.mesh
    n_source = (data.items if side is data.users else data.users).n_rows
    kind = np.dtype(params.compute_dtype).type
    inputs = SumInputs(table, side.cells.lengths, features.placed)
    ridge = Ridge(typed(objective, params.compute_dtype), kind(n_source))
    static = features.matrix.shape[1], params.compute_dtype
    with precision(params.dtype):
        program = mesh.all_shards_program(_sums, static, REPLICATED)
        return np.asarray(program(inputs, ridge), np.float64)


def prior(features: Features, weights: np.ndarray, side: XlaSide, data: XlaData) -> Shards:
    """F W of the rows of each shard (S, K), in the dtype of sums."""
    params, mesh = data.params, data.mesh
    static = side.rows.n_slots, params.compute_dtype
    with precision(params.dtype):
        program = mesh.all_shards_program(_prior, static, SHARDED)
        return program(features.placed, weights.astype(params.compute_dtype))


def filled(table: Shards, prior: Shards, side: XlaSide, data: XlaData) -> Shards:
    """The table with the rows of `prior` in place of those without entries."""
    with precision(data.params.dtype):
        program = data.mesh.all_shards_program(_filled, None, SHARDED)
        return program((table, prior, side.cells.lengths), None)


def _sums(
    static: tuple[int, str], collectives: Collectives, inputs: SumInputs, ridge: Ridge
) -> Array:
    n_features, dtype = static

    def of_shard(table: Array, lengths: Array, cells: FeatureCells) -> Array:
        lam = solve.ridges(ridge.objective, lengths, ridge.n_source)
        lam = jnp.where(lengths > 0, lam, jnp.zeros_like(lam))
        zero = jnp.zeros((n_features, table.shape[1]), dtype)

        def add(at: FeatureCells, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            rows = table.at[at.slots].get(mode="fill", fill_value=0).astype(dtype)
            factors = at.values * lam.at[at.slots].get(mode="fill", fill_value=0)
            more = zero.at[at.ids].add(rows * factors[:, None], mode="promise_in_bounds")
            old, lost = sums
            new = old + more  # Knuth's two-sum
            added = new - old
            return new, lost + ((old - (new - added)) + (more - added))

        total, lost = _over_chunks(cells, add, (zero, zero))
        return total + lost

    tables, lengths = map(collectives.local_parts, (inputs.table, inputs.lengths))
    cells = _cells_of(collectives, inputs.cells)
    parts = [of_shard(*shard) for shard in zip(tables, lengths, cells, strict=True)]
    return collectives.sum(sum(parts[1:], parts[0]))


def _prior(static: tuple[int, str], _: Collectives, cells: FeatureCells, weights: Array) -> Shards:
    n_slots, dtype = static

    def of_shard(*own: Array) -> Array:
        def add(at: FeatureCells, out: Array) -> Array:
            rows = weights.at[at.ids].get(mode="promise_in_bounds") * at.values[:, None]
            return out.at[at.slots].add(rows, mode="drop", indices_are_sorted=True)

        out = jnp.zeros((n_slots, weights.shape[1]), dtype)
        return _over_chunks(FeatureCells(*own), add, out)

    return jax.tree.map(of_shard, *cells)


def _over_chunks(
    cells: FeatureCells, add: Callable[[FeatureCells, _Sums], _Sums], zero: _Sums
) -> _Sums:
    """Fold `add` over chunks of a shard's stored features."""
    size = min(len(cells.ids), _CHUNK)

    def body(step: int, sums: _Sums) -> _Sums:
        at = (lax.dynamic_slice_in_dim(array, step * size, size) for array in cells)
        return add(FeatureCells(*at), sums)

    return lax.fori_loop(0, len(cells.ids) // size, body, zero)


def _filled(_: None, __: Collectives, sharded: tuple[Shards, Shards, Shards], ___: None) -> Shards:
    def of_shard(table: Array, prior: Array, lengths: Array) -> Array:
        return jnp.where(lengths[:, None] > 0, table, solve.rounded(prior, table.dtype))

    return jax.tree.map(of_shard, *sharded)


def _cells_of(collectives: Collectives, cells: FeatureCells) -> list[FeatureCells]:
    parts = (collectives.local_parts(shards) for shards in cells)
    return [FeatureCells(*part) for part in zip(*parts, strict=True)]
