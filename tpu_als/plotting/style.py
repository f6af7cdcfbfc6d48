"""Axes to draw on, and lines and markers that can be told apart in grey."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe, Ito. Color universal design. 2008. Without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
GREY = "0.45"


def pyplot() -> ModuleType:
    """`matplotlib.pyplot`.

    Raises
    ------
    ImportError
        If matplotlib, which the extra ``plot`` installs, is missing.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "the displays need the package matplotlib: pip install 'tpu-als[plot]'"
        ) from error
    return pyplot


def one_axes(ax: Axes | None, size: tuple[float, float] = (5.0, 3.6)) -> Axes:
    """The given axes, or those of a new figure.

    Parameters
    ----------
    ax : matplotlib.axes.Axes, optional
        None makes a figure.
    size : tuple of two floats, default=(5.0, 3.6)
        Width and height of a new figure, in inches.
    """
    plt = pyplot()
    if ax is None:
        return plt.subplots(figsize=size, layout="constrained")[1]
    if not hasattr(ax, "get_figure"):
        raise TypeError(f"ax must be matplotlib Axes or None, got {type(ax).__name__}")
    return ax


def row_of_axes(ax: Axes | Sequence[Axes] | None, n: int) -> np.ndarray:
    """Some axes side by side: the given ones, or those of a new figure.

    Parameters
    ----------
    ax : Axes or sequence of Axes, optional
        None makes a figure.
    n : int
        Number of axes that are needed.

    Raises
    ------
    ValueError
        If another number of axes is given.
    """
    plt = pyplot()
    if ax is None:
        size = (3.4 * n + 0.4, 3.0)
        return plt.subplots(1, n, figsize=size, layout="constrained", squeeze=False)[1][0]
    found = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
    if len(found) != n:
        raise ValueError(f"ax must hold {n} Axes, one for each panel, got {len(found)}")
    return np.array([one_axes(each) for each in found], dtype=object)


def line_style(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of a line for `Axes.plot`; 56 of them are different."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def plain(text: object) -> str:
    """A text for matplotlib, which reads formulas between dollars and hides a leading "_"."""
    found = str(text).replace("$", r"\$")
    return f" {found}" if found.startswith("_") else found


def figure_of(ax: Axes) -> Figure:
    """The figure that the axes are in."""
    figure: Figure = ax.figure  # type: ignore[assignment]
    return figure
