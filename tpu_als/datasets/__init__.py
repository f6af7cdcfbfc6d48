"""Interaction data: event frames to matrices with their ids, real purchases, downloads,
generators.
"""

from __future__ import annotations

from tpu_als.datasets.frames import interactions_from_frame, split_by_time
from tpu_als.datasets.generators import power_law, web_graph
from tpu_als.datasets.groceries import load_groceries
from tpu_als.datasets.grocery_features import (
    groceries_item_features,
    groceries_user_features,
)
from tpu_als.datasets.interactions import Interactions
from tpu_als.datasets.lastfm import fetch_lastfm_360k
from tpu_als.datasets.movielens import fetch_movielens
from tpu_als.datasets.planted import PlantedFeatures, planted_features
from tpu_als.datasets.webgraph import fetch_webgraph

__all__ = [
    "Interactions",
    "PlantedFeatures",
    "fetch_lastfm_360k",
    "fetch_movielens",
    "fetch_webgraph",
    "groceries_item_features",
    "groceries_user_features",
    "interactions_from_frame",
    "load_groceries",
    "planted_features",
    "power_law",
    "split_by_time",
    "web_graph",
]


def __dir__() -> list[str]:
    return sorted(__all__)
