"""Feature frames to numbers: one-hot categories and standardised numbers, or the caller's encoder.

A missing value, a category that `fit` has not seen, and an unknown row all say nothing: they are 0.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from tpu_als.datasets.columns import distinct_values, numbers_of, plain
from tpu_als.datasets.kinds import kind_of_values, shown
from tpu_als.validation.features import FeatureTable, rows_for

_KINDS = ("text", "booleans", "numbers")


class Column(NamedTuple):
    """A column of the feature frame of `fit`.

    Attributes
    ----------
    name : str
        Its name.
    kind : str
        The type of its values in words; "nothing" if all are missing.
    is_one_hot : bool
        Whether its values are categories; otherwise they are numbers.
    """

    name: str
    kind: str
    is_one_hot: bool


@dataclass(frozen=True, eq=False)
class Encoder:
    """A fitted encoder of the feature frames of a side.

    Attributes
    ----------
    columns : tuple of Column
        The columns of the frame of `fit`, in order.
    transformer : transformer or None
        None if it was the caller's and the recommender was loaded from a file.
    is_built_in : bool
        Whether it is the package's own.
    n_features : int
        Number of features that it makes.
    names : array of str, or None
        Their names in `fit`, if an encoder of the caller's gave any.
    """

    columns: tuple[Column, ...]
    transformer: Any = field(repr=False)
    is_built_in: bool
    n_features: int
    names: np.ndarray | None = None

    def encoded(self, frame: pd.DataFrame, name: str) -> FeatureTable:
        """Features (n, n_features) of a frame that has the columns of `fit`.

        Raises
        ------
        ValueError
            For a missing column, values of another type than in `fit`, and numbers that are not
            finite; if the caller's encoder makes other features than in `fit`.
        """
        lacking = [column.name for column in self.columns if column.name not in frame]
        if lacking:
            raise ValueError(
                f"{name} has no column {lacking[0]!r}, which the features of fit had: it has "
                f"{list(frame.columns)}"
            )
        frame = frame[[column.name for column in self.columns]]
        if self.is_built_in:
            return _encoded(self.transformer, self.columns, frame, name)
        if self.transformer is None:
            raise ValueError(
                f"{name} cannot be encoded: the encoder of fit is not one of this package, so the "
                "file does not have it. Fit again, or pickle the recommender instead of saving it"
            )
        table = _transformed(self.transformer, frame, name)
        what = f"the encoded {name}"
        rows_for(table, len(frame), self.names, self.n_features, what)
        return table


def fitted(frame: pd.DataFrame, own: Any, name: str) -> tuple[Encoder, FeatureTable]:
    """Fit an encoder to a frame of features, and encode the frame.

    Parameters
    ----------
    frame : DataFrame
        A row for each user or item, without ids.
    own : transformer or None
        The caller's encoder; it is cloned.
    name : str
        What the frame is called in messages.

    Raises
    ------
    TypeError
        For an encoder that is not a transformer.
    ValueError
        For columns that are neither text, numbers nor booleans, and if there are no features.
    """
    if own is not None:
        if not (hasattr(own, "fit") and hasattr(own, "transform")):
            raise TypeError(
                f"the encoder of {name} must be a transformer of scikit-learn's kind, such as a "
                f"ColumnTransformer, got {type(own).__name__}"
            )
        columns = tuple(Column(column, "", False) for column in frame)
        transformer = clone(own).fit(frame)
        table = _transformed(transformer, frame, name)
        return Encoder(columns, transformer, False, table.matrix.shape[1], table.names), table
    columns = tuple(_column(frame[column], name) for column in frame)
    if all(column.kind == "nothing" for column in columns):
        raise ValueError(f"{name} has no values: all of {list(frame.columns)} are missing")
    categories = {
        column.name: sorted(set(_texts(frame[column.name])) - {None})
        for column in columns
        if column.is_one_hot
    }
    transformer = built_in(columns, categories)
    transformer.fit(_prepared(columns, frame, name))
    table = _encoded(transformer, columns, frame, name)
    return Encoder(columns, transformer, True, table.matrix.shape[1]), table


def built_in(columns: tuple[Column, ...], categories: dict[str, list[str]]) -> ColumnTransformer:
    """The package's encoder, not fitted.

    Categories are passed, so that missing values are not a category but are ignored, as unknown
    ones are.
    """
    lists = [np.array(values, dtype=object) for values in categories.values()]
    one_hot = OneHotEncoder(categories=lists, handle_unknown="ignore")
    parts = [("categories", one_hot, list(categories)), ("numbers", StandardScaler(), [
        column.name for column in columns if column.kind == "numbers" and not column.is_one_hot
    ])]  # fmt: skip
    return ColumnTransformer(parts, sparse_threshold=1)


def parts_of(transformer: ColumnTransformer) -> tuple[dict[str, list[str]], Any]:
    """Categories of columns, and the scaler or None, of a fitted encoder of this package."""
    found = {name: (part, columns) for name, part, columns in transformer.transformers_}
    one_hot, columns = found["categories"]
    categories = {}
    if columns:
        lists = [values.tolist() for values in one_hot.categories_]
        categories = dict(zip(columns, lists, strict=True))
    scaler, columns = found["numbers"]
    return categories, scaler if columns else None


def restored(
    columns: tuple[Column, ...], categories: dict[str, list[str]], scales: np.ndarray
) -> Encoder:
    """An encoder with these categories, and means and standard deviations (2, n) of numbers."""
    transformer = built_in(columns, categories)
    # One row fits it: everything that is learnt is given.
    row = {c.name: [None if c.is_one_hot else 0.0] for c in columns if c.kind != "nothing"}
    transformer.fit(pd.DataFrame(row))
    scaler = parts_of(transformer)[1]
    n_numbers = 0
    if scaler is not None:
        n_numbers = scaler.n_features_in_
        if scales.shape != (2, n_numbers):
            raise ValueError(f"scales of shape {scales.shape}, expected {(2, n_numbers)}")
        scaler.mean_, scaler.scale_ = scales
        scaler.var_ = scaler.scale_**2
    n_features = sum(map(len, categories.values())) + n_numbers
    return Encoder(columns, transformer, True, n_features)


def _column(values: pd.Series, name: str) -> Column:
    """How the built-in encoder reads a column."""
    label = f"column {values.name!r} of {name}"
    kind = _kind(values, label)
    if kind not in (*_KINDS, "nothing"):
        first = values[values.notna().to_numpy()].iloc[0]
        raise ValueError(
            f"{label} holds {kind} (such as {shown(first)}), expected text, numbers or booleans: "
            "convert it, drop it, or pass an encoder of your own"
        )
    is_category = isinstance(values.dtype, pd.CategoricalDtype) or kind in ("text", "booleans")
    return Column(str(values.name), kind, is_category and kind != "nothing")


def _kind(values: pd.Series, label: str) -> str:
    """The type of values in words; missing ones do not count."""
    filled = _filled(values)
    return "nothing" if filled is None else kind_of_values(plain(filled), label)


def _filled(values: pd.Series) -> pd.Series | None:
    """The values, missing ones replaced by the first one, so that rows keep their numbers."""
    is_present = values.notna().to_numpy(bool)
    if not is_present.any():
        return None
    at = np.where(is_present, np.arange(len(values)), np.argmax(is_present))
    return values.take(at)


def _texts(values: pd.Series) -> np.ndarray:
    """Categories (n,) as text; None where missing."""
    codes, distinct = distinct_values(values)
    names = [_text(value) for value in distinct] + [None]
    return np.array(names, dtype=object)[codes]  # the code of missing values is -1


def _text(value: Any) -> str:
    """Equal numbers have the same text, whatever their type."""
    return (
        str(int(value))
        if isinstance(value, (float, np.floating)) and value % 1 == 0
        else str(value)
    )


def _prepared(columns: tuple[Column, ...], frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Categories as text, and numbers as float64; missing ones are None and NaN."""
    made: dict[str, np.ndarray] = {}
    for column in columns:
        values = frame[column.name]
        if column.kind == "nothing":
            continue
        kind = _kind(values, f"column {column.name!r} of {name}")
        if kind not in (column.kind, "nothing"):
            raise ValueError(
                f"column {column.name!r} of {name} holds {kind}, but held {column.kind} in fit: "
                "convert it"
            )
        made[column.name] = _texts(values) if column.is_one_hot else _numbers(values, name)
    return pd.DataFrame(made)


