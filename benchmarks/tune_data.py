"""Data sets of `tune.py`, each split into a train and a test part.

* "ml1m": MovieLens-1M, with a fifth of each user's entries held out at random.
* "groceries": a year of purchases of products that were bought ten times or more. The last fifth of
  the time is held out: a user's first purchases of a product are to be found.
* "planted": 6,000 x 4,000 with 600,000 ones, drawn by factors of 16 dimensions. All users have the
  same number of items, and no item is popular for other reasons. A fifth is held out at random.
* "drift": 800,000 events of 8,000 users and 6,000 items, with repeats. Few users and items have
  most events, items appear and lose their popularity, and users move to other groups of items. The
  last fifth of the time is held out, as in "groceries".
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from tpu_als.datasets import (
    interactions_from_frame,
    load_groceries,
    planted_features,
    split_by_time,
)
from tpu_als.evaluation import train_test_split

SIZES = {"planted": (6_000, 4_000, 600_000), "drift": (8_000, 6_000, 800_000)}
QUICK_SIZES = {"planted": (300, 200, 6_000), "drift": (400, 300, 10_000)}
_LEAST_PURCHASES = 10
_PERIODS, _GROUPS = 50, 25  # of "drift"


class Split(NamedTuple):
    """Train and test part, and times of the train part's entries, if there are any."""

    train: sparse.csr_matrix
    test: sparse.csr_matrix
    times: sparse.csr_matrix | None = None


def load(name: str, directory: Path | None, *, quick: bool = False) -> Split:
    """The data set of a name; `directory` has the files of MovieLens-1M."""
    if name == "ml1m" and directory is not None:
        return ml1m(directory)
    if name == "groceries":
        return groceries()
    sizes = (QUICK_SIZES if quick else SIZES)[name]
    return planted(*sizes) if name == "planted" else drift(*sizes)


def ml1m(directory: Path) -> Split:
    """MovieLens-1M."""
    train, test = (
        sparse.load_npz(directory / f"ml1m_rand80_{part}.npz").tocsr().astype(np.float32)
        for part in ("train", "test")
    )
    return Split(train, test)


def groceries() -> Split:
    """Purchases, split by time."""
    frame, _ = load_groceries()
    counts = frame["product_id"].value_counts()
    frame = frame[frame["product_id"].isin(counts.index[counts >= _LEAST_PURCHASES])]
    names = {"household_id": "user", "product_id": "item", "transaction_timestamp": "time"}
    return by_time(frame.rename(columns=names))


def planted(n_users: int, n_items: int, n_entries: int) -> Split:
    """Ones that are drawn by factors only."""
    matrix = planted_features(n_users, n_items, n_entries, explained=0.0, factors=16).matrix
    return Split(*train_test_split(matrix, random_state=0))


def drift(n_users: int, n_items: int, n_events: int) -> Split:
    """Counts of events whose items and tastes change, split by time."""
    return by_time(events_with_drift(n_users, n_items, n_events))


def by_time(frame: pd.DataFrame) -> Split:
    """Counts of the earlier events of the columns user, item and time, and later new pairs."""
    early, late = split_by_time(frame, "time", 0.2)
    train = interactions_from_frame(early, "user", "item")
    known = late["user"].isin(train.users) & late["item"].isin(train.items)
    maps = {"users": train.users, "items": train.items}
    later = interactions_from_frame(late[known], "user", "item", **maps).matrix
    new = later - later.multiply(train.matrix > 0)
    new.eliminate_zeros()
    first = early.groupby(["user", "item"])["time"].min()
    seconds = first.astype("datetime64[s]").astype("int64").to_numpy()
    places = (
        train.users.get_indexer(first.index.get_level_values(0)),
        train.items.get_indexer(first.index.get_level_values(1)),
    )
    times = sparse.csr_matrix((seconds.astype(float), places), shape=train.matrix.shape)
    return Split(train.matrix, new, times)


def events_with_drift(n_users: int, n_items: int, n_events: int) -> pd.DataFrame:
    """Events in order of time: 60% in the user's group of items, 20% anywhere, 20% repeats."""
    rng = np.random.default_rng(0)
    activity = rng.lognormal(0, 1.1, n_users)
    users = rng.choice(n_users, n_events, p=activity / activity.sum())
    periods = np.arange(n_events) * _PERIODS // n_events
    groups, moves = rng.integers(0, _GROUPS, (2, n_users)), rng.uniform(0, 2 * _PERIODS, n_users)
    own = groups[(periods >= moves[users]).astype(int), users]
    own[rng.random(n_events) < 0.25] = _GROUPS  # any item
    popularity = rng.permutation(np.arange(1, n_items + 1) ** -0.7)
    group_of, born = rng.integers(0, _GROUPS, n_items), rng.uniform(-0.5, 0.95, n_items) * _PERIODS
    life = rng.lognormal(0, 0.5, n_items) * _PERIODS / 2
    items = np.empty(n_events, np.int64)
    for period in range(_PERIODS):
        age = period - born
        weights = popularity * np.where(age >= 0, np.exp(-np.maximum(age, 0) / life), 0)
        for group in range(_GROUPS + 1):
            at = np.flatnonzero((periods == period) & (own == group))
            chances = weights * ((group_of == group) | (group == _GROUPS))
            chances = chances if chances.any() else weights
            items[at] = rng.choice(n_items, len(at), p=chances / chances.sum())
    order = np.argsort(users, kind="stable")
    firsts = np.searchsorted(users[order], users[order])  # of the same user
    n_before = np.arange(n_events) - firsts
    earlier = order[firsts + (rng.random(n_events) * n_before).astype(int)]
    is_repeat = rng.random(n_events) < 0.2
    items[order[is_repeat]] = items.copy()[earlier[is_repeat]]
    times = pd.Timestamp("2026-01-01") + pd.to_timedelta(np.arange(n_events), unit="min")
    return pd.DataFrame({"user": users, "item": items, "time": times})
