"""Devices, meshes, work shards; host to device and back. The only file that knows of processes.

A *work shard* is an equal part of a table and of its cells. On a mesh each device has one, and
programs run under `shard_map`. On a single device the shards are worked on by a thread pool that
calls the same compiled program: a CPU device runs a loop on one core only, so this is what brings
all cores in without any global JAX setting.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "shards"
LAYOUTS = ("auto", "replicated", "sharded")
# On a mesh one array with a leading axis of shards; on a single device a list of one array each.
Shards = Any

_compiled: set[Any] = set()


@dataclass(frozen=True)
class Workplace:
    """Where the work is done.

    Attributes
    ----------
    devices : tuple of jax.Device
        The devices, one work shard each where there are several.
    n_shards : int
        Work shards W.
    table_layout : {"auto", "replicated", "sharded"}
        How the source table stands on the devices during a half-epoch.
    """

    devices: tuple[jax.Device, ...]
    n_shards: int
    table_layout: str

    @property
    def platform(self) -> str:
        """The backend: "cpu", "gpu" or "tpu"."""
        return self.devices[0].platform

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """The mesh of several devices, or None for a single one."""
        return Mesh(np.array(self.devices), (AXIS,)) if len(self.devices) > 1 else None

    def put(self, stacked: np.ndarray) -> Shards:
        """Place an array (W, ...), one slice of the leading axis on each shard."""
        if self.mesh is None:
            return [jax.device_put(part, self.devices[0]) for part in stacked]
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.make_array_from_callback(stacked.shape, sharding, lambda at: stacked[at])

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Shards:
        """Place zeros of a shape (W, ...)."""
        return self.put(np.broadcast_to(np.zeros((), dtype), shape))

    def get(self, shards: Shards) -> np.ndarray:
        """Fetch what `put` placed: a writeable array (W, ...) on every process."""
        if self.mesh is None:
            return np.stack([np.asarray(part) for part in shards])
        if jax.process_count() > 1:
            return np.array(multihost_utils.process_allgather(shards, tiled=True))
        return np.array(shards)

    def whole(self, fn: Callable[..., Any], static: Any) -> Callable[..., Any]:
        """Compile fn(static, table (W * S, K), *rest), which sees the table of all shards at once.

        It returns a pair: what all devices shall have, and what is placed as by `put`.
        """
        return _whole(fn, static, self.mesh)

    def each(self, fn: Callable[..., Any], static: Any) -> Callable[..., Any]:
        """Compile fn(static, out, own, shared) -> out for one shard; `out` is donated."""
        return _each(fn, static, self.mesh)

    def run(self, programs: Sequence[tuple[Any, Any]], out: Shards, own: Any, dtype: str) -> Shards:
        """Run (program, shared) pairs in turn over every shard's `out` and `own`."""
        if self.mesh is not None:
            self.compile([(program, (out, own, shared)) for program, shared in programs], dtype)
            for program, shared in programs:
                out = program(out, own, shared)
            return out
        owns = _unzip(own, self.n_shards)
        self.compile([(program, (out[0], owns[0], shared)) for program, shared in programs], dtype)

        def work(shard: int) -> Any:
            with precision(dtype):
                part = out[shard]
                for program, shared in programs:
                    part = program(part, owns[shard], shared)
                return part.block_until_ready()

        return self.threads(work, range(self.n_shards))

    def compile(self, calls: Iterable[tuple[Any, tuple[Any, ...]]], dtype: str) -> None:
        """Compile the programs that are new for these arguments, side by side."""
        new = {}
        for program, args in calls:
            leaves, structure = jax.tree.flatten(args)
            key = (program, structure, tuple((a.shape, a.dtype) for a in leaves))
            if key not in _compiled:
                new[key] = (program, args)

        def work(key: Any) -> None:
            with precision(dtype):
                program, args = new[key]
                program.lower(*args).compile()
            _compiled.add(key)

        self.threads(work, list(new))

    def threads(self, work: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
        """Map `work` over the jobs with as many threads as there are shards or cores."""
        n_threads = min(len(jobs), max(self.n_shards, _cores()))
        if n_threads < 2:
            return [work(job) for job in jobs]
        with ThreadPoolExecutor(n_threads) as pool:
            return list(pool.map(work, jobs))


def _unzip(own: Any, n_shards: int) -> list[Any]:
    """A structure of lists of shards to a list of structures."""
    is_list = lambda node: isinstance(node, list)  # noqa: E731
    return [
        jax.tree.map(lambda parts, shard=shard: parts[shard], own, is_leaf=is_list)
        for shard in range(n_shards)
    ]


@functools.cache
def _whole(fn: Callable[..., Any], static: Any, mesh: Mesh | None) -> Callable[..., Any]:
    def joined(table: Any, *rest: Any) -> Any:
        table = jnp.concatenate(table) if mesh is None else table.reshape(-1, *table.shape[2:])
        return fn(static, table, *rest)

    if mesh is None:
        return jax.jit(joined)
    everywhere, own = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.jit(joined, out_shardings=(everywhere, own))


@functools.cache
def _each(fn: Callable[..., Any], static: Any, mesh: Mesh | None) -> Callable[..., Any]:
    if mesh is None:
        return jax.jit(
            functools.partial(fn, static), donate_argnums=0, compiler_options=_compiler_options()
        )

    def local(out: Any, own: Any, shared: Any) -> Any:
        return fn(static, out[0], jax.tree.map(lambda part: part[0], own), shared)[None]

    own, everywhere = PartitionSpec(AXIS), PartitionSpec()
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(own, own, everywhere), out_specs=own, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0, compiler_options=_compiler_options())


