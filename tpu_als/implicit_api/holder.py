"""The fitted model of an estimator: one attribute, which every writer replaces whole.

An estimator's `__dict__` holds parameters and one `FittedModel`, so that it pickles, copies and
compares plainly. Every call takes that model once, at its start; every writer replaces it whole.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from tpu_als.serving.fitted import FittedModel

_FIRST = threading.RLock()  # of writers whose estimators have no model yet


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
