"""Copies and pickles of a model, and calls that leave its attributes as they are."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import oracle
import pytest
from models import OBJECTIVE, make
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares


@pytest.fixture(scope="module")
def fitted(groups: sparse.csr_matrix) -> TPUAlternatingLeastSquares:
    """A model fitted to the planted groups; tests that change it take a copy."""
    return make(TPUAlternatingLeastSquares).fit(groups, show_progress=False)


def test_a_pickle_has_no_device_arrays(fitted: Any, groups: sparse.csr_matrix) -> None:
    model = copy.deepcopy(fitted)
    fresh = len(pickle.dumps(model))
    model.recommend(range(24), groups), model.similar_items(0), model.transform(groups)
    used = pickle.dumps(model)
    assert b"jax" not in used and len(used) <= fresh + 2000
    other = pickle.loads(used)
    np.testing.assert_array_equal(other.transform(groups), model.transform(groups))


def test_serving_sets_no_attributes(fitted: Any, groups: sparse.csr_matrix) -> None:
    model = copy.deepcopy(fitted)
    before = set(vars(model))
    model.recommend(0, groups[0]), model.similar_users(0), model.transform(groups)
    model.score(groups), model.explain(0, groups, 5)
    assert set(vars(model)) == before


def test_copies_are_independent(fitted: Any, groups: sparse.csr_matrix) -> None:
    other = copy.deepcopy(fitted)
    other.partial_fit_users([0], groups[9])
    other.item_factors[:] = 0
    assert fitted.item_factors.any()
    np.testing.assert_array_equal(
        fitted.recommend(0, groups[0], N=3)[0],
        make(TPUAlternatingLeastSquares)
        .fit(groups, show_progress=False)
        .recommend(0, groups[0], N=3)[0],
    )


def test_derived_values_follow_a_write_after_they_are_cleared(
    fitted: Any, groups: sparse.csr_matrix
) -> None:
    model = copy.deepcopy(fitted)
    model.recommend(0, groups[0]), model.similar_items(0)
    model.item_factors[7] = 50 * model.user_factors[0]
    model._item_norms = model._YtY = None
    assert model.recommend(0, groups[0], N=1)[0][0] == 7
    expected = oracle.fold_in(groups[1], model.item_factors, OBJECTIVE)[0]
    np.testing.assert_allclose(model.recalculate_user(1, groups[1]), expected, atol=1e-3)
