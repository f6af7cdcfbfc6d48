"""Behaviour of implicit that users rely on, tested on its class and on ours: fit, save, load.

These tests are on behaviour that both classes share. ``test_contract.py`` tests the differences.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import oracle
import pytest
from matrices import withheld
from models import FACTORS, OBJECTIVE, make
from scipy import sparse

PARAMETERS = {
    "factors": 100,
    "regularization": 0.01,
    "alpha": 1.0,
    "dtype": np.float32,
    "use_native": True,
    "use_cg": True,
    "iterations": 15,
    "calculate_training_loss": False,
    "num_threads": 0,
    "random_state": None,
}
METHODS = {
    "recommend": "userid user_items N filter_already_liked_items filter_items recalculate_user "
    "items",
    "similar_items": "itemid N recalculate_item item_users filter_items items",
    "similar_users": "userid N filter_users users",
    "recalculate_user": "userid user_items",
    "recalculate_item": "itemid item_users",
    "partial_fit_users": "userids user_items",
    "partial_fit_items": "itemids item_users",
    "explain": "userid user_items itemid user_weights N",
    "recommend_all": "user_items N recalculate_user filter_already_liked_items filter_items "
    "users_items_offset",
    "rank_items": "userid user_items selected_items recalculate_user",
}


class TestConstruction:
    def test_parameters_have_implicits_order_and_defaults(self, cls: Any) -> None:
        given = list(inspect.signature(cls).parameters.values())[: len(PARAMETERS)]
        assert {p.name: p.default for p in given} == PARAMETERS
        assert [p.name for p in given] == list(PARAMETERS)
        model = cls(7, 0.5, 2.0, np.float64, False, False, 3, True, 1, 42)
        assert (model.factors, model.iterations, model.random_state) == (7, 3, 42)

    def test_public_attributes_before_fit(self, cls: Any) -> None:
        model = cls()
        assert model.user_factors is None and model.item_factors is None
        assert model.cg_steps == 3 and model.fit_callback is None
        for name in ("_YtY", "_XtX", "_user_norms", "_item_norms"):
            assert getattr(model, name) is None

    @pytest.mark.parametrize("method", METHODS)
    def test_methods_take_implicits_arguments(self, cls: Any, method: str) -> None:
        found = list(inspect.signature(getattr(cls, method)).parameters.values())[1:]
        own = [p for p in found if p.kind is p.KEYWORD_ONLY]  # cannot change what a call means
        assert " ".join(p.name for p in found if p not in own) == METHODS[method]
        assert all(p.default is None for p in own)

    def test_is_an_instance_of_implicits_class(self, cls: Any) -> None:
        als = pytest.importorskip("implicit.cpu.als")
        assert isinstance(cls(), als.AlternatingLeastSquares)
        assert issubclass(cls, als.AlternatingLeastSquares)


class TestFit:
    def test_shapes_and_types(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        for table, rows in zip(
            (fitted.user_factors, fitted.item_factors), groups.shape, strict=True
        ):
            assert type(table) is np.ndarray and table.flags.writeable
            assert table.shape == (rows, FACTORS) and table.dtype == np.float32

    def test_the_withheld_item_is_ranked_first(self, cls: Any, groups: sparse.csr_matrix) -> None:
        model, users = make(cls, factors=3), np.arange(groups.shape[0])
        model.fit(groups, show_progress=False)
        ids, _ = model.recommend(users, groups, N=1)
        np.testing.assert_array_equal(ids[:, 0], withheld(users))

    def test_equals_the_exact_solution(self, cls: Any, signed_counts: sparse.csr_matrix) -> None:
        model = make(cls, iterations=4)
        model.fit(signed_counts, show_progress=False)
        start = oracle.initial_tables(*signed_counts.shape, FACTORS, seed=0)
        users, items = oracle.fit(signed_counts, *start, 4, OBJECTIVE)
        np.testing.assert_allclose(
            model.user_factors @ model.item_factors.T, users @ items.T, atol=1e-3
        )

    def test_initial_tables(self, cls: Any, counts: sparse.csr_matrix) -> None:
        model = make(cls, iterations=0, random_state=11)
        model.fit(counts, show_progress=False)
        users, items = oracle.initial_tables(*counts.shape, FACTORS, seed=11)
        np.testing.assert_array_equal(model.user_factors, users)
        np.testing.assert_array_equal(model.item_factors, items)

    def test_float64_tables(self, cls: Any, counts: sparse.csr_matrix) -> None:
        model = make(cls, dtype=np.float64, iterations=2)
        model.fit(counts, show_progress=False)
        assert model.user_factors.dtype == model.item_factors.dtype == np.float64
        assert model.recommend(0, counts[0])[1].dtype == np.float64

    @pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float64, bool])
    def test_any_value_type(self, cls: Any, counts: sparse.csr_matrix, dtype: Any) -> None:
        values = counts.astype(dtype)
        model, reference = make(cls, iterations=1), make(cls, iterations=1)
        model.fit(values, show_progress=False)
        reference.fit(values.astype(np.float32), show_progress=False)
        np.testing.assert_allclose(model.item_factors, reference.item_factors, atol=1e-6)

    def test_other_sparse_formats_warn(self, cls: Any, counts: sparse.csr_matrix) -> None:
        from implicit.utils import ParameterWarning

        model = make(cls, iterations=1)
        with pytest.warns(ParameterWarning, match="CSR"):
            model.fit(counts.tocsc(), show_progress=False)

    def test_the_input_is_not_modified(self, cls: Any, counts: sparse.csr_matrix) -> None:
        given = counts.copy()
        make(cls, iterations=1).fit(given, show_progress=False)
        assert (given != counts).nnz == 0 and given.nnz == counts.nnz

    def test_empty_rows_and_columns_get_zero_factors(self, cls: Any) -> None:
        dense = np.zeros((6, 5), dtype=np.float32)
        dense[:4, :3] = [[1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]]
        model = make(cls, factors=2)
        model.fit(sparse.csr_matrix(dense), show_progress=False)
        assert not model.user_factors[4:].any() and not model.item_factors[3:].any()

    @pytest.mark.parametrize("shape", [(5, 4), (0, 4)])
    def test_a_matrix_without_entries_fits(self, cls: Any, shape: tuple[int, int]) -> None:
        model = make(cls, iterations=2)
        model.fit(sparse.csr_matrix(shape, dtype=np.float32), show_progress=False)
        assert model.user_factors.shape == (shape[0], FACTORS)
        assert not model.item_factors.any()

    def test_stored_zeros_are_entries(self, cls: Any, counts: sparse.csr_matrix) -> None:
        zeros = counts.copy()
        zeros.data[::3] = 0
        model = make(cls, iterations=1)
        model.fit(zeros, show_progress=False)
        start = oracle.initial_tables(*counts.shape, FACTORS, seed=0)
        expected = oracle.epoch(zeros, *start, OBJECTIVE)
        np.testing.assert_allclose(model.user_factors, expected[0], rtol=2e-3, atol=1e-4)

    def test_a_disliked_item_scores_lower(self, cls: Any, groups: sparse.csr_matrix) -> None:
        disliked = groups.copy()
        row = disliked[0].indices[0]
        disliked[0, row] = -5.0
        model = make(cls)
        model.fit(disliked, show_progress=False)
        scores = model.user_factors @ model.item_factors.T
        assert scores[0, row] < scores[1:8, row].min()

    def test_rank_deficient_without_regularization(self, cls: Any) -> None:
        block = np.kron(np.eye(2), np.ones((4, 4))).astype(np.float32)
        model = make(cls, factors=8, regularization=0.0, alpha=1.0, use_cg=True, iterations=10)
        model.fit(sparse.csr_matrix(block), show_progress=False)
        np.testing.assert_allclose(model.user_factors @ model.item_factors.T, block, atol=0.1)

    def test_conjugate_gradients_approach_the_exact_fit(
        self, cls: Any, counts: sparse.csr_matrix
    ) -> None:
        losses = {}
        for use_cg in (True, False):
            model = make(cls, use_cg=use_cg, iterations=15)
            model.fit(counts, show_progress=False)
            losses[use_cg] = oracle.loss(counts, model.user_factors, model.item_factors, OBJECTIVE)
        assert losses[True] == pytest.approx(losses[False], rel=0.05)


class TestCallback:
    def test_arguments(self, cls: Any, counts: sparse.csr_matrix) -> None:
        seen: list[tuple[Any, ...]] = []
        model = make(cls, iterations=3)
        model.fit(counts, show_progress=False, callback=lambda *a: seen.append(a))
        assert [a[0] for a in seen] == [0, 1, 2]
        assert all(len(a) == 3 and a[1] >= 0 and a[2] is None for a in seen)

    def test_loss_is_the_normalised_objective(
        self, cls: Any, signed_counts: sparse.csr_matrix
    ) -> None:
        losses = []
        model = make(cls, iterations=3, calculate_training_loss=True)
        model.fit(signed_counts, show_progress=False, callback=lambda i, s, v: losses.append(v))
        expected = oracle.loss(signed_counts, model.user_factors, model.item_factors, OBJECTIVE)
        assert losses[-1] == pytest.approx(expected, rel=1e-4)
        assert losses == sorted(losses, reverse=True)

    def test_fit_callback_attribute(self, cls: Any, counts: sparse.csr_matrix) -> None:
        seen = []
        model = make(cls, iterations=2)
        model.fit_callback = lambda i, s, v: seen.append(i)
        model.fit(counts, show_progress=False)
        assert seen == [0, 1]

    def test_the_model_is_usable_in_the_callback(self, cls: Any, counts: sparse.csr_matrix) -> None:
        tables, recommended = [], []
        model = make(cls, iterations=2)

        def look(iteration: int, seconds: float, loss: float | None) -> None:
            tables.append((model.user_factors.copy(), model.item_factors.copy()))
            recommended.append(model.recommend(0, counts[0], N=3)[0])

        model.fit(counts, show_progress=False, callback=look)
        one = make(cls, iterations=1)
        one.fit(counts, show_progress=False)
        np.testing.assert_allclose(tables[0][0], one.user_factors, atol=1e-5)
        np.testing.assert_allclose(tables[0][1], one.item_factors, atol=1e-5)
        np.testing.assert_allclose(tables[1][1], model.item_factors, atol=1e-6)
        np.testing.assert_array_equal(recommended[1], model.recommend(0, counts[0], N=3)[0])

    @pytest.mark.parametrize("error", [StopIteration, KeyboardInterrupt])
    def test_an_exception_keeps_the_last_iteration(
        self, cls: Any, counts: sparse.csr_matrix, error: type[BaseException]
    ) -> None:
        def stop(iteration: int, *_: Any) -> None:
            if iteration == 1:
                raise error

        model, two = make(cls), make(cls, iterations=2)
        with pytest.raises(error):
            model.fit(counts, show_progress=False, callback=stop)
        two.fit(counts, show_progress=False)
        np.testing.assert_allclose(model.item_factors, two.item_factors, atol=1e-5)
        assert model.recommend(0, counts[0], N=3)[0].shape == (3,)


class TestPersistence:
    KEYS = (
        "user_factors item_factors regularization factors num_threads iterations use_native "
        "use_cg cg_steps calculate_training_loss dtype random_state alpha"
    )

    def test_a_path_gets_the_suffix(self, fitted: Any, tmp_path: Path) -> None:
        fitted.save(str(tmp_path / "model"))
        assert [p.name for p in tmp_path.iterdir()] == ["model.npz"]
        with np.load(tmp_path / "model.npz", allow_pickle=False) as stored:
            assert set(self.KEYS.split()) <= set(stored)
            assert str(stored["dtype"]) == "float32" and int(stored["factors"]) == FACTORS
        self.check_same(fitted, type(fitted).load(str(tmp_path / "model")))
        self.check_same(fitted, type(fitted).load(str(tmp_path / "model.npz")))

    def test_a_file_object(self, fitted: Any) -> None:
        stream = io.BytesIO()
        fitted.save(stream)
        stream.seek(0)
        self.check_same(fitted, type(fitted).load(stream))

    def test_unfitted(self, cls: Any, tmp_path: Path) -> None:
        model = make(cls, random_state=None, dtype=np.float32)
        model.save(str(tmp_path / "model"))
        other = cls.load(str(tmp_path / "model"))
        assert other.user_factors is None and other.item_factors is None
        assert (other.factors, other.alpha, other.use_cg) == (FACTORS, 2.0, False)
        assert np.dtype(other.dtype) == np.float32
        assert model.__dict__ == other.__dict__

    @pytest.mark.parametrize("how", ["pickle", "deepcopy", "joblib"])
    def test_copies(self, fitted: Any, tmp_path: Path, how: str) -> None:
        if how == "joblib":
            joblib.dump(fitted, tmp_path / "model.joblib")
            other = joblib.load(tmp_path / "model.joblib")
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(fitted))
        else:
            other = copy.deepcopy(fitted)
        self.check_same(fitted, other)
        assert other.get_params() == fitted.get_params() if hasattr(fitted, "get_params") else True

    @staticmethod
    def check_same(model: Any, other: Any) -> None:
        assert type(other) is type(model)
        for name in ("user_factors", "item_factors"):
            np.testing.assert_array_equal(getattr(model, name), getattr(other, name))
        assert (other.factors, other.alpha, other.random_state) == (FACTORS, 2.0, 0)
        ids = [
            m.recommend([0, 1], None, filter_already_liked_items=False)[0] for m in (model, other)
        ]
        np.testing.assert_array_equal(*ids)


def test_usual_calls_do_not_warn(cls: Any, counts: sparse.csr_matrix) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make(cls, iterations=1)
        model.fit(counts, show_progress=False)
        model.recommend([0, 1], counts[:2])
