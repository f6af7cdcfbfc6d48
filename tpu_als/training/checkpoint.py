"""Checkpoints of training, from which an interrupted fit resumes. They are written with orbax.

A checkpoint holds both tables in slot order, as on the devices: every process writes its own
shards, and no process ever has a whole table. Each slot is stored with its row number, so that
another number of devices, threads or processes can resume. A checkpoint is valid only after all of
it is on disk; if writing is interrupted, the previous checkpoint remains. Checksums of the tables
are verified when they are read.

Each run has its own folder, named after a digest of its parameters, data and initial tables. So a
training resumes only checkpoints that lead to the same result.

All processes must make the same calls and see the same directory: a shared file system or a bucket.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from tpu_als.engine import digests
from tpu_als.engine.xla import relayout, table_checksums
from tpu_als.engine.xla.data import XlaData, XlaSide
from tpu_als.engine.xla.mesh import DeviceMesh, Shards, precision
from tpu_als.exceptions import DataWarning
from tpu_als.training import orbax_io
from tpu_als.training.checkpoint_reader import (
    FORMAT,
    SIDES,
    DamagedError,
    LaterFormatError,
    Reader,
    Saved,
)
from tpu_als.training.runs import RunFolder

__all__ = ["FOLDER", "FORMAT", "Checkpoints", "Saved"]

# A subdirectory of the given one. Files outside it are neither read nor removed.
FOLDER = "tpu_als_checkpoints"
_CHUNK_BYTES = 1 << 26  # the least that is read from a table at once

log = logging.getLogger("tpu_als")


class Checkpoints:
    """The checkpoints of trainings in a directory; a context manager.

    Parameters
    ----------
    directory : str or path-like
        A local path, or an address such as ``gs://bucket/run`` that orbax can write to. It is
        created if needed. Checkpoints are saved in ``tpu_als_checkpoints/<run>/<iteration>`` below
        it. Several runs may share the directory. On a local path a lock prevents a second training
        of the same run, and only the three most recently written other runs are kept.
    every : int, default=1
        Save at multiples of this many iterations.
    keep : int, default=3
        Number of checkpoints of a run to keep.

    Raises
    ------
    ImportError
        If orbax is not installed.
    NotADirectoryError
        If the directory is a file.
    ValueError
        For an `every` or `keep` below 1.

    Notes
    -----
    Checkpoints are written in the background while training continues. If writing fails, the next
    `save` or `close` raises the error.
    """

    def __init__(self, directory: str | os.PathLike[str], every: int = 1, keep: int = 3) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self._orbax = orbax_io.load()
        self._root = orbax_io.path(directory) / FOLDER
        self._every, self._keep = int(every), int(keep)
        self._manager: Any = None
        self._run: RunFolder | None = None
        self._damaged: set[int] = set()  # checkpoints to be replaced
        self._at_close = contextlib.ExitStack()
        self._described: _Description | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(
        self, settings: Mapping[str, object], data: XlaData, at_most: int | None = None
    ) -> Saved | None:
        """Read a run's latest checkpoint that is not damaged.

        Parameters
        ----------
        settings : dict
            All settings that affect the result, as values that JSON supports. Together with the
            data they identify the run.
        data : Data
            The training data, placed `with_digest`. The devices, threads or processes may be others
            than when the checkpoint was saved.
        at_most : int, optional
            Skip checkpoints of more iterations.

        Returns
        -------
        Saved or None
            None if there is no checkpoint. The tables are equal to the saved ones, bit for bit.

        Raises
        ------
        ValueError
            If all checkpoints of the run are damaged, one has a later format, the data have no
            digest, or processes passed different settings or data.
        RuntimeError
            If another training writes checkpoints of this run.

        Warns
        -----
        DataWarning
            Once, naming the files, if checkpoints after the returned one are damaged.
        """
        manager, damaged, found = self._open(settings, data), {}, None
        run = self._run
        assert run is not None
        steps = sorted(s for s in manager.all_steps() if at_most is None or s <= at_most)
        with contextlib.ExitStack() as at_end:
            if steps:
                alone = orbax_io.reader(run.path, data.mesh.processes[data.mesh.process])
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
                f"{'; '.join(damaged.values())}. Remove that folder to start the run again, or "
                "choose another directory"
            )
        if damaged:
            self._warn(data.mesh, damaged, found.iteration if found else 0)
        self._log_start(run, found, len(manager.all_steps()))
        return found

    def save(
        self,
        training: Saved,
        data: XlaData,
        settings: Mapping[str, object],
        *,
        force: bool = False,
    ) -> bool:
        """Start to save the tables; wait only for the previous save.

        Parameters
        ----------
        training : Saved
            The tables, and what else `restore` returns.
        data : Data
            The training data.
        settings : dict
            As in `restore`.
        force : bool, default=False
            Save even if `iteration` is not a multiple of `every`.

        Returns
        -------
        bool
            Whether it is being saved. False if `iteration` is not a multiple of `every`, or if this
            or a later checkpoint exists.

        Raises
        ------
        OSError
            If an earlier checkpoint could not be written.
        ValueError, RuntimeError
            As in `restore`.
        """
        state, iteration, history, extra = training
        if iteration % self._every and not force:
            return False
        manager, args = self._open(settings, data), self._orbax.args
        if any(step >= iteration and step not in self._damaged for step in manager.all_steps()):
            return False
        assert self._run is not None
        _in_first_process(self._run.probe, data.mesh)
        if iteration in self._damaged:
            manager.delete(iteration)
            self._damaged.discard(iteration)
        described = self._describe(settings, data)
        how = self._orbax.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
        items, checksums = {}, {}
        for name, table in zip(SIDES, state, strict=True):
            tree = {
                "rows": relayout.as_list(described.rows[name]),
                "table": relayout.as_list(table),
            }
            checksum = table_checksums.of_table(tree["rows"], tree["table"], data.mesh)
            checksums[name] = f"{checksum:016x}"
            options = {key: [how] * len(arrays) for key, arrays in tree.items()}
            items[name] = args.PyTreeSave(tree, options)
        arrays = {name: np.asarray(extra[name]) for name in sorted(extra)}
        if arrays:
            items["extra"] = args.PyTreeSave(arrays)
        meta = {
            "format": FORMAT,
            "run": described.identity,
            "iteration": int(iteration),
            "slots": described.slots,
            "history": {name: [float(value) for value in row] for name, row in history.items()},
            "checksums": checksums,
            "extra": {name: digests.array(values) for name, values in arrays.items()},
        }
        items["meta"] = args.JsonSave({**meta, "checksum": digests.fields(meta)})
        with precision(data.params.dtype), self._as_write_errors():
            orbax_io.save(manager, iteration, args.Composite(**items))
        return True

    def close(self) -> None:
        """Wait until everything is written, and release the run's lock."""
        manager, self._manager, self._run, self._described = self._manager, None, None, None
        with self._at_close:
            if manager is not None:
                with self._as_write_errors():
                    orbax_io.close(manager)

    @contextlib.contextmanager
    def _as_write_errors(self) -> Iterator[None]:
        """Context in which orbax's errors, which are of several kinds, become an OSError."""
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

    def _open(self, settings: Mapping[str, object], data: XlaData) -> Any:
        """Open the run of these settings and data; close the open run if it is another one."""
        mesh, described = data.mesh, self._describe(settings, data)
        if self._run is not None and self._run.path.name != described.identity:
            self.close()
            described = self._describe(settings, data)
        if self._run is None:
            if not mesh.is_complete:
                raise ValueError(
                    "checkpoints are written by all processes of a job together, but these "
                    f"devices are of process {list(mesh.processes)} only; fit on devices of all "
                    "processes, or in a job of this process alone"
                )
            _check_identity(described.identity, mesh)
            self._damaged = set()
            self._at_close.enter_context(orbax_io.handlers_kept())
            run = RunFolder(self._root, described.identity, described.about)
            _in_first_process(run.open, mesh)
            self._run = run
            self._at_close.callback(run.close)
            self._manager = orbax_io.manager(run.path, self._keep, mesh.processes)
        return self._manager

    def _describe(self, settings: Mapping[str, object], data: XlaData) -> _Description:
        about = {**_plain(settings), **_fingerprint(data)}
        if (
            self._described is None
            or self._described.data is not data
            or self._described.about != about
        ):
            rows, slots = {}, {}
            for name in SIDES:
                side: XlaSide = getattr(data, name)
                rows[name] = data.mesh.put(relayout.row_numbers(side.rows, data.mesh))
                slots[name] = relayout.describe(side.rows, data.params.factors, data.mesh)
            identity = digests.text(json.dumps(about, sort_keys=True))
            self._described = _Description(data, about, identity, rows, slots)
        return self._described

    def _warn(self, mesh: DeviceMesh, damaged: dict[int, str], iteration: int) -> None:
        message = (
            f"{len(damaged)} damaged checkpoints were skipped, and training resumes from "
            f"iteration {iteration}: {'; '.join(damaged.values())}"
        )
        log.warning(message)
        if mesh.process == 0:
            warnings.warn(message, DataWarning, stacklevel=3)

    def _log_start(self, run: RunFolder, found: Saved | None, n_steps: int) -> None:
        if found is not None:
            log.info("resumed from %s", run.path / str(found.iteration))
        elif n_steps:
            log.info("started: all checkpoints of the run %s have more iterations", run.path)
        else:
            log.info("started the run %s; %s", run.path, run.differences())


