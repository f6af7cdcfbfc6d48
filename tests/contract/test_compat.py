"""The class for code that was written for implicit: fits continue, arguments have its order."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrices import random_counts
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.compat import AlternatingLeastSquares

COUNTS = random_counts(60, 40, seed=3)
SETTINGS: dict[str, Any] = dict(
    factors=6, regularization=0.5, alpha=10.0, use_cg=False, num_threads=1, random_state=42
)


def epochs(cls: Any, count: int, **settings: Any) -> Any:
    """A model that is fitted `count` times, for one iteration each."""
    model = cls(**SETTINGS, iterations=1, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(count):
            model.fit(COUNTS, show_progress=False)
    return model


class TestSignature:
    def test_arguments_equal_implicits(self) -> None:
        function = pytest.importorskip("implicit.als").AlternatingLeastSquares
        theirs = list(inspect.signature(function).parameters.values())
        ours = list(inspect.signature(AlternatingLeastSquares).parameters.values())[: len(theirs)]
        assert [p.name for p in ours] == [p.name for p in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.default == other.default or mine.name == "use_gpu"
        model = AlternatingLeastSquares(7, 0.5, 2.0, np.float64, False, False, False, 3, True, 1, 9)
        assert (model.use_gpu, model.iterations, model.random_state) == (False, 3, 9)

    def test_other_parameters_equal_the_estimators(self) -> None:
        ours = {
            n: p.default for n, p in inspect.signature(AlternatingLeastSquares).parameters.items()
        }
        base = inspect.signature(TPUAlternatingLeastSquares).parameters.items()
        assert ours == {**{name: p.default for name, p in base}, "warm_start": True}
        given = {name: object() for name in ours}
        assert AlternatingLeastSquares(**given).get_params(deep=False) == given

    def test_is_an_instance_of_implicits_class(self) -> None:
        als = pytest.importorskip("implicit.cpu.als")
        assert isinstance(AlternatingLeastSquares(), als.AlternatingLeastSquares)

    def test_clone_and_pickle_keep_the_class(self) -> None:
        model = AlternatingLeastSquares(**SETTINGS, iterations=2).fit(COUNTS, show_progress=False)
        twin = clone(model)
        assert twin.get_params() == model.get_params() and twin.item_factors is None
        search = GridSearchCV(twin, {"alpha": [1.0, 10.0]}, cv=2, error_score="raise").fit(COUNTS)
        assert 0 <= search.best_score_ <= 1


class TestContinuing:
    def test_fits_of_one_iteration_add_up(self) -> None:
        once = AlternatingLeastSquares(**SETTINGS, iterations=15).fit(COUNTS, show_progress=False)
        found = epochs(AlternatingLeastSquares, 15)
        np.testing.assert_allclose(found.user_factors, once.user_factors, atol=1e-5)
        np.testing.assert_allclose(found.item_factors, once.item_factors, atol=1e-5)
        assert found.score(COUNTS) == pytest.approx(once.score(COUNTS), abs=1e-6)

    def test_fits_of_one_iteration_equal_implicits(self) -> None:
        theirs = epochs(pytest.importorskip("implicit.cpu.als").AlternatingLeastSquares, 15)
        found = epochs(AlternatingLeastSquares, 15)
        np.testing.assert_allclose(found.user_factors, theirs.user_factors, atol=2e-3)
        np.testing.assert_allclose(found.item_factors, theirs.item_factors, atol=2e-3)

    def test_grown_matrices(self) -> None:
        model = AlternatingLeastSquares(**SETTINGS, iterations=2)
        model.fit(COUNTS[:50, :30], show_progress=False).fit(COUNTS, show_progress=False)
        assert model.user_factors.shape == (60, 6) and model.item_factors.shape == (40, 6)
        with pytest.raises(ValueError, match="but not removed"):
            model.fit(COUNTS[:50], show_progress=False)

    def test_a_loaded_model_continues(self, tmp_path: Path) -> None:
        epochs(AlternatingLeastSquares, 2).save(tmp_path / "model")
        read = AlternatingLeastSquares.load(tmp_path / "model")
        assert read.warm_start is True
        read.fit(COUNTS, show_progress=False)
        expected = epochs(AlternatingLeastSquares, 3)
        np.testing.assert_allclose(read.item_factors, expected.item_factors, atol=1e-5)

    def test_warm_start_false_starts_from_new_tables(self) -> None:
        model = AlternatingLeastSquares(**SETTINGS, iterations=3, warm_start=False)
        first = model.fit(COUNTS, show_progress=False).item_factors.copy()
        np.testing.assert_array_equal(model.fit(COUNTS, show_progress=False).item_factors, first)
