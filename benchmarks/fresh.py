"""Pieces of benchmarks that need a process of their own: ``python fresh.py PIECE '{...}'``.

Imports nothing but the standard library before the clock starts; prints one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # implicit asks for it, and is slower without


def model_class(library: str, cache: str | None = None) -> Any:
    """Import a library and return its class."""
    if library == "implicit":
        from implicit.cpu.als import AlternatingLeastSquares

        return AlternatingLeastSquares
    import tpu_als

    if cache:
        tpu_als.enable_compilation_cache(cache)
    return tpu_als.TPUAlternatingLeastSquares


def whole_job(
    library: str,
    file: str,
    fit: dict[str, Any],
    cache: str | None = None,
    empty_in: str | None = None,
) -> dict[str, float]:
    """Import, fit, recommend. Reading the file is outside of the time.

    With `empty_in`, a new directory in it is numba's cache, so that the loops are compiled.
    """
    if empty_in is not None:
        os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(dir=empty_in)
    started = time.perf_counter()
    made = model_class(library, cache)(**fit)
    imported = time.perf_counter()
    matrix = read(file)
    ready = time.perf_counter()
    made.fit(matrix, show_progress=False)
    fitted = time.perf_counter()
    made.recommend(0, matrix[0])
    done = time.perf_counter()
    return {
        "import_s": imported - started,
        "fit_s": fitted - ready,
        "recommend_s": done - fitted,
        "total_s": done - ready + imported - started,
    }


def read(file: str) -> Any:
    """A CSR matrix."""
    from scipy import sparse

    return sparse.load_npz(file).tocsr()


def import_package() -> dict[str, float]:
    """Seconds to import the package."""
    started = time.perf_counter()
    import tpu_als  # noqa: F401

    return {"import_s": time.perf_counter() - started}


def import_floor() -> dict[str, float]:
    """Seconds to import what the package cannot do without."""
    started = time.perf_counter()
    import sklearn.base  # noqa: F401

    return {"import_s": time.perf_counter() - started}


def programs(file: str, fit: dict[str, Any]) -> dict[str, float]:
    """How many XLA programs the first fit compiles, which is none on the CPU backend."""
    import jax

    events: list[float] = []

    def record(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(record)
    matrix, made = read(file), model_class("tpu_als")(**fit)
    started = time.perf_counter()
    made.fit(matrix, show_progress=False)
    return {
        "programs": len(events),
        "compile_s_summed": sum(events),
        "fit_s": time.perf_counter() - started,
    }


def memory(library: str, file: str, fit: dict[str, Any]) -> dict[str, float]:
    """Bytes that a fit needs at its peak, beyond the imported library and the matrix."""
    made, matrix = model_class(library)(**fit), read(file)
    if library == "tpu_als":
        start_backend()
    before = resident()
    peak = Peak()
    made.fit(matrix, show_progress=False)
    held = float(made.user_factors.nbytes + made.item_factors.nbytes)
    high = peak.stop()
    return {
        "peak_bytes": high,
        "before_bytes": before,
        "fit_bytes": high - before,
        "matrix_bytes": float(matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes),
        "tables_bytes": held,
    }


def start_backend() -> None:
    """Load what the backend of a fit needs, as implicit's library is loaded by its import.

    This is numba for the CPU backend, and JAX with its devices for XLA's.
    """
    from tpu_als.engine import backends

    backends.choose(backends.Wishes())


def write_shards(
    path: str, shape: tuple[int, int, int], n_blocks: int, n_shards: int
) -> dict[str, float]:
    """Seconds and bytes to write a seeded matrix, made in blocks of users."""
    from tpu_als import datasets, shards

    n_users, n_items, n_entries = (number // part for number, part in zip(
        shape, (n_blocks, 1, n_blocks), strict=True
    ))  # fmt: skip
    before, peak, started = resident(), Peak(), time.perf_counter()
    blocks = (
        datasets.power_law(n_users, n_items, n_entries, random_state=block)
        for block in range(n_blocks)
    )
    shards.write_shards(blocks, path, n_shards=n_shards)
    taken = time.perf_counter() - started
    files = sum(file.stat().st_size for file in Path(path).rglob("*.parquet"))
    return {
        "peak_bytes": peak.stop(), "before_bytes": before, "seconds": taken, "file_bytes": files
    }  # fmt: skip


def fit_shards(path: str, fit: dict[str, Any]) -> dict[str, float]:
    """Seconds and bytes to fit from a directory of shards."""
    from tpu_als.shards import open_shards

    made, matrix = model_class("tpu_als")(**fit), open_shards(path)
    start_backend()
    before, peak, started = resident(), Peak(), time.perf_counter()
    made.fit(matrix, show_progress=False)
    taken, steps = time.perf_counter() - started, made.history_["seconds"]
    return {
        "peak_bytes": peak.stop(), "before_bytes": before, "seconds": taken,
        "compile_and_first_s": steps[0], "iteration_s": min(steps[1:]),
        "layout_s": taken - sum(steps),
    }  # fmt: skip


def resident() -> float:
    """Bytes of memory the process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return float(pages * resource.getpagesize())


class Peak:
    """Watches the resident bytes, a hundred times a second."""

    def __init__(self) -> None:
        self._high, self._over = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._high = max(self._high, resident())

    def stop(self) -> float:
        """End, and return the highest value seen."""
        self._over.set()
        self._thread.join()
        return max(self._high, resident())


PIECES: dict[str, Any] = {
    "whole_job": whole_job,
    "import_package": import_package,
    "import_floor": import_floor,
    "programs": programs,
    "memory": memory,
    "write_shards": write_shards,
    "fit_shards": fit_shards,
}

if __name__ == "__main__":
    print(json.dumps(PIECES[sys.argv[1]](**json.loads(sys.argv[2]))))
