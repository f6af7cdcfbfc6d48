"""How much time and memory do writing shards and fitting from them take?

A seeded matrix is made block by block, so no process has all of it in memory. Writing and fitting
run in separate processes. The peak memory of each is compared with the bytes of the entries: an
int32 id and a float32 value per entry, in both orientations.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import common

ENTRY_BYTES = 16


def main() -> None:
    """Write, then fit, and report both."""
    parser = common.parser(__doc__)
    parser.add_argument("--entries", type=float, default=50e6)
    parser.add_argument("--users", type=float, default=1e6)
    parser.add_argument("--items", type=float, default=1e5)
    parser.add_argument("--blocks", type=int, default=25)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="directory to write to, which is not removed")
    args = parser.parse_args()
    if args.quick:
        args.entries, args.users, args.items, args.blocks = 2e5, 1e4, 2e3, 4
    common.emit(benchmark="shards", what="machine", **common.machine())
    with tempfile.TemporaryDirectory() as folder:
        path = str(args.keep or Path(folder) / "shards")
        shape = int(args.users), int(args.items), int(args.entries)
        if not Path(path).exists():
            written = common.fresh(
                "write_shards", path=path, shape=shape, n_blocks=args.blocks, n_shards=args.shards
            )
            emit("write", shape, written)
        fit = {"factors": args.factors, "iterations": args.iterations, "random_state": 0}
        emit("fit", shape, common.fresh("fit_shards", path=path, fit=fit), factors=args.factors)


def emit(what: str, shape: tuple[int, int, int], found: dict[str, float], **about: int) -> None:
    """Print one line, with the peak memory relative to the bytes of the entries."""
    n_bytes = ENTRY_BYTES * shape[2]
    common.emit(
        benchmark="shards", what=what, shape=shape[:2], entries=shape[2], **about, **found,
        peak_over_entries=found["peak_bytes"] / n_bytes,
        added_over_entries=(found["peak_bytes"] - found["before_bytes"]) / n_bytes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
