"""The trials of a search, and values of its parameters as keys and texts."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd

_DESCRIBES = ("rung", "rows", "seconds")  # columns of a TuneResult that are no parameters
SCORE = "score"


class Trials(NamedTuple):
    """The trials that have a score.

    Attributes
    ----------
    frame : DataFrame
        One row for each: the parameters, of any type, and "score".
    best : int
        The row that the search chose, or the one with the best score.
    parameters : list of str
        Columns that are parameters.
    """

    frame: pd.DataFrame
    best: int
    parameters: list[str]


def trials_of(search: Any) -> Trials:
    """The trials of a search of scikit-learn, a TuneResult, or a frame.

    Of a search by halving, only those with the last amount of the resource, because scores of
    different amounts cannot be compared. A parameter that a candidate does not set has the value of
    the search's estimator.
    """
    chosen: int | None = None
    others: tuple[str, ...] = ()
    if isinstance(search, pd.DataFrame):
        found = search.astype(object)
    elif hasattr(search, "cv_results_"):
        found, chosen = _of_scikit_learn(search)
    elif isinstance(getattr(search, "trials", None), pd.DataFrame):
        found, others = search.trials.astype(object), _DESCRIBES
    else:
        raise TypeError(
            "expected a fitted search with cv_results_, a TuneResult or a DataFrame, got "
            f"{type(search).__name__}" + (": call fit" if hasattr(search, "fit") else "")
        )
    if SCORE not in found.columns:
        raise ValueError(f"the frame has columns {list(found.columns)}, and no column score")
    scores = found[SCORE].astype(float)
    is_known = np.isfinite(scores.to_numpy())
    if not is_known.any():
        raise ValueError("no trial of the search has a score: all fits failed")
    if chosen is None or not is_known[chosen]:
        chosen = int(np.nanargmax(np.where(is_known, scores, np.nan)))
    names = [str(name) for name in found.columns if name not in (*others, SCORE)]
    known = found.assign(**{SCORE: scores})[is_known].reset_index(drop=True)
    return Trials(known, int(is_known[:chosen].sum()), names)


def _of_scikit_learn(search: Any) -> tuple[pd.DataFrame, int | None]:
    """Parameters and scores, and the row of the candidate that was refitted."""
    results = search.cv_results_
    refit = getattr(search, "refit", None)
    name = f"mean_test_{refit if isinstance(refit, str) else 'score'}"
    if name not in results:
        metrics = sorted(key[10:] for key in results if key.startswith("mean_test_"))
        raise ValueError(
            f"a search with the metrics {metrics}, and refit={refit!r} names none of them: pass a "
            "DataFrame of its parameters with the column score"
        )
    params = list(results["params"])
    columns = list(dict.fromkeys(key for candidate in params for key in candidate))
    given = search.estimator.get_params()
    found = pd.DataFrame(
        {key: _objects([p.get(key, given.get(key)) for p in params]) for key in columns}
    ).assign(score=np.asarray(results[name], dtype=float))
    best = getattr(search, "best_index_", None)
    if "iter" not in results:
        return found, best
    is_last = np.asarray(results["iter"]) == np.max(results["iter"])
    resource = getattr(search, "resource", None)
    is_kept = is_last if best is None or is_last[best] else np.ones(len(found), dtype=bool)
    place = None if best is None else int(is_kept[:best].sum())
    return found[is_kept].drop(columns=[resource], errors="ignore").reset_index(drop=True), place


def _objects(values: list[Any]) -> pd.Series:
    """A column that keeps None, and does not look into arrays."""
    column = pd.Series([None] * len(values), dtype=object)
    for at, value in enumerate(values):
        column.iat[at] = value
    return column


def column_of(given: str, names: list[str]) -> str:
    """The parameter with this name, or the only one that ends with it."""
    found = [name for name in names if name == given]
    found = found or [name for name in names if short(name) == given]
    if len(found) != 1:
        raise ValueError(f"{given!r} is not one of the parameters {names}")
    return found[0]


def short(name: str) -> str:
    """The name without the steps of a pipeline."""
    return str(name).rpartition("__")[2]


def is_number(value: Any) -> bool:
    """Whether a value is a real number, and neither a bool nor NaN."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))
    return is_real and not np.isnan(float(value))


def key_of(value: Any) -> Any:
    """A hashable value that is equal for equal parameters; NaN counts as None."""
    if is_number(value):
        return ("number", float(value))
    if value is None or isinstance(value, float):
        return None
    if isinstance(value, (str, bool, np.bool_)):
        return (type(value).__name__, value)
    return ("object", joblib.hash(value))


def values_of(column: pd.Series) -> list[Any]:
    """Distinct values: numbers ascending, then others in the order in which they first occur."""
    found = list({key_of(value): value for value in column}.values())
    others = [value for value in found if not is_number(value)]
    return sorted(filter(is_number, found)) + others


def texts_of(values: list[Any]) -> list[str]:
    """Texts of some values: distinct for distinct numbers."""
    numeric = {float(value) for value in values if is_number(value)}
    digits = 4
    while len({f"{value:.{digits}g}" for value in numeric}) < len(numeric):
        digits += 1

    def text(value: Any) -> str:
        if is_number(value):
            is_whole = float(value).is_integer() and abs(value) < 1e6
            return str(int(value)) if is_whole else f"{value:.{digits}g}"
        return str(None) if key_of(value) is None else str(value)

    return [text(value) for value in values]
