"""Rank items for users by the model, and by popularity for users it has learnt nothing of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from tpu_als.evaluation.holdout import positive_counts
from tpu_als.recommender import features
from tpu_als.recommender.state import State

_BLOCK = 1 << 14  # users that are ranked at a time, which bounds the memory
_EXCLUDED = -1e38  # scores below it belong to fillers
REASONS = ("model", "popular", "features")
_MODEL, _POPULAR, _FEATURES = range(3)


class Limits(NamedTuple):
    """What may be in a result.

    Attributes
    ----------
    excludes_seen : bool
        Whether to leave out the items of the user's history.
    excluded : int array or None
        Items to leave out of every result.
    chosen : int array or None
        The only items to rank, ascending.
    excluded_pairs, chosen_pairs : CSR matrix (m, N) or None
        The same for each of m queries.
    min_score : float or None
        Minimum score of items that the model recommends.
    """

    excludes_seen: bool = True
    excluded: np.ndarray | None = None
    chosen: np.ndarray | None = None
    excluded_pairs: sparse.csr_matrix | None = None
    chosen_pairs: sparse.csr_matrix | None = None
    min_score: float | None = None

    def of(self, at: Any) -> Limits:
        """The limits of some queries."""
        pairs = (self.excluded_pairs, self.chosen_pairs)
        excluded, chosen = (None if one is None else one[at] for one in pairs)
        return self._replace(excluded_pairs=excluded, chosen_pairs=chosen)


class Ranked(NamedTuple):
    """Results, one after the other: the position of the query, and its items, best first.

    Attributes
    ----------
    queries : int64 array (n,)
        Position of the query, ascending.
    items : int32 array (n,)
        Items by position.
    ranks : int64 array (n,)
        Rank within the query, from 1.
    scores : float32 array (n,)
        Product of factors; for popular items the share of users with a history who like it.
    reasons : int8 array (n,)
        Why the item is there: a position in `REASONS`.
    """

    queries: np.ndarray
    items: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    reasons: np.ndarray


def blocks(state: State, users: np.ndarray, n: int, limits: Limits) -> Iterator[Ranked]:
    """Rank for users (m,) by position, -1 for unknown ones, a block of them at a time."""
    for low in range(0, len(users), _BLOCK):
        part = slice(low, low + _BLOCK)
        found = ranked(state, users[part], n, limits.of(part))
        yield found._replace(queries=found.queries + low)


def ranked(state: State, users: np.ndarray, n: int, limits: Limits) -> Ranked:
    """As `blocks`, all users at once."""
    rows = _rows(state, users)
    # Without a positive weight or features the factors should be zero, but they are rounding noise.
    by_model = (positive_counts(rows) > 0) | _has_features(state, users)
    by_model[by_model] = _has_factors(state, users[by_model])
    found = _ordered(
        [
            _by_model(state, users, rows, np.flatnonzero(by_model), n, limits),
            _by_popularity(state, rows, np.flatnonzero(~by_model), n, limits),
        ]
    )
    return _explained(state, rows, found)


def ranked_row(
    state: State,
    row: sparse.csr_matrix,
    n: int,
    limits: Limits,
    user_features: sparse.csr_matrix | None = None,
) -> Ranked:
    """Rank for one user with this row (1, N) of weights, who need not be in the data.

    A model with features of users needs those of the user (1, n_features).
    """
    one, chosen = np.zeros(1, np.int64), _chosen(limits)  # the only query, number 0
    is_known = (row.data > 0).any() or (user_features is not None and user_features.nnz > 0)
    if is_known and (chosen is None or len(chosen)):
        found = state.model.recommend(
            one, row, N=min(n, len(state.items)), recalculate_user=True,
            filter_already_liked_items=limits.excludes_seen,
            filter_items=None if chosen is not None else limits.excluded, items=chosen,
            user_features=user_features,
        )  # fmt: skip
        if found[1].any():  # all scores are 0 if the model knows none of the items
            return _explained(state, row, _flat(one, found[0], found[1], limits))
    return _by_popularity(state, row, one, n, limits)


def _explained(state: State, rows: sparse.csr_matrix, found: Ranked) -> Ranked:
    """Name features as the reason where the user, with this row (m, N), or the item has no events.

    The factors of such users and items are what their features say.
    """
    if not state.encoders:
        return found
    has_events = (np.diff(rows.indptr) > 0)[found.queries] & state.has_events[found.items]
    is_by_features = (found.reasons == _MODEL) & ~has_events
    return found._replace(reasons=np.where(is_by_features, np.int8(_FEATURES), found.reasons))


def _has_features(state: State, users: np.ndarray) -> np.ndarray:
    """Whether users (m,) have features that say something."""
    known, found = features.of_model(state.model, "user"), np.zeros(len(users), bool)
    if known is not None:
        is_known = users >= 0
        found[is_known] = np.diff(known.rows.indptr)[users[is_known]] > 0
    return found


def _rows(state: State, users: np.ndarray) -> sparse.csr_matrix:
    """Weights (m, N) of users; unknown users have none."""
    is_known = users >= 0
    if is_known.all():
        return state.rows(users)
    rows = state.rows(users[is_known])
    counts = np.zeros(len(users), np.int64)
    counts[is_known] = np.diff(rows.indptr)
    indptr = np.append(0, np.cumsum(counts))
    return sparse.csr_matrix((rows.data, rows.indices, indptr), shape=(len(users), rows.shape[1]))


def _has_factors(state: State, users: np.ndarray) -> np.ndarray:
    """Whether the model has learnt anything of these users."""
    return state.model._user_factor(users, None).any(axis=1)


def _by_model(
    state: State, users: np.ndarray, rows: sparse.csr_matrix, at: np.ndarray, n: int, limits: Limits
) -> Ranked:
    if not len(at):
        return nothing()
    users, rows, limits = users[at], rows[at], limits.of(at)
    if limits.chosen_pairs is not None:
        return _of_pairs(state, users, rows, at, n, limits)
    hidden, chosen = _hidden(rows, limits), _chosen(limits)
    if chosen is not None and not len(chosen):
        return nothing()
    ids, scores = state.model.recommend(
        users, hidden, N=min(n, len(state.items)),
        filter_already_liked_items=hidden is not None,
        filter_items=None if chosen is not None else limits.excluded,
        items=chosen,
    )  # fmt: skip
    return _flat(at, ids, scores, limits)


def _chosen(limits: Limits) -> np.ndarray | None:
    if limits.chosen is None or limits.excluded is None:
        return limits.chosen
    return np.setdiff1d(limits.chosen, limits.excluded)


def _hidden(rows: sparse.csr_matrix, limits: Limits) -> sparse.csr_matrix | None:
    """The items to leave out for each user; None if there are none."""
    hidden = rows if limits.excludes_seen else None
    if limits.excluded_pairs is None:
        return hidden
    pairs = limits.excluded_pairs
    return pairs if hidden is None else _union(hidden, pairs)


def _union(first: sparse.csr_matrix, second: sparse.csr_matrix) -> sparse.csr_matrix:
    """Stored entries of both; all values are 1."""
    ones = [
        sparse.csr_matrix((np.ones(m.nnz, np.float32), m.indices, m.indptr), shape=m.shape)
        for m in (first, second)
    ]
    return ones[0] + ones[1]


def _flat(at: np.ndarray, ids: np.ndarray, scores: np.ndarray, limits: Limits) -> Ranked:
    """Results of queries `at` from arrays (m, n), without fillers."""
    is_result = (ids >= 0) & (scores > _EXCLUDED)
    if limits.min_score is not None:
        is_result &= scores >= limits.min_score
    ranks = np.cumsum(is_result, axis=1)[is_result]
    queries = np.repeat(at, is_result.sum(axis=1))
    return Ranked(
        queries, ids[is_result], ranks, scores[is_result].astype(np.float32),
        _same_reason(len(queries), _MODEL),
    )  # fmt: skip


def _of_pairs(
    state: State, users: np.ndarray, rows: sparse.csr_matrix, at: np.ndarray, n: int, limits: Limits
) -> Ranked:
    """Rank each user's own candidates."""
    pairs = _allowed(rows, limits)
    queries = np.repeat(np.arange(len(users)), np.diff(pairs.indptr))
    if not len(queries):
        return nothing()
    scores = state.model.score_pairs(users[queries], pairs.indices).astype(np.float32)
    order = np.lexsort((pairs.indices, -scores, queries))
    queries, items, scores = queries[order], pairs.indices[order], scores[order]
    ranks = 1 + np.arange(len(queries)) - pairs.indptr[queries]
    is_result = ranks <= n
    if limits.min_score is not None:
        is_result &= scores >= limits.min_score
    return Ranked(
        at[queries[is_result]], items[is_result].astype(np.int32), ranks[is_result],
        scores[is_result], _same_reason(len(ranks[is_result]), _MODEL),
    )  # fmt: skip


