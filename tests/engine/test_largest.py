"""The k largest of each row, by blocks and without, against a full sort."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tpu_als.engine.cpu import ranking
from tpu_als.engine.xla import ranking as on_devices

# Few and many columns for the k, also none that a block divides; whole numbers tie.
SIZES = [(1, 1), (40, 3), (40, 40), (1000, 5), (1024, 5), (4096, 20), (4096, 300)]


def _scores(n_columns: int, whole: bool) -> np.ndarray:
    """Scores (5, n), a third of them hidden in one row and nearly all in another."""
    rng = np.random.default_rng(n_columns)
    scores = rng.normal(size=(5, n_columns)).astype(np.float32)
    scores[0, rng.random(n_columns) < 0.3] = -np.inf
    scores[1, 2:] = -np.inf
    return np.rint(scores) if whole else scores


def _check(best: np.ndarray, columns: np.ndarray, scores: np.ndarray) -> None:
    k = best.shape[-1]
    np.testing.assert_array_equal(best, -np.sort(-scores, axis=-1)[..., :k])
    np.testing.assert_array_equal(np.take_along_axis(scores, columns, -1), best)
    for row, values in zip(np.atleast_2d(columns), np.atleast_2d(best), strict=True):
        kept = row[np.isfinite(values)]
        assert len(set(kept)) == len(kept)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n_columns", "k"), SIZES)
def test_on_a_device(n_columns: int, k: int, whole: bool) -> None:
    scores = _scores(n_columns, whole)
    for recall in (None, 0.9):  # XLA has an approximate search for TPUs only
        best, columns = jax.jit(on_devices.largest, static_argnums=(1, 2))(scores, k, recall)
        _check(np.asarray(best), np.asarray(columns), scores)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n_columns", "k"), [*SIZES, (1009, 5), (4111, 20)])
def test_in_numpy_by_blocks(n_columns: int, k: int, whole: bool) -> None:
    scores = _scores(n_columns, whole)
    _check(*ranking.largest(scores, k), scores)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n_columns", "k"), SIZES)
def test_a_single_row_in_numpy(n_columns: int, k: int, whole: bool) -> None:
    for scores in _scores(n_columns, whole):
        best, columns = ranking._largest_of_row(scores, k)
        assert len(best) == k
        _check(best, columns, scores)
