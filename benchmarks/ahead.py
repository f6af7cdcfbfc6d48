"""How far ahead should the compiled loops fetch source rows, and what does it gain?

Half-epochs with several distances take turns, from the same tables. Nanoseconds are those of one
thread, an entry, rotations included. Needs numba.
"""

from __future__ import annotations

import functools
import sys

import common
from libraries import Ours, Problem

from tpu_als.engine import als
from tpu_als.engine.cpu import native

DISTANCES = [0, 1 << 11, 1 << 12, 1 << 13, 1 << 14]  # bytes; 0 fetches nothing ahead


def half_epoch(model: Ours, target: str, distance: int) -> None:
    """Solve one side, fetching so many bytes ahead whatever the size of the table."""
    native._LARGE, native._AHEAD = (0 if distance else sys.maxsize), distance
    mine, other = model.state if target == "users" else reversed(model.state)
    als.half_epoch(mine, other, model.data, model.objective, target=target)


def main() -> None:
    """Run both sides for each number of factors."""
    parser = common.parser(__doc__, ("power-law", "ml1m"))
    parser.add_argument("--factors", type=int, nargs="+", default=[64, 128, 256])
    args = parser.parse_args()
    if args.quick:
        args.factors, args.repeats = [16], 1
    name, matrix = common.load(args)
    common.emit(benchmark="ahead", what="machine", **common.machine())
    for factors in args.factors:
        model = Ours(Problem(matrix, factors, 40.0, 10.0))
        if not model.data.params.native:
            sys.exit('the loops need numba and a CPU: pip install "tpu-als[native]"')
        model.step()
        for target in ("users", "items"):
            calls = {str(d): functools.partial(half_epoch, model, target, d) for d in DISTANCES}
            taken = common.in_turns(calls, args.repeats)
            threads = model.data.place.n_threads
            common.emit(
                benchmark="ahead", dataset=name, shape=matrix.shape, entries=matrix.nnz,
                factors=factors, target=target, threads=threads, seconds=taken,
                ns_an_entry={n: 1e9 * threads * s / matrix.nnz for n, s in taken.items()},
            )  # fmt: skip


if __name__ == "__main__":
    main()
