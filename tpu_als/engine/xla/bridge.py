"""Tables of the CPU backend in the XLA backend's form: for its generator, and for checkpoints."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from tpu_als.engine import layout
from tpu_als.engine.als import AlsState
from tpu_als.engine.data import Data
from tpu_als.engine.layout import Plan
from tpu_als.engine.xla import half_epoch
from tpu_als.engine.xla.backend import XlaBackend
from tpu_als.engine.xla.data import XlaData, XlaSide
from tpu_als.engine.xla.mesh import workplace


def draw(data: Data, seed: int, scale: float, normal: bool) -> list[np.ndarray]:
    """See `als.draw`."""
    twin = described(data)
    tables = half_epoch.draw(twin, seed, scale, normal)
    return list(from_xla(AlsState(*tables), data))


def to_xla(state: AlsState, data: Data) -> AlsState:
    """Both tables on one CPU device of JAX."""
    twin = described(data)
    sides = twin.users, twin.items
    tables = (twin.backend.put(t, side, twin) for t, side in zip(state, sides, strict=True))
    return AlsState(*tables)


def from_xla(state: AlsState, data: Data) -> AlsState:
    """Tables that are in the slots of `to_xla`'s data, as arrays."""
    sides = data.users, data.items
    return AlsState(*(np.array(t[0])[: side.n_rows] for t, side in zip(state, sides, strict=True)))


def described(data: Data) -> XlaData:
    """The data as the XLA backend describes them on one CPU device, without entries."""
    device = workplace([jax.local_devices(backend="cpu")[0]], num_threads=1)
    sides: dict[str, Any] = {
        name: XlaSide(lengths=side.lengths, rows=layout.in_order(side.lengths))
        for name, side in (("users", data.users), ("items", data.items))
    }
    return XlaData(
        **sides,
        params=data.params,
        backend=XlaBackend(device),
        n_entries=data.n_entries,
        absolute_sum=data.absolute_sum,
        magnitudes=data.magnitudes,
        digest=data.digest,
        plan=Plan((), 0, 0, 1),
        place=device,
    )
