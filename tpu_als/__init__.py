"""Alternating least squares for implicit feedback on one or many devices.

`TPUAlternatingLeastSquares` has the interface of ``implicit.als.AlternatingLeastSquares``, is a
scikit-learn estimator, and runs on a sharded, jitted JAX engine. Importing the package does not
initialise a JAX backend. The engine (`mesh`, `layout`, `als`, `ranking`) also works alone.
"""

from __future__ import annotations

from tpu_als.engine.xla.programs import enable_compilation_cache
from tpu_als.estimator import TPUAlternatingLeastSquares
from tpu_als.exceptions import DataWarning, ModelFileError, ModelFitError, ParameterWarning

__version__ = "0.1.0"
__all__ = [
    "DataWarning",
    "ModelFileError",
    "ModelFitError",
    "ParameterWarning",
    "TPUAlternatingLeastSquares",
    "__version__",
    "enable_compilation_cache",
]
