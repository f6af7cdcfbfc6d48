"""The fitted tables of an estimator, and what is kept of them on devices.

An estimator's `__dict__` holds parameters and NumPy arrays only, so that it pickles, copies and
compares plainly. Device-resident things hang on it from outside, in a weak dictionary, and are
dropped as soon as the table they were made from changes.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from sklearn.exceptions import NotFittedError

from . import als, initial, mesh, parameters, placing, resident, validation
from .resident import Table

Kept = TypeVar("Kept")

_DERIVED = {"user": ("_XtX", "_user_norms"), "item": ("_YtY", "_item_norms")}
_FITTED = ("_user_factors", "_item_factors", "_assigned", "_YtY", "_XtX", "_user_norms")


@dataclass
class _Runtime:
    """What an estimator has on devices, or has computed of its tables.

    Attributes
    ----------
    pending : dict
        By side, a table on the devices that is newer than the estimator's.
    kept : dict
        By name, a stamp of what a value was made from, and the value.
    stamps : dict
        By side, a fingerprint of the table.
    exposed : set
        Sides whose array has been handed out, so that it may have been written into.
    """

    pending: dict[str, Table] = field(default_factory=dict)
    kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    stamps: dict[str, int] = field(default_factory=dict)
    exposed: set[str] = field(default_factory=set)


_RUNTIMES: WeakKeyDictionary[FactorTables, _Runtime] = WeakKeyDictionary()


class FactorTables:
    """Base of the estimator: both tables, and values derived of them."""

    # Class attributes, because a scikit-learn constructor may set parameters only.
    _user_factors: np.ndarray | None = None
    _item_factors: np.ndarray | None = None
    # Sides assigned since the last fit, from which the next fit starts.
    _assigned: tuple[str, ...] = ()
    # Assignable as in implicit; None means "compute". Computed values are not stored here.
    _YtY: np.ndarray | None = None
    _XtX: np.ndarray | None = None
    _user_norms: np.ndarray | None = None
    _item_norms: np.ndarray | None = None

    factors: int
    dtype: Any
    random_state: Any
    objective: str
    warm_start: bool
    n_iter_: int
    history_: dict[str, list[float]]
    devices: Any
    num_threads: int
    use_gpu: bool | None
    table_layout: str

    @property
    def user_factors(self) -> np.ndarray | None:
        """User table, ndarray of shape (n_users, factors); None before fit. Assignable."""
        return self._exposed("user")

    @user_factors.setter
    def user_factors(self, table: Any) -> None:
        self._assign("user", table)

    @property
    def item_factors(self) -> np.ndarray | None:
        """Item table, ndarray of shape (n_items, factors); None before fit. Assignable."""
        return self._exposed("item")

    @item_factors.setter
    def item_factors(self, table: Any) -> None:
        self._assign("item", table)

    @property
    def YtY(self) -> np.ndarray:
        """Gramian of the item table, ndarray of shape (factors, factors), no regularization."""
        return self._derived("_YtY", "item", _gramian, Table.gramian)

    @property
    def XtX(self) -> np.ndarray:
        """Gramian of the user table, ndarray of shape (factors, factors), no regularization."""
        return self._derived("_XtX", "user", _gramian, Table.gramian)

    @property
    def user_norms(self) -> np.ndarray:
        """Lengths of the user vectors, ndarray of shape (n_users,); 1e-10 in place of 0."""
        return self._derived("_user_norms", "user", norms, _norms_of)

    @property
    def item_norms(self) -> np.ndarray:
        """Lengths of the item vectors, ndarray of shape (n_items,); 1e-10 in place of 0."""
        return self._derived("_item_norms", "item", norms, _norms_of)

    def __sklearn_is_fitted__(self) -> bool:
        return all(
            self._resident(side) is not None or self._table(side) is not None
            for side in ("user", "item")
        )

    def __getstate__(self) -> dict[str, Any]:
        for side in ("user", "item"):
            self._table(side)
        state = dict(super().__getstate__())  # type: ignore[call-overload]
        # Device handles cannot be pickled and mean nothing elsewhere; their number does.
        state["devices"] = _device_count(self.devices)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(twin.__dict__, memo))
        twin.devices = self.devices
        return twin

    def __sklearn_clone__(self) -> Any:
        # jax devices cannot be deep-copied, as scikit-learn's clone would.
        twin = super(FactorTables, copy.copy(self)).__sklearn_clone__()  # type: ignore[misc]
        twin.devices = self.devices
        return twin

    def _runtime(self) -> _Runtime:
        return _RUNTIMES.setdefault(self, _Runtime())

    def _table(self, side: str) -> np.ndarray | None:
        """The current table of a side, fetched from the devices where a newer one is there."""
        runtime = _RUNTIMES.get(self)
        if runtime is not None and side in runtime.pending:
            setattr(self, f"_{side}_factors", runtime.pending[side].fetch())
            del runtime.pending[side]
            self._drop_kept(f"{side} ")
        return getattr(self, f"_{side}_factors")

    def _resident(self, side: str) -> Table | None:
        """The table of a side if it is to stay on the devices until somebody reads all of it."""
        runtime = _RUNTIMES.get(self)
        table = None if runtime is None else runtime.pending.get(side)
        return table if table is not None and table.is_resident else None

    def _shape(self, side: str) -> tuple[int, int]:
        """Rows and factors of a fitted table."""
        return (self._resident(side) or self._fitted_table(side)).shape

    def _rows(self, side: str, ids: np.ndarray) -> np.ndarray:
        """Some rows of a fitted table, a copy; the ids are known to be in range."""
        table = self._resident(side)
        return self._fitted_table(side)[ids] if table is None else table.take(ids)

    def _fitted_table(self, side: str) -> np.ndarray:
        table = self._table(side)
        if table is None:
            raise NotFittedError(
                f"This {type(self).__name__} has no {side} factors yet. Call 'fit', or assign "
                f"'{side}_factors', before using it"
            )
        return table

    def _exposed(self, side: str) -> np.ndarray | None:
        self._runtime().exposed.add(side)
        return self._table(side)

    def _assign(self, side: str, table: Any) -> None:
        self._store(side, validation.factor_table(table, f"{side}_factors"))
        self._runtime().exposed.add(side)
        self._assigned = tuple(s for s in ("user", "item") if s in (*self._assigned, side))

    def _store(self, side: str, table: np.ndarray | None) -> None:
        """Replace a table, and drop all that was derived from the old one."""
        self._forget(side)
        self._runtime().pending.pop(side, None)
        setattr(self, f"_{side}_factors", table)
        if side == "item":
            self._count_features(None if table is None else len(table))

    def _count_features(self, n_items: int | None) -> None:
        if n_items != getattr(self, "n_features_in_", None):
            self.__dict__.pop("feature_names_in_", None)
            self.__dict__.pop("n_features_in_", None)
            if n_items is not None:
                self.n_features_in_ = n_items

    def _forget(self, side: str) -> None:
        self._runtime().stamps.pop(side, None)
        self._drop_kept(f"{side} ")
        for name in _DERIVED[side]:
            self.__dict__.pop(name, None)

    def _drop_kept(self, prefix: str) -> None:
        kept = self._runtime().kept
        for name in [name for name in kept if name.startswith(prefix)]:
            del kept[name]

    def _publish(self, state: Any, data: Any) -> None:
        """Make the engine's tables the current ones, fetched only when somebody reads them."""
        for side, table in resident.tables(state, data).items():
            self._forget(side)
            self._runtime().pending[side] = table
        self.__dict__.pop("_assigned", None)

    def _settle(self) -> None:
        """Fetch what is pending, unless it is to stay on the devices."""
        for side in ("user", "item"):
            if self._resident(side) is None:
                self._table(side)

    def _fitted_state(self) -> tuple[dict[str, Any], dict[str, Table]]:
        """What a fit changes: attributes, and tables on the devices."""
        names = (*_FITTED, "_item_norms")
        attributes = {
            name: value
            for name, value in vars(self).items()
            if name in names or (name.endswith("_") and not name.startswith("_"))
        }
        return attributes, dict(self._runtime().pending)

    def _restore(self, state: tuple[dict[str, Any], dict[str, Table]]) -> None:
        """Return to a state that `_fitted_state` gave."""
        for side in ("user", "item"):
            self._forget(side)
        for name in self._fitted_state()[0]:
            del self.__dict__[name]
        attributes, pending = state
        self.__dict__.update(attributes)
        self._runtime().pending = dict(pending)

    @contextlib.contextmanager
    def _undone_on_error(self, before: tuple[dict[str, Any], dict[str, Table]]) -> Iterator[None]:
        """Return to the model before `fit` on an error, but keep what a Ctrl-C cuts short."""
        try:
            yield
        except BaseException as error:
            # Each fit begins a history of its own.
            begun = getattr(self, "history_", None) is not before[0].get("history_")
            if not (isinstance(error, KeyboardInterrupt) and begun and self.n_iter_ > 0):
                self._restore(before)
            raise

    def _start(self, data: placing.Data, on_devices: bool) -> als.AlsState:
        """Place tables to start from: assigned or, with `warm_start`, present ones; else drawn."""
        random_state, place, normal = self.random_state, data.place, self.objective == "ials"
        if len(place.processes) > 1 and not isinstance(random_state, Integral):
            # Chance must be the same in all processes.
            random_state = place.agree(parameters.random_seed(random_state))
        given = [
            self._table(side) if self.warm_start or side in self._assigned else None
            for side in ("user", "item")
        ]
        if on_devices and all(table is None for table in given):
            scale = initial.deviation(self.factors, normal)
            return als.draw(data, parameters.random_seed(random_state), scale, normal=normal)
        shapes = [(side.n_rows, int(self.factors)) for side in (data.users, data.items)]
        dtype = data.params.compute_dtype
        return als.start(data, *initial.tables(given, shapes, random_state, dtype, normal))

    def _stamp(self, side: str) -> int:
        """Fingerprint of a table's content.

        Users write into `item_factors`, as implicit lets them; a stale copy on a device would
        then answer. So the content is looked at again while somebody holds the array.
        """
        runtime = self._runtime()
        if side not in runtime.stamps or side in runtime.exposed:
            runtime.stamps[side] = _fingerprint(self._fitted_table(side))
            if self._is_ours_alone(side):
                runtime.exposed.discard(side)
        return runtime.stamps[side]

    def _is_ours_alone(self, side: str) -> bool:
        """Whether nobody else can write into a table: it is no view, and only we refer to it.

        For this to see, callers of `_stamp` must not hold the table themselves.
        """
        held, name = vars(self), f"_{side}_factors"
        # The dictionary's reference and the argument's, and no name's: what those count for differs
        # between versions of Python.
        return held[name].base is None and sys.getrefcount(held[name]) <= 2

    def _kept(self, name: str, stamp: Any, make: Callable[[], Kept]) -> Kept:
        """A value kept from an earlier call where `stamp` is still the same, else made anew."""
        runtime = self._runtime()
        held = runtime.kept.get(name)
        if held is None or held[0] != stamp:
            held = runtime.kept[name] = (stamp, make())
        return held[1]

    def _derived(
        self,
        name: str,
        side: str,
        on_host: Callable[[np.ndarray], np.ndarray],
        on_devices: Callable[[Table], np.ndarray],
    ) -> np.ndarray:
        assigned = getattr(self, name)
        if assigned is not None:
            n_rows, width = self._shape(side)
            shape = (n_rows,) if "norms" in name else (width, width)
            return validation.derived(assigned, name, shape)
        table = self._resident(side)
        if table is not None:
            return self._kept(f"{side} {name}", None, lambda: on_devices(table))
        return self._kept(name, self._stamp(side), lambda: on_host(self._fitted_table(side)))

    def _place(self) -> mesh.Workplace:
        """Where `fit` works: with several processes, together with the others."""
        parameters.check(self, parameters.PLACE)
        where = (self.devices, self.num_threads, self.use_gpu, self.table_layout)
        return self._kept("place", where, lambda: mesh.workplace(*where))

    def _own_place(self) -> mesh.Workplace:
        """Where tables on the host are worked with: on this process's devices alone."""
        return self._place().alone


def norms(table: np.ndarray) -> np.ndarray:
    """Lengths (n,) of the rows of a table (n, K); 1e-10 in place of 0, so that one may divide."""
    return _divisible(np.linalg.norm(table, axis=-1))


def _norms_of(table: Table) -> np.ndarray:
    return _divisible(table.norms())


def _divisible(lengths: np.ndarray) -> np.ndarray:
    return np.where(lengths == 0, lengths.dtype.type(1e-10), lengths)


def _gramian(table: np.ndarray) -> np.ndarray:
    return np.asarray(table.T @ table)


def _fingerprint(table: np.ndarray) -> int:
    # About as fast as a sum; unlike sums it also sees signs flipped and numbers changing places.
    content = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
    return hash((table.shape, table.dtype.char, zlib.crc32(content.data)))


def _device_count(devices: Any) -> Any:
    if isinstance(devices, (list, tuple)):
        return len(devices)
    return devices.size if hasattr(devices, "axis_names") else devices
