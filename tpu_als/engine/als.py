"""Alternating least squares over laid-out data: start, epoch, half-epoch, loss.

`half_epoch` solves either side: *target* is the table being solved, *source* the fixed one. The
functions work on any backend. Tables are in the backend's form; `user_factors` and `item_factors`
copy them to arrays in the caller's order.

Axis letters: K factors, M users, N items.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tpu_als.engine.data import Data, Side, dtype_named
from tpu_als.engine.features import Features
from tpu_als.engine.objective import Objective, ridge, total_weight

_Table = TypeVar("_Table")  # a table in the backend's form


class Step(NamedTuple):
    """What a half-epoch minimises, and for which side.

    Attributes
    ----------
    objective : Objective
        Equations (1)-(2), as they are for this side.
    target : {"users", "items"}
        The side to solve.
    relaxation : float, default=1.0
        As in `epoch`.
    prior : table or None
        What the rows are drawn to, in the backend's form; None for zero.
    """

    objective: Objective
    target: str
    relaxation: float = 1.0
    prior: Any = None


class AlsState(NamedTuple):
    """Both tables, in the backend's form."""

    users: Any
    items: Any


def start(data: Data, user_factors: np.ndarray, item_factors: np.ndarray) -> AlsState:
    """Place initial tables (M, K) and (N, K), given in the caller's order."""
    tables = []
    for table, side in ((user_factors, data.users), (item_factors, data.items)):
        expected = (side.n_rows, data.params.factors)
        if table.shape != expected:
            raise ValueError(f"an initial table has shape {table.shape}, expected {expected}")
        tables.append(data.backend.put(table.astype(dtype_named(data.params.dtype)), side, data))
    return AlsState(*tables)


def draw(data: Data, seed: int, scale: float, *, normal: bool) -> AlsState:
    """Draw initial tables; the values of a row depend only on the seed and the row's number.

    They are uniform in [0, scale), or normal with standard deviation `scale`. No host has a whole
    table if there are several processes. All backends use JAX's generator.
    """
    return AlsState(*data.backend.draw(data, seed, scale, normal))


def user_factors(state: AlsState, data: Data) -> np.ndarray:
    """User table (M, K) in the caller's order: a writeable float32 or float64 copy."""
    return data.backend.table(state.users, data.users, data).fetch()


def item_factors(state: AlsState, data: Data) -> np.ndarray:
    """Item table (N, K) in the caller's order: a writeable float32 or float64 copy."""
    return data.backend.table(state.items, data.items, data).fetch()


def epoch(
    state: AlsState, data: Data, objective: Objective, relaxation: float = 1.0
) -> tuple[AlsState, tuple[int, int]]:
    """One iteration: users against items, then items against the new users.

    Parameters
    ----------
    state : AlsState
        The tables; they stay valid.
    data : Data
        The matrix.
    objective : Objective
        Equations (1)-(2).
    relaxation : float, default=1.0
        Step towards the solved rows, between 0 and 2; 1 is ALS.

    Returns
    -------
    state : AlsState
        The new tables.
    failed : (int, int)
        Rows of the new user and item tables with a non-finite value.
    """
    users = half_epoch(state.users, state.items, data, objective, relaxation, target="users")
    items = half_epoch(state.items, users, data, objective, relaxation, target="items")
    count = data.backend.count_failed
    return AlsState(users, items), (
        count(users, data.users, data),
        count(items, data.items, data),
    )


def half_epoch(
    target_table: _Table,
    source_table: _Table,
    data: Data,
    objective: Objective,
    relaxation: float = 1.0,
    *,
    target: str,
) -> _Table:
    """Solve all rows of the target table against the fixed source table.

    Parameters
    ----------
    target_table, source_table
        Tables of `AlsState`; both stay valid.
    data, objective, relaxation
        As in `epoch`.
    target : {"users", "items"}
        The side to solve.

    Returns
    -------
    The new target table.
    """
    side = getattr(data, target)
    step = Step(objective_of(objective, side), target, relaxation)
    if side.features is not None:
        weights = feature_weights(target_table, data, objective, target=target)
        step = step._replace(prior=data.backend.prior(weights, side, data))
    return data.backend.half_epoch(target_table, source_table, data, step)


