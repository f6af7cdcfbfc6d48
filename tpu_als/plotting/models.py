"""The matrix model in an object that a display is given."""

from __future__ import annotations

from typing import Any


def model_in(estimator: Any) -> Any:
    """The model of a Recommender, the last step of a pipeline, or the object itself.

    Parameters
    ----------
    estimator : Recommender, RecommenderPipeline or model
        Fitted or not.
    """
    model = getattr(estimator, "model_", estimator)
    return model.steps[-1][1] if hasattr(model, "steps") else model
