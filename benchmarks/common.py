"""Shared by the benchmarks: arguments, data, alternating timing, and one JSON object per line."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # implicit warns, and is slower, without it

import jax
import numpy as np
from scipy import sparse

ML1M = "ml1m_rand80_train.npz"
ML20M_SHAPE = (138_493, 26_744, 20_000_263)
QUICK_SHAPE = (943, 1_682, 20_000)
_PACKAGES = (
    "tpu-als", "jax", "jaxlib", "numba", "numpy", "scipy", "scikit-learn", "implicit", "irspack",
    "cmfrec",
)  # fmt: skip


def parser(description: str | None, datasets: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """Make a parser with the common options, and with `--dataset` if `datasets` are given."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--quick", action="store_true", help="a test on small data")
    made.add_argument(
        "--data", type=Path, default=_data_directory(), help=f"directory of {ML1M} (TPU_ALS_DATA)"
    )
    made.add_argument("--repeats", type=int, default=5, help="timings; the median is reported")
    if datasets:
        made.add_argument("--dataset", choices=datasets, default=datasets[0])
    return made


def _data_directory() -> Path | None:
    named = os.environ.get("TPU_ALS_DATA")
    return Path(named) if named else None


def load(args: argparse.Namespace) -> tuple[str, sparse.csr_matrix]:
    """Name and matrix of the data set that the arguments choose."""
    if args.quick:
        return "power-law-quick", power_law(*QUICK_SHAPE)
    if args.dataset == "power-law":
        return "power-law-20m", power_law(*ML20M_SHAPE)
    if args.data is None or not (args.data / ML1M).exists():
        sys.exit(f"no {ML1M} in --data {args.data}: pass its directory, or --dataset power-law")
    return "ml1m-80", sparse.load_npz(args.data / ML1M).tocsr().astype(np.float32)


def power_law(n_users: int, n_items: int, n_entries: int, seed: int = 0) -> sparse.csr_matrix:
    """Binary matrix (n_users, n_items), float32, with power-law rows and columns."""
    from tpu_als.datasets import power_law as generate

    return generate(n_users, n_items, n_entries, random_state=seed)


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Device, cores and versions. Starts the JAX backend."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "n_devices": len(devices),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def emit(**fields: Any) -> None:
    """Print one JSON object on one line, with floats rounded to six digits."""
    print(json.dumps(_rounded(fields)), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}")
    return int(value) if isinstance(value, np.integer) else value


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def peak_gigabytes() -> float | None:
    """Highest resident size since the last call, and start again; None except on Linux."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not refs.exists():
        return None
    high = next(x for x in status.read_text(encoding="ascii").splitlines() if "VmHWM" in x)
    refs.write_text("5", encoding="ascii")  # resets VmHWM
    return int(high.split()[1]) * 1024 / 1e9


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, after one untimed round. Every second round is reversed."""
    names = list(calls)
    for name in names:
        calls[name]()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            taken[name].append(seconds(calls[name]))
    return {name: statistics.median(values) for name, values in taken.items()}


def fresh(piece: str, **arguments: Any) -> Any:
    """Run a piece of `fresh.py` in a new process, and return what it prints."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fresh.py"), piece, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def installed(package: str) -> list[str]:
    """The package's name in a list, or an empty list."""
    return [package] if importlib.util.find_spec(package) else []
