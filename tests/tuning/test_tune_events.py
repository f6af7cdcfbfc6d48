"""`tune` on tables of events, by a `Recommender`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import tpu_als
from tpu_als import Recommender, TPUAlternatingLeastSquares, tune
from tpu_als.tuning import events as tuning_events
from tpu_als.weighting import LogWeighting

SMALL: dict[str, Any] = dict(budget=None, n_candidates=4, max_factors=8, k=5, random_state=0)
SHOP: dict[str, Any] = dict(user="who", item="what", value="count")
original = TPUAlternatingLeastSquares.fit


def purchases(n: int = 1500, seed: int = 0) -> pd.DataFrame:
    """Users buy items of their group of ten, more than once, in order of time."""
    rng = np.random.default_rng(seed)
    users = rng.integers(60, size=n)
    items = (users % 6) * 10 + np.minimum(rng.geometric(0.2, n), 10) - 1
    return pd.DataFrame(
        {
            "who": [f"user {user}" for user in users],
            "what": items + 1000,
            "count": rng.integers(1, 4, n),
            "when": pd.Timestamp("2026-01-01") + pd.to_timedelta(np.arange(n), "h"),
        }
    )


def fits(monkeypatch: pytest.MonkeyPatch) -> list[sparse.csr_matrix]:
    """The matrices of all later fits."""
    seen = []

    def fit(model: Any, rows: Any, **options: Any) -> Any:
        seen.append(rows)
        return original(model, rows, **options)

    monkeypatch.setattr(TPUAlternatingLeastSquares, "fit", fit)
    return seen


@pytest.mark.parametrize("timed", [False, True])
def test_gives_a_recommender_fitted_on_all_events(timed: bool) -> None:
    events, shop = purchases(), Recommender(**SHOP, timestamp="when" if timed else None)
    found = tune(events, recommender=shop, **SMALL)
    assert isinstance(found.estimator, Recommender)
    answers = found.estimator.recommend(["user 3"], n=3)
    assert set(answers.columns) == {"user", "item", "rank", "score", "reason"}
    assert ((answers["item"] - 1000) // 10 == 3).all()
    again = tpu_als.Recommender(**found.estimator.get_params(deep=False)).fit(events)
    pd.testing.assert_frame_equal(again.recommend(), found.estimator.recommend())
    assert (shop.model, shop.weighting) == (None, None)


def test_code_makes_the_recommender() -> None:
    weights = {"view": 1, "buy": 5}
    events = purchases().assign(kind=np.where(np.arange(1500) % 3, "view", "buy"))
    shop = Recommender(
        **SHOP, timestamp="when", event="kind", event_weights=weights, half_life="30D",
        model=TPUAlternatingLeastSquares(num_threads=1),
    )  # fmt: skip
    found = tune(events, recommender=shop, **SMALL)
    names = {"Recommender": Recommender, "TPUAlternatingLeastSquares": TPUAlternatingLeastSquares}
    made = eval(found.code, names | vars(tpu_als.weighting))
    assert made.get_params().keys() == found.estimator.get_params().keys()
    for name, value in found.estimator.get_params().items():
        if not hasattr(value, "get_params"):
            assert made.get_params()[name] == value, name
    assert made.event_weights == weights
    assert made.model.num_threads == 1
    pd.testing.assert_frame_equal(made.fit(events).recommend(), found.estimator.recommend())


def test_no_trial_sees_later_events(monkeypatch: pytest.MonkeyPatch) -> None:
    events = purchases()
    # An item that is sold only in the last tenth of the time, in the largest numbers.
    future = events.tail(60).assign(what=1, count=1000)
    events = pd.concat([events, future], ignore_index=True)
    early = events.head(int(len(events) * 0.9))
    seen = fits(monkeypatch)
    tune(events, recommender=Recommender(**SHOP, timestamp="when"), **SMALL)
    for rows in seen[:-1]:
        assert rows.shape == (early["who"].nunique(), early["what"].nunique())
        assert rows.max() < 1000
    assert seen[-1].shape == (events["who"].nunique(), events["what"].nunique())


def test_what_is_to_be_found() -> None:
    events = pd.DataFrame(
        {
            "who": ["a", "a", "b", "b", "c", "a", "a", "b", "b", "new", "b"],
            "what": ["x", "y", "x", "z", "y", "x", "z", "y", "later", "x", "w"],
            "count": [1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1],
            "when": range(11),
        }
    )
    events.loc[10, ["what", "count"]] = ["x", -1]
    shop = Recommender(**SHOP, timestamp="when")
    rng = np.random.default_rng(0)
    problem, everything = tuning_events.problem_of(events, shop, 0.55, rng)
    # Users a, b, c and items x, y, z: a bought x again, and z for the first time; b bought y. The
    # item "later" and the user "new" are unknown, and b disliked x.
    np.testing.assert_array_equal(problem.train.toarray(), [[1, 1, 0], [2, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(problem.hidden.toarray() > 0, [[0, 0, 1], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(problem.users, [0, 1])
    assert everything.shape == (4, 4)


def test_paths(tmp_path: Path) -> None:
    events, path = purchases(), tmp_path / "events.csv"
    events.to_csv(path, index=False)
    shop = Recommender(**SHOP, timestamp="when")
    from_frame, from_path = (tune(data, recommender=shop, **SMALL) for data in (events, path))
    assert from_frame.code == from_path.code
    pd.testing.assert_frame_equal(
        from_frame.estimator.recommend(), from_path.estimator.recommend(), check_dtype=False
    )


def test_an_interrupt_of_the_final_fit_keeps_its_last_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events, shop = purchases(), Recommender(**SHOP)
    n_fits = len(fits(monkeypatch) or tune(events, recommender=shop, **SMALL).trials) + 2
    number = iter(range(10**6))

    def fit(model: Any, rows: Any, *, show_progress: bool, callback: Any) -> Any:
        is_last = next(number) == n_fits

        def stop(done: int, *report: Any) -> None:
            if is_last and done == 1:
                raise KeyboardInterrupt
            callback(done, *report)

        return original(model, rows, show_progress=show_progress, callback=stop)

    monkeypatch.setattr(TPUAlternatingLeastSquares, "fit", fit)
    found = tune(events, recommender=shop, **SMALL)
    assert found.interrupted
    assert found.estimator.model_.n_iter_ == found.estimator.model.iterations == 2
    assert len(found.estimator.recommend(["user 3"], n=3)) == 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recommender": LogWeighting()}, TypeError, "must be a Recommender.*got LogWeighting"),
        ({"recommender": Recommender(weighting=LogWeighting())}, ValueError, "weighting=None"),
        ({"recommender": Recommender(**SHOP, repeated="all")}, ValueError, "repeated must be"),
        (
            {"recommender": Recommender(**SHOP), "model": TPUAlternatingLeastSquares()},
            ValueError,
            "model must be None with recommender=",
        ),
        ({"timestamps": sparse.eye(3)}, ValueError, "timestamps must be None with recommender="),
        ({"recommender": Recommender(**SHOP, model=LogWeighting())}, TypeError, "got LogWeighting"),
        ({"recommender": Recommender(user="nobody")}, ValueError, "nobody"),
    ],
)
def test_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tune(purchases(), **{"recommender": Recommender(**SHOP), **options}, **SMALL)
