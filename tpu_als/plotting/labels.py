"""Texts beside points, placed so that they cover neither each other nor the border."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from tpu_als.plotting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

_ANGLES = np.linspace(0, 2 * np.pi, 12, endpoint=False)
_DISTANCES = (8.0, 16.0, 26.0, 38.0, 52.0, 70.0, 90.0)  # from the point, in points of 1/72 inch


def place_labels(ax: Axes, points: np.ndarray, labels: Mapping[int, str]) -> list[Annotation]:
    """Write texts beside some points, each at the nearest free place around its point.

    Places are tried from the nearest on, and the labels in the given order. If no place is free,
    the text gets the one that overlaps other texts least.

    Parameters
    ----------
    ax : Axes
        With its final limits.
    points : ndarray of shape (n, 2)
        In data coordinates.
    labels : dict of int to str
        Texts by the position of the point.

    Returns
    -------
    texts : list of Annotation
        In the order of `labels`.
    """
    figure = ax.figure
    figure.canvas.draw()  # fixes the size of the axes
    frame, texts = ax.get_window_extent(), []
    scale = figure.dpi / 72
    taken: list[np.ndarray] = []  # x0, y0, x1, y1 in pixels
    for place, label in labels.items():
        text = ax.annotate(
            style.plain(label), points[place], (0, 0), textcoords="offset points", fontsize="small",
            ha="center", va="center",
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75},
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.4", "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        box = text.get_window_extent()
        half = np.array([box.width, box.height]) / 2 + 2 * scale
        centre = ax.transData.transform(points[place])
        best, least = (0.0, _DISTANCES[0]), np.inf
        for distance in _DISTANCES:
            for angle in _ANGLES:
                towards = np.array([np.cos(angle), np.sin(angle)])
                # The nearest edge of the text is at this distance, not its centre.
                shift = towards * (distance * scale + np.abs(towards) * half)
                corners = np.concatenate([centre + shift - half, centre + shift + half])
                cost = _covered(corners, taken) + _outside(corners, np.array(frame.extents))
                if cost < least:
                    best, least = tuple(shift / scale), cost
            if least == 0:
                break
        text.set_position(best)
        shift = np.array(best) * scale
        taken.append(np.concatenate([centre + shift - half, centre + shift + half]))
        texts.append(text)
    return texts


def _covered(box: np.ndarray, others: list[np.ndarray]) -> float:
    """Area that a box shares with others."""
    if not others:
        return 0.0
    both = np.array(others)
    width = np.minimum(box[2], both[:, 2]) - np.maximum(box[0], both[:, 0])
    height = np.minimum(box[3], both[:, 3]) - np.maximum(box[1], both[:, 1])
    return float((width.clip(0) * height.clip(0)).sum())


def _outside(box: np.ndarray, frame: np.ndarray) -> float:
    """How far a box leaves the frame, with a weight that keeps texts inside."""
    return 1e3 * float(np.clip(frame[:2] - box[:2], 0, None).sum() +
                       np.clip(box[2:] - frame[2:], 0, None).sum())  # fmt: skip
