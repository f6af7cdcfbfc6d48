"""Results as frames with the caller's ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.exceptions import UndefinedMetricWarning

from tpu_als.datasets.columns import index_of
from tpu_als.datasets.kinds import shown
from tpu_als.implicit_api.side_features import Explanation
from tpu_als.recommender import counting, features, ranking, sources
from tpu_als.recommender.ids import IdMap, given_ids
from tpu_als.recommender.ranking import Ranked
from tpu_als.recommender.schema import Schema
from tpu_als.recommender.state import State
from tpu_als.recommender.warn import warn
from tpu_als.storage.atomic import replacing

_REASONS = np.array(ranking.REASONS, object)


def recommendations(
    state: State, parts: list[Ranked], names: pd.Series | None, library: str
) -> Any:
    """The frame that `Recommender.recommend` returns.

    Parameters
    ----------
    state : State
        Has the ids.
    parts : list of Ranked
        The results.
    names : Series of length m or None
        The ids of the queries; None for all users with a history.
    library : str
        The frame library.
    """
    found = ranking.concatenated(parts)
    return sources.as_library(_columns(state, found, names), library)


def _columns(state: State, found: Ranked, names: Any) -> dict[str, Any]:
    own = {} if names is None else {"user": names.take(found.queries).array}
    return {
        **own,
        "item": state.items.take(found.items),
        "rank": found.ranks,
        "score": found.scores,
        "reason": _REASONS[found.reasons],
    }


def to_parquet(
    path: str | os.PathLike[str], state: State, parts: Iterable[Ranked], names: pd.Series
) -> int:
    """Write results to a Parquet file, a row group for each part; return the number of rows."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(
            "recommend_to_parquet needs pyarrow: pip install 'tpu-als[shards]'"
        ) from error
    # All ids decide the types, because those of one part may not fit the ids of another.
    users, items = _as_arrow(names, "users"), _as_arrow(state.items.index, "items")
    reasons = pa.array(ranking.REASONS, pa.large_string())
    own = [("rank", pa.int64()), ("score", pa.float32()), ("reason", reasons.type)]
    schema, n_rows = pa.schema([("user", users.type), ("item", items.type), *own]), 0
    with replacing(Path(path)) as file, pq.ParquetWriter(file, schema) as writer:
        for part in parts:
            columns = [
                users.take(part.queries), items.take(part.items), part.ranks, part.scores,
                reasons.take(part.reasons),
            ]  # fmt: skip
            if len(part.queries):
                writer.write_table(pa.table(columns, schema=schema))
            n_rows += len(part.queries)
    return n_rows


