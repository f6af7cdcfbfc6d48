"""Hidden entries, and NDCG."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import random_counts
from scipy import sparse
from sklearn.exceptions import UndefinedMetricWarning

from tpu_als.evaluation import holdout


@given(
    seed=st.integers(0, 1000),
    density=st.floats(0, 1),
    fraction=st.floats(0.01, 0.99),
    at_least=st.integers(0, 2),
)
def test_every_entry_is_in_one_part(
    seed: int, density: float, fraction: float, at_least: int
) -> None:
    rows = random_counts(15, 12, density=density, negatives=True, seed=seed)
    kept, hidden = holdout.hide(rows, fraction, at_least)
    np.testing.assert_array_equal((kept + hidden).toarray(), rows.toarray())
    assert kept.nnz + hidden.nnz == rows.nnz
    assert (hidden.data > 0).all()
    positive = (rows.toarray() > 0).sum(axis=1)
    count = np.diff(hidden.indptr)
    assert (count <= np.maximum(positive - 1, 0)).all()
    assert (count >= np.minimum(at_least, np.maximum(positive - 1, 0))).all()
    assert (count <= np.maximum(np.ceil(positive * fraction), at_least)).all()


def test_the_split_is_reproducible_and_has_the_requested_size() -> None:
    rows = random_counts(400, 60, density=0.1)
    kept, hidden = holdout.hide(rows, 0.2)
    again = holdout.hide(rows, 0.2)
    np.testing.assert_array_equal(kept.toarray(), again[0].toarray())
    assert hidden.nnz == pytest.approx(0.2 * rows.nnz, rel=0.1)


def test_stored_zeros_are_kept() -> None:
    rows = sparse.csr_matrix((np.array([1.0, 0, 2]), np.array([0, 1, 2]), np.array([0, 3])))
    kept, hidden = holdout.hide(rows, 0.5, at_least=1)
    assert (kept.nnz, hidden.nnz) == (2, 1)


def test_ndcg_by_hand() -> None:
    hidden = sparse.csr_matrix(np.array([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]]))
    ids = np.array([[1, 0], [2, 0], [-1, -1]])
    second = 1 / np.log2(3)
    assert holdout.mean_ndcg(ids, hidden) == pytest.approx((1 / (1 + second) + second + 0) / 3)


def test_ndcg_without_rows_is_nan() -> None:
    with pytest.warns(UndefinedMetricWarning, match="two positive entries"):
        assert np.isnan(holdout.mean_ndcg(np.empty((0, 10)), sparse.csr_matrix((0, 4))))
