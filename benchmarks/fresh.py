"""Pieces of benchmarks that need a new process: ``python fresh.py PIECE '{...}'``.

The script imports only the standard library before the clock starts. It prints one JSON object.
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

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # implicit warns, and is slower, without it


def model_class(library: str, cache: str | None = None) -> Any:
    """Import a library and return its class."""
    if library == "implicit":
        from implicit.cpu.als import AlternatingLeastSquares

        return AlternatingLeastSquares
    import tpu_als

    if cache:
        tpu_als.enable_compilation_cache(cache)
    return tpu_als.TPUAlternatingLeastSquares


def full_job(
    library: str,
    file: str,
    fit: dict[str, Any],
    cache: str | None = None,
    empty_in: str | None = None,
) -> dict[str, float]:
    """Time import, fit and recommendation; the reading of the file is not timed.

    With `empty_in`, numba's cache is a new directory in it, so the loops are compiled.
    """
    if empty_in is not None:
        os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(dir=empty_in)
    started = time.perf_counter()
    model = model_class(library, cache)(**fit)
    imported = time.perf_counter()
    matrix = read(file)
    ready = time.perf_counter()
    model.fit(matrix, show_progress=False)
    fitted = time.perf_counter()
    model.recommend(0, matrix[0])
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
    """Seconds to import scikit-learn's base classes, which the estimator needs."""
    started = time.perf_counter()
    import sklearn.base  # noqa: F401

    return {"import_s": time.perf_counter() - started}


def serve(library: str, file: str) -> dict[str, float]:
    """Seconds and peak bytes of import, load of a model file, and one recommendation."""
    started = time.perf_counter()
    if library == "ServedModel":
        import tpu_als

        kind: Any = tpu_als.ServedModel
    else:
        kind = model_class(library)
    model = kind.load(file)
    row = history(len(model.item_factors))
    model.recommend(0, row)
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "peak_bytes": 1024.0 * int(peak)}


def history(n_items: int) -> Any:
    """Row of a user with 50 entries."""
    import numpy as np
    from scipy import sparse

    row = np.zeros((1, n_items), np.float32)
    row[0, :: n_items // 50] = 1
    return sparse.csr_matrix(row)


def programs(file: str, fit: dict[str, Any]) -> dict[str, float]:
    """Number of XLA programs that the first fit compiles; 0 on the CPU backend."""
    import jax

    events: list[float] = []

    def record(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(record)
    matrix, model = read(file), model_class("tpu_als")(**fit)
    started = time.perf_counter()
    model.fit(matrix, show_progress=False)
    return {
        "programs": len(events),
        "compile_s_summed": sum(events),
        "fit_s": time.perf_counter() - started,
    }


def memory(library: str, file: str, fit: dict[str, Any]) -> dict[str, float]:
    """Peak bytes of a fit, in addition to the imported library and the matrix."""
    model, matrix = model_class(library)(**fit), read(file)
    if library == "tpu_als":
        start_backend()
    before = resident()
    peak = Peak()
    model.fit(matrix, show_progress=False)
    tables = float(model.user_factors.nbytes + model.item_factors.nbytes)
    high = peak.stop()
    return {
        "peak_bytes": high,
        "before_bytes": before,
        "fit_bytes": high - before,
        "matrix_bytes": float(matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes),
        "tables_bytes": tables,
    }


def start_backend() -> None:
    """Load numba (CPU backend) or start JAX (XLA backend).

    implicit loads its compiled library when it is imported.
    """
    from tpu_als.engine import choice

    choice.choose(choice.Wishes())


def write_shards(
    path: str, shape: tuple[int, int, int], n_blocks: int, n_shards: int
) -> dict[str, float]:
    """Seconds and bytes to write a seeded matrix, which is model in blocks of users."""
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

    model, matrix = model_class("tpu_als")(**fit), open_shards(path)
    start_backend()
    before, peak, started = resident(), Peak(), time.perf_counter()
    model.fit(matrix, show_progress=False)
    taken, steps = time.perf_counter() - started, model.history_["seconds"]
    return {
        "peak_bytes": peak.stop(), "before_bytes": before, "seconds": taken,
        "compile_and_first_s": steps[0], "iteration_s": min(steps[1:]),
        "layout_s": taken - sum(steps),
    }  # fmt: skip


def resident() -> float:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return float(pages * resource.getpagesize())


class Peak:
    """Samples the resident bytes a hundred times a second."""

    def __init__(self) -> None:
        self._high, self._stopped = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.01):
            self._high = max(self._high, resident())

    def stop(self) -> float:
        """Stop, and return the highest value."""
        self._stopped.set()
        self._thread.join()
        return max(self._high, resident())


PIECES: dict[str, Any] = {
    "full_job": full_job,
    "import_package": import_package,
    "import_floor": import_floor,
    "serve": serve,
    "programs": programs,
    "memory": memory,
    "write_shards": write_shards,
    "fit_shards": fit_shards,
}

if __name__ == "__main__":
    print(json.dumps(PIECES[sys.argv[1]](**json.loads(sys.argv[2]))))
