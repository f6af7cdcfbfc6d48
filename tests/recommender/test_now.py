"""A history without times counts as at the newest time of all events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tpu_als import Recommender, TPUAlternatingLeastSquares


def _events(first: str, n_days: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    days = pd.to_timedelta(np.sort(rng.integers(0, n_days, 300)), unit="D")
    return pd.DataFrame(
        {
            "user": rng.integers(0, 20, 300),
            "item": rng.integers(0, 12, 300),
            "time": pd.Timestamp(first) + days,
        }
    )


def _scores(recommender: Recommender, history: list[dict[str, Any]]) -> np.ndarray:
    found = recommender.recommend_for_history(history, n=5)
    return found.sort_values("item")["score"].to_numpy()


@pytest.mark.parametrize("is_loaded", [False, True])
def test_after_updates(is_loaded: bool, tmp_path: Path) -> None:
    recommender = Recommender(
        model=TPUAlternatingLeastSquares(8, iterations=3, random_state=0),
        user="user", item="item", timestamp="time", half_life="10D",
    )  # fmt: skip
    recommender.fit(_events("2026-01-01", 30, 0))
    newer = _events("2026-02-01", 60, 1)
    recommender.update(newer)
    recommender.update(_events("2026-01-01", 10, 2))  # older events do not move the clock back
    if is_loaded:
        recommender.save(tmp_path / "a.tpuals")
        recommender = Recommender.load(tmp_path / "a.tpuals")
    plain = _scores(recommender, [{"item": 3}, {"item": 4}])
    now = newer["time"].max()
    timed = _scores(recommender, [{"item": 3, "time": now}, {"item": 4, "time": now}])
    np.testing.assert_allclose(plain, timed, rtol=1e-5)
    old = pd.Timestamp("2026-01-30")
    aged = _scores(recommender, [{"item": 3, "time": old}, {"item": 4, "time": old}])
    assert np.abs(plain - aged).max() > 0.05
