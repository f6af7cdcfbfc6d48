"""Lists of items, and of pairs of a user and an item, that limit recommendations."""

from __future__ import annotations

from numbers import Real

import numpy as np
import pandas as pd
from scipy import sparse

from tpu_als.datasets.columns import columns_of, plain
from tpu_als.recommender import features, sources
from tpu_als.recommender.ids import as_held, as_ids, given_ids
from tpu_als.recommender.ranking import Limits
from tpu_als.recommender.state import State
from tpu_als.recommender.warn import warn


def limits_of(
    state: State,
    queries: pd.Series,
    excludes_seen: object,
    exclude: object,
    candidates: object,
    min_score: object,
) -> Limits:
    """Check the arguments of `Recommender.recommend` that limit the results for some users.

    Raises
    ------
    TypeError, ValueError
        For other types, and for ids of another type than those of the data of `fit`.
    """
    if not isinstance(excludes_seen, (bool, np.bool_)):
        raise TypeError(f"exclude_seen must be True or False, got {excludes_seen!r:.60}")
    if min_score is not None:
        if not isinstance(min_score, Real) or isinstance(min_score, bool) or min_score != min_score:
            raise ValueError(f"min_score must be a number, got {min_score!r:.60}")
        min_score = float(min_score)
    excluded, excluded_pairs = _items_or_pairs(state, queries, exclude, "exclude")
    chosen, chosen_pairs = _items_or_pairs(state, queries, candidates, "candidates")
    # Nothing is known of these items: their score of 0 would be above negative ones.
    unknown = features.without_anything(state.model, state.has_events)
    if len(unknown):
        excluded = unknown if excluded is None else np.union1d(excluded, unknown)
        chosen = None if chosen is None else np.setdiff1d(chosen, unknown)
    return Limits(bool(excludes_seen), excluded, chosen, excluded_pairs, chosen_pairs, min_score)


def _items_or_pairs(
    state: State, queries: pd.Series, given: object, name: str
) -> tuple[np.ndarray | None, sparse.csr_matrix | None]:
    if given is None:
        return None, None
    if _is_frame(given):
        return None, _pairs(state, queries, given, name)
    series, is_single = given_ids(given, name)
    if is_single:
        raise TypeError(
            f"{name} must be a list of items, or a frame of pairs, got {given!r:.60}: pass a list"
        )
    at = state.items.positions(series, name)
    if name == "candidates":
        _warn_of_unknown(series[at < 0], len(series), "items")
    return np.unique(at[at >= 0]), None


def _is_frame(given: object) -> bool:
    is_ids = isinstance(given, (str, list, tuple, pd.Index, pd.Series, np.ndarray))
    return not is_ids and hasattr(given, "columns")


def _pairs(state: State, queries: pd.Series, given: object, name: str) -> sparse.csr_matrix:
    """The items of each query, as a matrix (m, N)."""
    schema = state.schema
    ids = [schema.user, "user", schema.item, "item"]
    frame, *_ = sources.read(given, sources.names_of(given), ids)
    found = []
    for own, usual in ((schema.user, "user"), (schema.item, "item")):
        column = own if own in frame.columns else usual
        if column not in frame.columns:
            raise ValueError(
                f"{name} must be a list of items, or a frame with the columns {schema.user!r} and "
                f"{schema.item!r}, got {list(frame.columns)}"
            )
        found.append(columns_of(frame, [column])[0])
    state.users.positions(found[0], f"{name}[{found[0].name!r}]")  # refuses ids of another type
    places, distinct = pd.factorize(as_ids(plain(queries)))
    users = as_ids(plain(found[0]))
    users = as_held(distinct).get_indexer(users)
    items = state.items.positions(found[1], f"{name}[{found[1].name!r}]")
    if name == "candidates":
        _warn_of_unknown(found[1][items < 0], len(frame), "pairs")
    is_used = (users >= 0) & (items >= 0)
    ones = np.ones(np.count_nonzero(is_used), np.float32)
    shape = len(distinct), len(state.items)
    pairs = sparse.csr_matrix((ones, (users[is_used], items[is_used])), shape=shape)
    return pairs[places]


def _warn_of_unknown(unknown: pd.Series, total: int, what: str) -> None:
    if len(unknown):
        warn(
            f"{len(unknown)} of {total} candidate {what} have ids that are not in the data, such "
            f"as {unknown.iloc[0]!r:.60}, and were left out",
        )
