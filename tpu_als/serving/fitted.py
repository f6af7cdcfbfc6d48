"""A fitted model as one immutable value: both tables, and the values derived from them.

A method reads the `FittedModel` of an estimator once, at its start, and uses only that one.
A writer builds a new one and publishes it by a single assignment. So a method sees one state
even if other threads write, and derived values are stored with the table that they belong to.
"""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import numpy as np
from scipy import sparse

from tpu_als.engine.xla import fold_in, ranking, resident
from tpu_als.engine.xla.mesh import Workplace
from tpu_als.engine.xla.placing import AlsParams
from tpu_als.engine.xla.resident import Table
from tpu_als.engine.xla.solve import Objective
from tpu_als.validation import arguments

Kept = TypeVar("Kept")
SIDES = ("user", "item")
# The attributes to which users may assign a gramian and norms, as in implicit.
_ASSIGNED = {"user": ("_XtX", "_user_norms"), "item": ("_YtY", "_item_norms")}


class FactorTable:
    """One factor table, on the host or on the devices, with the values derived from it.

    Parameters
    ----------
    host : ndarray of shape (n, factors), optional
        The table. The caller may keep a reference and write to it.
    on_devices : Table, optional
        The table on the devices, as training left it. Reading the whole table fetches it.
    gramian, norms : ndarray, optional
        Assigned by the user, instead of the computed ones. They are checked when they are used.
    names : (str, str)
        The attributes that they were assigned to, for messages.
    """

    def __init__(
        self,
        host: np.ndarray | None = None,
        on_devices: Table | None = None,
        *,
        gramian: np.ndarray | None = None,
        norms: np.ndarray | None = None,
        names: tuple[str, str] = ("gramian", "norms"),
    ) -> None:
        self._host, self._on_devices = host, on_devices
        self.given_gramian, self.given_norms, self._names = gramian, norms, names
        self._exposed = host is not None
        self._stamp: int | None = None
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        given = {"gramian": self.given_gramian, "norms": self.given_norms, "names": self._names}
        return {"host": self.read(), **given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def is_absent(self) -> bool:
        """Whether there is no table yet."""
        return self._host is None and self._on_devices is None

    @property
    def resident(self) -> Table | None:
        """The table if it stays on the devices until the whole table is read; else None."""
        table = self._on_devices
        return table if table is not None and table.is_resident else None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and factors."""
        table: Any = self.resident
        return (table if table is not None else self.read()).shape

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the values."""
        table: Any = self.resident
        return np.dtype((table if table is not None else self.read()).dtype)

    def read(self) -> Any:
        """The whole table as an ndarray, or None. The first call fetches it from the devices."""
        if self._on_devices is not None:
            with self._lock:
                table = self._on_devices
                if table is not None:
                    self._host = table.fetch()
                    self._kept.clear()  # frees copies on the devices
                    self._on_devices = None
        return self._host

    def expose(self) -> np.ndarray | None:
        """Like `read`, for a caller who may write to the table, now or later."""
        self.read()
        with self._lock:
            self._exposed = True
            return self._host

    def settle(self) -> None:
        """Fetch the table, unless it stays on the devices."""
        if self.resident is None:
            self.read()

    def require_finite(self) -> None:
        """Raise ValueError where NaN or infinity was written into the table."""
        if self.resident is None:
            _require_finite(self.read(), None)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Copies of some rows. The ids must be in range; they are not checked."""
        table = self.resident
        if table is not None:
            return table.take(ids)
        found = self.read()[ids]
        if self._exposed:
            _require_finite(found, ids)
        return found

    def changed(self, ids: np.ndarray, rows: np.ndarray) -> FactorTable:
        """A copy with some rows replaced. Ids past the end add rows, with zeros in the gaps."""
        table = self.read()
        grown = np.zeros((max(len(table), ids.max(initial=-1) + 1), table.shape[1]), table.dtype)
        grown[: len(table)] = table
        grown[ids] = rows
        found = FactorTable(grown)
        found._exposed = False
        return found

    def given(self, names: tuple[str, str], **values: np.ndarray | None) -> FactorTable:
        """The same table with a gramian or norms assigned; None has them computed again."""
        values = {"gramian": self.given_gramian, "norms": self.given_norms, **values}
        with self._lock:
            found = FactorTable(self._host, self._on_devices, names=names, **values)
            found._exposed = self._exposed
        return found

    def gramian(self) -> np.ndarray:
        """Y^T Y (factors, factors), assigned or computed."""
        if self.given_gramian is not None:
            width = self.shape[1]
            return arguments.derived(self.given_gramian, self._names[0], (width, width))
        return self._derived("gramian", _gramian, Table.gramian)

    def norms(self) -> np.ndarray:
        """Euclidean lengths (n,) of the rows, assigned or computed; 1e-10 in place of 0."""
        if self.given_norms is not None:
            return arguments.derived(self.given_norms, self._names[1], self.shape[:1])
        return self._derived("norms", norms, lambda table: _divisible(table.norms()))

    def solve(
        self, rows: sparse.csr_matrix, objective: Objective, params: AlsParams, place: Workplace
    ) -> np.ndarray:
        """Solve equation (1) exactly for canonical rows (m, n) against this table: (m, factors).

        Rows that could not be solved have values that are not finite.
        """
        # Only an assigned gramian: the result must not depend on which calls came before.
        gramian = None if self.given_gramian is None else self.gramian()
        table = self.resident
        if table is not None and gramian is None:
            return table.solve(rows, objective)
        stamp = self.stamp()
        source = self._keep(
            "source",
            (stamp, place, params),
            lambda: fold_in.source(self.read(), params, place),
        )
        solved = fold_in.solve_rows(rows, source, objective, params, gramian=gramian)
        return solved.astype(self.read().dtype, copy=False)

    def catalog(self, lengths: np.ndarray | None, place: Workplace) -> ranking.Catalog:
        """The table on the devices, to rank its rows. A table that is still there is not copied."""
        table = self.resident
        name = "catalog" if lengths is None else "directions"

        def make() -> tuple[ranking.Catalog, np.ndarray | None]:
            if table is None:
                made = ranking.catalog(self.read(), place, lengths=lengths)
            else:
                made = ranking.catalog_of(table.shards, table.rows, table.place, lengths=lengths)
            return made, lengths

        # The cached pair keeps the lengths alive, so that no other array can get the same id().
        stamp = (self.stamp(), place) if table is None else None
        return self._keep(name, (stamp, id(lengths)), make)[0]

    def stamp(self) -> int:
        """Fingerprint of the content.

        As in implicit, users may write to `item_factors`, which makes a copy on a device stale. So
        the fingerprint is computed again as long as another reference to the array exists.

        Raises
        ------
        ValueError
            Where what was written is NaN or infinite.
        """
        self.read()
        if self._stamp is not None and not self._exposed:
            return self._stamp
        with self._lock:
            assert self._host is not None
            found = _fingerprint(self._host)
            if found != self._stamp:
                _require_finite(self._host, None)
            self._stamp = found
            if self._is_ours_alone():
                self._exposed = False
            return self._stamp

    def _is_ours_alone(self) -> bool:
        """Whether this object alone can write to the table: no view, and no other references."""
        held = vars(self)
        # The 2 are the dictionary's reference and the argument's. A local variable would add a
        # number that differs between versions of Python.
        return held["_host"].base is None and sys.getrefcount(held["_host"]) <= 2

    def _derived(
        self,
        name: str,
        on_host: Callable[[np.ndarray], np.ndarray],
        on_devices: Callable[[Table], np.ndarray],
    ) -> np.ndarray:
        table = self.resident
        if table is not None:
            return self._keep(name, None, lambda: on_devices(table))
        return self._keep(name, self.stamp(), lambda: on_host(self.read()))

    def _keep(self, name: str, stamp: Any, make: Callable[[], Kept]) -> Kept:
        """Return the cached value if `stamp` is unchanged, else compute it again."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != stamp:
            kept = self._kept[name] = (stamp, make())
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
    origin : object
        An identity shared by models that differ only in folded-in rows.
    lock : Lock
        A writer holds it while it replaces an estimator's model by one derived from it.
    """

    user: FactorTable = field(default_factory=FactorTable)
    item: FactorTable = field(default_factory=FactorTable)
    assigned: tuple[str, ...] = ()
    n_iter: int | None = None
    history: dict[str, list[float]] | None = None
    n_features: int | None = None
    feature_names: np.ndarray | None = None
    popularity: np.ndarray | None = None
    origin: object = field(default_factory=object)
    lock: Any = field(default_factory=threading.RLock)

    def __getstate__(self) -> dict[str, Any]:
        names = set(self.__dataclass_fields__) - {"origin", "lock"}
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(FittedModel(**state)))

    @property
    def is_complete(self) -> bool:
        """Whether there are both tables."""
        return not (self.user.is_absent or self.item.is_absent)

    def table(self, side: str) -> FactorTable:
        """The table of a side."""
        return self.item if side == "item" else self.user

    def with_table(self, side: str, table: FactorTable) -> Self:
        """Replace a table, and the values derived from it."""
        changes: dict[str, Any] = {side: table, "origin": object()}
        if side == "item":
            changes.update(self._columns(None if table.is_absent else table.shape[0]))
            changes["popularity"] = None
        return replace(self, **changes)

    def with_rows(self, side: str, ids: np.ndarray, rows: np.ndarray) -> Self:
        """Replace some rows of a table; ids past the end make it longer."""
        table = self.table(side).changed(ids, rows)
        changes: dict[str, Any] = {side: table}
        if side == "item":
            changes.update(self._columns(table.shape[0]))
            if self.popularity is not None:  # nobody liked the new items in the last fit
                n_new = table.shape[0] - len(self.popularity)
                changes["popularity"] = np.pad(self.popularity, (0, n_new))
        return replace(self, **changes)

    def with_values(self, side: str, **values: np.ndarray | None) -> Self:
        """Assign the gramian or the norms of a table."""
        changes: dict[str, Any] = {side: self.table(side).given(_ASSIGNED[side], **values)}
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
            origin=object(),
        )

    def settle(self) -> None:
        """Fetch tables that do not stay on the devices."""
        self.user.settle()
        self.item.settle()

    def _columns(self, n_items: int | None) -> dict[str, Any]:
        if n_items == self.n_features:
            return {}
        return {"n_features": n_items, "feature_names": None}


def tables_of(state: Any, data: Any) -> dict[str, FactorTable]:
    """Both tables of a training, left on the devices until they are read."""
    found = resident.tables(state, data)
    return {side: FactorTable(on_devices=table) for side, table in found.items()}


def norms(table: np.ndarray) -> np.ndarray:
    """Lengths (n,) of the rows of a table (n, K); 1e-10 instead of 0, to allow division."""
    return _divisible(np.linalg.norm(table, axis=-1))


def _divisible(lengths: np.ndarray) -> np.ndarray:
    return np.where(lengths == 0, lengths.dtype.type(1e-10), lengths)


def _gramian(table: np.ndarray) -> np.ndarray:
    return np.asarray(table.T @ table)


def _require_finite(rows: np.ndarray, ids: np.ndarray | None) -> None:
    """Raise ValueError where rows of a table, with these ids or in its order, are not finite."""
    row = arguments.first_not_finite(rows)
    if row is not None:
        raise ValueError(
            f"factors must be finite, but row {row if ids is None else ids[row]} holds NaN or "
            "infinity, which was written into the table: write finite values, or assign the table "
            "again"
        )


def _fingerprint(table: np.ndarray) -> int:
    # About as fast as a sum, but also detects flipped signs and permuted values.
    content = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
    return hash((table.shape, table.dtype.char, zlib.crc32(content.data)))
