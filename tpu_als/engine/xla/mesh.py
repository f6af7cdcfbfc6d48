"""Devices, meshes, work shards; copies between host and devices.

Only this file calls JAX's functions for several processes.

A *work shard* is an equal part of a table and of its cells. On a mesh each device has one, and
programs run under `shard_map`. On a single device the shards are worked on by a thread pool that
calls the same compiled program. A CPU device runs a loop on one core only; the thread pool uses all
cores, without a global JAX setting.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from tpu_als.engine.xla import programs
from tpu_als.engine.xla.programs import AXIS, Together, precision
from tpu_als.host import cores, memory_bytes, thread_count, threads
from tpu_als.parameters import LAYOUTS

__all__ = ["AXIS", "LAYOUTS", "Shards", "Together", "Workplace", "precision", "workplace"]

# On a mesh one array with a leading axis of shards; on a single device a list of one array each.
Shards = Any

log = logging.getLogger("tpu_als")
_REPLICATED_SHARE = 1 / 8  # of a device's memory that a copy of the source table may take
_started_in: int | None = None  # id of the process that first called `workplace`
_PIECE_BYTES = 1 << 26  # of a table fetched at once from several processes


@dataclass(frozen=True)
class Workplace:
    """The devices that do the work, and how arrays are divided among them.

    Attributes
    ----------
    devices : tuple of jax.Device
        The devices; if there are several, each is one work shard.
    n_shards : int
        Work shards W.
    table_layout : {"auto", "replicated", "sharded"}
        Whether each device holds the whole source table for a half-epoch, or its own part and the
        rows that the current chunks need.
    n_threads : int
        Threads that work on a single CPU device.
    """

    devices: tuple[jax.Device, ...]
    n_shards: int
    table_layout: str
    n_threads: int = 1

    @property
    def platform(self) -> str:
        """JAX's platform: "cpu", "gpu" or "tpu"."""
        return self.devices[0].platform

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The mesh of several devices, or None for a single one."""
        return Mesh(np.array(self.devices), (AXIS,)) if len(self.devices) > 1 else None

    @property
    def together(self) -> Together:
        """What programs of this workplace do across shards."""
        if self.mesh is None:
            return Together()
        return Together(AXIS, self.table_layout == "sharded")

    @functools.cached_property
    def processes(self) -> tuple[int, ...]:
        """Numbers of the processes whose devices these are, in the shards' order."""
        return tuple(dict.fromkeys(device.process_index for device in self.devices))

    @property
    def process(self) -> int:
        """Place of this process among `processes`."""
        return self.processes.index(self.devices[0].client.process_index())

    @property
    def is_complete(self) -> bool:
        """Whether every process of the job has a part of it."""
        return len(self.processes) == jax.process_count()

    @property
    def local(self) -> range:
        """The shards of this process."""
        each = self.n_shards // len(self.processes)
        return range(self.process * each, (self.process + 1) * each)

    @functools.cached_property
    def alone(self) -> Workplace:
        """The part of this process alone, for work that the others do not share."""
        if len(self.processes) == 1:
            return self
        own = tuple(d for d in self.devices if d.process_index == self.processes[self.process])
        return replace(self, devices=own, n_shards=len(own))

    @property
    def as_threads(self) -> Workplace:
        """One CPU device that has all rows, with at least as many threads as there are devices."""
        n_threads = max(self.n_threads, len(self.devices))
        return replace(self, devices=self.devices[:1], n_shards=1, n_threads=n_threads)

    def with_layout(self, table_bytes: int) -> Workplace:
        """Replace "auto" by a layout for source tables of `table_bytes` bytes."""
        if self.table_layout != "auto":
            return self
        # A process can query its own devices only, and all processes must choose the same layout.
        memory = -self.agree(-_memory(self.devices[self.local.start]))
        budget = _REPLICATED_SHARE * memory
        chosen = "replicated" if self.mesh is None or table_bytes <= budget else "sharded"
        log.info(
            "table_layout: %s, for a table of %.1f MB and a budget of %.1f MB a device",
            chosen, table_bytes / 1e6, budget / 1e6,
        )  # fmt: skip
        return replace(self, table_layout=chosen)

    def sharding(self, axis: int = 0) -> Sharding:
        """Sharding of an array of which each device has an equal part along an axis."""
        if self.mesh is None:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXIS))

    def put(self, stacked: np.ndarray) -> Shards:
        """Place an array (len(local), ...), one slice of the leading axis on each own shard."""
        if self.mesh is None:
            return [jax.device_put(part, self.devices[0]) for part in stacked]
        sharding = self.sharding()
        shape, first = (self.n_shards, *stacked.shape[1:]), self.local.start

        def part(at: Any) -> np.ndarray:
            return stacked[at[0].start - first : at[0].stop - first]

        return jax.make_array_from_callback(shape, sharding, part, dtype=stacked.dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Shards:
        """Place zeros, of this shape on each shard."""
        return self.put(np.broadcast_to(np.zeros((), dtype), (len(self.local), *shape)))

    def get(self, shards: Shards) -> np.ndarray:
        """Fetch what `put` placed: a writeable array (W, ...) on every process."""
        if self.mesh is None:
            return np.stack([np.asarray(part) for part in shards])
        if len(self.processes) == 1:
            return np.array(shards)
        # In pieces, since gathering puts a copy of each on every device.
        length = shards.shape[1]
        step = max(_PIECE_BYTES // max(shards.nbytes // max(length, 1), 1), 1)
        pieces = (shards[:, low : low + step] for low in range(0, length, step))
        return np.concatenate(
            [multihost_utils.process_allgather(piece, tiled=True) for piece in pieces], axis=1
        )

    def gather_processes(self, values: np.ndarray) -> np.ndarray:
        """Stack an array of the same shape from every process: (processes, ...)."""
        if len(self.processes) == 1:
            return values[None]
        with precision("float64"):
            return np.asarray(multihost_utils.process_allgather(values, tiled=False))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which collective failures become a RuntimeError."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if len(self.processes) == 1:
                raise
            message = (
                f"process {self.process} of {len(self.processes)} lost touch with another one, "
                "which has most likely ended: see its output, then restart all processes (with "
                "checkpoint_dir they resume from the last checkpoint)"
            )
            # Log at once: JAX's coordination service may end this process before the error is seen.
            log.error(message)
            raise RuntimeError(message) from error

    def agree(self, number: int) -> int:
        """Return the maximum of `number` over all processes."""
        return int(self.gather_processes(np.array(number, np.int64)).max())

    def whole(self, fn: Callable[..., Any], static: Any) -> Callable[..., Any]:
        """Compile fn(static, together, own, shared) -> (everywhere, held, own).

        On a mesh each device passes its part of `own`. On a single device it passes all shards of
        `own` at once, as lists; an array of table rows is made of such a list by `Together.join`.
        `held` is the result of `Together.hold`.
        """
        return programs.whole(fn, static, self.mesh, self.together)

    def each(self, fn: Callable[..., Any], static: Any) -> Callable[..., Any]:
        """Compile fn(static, out, own, held, shared) -> out for one shard; `out` is donated."""
        return programs.each(fn, static, self.mesh, self.together, self.platform)

    def run(
        self, passes: Sequence[tuple[Any, Any, Any]], out: Shards, held: Any, dtype: str
    ) -> Shards:
        """Run (program, own, shared) triples in turn over every shard's `out`."""
        if self.mesh is not None:
            calls = [(program, (out, own, held, shared)) for program, own, shared in passes]
            self.compile(calls, dtype)
            for program, own, shared in passes:
                out = program(out, own, held, shared)
            return out
        split = [(program, _unzip(own, self.n_shards), shared) for program, own, shared in passes]
        self.compile([(p, (out[0], owns[0], held, shared)) for p, owns, shared in split], dtype)

        def work(shard: int) -> Any:
            with precision(dtype):
                part = out[shard]
                for program, owns, shared in split:
                    part = program(part, owns[shard], held, shared)
                return part.block_until_ready()

        return self.threads(work, range(self.n_shards))

    def compile(self, calls: Iterable[tuple[Any, tuple[Any, ...]]], dtype: str) -> None:
        """Compile the programs that are new for these arguments, side by side."""
        programs.compile_new(calls, dtype, self.threads)

    def threads(
        self, work: Callable[[Any], Any], jobs: Sequence[Any], most: int | None = None
    ) -> list[Any]:
        """Map `work` over the jobs with as many threads as there are shards or cores, or `most`."""
        if most is None:
            most = self.n_shards if len(jobs) <= self.n_shards else max(self.n_shards, cores())
        return threads(work, jobs, most)


def _unzip(own: Any, n_shards: int) -> list[Any]:
    """A structure of lists of shards to a list of structures."""
    is_list = lambda node: isinstance(node, list)  # noqa: E731
    return [
        jax.tree.map(lambda parts, shard=shard: parts[shard], own, is_leaf=is_list)
        for shard in range(n_shards)
    ]


def workplace(
    devices: Any = None,
    num_threads: int = 0,
    use_gpu: bool | None = None,
    table_layout: str = "auto",
) -> Workplace:
    """Choose devices and work shards. Starts the JAX backend.

    Parameters
    ----------
    devices : None, int, sequence of jax.Device or jax.sharding.Mesh, default=None
        None uses all devices of the default backend; a number n uses the first n of them.
    num_threads : int, default=0
        Threads, and so work shards, of a single CPU device; 0 means all cores that the process may
        use. The number is limited to 16 or the number of cores, whichever is larger, because each
        shard costs dispatches and compilation.
    use_gpu : bool, optional
        True requires a GPU backend.
    table_layout : {"auto", "replicated", "sharded"}, default="auto"
        How several devices store the source table.

    Raises
    ------
    ValueError
        For an unknown layout, or devices that do not exist, repeat or are of another type.
    RuntimeError
        If `use_gpu` is True and JAX has no GPU, and in a process that was forked from one that
        had started JAX.
    """
    if table_layout not in LAYOUTS:
        raise ValueError(f"table_layout must be one of {LAYOUTS}, got {table_layout!r}")
    _refuse_after_fork()
    # Sort, so that the shards of a process are consecutive. Otherwise the given order is kept.
    chosen = tuple(sorted(_devices(devices), key=lambda device: device.process_index))
    if use_gpu and chosen[0].platform not in ("gpu", "cuda", "rocm"):
        raise RuntimeError(
            f"use_gpu=True needs a GPU, but JAX runs on {chosen[0].platform!r}: install JAX with "
            "GPU support (pip install 'jax[cuda13]') or leave use_gpu=None"
        )
    if len(chosen) > 1:
        return Workplace(chosen, len(chosen), table_layout)
    n_threads = thread_count(num_threads) if chosen[0].platform == "cpu" else 1
    return Workplace(chosen, n_threads, table_layout, n_threads)


def _refuse_after_fork() -> None:
    """Raise RuntimeError in a child that was forked after JAX had started in its parent."""
    global _started_in
    if _started_in is None:
        _started_in = os.getpid()
    if _started_in != os.getpid():
        raise RuntimeError(
            "this process was forked from one that had started JAX, whose threads it lacks, so "
            "that work on devices would never end. Start processes by "
            "multiprocessing.get_context('spawn'), or fork before JAX is used. Calls for single "
            "users or items work here, and so do calls on a CPU that do not need JAX"
        )


def _memory(device: jax.Device) -> int:
    """Bytes of a device's memory; CPU devices share that of the host."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return memory_bytes() // len(jax.local_devices(backend=device.platform))


def _devices(devices: Any) -> tuple[jax.Device, ...]:
    if isinstance(devices, Mesh):
        devices = list(devices.devices.flat)
    if devices is None:
        return tuple(jax.devices())
    is_number = isinstance(devices, (int, np.integer)) and not isinstance(devices, bool)
    if is_number:
        have = jax.devices()
        if not 1 <= devices <= len(have):
            raise ValueError(
                f"devices={devices} asked for, but JAX has {len(have)} {have[0].platform} "
                "device(s); on CPU set jax_num_cpu_devices before the first computation"
            )
        return tuple(have[:devices])
    chosen = tuple(devices) if isinstance(devices, Iterable) else ()
    if not chosen or not all(isinstance(device, jax.Device) for device in chosen):
        raise ValueError(
            "devices must be None, a whole number, a list of jax devices (as from jax.devices()) "
            f"or a jax.sharding.Mesh, got {devices!r}"
        )
    _check_usable(chosen)
    return chosen


def _check_usable(devices: tuple[jax.Device, ...]) -> None:
    """Raise ValueError if devices repeat, differ in platform, or all belong to other processes."""
    if len(set(devices)) < len(devices):
        raise ValueError(f"devices must differ from each other, got {list(devices)}")
    platforms = sorted({device.platform for device in devices})
    if len(platforms) > 1:
        raise ValueError(f"devices must be of one platform, got some of each of {platforms}")
    process = devices[0].client.process_index()
    if all(device.process_index != process for device in devices):
        raise ValueError(
            f"devices must include one of this process, number {process}, got {list(devices)}: "
            "every process passes the same devices, and one that has none of them cannot take part"
        )
