"""A saved model for a service: implicit's methods, without scikit-learn and JAX."""

from __future__ import annotations

import os
from typing import Any, BinaryIO, Self

from tpu_als import parameters
from tpu_als.implicit_api.attributes import Attributes
from tpu_als.implicit_api.new_rows import NewRows
from tpu_als.implicit_api.ranking import Ranking
from tpu_als.implicit_api.saving import fitted_model
from tpu_als.implicit_api.side_features import SideFeatures
from tpu_als.storage import model_file

__all__ = ["ServedModel"]
# The estimator's defaults, for parameters that a file of implicit may lack.
_DEFAULTS: dict[str, Any] = {
    "regularization": 0.01,
    "alpha": 1.0,
    "objective": "implicit",
    "unobserved_weight": 1.0,
    "cg_steps": 3,
    "num_threads": 0,
    "table_layout": "auto",
    "use_native": True,
    "use_cg": True,
    "feature_regularization": 1.0,
    "feature_weight": 1.0,
}


class ServedModel(Ranking, NewRows, SideFeatures, Attributes):
    """A model read from a file, for recommendations and fold-in.

    It has the methods of `TPUAlternatingLeastSquares` that implicit has too, except `fit` and
    `save`. The estimator's parameters are attributes. A process that loads a `ServedModel` starts
    in a third of the time and with half the memory, because scikit-learn is not imported. numba is
    imported by the first call that folds in, or that ranks for many users.

    Examples
    --------
    >>> import os, tempfile
    >>> from scipy.sparse import csr_matrix
    >>> from tpu_als import ServedModel, TPUAlternatingLeastSquares
    >>> plays = csr_matrix([[3, 1, 0, 0], [1, 4, 1, 0], [0, 0, 2, 5]])
    >>> model = TPUAlternatingLeastSquares(factors=2, alpha=10, random_state=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.npz")
    ...     model.fit(plays, show_progress=False).save(path)
    ...     served = ServedModel.load(path)
    >>> served.recommend(0, plays[0], N=2)[0].tolist()
    [2, 3]
    """

    def __init__(self) -> None:
        vars(self).update({**dict.fromkeys(parameters.RULES), **_DEFAULTS})

    @classmethod
    def load(cls, fileobj_or_path: str | os.PathLike | BinaryIO) -> Self:
        """Read a model written by the estimator's `save` or by implicit's.

        Parameters
        ----------
        fileobj_or_path : str, path or binary file object
            The ".npz" of a path is optional.

        Raises
        ------
        FileNotFoundError, IsADirectoryError
            If there is no such file.
        ModelFileError
            As `TPUAlternatingLeastSquares.load`.
        """
        found, fitted = model_file.load_model(fileobj_or_path, parameters.RULES, {})
        model = cls()
        vars(model).update(found)
        if fitted:
            model._fitted = fitted_model(fitted)
        return model

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))


def __dir__() -> list[str]:
    return sorted(__all__)
