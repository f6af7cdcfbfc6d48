"""Solve new rows against a fitted table, exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse

from tpu_als.engine.backends import Backend
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective
from tpu_als.serving.fitted import FactorTable
from tpu_als.validation import arguments

# Up to these numbers of rows and entries, a dispatch to a device takes longer than the work.
_FEW_ROWS, _FEW_ENTRIES = 4, 1 << 14


def solve(
    table: FactorTable,
    rows: sparse.csr_matrix,
    objective: Objective,
    params: AlsParams,
    backend: Callable[[], Backend],
) -> np.ndarray:
    """Solve equation (1) for canonical rows (m, n) against a table: (m, factors).

    Raises
    ------
    ValueError
        If a row could not be solved, or NaN was written into the table.
    """
    is_few = rows.shape[0] <= _FEW_ROWS and rows.nnz <= _FEW_ENTRIES
    solved = table.solve(rows, objective, params, CpuBackend(1) if is_few else backend())
    if not np.isfinite(solved).all():
        table.require_finite()
    return arguments.finite_rows(solved, "the given rows")