def with_features(
    data: Data, user_features: Features | None = None, item_features: Features | None = None
) -> Data:
    """Place features of the rows of either side; a side without any keeps its ridge."""
    sides = {}
    for name, features in (("users", user_features), ("items", item_features)):
        side = getattr(data, name)
        if features is not None:
            features = replace(features, placed=data.backend.place_features(features, side, data))
        sides[name] = replace(side, features=features)
    return replace(data, **sides)


def objective_of(objective: Objective, side: Side) -> Objective:
    """Equations (1)-(2) as they are for a side: its features may change lam."""
    return objective if side.features is None else side.features.objective(objective)


def feature_weights(table: _Table, data: Data, objective: Objective, *, target: str) -> np.ndarray:
    """Weights W (P, K), float64, of the regression of a side's factors on its features."""
    return _regressed(table, data, objective, target)[1]


def _regressed(
    table: _Table, data: Data, objective: Objective, target: str
) -> tuple[np.ndarray, np.ndarray]:
    """F^T L Z of a table, and W."""
    side, own = getattr(data, target), objective_of(objective, getattr(data, target))
    n_source = (data.items if target == "users" else data.users).n_rows
    sums = data.backend.feature_sums(table, side, data, own)
    return sums, side.features.regression(own, side.lengths, n_source).weights(sums)


def completed(
    table: _Table, data: Data, objective: Objective, *, target: str
) -> tuple[_Table, np.ndarray | None]:
    """A table whose rows without entries are what their features say, W^T f, and the weights W.

    Training keeps such rows zero. A side without features is returned as it is, with None.
    """
    side = getattr(data, target)
    if side.features is None:
        return table, None
    weights = feature_weights(table, data, objective, target=target)
    if (side.lengths > 0).all():
        return table, weights
    prior = data.backend.prior(weights, side, data)
    return data.backend.filled(table, prior, side, data), weights


def loss(state: AlsState, data: Data, objective: Objective) -> float:
    """Loss at the tables, in implicit's normalisation: over the sum of all cells' weights.

    It is a0 tr(X^T X Y^T Y), the sum over all cells, plus the differences of the stored cells. Sums
    over rows are in float64; docs/math.md bounds the error of sums over the entries of a row.
    """
    users, items = data.users, data.items
    parts = data.backend.loss_parts(state, data, objective)
    user_gram, item_gram = (np.asarray(gram, np.float64) for gram in parts.gramians)
    ridges = _ridges(objective_of(objective, users), users, items.n_rows, parts.squares[0])
    ridges += _ridges(objective_of(objective, items), items, users.n_rows, parts.squares[1])
    for target, side, table in (("users", users, state.users), ("items", items, state.items)):
        if side.features is not None:
            # The least sum of lam |z - W^T f|^2 and gamma |W|^2 over all W.
            sums, feature_weights = _regressed(table, data, objective, target)
            ridges -= float(np.sum(sums * feature_weights))
    total = parts.entries + objective.unobserved_weight * np.sum(user_gram * item_gram) + ridges
    n_cells = users.n_rows * items.n_rows
    weights = total_weight(objective, data.absolute_sum, data.n_entries, n_cells)
    return float(total / weights) if weights else float(total)  # no weights if there are no cells


def _ridges(objective: Objective, side: Side, n_source: int, squares: np.ndarray) -> float:
    """Sum of lam_u |z_u|^2 over a side's rows, given their squared norms.

    The power in (2) may overflow; if a row or lam is zero, the term is still 0.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        terms = ridge(objective, side.lengths, n_source) * squares
    return float(np.where((squares == 0) | (objective.regularization == 0), 0, terms).sum())