def _as_arrow(ids: pd.Series | pd.Index, name: str) -> Any:
    """Ids as an array of PyArrow; ValueError if a Parquet file has no type for them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = pd.Series(ids)
    if values.dtype == object:  # such as intervals, which PyArrow reads from arrays of pandas only
        values = pd.Series(index_of(values))
    try:
        array = pa.array(values, from_pandas=True)
        pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([(name, array.type)])).close()
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"recommend_to_parquet cannot write the ids of {name}, such as "
            f"{shown(values.iloc[0])}, because Parquet has no type for all of them "
            f"({error!s:.100}): use recommend, or fit with ids that are converted, for example "
            "with astype(str)"
        ) from error
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def neighbours(state: State, side: str, given: object, n: int) -> Any:
    """The frame of `similar_items` (side "item") or `similar_users` ("user")."""
    ids = state.items if side == "item" else state.users
    series, _ = given_ids(given, f"{side}s")
    at = known(ids, series, f"{side}s")
    table = state.model.item_factors if side == "item" else state.model.user_factors
    find, has_factors = getattr(state.model, f"similar_{side}s"), table.any(axis=1)
    some = None if has_factors.all() else np.flatnonzero(has_factors)  # others have no direction
    found, scores = find(at, N=min(n + 1, len(ids)), **{f"{side}s": some})
    is_result = (found >= 0) & (found != at[:, None]) & has_factors[at][:, None]
    is_result &= np.cumsum(is_result, axis=1) <= n
    queries, ranks = np.nonzero(is_result)[0], np.cumsum(is_result, axis=1)[is_result]
    columns = {
        side: series.take(queries).reset_index(drop=True),
        f"similar_{side}": ids.take(found[is_result]),
        "rank": ranks,
        "score": scores[is_result],
    }
    return sources.as_library(columns, state.library)


def known(ids: IdMap, series: pd.Series, name: str) -> np.ndarray:
    """Positions (n,) of ids that must be in the data.

    Raises
    ------
    ValueError
        If one is not.
    """
    at = ids.positions(series, name)
    missing = np.flatnonzero(at < 0)
    if len(missing):
        raise ValueError(
            f"{name} must be in the data of fit or update: {len(missing)} of {len(at)} are not, "
            f"such as {series.iloc[missing[0]]!r:.60}"
        )
    return at


def explanation(state: State, user: object, item: object, n: int) -> Any:
    """The frame of `Recommender.explain`."""
    at = []
    for ids, given, name in ((state.users, user, "user"), (state.items, item, "item")):
        series, is_single = given_ids(given, name)
        if not is_single:
            raise TypeError(f"{name} must be one id, got {type(given).__name__}")
        at.append(int(known(ids, series, name)[0]))
    cells = state.history.rows(np.array([at[0]]))
    row, why = cells.matrix(len(state.items)), None
    if state.encoders:
        of_users = features.of_model(state.model, "user")
        own = None if of_users is None else of_users.rows[[at[0]]]
        why = state.model.explain_features(at[0], row, at[1], N=n, user_features=own)
        top = why.items
    else:
        _, top, _ = state.model.explain(at[0], row, at[1], N=n)
    items = np.array([item for item, _ in top], np.int64)
    where = np.searchsorted(cells.items, items)
    columns = {
        "item": state.items.take(items),
        "value": cells.values[where],
        "weight": cells.weights[where],
        "contribution": np.array([score for _, score in top], np.float64),
    }
    if why is not None:
        has_both = "item" in state.encoders and state.has_events[at[1]]
        columns = _with_features(columns, why, has_item_events=bool(has_both))
    return sources.as_library(columns, state.library)


def _with_features(
    columns: dict[str, Any], why: Explanation, *, has_item_events: bool
) -> dict[str, Any]:
    """The columns of an explanation, with rows for features."""
    parts = {"user feature": why.user_features, "item feature": why.item_features}
    rows: list[tuple[str, str | None, float]] = [
        (kind, str(name), value) for kind, some in parts.items() for name, value in some
    ]
    if has_item_events:
        rows.append(("item events", None, why.item_entries))
    n_items, nothing = len(columns["item"]), np.full(len(rows), np.nan)
    return {
        "kind": np.array(["history"] * n_items + [kind for kind, *_ in rows], object),
        "item": pd.Series([*columns["item"], *[None for _ in rows]], dtype=object),
        "feature": pd.Series([None] * n_items + [name for _, name, _ in rows], dtype=object),
        "value": np.append(columns["value"], nothing),
        "weight": np.append(columns["weight"], nothing),
        "contribution": np.append(columns["contribution"], [value for *_, value in rows]),
    }


def row_of_history(state: State, history: Any) -> sparse.csr_matrix:
    """Weights (1, N) of the events of one user who is not in the data."""
    schema = state.schema
    frame = _history_frame(schema, history)
    have = {name: name in frame for name in (schema.value, schema.timestamp, schema.event)}
    own = schema._replace(
        value=schema.value if have[schema.value] else None,
        timestamp=schema.timestamp if have[schema.timestamp] else None,
        event=schema.event if have[schema.event] else None,
        half_life=schema.half_life if have[schema.timestamp] else None,
    )
    frame = frame.assign(**{schema.user: 0})
    events = counting.checked(frame, own)
    counting.check_times(events, schema, state.clock)
    items = state.items.positions(events.frame[schema.item], "history")
    is_known = items >= 0
    if not is_known.all():
        warn(
            f"{np.count_nonzero(~is_known)} of {len(items)} events of the history have items that "
            "are not in the data, and were left out",
        )
    times = None if events.times is None else events.times[is_known]
    events = counting.Events(events.frame[is_known], events.values[is_known], times, events.kind)
    values = counting.decayed(events, own, state.clock)
    if not have[schema.timestamp]:
        values = counting.now(values, schema, state.clock)
    at = np.zeros(len(values), np.int64), items[is_known]
    shape = 1, len(state.items)
    cells = counting.cells_of(events, values, at, shape, schema.repeated)
    return state.weighted(cells).matrix(len(state.items))


def _history_frame(schema: Schema, history: Any) -> pd.DataFrame:
    """Events of one user as a DataFrame with the recommender's columns."""
    if isinstance(history, (list, tuple)) and all(isinstance(e, Mapping) for e in history):
        frame = pd.DataFrame(list(history)) if history else pd.DataFrame({"item": []})
        for name in {"value", schema.value} & set(frame):  # an event without a value counts 1
            frame[name] = [event.get(name, 1) for event in history]
    elif isinstance(history, (list, tuple, pd.Index, pd.Series, np.ndarray)):
        frame = pd.DataFrame({"item": given_ids(list(history), "history")[0]})
    elif isinstance(history, pd.DataFrame) or hasattr(history, "columns"):
        ids = [schema.item, "item"]
        frame = sources.read(history, sources.names_of(history), ids)[0]
    else:
        raise TypeError(
            "history must be a list of events such as {'item': 'tea'}, a list of items, or a "
            f"frame, got {type(history).__name__}"
        )
    names = {"item": schema.item, "value": schema.value, "timestamp": schema.timestamp}
    names["event"] = schema.event
    renamed = {
        usual: own
        for usual, own in names.items()
        if own is not None and own not in frame and usual in frame
    }
    frame = frame.rename(columns=renamed)
    if schema.item not in frame:
        raise ValueError(
            f"history must have a column {schema.item!r} or 'item', got {list(frame.columns)}"
        )
    _require_one_user(schema, history, frame, names)
    return frame


