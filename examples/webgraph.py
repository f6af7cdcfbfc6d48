"""Link prediction on a web graph by ALX's protocol, from a directory of shards.

Rows and columns are nodes, and links are ones. The train directory has both sides of the graph
without the links of the test nodes. For each test node, the test directory has the known links
(``col_ids``), which are folded in, and the held-out links (``gt_tag``). All nodes without a known
link are ranked. Recall@k is the mean over test nodes of (hits among the first k) / min(k, held-out
links). docs/shards.md describes the files, and how to convert those of WebGraph.

    python examples/webgraph.py [--train DIRECTORY --test DIRECTORY] [options]

Without directories, it writes and uses a small graph.

Mehta, Rendle, Krichene, Zhang (2021), ALX: Large Scale Matrix Factorization on TPUs,
https://arxiv.org/abs/2112.02194.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.datasets import web_graph
from tpu_als.evaluation import metrics_of_rankings, strong_generalization_split
from tpu_als.shards import ShardedMatrix, open_shards, write_shards

CUTOFFS = (20, 50)
BATCH = 1 << 18  # links of the test nodes that are ranked at once

Batch = tuple[sparse.csr_matrix, sparse.csr_matrix]
Ranker = Callable[
    [sparse.csr_matrix], np.ndarray
]  # from known links (n, nodes) to ranked nodes (n, 50)


def write_small_graph(folder: Path) -> tuple[Path, Path]:
    """Write a train directory, and a test directory with a tenth of the nodes."""
    graph = web_graph(6_000, 120_000)
    train, known, held_out = strong_generalization_split(graph, 0.1, 0.75, random_state=0)
    write_shards(train, folder / "train", n_shards=4)
    write_shards(known, folder / "test", n_shards=4, held_out=held_out)
    return folder / "train", folder / "test"


def batches(test: ShardedMatrix, n_files: int) -> Iterator[Batch]:
    """Yield known and held-out links of the same nodes, with at most one file in memory."""
    for file in range(n_files):
        _, held_out = test.held_out(file, test.n_shards)
        begin = 0
        for _, known in test.blocks("user", file, test.n_shards, entries=BATCH):
            yield known, held_out[begin : begin + known.shape[0]]
            begin += known.shape[0]


def by_model(model: TPUAlternatingLeastSquares) -> Ranker:
    """Rank by fold-in."""

    def rank(known: sparse.csr_matrix) -> np.ndarray:
        rows = np.arange(known.shape[0])
        return model.recommend(rows, known, N=max(CUTOFFS), recalculate_user=True)[0]

    return rank


def by_popularity(train: ShardedMatrix) -> Ranker:
    """Rank by the number of train nodes that link to a node, without known links."""
    nodes, lengths = train.lengths("item")
    popular = nodes[np.argsort(-lengths, kind="stable")]

    def rank(known: sparse.csr_matrix) -> np.ndarray:
        ids = np.full((known.shape[0], max(CUTOFFS)), -1)
        for row, ranked in enumerate(ids):
            links = known.indices[known.indptr[row] : known.indptr[row + 1]]
            first = popular[: len(ranked) + len(links)]
            unknown = first[~np.isin(first, links)][: len(ranked)]
            ranked[: len(unknown)] = unknown
        return ids

    return rank


def recalls(test: ShardedMatrix, n_files: int, rankers: dict[str, Ranker]) -> dict[str, np.ndarray]:
    """Recall of each ranker at each of the cutoffs."""
    sums, n_nodes = {name: np.zeros(len(CUTOFFS)) for name in rankers}, 0
    for known, held_out in batches(test, n_files):
        measured = np.flatnonzero(np.diff(held_out.indptr))
        known, held_out = known[measured], held_out[measured]
        n_nodes += len(measured)
        for name, rank in rankers.items() if len(measured) else ():
            ids = rank(known)
            found = [metrics_of_rankings(ids[:, :k], held_out)["recall"] for k in CUTOFFS]
            sums[name] += len(measured) * np.array(found)
    return {name: total / n_nodes for name, total in sums.items()}


def run(train: ShardedMatrix, test: ShardedMatrix, options: argparse.Namespace) -> None:
    """Train, rank, print."""
    if train.shape[1] != test.shape[1]:
        raise SystemExit(f"train has links to {train.shape[1]} nodes, but test to {test.shape[1]}")
    print(f"train: {train.shape[0]:,} nodes with links to {train.shape[1]:,}, {train.nnz:,} links")
    n_files = min(options.test_files or test.n_shards, test.n_shards)
    print(f"test: {test.nnz:,} known links; measured on {n_files} of {test.n_shards} files")
    model = TPUAlternatingLeastSquares(
        objective="ials",
        factors=options.factors,
        iterations=options.iterations,
        regularization=options.regularization,
        unobserved_weight=options.unobserved_weight,
        dtype=options.dtype,
        random_state=0,
    )
    started = time.perf_counter()
    model.fit(train, show_progress=False)
    fitted = time.perf_counter()
    iteration = np.median(model.history_["seconds"])
    print(f"fit: {fitted - started:.1f} s with compilation; an iteration: {iteration:.3f} s")
    found = recalls(test, n_files, {"popularity": by_popularity(train), "model": by_model(model)})
    print(f"evaluation: {time.perf_counter() - fitted:.1f} s")
    for name, values in found.items():
        figures = ", ".join(f"Recall@{k} {v:.3f}" for k, v in zip(CUTOFFS, values, strict=True))
        print(f"{name:>10}: {figures}")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=Path, help="directory with both sides of the train links")
    parser.add_argument("--test", type=Path, help="directory with known links and gt_tag")
    smaller = "default for the small graph: %(default)s; use less for more nodes"
    parser.add_argument("--test-files", type=int, help="measure on the first files only")
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=16)
    parser.add_argument("--regularization", type=float, default=3e-3, help=smaller)
    parser.add_argument("--unobserved-weight", type=float, default=0.1, help=smaller)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    if (options.train is None) != (options.test is None):
        parser.error("--train and --test must both be given, or none of them")
    with tempfile.TemporaryDirectory() as folder:
        if options.train is None:
            options.train, options.test = write_small_graph(Path(folder))
        run(open_shards(options.train), open_shards(options.test), options)


if __name__ == "__main__":
    main()
