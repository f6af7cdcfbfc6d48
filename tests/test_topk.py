"""The k largest of each row, by blocks and without, against a full sort."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tpu_als.engine.xla import topk

# Few and many columns for the k, also none that a block divides; whole numbers tie.
SIZES = [(1, 1), (40, 3), (40, 40), (1000, 5), (1024, 5), (4096, 20), (4096, 300)]


def _scores(n_columns: int, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores (5, n), a third of them hidden in one row and nearly all in another; what is shown."""
    rng = np.random.default_rng(n_columns)
    scores = rng.normal(size=(5, n_columns)).astype(np.float32)
    scores[0, rng.random(n_columns) < 0.3] = -np.inf
    scores[1, 2:] = -np.inf
    return np.rint(scores) if whole else scores, rng.random(n_columns) < 0.8


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
    scores, _ = _scores(n_columns, whole)
    for recall in (None, 0.9):  # XLA has an approximate search for TPUs only
        best, columns = jax.jit(topk.largest, static_argnums=(1, 2))(scores, k, recall)
        _check(np.asarray(best), np.asarray(columns), scores)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n_columns", "k"), SIZES)
def test_in_numpy_by_blocks(n_columns: int, k: int, whole: bool) -> None:
    scores, shown = _scores(n_columns, whole)
    for some in (shown, np.ones_like(shown)):
        maxima = jax.jit(topk.maxima, static_argnums=2)(scores, some, k)
        assert (maxima is not None) == (n_columns % topk.BLOCK == 0 and n_columns >= 64 * k)
        best, columns = topk.largest_of_blocks(
            scores, None if maxima is None else np.asarray(maxima), some, k
        )
        _check(best, columns, np.where(some, scores, -np.inf))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("n_columns", "k"), SIZES)
def test_a_single_row_in_numpy(n_columns: int, k: int, whole: bool) -> None:
    for scores in _scores(n_columns, whole)[0]:
        best, columns = topk.largest_of_row(scores, k)
        assert len(best) == k
        _check(best, columns, scores)