class _Description(NamedTuple):
    """Values that all checkpoints of a run share."""

    data: XlaData
    about: dict[str, object]
    identity: str
    rows: dict[str, Shards]
    slots: dict[str, dict[str, object]]


def _fingerprint(data: XlaData) -> dict[str, object]:
    """Entries that differ for another matrix or other shapes of tables."""
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


def _check_identity(identity: str, mesh: DeviceMesh) -> None:
    """Raise ValueError in all processes if they have different runs."""
    numbers = np.array([int(identity[:8], 16), int(identity[8:], 16)], np.int64)
    of_all = mesh.gather_processes(numbers)
    if (of_all != of_all[0]).any():
        raise ValueError(
            "the processes were given different parameters, data or initial tables, but must "
            "checkpoint one run together: pass the same in each"
        )


def _in_first_process(work: Callable[[], object], mesh: DeviceMesh) -> None:
    """Call `work` in the first process only. If it fails, an error is raised in all processes."""
    error: Exception | None = None
    if mesh.process == 0:
        try:
            work()
        except Exception as caught:
            if len(mesh.processes) == 1:
                raise
            error = caught
    if len(mesh.processes) > 1:
        text = np.zeros(1000, np.uint8)
        message = f"{type(error).__name__}: {error}".encode()[:1000] if error else b""
        text[: len(message)] = np.frombuffer(message, np.uint8)
        message = mesh.gather_processes(text)[0].tobytes().rstrip(b"\0")
        if error is not None:
            raise error
        if message:
            raise RuntimeError(f"the first process: {message.decode(errors='replace')}")


def _plain(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings after a round trip through JSON, which turns tuples into lists."""
    return json.loads(json.dumps(settings))
