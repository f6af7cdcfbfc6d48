"""Methods that save and load models, and move them to a GPU."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any, BinaryIO, Self

from tpu_als import parameters, subclasses
from tpu_als.serving.factor_table import FactorTable
from tpu_als.serving.features import FittedFeatures
from tpu_als.serving.fitted import SIDES, FittedModel, ModelHolder
from tpu_als.storage import feature_keys, model_file


class Saving(ModelHolder):
    """implicit's `save`, `load` and `to_gpu`."""

    use_gpu: bool | None

    def save(self, fileobj_or_path: str | os.PathLike | BinaryIO) -> None:
        """Write the model to an .npz file that implicit can load as well.

        Parameters
        ----------
        fileobj_or_path : str, path or binary file object
            ".npz" is appended to a path without it. An existing file is replaced only after the new
            one is complete, and keeps its mode. Symbolic links are followed.

        Raises
        ------
        ValueError
            For parameters out of range, tables that do not go with `factors`, and tables that hold
            NaN or infinity. An earlier file stays as it was.

        Notes
        -----
        The file keeps the parameters, the tables, the public attributes of a fit, and the features
        of users and items. Earlier versions cannot read a file with features. It keeps a
        subclass's own parameters if they are arrays, numbers or text, or lists, dicts and tuples of
        them. It does not keep `checkpoint_dir`, because a file should not choose a path that the
        next fit writes to. One DataWarning names everything else that is not kept (random
        generators, device handles, further attributes). Another one is given if a table is missing.
        """
        parameters.check(self)
        subclasses.warn_if_unfitted(self)
        fitted = self._fitted
        values = {
            "user_factors": fitted.user.read(),
            "item_factors": fitted.item.read(),
            "n_iter_": fitted.n_iter,
            "history_": fitted.history,
            "feature_names_in_": fitted.feature_names,
            "item_popularity_": fitted.popularity,
            "assigned": fitted.assigned,
        }
        for side in SIDES:
            known = fitted.features(side)
            if known is not None:
                values.update(feature_keys.packed(side, known.weights, known.rows, known.names))
        ours = {name: getattr(self, name) for name in parameters.RULES}
        own = subclasses.own_values(self)
        lost = model_file.save_model(fileobj_or_path, ours, values, own)
        subclasses.warn_of_lost(self, lost)

    @classmethod
    def load(cls, fileobj_or_path: str | os.PathLike | BinaryIO) -> Self:
        """Read a model written by `save` or by implicit's `save`. Nothing is unpickled.

        Parameters
        ----------
        fileobj_or_path : str, path or binary file object
            The ".npz" of a path is optional.

        Raises
        ------
        FileNotFoundError, IsADirectoryError
            If there is no such file.
        ModelFileError
            A subclass of ValueError. If the file is damaged, is not a model, expands too much or
            has a later format, or if its values contradict each other.
        """
        own_names = subclasses.own_parameters(cls)
        found, fitted = model_file.load_model(fileobj_or_path, parameters.RULES, own_names)
        own = {name: found.pop(name) for name in own_names if name in found}
        model = subclasses.construct(cls, found, own)
        if not fitted:
            return model
        model._fitted = fitted_model(fitted)
        return model

    def to_gpu(self) -> Self:
        """Return a copy whose next computation requires a GPU."""
        twin = copy.deepcopy(self)
        twin.use_gpu = True
        return twin


def fitted_model(values: dict[str, Any]) -> FittedModel:
    """The fitted model of the values that `model_file.load_model` returns."""
    loaded = FittedModel(n_iter=values.get("n_iter_"), history=values.get("history_"))
    for side in SIDES:
        loaded = loaded.with_table(side, FactorTable(values.get(f"{side}_factors")))
    features: dict[str, Any] = {
        f"{side}_features": FittedFeatures(*parts)
        for side, parts in values.get("features", {}).items()
    }
    return replace(
        loaded,
        **features,
        feature_names=values.get("feature_names_in_"),
        popularity=values.get("item_popularity_"),
        assigned=values.get("assigned", ()),
    )
