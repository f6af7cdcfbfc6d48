"""Devices, meshes, work shards; copies between host and devices.

Only this file calls JAX's functions for several processes.

A *work shard* is an equal part of a table and of its cells. If there are several devices, each has
one shard, and programs run under `shard_map`. On a single device a thread pool calls the same
compiled program for each shard. A CPU device runs a loop on one core only; the thread pool uses all
cores, without a global JAX setting.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from numpy.typing import DTypeLike

from tpu_als.engine.xla import programs
from tpu_als.engine.xla.programs import (
    AXIS,
    Call,
    Collectives,
    Program,
    PyTree,
    ShardPass,
    Shards,
    precision,
)
from tpu_als.host import cores, memory_bytes, thread_count, threads
from tpu_als.parameters import LAYOUTS

__all__ = [
    "AXIS",
    "LAYOUTS",
    "Collectives",
    "DeviceMesh",
    "ShardPass",
    "Shards",
    "device_mesh",
    "precision",
]

log = logging.getLogger("tpu_als")
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
_REPLICATED_SHARE = 1 / 8  # of a device's memory that a copy of the source table may take
_started_in: int | None = None  # id of the process that first called `device_mesh`
_PIECE_BYTES = 1 << 26  # of a table fetched at once from several processes


@dataclass(frozen=True)
class DeviceMesh:
    """The devices that compute, and how arrays are divided among them.

    Attributes
    ----------
    devices : tuple of jax.Device
        The devices; if there are several, each is one work shard.
    n_shards : int
        Work shards W.
    table_layout : {"auto", "replicated", "sharded"}
        Whether each device has the whole source table for a half-epoch, or its own part and the
        rows that the current chunks need.
    n_threads : int
        Threads of a single CPU device.
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
    def jax_mesh(self) -> Mesh | None:
        """JAX's mesh of several devices, or None for a single one."""
        return Mesh(np.array(self.devices), (AXIS,)) if len(self.devices) > 1 else None

    @property
    def collectives(self) -> Collectives:
        """Operations across shards of the programs on this mesh."""
        if self.jax_mesh is None:
            return Collectives()
        return Collectives(AXIS, self.table_layout == "sharded")

    @functools.cached_property
    def processes(self) -> tuple[int, ...]:
        """Numbers of the processes whose devices these are, in the shards' order."""
        return tuple(dict.fromkeys(device.process_index for device in self.devices))

    @property
    def process(self) -> int:
        """Index of this process in `processes`."""
        return self.processes.index(self.devices[0].client.process_index())

    @property
    def is_complete(self) -> bool:
        """Whether every process of the job has devices of it."""
        return len(self.processes) == jax.process_count()

    @property
    def local_shards(self) -> range:
        """The shards of this process."""
        count = self.n_shards // len(self.processes)
        return range(self.process * count, (self.process + 1) * count)

    @functools.cached_property
    def alone(self) -> DeviceMesh:
        """The mesh of this process's devices only."""
        if len(self.processes) == 1:
            return self
        devices = tuple(d for d in self.devices if d.process_index == self.processes[self.process])
        return replace(self, devices=devices, n_shards=len(devices))

    @property
    def as_threads(self) -> DeviceMesh:
        """One CPU device that has all rows, with at least as many threads as there are devices."""
        n_threads = max(self.n_threads, len(self.devices))
        return replace(self, devices=self.devices[:1], n_shards=1, n_threads=n_threads)

    def with_layout(self, table_bytes: int) -> DeviceMesh:
        """Replace "auto" by a layout for source tables of `table_bytes` bytes."""
        if self.table_layout != "auto":
            return self
        # A process can query its own devices only, and all processes must choose the same layout.
        memory = -self.agree(-_memory(self.devices[self.local_shards.start]))
        budget = _REPLICATED_SHARE * memory
        chosen = "replicated" if self.jax_mesh is None or table_bytes <= budget else "sharded"
        log.info(
            "table_layout: %s, for a table of %.1f MB and a budget of %.1f MB a device",
            chosen, table_bytes / 1e6, budget / 1e6,
        )  # fmt: skip
        return replace(self, table_layout=chosen)

    def sharding(self, axis: int = 0) -> Sharding:
        """Sharding of an array of which each device has an equal part along an axis."""
        if self.jax_mesh is None:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.jax_mesh, PartitionSpec(*[None] * axis, AXIS))

    def put(self, stacked: np.ndarray) -> Shards:
        """Place an array (len(local_shards), ...): one slice of the leading axis on each shard."""
        if self.jax_mesh is None:
            return [jax.device_put(part, self.devices[0]) for part in stacked]
        sharding = self.sharding()
        shape, first = (self.n_shards, *stacked.shape[1:]), self.local_shards.start

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return stacked[index[0].start - first : index[0].stop - first]

        return jax.make_array_from_callback(shape, sharding, read, dtype=stacked.dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Shards:
        """Place zeros, of this shape on each shard."""
        return self.put(np.broadcast_to(np.zeros((), dtype), (len(self.local_shards), *shape)))

    def get(self, shards: Shards) -> np.ndarray:
        """Copy shards to the host: a writeable array (W, ...) on every process."""
        if isinstance(shards, list):
            return np.stack([np.asarray(part) for part in shards])
        if len(self.processes) == 1:
            return np.array(shards)
        # In pieces, because gathering makes a copy of each piece on every device.
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

    def all_shards_program(
        self, fn: Callable[..., PyTree], static: Hashable, out_specs: PyTree
    ) -> Program:
        """Compile fn(static, collectives, sharded, replicated) for all shards at once.

        With several devices the result runs on each of them, with its part of `sharded`. On a
        single device `fn` receives all shards of `sharded`, as lists.

        Parameters
        ----------
        fn : callable
            Returns a pytree, such as a named tuple.
        static : hashable
            The static argument; a new value compiles a new program.
        out_specs : pytree of PartitionSpec
            `SHARDED` or `REPLICATED` for each output of `fn`; a prefix of its structure. Outputs
            that are sharded have the form of `Shards`.

        Returns
        -------
        callable
            A function of `sharded` and `replicated`.
        """
        return programs.all_shards_program(fn, static, out_specs, self.jax_mesh, self.collectives)

    @property
    def exchanges_in_background(self) -> bool:
        """See `programs.exchanges_in_background`."""
        return programs.exchanges_in_background(self.jax_mesh)

    def per_shard_program(self, fn: Callable[..., PyTree], static: Hashable) -> Program:
        """Compile fn(static, out, sharded, source_table, replicated) -> out for one shard.

        The buffer of `out` is donated. `source_table` is the result of
        `Collectives.source_table`. `run` calls the program.
        """
        return programs.per_shard_program(
            fn, static, self.jax_mesh, self.collectives, self.platform
        )

    def run(
        self, passes: Sequence[ShardPass], out: Shards, source_table: Array, dtype: str
    ) -> Shards:
        """Run programs of `per_shard_program` in turn over every shard of `out`."""
        if self.jax_mesh is not None:
            calls = [(p.program, (out, p.sharded, source_table, p.replicated)) for p in passes]
            self.compile(calls, dtype)
            for program, sharded, replicated in passes:
                out = program(out, sharded, source_table, replicated)
            return out
        split = [(p.program, _unzip(p.sharded, self.n_shards), p.replicated) for p in passes]
        self.compile([(p, (out[0], parts[0], source_table, r)) for p, parts, r in split], dtype)

        def work(shard: int) -> Array:
            with precision(dtype):
                part = out[shard]
                for program, parts, replicated in split:
                    part = program(part, parts[shard], source_table, replicated)
                return part.block_until_ready()

        return self.threads(work, range(self.n_shards))

    def compile(self, calls: Iterable[Call], dtype: str) -> None:
        """Compile the programs that are new for these arguments, in parallel."""
        programs.CACHE.compile_new(calls, dtype, self.threads)

    def threads(
        self, work: Callable[[_Job], _Result], jobs: Sequence[_Job], most: int | None = None
    ) -> list[_Result]:
        """Map `work` over the jobs with as many threads as there are shards or cores, or `most`."""
        if most is None:
            most = self.n_shards if len(jobs) <= self.n_shards else max(self.n_shards, cores())
        return threads(work, jobs, most)


def _unzip(sharded: PyTree, n_shards: int) -> list[PyTree]:
    """Convert a structure of lists of shards to a list of structures."""
    is_list = lambda node: isinstance(node, list)  # noqa: E731
    return [
        jax.tree.map(lambda parts, shard=shard: parts[shard], sharded, is_leaf=is_list)
        for shard in range(n_shards)
    ]


def device_mesh(
    devices: object = None,
    num_threads: int = 0,
    use_gpu: bool | None = None,
    table_layout: str = "auto",
) -> DeviceMesh:
    """Choose devices and work shards; this starts JAX's backend.

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
        return DeviceMesh(chosen, len(chosen), table_layout)
    n_threads = thread_count(num_threads) if chosen[0].platform == "cpu" else 1
    return DeviceMesh(chosen, n_threads, table_layout, n_threads)


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
    """Bytes of a device's memory; CPU devices share the host's memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return memory_bytes() // len(jax.local_devices(backend=device.platform))


def _devices(devices: object) -> tuple[jax.Device, ...]:
    if isinstance(devices, Mesh):
        devices = list(devices.devices.flat)
    if devices is None:
        return tuple(jax.devices())
    if isinstance(devices, (int, np.integer)) and not isinstance(devices, bool):
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
