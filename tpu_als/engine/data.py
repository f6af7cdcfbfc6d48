"""The placed data of a fit: its static parameters, and both orientations of a matrix.

Axis letters: M rows of a side, W work shards, S slots of a shard, K factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from tpu_als.engine.cells import Long
from tpu_als.engine.cpu import native
from tpu_als.engine.layout import Plan, RowMap
from tpu_als.engine.xla import exchange
from tpu_als.engine.xla.exchange import Route
from tpu_als.engine.xla.mesh import Workplace
from tpu_als.engine.xla.sweep import Shape
from tpu_als.host import Memory

DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class AlsParams:
    """Static parameters, whose changes recompile programs; everything else is traced.

    Attributes
    ----------
    factors : int
        K.
    dtype : {"float32", "float64", "bfloat16"}
        Dtype of the tables. Sums are float32, or float64 with "float64".
    linear_solver : {"cg", "cholesky", "subspace", "auto"}
        How the rows' systems (1) are solved; "auto" uses `cheapest_solver`. If every w is 0, the
        systems are diagonal, and are solved by division ("diagonal").
    cg_steps : int
        Steps of "cg".
    block_size : int
        Factors solved at once by "subspace".
    positive : bool
        Whether all weights w are nonnegative, as with the objective "ials". "cholesky" can then
        solve short rows through a system of their own length.
    native : bool
        Whether to use the loops of `native` if possible; for placed data, whether they are used.
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
        """Dtype of sums and solves."""
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
        The slot of each row.
    own : Own or None
        The entries, without long rows; None for a side that is only read.
    long : Long or None
        The entries of long rows, if any.
    routes : tuple of Route or None
        How source rows are received for each rung; None if every device has all of them.
    lengths : int array (M,)
        Number of stored entries of each row.
    """

    rows: RowMap
    own: Any
    long: Long | None
    routes: tuple[Route, ...] | None
    lengths: np.ndarray

    @property
    def n_rows(self) -> int:
        """Number of rows of the table, without unused slots."""
        return len(self.rows.slots)

    @property
    def in_order(self) -> native.Rows:
        """The rows in the form that `native` reads; only if they were placed for it."""
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

    `plan` is empty if rows are placed for `native`. `magnitudes` are the smallest and largest
    absolute value of an entry, if known. `memory` is reusable host memory for tables. `digest` is
    the digest of all entries, if it was requested or the entries were read from disk.
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
