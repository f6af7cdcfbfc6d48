"""What is laid out for a fit: the parameters that compile, and both orientations of a matrix.

Axis letters: M rows of a side, W work shards, S slots of a shard, K factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from tpu_als import exchange, native
from tpu_als.cells import Long
from tpu_als.exchange import Route
from tpu_als.host import Memory
from tpu_als.layout import Plan, RowMap
from tpu_als.mesh import Workplace
from tpu_als.sweep import Shape

DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class AlsParams:
    """What may recompile; everything else is traced.

    Attributes
    ----------
    factors : int
        K.
    dtype : {"float32", "float64", "bfloat16"}
        Storage of the tables. Sums are float32, or float64 with "float64".
    linear_solver : {"cg", "cholesky", "subspace", "auto"}
        How the rows' systems (1) are solved; "auto" takes the cheapest by `cheapest_solver`. Where
        every w is 0 they are diagonal, and solved as such ("diagonal").
    cg_steps : int
        Steps of "cg".
    block_size : int
        Factors solved at once by "subspace".
    positive : bool
        No weight w will be negative, as with the objective "ials": "cholesky" may then solve short
        rows through a system of their own length.
    native : bool
        Work by the loops of `native`, where they serve; of placed data: whether they do.
    """

    factors: int
    dtype: str = "float32"
    linear_solver: str = "cg"
    cg_steps: int = 3
    block_size: int = 64
    positive: bool = False
    native: bool = False

    @property
    def compute_dtype(self) -> str:
        """What sums and solves are done in."""
        return "float64" if self.dtype == "float64" else "float32"

    def shape(self, rows: int, length: int) -> Shape:
        """The static part of a rung's program."""
        steps, block_size = self.cg_steps, self.block_size
        return Shape(
            self.linear_solver,
            steps if self.linear_solver != "diagonal" else 0,
            block_size if self.linear_solver != "diagonal" else 0,
            self.compute_dtype,
            rows,
            length,
            self.positive and self.linear_solver == "cholesky",
        )


@dataclass(frozen=True)
class Side:
    """One orientation: the map of its rows and its placed cells.

    Attributes
    ----------
    rows : RowMap
        Where the rows live.
    own : Own or None
        Their entries, long rows aside; None of a side that is only read.
    long : Long or None
        The entries of long rows, where there are any.
    routes : tuple of Route or None
        How source rows arrive for each rung; None where every device holds them all.
    lengths : int array (M,)
        Stored entries of each row.
    """

    rows: RowMap
    own: Any
    long: Long | None
    routes: tuple[Route, ...] | None
    lengths: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows of the table, unused slots not counted."""
        return len(self.rows.slots)

    @property
    def in_order(self) -> native.Rows:
        """The rows as `native` reads them, where they are laid out for it."""
        ids, values = np.asarray(self.own.ids[0]), self.own.values
        return native.Rows(
            self.rows.cells,
            self.lengths.astype(np.int64, copy=False),
            ids.view(np.uint32),
            None if values is None else np.asarray(values[0]),
        )

    @property
    def received_rows(self) -> int:
        """Source rows that a device receives from others for the chunks of a half-epoch."""
        if self.routes is None:
            return 0
        return exchange.received_rows(self.routes, self.rows.rungs, self.rows.n_shards)


@dataclass(frozen=True)
class Data:
    """Both orientations of a matrix, laid out and placed; reusable for any parameter values.

    `plan` is empty where rows are laid out for `native`. `magnitudes` are the least and the largest
    absolute value of an entry, where they are known. `memory` is that of tables on the host.
    `digest` is that of all entries, where it was asked for or where they were read from disk.
    """

    users: Side
    items: Side
    plan: Plan
    params: AlsParams
    place: Workplace
    n_entries: int
    absolute_sum: float
    magnitudes: tuple[float, float] | None = None
    memory: Memory = field(default_factory=Memory, repr=False, compare=False)
    digest: int | None = None
