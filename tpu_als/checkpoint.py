"""Checkpoints of training, so that a fit that was cut off goes on where it stood. By orbax.

A checkpoint holds both tables in slot order, as they lie on the devices: every process writes its
own shards, and no process ever has a whole table. With each slot goes the number of its row, so
that another number of devices, threads or processes can resume too. A checkpoint counts only once
all of it is on disk; whatever cuts the writing short, the one before stays.

Several processes make the same calls and see the same directory: a shared file system or a bucket.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np

from tpu_als import layout
from tpu_als.als import AlsState, Data, Side
from tpu_als.mesh import Shards, Workplace, precision

FORMAT = 1
# A directory of their own in the given one: what lies beside is neither read nor removed.
FOLDER = "tpu_als_checkpoints"
_CHUNK_BYTES = 1 << 26  # of a table that reading a part of it has to read at once
_PIECE_BYTES = 1 << 26  # of a table on its way to other slots
_SUM_TOLERANCE = 1e-6  # relative: sums depend on their order, and so on the number of processes
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
        self._orbax, path_class = _orbax()
        text = os.fspath(directory)
        given = path_class(text if "://" in text else os.path.abspath(os.path.expanduser(text)))
        if given.exists() and not given.is_dir():
            raise NotADirectoryError(
                f"checkpoints need a directory, but {given} is a file; give another path"
            )
        self._root, self._every, self._keep = given / FOLDER, int(every), int(keep)
        self._manager: Any = None
        self._at_close = contextlib.ExitStack()
        self._placed: tuple[Data, dict[str, _Placed]] | None = None

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
        placed = self._places(data)
        meta = {
            "format": FORMAT,
            "iteration": iteration,
            "settings": _plain(settings),
            "data": _fingerprint(data),
            "slots": {name: place.layout for name, place in placed.items()},
            "history": {name: [float(value) for value in row] for name, row in history.items()},
            "extra": sorted(extra),
        }
        items = {"meta": args.JsonSave(meta)}
        if extra:
            items["extra"] = args.PyTreeSave({name: np.asarray(extra[name]) for name in extra})
        how = self._orbax.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
        for name, table in zip(_SIDES, state, strict=True):
            tree = {"rows": _listed(placed[name].rows), "table": _listed(table)}
            options = {key: [how] * len(arrays) for key, arrays in tree.items()}
            items[name] = args.PyTreeSave(tree, options)
        with precision(data.params.dtype):
            manager.save(iteration, args=args.Composite(**items), force=True)
        return True

    def close(self) -> None:
        """Wait for what is being written."""
        manager, self._manager, self._placed = self._manager, None, None
        with self._at_close:
            if manager is not None:
                manager.close()

    def _open(self, place: Workplace) -> Any:
        if self._manager is None:
            self._at_close.enter_context(_handlers_kept())
            self._root.mkdir(parents=True, exist_ok=True)
            first = min(place.processes)
            together = self._orbax.options.MultiprocessingOptions(
                primary_host=first,
                active_processes=set(place.processes),
                barrier_sync_key_prefix=f"tpu_als_{first}",
            )
            options = self._orbax.CheckpointManagerOptions(
                max_to_keep=self._keep,
                create=False,
                cleanup_tmp_directories=True,
                multiprocessing_options=together,
            )
            self._manager = self._orbax.CheckpointManager(self._root, options=options)
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

    def _places(self, data: Data) -> dict[str, _Placed]:
        """Row numbers of all slots, placed like the tables; once per data."""
        if self._placed is None or self._placed[0] is not data:
            sides = zip(_SIDES, (data.users, data.items), strict=True)
            self._placed = data, {name: _placed(side, data) for name, side in sides}
        return self._placed[1]

    def _table(self, step: int, name: str, saved: dict[str, Any], data: Data) -> Shards:
        """Read a table into the slots of the data."""
        side: Side = getattr(data, name)
        place, now = data.place, _layout(side, data)
        is_same = saved == now
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
            return place.put(_moved(found, side, place))
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


_SIDES = ("users", "items")


class _UnusableError(Exception):
    """A checkpoint that can be read but not resumed from."""


class _Placed(NamedTuple):
    rows: Shards
    layout: dict[str, Any]


def _placed(side: Side, data: Data) -> _Placed:
    numbers = layout.rows_of_slots(side.rows, data.place.local) + 1  # 0: no row
    return _Placed(data.place.put(numbers.astype(np.int32)), _layout(side, data))


def _layout(side: Side, data: Data) -> dict[str, Any]:
    """Shapes of a table's arrays and, in short, the slot of every row."""
    shape, count = [side.rows.n_slots, data.params.factors], side.rows.n_shards
    shapes = [shape] * count if data.place.mesh is None else [[count, *shape]]
    return {"shapes": shapes, "slots": _digest(side.rows.slots)}


