"""`Recommender`: events in, recommendations out, with the caller's own ids."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.base import BaseEstimator, clone
from sklearn.utils import metadata_routing

from tpu_als.estimator import TPUAlternatingLeastSquares
from tpu_als.evaluation import holdout
from tpu_als.recommender import (
    counting,
    features,
    first_update,
    frames,
    ranking,
    saving,
    sources,
    state,
)
from tpu_als.recommender.answering import Answering
from tpu_als.recommender.ids import whole_numbers
from tpu_als.recommender.schema import Schema, schema_of
from tpu_als.recommender.state import State


class Recommender(Answering, BaseEstimator):
    """Recommend items from a table of events, with one event per row.

    It maps ids, computes values and weights of events, stores each user's history, and applies
    updates. Answers are frames with the caller's ids. In scikit-learn's
    searches the samples are events: with ``cv=TimeSeriesSplit()`` and events in order of time,
    known users are scored on what they did later.

    Parameters
    ----------
    user, item : str, default="user" and "item"
        Columns of ids. Each must have one type: text, numbers, times, tuples or other types whose
        values can be hashed. `save` has a list of types.
    value : str, default=None
        Column of numbers, such as quantities. None counts each event as 1.
    timestamp : str, default=None
        Column of datetimes, ISO 8601 text or numbers. It is needed for `half_life`, and decides
        which event is the last with ``repeated="last"``.
    event : str, default=None
        Column of event types. The value of an event is multiplied by the weight of its type.
    event_weights : dict, default=None
        A factor for each event type, such as ``{"view": 1, "buy": 5, "dislike": -1}``. Events of
        types with the factor 0 are ignored. A negative value is a dislike.
    half_life : str, Timedelta or number, default=None
        Time in which the value of an event halves: a duration such as "30D", or for numeric times
        a number in their unit. An event at the latest time of the data of `fit` has its full value.
        Newer events of an `update` get more, so that the ratios of events stay right.
    repeated : {"sum", "last", "max"}, default="sum"
        How the values of a user's events with the same item are combined.
    weighting : transformer, default=None
        Turns combined values into the weights that the model is trained on, such as
        `tpu_als.weighting.LogWeighting`. Any transformer that keeps the stored entries of a sparse
        matrix. One that learns something of each item needs the method `with_items` of
        `tpu_als.weighting.BM25Weighting` for updates with new items. None trains on the values.
    model : estimator, default=None
        None is ``TPUAlternatingLeastSquares()``. It is cloned.
    unknown : {"popular", "drop", "error"}, default="popular"
        What users get who are neither in the events nor in `user_features`: the most popular items,
        nothing, or an error.
    item_features, user_features : DataFrame of pandas, polars or PyArrow, default=None
        One row for each item (user): a column of ids with the name in `item` (`user`), and columns
        of features. Rows may have ids without events. Text, categories and booleans are one-hot
        encoded, and numbers are standardised. Missing values, categories that `fit` has not seen,
        and ids without a row are 0, which has no effect; for numbers this is the mean.
    item_encoder, user_encoder : transformer, default=None
        Replaces that encoding: any transformer of scikit-learn's kind, such as a ColumnTransformer.
        It gets the frame without the ids, as a pandas frame, and is cloned.

    Attributes
    ----------
    users_, items_ : Index
        The ids, in the order of the model's tables: those of the events of `fit`, then those that
        only the features have. Updates add new ids at the end.
    model_ : estimator
        The fitted model. Its tables are read-only: change them by `update`.
    weighting_ : transformer or None
        The fitted transformer.
    n_features_in_ : int
        Number of columns that are read from events.

    Examples
    --------
    >>> import pandas as pd
    >>> from tpu_als import Recommender, TPUAlternatingLeastSquares
    >>> events = pd.DataFrame({
    ...     "customer": ["ann", "ann", "bob", "bob", "cat", "cat"],
    ...     "sku": ["tea", "milk", "tea", "jam", "jam", "bread"],
    ... })
    >>> model = TPUAlternatingLeastSquares(factors=2, random_state=0)
    >>> rec = Recommender(user="customer", item="sku", model=model).fit(events)
    >>> rec.recommend(["ann"], n=1)[["user", "item", "rank", "reason"]].values.tolist()
    [['ann', 'jam', 1, 'model']]
    """

    # The first argument of these methods is not called X.
    __metadata_request__fit = {"events": metadata_routing.UNUSED}  # noqa: RUF012
    __metadata_request__score = {"events": metadata_routing.UNUSED}  # noqa: RUF012

    def __init__(
        self,
        user: str = "user",
        item: str = "item",
        value: str | None = None,
        timestamp: str | None = None,
        event: str | None = None,
        *,
        event_weights: dict[Any, float] | None = None,
        half_life: Any = None,
        repeated: str = "sum",
        weighting: Any = None,
        model: Any = None,
        unknown: str = "popular",
        item_features: Any = None,
        user_features: Any = None,
        item_encoder: Any = None,
        user_encoder: Any = None,
    ) -> None:
        self.user = user
        self.item = item
        self.value = value
        self.timestamp = timestamp
        self.event = event
        self.event_weights = event_weights
        self.half_life = half_life
        self.repeated = repeated
        self.weighting = weighting
        self.model = model
        self.unknown = unknown
        self.item_features = item_features
        self.user_features = user_features
        self.item_encoder = item_encoder
        self.user_encoder = user_encoder

    def set_params(self, **params: Any) -> Self:
        """Set parameters; ``model__alpha`` and the like also work while `model` is None."""
        is_nested = any(name.startswith("model__") for name in params)
        if is_nested and "model" not in params and self.model is None:
            self.model = TPUAlternatingLeastSquares()
        super().set_params(**params)
        return self

    def fit(self, events: Any, y: object = None, show_progress: bool | None = None) -> Self:
        """Map the ids, combine and weight the events, and fit the model.

        Parameters
        ----------
        events : frame, path, or list of paths
            A DataFrame of pandas, polars or PyArrow, a DuckDB relation, or the path, directory or
            glob of CSV and Parquet files. Ids in CSV files are integers if each of them is written
            as one ("12", but not "012"), otherwise text. Parquet files need pyarrow.
        y : None
            Ignored.
        show_progress : bool, default=None
            Whether to show the progress of the model's fit; None follows its `verbose`.

        Returns
        -------
        self

        Raises
        ------
        TypeError
            For anything else, including a list of characters: scikit-learn's searches split a path
            into its characters. Pass them a frame.
        ValueError
            For parameters out of range, a missing column, a missing value (also in an id that is a
            tuple), ids of several types, or no events. The message has column, row and value. For
            features also: ids of another type than those of the events, repeated ids, and columns
            that the encoder does not take.

        Warns
        -----
        DataWarning
            If `save` will refuse the ids, because a file cannot hold their type. If none of the
            items (users) of the events has a row in the frame of features; if a loaded recommender
            was fitted with features, and has no frame now.
        """
        if not (self.model is None or isinstance(self.model, TPUAlternatingLeastSquares)):
            raise TypeError(
                "model must be a TPUAlternatingLeastSquares or None, got "
                f"{type(self.model).__name__}: use weighting= for transformers"
            )
        model = TPUAlternatingLeastSquares() if self.model is None else clone(self.model)

        def fit(weights: sparse.csr_matrix, **features: Any) -> Any:
            return model.fit(weights, show_progress=show_progress, **features)

        return self.fit_by(events, fit)

    def fit_by(self, events: Any, fit: Callable[..., object]) -> Self:
        """Fit with a function that makes the model; the parameter `model` is not used.

        Parameters
        ----------
        events : frame, path, or list of paths
            As in `fit`.
        fit : callable
            Takes the matrix of weights (n_users, n_items), and returns a fitted model. If there
            are features, it also gets a FeatureTable as `user_features` or `item_features`.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            As in `fit`.
        """
        if "_state" in vars(self):
            features.warn_if_absent(self, self._state.encoders)
        schema, step = schema_of(self), state.Steps()
        ids = [schema.user, schema.item]
        frame, library, is_text = sources.read(events, schema.columns, ids)
        frame = _with_whole_numbers(frame, ids) if is_text else frame
        checked = counting.checked(frame, schema)
        step.done("reading")
        if not len(checked.frame):
            raise ValueError(
                f"fit needs an event with a weight other than 0, got {len(frame)} events, none of "
                "them with one"
            )
        self._publish(state.fitted(self, schema, checked, library, fit))
        first_update.prepare(self._state)
        return self

    def update(
        self, events: Any = None, *, item_features: Any = None, user_features: Any = None
    ) -> Self:
        """Add new events without a new fit: new users and items, and changed rows.

        The factors of the users of these events are solved again, exactly. So are those of new
        items, and of items whose entries, changed or new since they were solved, are at least 1/20
        of their users. The answers of other users change only by these items. Fit again from time
        to time, as in a nightly job.

        Parameters
        ----------
        events : frame, path, or list of paths, default=None
            As in `fit`. They may be older than those of `fit`. None if there are only features.
        item_features, user_features : DataFrame, default=None
            Features of new items (users), with or without events; features of known ones are
            replaced. `fit` must have got features of this side. The encoder and the vectors of the
            features do not change. Neither do the parameters of the recommender: for the next
            `fit`, set them to frames with all rows.

        Returns
        -------
        self
            Threads that read during an update see the old or the new state, never a mix.

        Raises
        ------
        TypeError, ValueError
            As in `fit`. The recommender stays as it was.
        """
        given = {"user": user_features, "item": item_features}
        has_features = any(frame is not None for frame in given.values())
        if events is None and not has_features:
            raise ValueError("update needs events or features, got none of them")
        with self._state_.lock:
            now = self._state_
            checked = counting.no_events(now.schema)
            if events is not None:
                checked = counting.checked(self._read(events, now.schema, now), now.schema)
            counting.check_times(checked, now.schema, now.clock)
            if len(checked.frame) or has_features:
                self._publish(state.updated(now, checked, given, _solved))
        return self

    def score(self, events: Any, y: object = None) -> float:
        """Mean NDCG@10 of later events among the items that a user has not had.

        Parameters
        ----------
        events : frame, path, or list of paths
            As in `fit`. An item is relevant if its value is positive and it is not in the user's
            history. Relevant items that the model does not know count as not found. Users without a
            history do not count.
        y : None
            Ignored.

        Returns
        -------
        float
            Between 0 and 1. NaN if there are no relevant items. If no event has a known user, an
            UndefinedMetricWarning says so. Events that have exactly the users' items of the
            history, as those of `fit`, are the train part of a search: then all items are ranked,
            and those of the history with a positive value are relevant. This measures the
            fit to the training data, not the quality of recommendations.
        """
        now = self._state_
        checked = counting.checked(self._read(events, now.schema, now), now.schema)
        counting.check_times(checked, now.schema, now.clock)
        wanted = frames.relevant(now, checked)
        if not len(wanted.users):
            return float("nan")
        ids = np.full((len(wanted.users), holdout.CUTOFF), -1, np.int64)
        limits = ranking.Limits(excludes_seen=wanted.are_new)
        for found in ranking.blocks(now, wanted.users, holdout.CUTOFF, limits):
            ids[found.queries, found.ranks - 1] = found.items
        hits = holdout.hits_of(ids, wanted.items)
        return float(np.mean(holdout.ndcg_of_hits(hits, wanted.counts)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ids, history, weighting, parameters and model to one file, without pickle.

        Parameters
        ----------
        path : str or path-like
            An existing file is replaced only after the new one is complete.

        Raises
        ------
        ValueError
            If a parameter is out of range, if event types are not text or numbers, if the model or
            the weighting is not of this package, or if a file cannot hold the ids. It can hold
            text, numbers (also Decimal, Fraction and complex), bytes, UUIDs, dates, times, times
            of day, time spans, pandas Periods and Intervals, IP addresses and networks, paths, and
            tuples and frozensets of them.

        Warns
        -----
        DataWarning
            If there is an encoder of your own, which a file cannot hold. The recommender that is
            loaded answers as before, but cannot encode other features.
        """
        saving.save(path, self, self._state_)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by `save`. Nothing is unpickled.

        The file has the encoded features, and not the frames: set `item_features` and
        `user_features` again before the next `fit`.

        Parameters
        ----------
        path : str or path-like
            The file.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ModelFileError
            If it is damaged, is not the file of a recommender, or has a later format.
        """
        parameters, found = saving.load(path)
        made = cls(**parameters)
        made._publish(found)
        first_update.prepare(made._state)
        return made

    @property
    def users_(self) -> pd.Index:
        """Ids of the users, in the order of the model's table."""
        return self._state_.users.index

    @property
    def items_(self) -> pd.Index:
        """Ids of the items, in the order of the model's table."""
        return self._state_.items.index

    @property
    def model_(self) -> Any:
        """The fitted model."""
        return self._state_.model

    @property
    def weighting_(self) -> Any:
        """The fitted transformer of values to weights, or None."""
        return self._state_.weighting

    def __sklearn_is_fitted__(self) -> bool:
        return "_state" in vars(self)

    def _publish(self, found: State) -> None:
        if isinstance(found.model, TPUAlternatingLeastSquares):
            found.model._fitted = found.model._fitted.frozen()
        self._state = found
        self.n_features_in_ = len(found.schema.columns)

    def _read(self, events: Any, schema: Schema, now: State) -> pd.DataFrame:
        """Events after `fit`, whose ids must have the types of those of `fit`."""
        kinds = {schema.user: now.users.kind, schema.item: now.items.kind}
        frame, _, is_text = sources.read(events, schema.columns, list(kinds))
        numbers = [name for name, kind in kinds.items() if kind == "numbers"]
        return _with_whole_numbers(frame, numbers) if is_text else frame


def _with_whole_numbers(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Convert columns of ids that were read as text to integers, where all of them are."""
    found = {name: whole_numbers(frame[name]) for name in names if name in frame}
    return frame.assign(**found)


def _solved(model: Any, side: str, ids: np.ndarray, matrix: Any) -> Any:
    """A copy of the model with some rows of a side solved; the model stays as it is."""
    twin = copy.copy(model)
    getattr(twin, f"partial_fit_{side}s")(ids, matrix)
    return twin
