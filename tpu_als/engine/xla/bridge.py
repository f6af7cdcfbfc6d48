"""Convert tables of the CPU backend to the XLA backend's form, for draws and for checkpoints."""

from __future__ import annotations

import jax
import numpy as np

from tpu_als.engine import layout
from tpu_als.engine.als import AlsState
from tpu_als.engine.data import Data
from tpu_als.engine.layout import Plan
from tpu_als.engine.xla import half_epoch
from tpu_als.engine.xla.backend import XlaBackend
from tpu_als.engine.xla.data import XlaData, XlaSide
from tpu_als.engine.xla.mesh import device_mesh


def draw(data: Data, seed: int, scale: float, normal: bool) -> list[np.ndarray]:
    """See `als.draw`."""
    xla_data = describe(data)
    tables = half_epoch.draw(xla_data, seed, scale, normal)
    return list(from_xla(AlsState(*tables), data))


def to_xla(state: AlsState, data: Data) -> AlsState:
    """Place both tables on one CPU device of JAX."""
    xla_data = describe(data)
    sides = xla_data.users, xla_data.items
    put = xla_data.backend.put
    tables = (put(table, side, xla_data) for table, side in zip(state, sides, strict=True))
    return AlsState(*tables)


def from_xla(state: AlsState, data: Data) -> AlsState:
    """Copy both tables, which are in the slots of `to_xla`, to arrays."""
    sides = data.users, data.items
    return AlsState(*(np.array(t[0])[: side.n_rows] for t, side in zip(state, sides, strict=True)))


def describe(data: Data) -> XlaData:
    """Describe the data as the XLA backend does on one CPU device, without entries."""
    mesh = device_mesh([jax.local_devices(backend="cpu")[0]], num_threads=1)
    users, items = (
        XlaSide(lengths=side.lengths, rows=layout.in_order(side.lengths))
        for side in (data.users, data.items)
    )
    return XlaData(
        users=users,
        items=items,
        params=data.params,
        backend=XlaBackend(mesh),
        n_entries=data.n_entries,
        absolute_sum=data.absolute_sum,
        magnitudes=data.magnitudes,
        digest=data.digest,
        plan=Plan((), 0, 0, 1),
        mesh=mesh,
    )
