"""Tables of events: the matrices that a `Recommender` makes of them, and its final fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.base import clone

from tpu_als.datasets import split_by_time
from tpu_als.recommender import sources
from tpu_als.recommender.schema import schema_of
from tpu_als.tuning.split import Problem, of_parts, split
from tpu_als.validation.features import FeatureTable

if TYPE_CHECKING:
    from tpu_als.recommender import Recommender


def problem_of(
    events: Any, recommender: Recommender, fraction: float, rng: np.random.Generator
) -> tuple[Problem, sparse.csr_matrix]:
    """Split events by time if the recommender has timestamps, else hold out a part of each user's.

    Parameters
    ----------
    events : frame, path, or list of paths
        As in `Recommender.fit`.
    recommender : Recommender
        Its parameters say what the columns mean.
    fraction : float
        Fraction of the events to hold out.
    rng : Generator
        Draws entries and users.

    Returns
    -------
    problem : Problem
    everything : csr_matrix of shape (n_users, n_items)
        Values of all events.
    """
    schema = schema_of(recommender)
    everything, _, features = _values(events, recommender)
    if schema.timestamp is None:
        problem = split(everything, None, fraction, rng)
        return replace(problem, features=features), everything
    frame, _, _ = sources.read(events, schema.columns, [schema.user, schema.item])
    early, late = split_by_time(frame, schema.timestamp, fraction)
    train, known, features = _values(early, recommender)
    hidden = sparse.csr_matrix(train.shape, dtype=train.dtype)
    if len(late):
        found, names, _ = _values(late, recommender)
        hidden = _among(known, names, found)
    problem = of_parts(train, hidden, train.nnz / everything.nnz, fraction, rng)
    return replace(problem, features=features), everything


def fitted(
    recommender: Recommender,
    events: Any,
    weighting: Any,
    fit: Callable[..., object],
) -> Recommender:
    """Fit a recommender with another weighting, and with a function that fits the model.

    Parameters
    ----------
    recommender : Recommender
        It is cloned.
    events : frame, path, or list of paths
        As in `Recommender.fit`.
    weighting : transformer or None
        The weighting.
    fit : callable
        Takes the weighted matrix, and `user_features` and `item_features` where there are any, and
        returns a fitted model.
    """
    made = clone(recommender).set_params(weighting=weighting).fit_by(events, fit)
    return made.set_params(model=clone(made.model_))


def _values(
    events: Any, recommender: Recommender
) -> tuple[sparse.csr_matrix, tuple[pd.Index, pd.Index], dict[str, FeatureTable]]:
    """Combined values of events, the ids of users and items, and their features."""
    found: dict[str, FeatureTable] = {}

    def keep(matrix: sparse.csr_matrix, **features: FeatureTable) -> sparse.csr_matrix:
        found.update(features)
        return matrix

    read = clone(recommender).fit_by(events, keep)
    return read.model_, (read.users_, read.items_), found


def _among(
    known: tuple[pd.Index, pd.Index], names: tuple[pd.Index, pd.Index], late: sparse.csr_matrix
) -> sparse.csr_matrix:
    """Positive late values, at the places that known users and items have in the early matrix."""
    entries = late.tocoo()
    at = [
        index.get_indexer(others)[places]
        for index, others, places in zip(known, names, (entries.row, entries.col), strict=True)
    ]
    chosen = (at[0] >= 0) & (at[1] >= 0) & (entries.data > 0)
    values = entries.data[chosen], (at[0][chosen], at[1][chosen])
    return sparse.csr_matrix(values, shape=(len(known[0]), len(known[1])))
