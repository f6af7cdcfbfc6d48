"""Checkpoints of training, so that a fit that was cut off goes on where it stood. By orbax.

A checkpoint holds both tables in slot order, as they lie on the devices: every process writes its
own shards, and no process ever has a whole table. With each slot goes the number of its row, so
that another number of devices, threads or processes can resume too. A checkpoint counts only once
all of it is on disk; whatever cuts the writing short, the one before stays. Checksums of the tables
are verified when they are read.

The checkpoints of a run are in a folder of their own, named by a digest of the run's parameters,
data and initial tables. So a training resumes only what has the same result.

Several processes make the same calls and see the same directory: a shared file system or a bucket.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np

from tpu_als import _checksums, _digest, _orbax, relayout
from tpu_als._checkpoint_reader import (
    FORMAT,
    SIDES,
    DamagedError,
    LaterFormatError,
    Reader,
    Resumed,
    checksum_of,
)
from tpu_als._runs import RunFolder
from tpu_als.als import AlsState
from tpu_als.exceptions import DataWarning
from tpu_als.mesh import Shards, Workplace, precision
from tpu_als.placing import Data, Side

__all__ = ["FOLDER", "FORMAT", "Checkpoints", "Resumed"]

# A directory of their own in the given one: what lies beside is neither read nor removed.
FOLDER = "tpu_als_checkpoints"
_CHUNK_BYTES = 1 << 26  # of a table that reading a part of it has to read at once

log = logging.getLogger("tpu_als")


class Checkpoints:
    """The checkpoints of trainings in a directory; a context manager.

    Parameters
    ----------
    directory : str or path-like
        A local path or, as far as orbax can write there, an address such as ``gs://bucket/run``.
        The checkpoints go to ``tpu_als_checkpoints/<run>/<iteration>`` in it; what does not exist
        is made. Several runs may share the directory. On a local path a lock keeps a second
        training from the same run, and of other runs the three written last stay.
    every : int, default=1
        Save at multiples of this many iterations.
    keep : int, default=3
        How many of a run's latest checkpoints stay.

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
        self._run: RunFolder | None = None
        self._damaged: set[int] = set()  # checkpoints to be replaced
        self._at_close = contextlib.ExitStack()
        self._known: _Known | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(
        self, settings: dict[str, Any], data: Data, at_most: int | None = None
    ) -> Resumed | None:
        """Read the latest checkpoint of a run that is not damaged.

        Parameters
        ----------
        settings : dict
            What decides the result, besides the data; of what JSON can write. With the data they
            are the run's identity.
        data : Data
            What training goes on with, placed `with_digest`. It may lie on other devices, threads
            or processes than when the checkpoint was saved.
        at_most : int, optional
            Pass over checkpoints of more iterations.

        Returns
        -------
        Resumed or None
            None where there is no checkpoint. The tables are those that were saved, bit for bit.

        Raises
        ------
        ValueError
            Where all checkpoints of the run are damaged, one is of a later format, the data have
            no digest, or processes passed different settings or data.
        RuntimeError
            Where another training writes checkpoints of this run.

        Warns
        -----
        DataWarning
            Once, naming the files, where later checkpoints than the one read are damaged.
        """
        manager, damaged, found = self._open(settings, data), {}, None
        run = self._run
        assert run is not None
        steps = sorted(s for s in manager.all_steps() if at_most is None or s <= at_most)
        with contextlib.ExitStack() as at_end:
            if steps:
                alone = _orbax.reader(run.path, data.place.processes[data.place.process])
                at_end.callback(alone.close)
            while steps and found is None:
                step = steps.pop()
                try:
                    found = Reader(alone, run.path, data).read(step)
                except DamagedError as error:
                    damaged[step] = str(error)
                except LaterFormatError as error:
                    raise ValueError(str(error)) from None
        self._damaged = set(damaged)
        if found is None and damaged:
            raise ValueError(
                f"none of the {len(damaged)} checkpoints in {run.path} can be read: "
                f"{'; '.join(damaged.values())}. Remove that folder to start the run afresh, or "
                "give another directory"
            )
        if damaged:
            self._warn(data.place, damaged, found.iteration if found else 0)
        self._log_beginning(run, found, len(manager.all_steps()))
        return found

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
            As for `restore`.
        history : dict of list of float
            Given back by `restore`.
        extra : dict of ndarray, optional
            Likewise; the same on every process.
        force : bool, default=False
            Save also where `iteration` is no multiple of `every`.

        Returns
        -------
        bool
            Whether it is being saved: not if it is not its turn, or it or a later one is there.

        Raises
        ------
        OSError
            Where an earlier checkpoint could not be written.
        ValueError, RuntimeError
            As `restore`.
        """
        if iteration % self._every and not force:
            return False
        manager, args, extra = self._open(settings, data), self._orbax.args, extra or {}
        if any(step >= iteration and step not in self._damaged for step in manager.all_steps()):
            return False
        assert self._run is not None
        _by_first(self._run.probe, data.place)
        if iteration in self._damaged:
            manager.delete(iteration)
            self._damaged.discard(iteration)
        known = self._know(settings, data)
        how = self._orbax.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
        items, checksums = {}, {}
        for name, table in zip(SIDES, state, strict=True):
            tree = {"rows": relayout.listed(known.rows[name]), "table": relayout.listed(table)}
            checksum = _checksums.of_table(tree["rows"], tree["table"], data.place)
            checksums[name] = f"{checksum:016x}"
            options = {key: [how] * len(arrays) for key, arrays in tree.items()}
            items[name] = args.PyTreeSave(tree, options)
        arrays = {name: np.asarray(extra[name]) for name in sorted(extra)}
        if arrays:
            items["extra"] = args.PyTreeSave(arrays)
        meta = {
            "format": FORMAT,
            "run": known.identity,
            "iteration": int(iteration),
            "slots": known.slots,
            "history": {name: [float(value) for value in row] for name, row in history.items()},
            "checksums": checksums,
            "extra": {name: _digest.array(values) for name, values in arrays.items()},
        }
        items["meta"] = args.JsonSave({**meta, "checksum": checksum_of(meta)})
        with precision(data.params.dtype), self._blamed_on_writing():
            manager.save(iteration, args=args.Composite(**items), force=True)
        return True

    def close(self) -> None:
        """Wait for what is being written, and let others write to the run."""
        manager, self._manager, self._run, self._known = self._manager, None, None, None
        with self._at_close:
            if manager is not None:
                with self._blamed_on_writing():
                    manager.close()

    @contextlib.contextmanager
    def _blamed_on_writing(self) -> Iterator[None]:
        """Scope in which orbax's errors of several kinds become an OSError of one sentence."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise OSError(
                f"a checkpoint could not be written to {self._root}: {reason:.300}. Is the disk "
                "full? The checkpoints before it stay"
            ) from error

    def _open(self, settings: dict[str, Any], data: Data) -> Any:
        """Open the run of these settings and data, and close the one before if it is another."""
        place, known = data.place, self._know(settings, data)
        if self._run is not None and self._run.path.name != known.identity:
            self.close()
            known = self._know(settings, data)
        if self._run is None:
            if not place.is_complete:
                raise ValueError(
                    "checkpoints are written by all processes of a job together, but these "
                    f"devices are of process {list(place.processes)} only; fit on devices of all "
                    "processes, or in a job of this process alone"
                )
            _check_identity(known.identity, place)
            self._damaged = set()
            self._at_close.enter_context(_orbax.handlers_kept())
            run = RunFolder(self._root, known.identity, known.about)
            _by_first(run.open, place)
            self._run = run
            self._at_close.callback(run.close)
            self._manager = _orbax.manager(run.path, self._keep, place.processes)
        return self._manager

    def _know(self, settings: dict[str, Any], data: Data) -> _Known:
        about = {**_plain(settings), **_fingerprint(data)}
        if self._known is None or self._known.data is not data or self._known.about != about:
            rows, slots = {}, {}
            for name in SIDES:
                side: Side = getattr(data, name)
                rows[name] = data.place.put(relayout.row_numbers(side.rows, data.place))
                slots[name] = relayout.described(side.rows, data.params.factors, data.place)
            identity = _digest.text(json.dumps(about, sort_keys=True))
            self._known = _Known(data, about, identity, rows, slots)
        return self._known

    def _warn(self, place: Workplace, damaged: dict[int, str], iteration: int) -> None:
        message = (
            f"{len(damaged)} damaged checkpoints were passed over, and training resumes from "
            f"iteration {iteration}: {'; '.join(damaged.values())}"
        )
        log.warning(message)
        if place.process == 0:
            warnings.warn(message, DataWarning, stacklevel=3)

    def _log_beginning(self, run: RunFolder, found: Resumed | None, n_steps: int) -> None:
        if found is not None:
            log.info("resumed from %s", run.path / str(found.iteration))
        elif n_steps:
            log.info("started anew: the run %s has checkpoints of more iterations only", run.path)
        else:
            log.info("started the run %s; %s", run.path, run.differences())


