"""Checkpoints of training, so that a fit that was cut off goes on where it stood. By orbax.

A checkpoint holds both tables in slot order, as they lie on the devices: every process writes its
own shards, and no process ever has a whole table. With each slot goes the number of its row, so
that another number of devices, threads or processes can resume too. A checkpoint counts only once
all of it is on disk; whatever cuts the writing short, the one before stays.

Several processes make the same calls and see the same directory: a shared file system or a bucket.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np

from tpu_als import _orbax, relayout
from tpu_als.als import AlsState
from tpu_als.mesh import Shards, Workplace, precision
from tpu_als.placing import Data, Side

FORMAT = 1
# A directory of their own in the given one: what lies beside is neither read nor removed.
FOLDER = "tpu_als_checkpoints"
_CHUNK_BYTES = 1 << 26  # of a table that reading a part of it has to read at once
_SUM_TOLERANCE = 1e-6  # relative: sums depend on their order, and so on the number of processes
_SIDES = ("users", "items")
_SUM = "sum of absolute values"

log = logging.getLogger("tpu_als")


class Resumed(NamedTuple):
    """What `Checkpoints.restore` found.

    Attributes
    ----------
    state : AlsState
        Both tables, in the slots of the data that it was asked for.
    iteration : int
        Iterations that led to them.
    history : dict of list of float
        As saved.
    extra : dict of ndarray
        As saved.
    """

    state: AlsState
    iteration: int
    history: dict[str, list[float]]
    extra: dict[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one training in a directory; a context manager.

    Parameters
    ----------
    directory : str or path-like
        A local path or, as far as orbax can write there, an address such as ``gs://bucket/run``.
        The checkpoints go to its folder "tpu_als_checkpoints"; both are made where they do not
        exist. One training at a time.
    every : int, default=1
        Save at multiples of this many iterations.
    keep : int, default=3
        How many of the latest checkpoints stay.

    Raises
    ------
    ImportError
        Where orbax is not installed.
    NotADirectoryError
        Where the directory is a file.
    ValueError
        For an `every` or `keep` below 1.

    Notes
    -----
    Writing goes on in the background while training continues; a failure to write is raised by
    the next `save` or by `close`.
    """

    def __init__(self, directory: str | os.PathLike[str], every: int = 1, keep: int = 3) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self._orbax = _orbax.load()
        self._root = _orbax.path(directory) / FOLDER
        self._every, self._keep = int(every), int(keep)
        self._manager: Any = None
        self._at_close = contextlib.ExitStack()
        self._known: _Known | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self, settings: dict[str, Any], data: Data) -> Resumed | None:
        """Read the latest checkpoint.

        Parameters
        ----------
        settings : dict
            What must be as it was when the checkpoint was saved; of what JSON can write.
        data : Data
            What training goes on with. It must be the same matrix, but may lie on other devices,
            threads or processes.

        Returns
        -------
        Resumed or None
            None where there is no checkpoint. The tables are those that were saved, bit for bit.

        Raises
        ------
        ValueError
            Where the checkpoint is of other settings or other data, of a later format, or cannot
            be read.
        """
        manager = self._open(data.place)
        step = manager.latest_step()
        if step is None:
            return None
        args = self._orbax.args
        with self._reading(step):
            meta = manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
            if meta["format"] > FORMAT:
                found = meta["format"]
                raise _UnusableError(
                    f"{self._path(step)} has format {found}, but this version reads formats up to "
                    f"{FORMAT}: it was written by a later tpu_als; upgrade to read it"
                )
            self._check_same("settings", step, meta["settings"], _plain(settings))
            self._check_same("data", step, meta["data"], _fingerprint(data))
            with precision(data.params.dtype):
                tables = [self._table(step, name, meta["slots"][name], data) for name in _SIDES]
            extra = self._extra(step, meta["extra"])
        log.info("resumed from %s", self._path(step))
        return Resumed(AlsState(*tables), int(meta["iteration"]), meta["history"], extra)

    def save(
        self,
        iteration: int,
        state: AlsState,
        data: Data,
        settings: dict[str, Any],
        history: dict[str, list[float]],
        extra: dict[str, np.ndarray] | None = None,
        *,
        force: bool = False,
    ) -> bool:
        """Save the tables after so many iterations; waits only for what was saved before.

        Parameters
        ----------
        iteration : int
            Iterations run.
        state : AlsState
            The tables. They are read in the background: donate them to nothing.
        data : Data
            What they were trained on.
        settings : dict
            What decides the result, as for `restore`.
        history : dict of list of float
            Given back by `restore`.
        extra : dict of ndarray, optional
            Likewise; the same on every process.
        force : bool, default=False
            Save also where `iteration` is no multiple of `every`.

        Returns
        -------
        bool
            Whether it is being saved: not if it is not its turn, or is there already.
        """
        if iteration % self._every and not force:
            return False
        manager, args, extra = self._open(data.place), self._orbax.args, extra or {}
        if iteration in manager.all_steps():
            return False
        known = self._know(data)
        meta = {
            "format": FORMAT,
            "iteration": iteration,
            "settings": _plain(settings),
            "data": known.fingerprint,
            "slots": known.slots,
            "history": {name: [float(value) for value in row] for name, row in history.items()},
            "extra": sorted(extra),
        }
        items = {"meta": args.JsonSave(meta)}
        if extra:
            items["extra"] = args.PyTreeSave({name: np.asarray(extra[name]) for name in extra})
        how = self._orbax.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
        for name, table in zip(_SIDES, state, strict=True):
            tree = {"rows": relayout.listed(known.rows[name]), "table": relayout.listed(table)}
            options = {key: [how] * len(arrays) for key, arrays in tree.items()}
            items[name] = args.PyTreeSave(tree, options)
        with precision(data.params.dtype):
            manager.save(iteration, args=args.Composite(**items), force=True)
        return True

    def close(self) -> None:
        """Wait for what is being written."""
        manager, self._manager, self._known = self._manager, None, None
        with self._at_close:
            if manager is not None:
                manager.close()

    def _open(self, place: Workplace) -> Any:
        if self._manager is None:
            if not place.is_complete:
                raise ValueError(
                    "checkpoints are written by all processes of a job together, but these "
                    f"devices are of process {list(place.processes)} only; fit on devices of all "
                    "processes, or in a job of this process alone"
                )
            self._at_close.enter_context(_orbax.handlers_kept())
            self._manager = _orbax.manager(self._root, self._keep, place.processes)
        return self._manager

    def _path(self, step: int) -> str:
        return f"the checkpoint {self._root / str(step)}"

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except _UnusableError as error:
            raise ValueError(str(error)) from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise ValueError(
                f"{self._path(step)} cannot be read ({reason}); remove it to resume from the one "
                "before, or give another directory"
            ) from error

    def _check_same(self, what: str, step: int, saved: dict[str, Any], now: dict[str, Any]) -> None:
        differing = [
            f"{name} was {saved.get(name, 'absent')!r} and is {now.get(name, 'absent')!r}"
            for name in dict.fromkeys([*saved, *now])
            if not _same(name, saved.get(name, "absent"), now.get(name, "absent"))
        ]
        if differing:
            raise _UnusableError(
                f"{self._path(step)} is of other {what}: {'; '.join(differing)}. Give another "
                f"directory, or remove {self._root} to start afresh"
            )

    def _know(self, data: Data) -> _Known:
        if self._known is None or self._known.data is not data:
            rows, slots = {}, {}
            for name in _SIDES:
                side: Side = getattr(data, name)
                rows[name] = data.place.put(relayout.row_numbers(side.rows, data.place))
                slots[name] = relayout.described(side.rows, data.params.factors, data.place)
            self._known = _Known(data, _fingerprint(data), rows, slots)
        return self._known

    def _table(self, step: int, name: str, saved: dict[str, Any], data: Data) -> Shards:
        """Read a table into the slots of the data."""
        side: Side = getattr(data, name)
        place = data.place
        is_same = saved == relayout.described(side.rows, data.params.factors, place)
        arrays = []
        for shape in saved["shapes"]:
            axis = 0 if is_same else len(shape) - 2
            # Parts of equal size: zeros are appended, which are no row's numbers.
            shape = [*shape]
            if not (is_same or place.mesh is None):
                shape[axis] += -shape[axis] % len(place.devices)
            arrays.append((tuple(shape), place.sharding(axis)))
        found = self._arrays(step, name, arrays)
        if not is_same:
            return place.put(relayout.moved(found["rows"], found["table"], side.rows, place))
        return found["table"] if place.mesh is None else found["table"][0]

    def _arrays(
        self, step: int, name: str, arrays: list[tuple[tuple[int, ...], Any]]
    ) -> dict[str, list[Any]]:
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
        return self._manager.restore(step, args=wanted)[name]

    def _extra(self, step: int, names: list[str]) -> dict[str, np.ndarray]:
        if not names:
            return {}
        args, how = self._orbax.args, self._orbax.RestoreArgs(restore_type=np.ndarray)
        wanted = args.PyTreeRestore(dict.fromkeys(names, 0), dict.fromkeys(names, how))
        found = self._manager.restore(step, args=args.Composite(extra=wanted))["extra"]
        return {name: np.asarray(found[name]) for name in names}


class _UnusableError(Exception):
    """A checkpoint that can be read but not resumed from."""


class _Known(NamedTuple):
    """What every checkpoint of the same data has in common."""

    data: Data
    fingerprint: dict[str, Any]
    rows: dict[str, Shards]
    slots: dict[str, dict[str, Any]]


def _fingerprint(data: Data) -> dict[str, Any]:
    """What tells another matrix, or other shapes of tables."""
    return {
        "factors": data.params.factors,
        "dtype": data.params.dtype,
        "shape": [data.users.n_rows, data.items.n_rows],
        "number of entries": int(data.n_entries),
        "entries per user (digest)": relayout.digest(data.users.lengths),
        "entries per item (digest)": relayout.digest(data.items.lengths),
        _SUM: float(data.absolute_sum),
    }


def _same(name: str, saved: Any, now: Any) -> bool:
    if name == _SUM:
        return math.isclose(saved, now, rel_tol=_SUM_TOLERANCE)
    return saved == now


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON, such as lists for tuples."""
    return json.loads(json.dumps(settings))
