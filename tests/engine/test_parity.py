"""The numbers that the package stands for: implicit's, on any number of devices, compiled once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrices import random_counts
from models import load_class
from scipy import sparse
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from tpu_als import TPUAlternatingLeastSquares

DATA = Path(os.environ.get("TPU_ALS_DATA") or Path(__file__).parents[3] / "shared" / "data")
ML1M = DATA / "ml1m_rand80_train.npz"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "shape", "alpha", "density"),
    [(0, (90, 60), 1.0, 0.1), (1, (60, 90), 5.0, 0.2), (2, (90, 60), 20.0, 0.05)],
)
def test_scores_equal_implicits_cholesky_fit(
    seed: int, shape: tuple[int, int], alpha: float, density: float
) -> None:
    cls = load_class("implicit")
    matrix = random_counts(*shape, density=density, negatives=True, seed=seed)
    settings = dict(factors=16, regularization=0.5, alpha=alpha, iterations=8, random_state=seed)
    scores = []
    for model in (
        cls(**settings, use_cg=False),
        TPUAlternatingLeastSquares(**settings, use_cg=False),
    ):
        model.fit(matrix, show_progress=False)
        scores.append(model.user_factors @ model.item_factors.T)
    assert np.abs(scores[0] - scores[1]).max() < 2e-3


@pytest.mark.slow
@pytest.mark.skipif(not ML1M.exists(), reason=f"MovieLens-1M is not at {ML1M} (set TPU_ALS_DATA)")
def test_default_solver_reaches_implicits_cholesky_loss() -> None:
    als = pytest.importorskip("implicit.cpu.als")
    matrix = sparse.load_npz(ML1M).tocsr()
    settings: dict[str, Any] = dict(
        factors=64, regularization=10.0, alpha=40.0, iterations=15, random_state=0
    )
    losses = []
    for model in (
        als.AlternatingLeastSquares(**settings, use_cg=False),
        TPUAlternatingLeastSquares(**settings),
    ):
        model.fit(matrix, show_progress=False)
        tables = model.user_factors, model.item_factors
        losses.append(als.calculate_loss(40.0 * matrix, *tables, 10.0, 0))
    assert losses[1] < losses[0] * 1.001


SETTINGS: dict[str, Any] = dict(
    factors=8, regularization=0.1, alpha=4.0, iterations=6, random_state=0
)


class TestDevices:
    @pytest.fixture(scope="class")
    def matrix(self) -> sparse.csr_matrix:
        """Rows of very different lengths, one of them nearly full, some empty."""
        matrix = random_counts(83, 41, density=0.15, negatives=True, seed=4).tolil()
        matrix[7, :39] = 1.0
        matrix[[0, 50, 82]] = 0
        return matrix.tocsr().astype(np.float32)

    @pytest.fixture(scope="class")
    def one(self, matrix: sparse.csr_matrix) -> TPUAlternatingLeastSquares:
        """The fit on one device."""
        model = TPUAlternatingLeastSquares(**SETTINGS, devices=1)
        return model.fit(matrix, show_progress=False)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "table_layout", [pytest.param("replicated", marks=pytest.mark.slow), "sharded"]
    )
    @pytest.mark.parametrize(
        "devices",
        [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 4],
    )
    def test_the_tables_do_not_depend_on_them(
        self, matrix: sparse.csr_matrix, one: Any, devices: int, table_layout: str
    ) -> None:
        model = TPUAlternatingLeastSquares(
            **SETTINGS, devices=devices, table_layout=table_layout
        ).fit(matrix, show_progress=False)
        for table in ("user_factors", "item_factors"):
            reference = getattr(one, table)
            scale = np.abs(reference).max()
            np.testing.assert_allclose(getattr(model, table), reference, atol=1e-4 * scale)
        scores = [m.user_factors @ m.item_factors.T for m in (model, one)]
        assert np.abs(scores[0] - scores[1]).max() < 1e-3
        ids = [m.recommend(range(5), matrix[:5], N=5)[1] for m in (model, one)]
        np.testing.assert_allclose(*ids, atol=1e-3)
        np.testing.assert_allclose(model.transform(matrix), one.transform(matrix), atol=1e-3)


@pytest.mark.parametrize("use_native", [False, True])
class TestCompilations:
    def model(self, factors: int, use_native: bool) -> TPUAlternatingLeastSquares:
        """A model whose number of factors no other test has."""
        return TPUAlternatingLeastSquares(
            factors=factors + 6 * use_native, iterations=2, random_state=0, use_native=use_native
        )

    @pytest.mark.slow
    def test_a_grid_search_compiles_what_one_fit_and_one_score_do(
        self, compilations: Any, use_native: bool
    ) -> None:
        matrix = random_counts(120, 50, density=0.2, seed=9)
        grid = {"regularization": [0.01, 0.1, 1.0, 10.0], "alpha": [1.0, 5.0, 20.0]}
        train, test = np.arange(80), np.arange(80, 120)
        split = PredefinedSplit(np.where(np.arange(120) < 80, -1, 0))
        search = GridSearchCV(
            self.model(13, use_native), grid, cv=split, refit=False, error_score="raise"
        )
        with compilations() as searched:
            search.fit(matrix, show_progress=False)
        with compilations() as once:
            one = self.model(14, use_native).fit(matrix[train], show_progress=False)
            one.score(matrix[test])
        assert len(search.cv_results_["params"]) == 12
        assert (once.programs > 0) == (not use_native)  # the CPU backend has no programs
        assert searched.programs <= once.programs

    @pytest.mark.slow
    def test_more_candidates_compile_nothing_more(
        self, compilations: Any, use_native: bool
    ) -> None:
        matrix = random_counts(90, 50, density=0.2, seed=10)
        counted = []
        for factors, alphas in ((17, [1.0]), (18, np.linspace(1, 40, 12).tolist())):
            with compilations() as count:
                search = GridSearchCV(self.model(factors, use_native), {"alpha": alphas}, cv=3)
                search.fit(matrix, show_progress=False)
            counted.append(count.programs)
        assert counted[1] <= counted[0]

    @pytest.mark.slow
    @pytest.mark.parametrize("linear_solver", ["cg", "cholesky"])
    def test_a_refit_compiles_nothing(
        self, new_compilations: Any, linear_solver: str, use_native: bool
    ) -> None:
        matrix = random_counts(60, 40, seed=11)
        model = TPUAlternatingLeastSquares(
            factors=7,
            iterations=2,
            objective="ials",
            linear_solver=linear_solver,
            use_native=use_native,
            calculate_training_loss=True,
        )
        model.fit(matrix, show_progress=False).score(matrix)
        model.set_params(regularization=2.0, alpha=9.0, unobserved_weight=0.3, iterations=4)
        model.set_params(regularization_exponent=0.5, random_state=5)
        with new_compilations() as count:
            model.fit(matrix, show_progress=False).score(matrix)
        assert count.programs == 0
