"""Few rows and few candidates are served on the host, with the results of the devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import ModelFitError, TPUAlternatingLeastSquares
from tpu_als.engine.xla import fold_in as by_xla
from tpu_als.serving import fold_in, ranking

COUNTS = random_counts(60, 90, seed=2).astype(np.float32)


def _model(**parameters: Any) -> TPUAlternatingLeastSquares:
    settings = {"iterations": 3, "random_state": 0, "alpha": 3.0, **parameters}
    return TPUAlternatingLeastSquares(8, **settings).fit(COUNTS, show_progress=False)


@pytest.mark.parametrize("n_users", [1, 3, 60])
@pytest.mark.parametrize("hide", [False, True])
def test_a_short_whitelist_is_ranked_like_a_long_one(
    n_users: int, hide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, items = _model(), [80, 3, 17, 17, 5, 41, 2]
    users = np.arange(n_users)

    def ranked() -> list[np.ndarray]:
        found = model.recommend(
            users, COUNTS[users], N=4, items=items, filter_already_liked_items=hide
        )
        return [*found, *model.similar_items(users, N=4, items=items)]

    few = ranked()
    monkeypatch.setattr(ranking, "_FEW", len(COUNTS.indices))  # now none is short
    for mine, other in zip(few, ranked(), strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_allclose(mine, other, rtol=1e-5)
    scores = model.user_factors[users] @ model.item_factors[np.unique(items)].T
    if not hide:
        np.testing.assert_allclose(few[1], -np.sort(-scores, axis=1)[:, :4], rtol=1e-5)


@pytest.mark.slow
def test_a_short_whitelist_of_tables_on_devices() -> None:
    on_devices, here = _model(devices=2, table_layout="sharded"), _model()
    for users in ([4], np.arange(20)):
        found = on_devices.recommend(users, COUNTS[users], N=3, items=[1, 7, 30, 31])
        expected = here.recommend(users, COUNTS[users], N=3, items=[1, 7, 30, 31])
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    assert on_devices._fitted.item.resident is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "ials", "unobserved_weight": 0.2},
        {"objective": "ials", "regularization_exponent": 0.5},
        {"regularization": 0.0, "factors": 100},  # rank-deficient
        {"dtype": np.float64},
    ],
    ids=str,
)
def test_few_rows_are_solved_like_many(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = settings.pop("factors", 8)
    model = _model(**settings).set_params(factors=factors)
    if factors != 8:
        model.fit(COUNTS, show_progress=False)
    rows = sparse.vstack([COUNTS[:2], sparse.csr_matrix((1, 90)), -COUNTS[5]], "csr")
    few = model.recalculate_user(np.arange(4), rows)
    items = model.recalculate_item([0, 1], COUNTS.T.tocsr()[:2])
    ranked = model.recommend(3, COUNTS[3], recalculate_user=True)
    monkeypatch.setattr(fold_in, "_FEW_ROWS", 0)
    model.set_params(use_native=False)  # many rows are solved by XLA
    scale = np.abs(few).max()
    np.testing.assert_allclose(
        few @ model.item_factors.T,
        model.recalculate_user(np.arange(4), rows) @ model.item_factors.T,
        atol=2e-3 * scale,
    )
    assert few.dtype == model.item_factors.dtype and not few[2].any()
    if factors == 8:
        np.testing.assert_allclose(
            few, model.recalculate_user(np.arange(4), rows), atol=1e-4 * scale
        )
        np.testing.assert_allclose(
            items, model.recalculate_item([0, 1], COUNTS.T.tocsr()[:2]), atol=1e-4
        )
        again = model.recommend(3, COUNTS[3], recalculate_user=True)
        np.testing.assert_array_equal(ranked[0], again[0])


def test_a_row_that_cannot_be_solved_is_an_error() -> None:
    model = _model().set_params(alpha=1e308)
    with pytest.raises(ModelFitError, match="NaN encountered in factors: 1 of 1 rows"):
        model.recalculate_user(0, 10 * COUNTS[0])


@pytest.mark.parametrize("use_native", [False, True])
@pytest.mark.parametrize("n_rows", [2, 20])
def test_confidences_beyond_float32_are_solved_in_batches_of_any_size(
    n_rows: int, use_native: bool
) -> None:
    model = _model().set_params(alpha=1e39, use_native=use_native)
    found = model.recalculate_user(np.arange(n_rows), COUNTS[:n_rows])
    np.testing.assert_allclose(found[1], model.recalculate_user(1, COUNTS[1]), rtol=1e-5)
    assert np.isfinite(found).all()


def test_a_source_on_devices_is_rotated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, rotate = _model(use_native=False), [], by_xla._rotated
    monkeypatch.setattr(by_xla, "_rotated", lambda *args: calls.append(args) or rotate(*args))
    for _ in range(3):
        model.transform(COUNTS)
    assert len(calls) == 1


@pytest.mark.parametrize("users", [[0], np.arange(30)])
def test_a_recall_that_makes_no_sense_is_refused(users: Any) -> None:
    model = _model().set_params(approximate_recall=5.0)
    with pytest.raises(ValueError, match="approximate_recall must be"):
        model.recommend(users, COUNTS[users])


def test_few_and_many_queries_keep_their_catalogs() -> None:
    model, everyone = _model(num_threads=2), np.arange(60)
    kept: list[dict[str, Any]] = []
    for _ in range(2):
        model.recommend(0, COUNTS[0])
        model.recommend(everyone, COUNTS)
        kept.append(dict(model._fitted.item._derived))
    assert len(kept[0]) >= 2
    assert all(kept[1][name] is value for name, value in kept[0].items())
