"""A fitted model as one immutable value, and the one attribute of an estimator that holds it.

A method reads the `FittedModel` of an estimator once, at its start. A writer builds a new one and
publishes it by a single assignment. So a method sees one state even if other threads write. An
estimator's `__dict__` holds parameters and one `FittedModel`, so that it pickles, copies and
compares plainly.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from scipy import sparse

from tpu_als.engine.als import AlsState
from tpu_als.engine.data import Data
from tpu_als.serving.factor_table import FactorTable
from tpu_als.serving.features import FittedFeatures

SIDES = ("user", "item")
# The attributes to which users may assign a gramian and norms, as in implicit.
_ASSIGNED = {"user": ("_XtX", "_user_norms"), "item": ("_YtY", "_item_norms")}
_FIRST = threading.RLock()  # of writers whose estimators have no model yet


@dataclass(frozen=True, eq=False)
class FittedModel:
    """The fitted state of an estimator.

    Attributes
    ----------
    user, item : FactorTable
        The tables.
    assigned : tuple of {"user", "item"}
        Tables assigned since the last fit, from which the next fit starts.
    n_iter, history : int and dict of list, or None
        Of the last fit.
    n_features, feature_names : int and ndarray, or None
        scikit-learn's record of the columns.
    popularity : ndarray of int and shape (n_items,), or None
        For each item, the number of users with a positive entry in the matrix of the last fit.
    user_features, item_features : FittedFeatures or None
        Features of the rows of a side, if `fit` got any.
    origin : object
        An identity shared by models that differ only in folded-in rows, assigned gramians or
        assigned norms.
    lock : Lock
        A writer holds this lock while it assigns a model derived from this one to the estimator.
    """

    user: FactorTable = field(default_factory=FactorTable)
    item: FactorTable = field(default_factory=FactorTable)
    assigned: tuple[str, ...] = ()
    n_iter: int | None = None
    history: dict[str, list[float]] | None = None
    n_features: int | None = None
    feature_names: np.ndarray | None = None
    popularity: np.ndarray | None = None
    user_features: FittedFeatures | None = None
    item_features: FittedFeatures | None = None
    origin: object = field(default_factory=object)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __getstate__(self) -> dict[str, object]:
        names = set(self.__dataclass_fields__) - {"origin", "lock"}
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(FittedModel(**state)))

    @property
    def is_complete(self) -> bool:
        """Whether there are both tables."""
        return not (self.user.is_absent or self.item.is_absent)

    def require(self, estimator: object, *sides: str) -> Self:
        """Return the model; raise NotFittedError if a needed table is absent."""
        for side in sides or SIDES:
            if self.table(side).is_absent:
                from sklearn.exceptions import NotFittedError  # late: it takes a second

                raise NotFittedError(
                    f"This {type(estimator).__name__} has no {side} factors yet. Call 'fit', or "
                    f"assign '{side}_factors', before using it"
                )
        return self

    def table(self, side: str) -> FactorTable:
        """The table of a side."""
        return self.item if side == "item" else self.user

    def features(self, side: str) -> FittedFeatures | None:
        """The features of a side."""
        return self.item_features if side == "item" else self.user_features

    def tables_to_start_from(self, warm_start: bool) -> list[np.ndarray | None]:
        """User and item table that a fit starts from; None for a table to be drawn.

        Raises
        ------
        ValueError
            Where NaN or infinity was written into one.
        """
        given: list[np.ndarray | None] = []
        for side in SIDES:
            table, is_wanted = self.table(side), warm_start or side in self.assigned
            if is_wanted and not table.is_absent:
                table.require_finite()
            given.append(table.read() if is_wanted else None)
        return given

    def with_table(self, side: str, table: FactorTable) -> Self:
        """Replace a table, and what depends on it: derived values, and weights of features."""
        changes: dict[str, Any] = {side: table, "origin": object()}
        if not table.has_array_of(self.table(side)):
            changes[f"{side}_features"] = None
        if side == "item":
            changes.update(self._columns(None if table.is_absent else table.shape[0]))
            changes["popularity"] = None
        return replace(self, **changes)

    def with_rows(
        self,
        side: str,
        ids: np.ndarray,
        rows: np.ndarray,
        features: sparse.csr_matrix | None = None,
    ) -> Self:
        """Replace some rows of a table, and their features; ids past the end make it longer."""
        table, known = self.table(side).changed(ids, rows), self.features(side)
        changes: dict[str, Any] = {side: table}
        if known is not None and features is not None:
            changes[f"{side}_features"] = known.with_rows(ids, features)
        if side == "item":
            changes.update(self._columns(table.shape[0]))
            if self.popularity is not None:  # nobody liked the new items in the last fit
                n_new = table.shape[0] - len(self.popularity)
                if n_new:
                    changes["popularity"] = np.pad(self.popularity, (0, n_new))
        return replace(self, **changes)

    def frozen(self) -> Self:
        """The same model with read-only tables, for an owner that changes rows by `with_rows`."""
        return replace(self, user=self.user.frozen(), item=self.item.frozen())

    def with_values(self, side: str, **values: np.ndarray | None) -> Self:
        """Assign the gramian or the norms of a table."""
        table = self.table(side).with_given(_ASSIGNED[side], **values)
        changes: dict[str, Any] = {side: table}
        return replace(self, **changes)

    def trained(
        self, tables: dict[str, FactorTable], n_iter: int, history: dict[str, list[float]]
    ) -> Self:
        """The model after `n_iter` iterations of a fit."""
        return replace(
            self,
            user=tables["user"],
            item=tables["item"],
            assigned=(),
            n_iter=n_iter,
            history={name: list(values) for name, values in history.items()},
            user_features=None,
            item_features=None,
            origin=object(),
        )

    def settle(self) -> None:
        """Fetch tables that do not stay on the devices."""
        for side in SIDES:
            self.table(side).settle()

    def _columns(self, n_items: int | None) -> dict[str, Any]:
        if n_items == self.n_features:
            return {}
        return {"n_features": n_items, "feature_names": None}


class ModelHolder:
    """Base of the mixins of an estimator: holds its fitted model."""

    # A class attribute, because a scikit-learn constructor may set parameters only.
    _fitted: FittedModel = FittedModel()

    def _change(self, make: Callable[[FittedModel], FittedModel]) -> None:
        """Replace the fitted model by one made from it, under the writers' lock."""
        with self._writing():
            self._fitted = make(vars(self).get("_fitted") or FittedModel())

    def _publish(self, fitted: FittedModel | None) -> None:
        """Set the fitted model; None removes it."""
        with self._writing():
            if fitted is None:
                self.__dict__.pop("_fitted", None)
            else:
                self._fitted = fitted

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Scope of a writer; two of one estimator take turns, also where it has no model yet."""
        while True:
            lock = self._writers_lock()
            with lock:
                if lock is self._writers_lock():  # else another writer replaced a model in between
                    yield
                    return

    def _writers_lock(self) -> threading.RLock:
        """The lock of this estimator's models; where it has no model, one that all such share."""
        fitted = vars(self).get("_fitted")
        return _FIRST if fitted is None else fitted.lock


def tables_of(state: AlsState, data: Data) -> dict[str, FactorTable]:
    """Both tables of a training, left in the backend's form until they are read."""
    sides = {"user": (state.users, data.users), "item": (state.items, data.items)}
    return {
        name: FactorTable(unread=data.backend.table(table, side, data))
        for name, (table, side) in sides.items()
    }
