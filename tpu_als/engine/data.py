"""The data of a fit: static parameters, and both orientations of a matrix.

Axis letters: M rows of a side, K factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from tpu_als.engine.features import Features

BFLOAT16 = "bfloat16"


def dtype_named(name: str) -> np.dtype:
    """The dtype "float32", "float64" or "bfloat16" of tables."""
    if name != BFLOAT16:
        return np.dtype(name)
    import ml_dtypes  # late: a service with float32 tables does not need it

    return np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class AlsParams:
    """Static parameters. Programs are compiled for their values; all other numbers are traced.

    Attributes
    ----------
    factors : int
        K.
    dtype : {"float32", "float64", "bfloat16"}
        Dtype of the tables. Sums are float32, or float64 with "float64".
    linear_solver : {"cg", "exact", "cholesky", "auto"}
        How the rows' systems (1) are solved. "exact" runs CG to convergence on the CPU backend, and
        means "cholesky" on the XLA backend; "auto" chooses by `cheapest_solver`. If every w is 0,
        the systems are diagonal, and are solved by division ("diagonal").
    cg_steps : int
        Steps of "cg".
    positive : bool
        Whether all weights w are nonnegative, as with the objective "ials". Then "cholesky" can
        solve a row with few entries by a system whose size is their number.
    """

    factors: int
    dtype: str = "float32"
    linear_solver: str = "cg"
    cg_steps: int = 3
    positive: bool = False

    @property
    def compute_dtype(self) -> str:
        """Dtype of sums and solves."""
        return "float64" if self.dtype == "float64" else "float32"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One orientation of a matrix; each backend adds its layout of the entries.

    Attributes
    ----------
    lengths : int array (M,)
        Number of stored entries of each row.
    features : Features or None
        Features of the rows, if there are any.
    """

    lengths: np.ndarray
    features: Features | None = None

    @property
    def n_rows(self) -> int:
        """Number of rows M."""
        return len(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Both orientations of a matrix, laid out by a backend; reusable for any objective.

    Attributes
    ----------
    users, items : Side
        The orientations.
    params : AlsParams
        The static parameters.
    backend : Backend
        The backend that laid it out, and the only one that can use it.
    n_entries : int
        Number of stored entries.
    absolute_sum : float
        Sum of their absolute values.
    magnitudes : (float, float) or None
        Their smallest and largest absolute value, if known.
    digest : int or None
        Digest of all entries, if it was requested or the entries were read from disk.
    """

    users: Any
    items: Any
    params: AlsParams
    backend: Any
    n_entries: int
    absolute_sum: float
    magnitudes: tuple[float, float] | None = None
    digest: int | None = None


class KnownTable(NamedTuple):
    """What is known of a fixed table (N, K) before it is placed.

    Attributes
    ----------
    gramian : array (K, K)
        Its gramian in float64.
    n_rows : int
        N, also if only some of the rows are placed.
    """

    gramian: np.ndarray
    n_rows: int


class LossParts(NamedTuple):
    """The terms of the loss that a backend computes; see `als.loss`.

    Attributes
    ----------
    entries : float
        Contribution of the stored entries, beyond the unobserved term.
    gramians : two of array (K, K)
        Of the user and the item table.
    squares : two of array (M,)
        Squared norms of the users' and of the items' rows.
    """

    entries: float
    gramians: tuple[np.ndarray, np.ndarray]
    squares: tuple[np.ndarray, np.ndarray]
