"""Behaviour of implicit that users rely on, tested on its class and on ours: the two tables.

Fold-in, partial fits, explanations, and tables and caches that the caller assigns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from models import FACTORS, OBJECTIVE, make
from scipy import sparse


class TestFoldIn:
    def test_recalculate_user(self, fitted: Any, signed_counts: sparse.csr_matrix) -> None:
        rows = signed_counts[:5, :18].tocsr()
        expected = oracle.fold_in(rows, fitted.item_factors, OBJECTIVE)
        many = fitted.recalculate_user(range(5), rows)
        np.testing.assert_allclose(many, expected, atol=1e-3, rtol=1e-3)
        one = fitted.recalculate_user(0, rows[0])
        assert type(one) is np.ndarray and one.shape == (FACTORS,) and one.dtype == np.float32
        np.testing.assert_allclose(one, many[0], atol=1e-5)

    def test_recalculate_item(self, fitted: Any, signed_counts: sparse.csr_matrix) -> None:
        rows = signed_counts.T.tocsr()[:5, :24].tocsr()
        expected = oracle.fold_in(rows, fitted.user_factors, OBJECTIVE)
        many = fitted.recalculate_item(range(5), rows)
        np.testing.assert_allclose(many, expected, atol=1e-3, rtol=1e-3)
        assert fitted.recalculate_item(0, rows[0]).shape == (FACTORS,)

    def test_recalculation_does_not_change_the_tables(
        self, fitted: Any, groups: sparse.csr_matrix
    ) -> None:
        before = fitted.user_factors.copy()
        fitted.recalculate_user([3], groups[5])
        np.testing.assert_array_equal(fitted.user_factors, before)

    def test_other_formats_warn(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        from implicit.utils import ParameterWarning

        with pytest.warns(ParameterWarning):
            factors = fitted.recalculate_user([0], groups[:1].tocoo())
        np.testing.assert_allclose(factors, fitted.recalculate_user([0], groups[:1]), atol=1e-6)

    def test_one_row_per_user(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        with pytest.raises(ValueError, match="row"):
            fitted.recalculate_user([0, 1], groups[:3])

    @pytest.mark.parametrize("side", ["users", "items"])
    def test_partial_fit_grows_the_table(
        self, twin: Any, groups: sparse.csr_matrix, side: str
    ) -> None:
        matrix = groups if side == "users" else groups.T.tocsr()
        name, size = f"{side[:-1]}_factors", matrix.shape[0]
        recalculate = twin.recalculate_user if side == "users" else twin.recalculate_item
        before, expected = getattr(twin, name).copy(), recalculate([0, 9], matrix[[0, 9]])
        getattr(twin, f"partial_fit_{side}")([size + 2, 1], matrix[[0, 9]])
        table = getattr(twin, name)
        assert table.shape == (size + 3, FACTORS)
        np.testing.assert_allclose(table[[size + 2, 1]], expected, atol=1e-6)
        assert not table[size : size + 2].any()
        others = np.delete(np.arange(size), 1)
        np.testing.assert_array_equal(table[others], before[others])

    def test_partial_fit_updates_derived_values(self, twin: Any, groups: sparse.csr_matrix) -> None:
        twin.recommend(0, groups[0]), twin.similar_users(0), twin.similar_items(0)
        twin.partial_fit_users([24], groups[16])
        _ids, scores = twin.similar_users(24, N=2)
        assert scores[0] == pytest.approx(1, abs=1e-5)
        twin.partial_fit_items([18], groups.T.tocsr()[0])
        assert twin.item_norms.shape == (19,)
        np.testing.assert_allclose(twin.YtY, twin.item_factors.T @ twin.item_factors, rtol=1e-4)
        assert 18 in twin.recommend(0, groups[0], N=3)[0]

    def test_partial_fit_checks_the_number_of_rows(
        self, twin: Any, groups: sparse.csr_matrix
    ) -> None:
        with pytest.raises(ValueError, match="row"):
            twin.partial_fit_users([0, 1], groups[:1])
        with pytest.raises(ValueError, match="row"):
            twin.partial_fit_items([0], groups.T.tocsr()[:2])


class TestExplain:
    def test_contributions_sum_to_the_score(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        userid, itemid = 10, 8
        total, top, weights = fitted.explain(userid, groups, itemid, N=20)
        factors = fitted.recalculate_user(userid, groups[userid])
        assert total == pytest.approx(factors @ fitted.item_factors[itemid], abs=1e-4)
        assert sum(score for _, score in top) == pytest.approx(total, abs=1e-6)
        assert {int(i) for i, _ in top} == set(groups[userid].indices)
        values = [score for _, score in top]
        assert values == sorted(values, reverse=True)
        again = fitted.explain(userid, groups, itemid, user_weights=weights, N=2)
        assert again[0] == pytest.approx(total) and len(again[1]) == 2

    def test_disliked_items_are_not_explained(
        self, fitted: Any, signed_counts: sparse.csr_matrix
    ) -> None:
        rows = signed_counts[:24, :18].tocsr()
        total, top, _ = fitted.explain(3, rows, 0, N=20)
        assert {int(i) for i, _ in top} == set(rows[3].indices[rows[3].data > 0])
        factors = oracle.fold_in(rows[3], fitted.item_factors, OBJECTIVE)[0]
        assert total == pytest.approx(factors @ fitted.item_factors[0], abs=1e-3)


class TestTables:
    def test_assigned_tables_are_used(self, cls: Any) -> None:
        model, rng = make(cls), np.random.default_rng(0)
        model.user_factors = rng.normal(size=(4, 3)).astype(np.float32)
        model.item_factors = rng.normal(size=(5, 3)).astype(np.float32)
        ids, _scores = model.recommend(2, None, N=5, filter_already_liked_items=False)
        expected = model.item_factors @ model.user_factors[2]
        np.testing.assert_array_equal(ids, np.argsort(-expected))
        np.testing.assert_allclose(model.YtY, model.item_factors.T @ model.item_factors, atol=1e-5)
        np.testing.assert_allclose(model.XtX, model.user_factors.T @ model.user_factors, atol=1e-5)
        norms = np.linalg.norm(model.item_factors, axis=1)
        np.testing.assert_allclose(model.item_norms, norms, rtol=1e-5)

    def test_zero_rows_have_a_small_norm(self, cls: Any) -> None:
        model = make(cls)
        model.user_factors = np.eye(3, dtype=np.float32)
        model.item_factors = np.diag([1.0, 0.0, 2.0]).astype(np.float32)
        assert model.item_norms[1] == pytest.approx(1e-10)
        assert np.isfinite(model.similar_items(1, N=3)[1]).all()

    def test_derived_values_set_to_none_are_recomputed(
        self, twin: Any, groups: sparse.csr_matrix
    ) -> None:
        twin.similar_items(0)
        _ = twin.YtY
        twin.item_factors = twin.item_factors * np.float32(2)
        twin._YtY = twin._XtX = twin._item_norms = twin._user_norms = None
        np.testing.assert_allclose(twin.YtY, twin.item_factors.T @ twin.item_factors, rtol=1e-5)
        norms = np.linalg.norm(twin.item_factors, axis=1)
        np.testing.assert_allclose(twin.item_norms, norms, rtol=1e-5)
        np.testing.assert_allclose(twin.similar_items(0, N=1)[1], 1, atol=1e-5)
        expected = oracle.fold_in(groups[0], twin.item_factors, OBJECTIVE)[0]
        np.testing.assert_allclose(twin.recalculate_user(0, groups[0]), expected, atol=1e-4)

    @pytest.mark.parametrize("use_cg", [True, False])
    def test_solver_writes_its_target_in_place(
        self, cls: Any, signed_counts: sparse.csr_matrix, use_cg: bool
    ) -> None:
        users, items = oracle.initial_tables(*signed_counts.shape, FACTORS, seed=5)
        items = items + np.float32(0.1) * np.eye(*items.shape, dtype=np.float32)
        start, plain = users.copy(), oracle.Objective("implicit", 0.3)
        # the matrix has confidences: the caller multiplies by alpha
        make(cls, use_cg=use_cg, alpha=3.0).solver(signed_counts, users, items, 0.3, 1)
        exact = oracle.half_epoch(signed_counts, items, plain)
        if use_cg:
            losses = [
                oracle.total_loss(signed_counts, t, items, plain) for t in (start, users, exact)
            ]
            assert losses[1] - losses[2] < 0.2 * (losses[0] - losses[2])
        else:
            np.testing.assert_allclose(users, exact, atol=1e-3)

    def test_private_names_that_wrappers_call(self, twin: Any, groups: sparse.csr_matrix) -> None:
        np.testing.assert_array_equal(twin._user_factor([1, 2], None), twin.user_factors[[1, 2]])
        np.testing.assert_array_equal(twin._item_factor(1, None), twin.item_factors[1])
        folded = twin.recalculate_user([1], groups[1])
        np.testing.assert_allclose(twin._user_factor([1], groups[1], True), folded, atol=1e-6)
