"""Where a fit starts: grown matrices, and short fits on the same data."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.training import initial

COUNTS = random_counts(30, 20)


def model(**changes: Any) -> TPUAlternatingLeastSquares:
    """A small exact model, not fitted."""
    settings = dict(factors=4, regularization=0.1, use_cg=False, iterations=4, random_state=0)
    return TPUAlternatingLeastSquares(**{**settings, "num_threads": 1, **changes})


class TestGrownMatrices:
    @pytest.mark.parametrize("objective", ["implicit", "ials"])
    @pytest.mark.parametrize("shape", [(33, 20), (30, 26), (35, 22)])
    def test_known_rows_start_from_their_tables(
        self, objective: str, shape: tuple[int, int]
    ) -> None:
        before = model(objective=objective, warm_start=True).fit(COUNTS, show_progress=False)
        grown = [copy.deepcopy(before).set_params(iterations=0) for _ in range(2)]
        for twin in grown:
            twin.fit(random_counts(*shape), show_progress=False)
        for name, rows in zip(("user_factors", "item_factors"), shape, strict=True):
            table, old = getattr(grown[0], name), getattr(before, name)
            np.testing.assert_array_equal(table[: len(old)], old)
            new = table[len(old) :]
            assert new.shape == (rows - len(old), 4) and np.isfinite(new).all()
            if len(new):
                assert len(np.unique(new)) > 1 and np.abs(new).max() < 0.5
            np.testing.assert_array_equal(table, getattr(grown[1], name))
        other = copy.deepcopy(before).set_params(iterations=0, random_state=1)
        other.fit(random_counts(*shape), show_progress=False)
        assert not np.array_equal(other.user_factors, grown[0].user_factors) or shape[0] == 30
        assert grown[0].n_features_in_ == shape[1]

    def test_assigned_tables_grow_as_well(self) -> None:
        start = model(iterations=0)
        start.user_factors, start.item_factors = np.ones((20, 4)), np.ones((20, 4))
        start.fit(COUNTS, show_progress=False)
        assert start.user_factors.shape == (30, 4) and start.user_factors.dtype == np.float32
        assert (start.user_factors[:20] == 1).all() and (start.user_factors[20:] < 0.01).all()

    @pytest.mark.slow
    def test_a_grown_fit_scores_as_a_fresh_one(self) -> None:
        wide = random_counts(40, 25)
        grown = model(warm_start=True, iterations=12).fit(wide[:30, :20], show_progress=False)
        grown.fit(wide, show_progress=False)
        fresh = model(iterations=40).fit(wide, show_progress=False)
        assert grown.score(wide) == pytest.approx(fresh.score(wide), abs=0.05)

    @pytest.mark.parametrize("shape", [(29, 20), (30, 19), (40, 5)])
    def test_fewer_rows_are_an_error(self, shape: tuple[int, int]) -> None:
        before = model(warm_start=True).fit(COUNTS, show_progress=False)
        twin = copy.deepcopy(before)
        with pytest.raises(ValueError, match="to start from has shape .* but not removed"):
            twin.fit(random_counts(*shape), show_progress=False)
        np.testing.assert_array_equal(twin.item_factors, before.item_factors)

    def test_another_width_is_an_error(self) -> None:
        with pytest.raises(ValueError, match=r"item_factors to start from has shape \(2, 3\)"):
            initial.tables([None, np.ones((2, 3))], [(2, 4), (2, 4)], 0, np.float32, False)


class TestShortFits:
    def test_repeated_short_fits_warn_once(self) -> None:
        short = model(iterations=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            short.fit(COUNTS, show_progress=False)
        with pytest.warns(UserWarning, match="again on the same data .* warm_start=True"):
            short.fit(COUNTS, show_progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                short.fit(COUNTS, show_progress=False)
        np.testing.assert_array_equal(
            short.item_factors, model(iterations=1).fit(COUNTS, show_progress=False).item_factors
        )

    def test_after_a_long_one_and_a_pickle(self) -> None:
        first = pickle.loads(pickle.dumps(model().fit(COUNTS, show_progress=False)))
        with pytest.warns(UserWarning, match="iterations=2"):
            first.set_params(iterations=2).fit(COUNTS.copy(), show_progress=False)

    @pytest.mark.parametrize("how", ["warm", "long", "assigned", "other data", "other values"])
    def test_fits_that_do_not_warn(self, how: str) -> None:
        again = model(iterations=3 if how == "long" else 1, warm_start=how == "warm")
        again.fit(COUNTS, show_progress=False)
        other = COUNTS
        if how == "assigned":
            again.user_factors = again.user_factors.copy()
        if how == "other data":
            other = random_counts(30, 20, seed=2)
        if how == "other values":
            other = COUNTS * 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again.fit(other, show_progress=False)

    def test_a_failed_fit_is_none(self) -> None:
        def stop(*_: Any) -> None:
            raise RuntimeError

        broken = model(iterations=1)
        with pytest.raises(RuntimeError):
            broken.fit(COUNTS, show_progress=False, callback=stop)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            broken.fit(COUNTS, show_progress=False)

    def test_the_identity_of_a_matrix(self) -> None:
        large = sparse.random(3000, 2000, 0.01, "csr", random_state=0, dtype=np.float32)
        assert initial.identity(large) == initial.identity(large.copy())
        for change in (large * 2, large[::-1], large[:-1], large.T.tocsr()):
            assert initial.identity(change) != initial.identity(large)
        wide = sparse.csr_matrix(large)
        wide.indices, wide.indptr = large.indices.astype(np.int64), large.indptr.astype(np.int64)
        assert initial.identity(wide) == initial.identity(large)


@pytest.mark.parametrize("change", ["turned round", "a new one first"])
def test_named_columns_in_another_order_are_refused(change: str) -> None:
    frame = pd.DataFrame(random_counts(9, 6, density=0.6).toarray()).add_prefix("item ")
    model = TPUAlternatingLeastSquares(3, iterations=1, random_state=0, warm_start=True)
    model.fit(frame, show_progress=False)
    other = frame[frame.columns[::-1]]
    if change == "a new one first":
        other = frame.copy()
        other.insert(0, "new", 1.0)
    with pytest.raises(ValueError, match="row 0 of item_factors.* is of 'item 0'"):
        model.fit(other, show_progress=False)
    model.fit(frame.assign(new=1.0), show_progress=False)
    assert model.n_features_in_ == 7
