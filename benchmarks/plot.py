"""Plots for docs/performance.md from the output of scripts: ``python plot.py FILE --to DIR``.

For the lines of `fit.py`: the loss relative to the target's, over seconds. For the lines of
`scaling.py`: the seconds of an iteration, over entries. Other lines are ignored.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from tpu_als.plotting.style import COLOURS

# Text is stored as text, without a date or random ids, so that equal data give equal files.
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tpu_als", "font.size": 9})
# A library has a colour and a pattern of lines, a solver has a marker: both can be seen in grey.
LIBRARIES: dict[str, dict[str, Any]] = {
    "tpu_als": dict(color=COLOURS[1], linestyle="-"),
    "implicit": dict(color=COLOURS[0], linestyle="--"),
    "irspack": dict(color=COLOURS[2], linestyle=":"),
}
MARKED = {"relaxed": "o", "relaxed-4": "s", "relaxed-xla": "^", "cg": "D", "cholesky": "x",
          "ialspp": "+"}  # fmt: skip


def read(files: list[Path]) -> list[dict[str, Any]]:
    """All JSON lines of some files."""
    lines = itertools.chain.from_iterable(file.read_text().splitlines() for file in files)
    return [json.loads(line) for line in lines if line.startswith("{")]


def fits(lines: list[dict[str, Any]], folder: Path) -> None:
    """Draw one figure for each data set and setting, with a panel for each number of factors."""
    runs = [line for line in lines if line.get("benchmark") == "fit" and "losses" in line]
    runs.sort(key=lambda run: (run["dataset"], run["alpha"]))
    for (dataset, alpha), group in itertools.groupby(
        runs, lambda run: (run["dataset"], run["alpha"])
    ):
        cases = list(group)
        factors = sorted({run["factors"] for run in cases})
        figure, panels = plt.subplots(
            1, len(factors), figsize=(3.6 * len(factors), 3.4), sharey=True, squeeze=False
        )
        for panel, count in zip(panels[0], factors, strict=True):
            _race(panel, [run for run in cases if run["factors"] == count])
            panel.set(title=f"{count} factors", xlabel="seconds", xscale="log")
        panels[0][0].set(ylabel="loss above the reference", yscale="log", ylim=(4e-4, 4))
        panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
        _save(figure, folder / f"fit-{dataset}-alpha-{alpha:g}.svg")


def _race(panel: Any, runs: list[dict[str, Any]]) -> None:
    for run in runs:
        library, solver = run["library"].split()
        if solver == "auto":  # "auto" runs one of the other solvers
            continue
        seconds = run["setup_s"] + np.cumsum(run["steps_s"])
        above = np.maximum(1.001 * np.array(run["losses"]) / run["target"] - 1, 1e-4)
        every = max(len(above) // 8, 1)
        panel.plot(
            seconds, above, **LIBRARIES[library], marker=MARKED[solver], markersize=4,
            markevery=every, linewidth=1, label=run["library"],
        )  # fmt: skip
    panel.axhline(1e-3, color="grey", lw=0.6)


def scaling(lines: list[dict[str, Any]], folder: Path) -> None:
    """Seconds of an iteration over entries."""
    found = [line for line in lines if line.get("over") == "entries" and "entries" in line]
    if not found:
        return
    figure, panel = plt.subplots(figsize=(3.6, 3.0))
    entries, seconds = (
        np.array([line[name] for line in found]) for name in ("entries", "iteration_s")
    )
    panel.plot(entries / 1e6, seconds, "o", color=COLOURS[1])
    panel.plot(
        entries / 1e6,
        np.polyval(np.polyfit(entries, seconds, 1), entries),
        "-",
        color=COLOURS[0],
        lw=0.7,
    )
    panel.set(xlabel="million entries", ylabel="seconds an iteration", xlim=0, ylim=0)
    _save(figure, folder / "scaling-entries.svg")


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    print(file)


def main() -> None:
    """Read and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, default=Path())
    args = parser.parse_args()
    lines = read(args.files)
    fits(lines, args.to)
    scaling(lines, args.to)


if __name__ == "__main__":
    main()
