"""The attributes of the estimator that read and assign parts of its fitted model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from tpu_als import subclasses
from tpu_als.serving.factor_table import FactorTable, Kept
from tpu_als.serving.fitted import FittedModel, ModelHolder
from tpu_als.validation import tables


class Attributes(ModelHolder):
    """Properties of an estimator, with implicit's and scikit-learn's names."""

    devices: Any

    @property
    def user_factors(self) -> np.ndarray | None:
        """User table, ndarray of shape (n_users, factors); None before fit. Assignable."""
        return self._fitted.user.read()

    @user_factors.setter
    def user_factors(self, table: ArrayLike | None) -> None:
        self._assign("user", table)

    @property
    def item_factors(self) -> np.ndarray | None:
        """Item table, ndarray of shape (n_items, factors); None before fit. Assignable."""
        return self._fitted.item.read()

    @item_factors.setter
    def item_factors(self, table: ArrayLike | None) -> None:
        self._assign("item", table)

    @property
    def YtY(self) -> np.ndarray:
        """Gramian of the item table, ndarray of shape (factors, factors), no regularization."""
        return self._fitted.require(self, "item").item.gramian()

    @property
    def XtX(self) -> np.ndarray:
        """Gramian of the user table, ndarray of shape (factors, factors), no regularization."""
        return self._fitted.require(self, "user").user.gramian()

    @property
    def user_norms(self) -> np.ndarray:
        """Lengths of the user vectors, ndarray of shape (n_users,); 1e-10 in place of 0."""
        return self._fitted.require(self, "user").user.norms()

    @property
    def item_norms(self) -> np.ndarray:
        """Lengths of the item vectors, ndarray of shape (n_items,); 1e-10 in place of 0."""
        return self._fitted.require(self, "item").item.norms()

    # Assignable as in implicit; None means "compute".
    @property
    def _YtY(self) -> np.ndarray | None:
        return self._fitted.item.given.gramian

    @_YtY.setter
    def _YtY(self, gramian: np.ndarray | None) -> None:
        self._change(lambda fitted: fitted.with_values("item", gramian=gramian))

    @property
    def _XtX(self) -> np.ndarray | None:
        return self._fitted.user.given.gramian

    @_XtX.setter
    def _XtX(self, gramian: np.ndarray | None) -> None:
        self._change(lambda fitted: fitted.with_values("user", gramian=gramian))

    @property
    def _user_norms(self) -> np.ndarray | None:
        return self._fitted.user.given.norms

    @_user_norms.setter
    def _user_norms(self, norms: np.ndarray | None) -> None:
        self._change(lambda fitted: fitted.with_values("user", norms=norms))

    @property
    def _item_norms(self) -> np.ndarray | None:
        return self._fitted.item.given.norms

    @_item_norms.setter
    def _item_norms(self, norms: np.ndarray | None) -> None:
        self._change(lambda fitted: fitted.with_values("item", norms=norms))

    @property
    def n_iter_(self) -> int:
        """Number of iterations run."""
        return self._attribute("n_iter_", self._fitted.n_iter)

    @property
    def history_(self) -> dict[str, list[float]]:
        """The values measured in each iteration."""
        return self._attribute("history_", self._fitted.history)

    @property
    def item_popularity_(self) -> np.ndarray:
        """For each item, the number of users with a positive entry in the matrix of `fit`."""
        return self._attribute("item_popularity_", self._fitted.popularity)

    # scikit-learn's validation sets and deletes these two.
    @property
    def n_features_in_(self) -> int:
        """Number of items."""
        return self._attribute("n_features_in_", self._fitted.n_features)

    @n_features_in_.setter
    def n_features_in_(self, count: int) -> None:
        self._change(lambda fitted: replace(fitted, n_features=count))

    @property
    def feature_names_in_(self) -> np.ndarray:
        """Column names, if `fit` was given a DataFrame with string names."""
        return self._attribute("feature_names_in_", self._fitted.feature_names)

    @feature_names_in_.setter
    def feature_names_in_(self, names: np.ndarray) -> None:
        self._change(lambda fitted: replace(fitted, feature_names=names))

    @feature_names_in_.deleter
    def feature_names_in_(self) -> None:
        self._change(lambda fitted: replace(fitted, feature_names=None))

    def __sklearn_is_fitted__(self) -> bool:
        return self._fitted.is_complete

    def __getstate__(self) -> dict[str, object]:
        state = dict(super().__getstate__())  # type: ignore[call-overload]
        # Device handles cannot be pickled, and are valid in this process only. Keep their number.
        state["devices"] = _device_count(self.devices)
        return state

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        twin = copy.copy(self)
        memo[id(self)] = twin
        memo[id(self.devices)] = self.devices
        twin.__dict__.update(copy.deepcopy(twin.__dict__, memo))
        return twin

    def __sklearn_clone__(self) -> Self:
        # jax devices cannot be deep-copied, as scikit-learn's clone would.
        twin = copy.copy(self)
        twin.devices = None
        twin = super(Attributes, twin).__sklearn_clone__()  # type: ignore[misc]
        twin.devices = self.devices
        subclasses.copy_unnamed(self, twin)
        return twin

    def _attribute(self, name: str, value: Kept | None) -> Kept:
        """The value of an attribute that exists only after it has been set."""
        if value is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return value

    def _assign(self, side: str, table: ArrayLike | None) -> None:
        array = tables.factor_table(table, f"{side}_factors")

        def assigned(fitted: FittedModel) -> FittedModel:
            given = {*fitted.assigned, side} if array is not None else {*fitted.assigned} - {side}
            sides = tuple(side for side in ("user", "item") if side in given)
            return replace(fitted.with_table(side, FactorTable(array)), assigned=sides)

        self._change(assigned)


def _device_count(devices: Any) -> Any:
    if isinstance(devices, (list, tuple)):
        return len(devices)
    return devices.size if hasattr(devices, "axis_names") else devices
