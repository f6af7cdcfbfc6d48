"""A search over objective, weighting and parameters within a time budget: `tpu_als.tune`."""

from __future__ import annotations

from tpu_als.tuning.api import tune
from tpu_als.tuning.result import TuneResult

__all__ = ["TuneResult", "tune"]


def __dir__() -> list[str]:
    return sorted(__all__)
