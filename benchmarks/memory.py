"""What is the peak memory of a fit, compared with implicit's, and how long does the layout take?

The peak is the highest resident size during `fit` in a fresh process, without the size before. The
layout's share is the time of `Backend.place` divided by that of a complete, warm fit.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import common
from libraries import Ours, Problem, padded_cells
from scipy import sparse


def peaks(matrix: sparse.csr_matrix, factors: list[int], about: dict[str, object]) -> None:
    """Peak of a fit in a fresh process, for each library and number of factors."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "matrix.npz")
        sparse.save_npz(file, matrix, compressed=False)
        for k in factors:
            fit = {"factors": k, "iterations": 2, "random_state": 0}
            found = {
                name: common.fresh("memory", library=name, file=file, fit=fit)
                for name in ["tpu_als", *common.installed("implicit")]
            }
            for name, row in found.items():
                common.emit(**about, what="peak", factors=k, library=name, **row)
            if "implicit" in found:
                mine, theirs = found["tpu_als"], found["implicit"]
                common.emit(
                    **about, what="peak ratio", factors=k,
                    of_processes=mine["peak_bytes"] / theirs["peak_bytes"],
                    of_what_fit_adds=mine["fit_bytes"] / max(theirs["fit_bytes"], 1.0),
                )  # fmt: skip


def layout_share(
    matrix: sparse.csr_matrix, factors: list[int], repeats: int, about: dict[str, object]
) -> None:
    """Time of the layout as a share of a fit of 15 iterations."""
    for k in factors:
        problem = Problem(matrix, k, 40.0, 10.0)
        model = Ours(problem)
        found = common.in_turns(
            {"place": functools.partial(Ours, problem), "step": model.step}, repeats
        )
        sides = model.data.users, model.data.items
        common.emit(
            **about, what="layout", factors=k, layout_s=found["place"], iteration_s=found["step"],
            share_of_15_iterations=found["place"] / (found["place"] + 15 * found["step"]),
            cells_per_entry=[padded_cells(side) / matrix.nnz for side in sides],
        )  # fmt: skip


def main() -> None:
    """Measure both."""
    parser = common.parser(__doc__, ("power-law", "ml1m"))
    parser.add_argument("--factors", type=int, nargs="+", default=[64, 128])
    args = parser.parse_args()
    if args.quick:
        args.factors, args.repeats = [16], 1
    name, matrix = common.load(args)
    common.emit(benchmark="memory", what="machine", **common.machine())
    about = {
        "benchmark": "memory", "dataset": name, "shape": matrix.shape, "entries": matrix.nnz,
        "dtype": "float32",
    }  # fmt: skip
    peaks(matrix, args.factors, about)
    layout_share(matrix, args.factors, args.repeats, about)


if __name__ == "__main__":
    main()
