"""A fitted model as one immutable value: both tables, and the values derived from them.

A method reads the `FittedModel` of an estimator once, at its start. A writer builds a new one and
publishes it by a single assignment. So a method sees one state even if other threads write.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import numpy as np
from scipy import sparse

from tpu_als.engine.als import AlsState
from tpu_als.engine.backends import Backend, Catalog
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.data import AlsParams, Data, KnownTable
from tpu_als.engine.objective import Objective
from tpu_als.serving import derived
from tpu_als.serving.carried import Carried, after_change
from tpu_als.serving.changed import FEW, ChangedTable, rows_of, with_rows
from tpu_als.serving.derived import Given
from tpu_als.serving.features import FittedFeatures
from tpu_als.validation import arguments

Kept = TypeVar("Kept")
SIDES = ("user", "item")
ONE_THREAD = CpuBackend(1)
# The attributes to which users may assign a gramian and norms, as in implicit.
_ASSIGNED = {"user": ("_XtX", "_user_norms"), "item": ("_YtY", "_item_norms")}


class FactorTable:
    """One factor table, on the host or on the devices, with the values derived from it.

    As in implicit, derived values are computed once, and again after the table is fitted or
    assigned or the value is set to None, but not after someone has written into the array. The CPU
    backend ranks and solves with the array itself. The XLA backend uses a copy on JAX's devices,
    which is a derived value.

    Parameters
    ----------
    host : ndarray of shape (n, factors), optional
        The table. The caller may keep a reference and write to it.
    unread : engine table or ChangedTable, optional
        The table in a backend's form, as training left it, or with a few changed rows. Reading the
        whole table fetches it.
    given : Given
        Derived values that the user assigned. They are checked when they are used.
    is_frozen : bool, default=False
        Whether the arrays are read-only, so that derived values cannot be out of date.
    carried : Carried, optional
        The gramian in float64, from that of an earlier table; kept if nobody can write into it.
    """

    def __init__(
        self,
        host: np.ndarray | None = None,
        unread: Any = None,
        given: Given = Given(),  # noqa: B008 - immutable
        *,
        is_frozen: bool = False,
        carried: Carried | None = None,
    ) -> None:
        self._host, self._unread, self._is_frozen = host, unread, is_frozen
        self._carried = carried if is_frozen else None
        if host is not None and is_frozen:
            host.flags.writeable = False
        self.given = given
        self._derived: dict[str, tuple[Any, Any]] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, object]:
        return {"host": self.read(), "is_frozen": self._is_frozen, "given": self.given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def is_absent(self) -> bool:
        """Whether there is no table yet."""
        return self._host is None and self._unread is None

    @property
    def resident(self) -> Any:
        """The table if it stays on the devices until the whole table is read; else None."""
        table = self._unread
        return table if table is not None and table.is_resident else None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and factors."""
        return self._form().shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the values."""
        return np.dtype(self._form().dtype)

    def _form(self) -> Any:
        """The table as it is, if its rows can be read so; else as an ndarray."""
        table = self._unread
        if table is None:
            return self._host
        is_readable = isinstance(table, ChangedTable) or (table is not None and table.is_resident)
        return table if is_readable else self.read()

    def read(self) -> Any:
        """The whole table as an ndarray, or None. The first call fetches it from the devices."""
        if self._unread is not None:
            with self._lock:
                table = self._unread
                if table is not None:
                    self._host = table.fetch()
                    self._host.flags.writeable = not self._is_frozen
                    self._derived.clear()  # frees copies on the devices
                    self._unread = None
        return self._host

    def has_array_of(self, other: FactorTable) -> bool:
        """Whether the table is the same array as another, as after an assignment of itself."""
        return self._host is not None and self._host is other._host

    def settle(self) -> None:
        """Fetch the table, unless it stays on the devices."""
        if self.resident is None:
            self.read()

    def require_finite(self) -> None:
        """Raise ValueError where NaN or infinity was written into the table."""
        if self.resident is None:
            derived.require_finite(self.read())

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Copies of some rows. The ids must be in range; they are not checked."""
        table = self._form()
        if isinstance(table, np.ndarray):
            found = table.take(ids, 0)
        elif isinstance(table, ChangedTable):
            found = table.take(ids) if len(ids) <= FEW else self.read()[ids]
        else:
            return table.take(ids)
        derived.require_finite(found, ids)
        return found

    def changed(self, ids: np.ndarray, rows: np.ndarray) -> FactorTable:
        """A copy with some rows replaced. Ids past the end add rows, with zeros in the gaps."""
        table = self._form()
        if not isinstance(table, ChangedTable):
            table = self.read()
        made = with_rows(table, ids, rows)
        host, unread = (made, None) if isinstance(made, np.ndarray) else (None, made)
        if not self._is_frozen:
            return FactorTable(host, unread)
        carried = self._carried_to(table, ids, rows.astype(table.dtype, copy=False))
        return FactorTable(host, unread, is_frozen=True, carried=carried)

    def frozen(self) -> FactorTable:
        """The same table with read-only arrays."""
        made = FactorTable(self._host, self._unread, self.given, is_frozen=True)
        return self if self._is_frozen else made

    def _carried_to(self, table: Any, ids: np.ndarray, rows: np.ndarray) -> Carried | None:
        """The gramian in float64 after a change of some rows, if it is known before."""
        known = self._carried
        source = self._derived.get(_source_name(ONE_THREAD), (None, None))[1]
        if source is not None and source.known_gramian is not None:
            known = known or Carried(source.known_gramian, np.zeros(table.shape[1]))
        if known is None:
            return None
        last, at = np.unique(ids[::-1], return_index=True)  # the last row of an id is kept
        return after_change(known, len(table), rows_of(table, last), rows[::-1][at])

    def with_given(self, names: tuple[str, str], **values: np.ndarray | None) -> FactorTable:
        """The same table with a gramian or norms assigned; None has them computed again."""
        with self._lock:
            return FactorTable(self._host, self._unread, self.given._replace(names=names, **values))

    def gramian(self) -> np.ndarray:
        """Y^T Y (factors, factors), assigned or computed."""
        if self.given.gramian is not None:
            return arguments.derived(self.given.gramian, self.given.names[0], (self.shape[1],) * 2)
        table = self.resident
        compute = (lambda: derived.gramian(self.read())) if table is None else table.gramian
        return self._once("gramian", None, compute)

    def norms(self) -> np.ndarray:
        """Euclidean lengths (n,) of the rows, assigned or computed; 1e-10 in place of 0."""
        if self.given.norms is not None:
            return arguments.derived(self.given.norms, self.given.names[1], self.shape[:1])
        table = self.resident
        if table is not None:
            return self._once("norms", None, lambda: derived.divisible(table.norms()))
        return self._once("norms", None, lambda: derived.norms(self.read()))

    def solve(
        self,
        rows: sparse.csr_matrix,
        objective: Objective,
        params: AlsParams,
        backend: Backend,
        prior: np.ndarray | None = None,
    ) -> np.ndarray:
        """Solve equation (1) exactly for canonical rows (m, n) against this table: (m, factors).

        The ridge is centred on `prior` (m, factors), by default on zero. Rows without entries are
        zero; `fold_in.solve` replaces them by the prior. Rows that could not be solved have values
        that are not finite.
        """
        table = self.resident
        if table is not None and self.given.gramian is None:
            return table.solve(rows, objective, prior)
        table, known = self._unread, self._known()
        if backend.accepts_part and known is not None and isinstance(table, ChangedTable):
            needed = table.needed(rows)
            if needed is not None:
                source = backend.source(needed[0], params, known)
                return source.solve(needed[1], objective, prior=prior)
        name, stamp = _source_name(backend), (params, backend.placement)
        source = self._once(name, stamp, lambda: backend.source(self.read(), params, known))
        gram = self.gramian() if source.wants_gramian or self.given.gramian is not None else None
        solved = backend.shared(source).solve(rows, objective, gram=gram, prior=prior)
        return solved.astype(self.dtype, copy=False)

    def _known(self) -> KnownTable | None:
        if self._carried is None or self.given.gramian is not None:
            return None
        return KnownTable(self._carried.gram, self.shape[0])

    def catalog(self, backend: Backend, *, cosine: bool) -> Catalog:
        """The table in a backend's form, to rank its rows by product or by cosine."""
        # Calls for few and for many queries alternate, on a CPU with one and with more threads.
        kind = "one thread" if backend is ONE_THREAD else type(backend).__name__
        name = f"{'directions' if cosine else 'catalog'} for {kind}"
        stamp = backend if self._unread is None or self.resident is None else None
        return self._once(name, stamp, lambda: self._catalog(backend, cosine))

    def _catalog(self, backend: Backend, cosine: bool) -> Catalog:
        lengths, table = self.norms() if cosine else None, self.resident
        found: Catalog = (
            backend.catalog(self.read(), lengths) if table is None else table.catalog(lengths)
        )
        return found

    def _once(self, name: str, stamp: object, make: Callable[[], Kept]) -> Kept:
        """Return a derived value; compute it in the first call, or if `stamp` has changed."""
        kept = self._derived.get(name)
        if kept is None or (kept[0] is not stamp and kept[0] != stamp):
            kept = self._derived[name] = (stamp, make())
        return kept[1]


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


def tables_of(state: AlsState, data: Data) -> dict[str, FactorTable]:
    """Both tables of a training, left in the backend's form until they are read."""
    sides = {"user": (state.users, data.users), "item": (state.items, data.items)}
    return {
        name: FactorTable(unread=data.backend.table(table, side, data))
        for name, (table, side) in sides.items()
    }


def _source_name(backend: Backend) -> str:
    """Name of the derived value that is the table placed by a backend of this kind."""
    return f"source for {type(backend).__name__}"
