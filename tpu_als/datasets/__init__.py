"""Interaction data: event frames to matrices with their ids, real purchases, generators."""

from __future__ import annotations

from tpu_als.datasets.frames import interactions_from_frame, split_by_time
from tpu_als.datasets.generators import power_law, web_graph
from tpu_als.datasets.groceries import load_groceries
from tpu_als.datasets.interactions import Interactions

__all__ = [
    "Interactions",
    "interactions_from_frame",
    "load_groceries",
    "power_law",
    "split_by_time",
    "web_graph",
]


def __dir__() -> list[str]:
    return sorted(__all__)
