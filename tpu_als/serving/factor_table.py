"""One factor table, and the values derived from it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from scipy import sparse

from tpu_als.engine.backends import Backend, Catalog
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.data import AlsParams, KnownTable
from tpu_als.engine.objective import Objective
from tpu_als.serving import derived
from tpu_als.serving.carried import Carried, after_change
from tpu_als.serving.changed import FEW, ChangedTable, rows_of, with_rows
from tpu_als.serving.derived import Given
from tpu_als.validation import tables

Kept = TypeVar("Kept")
ONE_THREAD = CpuBackend(1)


class FactorTable:
    """One factor table, on the host or on the devices, with the values derived from it.

    Derived values are cached, as in implicit. They are computed again after a fit, after an
    assignment of the table, or if set to None. Writing into the array does not update them. The CPU
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
        The gramian in float64, updated from that of an earlier table; used if arrays are read-only.
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
        # A plain tuple: skops loads only types that its user names.
        return {"host": self.read(), "is_frozen": self._is_frozen, "given": tuple(self.given)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**{**state, "given": Given(*state["given"])})  # type: ignore[misc]

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
            return tables.derived(self.given.gramian, self.given.names[0], (self.shape[1],) * 2)
        table = self.resident
        compute = (lambda: derived.gramian(self.read())) if table is None else table.gramian
        return self._once("gramian", None, compute)

    def norms(self) -> np.ndarray:
        """Euclidean lengths (n,) of the rows, assigned or computed; 1e-10 in place of 0."""
        if self.given.norms is not None:
            return tables.derived(self.given.norms, self.given.names[1], self.shape[:1])
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


def _source_name(backend: Backend) -> str:
    """Name of the derived value that is the table placed by a backend of this kind."""
    return f"source for {type(backend).__name__}"
