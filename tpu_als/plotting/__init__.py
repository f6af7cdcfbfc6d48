"""Displays, in scikit-learn's manner: what a fit did, what a model learnt, how models compare.

They need matplotlib, which the extra ``plot`` installs. Series differ in the shape of markers and
the pattern of lines too, so that they can be told apart without colour.
"""

from __future__ import annotations

from tpu_als.plotting.factor_map import FactorMapDisplay
from tpu_als.plotting.feature_effects import FeatureEffectsDisplay
from tpu_als.plotting.history import FitHistoryDisplay
from tpu_als.plotting.ranking_curve import RankingCurveDisplay
from tpu_als.plotting.search import SearchDisplay

__all__ = [
    "FactorMapDisplay",
    "FeatureEffectsDisplay",
    "FitHistoryDisplay",
    "RankingCurveDisplay",
    "SearchDisplay",
]


def __dir__() -> list[str]:
    return sorted(__all__)