def _compiler_options() -> dict[str, Any] | None:
    """Options for the loops over chunks on CPU, where LLVM's level 3 makes slower code than 2."""
    return {"xla_backend_optimization_level": 2} if jax.default_backend() == "cpu" else None


def precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Scope in which arrays of this dtype exist: 64-bit types are off in JAX by default."""
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


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
        None takes all devices of the default backend, a number the first so many.
    num_threads : int, default=0
        Threads, and so work shards, of a single CPU device; 0 means all cores.
    use_gpu : bool, optional
        True requires a GPU backend.
    table_layout : {"auto", "replicated", "sharded"}, default="auto"
        How the source table stands on several devices.

    Raises
    ------
    ValueError
        For an unknown layout, or more devices than there are.
    RuntimeError
        Where `use_gpu` is True and JAX has no GPU.
    """
    if table_layout not in LAYOUTS:
        raise ValueError(f"table_layout must be one of {LAYOUTS}, got {table_layout!r}")
    chosen = _devices(devices)
    if use_gpu and chosen[0].platform not in ("gpu", "cuda", "rocm"):
        raise RuntimeError(
            f"use_gpu=True needs a GPU, but JAX runs on {chosen[0].platform!r}: install JAX with "
            "GPU support (pip install 'jax[cuda13]') or leave use_gpu=None"
        )
    if len(chosen) > 1:
        return Workplace(chosen, len(chosen), table_layout)
    n_shards = 1
    if chosen[0].platform == "cpu":
        n_shards = num_threads if num_threads > 0 else _cores()
    return Workplace(chosen, n_shards, table_layout)


def enable_compilation_cache(path: str | os.PathLike[str]) -> None:
    """Keep compiled programs in a directory, so that later processes need not compile them again.

    Sets JAX's own options for the whole process, and so for all JAX code in it; the package never
    does this by itself. Call it before the first fit. A file is read again only by the same
    version of JAX on the same kind of device.

    Parameters
    ----------
    path : path-like
        The directory; made where it does not exist.
    """
    os.makedirs(path, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    # Ours are many small programs; by default only slow and large ones are kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices(devices: Any) -> tuple[jax.Device, ...]:
    if isinstance(devices, Mesh):
        return tuple(devices.devices.flat)
    if devices is None:
        return tuple(jax.devices())
    if isinstance(devices, (int, np.integer)):
        have = jax.devices()
        if not 1 <= devices <= len(have):
            raise ValueError(
                f"devices={devices} asked for, but JAX has {len(have)} {have[0].platform} "
                "device(s); on CPU set jax_num_cpu_devices before the first computation"
            )
        return tuple(have[:devices])
    chosen = tuple(devices)
    if not chosen or not all(isinstance(device, jax.Device) for device in chosen):
        raise ValueError(f"devices must be None, a number, jax devices or a Mesh, got {devices!r}")
    return chosen
