"""Read a checkpoint, and verify its content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from jax import Array
from jax.sharding import Sharding

from tpu_als.engine import digests
from tpu_als.engine.als import AlsState
from tpu_als.engine.xla import relayout, table_checksums
from tpu_als.engine.xla.data import XlaData, XlaSide
from tpu_als.engine.xla.mesh import DeviceMesh, Shards, precision
from tpu_als.training import orbax_io

if TYPE_CHECKING:
    from etils import epath
    from orbax.checkpoint import CheckpointManager

FORMAT = 2
SIDES = ("users", "items")
_Found = TypeVar("_Found")


class Saved(NamedTuple):
    """What a checkpoint holds.

    Attributes
    ----------
    state : AlsState
        Both tables, in the slots of the data. They are read in the background while they are saved,
        so their buffers must not be donated.
    iteration : int
        Number of iterations run.
    history : dict of list of float
        The values that the iterations reported.
    extra : dict of ndarray
        Other arrays; the same in every process.
    """

    state: AlsState
    iteration: int
    history: dict[str, list[float]]
    extra: Mapping[str, Any] = MappingProxyType({})


class DamagedError(Exception):
    """A checkpoint cannot be read, or its content differs from what was saved."""


class LaterFormatError(Exception):
    """A later version of this package wrote the checkpoint."""


class Reader:
    """Reads the checkpoints of one run.

    Parameters
    ----------
    manager : orbax.checkpoint.CheckpointManager
        A manager for this process alone (`orbax_io.reader`).
    folder : epath.Path
        The run's folder.
    data : Data
        The data of the training that resumes.
    """

    def __init__(self, manager: CheckpointManager, folder: epath.Path, data: XlaData) -> None:
        self._manager, self._folder, self._data = manager, folder, data
        self._orbax = orbax_io.load()

    def read(self, step: int) -> Saved:
        """Read and verify the checkpoint of an iteration.

        Raises
        ------
        DamagedError
            In all processes, if one of them cannot read its part, or a checksum differs.
        LaterFormatError
            If a later version wrote it.
        """
        mesh, folder = self._data.mesh, self._folder / str(step)
        meta = _in_all_processes(lambda: self._meta(step), folder / "meta", mesh)
        tables = []
        for name in SIDES:
            with precision(self._data.params.dtype):
                tables.append(self._table(step, name, meta, folder / name))
        extra = _in_all_processes(lambda: self._extra(step, meta["extra"]), folder / "extra", mesh)
        return Saved(AlsState(*tables), step, meta["history"], extra)

    def _meta(self, step: int) -> dict[str, Any]:
        args = self._orbax.args
        meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
        found = meta["format"]
        if not isinstance(found, int) or found < FORMAT:
            raise DamagedError(f"its format is {found!r}, expected {FORMAT}")
        if found > FORMAT:
            raise LaterFormatError(
                f"the checkpoint {self._folder / str(step)} has format {found}, but this version "
                f"reads formats up to {FORMAT}: it was written by a later tpu_als; upgrade to read "
                "it"
            )
        if meta["checksum"] != digests.fields(meta):
            raise DamagedError("its content does not have the checksum that it was saved with")
        if (meta["run"], meta["iteration"]) != (self._folder.name, step):
            raise DamagedError(f"it is of iteration {meta['iteration']} of the run {meta['run']}")
        return meta

    def _table(self, step: int, name: str, meta: dict[str, Any], path: epath.Path) -> Shards:
        """Read a table into the slots of the data."""
        side: XlaSide = getattr(self._data, name)
        mesh = self._data.mesh
        is_same, arrays, checksum = _in_all_processes(
            lambda: self._expected(name, meta), path, mesh
        )
        found = _in_all_processes(lambda: self._arrays(step, name, arrays), path, mesh)
        if table_checksums.of_table(found["rows"], found["table"], mesh) != checksum:
            raise DamagedError(f"{path} does not have the checksum that it was saved with")
        if not is_same:
            return mesh.put(relayout.move_rows(found["rows"], found["table"], side.rows, mesh))
        return found["table"] if mesh.jax_mesh is None else found["table"][0]

    def _expected(
        self, name: str, meta: dict[str, Any]
    ) -> tuple[bool, list[tuple[tuple[int, ...], Sharding]], int]:
        """Whether a side has the same layout; shapes and shardings to read; its checksum."""
        side: XlaSide = getattr(self._data, name)
        mesh, saved = self._data.mesh, meta["slots"][name]
        is_same = saved == relayout.describe(side.rows, self._data.params.factors, mesh)
        arrays = []
        for shape in saved["shapes"]:
            axis = 0 if is_same else len(shape) - 2
            # Zeros are appended to make parts of equal size. Row number 0 means an unused slot.
            shape = [*shape]
            if not (is_same or mesh.jax_mesh is None):
                shape[axis] += -shape[axis] % len(mesh.devices)
            arrays.append((tuple(shape), mesh.sharding(axis)))
        return is_same, arrays, int(meta["checksums"][name], 16)

    def _arrays(
        self, step: int, name: str, arrays: list[tuple[tuple[int, ...], Sharding]]
    ) -> dict[str, list[Array]]:
        """Row numbers and table of one side, each array in the given shape and sharding."""
        args = self._orbax.args
        how = {
            key: [
                self._orbax.ArrayRestoreArgs(
                    sharding=sharding, global_shape=shape[:last], strict=False
                )
                for shape, sharding in arrays
            ]
            for key, last in (("rows", -1), ("table", None))
        }
        tree = {key: [0] * len(arrays) for key in how}
        wanted = args.Composite(**{name: args.PyTreeRestore(tree, how)})
        found = self._manager.restore(step, args=wanted)[name]
        dtypes = {array.dtype for array in found["table"]}
        if len(dtypes) != 1 or str(dtypes.pop()) != self._data.params.dtype:
            raise DamagedError(f"its tables are not of {self._data.params.dtype}")
        return found

    def _extra(self, step: int, wanted: dict[str, str]) -> dict[str, np.ndarray]:
        if not wanted:
            return {}
        args, how = self._orbax.args, self._orbax.RestoreArgs(restore_type=np.ndarray)
        restored = args.PyTreeRestore(dict.fromkeys(wanted, 0), dict.fromkeys(wanted, how))
        found = self._manager.restore(step, args=args.Composite(extra=restored))["extra"]
        arrays = {name: np.asarray(found[name]) for name in wanted}
        for name, values in arrays.items():
            if digests.array(values) != wanted[name]:
                raise DamagedError(f"{name} does not have the checksum that it was saved with")
        return arrays


def _in_all_processes(read: Callable[[], _Found], path: epath.Path, mesh: DeviceMesh) -> _Found:
    """Return the result of `read`. If it fails in one process, raise DamagedError in all."""
    found, failure = None, ""
    try:
        found = read()
    except (LaterFormatError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001, as orbax and its libraries raise many kinds
        reason = f"{type(error).__name__}: " * (not isinstance(error, DamagedError)) + str(error)
        failure = f"{path} cannot be read ({reason.splitlines()[0][:200]})"
    if mesh.agree(int(bool(failure))):
        raise DamagedError(failure or f"another process cannot read its part of {path}")
    return found  # type: ignore[return-value]
