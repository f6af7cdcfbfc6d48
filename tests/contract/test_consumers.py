"""How libraries that wrap implicit use a model, each reproduced in a small test."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import oracle
import pytest
from matrices import withheld
from models import FACTORS, OBJECTIVE, make
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares


@pytest.fixture(scope="module")
def fitted(groups: sparse.csr_matrix) -> TPUAlternatingLeastSquares:
    """A model that recovers the planted groups."""
    return make(TPUAlternatingLeastSquares, factors=3).fit(groups, show_progress=False)


class TestRecTools:
    """rectools.models.ImplicitALSWrapperModel."""

    def test_is_an_instance_of_implicits_class(self) -> None:
        pydantic = pytest.importorskip("pydantic")
        als = pytest.importorskip("implicit.cpu.als")

        class Config(pydantic.BaseModel):
            cls: type[als.AlternatingLeastSquares]

        assert Config(cls=TPUAlternatingLeastSquares).cls is TPUAlternatingLeastSquares
        gpu = pytest.importorskip("implicit.gpu.als").AlternatingLeastSquares
        assert not isinstance(TPUAlternatingLeastSquares(), gpu)

    def test_configuration_round_trip(self) -> None:
        names = (
            "factors regularization alpha dtype iterations calculate_training_loss random_state "
            "use_native use_cg num_threads"
        )
        model = TPUAlternatingLeastSquares(8, 0.5, 3.0, np.float64, random_state=4)
        config = {name: getattr(model, name) for name in names.split()}
        other = TPUAlternatingLeastSquares(**{**config, "use_gpu": False})
        assert {name: getattr(other, name) for name in names.split()} == config

    def test_explicit_features_beside_latent_factors(
        self, signed_counts: sparse.csr_matrix
    ) -> None:
        """Explicit features in some columns; only the latent columns are assigned after a fit."""
        model = copy.deepcopy(make(TPUAlternatingLeastSquares, alpha=1.0))
        assert model.user_factors is None and model.item_factors is None
        rng = np.random.default_rng(0)
        users = rng.random((30, 2 + FACTORS), dtype=np.float32)
        items = rng.random((20, 2 + FACTORS), dtype=np.float32)
        expected, features = items.astype(np.float64), users[:, :2].copy()
        transpose = signed_counts.T.tocsr()
        plain = oracle.Objective("implicit", 0.05)
        for _ in range(2):
            model.solver(signed_counts, users, items, 0.05, 1)
            users[:, :2] = features
            exact = oracle.half_epoch(signed_counts, expected, plain)
            exact[:, :2] = features
            model.solver(transpose, items, users, 0.05, 1)
            expected = oracle.half_epoch(transpose, exact, plain)
        np.testing.assert_allclose(items, expected, atol=5e-3)
        model.user_factors, model.item_factors = users, items
        model._item_norms = model._user_norms = model._YtY = model._XtX = None
        assert model.user_factors.astype("float32").shape == (30, 2 + FACTORS)
        ids, scores = model.recommend(0, signed_counts[0], N=4)
        np.testing.assert_allclose(scores, items[ids] @ users[0], atol=1e-5)
        assert model.similar_items(0)[1][0] == pytest.approx(1, abs=1e-5)

    def test_partial_fits_from_the_latent_columns(self, counts: sparse.csr_matrix) -> None:
        """The latent columns of wider tables are assigned, and partial fits follow."""
        model = make(TPUAlternatingLeastSquares, use_cg=True, iterations=2)
        straight = make(TPUAlternatingLeastSquares, use_cg=True, iterations=4)
        straight.fit(counts, show_progress=False)
        model.fit(counts, show_progress=False)
        extra = np.ones((30, 2), dtype=np.float32), np.ones((20, 2), dtype=np.float32)
        model.user_factors = np.hstack([model.user_factors, extra[0]])
        model.item_factors = np.hstack([model.item_factors, extra[1]])
        assert model.recommend(0, counts[0], N=3)[0].shape == (3,)
        model.user_factors = model.user_factors[:, : model.factors].copy()
        model.item_factors = model.item_factors[:, : model.factors].copy()
        model.fit(counts, show_progress=False)
        np.testing.assert_allclose(model.item_factors, straight.item_factors, atol=1e-4)

    def test_settings_changed_between_fits(self, counts: sparse.csr_matrix) -> None:
        model = make(TPUAlternatingLeastSquares).fit(counts, show_progress=False)
        model.iterations, model.factors = 1, 4
        model.user_factors = model.item_factors = None
        model.fit(counts, show_progress=False)
        assert model.item_factors.shape == (20, 4) and model.n_iter_ == 1


class TestRecBole:
    """recbole.model.general_recommender.als: one fit of one iteration for each epoch."""

    def test_fits_of_one_iteration_add_up(self, counts: sparse.csr_matrix) -> None:
        settings: dict[str, Any] = dict(
            factors=FACTORS,
            regularization=0.05,
            alpha=2.0,
            use_gpu=False,
            calculate_training_loss=True,
            random_state=42,
        )
        model = TPUAlternatingLeastSquares(**settings, iterations=1, warm_start=True)
        losses: list[float] = []

        def callback(iteration: int, time: float, loss: float) -> None:
            losses.append(loss)

        for epoch in range(3):
            model.fit(counts, show_progress=False, callback=callback)
            assert len(losses) == epoch + 1
        assert losses == sorted(losses, reverse=True) and len(set(losses)) == 3
        once = TPUAlternatingLeastSquares(**settings, iterations=3)
        once.fit(counts, show_progress=False)
        np.testing.assert_allclose(model.user_factors, once.user_factors, atol=1e-5)
        assert model.user_factors[np.array([3, 4])].base is None


class TestLensKit:
    """lenskit.implicit.ALS: fits a weighted matrix, keeps the two arrays, pickles them."""

    def test_tables_are_plain_arrays(self, counts: sparse.csr_matrix) -> None:
        model = TPUAlternatingLeastSquares(4, num_threads=1, iterations=1, random_state=1)
        model.fit(counts * 40, show_progress=False)
        assert not hasattr(model.item_factors, "to_numpy")
        kept = pickle.loads(pickle.dumps((model.user_factors, model.item_factors)))
        np.testing.assert_array_equal(kept[1], model.item_factors)


class TestRePlay:
    """replay.experimental.models.ImplicitWrap: a pickled model inside a data frame function."""

    def test_one_user_at_a_time(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        cloudpickle = pytest.importorskip("cloudpickle")

        def for_user(user: int, rows: sparse.csr_matrix | None) -> tuple[np.ndarray, np.ndarray]:
            items = [*list(range(6)), 17]
            return fitted.recommend(
                userid=user,
                user_items=None if rows is None else rows[user],
                N=len(items),
                filter_already_liked_items=rows is not None,
                items=items,
            )

        remote = pickle.loads(cloudpickle.dumps(for_user))
        for rows in (groups, None):
            ids, scores = remote(3, rows)
            np.testing.assert_array_equal(ids, for_user(3, rows)[0])
            assert ids.shape == scores.shape == (7,)
        assert remote(3, groups)[0][0] == 3


class TestImplicitItself:
    @pytest.mark.parametrize("ids", [np.arange(24), np.arange(24)[::-1]])
    def test_evaluation(self, fitted: Any, groups: sparse.csr_matrix, ids: np.ndarray) -> None:
        evaluation = pytest.importorskip("implicit.evaluation")
        held_out = (np.ones(24, dtype=np.float32), (ids, withheld(ids)))
        test = sparse.csr_matrix(held_out, shape=groups.shape)
        for k in (3, 18, 30):  # more than the number of items
            found = evaluation.ranking_metrics_at_k(
                fitted, groups, test, K=k, show_progress=False, num_threads=1
            )
            assert found["ndcg"] == found["precision"] == found["map"] == pytest.approx(1.0)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [np.float64, "bfloat16"])
    def test_evaluation_with_other_tables(self, groups: sparse.csr_matrix, dtype: Any) -> None:
        evaluation = pytest.importorskip("implicit.evaluation")
        model = make(TPUAlternatingLeastSquares, factors=3, dtype=dtype)
        model.fit(groups, show_progress=False)
        value = evaluation.ndcg_at_k(model, groups, groups, K=3, show_progress=False)
        assert 0 <= value <= 1

    def test_annoy_wrapper(
        self, groups: sparse.csr_matrix, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "annoy", types.SimpleNamespace(AnnoyIndex=ExactAnnoy))
        monkeypatch.delitem(sys.modules, "implicit.ann.annoy", raising=False)
        AnnoyModel = pytest.importorskip("implicit.ann.annoy").AnnoyModel
        model = AnnoyModel(make(TPUAlternatingLeastSquares, factors=3))
        model.fit(groups, False, None)
        assert model.recommend(3, groups[3], N=2)[0][0] == 3
        inner = model.model.similar_items(4, N=3)[1]
        np.testing.assert_allclose(model.similar_items(4, N=3)[1], inner, atol=1e-3)
        ids, _ = model.recommend([3, 4], groups[3:5], N=1)
        np.testing.assert_array_equal(ids[:, 0], [3, 4])

    def test_faiss_wrapper_does_not_change_the_model(
        self, groups: sparse.csr_matrix, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = types.SimpleNamespace(
            IndexFlat=lambda factors: None, IndexIVFFlat=ExactFaiss, METRIC_INNER_PRODUCT=0
        )
        monkeypatch.setitem(sys.modules, "faiss", fake)
        monkeypatch.delitem(sys.modules, "implicit.ann.faiss", raising=False)
        FaissModel = pytest.importorskip("implicit.ann.faiss").FaissModel
        model = FaissModel(make(TPUAlternatingLeastSquares, factors=3), use_gpu=False)
        model.fit(groups, False)
        before = model.model.item_factors.copy()
        ids, _ = model.similar_items(4, N=3)  # divides the result of _item_factor in place
        assert ids[0] == 4 or set(ids) <= set(range(6))
        model.similar_items([4, 5], N=3)
        assert model.recommend(3, groups[3], N=2)[0][0] == 3
        np.testing.assert_array_equal(model.model.item_factors, before)


class ExactAnnoy:
    """The part of annoy's index that implicit uses, by brute force."""

    def __init__(self, factors: int, metric: str) -> None:
        self.rows: list[np.ndarray] = []

    def add_item(self, i: int, row: np.ndarray) -> None:
        self.rows.append(np.asarray(row, dtype=np.float64))

    def build(self, trees: int) -> None:
        self.unit = np.array([row / max(np.linalg.norm(row), 1e-12) for row in self.rows])

    def get_nns_by_vector(
        self, query: np.ndarray, n: int, search_k: int, include_distances: bool
    ) -> tuple[list[int], list[float]]:
        query = np.asarray(query, dtype=np.float64)
        cosine = self.unit @ query / max(np.linalg.norm(query), 1e-12)
        ids = np.argsort(-cosine, kind="stable")[:n]
        return list(ids), list(np.sqrt(np.maximum(2 - 2 * cosine[ids], 0)))


