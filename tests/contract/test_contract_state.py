"""Additions to implicit, and state: parameters, transforms, files."""

from __future__ import annotations

import copy
import io
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from models import FACTORS, OBJECTIVE, load_class, make
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares


@pytest.fixture(scope="module")
def fitted(groups: sparse.csr_matrix) -> TPUAlternatingLeastSquares:
    """A model fitted to the planted groups; tests that change it take a copy."""
    return make(TPUAlternatingLeastSquares).fit(groups, show_progress=False)


class TestClass:
    def test_the_constructor_only_stores(self) -> None:
        raw = {"dtype": "anything", "random_state": [1, 2], "devices": object(), "factors": "x"}
        model = TPUAlternatingLeastSquares(**raw)
        assert all(getattr(model, name) is value for name, value in raw.items())
        assert not [name for name in vars(model) if name.endswith("_") and name[0] != "_"]
        public = {name for name in vars(model) if not name.startswith("_")}
        assert public == set(model.get_params())

    def test_keyword_parameters_and_their_defaults(self) -> None:
        defaults = {
            "objective": "implicit",
            "unobserved_weight": 1.0,
            "regularization_exponent": None,
            "linear_solver": None,
            "cg_steps": 3,
            "devices": None,
            "table_layout": "auto",
            "warm_start": False,
            "use_gpu": None,
        }
        params = TPUAlternatingLeastSquares().get_params()
        assert {name: params[name] for name in defaults} == defaults
        with pytest.raises(TypeError):
            TPUAlternatingLeastSquares(*range(11))

    def test_hooks_are_of_the_class_and_tables_are_properties(self) -> None:
        assert TPUAlternatingLeastSquares.fit_callback is None
        for name in ("user_factors", "item_factors"):
            assert isinstance(getattr(TPUAlternatingLeastSquares, name), property)
        assert not hasattr(TPUAlternatingLeastSquares, "predict")

    def test_fitted_attributes(self, groups: sparse.csr_matrix) -> None:
        model = make(TPUAlternatingLeastSquares, iterations=3, calculate_training_loss=True)
        model.fit(groups, show_progress=False)
        assert (model.n_features_in_, model.n_iter_) == (18, 3)
        history = {name: list(values) for name, values in model.history_.items()}
        assert len(history["seconds"]) == len(history["loss"]) == 3
        expected = oracle.loss(groups, model.user_factors, model.item_factors, OBJECTIVE)
        assert history["loss"][-1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("solver", ["cholesky", "cg"])
@pytest.mark.parametrize(
    "objective",
    [
        OBJECTIVE,
        oracle.Objective("implicit", 0.1, 3.0, unobserved_weight=0.4),
        oracle.Objective("implicit", 0.02, 3.0, exponent=0.5),
        oracle.Objective("ials", 0.02, 1.5, unobserved_weight=0.3),
        oracle.Objective("ials", 0.05, 1.5, unobserved_weight=0.3, exponent=0.4),
    ],
    ids=str,
)
def test_every_objective_is_solved_by_one_equation(
    signed_counts: sparse.csr_matrix, objective: oracle.Objective, solver: str
) -> None:
    losses: list[float] = []
    model = TPUAlternatingLeastSquares(
        FACTORS,
        objective.regularization,
        objective.alpha,
        iterations=12,
        random_state=0,
        calculate_training_loss=True,
        objective=objective.name,
        unobserved_weight=objective.unobserved_weight,
        regularization_exponent=objective.exponent,
        linear_solver=solver,
        cg_steps=3 if solver == "cholesky" else 30,
    )
    model.fit(signed_counts, show_progress=False, callback=lambda i, s, v: losses.append(v))
    users, items = model.user_factors, model.item_factors
    close = {"atol": 3e-3, "rtol": 3e-3}
    expected = oracle.half_epoch(signed_counts.T, users, objective)
    np.testing.assert_allclose(items, expected, **close)
    assert losses[-1] == pytest.approx(
        oracle.loss(signed_counts, users, items, objective), rel=1e-4
    )
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))
    folded = oracle.fold_in(signed_counts, items, objective)
    np.testing.assert_allclose(model.transform(signed_counts), folded, **close)
    rows = signed_counts[[4, 2]]
    np.testing.assert_allclose(model.recalculate_user([4, 2], rows), folded[[4, 2]], **close)
    total, _, _ = model.explain(4, signed_counts, 7)
    assert total == pytest.approx(folded[4] @ items[7], abs=5e-3)