def _require_one_user(
    schema: Schema, history: Any, frame: pd.DataFrame, names: dict[str, str | None]
) -> None:
    """Raise ValueError for the events of several users, and for unknown keys of records."""
    for name in {schema.user, "user"} & set(frame):
        if frame[name].nunique() > 1:
            raise ValueError(
                f"history must hold the events of one user, got {frame[name].nunique()} in column "
                f"{name!r}"
            )
    known = {usual for usual, own in names.items() if own is not None} | {"user", schema.user}
    known |= {own for own in names.values() if own is not None}
    others = sorted(map(str, set(frame) - known)) if isinstance(history, (list, tuple)) else []
    if others:
        raise ValueError(
            f"history has {others}, which this recommender does not use: its events have "
            f"{sorted(known - {'user', schema.user})}"
        )


class Relevant(NamedTuple):
    """What the events of `score` say that users wanted.

    Attributes
    ----------
    items : csr_matrix (m, N)
        For each user the relevant items that the model knows.
    users : int64 array (m,)
        The users with a relevant item, by position.
    counts : int64 array (m,)
        Their numbers of relevant items, those that the model does not know included.
    are_new : bool
        Whether the users have not had these items. If not, the events are those of `fit`.
    """

    items: sparse.csr_matrix
    users: np.ndarray
    counts: np.ndarray
    are_new: bool


def relevant(state: State, events: counting.Events) -> Relevant:
    """Items in the events that are new to known users; all items if they are the whole history."""
    schema = state.schema
    user_at = state.users.positions(events.frame[schema.user], schema.user)
    is_known = user_at >= 0
    is_known[is_known] = state.history.lengths()[user_at[is_known]] > 0
    if not is_known.any():
        warn(
            f"the score is not defined: no user of the {len(user_at)} events has a history",
            UndefinedMetricWarning,
        )
    items, item_at = state.items.grown(events.frame[schema.item], schema.item)
    # Only signs matter, so the events decay from their own latest time.
    clock = (
        None
        if state.clock is None or events.latest is None
        else state.clock._replace(latest=events.latest)
    )
    values = counting.decayed(events, schema, clock)
    users, row_at = np.unique(user_at[is_known], return_inverse=True)
    times = None if events.times is None else events.times[is_known]
    kept = counting.Events(events.frame[is_known], values[is_known], times, events.kind)
    at = row_at, item_at[is_known]
    cells = counting.cells_of(kept, kept.values, at, (len(users), len(items)), schema.repeated)
    later = cells.matrix(len(items), of="values")
    later.data = (later.data > 0).astype(np.float64)
    seen = state.history.rows(users).matrix(len(items))
    seen.data = np.ones_like(seen.data, dtype=np.float64)
    are_new = not _has_cells(seen, later) or seen.nnz < state.history.lengths().sum()
    if are_new:
        later = sparse.csr_matrix(later - later.multiply(seen))
    later.eliminate_zeros()
    counts = np.diff(later.indptr)
    has_any = counts > 0
    known, counts = later[has_any][:, : len(state.items)], counts[has_any].astype(np.int64)
    return Relevant(known, users[has_any], counts, are_new)


def _has_cells(one: sparse.csr_matrix, other: sparse.csr_matrix) -> bool:
    """Whether both store the same cells."""
    return np.array_equal(one.indptr, other.indptr) and np.array_equal(one.indices, other.indices)