def _listed(table: Shards) -> list[Any]:
    return table if isinstance(table, list) else [table]


def _moved(found: dict[str, list[Any]], side: Side, place: Workplace) -> np.ndarray:
    """Rows of this process's shards (len(local), S, K), out of slots of another layout.

    Every process has read an equal part. The parts pass by all processes piece by piece, and each
    picks its own rows.
    """
    n_slots, first = side.rows.n_slots, place.local.start * side.rows.n_slots
    dtype, factors = found["table"][0].dtype, found["table"][0].shape[-1]
    out = np.zeros((len(place.local) * n_slots, factors), dtype)
    step = max(_PIECE_BYTES // (dtype.itemsize * factors * len(place.processes)), 1)
    for rows, table in zip(*(_own_parts(found[key]) for key in ("rows", "table")), strict=True):
        rows, table = rows.ravel(), table.reshape(-1, factors)
        for low in range(0, len(rows), step):
            numbers = place.gather_processes(rows[low : low + step]).ravel()
            piece = place.gather_processes(table[low : low + step]).reshape(-1, factors)
            used = np.flatnonzero(numbers)
            slots = side.rows.slots[numbers[used] - 1] - first
            mine = (slots >= 0) & (slots < len(out))
            out[slots[mine]] = piece[used[mine]]
    return out.reshape(len(place.local), n_slots, factors)


def _own_parts(arrays: Iterable[Any]) -> Iterator[np.ndarray]:
    for array in arrays:
        for shard in array.addressable_shards:
            yield np.asarray(shard.data)


def _fingerprint(data: Data) -> dict[str, Any]:
    """What tells another matrix, or other shapes of tables."""
    return {
        "factors": data.params.factors,
        "dtype": data.params.dtype,
        "shape": [data.users.n_rows, data.items.n_rows],
        "number of entries": int(data.n_entries),
        "entries per user (digest)": _digest(data.users.lengths),
        "entries per item (digest)": _digest(data.items.lengths),
        _SUM: float(data.absolute_sum),
    }


def _digest(numbers: np.ndarray) -> str:
    return hashlib.sha256(np.asarray(numbers, np.int64).tobytes()).hexdigest()[:16]


def _same(name: str, saved: Any, now: Any) -> bool:
    if name == _SUM:
        return math.isclose(saved, now, rel_tol=_SUM_TOLERANCE)
    return saved == now


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON, such as lists for tuples."""
    return json.loads(json.dumps(settings))


def _orbax() -> tuple[Any, Any]:
    """Import orbax, and the class of paths that may lie in a bucket."""
    try:
        with _handlers_kept():
            import orbax.checkpoint as ocp
            from etils import epath
    except ImportError as error:
        raise ImportError(
            'checkpoints need orbax-checkpoint: pip install "tpu-als[checkpoint]"'
        ) from error
    return ocp, epath.Path


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Keep absl from giving the root logger a handler, as it does at any message without one.

    Meanwhile Python's own last resort stands there, which prints what it would have anyway.
    """
    root, stand_in = logging.getLogger(), logging.lastResort
    if root.handlers or stand_in is None:
        yield
        return
    root.addHandler(stand_in)
    try:
        yield
    finally:
        root.removeHandler(stand_in)
