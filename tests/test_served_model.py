"""A served model gives the same results as the estimator that was saved."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from implicit.cpu.als import AlternatingLeastSquares
from matrices import random_counts

from tpu_als import ModelFileError, ServedModel, TPUAlternatingLeastSquares, parameters

COUNTS = random_counts(40, 30, seed=1)
USERS = np.arange(40)
CALLS: dict[str, Any] = {
    "one": lambda m: m.recommend(3, COUNTS[3], N=5),
    "many": lambda m: m.recommend(USERS, COUNTS, N=5, filter_items=[3]),
    "recalculated": lambda m: m.recommend(USERS, COUNTS, N=5, recalculate_user=True),
    "similar items": lambda m: m.similar_items(USERS[:9], N=4),
    "similar users": lambda m: m.similar_users(3, N=4, users=[1, 2, 3]),
    "pairs": lambda m: m.score_pairs([1, 2], [3, 4]),
    "new rows": lambda m: m.recalculate_user(USERS[:9], COUNTS[:9]),
    "explained": lambda m: m.explain(3, COUNTS, 4)[:2],
    "tables": lambda m: (m.user_factors, m.item_factors, m.YtY, m.item_norms),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("settings", [{}, {"objective": "ials", "unobserved_weight": 0.2}], ids=str)
def test_equals_the_estimator(call: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = TPUAlternatingLeastSquares(4, iterations=2, random_state=0, alpha=3.0, **settings)
    model.fit(COUNTS, show_progress=False).save(tmp_path / "model")
    served = ServedModel.load(tmp_path / "model")
    again = pickle.loads(pickle.dumps(served))
    for twin in (served, copy.copy(served), copy.deepcopy(served), again):
        for mine, theirs in zip(CALLS[call](twin), CALLS[call](model), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_users_are_added() -> None:
    model = TPUAlternatingLeastSquares(4, iterations=2).fit(COUNTS, show_progress=False)
    served = ServedModel()
    vars(served).update({**model.get_params(), "_fitted": model._fitted})
    served.partial_fit_users([41], COUNTS[:1])
    assert served.user_factors.shape == (42, 4) and model.user_factors.shape == (40, 4)


def test_has_the_estimators_defaults(tmp_path: Path) -> None:
    """Also for a file of implicit, which lacks the parameters of this package."""
    theirs = AlternatingLeastSquares(factors=4, iterations=1)
    theirs.fit(COUNTS, show_progress=False)
    theirs.save(tmp_path / "implicit")
    served = ServedModel.load(tmp_path / "implicit")
    ours = TPUAlternatingLeastSquares.load(tmp_path / "implicit")
    of_fits = ("iterations", "warm_start", "early_stopping", "over_relaxation", "verbose")
    of_fits += ("calculate_training_loss", "random_state", "checkpoint_every", "tol")
    of_fits += ("n_iter_no_change", "validation_fraction", "dtype", "factors")
    for name in {*parameters.RULES} - {*of_fits}:
        assert getattr(served, name) == getattr(ours, name), name
    found = served.recommend(3, COUNTS[3], N=5)
    np.testing.assert_array_equal(found[0], ours.recommend(3, COUNTS[3], N=5)[0])


def test_tables_can_be_assigned() -> None:
    model = TPUAlternatingLeastSquares(4, iterations=2, random_state=0)
    model.fit(COUNTS, show_progress=False)
    served = ServedModel()
    served.user_factors, served.item_factors = model.user_factors, model.item_factors
    for call in CALLS.values():
        for mine, theirs in zip(call(served), call(model), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["alpha", "regularization"])
def test_a_file_without_a_parameter_of_folding_in(name: str, tmp_path: Path) -> None:
    model = TPUAlternatingLeastSquares(4, iterations=2, random_state=0)
    model.fit(COUNTS, show_progress=False).save(tmp_path / "model")
    with np.load(tmp_path / "model.npz") as file:
        values = {key: file[key] for key in file.files if key != name}
    np.savez(tmp_path / "model.npz", **values)
    twins = [cls.load(tmp_path / "model") for cls in (ServedModel, TPUAlternatingLeastSquares)]
    rows = [twin.recalculate_user(USERS, COUNTS) for twin in twins]
    np.testing.assert_array_equal(*rows)


def test_errors() -> None:
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError, match="This ServedModel has no item factors yet"):
        ServedModel().recommend(3, None, filter_already_liked_items=False)
    with pytest.raises((FileNotFoundError, ModelFileError)):
        ServedModel.load("/nowhere/model.npz")
