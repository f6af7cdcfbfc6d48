"""Start several cooperating processes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def start(
    arguments: Sequence[str], count: int, devices: int = 1, script: str = "worker.py"
) -> list[subprocess.Popen[str]]:
    """Start a script of this folder in `count` processes with `devices` devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"PORT": port, "PROCESSES": count, "DEVICES": devices, "OPENBLAS_NUM_THREADS": 1}
    shared["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            env={**os.environ, **{k: str(v) for k, v in {**shared, "PROCESS": process}.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(count)
    ]


def finish(running: Sequence[subprocess.Popen[str]], seconds: float = 300) -> list[str]:
    """Wait for all processes, and return their output; after an error, all are killed."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
