"""The fitted state of a `Recommender`, and how it is made from events."""

from __future__ import annotations

import functools
import logging
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.base import clone

from tpu_als.recommender import counting, features, stored_ids
from tpu_als.recommender.counting import Clock, Events
from tpu_als.recommender.encoders import Encoder
from tpu_als.recommender.features import Rows
from tpu_als.recommender.history import Cells, History
from tpu_als.recommender.ids import IdMap
from tpu_als.recommender.schema import Schema
from tpu_als.recommender.warn import warn

log = logging.getLogger("tpu_als")


class Steps:
    """Logs how long the steps of `fit` take, at the level DEBUG of the logger "tpu_als"."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()

    def done(self, name: str) -> None:
        """Log a step, which began when the one before it was done."""
        now = time.perf_counter()
        log.debug("%s: %.3f s", name, now - self._begin)
        self._begin = now


@dataclass(frozen=True, eq=False)
class State:
    """Everything that a call needs. An update makes another state, so readers see the old or the
    new one.

    Attributes
    ----------
    schema : Schema
        The parameters at `fit`, about events.
    users, items : IdMap
        Ids by position.
    history : History
        Values and weights of all users.
    model : estimator
        The fitted model.
    weighting : transformer or None
        Fitted to the values.
    popularity : int64 array (N,)
        For each item, the number of users with a positive value.
    pending : int64 array (N,)
        For each item, the cells changed since its factors were solved.
    has_events : bool array (N,)
        Whether an item has cells. An item without them is known by its features only.
    clock : Clock or None
        The latest time of `fit`; None without timestamps.
    library : str
        The frame library of the events of `fit`.
    encoders : dict of str to Encoder
        For each side with features, "user" or "item", the encoder of its frames.
    lock : Lock
        Held while an update is computed.
    """

    schema: Schema
    users: IdMap
    items: IdMap
    history: History
    model: Any
    weighting: Any
    popularity: np.ndarray
    pending: np.ndarray
    has_events: np.ndarray
    clock: Clock | None
    library: str
    encoders: dict[str, Encoder] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in set(self.__dataclass_fields__) - {"lock"}}

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(vars(State(**values)))

    @functools.cached_property
    def popular(self) -> np.ndarray:
        """Items that somebody likes, the most popular first; equal ones by position."""
        order = np.argsort(-self.popularity, kind="stable")
        return order[: np.count_nonzero(self.popularity)].astype(np.int32)

    @functools.cached_property
    def n_with_history(self) -> int:
        """Number of users with a history; others are known by their features only."""
        return int(np.count_nonzero(self.history.lengths()))

    def rows(self, users: np.ndarray) -> sparse.csr_matrix:
        """Weights (m, N) of some users."""
        return self.history.rows(users).matrix(len(self.items))

    def weighted(self, cells: Cells) -> Cells:
        """Compute the weights of rows of cells from their values."""
        return weighted(self.weighting, cells, len(self.items))


def fitted(recommender: Any, schema: Schema, events: Events, library: str, fit: Any) -> State:
    """Map the ids, combine the events, weight them and fit the model.

    Parameters
    ----------
    recommender : Recommender
        Its `model`, `weighting` and encoders are cloned.
    schema : Schema
        Its other parameters.
    events : Events
        At least one.
    library : str
        The frame library of the events.
    fit : callable
        Fits a model to a matrix, and to `user_features` and `item_features` if there are any.
    """
    step = Steps()
    users, user_at = IdMap(pd.Index([])).grown(events.frame[schema.user], _column(schema.user))
    items, item_at = IdMap(pd.Index([])).grown(events.frame[schema.item], _column(schema.item))
    step.done("ids")
    sides = {
        "user": features.at_fit(recommender, "user", schema.user, users),
        "item": features.at_fit(recommender, "item", schema.item, items),
    }
    n_with_events = len(users), len(items)
    users, items = sides["user"].ids, sides["item"].ids
    step.done("features")
    for column, ids in ((schema.user, users), (schema.item, items)):
        _warn_if_unstorable(column, ids)
    clock = None if events.times is None else Clock(events.kind, events.latest, events.latest)
    values = counting.decayed(events, schema, clock)
    shape = len(users), len(items)
    cells = counting.cells_of(events, values, (user_at, item_at), shape, schema.repeated)
    weighting = None
    if recommender.weighting is not None:
        # Without users and items that have features only, which would change sizes and means.
        counts = cells.matrix(n_with_events[1], of="values")[: n_with_events[0]]
        weighting = clone(recommender.weighting).fit(counts)
        weighting = with_items(weighting, cells, with_events(cells, len(items)))
    cells = weighted(weighting, cells, len(items))
    step.done("values and weights")
    tables = {f"{name}_features": s.table for name, s in sides.items() if s.table is not None}
    model = fit(cells.matrix(len(items)), **tables)
    step.done("model")
    return State(
        schema=schema,
        users=users,
        items=items,
        history=History.of(cells, len(items)),
        model=model,
        weighting=weighting,
        popularity=liked(cells, len(items)),
        pending=np.zeros(len(items), np.int64),
        has_events=with_events(cells, len(items)),
        clock=clock,
        library=library,
        encoders={name: s.encoder for name, s in sides.items() if s.encoder is not None},
    )


def with_events(cells: Cells, n_items: int) -> np.ndarray:
    """Whether each item (N,) has a cell."""
    return np.bincount(cells.items, minlength=n_items) > 0


def liked(cells: Cells, n_items: int) -> np.ndarray:
    """Number of cells with a positive value for each item (N,)."""
    return np.bincount(cells.items[cells.values > 0], minlength=n_items)


def weighted(weighting: Any, cells: Cells, n_items: int) -> Cells:
    """Cells with the weights that a fitted transformer gives to their values.

    Raises
    ------
    ValueError
        If the transformer does not keep the stored entries.
    """
    if weighting is None or not len(cells.values):
        return cells._replace(weights=cells.values.astype(np.float32))
    # Items after those of the weighting's fit count only if they have entries here.
    n_fitted = getattr(weighting, "n_features_in_", n_items)
    given = cells.matrix(min(n_items, max(n_fitted, int(cells.items.max()) + 1)), of="values")
    made = weighting.transform(given)
    name = type(weighting).__name__
    if not sparse.issparse(made) or made.shape != given.shape:
        got = f"{type(made).__name__} of shape {getattr(made, 'shape', None)}"
        raise ValueError(
            f"weighting must give a sparse matrix of the shape it gets, {given.shape}; "
            f"{name}.transform gave {got}"
        )
    made = sparse.csr_matrix(made)
    made.sort_indices()
    if not (
        np.array_equal(made.indptr, given.indptr) and np.array_equal(made.indices, given.indices)
    ):
        raise ValueError(
            f"weighting must keep the stored entries of a matrix, but {name}.transform gave "
            f"{made.nnz} of {given.nnz}: give an entry a small weight rather than remove it"
        )
    return cells._replace(weights=made.data.astype(np.float32))


def with_items(weighting: Any, cells: Cells, has_events: np.ndarray) -> Any:
    """The weighting with what it learns of new items, if it has a method for that.

    Parameters
    ----------
    weighting : transformer or None
        It stays as it is.
    cells : Cells
        All cells of the items that have no events yet.
    has_events : bool array (N,)
        Which items have had events before, of which nothing is learnt again.
    """
    if not hasattr(weighting, "with_items"):
        return weighting
    new = np.unique(cells.items)
    return weighting.with_items(cells.matrix(len(has_events), of="values"), new[~has_events[new]])


def _warn_if_unstorable(column: str, ids: IdMap) -> None:
    """Warn before the fit, which may take long, of ids that `save` refuses."""
    reason = stored_ids.unstorable(ids)
    if reason is not None:
        warn(
            f"save cannot write the ids of column {column!r}, because they hold {reason}",
        )


def _column(name: str) -> str:
    return f"column {name!r}"


def updated(state: State, events: Events, given: dict[str, Any], solve: Any) -> State:
    """Add events and features: grow the maps, change rows, and solve what changed.

    Parameters
    ----------
    state : State
        Stays as it is.
    events : Events
        The new events.
    given : dict of str to frame or None
        For each side, "user" and "item", new rows of features.
    solve : callable
        ``solve(model, side, ids, matrix)`` gives a model with some rows of a side solved.
    """
    schema = state.schema
    users, user_at = state.users.grown(events.frame[schema.user], _column(schema.user))
    items, item_at = state.items.grown(events.frame[schema.item], _column(schema.item))
    users, of_users = _with_features(state, "user", schema.user, given, users)
    items, of_items = _with_features(state, "item", schema.item, given, items)
    touched = np.union1d(user_at, _places(of_users))
    row_at = np.searchsorted(touched, user_at)
    values = counting.decayed(events, schema, state.clock)
    shape = len(touched), len(items)
    new = counting.cells_of(events, values, (row_at, item_at), shape, schema.repeated)
    is_known = touched < state.history.n_users
    old = state.history.rows(touched[is_known])
    missing = np.full(len(touched) - is_known.sum(), old.indptr[-1])
    old = old._replace(indptr=np.append(old.indptr, missing))  # new users come last
    rows = counting.combined(old, new, schema.repeated)
    had_events = _padded(state.has_events, len(items))
    weighting = with_items(state.weighting, rows, had_events)
    rows = weighted(weighting, rows, len(items))
    history = state.history.changed_to(touched, rows, len(users), len(items))
    popularity = _padded(state.popularity, len(items))
    popularity += liked(rows, len(items)) - liked(old, len(items))
    pending = _padded(state.pending, len(items)) + np.bincount(new.items, minlength=len(items))
    has_events = had_events | with_events(new, len(items))
    model = features.carried(state.model, "user", len(users), of_users)
    model = features.carried(model, "item", len(items), of_items)
    model = solve(model, "user", touched, rows.matrix(len(items)))
    # A few changed entries hardly change the factors of a popular item. It is solved again when
    # they reach 1/20 of its users.
    of_touched = np.unique(new.items)
    is_due = pending[of_touched] * 20 >= popularity[of_touched]
    due = np.union1d(of_touched[is_due], _places(of_items))
    if len(due):
        model = solve(model, "item", due, history.columns(due))
        model = solve(model, "user", touched, rows.matrix(len(items)))
        pending[due] = 0
    return replace(
        state, users=users, items=items, history=history, model=model, weighting=weighting,
        popularity=popularity, pending=pending, has_events=has_events, lock=state.lock,
        clock=None if state.clock is None else state.clock.after(events),
    )  # fmt: skip


def _with_features(
    state: State, side: str, column: str, given: dict[str, Any], ids: IdMap
) -> tuple[IdMap, Rows | None]:
    encoder = state.encoders.get(side)
    return features.at_update(encoder, given[side], side, column, ids)


def _places(rows: Rows | None) -> np.ndarray:
    return np.empty(0, np.int64) if rows is None else rows.at


def _padded(counts: np.ndarray, length: int) -> np.ndarray:
    return np.pad(counts, (0, length - len(counts)))
