"""Methods of a `Recommender` that answer questions about users and items."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pandas as pd
from sklearn.exceptions import NotFittedError

from tpu_als.recommender import features, frames, ranking
from tpu_als.recommender.ids import given_ids
from tpu_als.recommender.pairs import limits_of
from tpu_als.recommender.schema import choice
from tpu_als.recommender.state import State
from tpu_als.validation import arguments


class Answering:
    """Recommendations, neighbours and explanations as frames, by the caller's ids."""

    unknown: str

    def recommend(
        self,
        users: object = None,
        n: int = 10,
        *,
        exclude_seen: bool = True,
        exclude: object = None,
        candidates: object = None,
        min_score: float | None = None,
    ) -> Any:
        """Recommend items to some users or to all.

        Parameters
        ----------
        users : one id, or a list, array or Series of ids, default=None
            None is everybody with a history, in the order of `users_`. `recommend_to_parquet`
            needs less memory for that.
        n : int, default=10
            Maximum number of items of a user. There are fewer where there are fewer candidates.
        exclude_seen : bool, default=True
            Leave out the items of the user's history, whatever their value.
        exclude : list of items, or frame of pairs, default=None
            Items to leave out. A list applies to all users; each row of a frame to one user.
        candidates : list of items, or frame of pairs, default=None
            The only items to recommend, in the same forms. Unknown ids are left out, and a
            DataWarning gives their number.
        min_score : float, default=None
            Minimum score of items that the model recommends.

        Returns
        -------
        frame with the columns user, item, rank, score, reason
            Of the frame library of the events of `fit`. Users in the order given, best items first.
            The score is the model's, and the reason "model"; or "features" if the user or the item
            has no events, so that its factors are what its features say. Users with neither a
            positive weight nor features, or with zero factors, get popular items: the score is the
            share of all users with events who like the item, and the reason "popular". `unknown`
            decides what users get who are not in the data.

        Raises
        ------
        ValueError
            For ids of another type than in `fit`, for unknown users if `unknown` is "error", and if
            `unknown` is none of its choices.
        """
        now = self._state_
        at, names = self._users(now, users)
        limits = limits_of(now, names, exclude_seen, exclude, candidates, min_score)
        parts = list(ranking.blocks(now, at, _count(n), limits))
        return frames.recommendations(now, parts, names, now.library)

    def recommend_to_parquet(
        self,
        path: str | os.PathLike[str],
        users: object = None,
        n: int = 10,
        *,
        exclude_seen: bool = True,
        exclude: object = None,
        candidates: object = None,
        min_score: float | None = None,
    ) -> int:
        """Write what `recommend` returns to a Parquet file, in bounded memory.

        Parameters
        ----------
        path : str or path-like
            The file, which is replaced only after the new one is complete. Needs pyarrow.
        users, n, exclude_seen, exclude, candidates, min_score
            As in `recommend`.

        Returns
        -------
        int
            Number of rows.

        Raises
        ------
        ValueError
            As in `recommend`, and before the first user is ranked for ids that Parquet has no type
            for: tuples of several types, frozensets, fractions, complex numbers, IP addresses,
            paths, integers beyond 64 bits, and other objects.
        """
        now = self._state_
        at, names = self._users(now, users)
        limits = limits_of(now, names, exclude_seen, exclude, candidates, min_score)
        return frames.to_parquet(path, now, ranking.blocks(now, at, _count(n), limits), names)

    def recommend_for_history(
        self,
        history: Any,
        n: int = 10,
        *,
        exclude_seen: bool = True,
        exclude: object = None,
        candidates: object = None,
        min_score: float | None = None,
        user_features: object = None,
    ) -> Any:
        """Recommend items to somebody who is not in the data.

        Parameters
        ----------
        history : list of dict, list of items, or frame
            Events of one user. Keys are the names of the columns, or "item", "value", "timestamp"
            and "event". An event without a value counts 1. Without times, values
            do not decay.
        n, exclude_seen, exclude, candidates, min_score
            As in `recommend`; `exclude` and `candidates` are lists.
        user_features : mapping, or frame with one row, default=None
            For a recommender with user features: those of the user, by the names of their columns,
            such as ``{"city": "Bath"}``. Those that a mapping lacks say nothing.

        Returns
        -------
        frame with the columns item, rank, score, reason

        Warns
        -----
        DataWarning
            If events have unknown items; the message gives their number.
        """
        now, nobody = self._state_, pd.Series([], dtype=object)
        row = frames.row_of_history(now, history)
        known = features.of_one(now.encoders.get("user"), user_features, now.schema.user)
        limits = limits_of(now, nobody, exclude_seen, exclude, candidates, min_score)
        if limits.excluded_pairs is not None or limits.chosen_pairs is not None:
            raise TypeError("exclude and candidates must be lists of items: there is one user")
        found = ranking.ranked_row(now, row, _count(n), limits, known)
        return frames.recommendations(now, [found], None, now.library)

    def similar_items(self, items: object, n: int = 10) -> Any:
        """Find the items whose factors have the largest cosine similarity.

        Parameters
        ----------
        items : one id, or a list, array or Series of ids
        n : int, default=10
            Maximum number of results of an item.

        Returns
        -------
        frame with the columns item, similar_item, rank, score
            Without the item itself. The score is the cosine. Items of which the model has learnt
            nothing have no rows.

        Raises
        ------
        ValueError
            For unknown items.
        """
        return frames.neighbours(self._state_, "item", items, _count(n))

    def similar_users(self, users: object, n: int = 10) -> Any:
        """Find the users whose factors have the largest cosine similarity.

        Parameters
        ----------
        users : one id, or a list, array or Series of ids
        n : int, default=10
            Maximum number of results of a user.

        Returns
        -------
        frame with the columns user, similar_user, rank, score
            As in `similar_items`.

        Raises
        ------
        ValueError
            For unknown users.
        """
        return frames.neighbours(self._state_, "user", users, _count(n))

    def explain(self, user: object, item: object, n: int = 10) -> Any:
        """Split a user's score of an item into contributions of the user's own items.

        Parameters
        ----------
        user, item : id
            They must be known.
        n : int, default=10
            Maximum number of items, and of features of each side.

        Returns
        -------
        frame with the columns item, value, weight, contribution
            Sorted by contribution, largest first. `value` is the combined value of the user's
            events with the item, `weight` its weight in training, and `contribution` its part of
            the score. All contributions of liked items add up to the score from the user's exact
            factors.

            With features, the frame has the columns kind, item, feature, value, weight,
            contribution, and up to n rows of each kind. If n cuts off nothing, the contributions of
            the kinds "history" (the user's items) and "user feature" add up to the score. So do
            those of "item feature" and "item events", which is what the item's own events add.

        Raises
        ------
        ValueError
            For an unknown user or item.
        """
        return frames.explanation(self._state_, user, item, _count(n))

    @property
    def _state_(self) -> State:
        found: State | None = vars(self).get("_state")
        if found is None:
            raise NotFittedError(
                f"This {type(self).__name__} has no data yet. Call 'fit' before using it"
            )
        return found

    def _users(self, now: State, users: object) -> tuple[np.ndarray, pd.Series]:
        """Positions of users, and their ids as given."""
        if users is None:
            at = np.flatnonzero(now.history.lengths())
            return at, now.users.take(at).to_series(index=range(len(at)))
        unknown = choice(self, "unknown")
        series, _ = given_ids(users, "users")
        at = now.users.positions(series, "users")
        missing = np.flatnonzero(at < 0)
        if len(missing) and unknown == "error":
            raise ValueError(
                f"{len(missing)} of {len(at)} users have no history, such as "
                f"{series.iloc[missing[0]]!r:.60}: remove them, or set unknown to 'popular' or "
                "'drop'"
            )
        if len(missing) and unknown == "drop":
            return at[at >= 0], series[at >= 0].reset_index(drop=True)
        return at, series


def _count(n: Any) -> int:
    return arguments.result_count(n)
