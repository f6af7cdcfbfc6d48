"""Feature frames of users and items: their ids, and the rows of features that the model gets."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from tpu_als.datasets.columns import columns_of
from tpu_als.datasets.kinds import shown
from tpu_als.recommender import encoders, sources
from tpu_als.recommender.encoders import Encoder
from tpu_als.recommender.ids import IdMap
from tpu_als.recommender.warn import warn
from tpu_als.serving.features import FittedFeatures
from tpu_als.validation.features import FeatureTable

log = logging.getLogger("tpu_als")

SIDES = ("user", "item")


class Side(NamedTuple):
    """The features of a side at `fit`.

    Attributes
    ----------
    ids : IdMap
        Ids of the events, then those that only the frame has.
    encoder : Encoder or None
        None without a frame.
    table : FeatureTable or None
        Features (n, n_features) of all ids. Ids without a row in the frame have zeros.
    """

    ids: IdMap
    encoder: Encoder | None = None
    table: FeatureTable | None = None


class Rows(NamedTuple):
    """Features of some ids.

    Attributes
    ----------
    at : int64 array (m,)
        Positions of the ids.
    matrix : csr_matrix (m, n_features)
        Their features.
    """

    at: np.ndarray
    matrix: sparse.csr_matrix


def at_fit(recommender: Any, side: str, column: str, ids: IdMap) -> Side:
    """Read and encode the feature frame of a side, and add its ids.

    Parameters
    ----------
    recommender : Recommender
        Has the frame and the encoder.
    side : {"user", "item"}
        The side.
    column : str
        The column of ids.
    ids : IdMap
        Ids of the events.

    Raises
    ------
    TypeError, ValueError
        As `Recommender.fit`.
    """
    name = f"{side}_features"
    given, own = getattr(recommender, name), getattr(recommender, f"{side}_encoder")
    if given is None:
        if own is not None:
            raise ValueError(f"{side}_encoder needs {name}, got None")
        return Side(ids)
    series, frame = _read(given, column, name)
    grown, at = _grown(ids, series, name)
    encoder, table = encoders.fitted(frame, own, name)
    n_known, total = np.count_nonzero(at < len(ids)), len(ids)
    if n_known < total:
        message = f"{total - n_known} of {total} {side}s with events have no row in {name}"
        if not n_known:
            warn(f"{message}, so features have no effect")
        else:
            log.info("%s: their features are 0", message)
    spread = _spread(Rows(at, table.matrix), len(grown))
    return Side(IdMap(grown.index, kind=grown.kind), encoder, FeatureTable(spread, table.names))


def at_update(
    encoder: Encoder | None, given: object, side: str, column: str, ids: IdMap
) -> tuple[IdMap, Rows | None]:
    """Read and encode new rows of features; return the ids with new ones, and the rows.

    Raises
    ------
    TypeError, ValueError
        As `Recommender.update`.
    """
    name = f"{side}_features"
    if given is None:
        return ids, None
    if encoder is None:
        raise ValueError(
            f"{name} was given, but the recommender was fitted without: set the parameter {name}, "
            "and fit again"
        )
    series, frame = _read(given, column, name)
    grown, at = _grown(ids, series, name)
    return grown, Rows(at, encoder.encoded(frame, name).matrix)


def of_one(encoder: Encoder | None, given: Any, column: str) -> sparse.csr_matrix | None:
    """Features (1, n_features) of a user who is not in the data; zeros if nothing is given.

    Parameters
    ----------
    encoder : Encoder or None
        That of user features; without it the result is None.
    given : mapping, or frame with one row, or None
        The features. Those that a mapping lacks are missing values.
    column : str
        The column of user ids, which is ignored.

    Raises
    ------
    TypeError, ValueError
        For other types, several rows, unknown keys, and if there are no user features.
    """
    if encoder is None:
        if given is not None:
            raise ValueError(
                "user_features was given, but the recommender was fitted without: set the "
                "parameter user_features, and fit again"
            )
        return None
    if given is None:
        return sparse.csr_matrix((1, encoder.n_features))
    names = [one.name for one in encoder.columns]
    if isinstance(given, Mapping):
        unknown = sorted(map(str, set(given) - {*names, column}))
        if unknown:
            raise ValueError(
                f"user_features has {unknown}, which is not among those of fit: {names}"
            )
        frame = pd.DataFrame({name: [given.get(name)] for name in names})
    else:
        frame = _as_pandas(given, column, "user_features")
    if len(frame) != 1:
        raise ValueError(f"user_features must be the features of one user, got {len(frame)} rows")
    return encoder.encoded(frame.reset_index(drop=True), "user_features").matrix


def of_model(model: Any, side: str) -> FittedFeatures | None:
    """The features of a side of a fitted model."""
    fitted = getattr(model, "_fitted", None)
    return None if fitted is None else fitted.features(side)


def carried(model: Any, side: str, n_rows: int, new: Rows | None) -> Any:
    """The model with the features of more rows: given ones, and zeros for other new ids.

    Parameters
    ----------
    model : estimator
        It stays as it is.
    side : {"user", "item"}
        The side.
    n_rows : int
        Number of ids.
    new : Rows or None
        Features that are new, or changed.
    """
    known = of_model(model, side)
    if known is None:
        return model
    ids, width = np.arange(known.rows.shape[0], n_rows), known.rows.shape[1]
    rows = sparse.csr_matrix((len(ids), width))
    if new is not None:
        ids = np.append(ids, new.at)
        rows = sparse.vstack([rows, new.matrix], format="csr")
    if not len(ids):
        return model
    twin = copy.copy(model)
    changed: dict[str, Any] = {f"{side}_features": known.with_rows(ids, rows)}
    twin._fitted = replace(model._fitted, **changed)
    return twin


def warn_if_absent(recommender: Any, before: Mapping[str, Encoder]) -> None:
    """Warn that features of the last fit are not used by the next one, as after `load`."""
    for side in before:
        name = f"{side}_features"
        if getattr(recommender, name) is None:
            warn(
                f"the last fit used {name}, but this parameter is None now, as load does not "
                f"restore it: this fit uses no features. Call set_params({name}=frame) before fit",
            )
        elif before[side].transformer is None and getattr(recommender, f"{side}_encoder") is None:
            warn(
                f"the last fit used a {side}_encoder, which load does not restore: this fit uses "
                f"the package's own encoding. Call set_params({side}_encoder=encoder) before fit",
            )


def without_anything(model: Any, has_events: np.ndarray) -> np.ndarray:
    """Items, by position, that have neither events (has_events, (N,)) nor features."""
    known = of_model(model, "item")
    if known is None or has_events.all():
        return np.empty(0, np.int64)
    return np.flatnonzero(~has_events & (np.diff(known.rows.indptr) == 0))


def _read(given: Any, column: str, name: str) -> tuple[pd.Series, pd.DataFrame]:
    """Ids and features of a frame, with a default index."""
    frame = _as_pandas(given, column, name).reset_index(drop=True)
    try:
        (ids,) = columns_of(frame, [column])
    except ValueError as error:
        advice = ""
        if isinstance(given, pd.DataFrame) and column in given.index.names:
            advice = f". It is in the index: pass {name}.reset_index()"
        raise ValueError(f"{name}: {error}{advice}") from None
    features = frame.drop(columns=column)
    if not len(frame) or not len(features.columns):
        raise ValueError(
            f"{name} must have rows, and columns beside {column!r}, got shape {frame.shape}"
        )
    return ids, features


def _as_pandas(given: Any, column: str, name: str) -> pd.DataFrame:
    frame, library = given, "pandas"
    if not isinstance(given, pd.DataFrame):
        try:
            frame, library, _ = sources.read(given, sources.names_of(given), [column])
        except TypeError:
            library = ""
    if library in ("", "duckdb"):  # scikit-learn's clone cannot copy a relation
        raise TypeError(
            f"{name} must be a DataFrame of pandas, polars or PyArrow, got "
            f"{type(given).__name__}: convert or read it first"
        )
    wrong = [column for column in frame.columns if not isinstance(column, str)]
    if wrong or not frame.columns.is_unique:
        raise ValueError(
            f"{name} must have columns with text as names, each once, got {list(frame.columns)}"
        )
    return frame


def _grown(ids: IdMap, column: pd.Series, name: str) -> tuple[IdMap, np.ndarray]:
    """Add the ids of a frame; ValueError if one repeats."""
    grown, at = ids.grown(column, f"column {column.name!r} of {name}")
    is_again = pd.Series(at).duplicated().to_numpy()
    if is_again.any():
        raise ValueError(
            f"{name} must have one row for each id, got {shown(column.iloc[np.argmax(is_again)])} "
            f"more than once ({np.count_nonzero(is_again)} repeated rows): drop the others"
        )
    return grown, at


def _spread(rows: Rows, n_rows: int) -> sparse.csr_matrix:
    """Rows at their positions in a matrix (n_rows, n_features), with zeros elsewhere."""
    ones = np.ones(len(rows.at)), (rows.at, np.arange(len(rows.at)))
    return sparse.csr_matrix(ones, shape=(n_rows, len(rows.at))) @ rows.matrix