class TestTransform:
    def test_rows_do_not_depend_on_the_batch(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        together, order = fitted.transform(groups), np.random.default_rng(0).permutation(24)
        np.testing.assert_allclose(fitted.transform(groups[order]), together[order], atol=1e-9)
        alone = np.vstack([fitted.transform(groups[u]) for u in range(24)])
        np.testing.assert_allclose(alone, together, atol=1e-7)

    def test_unseen_and_empty_rows(self, fitted: Any, signed_counts: sparse.csr_matrix) -> None:
        rows = signed_counts[:7, :18].tocsr()
        expected = oracle.fold_in(rows, fitted.item_factors, OBJECTIVE)
        np.testing.assert_allclose(fitted.transform(rows), expected, atol=1e-3, rtol=1e-3)
        np.testing.assert_allclose(fitted.transform(rows.toarray()), expected, atol=1e-3, rtol=1e-3)
        assert not fitted.transform(sparse.csr_matrix((2, 18), dtype=np.float32)).any()

    def test_inverse_and_pairs(self, fitted: Any, groups: sparse.csr_matrix) -> None:
        embedded = fitted.transform(groups)
        scores = fitted.inverse_transform(embedded)
        np.testing.assert_allclose(scores, embedded @ fitted.item_factors.T, atol=1e-5)
        users, items = [3, 3, 20], [0, 17, 5]
        pairs = fitted.score_pairs(users, items)
        expected = (fitted.user_factors[users] * fitted.item_factors[items]).sum(axis=1)
        np.testing.assert_allclose(pairs, expected, atol=1e-6)
        with pytest.raises(IndexError):
            fitted.score_pairs([0], [18])
        with pytest.raises(ValueError):
            fitted.score_pairs([0, 1], [1, 2, 3])

    def test_score_is_a_ranking_measure_of_unseen_rows(self, groups: sparse.csr_matrix) -> None:
        unseen = groups[[3, 11, 19]]
        seen = groups[[u for u in range(24) if u not in (3, 11, 19)]]
        model = make(TPUAlternatingLeastSquares, factors=3).fit(seen, show_progress=False)
        value = model.score(unseen)
        assert value == model.score(unseen) and 0.5 < value <= 1
        noise = copy.deepcopy(model)
        noise.item_factors = np.random.default_rng(1).normal(size=(18, 3)).astype(np.float32)
        assert noise.score(groups) < model.score(groups)
        assert isinstance(value, float)

    def test_score_is_1_with_a_single_candidate(self) -> None:
        blocks = sparse.csr_matrix(np.kron(np.eye(2), np.ones((6, 5))).astype(np.float32))
        model = make(TPUAlternatingLeastSquares, factors=2).fit(blocks, show_progress=False)
        assert model.score(blocks) == pytest.approx(1.0)


class TestDevicesAndDtypes:
    @pytest.mark.parametrize("kind", ["number", "list", "mesh"])
    def test_devices(self, counts: sparse.csr_matrix, kind: str) -> None:
        import jax

        devices: Any = {"number": 2, "list": jax.devices()[1:3]}.get(kind)
        if kind == "mesh":
            devices = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("rows",))
        model = make(TPUAlternatingLeastSquares, devices=devices, iterations=2)
        model.fit(counts, show_progress=False)
        start = oracle.initial_tables(*counts.shape, FACTORS, seed=0)
        users, items = oracle.fit(counts, *start, 2, OBJECTIVE)
        np.testing.assert_allclose(
            model.user_factors @ model.item_factors.T, users @ items.T, atol=1e-3
        )

    @pytest.mark.slow
    def test_bfloat16_is_storage_only(self, counts: sparse.csr_matrix) -> None:
        half = make(TPUAlternatingLeastSquares, dtype="bfloat16").fit(counts, show_progress=False)
        full = make(TPUAlternatingLeastSquares).fit(counts, show_progress=False)
        for table in (half.user_factors, half.item_factors):
            assert table.dtype == np.float32
            assert not (table.view(np.uint32) & 0xFFFF).any()  # equal to the stored bfloat16 values
        losses = [
            oracle.loss(counts, m.user_factors, m.item_factors, OBJECTIVE) for m in (half, full)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
        assert half.recommend(0, counts[0])[1].dtype == np.float32


class TestFiles:
    def test_both_ways_with_implicit(
        self, fitted: Any, groups: sparse.csr_matrix, tmp_path: Path
    ) -> None:
        theirs = make(load_class("implicit"))
        theirs.fit(groups, show_progress=False)
        theirs.save(str(tmp_path / "theirs"))
        fitted.save(str(tmp_path / "ours"))
        for cls, name, source in (
            (TPUAlternatingLeastSquares, "theirs", theirs),
            (type(theirs), "ours", fitted),
        ):
            model = cls.load(str(tmp_path / name))
            np.testing.assert_array_equal(model.item_factors, source.item_factors)
            assert (model.alpha, model.iterations, model.use_cg) == (2.0, 10, False)
            ids = [m.recommend(0, groups[0], N=3)[0] for m in (model, source)]
            np.testing.assert_array_equal(*ids)

    def test_our_own_settings_survive(self, groups: sparse.csr_matrix, tmp_path: Path) -> None:
        model = make(
            TPUAlternatingLeastSquares,
            objective="ials",
            unobserved_weight=0.25,
            regularization_exponent=0.5,
            linear_solver="cholesky",
            dtype="bfloat16",
            cg_steps=5,
            warm_start=True,
        ).fit(groups, show_progress=False)
        model.save(tmp_path / "model.npz")
        other = TPUAlternatingLeastSquares.load(tmp_path / "model.npz")
        assert other.get_params() == model.get_params()
        np.testing.assert_array_equal(other.transform(groups), model.transform(groups))
        assert other.score(groups) == model.score(groups)

    def test_path_objects(self, fitted: Any, tmp_path: Path) -> None:
        for name in ("model", "other.npz"):
            fitted.save(tmp_path / name)
            model = TPUAlternatingLeastSquares.load(tmp_path / name)
            np.testing.assert_array_equal(model.user_factors, fitted.user_factors)

    @pytest.mark.parametrize("seed", ["generator", "state", 7, None])
    def test_models_with_any_seed_can_be_saved(
        self, groups: sparse.csr_matrix, tmp_path: Path, seed: Any
    ) -> None:
        given = {
            "generator": np.random.default_rng(0),
            "state": np.random.RandomState(0),
        }.get(seed, seed)
        model = make(TPUAlternatingLeastSquares, random_state=given, iterations=1)
        model.fit(groups, show_progress=False).save(tmp_path / "model.npz")
        other = TPUAlternatingLeastSquares.load(tmp_path / "model.npz")
        np.testing.assert_array_equal(other.item_factors, model.item_factors)
        assert other.random_state == (7 if seed == 7 else None)

    def test_a_failed_save_leaves_the_old_file(
        self, fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fitted.save(tmp_path / "model.npz")
        before = (tmp_path / "model.npz").read_bytes()

        def full(*_: Any, **__: Any) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "replace", full)
        monkeypatch.setattr(os, "rename", full)
        with pytest.raises(OSError, match="no space"):
            fitted.save(tmp_path / "model.npz")
        monkeypatch.undo()
        assert (tmp_path / "model.npz").read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["model.npz"]

    def test_nothing_is_unpickled(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "model.npz", factors=3, alpha=np.array([print], dtype=object))
        with pytest.raises(ValueError):
            TPUAlternatingLeastSquares.load(tmp_path / "model.npz")

    def test_unknown_keys_change_nothing(self, fitted: Any, tmp_path: Path) -> None:
        stream = io.BytesIO()
        fitted.save(stream)
        stream.seek(0)
        with np.load(stream) as stored:
            np.savez(tmp_path / "model.npz", **stored, fit=np.array(1), something=np.array(2))
        model = TPUAlternatingLeastSquares.load(tmp_path / "model.npz")
        assert callable(model.fit) and model.factors == FACTORS
