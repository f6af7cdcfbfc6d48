"""Several processes train one model from a directory of shards; each reads only its own files.

In this example the processes run on one machine, with one CPU device each. On a cluster, run the
code of `train` once on every host (docs/multihost.md). The example prints the peak memory of each
process, and then that of a single process which trains the same model.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.datasets import web_graph
from tpu_als.evaluation import leave_k_out_split, metrics_of_rankings
from tpu_als.shards import open_shards, write_shards

N_MEASURED = 2000


def join(args: argparse.Namespace) -> None:
    """Connect to the other processes. A TPU pod needs only `jax.distributed.initialize()`."""
    jax.config.update("jax_platforms", "cpu")
    if args.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"localhost:{args.port}", num_processes=args.processes, process_id=args.process
        )


def peak() -> float:
    """Peak memory of this process, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the value may include the parent's memory
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def train(args: argparse.Namespace) -> None:
    """Fit and measure, in every process."""
    join(args)
    matrix = open_shards(args.folder / "shards")
    files = matrix.files("user", args.process, args.processes)
    before, started = peak(), time.perf_counter()
    model = TPUAlternatingLeastSquares(
        factors=args.factors,
        objective="ials",
        regularization=0.003,
        unobserved_weight=0.01,
        iterations=args.iterations,
        table_layout="sharded",
        random_state=0,
        checkpoint_dir=args.checkpoint_dir,
    )
    model.fit(matrix, show_progress=False)
    seconds = time.perf_counter() - started
    print(
        f"process {args.process} of {args.processes}: read {len(files)} of {matrix.n_shards} files "
        f"a side, fit {seconds:.1f} s, peak {peak():.0f} MB, before the fit {before:.0f} MB"
    )
    # The tables stay on the devices, so all processes must make this call.
    nodes = np.load(args.folder / "nodes.npy")
    known, hidden = (sparse.load_npz(args.folder / f"{name}.npz") for name in ("known", "hidden"))
    ids, _ = model.recommend(nodes, known, N=20)
    if args.process == 0:
        print(f"recall@20 of the held-out links: {metrics_of_rankings(ids, hidden)['recall']:.3f}")


def run(args: argparse.Namespace, processes: int) -> None:
    """Start this file in a number of processes, and wait for all of them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(args.folder)]
    command += ["--processes", str(processes), "--port", str(port), "--process"]
    running = [
        subprocess.Popen([*command, str(process)], env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
        for process in range(processes)
    ]
    failed = [process.wait() for process in running]
    if any(failed):
        raise SystemExit(f"the processes ended with {failed}")


def prepare(args: argparse.Namespace) -> None:
    """Write a graph as shards, without one held-out link per node; save nodes to measure."""
    graph = web_graph(args.nodes, args.links, random_state=0)
    links, held_out = leave_k_out_split(graph, K=1, random_state=0)
    matrix = write_shards(links, args.folder / "shards", n_shards=2 * args.processes)
    measured = np.flatnonzero(np.diff(held_out.indptr))[:N_MEASURED]
    np.save(args.folder / "nodes.npy", measured)
    for name, rows in (("known", links[measured]), ("hidden", held_out[measured])):
        sparse.save_npz(args.folder / f"{name}.npz", rows)
    print(f"{matrix.shape[0]:,} nodes, {matrix.nnz:,} links in {2 * matrix.n_shards} files")


def main() -> None:
    """Prepare the data, then train with several processes, and with one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=60_000)
    parser.add_argument("--links", type=int, default=1_500_000)
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--checkpoint-dir", help="shared by all processes; extra 'checkpoint'")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process is not None:
        train(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        prepare(args)
        run(args, args.processes)
        if args.checkpoint_dir is None:
            run(args, 1)


if __name__ == "__main__":
    main()
