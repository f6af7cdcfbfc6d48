"""Alternating least squares for implicit feedback on one or many devices.

`Recommender` takes tables of events and returns tables of recommendations. The model in it,
`TPUAlternatingLeastSquares`, has the interface of ``implicit.als.AlternatingLeastSquares`` and is a
scikit-learn estimator. On a CPU it runs compiled loops, and JAX is not imported; on accelerators,
on several devices and in several processes it runs a sharded, jitted JAX engine.

Submodules are imported when they are first used: `baselines`, `compat`, `datasets`, `engine`,
`evaluation`, `exceptions`, `plotting`, `shards` and `weighting`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpu_als import (
        baselines,
        compat,
        datasets,
        engine,
        evaluation,
        exceptions,
        plotting,
        shards,
        weighting,
    )
    from tpu_als.engine.compilation_cache import enable_compilation_cache
    from tpu_als.estimator import TPUAlternatingLeastSquares
    from tpu_als.exceptions import DataWarning, ModelFileError, ModelFitError, ParameterWarning
    from tpu_als.pipelines import RecommenderPipeline
    from tpu_als.recommender import Recommender
    from tpu_als.served_model import ServedModel
    from tpu_als.tuning import TuneResult, tune
    from tpu_als.validation.features import FeatureTable

__version__ = "0.1.0"
__all__ = [
    "DataWarning",
    "FeatureTable",
    "ModelFileError",
    "ModelFitError",
    "ParameterWarning",
    "Recommender",
    "RecommenderPipeline",
    "ServedModel",
    "TPUAlternatingLeastSquares",
    "TuneResult",
    "__version__",
    "baselines",
    "compat",
    "datasets",
    "enable_compilation_cache",
    "engine",
    "evaluation",
    "exceptions",
    "plotting",
    "shards",
    "tune",
    "weighting",
]
_SUBMODULES = (
    "baselines", "compat", "datasets", "engine", "evaluation", "exceptions", "plotting", "shards",
    "weighting",
)  # fmt: skip
_HOME = {
    "FeatureTable": "tpu_als.validation.features",
    "Recommender": "tpu_als.recommender",
    "RecommenderPipeline": "tpu_als.pipelines",
    "ServedModel": "tpu_als.served_model",
    "TPUAlternatingLeastSquares": "tpu_als.estimator",
    "TuneResult": "tpu_als.tuning",
    "tune": "tpu_als.tuning",
    "enable_compilation_cache": "tpu_als.engine.compilation_cache",
    **dict.fromkeys(
        ("DataWarning", "ModelFileError", "ModelFitError", "ParameterWarning"),
        "tpu_als.exceptions",
    ),
}


def __getattr__(name: str) -> Any:
    """Import a submodule, or the module of a public name, when it is first used."""
    if name in _SUBMODULES:
        return importlib.import_module(f"tpu_als.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tpu_als' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
