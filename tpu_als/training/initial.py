"""The initial tables of a fit: drawn at random, or current ones, extended for new rows."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from tpu_als import parameters
from tpu_als.engine import als
from tpu_als.engine.als import AlsState
from tpu_als.engine.data import Data
from tpu_als.shards import ShardedMatrix

if TYPE_CHECKING:
    from tpu_als.estimator import TPUAlternatingLeastSquares

Identity = tuple[object, ...]
Seed = int | np.random.RandomState | np.random.Generator | None
_SAMPLE = 1 << 12  # number of entries that the identity of a matrix depends on
_FEW_ITERATIONS = 3


def deviation(factors: int, normal: bool) -> float:
    """Scale of drawn tables: that of Rendle et al. (2022) for normal numbers, else implicit's."""
    return float(0.1 / np.sqrt(factors)) if normal else 0.01


def tables(
    given: Iterable[np.ndarray | None],
    shapes: Iterable[tuple[int, int]],
    random_state: Seed,
    dtype: Any,
    normal: bool,
) -> list[np.ndarray]:
    """Return the user and item table that a fit starts from.

    As in implicit, users are drawn first, and only missing rows are drawn. For uniform numbers and
    an integer seed the tables equal implicit's bit by bit.

    Parameters
    ----------
    given : two of ndarray of shape (m, factors) or None
        Current tables.
    shapes : two of (int, int)
        Rows and factors needed. Rows that a current table does not have are drawn.
    random_state : int, None, RandomState or Generator
        Seed.
    dtype : type
        Dtype of the drawn numbers, np.float32 or np.float64.
    normal : bool
        Whether to draw normal numbers rather than uniform ones.

    Raises
    ------
    ValueError
        If a current table has another width, or more rows than needed.
    """
    rng, kind, found = parameters.random_generator(random_state), np.dtype(dtype).type, []
    for side, table, (n_rows, factors) in zip(("user", "item"), given, shapes, strict=True):
        present = 0 if table is None else len(table)
        if table is not None and (table.shape[1] != factors or present > n_rows):
            raise ValueError(
                f"{side}_factors to start from has shape {table.shape}, but the data and "
                f"`factors` need {(n_rows, factors)}: rows may be added, but not removed. Set "
                f"{side}_factors to None, or warm_start to False, to start from new tables"
            )
        size, scale = (n_rows - present, factors), deviation(factors, normal)
        if normal:
            drawn = rng.standard_normal(size, dtype=kind) * kind(scale)
        else:
            drawn = rng.random(size, dtype=kind) * scale
        if table is None:
            found.append(drawn)
        else:
            found.append(
                np.concatenate([table, drawn.astype(table.dtype)]) if len(drawn) else table
            )
    return found


def state(
    data: Data,
    given: list[np.ndarray | None],
    estimator: TPUAlternatingLeastSquares,
    on_devices: bool,
) -> AlsState:
    """Place the initial tables of a fit.

    Parameters
    ----------
    data : Data
        The laid-out matrix.
    given : two of ndarray or None
        Tables to start from; None for a table to be drawn.
    estimator : TPUAlternatingLeastSquares
        Its `random_state` and `objective` decide what is drawn.
    on_devices : bool
        Whether to draw both tables on the devices, if none is given.
    """
    random_state, normal = estimator.random_state, estimator.objective == "ials"
    if data.backend.n_processes > 1 and not isinstance(random_state, Integral):
        # All processes must draw the same numbers.
        random_state = data.backend.agree(parameters.random_seed(random_state))
    if on_devices and all(table is None for table in given):
        scale = deviation(data.params.factors, normal)
        return als.draw(data, parameters.random_seed(random_state), scale, normal=normal)
    shapes = [(side.n_rows, data.params.factors) for side in (data.users, data.items)]
    return als.start(data, *tables(given, shapes, random_state, data.params.compute_dtype, normal))


def check_columns(before: np.ndarray | None, now: np.ndarray | None) -> None:
    """Raise ValueError if a fit would start items from the rows of other items.

    Parameters
    ----------
    before, now : ndarray of str, or None
        Names of the columns of the current item table, and of those to be fitted, which may have
        more columns at the end. None if they have no names.
    """
    if before is None or now is None or len(now) < len(before):
        return  # `tables` raises an error for too few columns
    wrong = np.flatnonzero(before != now[: len(before)])
    if len(wrong):
        at = wrong[0]
        raise ValueError(
            f"column {at} is {now[at]!r}, but row {at} of item_factors, which fit starts from, is "
            f"of {before[at]!r}: pass the columns in the order of the last fit, new ones at the "
            "end, or set item_factors to None to start anew"
        )


def identity(rows: sparse.csr_matrix | ShardedMatrix) -> Identity:
    """A cheap identity of a matrix: its shape, number of entries, and a digest of a sample.

    Parameters
    ----------
    rows : csr_matrix or ShardedMatrix
        The data of a fit.
    """
    if isinstance(rows, ShardedMatrix):
        return (*rows.shape, rows.nnz, str(rows.path))
    step = max(1, rows.nnz // _SAMPLE)
    sample = (rows.indptr[:: max(1, rows.shape[0] // _SAMPLE)], rows.indices[::step])
    digest = zlib.crc32(np.ascontiguousarray(rows.data[::step]).data)
    for part in sample:
        digest = zlib.crc32(np.ascontiguousarray(part, np.int64).data, digest)
    return (*rows.shape, rows.nnz, digest)


def warn_if_restarted(estimator: TPUAlternatingLeastSquares, now: Identity) -> bool:
    """Warn about repeated short fits on the same data, which would continue in implicit.

    Parameters
    ----------
    estimator : TPUAlternatingLeastSquares
        Its `_fitted_to` holds the identity of the last fit's data, and whether it has warned.
    now : tuple
        Identity of this fit's data.

    Returns
    -------
    bool
        Whether the estimator has warned, now or before.
    """
    before, has_warned = estimator._fitted_to or (None, False)
    # A fit with checkpoints resumes.
    assigned = estimator._fitted.assigned
    continues = estimator.warm_start or assigned or estimator.checkpoint_dir
    if has_warned or continues or before != now or not 0 < estimator.iterations < _FEW_ITERATIONS:
        return has_warned
    warnings.warn(
        f"fit is called again on the same data with iterations={estimator.iterations} and starts "
        "from new tables, so that calls do not add up. To continue, as implicit does, set "
        "warm_start=True or use tpu_als.compat.AlternatingLeastSquares",
        UserWarning,
        stacklevel=4,
    )
    return True
