"""Every wrong call raises a clear error, and the fitted model gives the same results as before.

The tables of cases are in ``bad_models.py`` and ``bad_functions.py``; test_structure.py has the
matrices that could crash the process.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import bad_functions
import bad_models
import numpy as np
import pytest
from bad_models import N_USERS, ROWS, Case
from models import make

from tpu_als import TPUAlternatingLeastSquares

CASES = [*bad_models.cases(), *bad_functions.cases()]


@pytest.fixture(scope="module")
def model() -> TPUAlternatingLeastSquares:
    fitted = make(TPUAlternatingLeastSquares, use_cg=True, devices=1)
    return fitted.fit(ROWS, show_progress=False)


def answers(model: TPUAlternatingLeastSquares) -> list[Any]:
    """Results of the model, its tables and its parameters."""
    parameters = {name: repr(value) for name, value in model.get_params().items()}
    return [
        *model.recommend(np.arange(N_USERS), ROWS, N=4),
        *model.recommend(3, ROWS[3], recalculate_user=True),
        *model.similar_items([0, 5]),
        model.transform(ROWS[:6]),
        model.user_factors.copy(),
        model.item_factors.copy(),
        parameters,
        model.n_features_in_,
        model.n_iter_,
    ]


@pytest.fixture(scope="module")
def before(model: TPUAlternatingLeastSquares) -> list[Any]:
    return answers(model)


@pytest.fixture(autouse=True)
def counted(record_property: Any) -> None:
    record_property("proof: bad inputs refused", 1)


def carry_out(case: Case, model: TPUAlternatingLeastSquares) -> None:
    """Change the attributes of the case, and call. Both may raise the error."""
    for name, value in case.settings.items():
        setattr(model, name, value)
    case.call(model)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_raises_a_clear_error_and_keeps_the_model(
    model: TPUAlternatingLeastSquares, before: list[Any], case: Case, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # a failed call must not write files
    twin = copy.deepcopy(model)
    parameters = twin.get_params()
    old = {name: copy.copy(getattr(twin, name)) for name in case.settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(case.error, match=case.message):
            carry_out(case, twin)
    for name, value in {**parameters, **old}.items():
        setattr(twin, name, value)
    for now, then in zip(answers(twin), before, strict=True):
        np.testing.assert_array_equal(now, then)
    assert not list(tmp_path.iterdir())


def test_there_are_enough_cases_with_distinct_names() -> None:
    names = [case.name for case in CASES]
    assert len(names) >= 120
    assert len(set(names)) == len(names)
