"""Tables of events in, tables of recommendations out, with the caller's own ids."""

from __future__ import annotations

from tpu_als.recommender.recommender import Recommender

__all__ = ["Recommender"]


def __dir__() -> list[str]:
    return sorted(__all__)