class ExactFaiss:
    """The part of faiss' index that implicit uses, by brute force."""

    def __init__(self, *_: Any) -> None:
        self.nprobe = 0

    def train(self, rows: np.ndarray) -> None:
        self.rows = rows.copy()

    def add(self, rows: np.ndarray) -> None:
        assert rows.dtype == np.float32

    def search(self, queries: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        scores = queries @ self.rows.T
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :n]
        return np.take_along_axis(scores, ids, axis=1), ids


class TestUserCode:
    def test_tables_from_a_file(
        self, fitted: Any, groups: sparse.csr_matrix, tmp_path: Path
    ) -> None:
        np.save(tmp_path / "users.npy", fitted.user_factors)
        np.save(tmp_path / "items.npy", fitted.item_factors)
        model = TPUAlternatingLeastSquares()
        model.user_factors = np.load(tmp_path / "users.npy", mmap_mode="r")
        model.item_factors = np.load(tmp_path / "items.npy", mmap_mode="r")
        expected = fitted.recommend(range(3), groups[:3], N=4)[0]
        np.testing.assert_array_equal(model.recommend(range(3), groups[:3], N=4)[0], expected)

    def test_a_gramian_set_by_hand(self, groups: sparse.csr_matrix) -> None:
        model = make(TPUAlternatingLeastSquares, factors=3).fit(groups, show_progress=False)
        expected = oracle.fold_in(groups[:2], model.item_factors, OBJECTIVE)
        model._YtY = model.item_factors.T @ model.item_factors
        np.testing.assert_allclose(model.YtY, model._YtY)
        folded = model.recalculate_user([0, 1], groups[:2])
        np.testing.assert_allclose(folded, expected, atol=1e-4)

    def test_memory_mapped_joblib(
        self, fitted: Any, groups: sparse.csr_matrix, tmp_path: Path
    ) -> None:
        joblib.dump(fitted, tmp_path / "model.joblib")
        model = joblib.load(tmp_path / "model.joblib", mmap_mode="r")
        np.testing.assert_array_equal(model.transform(groups), fitted.transform(groups))
        expected = fitted.recommend(0, groups[0], N=3)[0]
        np.testing.assert_array_equal(model.recommend(0, groups[0], N=3)[0], expected)

    def test_a_transposed_fit(self, groups: sparse.csr_matrix) -> None:
        model = make(TPUAlternatingLeastSquares, factors=3, iterations=1)
        with pytest.warns(Warning, match="CSR"):
            model.fit(groups.T, show_progress=False)
        assert model.user_factors.shape == (18, 3)