def _numbers(values: pd.Series, name: str) -> np.ndarray:
    filled = _filled(values)
    if filled is None:
        return np.full(len(values), np.nan)
    try:
        numbers = numbers_of(filled)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return np.where(values.isna(), np.nan, numbers)


def _encoded(
    transformer: ColumnTransformer, columns: tuple[Column, ...], frame: pd.DataFrame, name: str
) -> FeatureTable:
    """Features by the package's own encoder."""
    matrix = sparse.csr_matrix(transformer.transform(_prepared(columns, frame, name)))
    matrix.data[np.isnan(matrix.data)] = 0  # a missing number counts as the mean
    categories, scaler = parts_of(transformer)
    names = [f"{column}={value}" for column, values in categories.items() for value in values]
    names += [] if scaler is None else list(scaler.feature_names_in_)
    counts = Counter(names)
    twice = next((feature for feature, count in counts.items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"two columns of {name} make a feature {twice!r}: rename one of them")
    # Text that a file of the model cannot hold.
    names = [text.replace("\0", "\\0") for text in names]
    names = [text.encode("utf-8", "backslashreplace").decode() for text in names]
    return FeatureTable(matrix, names, _name=name)


def _transformed(transformer: Any, frame: pd.DataFrame, name: str) -> FeatureTable:
    """Features by the caller's encoder."""
    made, names = transformer.transform(frame), None
    if not hasattr(made, "columns") and hasattr(transformer, "get_feature_names_out"):
        with contextlib.suppress(AttributeError):  # a step of a pipeline may have no names
            names = transformer.get_feature_names_out()
    table = FeatureTable(made, names, _name=f"the encoded {name}")
    if table.matrix.shape[0] != len(frame):
        raise ValueError(
            f"the encoder of {name} must give a row for each of the {len(frame)} rows, got "
            f"{table.matrix.shape[0]}"
        )
    return table
