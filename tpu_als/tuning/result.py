"""What a search returns: the model, all trials, and the settings as code."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator

from tpu_als import parameters
from tpu_als.pipelines import RecommenderPipeline
from tpu_als.tuning.trials import Trial

_FRAMES = ("item_features", "user_features")  # parameters without a text that makes them


@dataclass(frozen=True)
class TuneResult:
    """Result of `tpu_als.tune`.

    Attributes
    ----------
    estimator : TPUAlternatingLeastSquares, RecommenderPipeline or Recommender
        The best settings, fitted on all data: a Recommender for events. For a matrix, with a
        weighting, a RecommenderPipeline of the steps "weighting" and "model", which recommends
        from values without weighting.
    score : float
        The metric of the best trial on the held-out part, before the fit on all data. It is the
        best of many, so it is a little above what new data give.
    metric : str
        Name of the metric.
    k : int
        Length of the rankings.
    trials : pandas.DataFrame
        A row for each trial, in the order of the search: "rung", "objective", "weighting",
        "epsilon", the estimator's parameters on the part that was trained on, "factors",
        "iterations", "rows" (number of rows trained on), "score" (NaN if the fit failed),
        "seconds", and the numbers "balance" and "ridge" of docs/math.md.
    code : str
        A line of Python that makes the unfitted estimator. It uses the names
        `TPUAlternatingLeastSquares`, `RecommenderPipeline` and `Recommender` of `tpu_als`, and the
        classes of `tpu_als.weighting`.
    interrupted : bool
        Whether a KeyboardInterrupt ended the search or the final fit early.
    seconds : float
        Time of the search, with the fit on all data.
    """

    estimator: Any
    score: float
    metric: str
    k: int
    trials: pd.DataFrame = field(repr=False)
    code: str
    interrupted: bool
    seconds: float


def assembled(weighting: Any, model: Any) -> Any:
    """The model, behind its weighting if there is one.

    Parameters
    ----------
    weighting : transformer or None
        Fitted or not.
    model : TPUAlternatingLeastSquares
        Fitted or not.
    """
    if weighting is None:
        return model
    return RecommenderPipeline([("weighting", weighting), ("model", model)])


def code_of(estimator: Any) -> str:
    """A line of Python that makes the estimator, unfitted.

    Parameters
    ----------
    estimator : Recommender, RecommenderPipeline, or a step
        Parameters that are equal to their defaults are left out. A frame of features is written as
        a variable with the name of the parameter.
    """
    defaults = inspect.signature(type(estimator).__init__).parameters
    given = estimator.get_params(deep=False)
    if "dtype" in given:  # a class has no text that evaluates to it
        given["dtype"] = parameters.storage_dtype(given["dtype"])
        if given["dtype"] == "float32":
            del given["dtype"]
    changed = [
        f"{name}={name if name in _FRAMES else _text_of(given[name])}"
        for name in defaults
        if name in given and not _is_default(given[name], defaults[name].default)
    ]
    return f"{type(estimator).__name__}({', '.join(changed)})"


def frame_of(trials: list[Trial]) -> pd.DataFrame:
    """The frame of `TuneResult.trials`."""
    rows = [
        {
            "rung": trial.rung,
            "objective": trial.settings.objective,
            "weighting": trial.settings.weighting,
            "epsilon": trial.epsilon,
            "alpha": trial.parameters.get("alpha"),
            "regularization": trial.parameters.get("regularization"),
            "regularization_exponent": trial.settings.exponent,
            "unobserved_weight": trial.parameters.get("unobserved_weight", 1.0),
            **trial.size._asdict(),
            "rows": trial.n_rows,
            "score": trial.score,
            "seconds": trial.seconds,
            "balance": trial.settings.balance,
            "ridge": trial.settings.ridge,
        }
        for trial in trials
    ]
    return pd.DataFrame(rows)


def _is_default(value: object, default: object) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))


def _text_of(value: object) -> str:
    if isinstance(value, BaseEstimator):
        return code_of(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_text_of, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text_of, value))})"
    return repr(value.item() if isinstance(value, np.generic) else value)