class _Known(NamedTuple):
    """What every checkpoint of the same run has in common."""

    data: Data
    about: dict[str, Any]
    identity: str
    rows: dict[str, Shards]
    slots: dict[str, dict[str, Any]]


def _fingerprint(data: Data) -> dict[str, Any]:
    """What tells another matrix, or other shapes of tables."""
    if data.digest is None:
        raise ValueError(
            "checkpoints need the digest of the data: lay them out by "
            "placing.place(..., with_digest=True)"
        )
    return {
        "factors": data.params.factors,
        "dtype": data.params.dtype,
        "users": data.users.n_rows,
        "items": data.items.n_rows,
        "number of entries": int(data.n_entries),
        "entries (digest)": f"{data.digest:016x}",
    }


def _check_identity(identity: str, place: Workplace) -> None:
    """Raise on all processes where they do not mean the same run."""
    own = np.array([int(identity[:8], 16), int(identity[8:], 16)], np.int64)
    every = place.gather_processes(own)
    if (every != every[0]).any():
        raise ValueError(
            "the processes were given different parameters, data or initial tables, but must "
            "checkpoint one run together: pass the same in each"
        )


def _by_first(work: Any, place: Workplace) -> None:
    """Call `work` in the first process; its error is raised in all of them."""
    error: Exception | None = None
    if place.process == 0:
        try:
            work()
        except Exception as caught:
            if len(place.processes) == 1:
                raise
            error = caught
    if len(place.processes) > 1:
        text = np.zeros(1000, np.uint8)
        told = f"{type(error).__name__}: {error}".encode()[:1000] if error else b""
        text[: len(told)] = np.frombuffer(told, np.uint8)
        told = place.gather_processes(text)[0].tobytes().rstrip(b"\0")
        if error is not None:
            raise error
        if told:
            raise RuntimeError(f"the first process: {told.decode(errors='replace')}")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON, such as lists for tuples."""
    return json.loads(json.dumps(settings))