def _allowed(rows: sparse.csr_matrix, limits: Limits) -> sparse.csr_matrix:
    """The candidates of each user that nothing excludes."""
    assert limits.chosen_pairs is not None
    pairs = limits.chosen_pairs.tocoo()
    keep = np.ones(pairs.nnz, bool)
    if limits.excluded is not None:
        keep &= ~np.isin(pairs.col, limits.excluded)
    if limits.chosen is not None:
        keep &= np.isin(pairs.col, limits.chosen)
    hidden = _hidden(rows, limits)
    if hidden is not None:
        keep &= ~_contains(hidden, pairs.row, pairs.col)
    entries = (np.ones(np.count_nonzero(keep), bool), (pairs.row[keep], pairs.col[keep]))
    return sparse.csr_matrix(entries, shape=pairs.shape)


def _contains(matrix: sparse.csr_matrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Whether cells are stored, also as zero."""
    if not len(rows):
        return np.zeros(0, bool)
    ones = np.ones(matrix.nnz, np.int8)
    pattern = sparse.csr_matrix((ones, matrix.indices, matrix.indptr), shape=matrix.shape)
    return np.asarray(pattern[rows, columns]).ravel() > 0


def _by_popularity(
    state: State, rows: sparse.csr_matrix, at: np.ndarray, n: int, limits: Limits
) -> Ranked:
    """The most popular items for users of whom the model knows nothing."""
    if not len(at):
        return nothing()
    rows, limits = rows[at], limits.of(at)
    order, chosen = state.popular, _chosen(limits)
    if chosen is not None:
        order = order[np.isin(order, chosen)]
    elif limits.excluded is not None:
        order = order[~np.isin(order, limits.excluded)]
    hidden = _hidden(rows, limits)
    found = []
    for place in range(len(at)):
        items = order
        if limits.chosen_pairs is not None:
            items = items[np.isin(items, limits.chosen_pairs[place].indices)]
        if hidden is not None and hidden.indptr[place] < hidden.indptr[place + 1]:
            out = hidden.indices[hidden.indptr[place] : hidden.indptr[place + 1]]
            items = items[: n + len(out)]
            items = items[~np.isin(items, out)]
        found.append(items[:n])
    counts = np.array([len(items) for items in found])
    items = np.concatenate(found)
    ranks = 1 + np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
    scores = state.popularity[items] / max(state.n_with_history, 1)
    reasons = _same_reason(len(items), _POPULAR)
    return Ranked(np.repeat(at, counts), items, ranks, scores.astype(np.float32), reasons)


def _same_reason(n: int, reason: int) -> np.ndarray:
    return np.full(n, reason, np.int8)


def nothing() -> Ranked:
    """No results."""
    ids = np.empty(0, np.int64)
    return Ranked(ids, ids.astype(np.int32), ids, np.empty(0, np.float32), np.empty(0, np.int8))


def concatenated(parts: list[Ranked]) -> Ranked:
    """Results of several parts, one part after the other."""
    columns = zip(*(parts or [nothing()]), strict=True)
    return Ranked(*(np.concatenate(column) for column in columns))


def _ordered(parts: list[Ranked]) -> Ranked:
    """Results of several parts by query."""
    whole = concatenated(parts)
    order = np.argsort(whole.queries, kind="stable")
    return Ranked(*(column[order] for column in whole))
