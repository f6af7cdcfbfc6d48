"""The choice of a backend: a CPU's loops without JAX, or XLA's programs.

`choose` imports JAX only if an argument needs it, if numba is needed and not available, or if JAX
may have an accelerator or other processes. JAX then reports its devices.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.metadata
import importlib.util
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tpu_als.engine.backends import Backend
from tpu_als.engine.cpu import compiled
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.host import thread_count
from tpu_als.parameters import LAYOUTS

log = logging.getLogger("tpu_als")

_PCI_VENDORS = "/sys/bus/pci/devices/*/vendor"
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # v2 to tpu7x


@dataclass(frozen=True)
class Wishes:
    """A caller's requirements for the backend; the attributes are the estimator's parameters."""

    devices: object = None
    num_threads: int = 0
    use_gpu: bool | None = None
    table_layout: str = "auto"
    use_native: bool = True


def choose(wishes: Wishes, linear_solver: str | None = "cg") -> Backend:
    """Choose a backend.

    Parameters
    ----------
    wishes : Wishes
        Devices and threads.
    linear_solver : str or None, default="cg"
        How `fit` solves rows, for which the CPU backend needs numba. None means that the backend is
        not for a fit, but to rank tables and to solve rows exactly.

    Raises
    ------
    ValueError
        For an unknown layout, or devices that do not exist, repeat or are of another type.
    RuntimeError
        If `use_gpu` is True and JAX has no GPU, and in a process that was forked from one in which
        XLA has started.
    """
    if wishes.table_layout not in LAYOUTS:
        raise ValueError(f"table_layout must be one of {LAYOUTS}, got {wishes.table_layout!r}")
    fits = wishes.use_native and wishes.table_layout == "auto"
    if linear_solver is not None:
        fits = fits and compiled.is_available()
    is_plain = wishes.devices is None or (wishes.devices == 1 and wishes.devices is not True)
    if fits and is_plain and not wishes.use_gpu and not may_have_accelerator():
        return CpuBackend(thread_count(wishes.num_threads))
    from tpu_als.engine.xla.backend import XlaBackend
    from tpu_als.engine.xla.mesh import device_mesh

    mesh = device_mesh(wishes.devices, wishes.num_threads, wishes.use_gpu, wishes.table_layout)
    if fits and mesh.platform == "cpu" and len(mesh.processes) == 1:
        return CpuBackend(mesh.as_threads.n_threads)
    return XlaBackend(mesh)


def may_have_accelerator() -> bool:
    """Whether JAX may have other devices than this machine's CPU, or other processes.

    This does not import JAX: plugins for GPUs and TPUs are separate packages. The environment
    variable JAX_PLATFORMS, and JAX's option of that name if JAX is imported already, can exclude
    them.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        return True
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if jax is not None:
        platforms = jax.config.jax_platforms or platforms
    if platforms:
        return platforms.split(",")[0].strip() != "cpu"
    if not _has_plugin():
        _tell_of_accelerator()
        return False
    return True


@functools.cache
def _tell_of_accelerator() -> None:
    """Log once that an accelerator is not used because JAX has no plugin for it."""
    for name, package, is_there in (
        ("an NVIDIA GPU", "pip install 'jax[cuda13]'", os.path.exists("/dev/nvidiactl")),
        ("an AMD GPU", "install JAX for ROCm", os.path.exists("/dev/kfd")),
        ("a TPU", "pip install 'jax[tpu]'", _has_tpu()),
    ):
        if is_there:
            log.warning(
                "this machine has %s, but JAX's plugin for it is not installed, so that the CPU is "
                "used: %s, or set JAX_PLATFORMS=cpu to hide this",
                name,
                package,
            )


def _has_tpu() -> bool:
    """Whether a PCI device is a TPU. Other devices of its vendor are not, such as network cards."""
    for vendor in glob.glob(_PCI_VENDORS):
        with contextlib.suppress(OSError):
            device = Path(vendor).with_name("device")
            if Path(vendor).read_text().strip() == _GOOGLE and device.read_text().strip() in _TPUS:
                return True
    return False


@functools.cache
def _has_plugin() -> bool:
    """Whether a plugin for JAX is installed: a package in ``jax_plugins``, or ``libtpu``."""
    libtpu = importlib.util.find_spec("libtpu")
    if libtpu is not None and libtpu.origin is not None:  # else a folder of that name
        return True
    plugins = importlib.util.find_spec("jax_plugins")
    folders = () if plugins is None else plugins.submodule_search_locations or ()
    if any(name != "__pycache__" for folder in folders for name in os.listdir(folder)):
        return True
    return bool(importlib.metadata.entry_points(group="jax_plugins"))
