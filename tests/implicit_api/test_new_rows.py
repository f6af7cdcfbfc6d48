"""Rows folded into a fitted model: new users with new items, growth, single rows, the solver."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import oracle
import psutil
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.exceptions import ModelFitError
from tpu_als.validation import arguments
from tpu_als.weighting import LogWeighting

IALS: dict[str, Any] = dict(
    objective="ials", unobserved_weight=0.3, regularization=0.05, regularization_exponent=0.7
)


def _fitted(matrix: sparse.csr_matrix | None = None, **parameters: Any) -> Any:
    given = {"factors": 4, "iterations": 3, "random_state": 0, "alpha": 2.0, **parameters}
    model = TPUAlternatingLeastSquares(**given)
    return model.fit(random_counts(30, 20) if matrix is None else matrix, show_progress=False)


def _objective(model: Any) -> oracle.Objective:
    return oracle.Objective(
        model.objective,
        model.regularization,
        model.alpha,
        model.unobserved_weight,
        model.regularization_exponent,
    )


def _tables(model: Any) -> tuple[np.ndarray, np.ndarray]:
    return model.user_factors.copy(), model.item_factors.copy()


def _wide(count: int, width: int, seed: int = 3) -> sparse.csr_matrix:
    """Rows with entries in all columns, of which a model of 20 or 30 does not know the last."""
    return random_counts(count, width, density=0.5, negatives=True, seed=seed)


class TestUnknownEntries:
    @pytest.mark.parametrize("count", [2, 9])  # on the host, and as a batch
    @pytest.mark.parametrize("parameters", [{}, IALS], ids=["implicit", "ials"])
    @pytest.mark.parametrize("side", ["user", "item"])
    def test_they_act_as_rows_of_zeros(
        self, side: str, parameters: dict[str, Any], count: int
    ) -> None:
        model = _fitted(**parameters)
        table = model.item_factors if side == "user" else model.user_factors
        n = len(table)
        rows = _wide(count, n + 7)
        partial = getattr(model, f"partial_fit_{side}s")
        partial(np.arange(count), rows)
        ours = getattr(model, f"{side}_factors")[:count]
        grown = np.vstack([table, np.zeros((7, 4), np.float32)])
        expected = oracle.fold_in(rows, grown, _objective(model), n)  # N of (2) is the table's own
        np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    @pytest.mark.slow
    @pytest.mark.parametrize("parameters", [{}, IALS], ids=["implicit", "ials"])
    def test_tables_that_stay_on_the_devices(self, parameters: dict[str, Any]) -> None:
        """Read in one model of two that are alike, since reading brings a table to the host."""
        parameters = {**parameters, "devices": 4, "table_layout": "sharded"}
        rows = _wide(6, 27)
        read, model = _fitted(**parameters), _fitted(**parameters)
        grown = np.vstack([read.item_factors, np.zeros((7, 4), np.float32)])
        assert model._fitted.item.resident is not None
        model.partial_fit_users(np.arange(6), rows)
        expected = oracle.fold_in(rows, grown, _objective(model), 20)
        ours = model.user_factors[:6]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())

    @pytest.mark.parametrize("users_first", [True, False])
    def test_a_new_user_with_a_new_item(
        self, users_first: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = _fitted()
        user_items = sparse.csr_matrix(([3.0, 2.0], ([0, 0], [4, 20])), shape=(1, 21))
        item_users = sparse.csr_matrix(([2.0, 1.0], ([0, 0], [30, 5])), shape=(1, 31))
        steps = [
            lambda: model.partial_fit_users([30], user_items),
            lambda: model.partial_fit_items([20], item_users),
        ]
        with caplog.at_level(logging.INFO, "tpu_als"):
            for step in steps if users_first else steps[::-1]:
                step()
        assert model.user_factors.shape == (31, 4) and model.item_factors.shape == (21, 4)
        assert model.user_factors[30].any() and model.item_factors[20].any()
        found = [r.getMessage() for r in caplog.records if "does not have yet" in r.getMessage()]
        kind, name = ("items", "user_items") if users_first else ("users", "item_users")
        assert found == [
            f"1 of 2 entries of {name} belong to {kind} that the model does not have yet: they add "
            "no information to the solve"
        ]

    def test_a_row_of_unknown_entries_only_is_zero(self) -> None:
        model = _fitted()
        rows = sparse.csr_matrix(([1.0, 5.0], ([0, 0], [21, 29])), shape=(1, 40))
        model.partial_fit_users([3], rows)
        assert not model.user_factors[3].any()
        model.partial_fit_users(np.arange(8), sparse.vstack([rows] * 8, "csr"))
        assert not model.user_factors[:8].any()

    @pytest.mark.parametrize("name", ["recommend", "recalculate_user", "transform"])
    def test_others_refuse_them(self, name: str) -> None:
        model, row = _fitted(), _wide(1, 27)
        with pytest.raises(ValueError, match=r"27|in column 2\d"):
            model.transform(row) if name == "transform" else getattr(model, name)([3], row)


class TestGrowth:
    @pytest.mark.parametrize("side", ["user", "item"])
    @pytest.mark.parametrize("wrong", [5_000_000, 2**62, np.uint64(2**63), np.uint64(2**64 - 1)])
    def test_a_gap_that_is_too_large(self, side: str, wrong: Any) -> None:
        model, rows = _fitted(), _wide(1, 20 if side == "user" else 30)
        before = _tables(model)
        n = 30 if side == "user" else 20
        with pytest.raises(IndexError) as error:
            getattr(model, f"partial_fit_{side}s")([wrong], rows)
        told = str(error.value)
        assert f"{side}ids {int(wrong)} is too far beyond the table, which has {n} rows" in told
        assert f"{2 * n + 1_000_000} rows at most" in told and f"assign {side}_factors" in told
        for ours, table in zip(_tables(model), before, strict=True):
            np.testing.assert_array_equal(ours, table)

    def test_up_to_the_bound(self) -> None:
        bound = 2 * 30 + arguments.GROWTH
        assert arguments.ids_to_store([bound - 1], 30, "userids")[0].tolist() == [bound - 1]
        with pytest.raises(IndexError, match="too far beyond"):
            arguments.ids_to_store([bound], 30, "userids")

    def test_rows_in_between_are_zero(self) -> None:
        model = _fitted()
        model.partial_fit_users([33], _wide(1, 20))
        assert model.user_factors.shape == (34, 4)
        assert not model.user_factors[30:33].any() and model.user_factors[33].any()

    @pytest.mark.parametrize("count", [2, 9])
    def test_the_last_of_repeated_ids_is_stored(self, count: int) -> None:
        model, rows = _fitted(), _wide(count, 20)
        expected = model.recalculate_user(np.arange(count), rows)[-1]
        model.partial_fit_users([5] * count, rows)
        np.testing.assert_array_equal(model.user_factors[5], expected)

    @pytest.mark.parametrize("ids", [[-1], [-(2**63)], [1.5], ["a"], [None], [2**70], [[1]]])
    def test_what_is_no_id(self, ids: Any) -> None:
        model = _fitted()
        with pytest.raises(IndexError, match="userids must"):
            model.partial_fit_users(ids, _wide(1, 20))
        assert model.user_factors.shape == (30, 4)

    def test_large_ids_where_only_their_number_matters(self) -> None:
        model, rows = _fitted(), _wide(1, 20)
        ours = model.recalculate_user([np.uint64(2**64 - 1)], rows)
        np.testing.assert_array_equal(ours, model.recalculate_user([0], rows))


class TestMemory:
    @pytest.fixture(autouse=True)
    def little(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine with 1 GB left."""
        left = type("Left", (), {"available": 10**9, "total": 10**9})
        monkeypatch.setattr(psutil, "virtual_memory", left)

    @pytest.mark.parametrize(
        "call",
        [
            lambda m: m.recommend(0, _wide(1, 20), N=10**9),
            lambda m: m.recommend(np.arange(30), _wide(30, 20), N=10**8),
            lambda m: m.similar_items(0, N=10**9),
            lambda m: m.similar_users([0, 1], N=10**9),
            lambda m: m.recommend_all(_wide(30, 20), N=10**8),
        ],
    )
    @pytest.mark.filterwarnings("ignore:recommend_all is deprecated")
    def test_too_many_results(self, call: Any) -> None:
        model = _fitted()
        with pytest.raises(MemoryError, match=r"ids .* GB, scores .* GB.*set N to less than 10+"):
            call(model)

    @pytest.mark.parametrize(
        "call",
        [
            lambda m: m.recommend(0, _wide(1, 20), N=10**9),
            lambda m: m.recommend(np.arange(30), _wide(30, 20), N=10**6),
            lambda m: m.similar_items(0, N=10**9),
        ],
    )
    def test_results_that_are_mostly_padding(
        self, call: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plenty = type("Plenty", (), {"available": 10**13, "total": 10**13})
        monkeypatch.setattr(psutil, "virtual_memory", plenty)
        model = _fitted()
        with pytest.raises(MemoryError, match="mostly padding, as there are 20 rows.*at most 20"):
            call(model)
        ids, _ = model.recommend(0, _wide(1, 20), N=10**5)
        assert ids.shape == (10**5,) and (ids[20:] == -1).all()

    def test_a_whitelist_bounds_them(self) -> None:
        ids, _ = _fitted().recommend(0, None, 10**9, False, items=[3, 1])
        assert sorted(ids.tolist()) == [1, 3]

    def test_a_dense_matrix_of_scores(self) -> None:
        model = _fitted()
        model.item_factors = np.zeros((10**6, 4), np.float32)
        with pytest.raises(MemoryError, match=r"scores 4 GB.*pass fewer rows"):
            model.inverse_transform(np.ones((1000, 4), np.float32))

    @pytest.mark.parametrize("n", [2**31, 2**63, 10**30])
    def test_more_results_than_ids_can_be(self, n: int) -> None:
        with pytest.raises(ValueError, match=r"N must be below 2\*\*31"):
            _fitted().recommend(0, None, N=n, filter_already_liked_items=False)


class TestExplain:
    def test_one_row_and_the_whole_matrix_agree(self) -> None:
        matrix = random_counts(30, 20)
        model = _fitted(matrix)
        total, top, _ = model.explain(7, matrix, 3)
        for row in (matrix[7], sparse.csr_array(matrix)[7], sparse.csr_array(matrix[7])):
            ours, found, _ = model.explain(7, row, 3)
            assert ours == total and found == top

    def test_the_values_are_those_of_fit(self) -> None:
        counts = random_counts(30, 20)
        counts.data *= 10
        weighted = LogWeighting().fit_transform(counts)
        model = _fitted(weighted, use_cg=False, iterations=15)
        score = model.recalculate_user(4, weighted[4]) @ model.item_factors[2]
        assert model.explain(4, weighted[4], 2)[0] == pytest.approx(score, rel=1e-4)
        assert abs(model.explain(4, counts[4], 2)[0] - score) > 0.01 * abs(score)

    @pytest.mark.parametrize("user", [[0, 1], [], -1, 30, 1.0, None, [[0]]])
    def test_exactly_one_user(self, user: Any) -> None:
        matrix = random_counts(30, 20)
        with pytest.raises(IndexError, match="userid"):
            _fitted().explain(user, matrix, 3)

    @pytest.mark.parametrize("item", [[0, 1], [], -1, 20, 1.0, None])
    def test_exactly_one_item(self, item: Any) -> None:
        matrix = random_counts(30, 20)
        with pytest.raises(IndexError, match="itemid"):
            _fitted().explain(3, matrix, item)

    def test_a_user_beyond_the_matrix(self) -> None:
        with pytest.raises(IndexError, match="which has 5 rows: pass the whole matrix"):
            _fitted().explain(7, random_counts(30, 20)[:5], 3)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [{}, IALS], ids=["implicit", "ials"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ways_to_solve_a_row_differ_by_rounding_only(
    parameters: dict[str, Any], dtype: Any
) -> None:
    """The bound that docs/math.md states: (8 + K) eps cond(A) |z|, A being the matrix of (1)."""
    matrix = random_counts(30, 20)
    model = _fitted(matrix, factors=8, dtype=dtype, **parameters)
    parts = [slice(low, low + 3) for low in range(0, 30, 3)]
    found = {}
    for use_native in (False, True):
        model.set_params(use_native=use_native)
        batch = model.recalculate_user(np.arange(30), matrix)
        few = np.vstack([model.recalculate_user(np.arange(3), matrix[at]) for at in parts])
        np.testing.assert_array_equal(model.transform(matrix), batch)
        found[use_native] = few, batch
    np.testing.assert_array_equal(*found[True])  # the CPU backend: bit for bit
    np.testing.assert_array_equal(np.vstack([model.transform(row) for row in matrix]), batch)
    few, batch = found[False]
    conditions = np.linalg.cond(oracle.systems(matrix, model.item_factors, _objective(model)))
    bounds = (8 + 8) * np.finfo(dtype).eps * conditions * np.linalg.norm(batch, axis=1)
    assert (np.linalg.norm(few - batch, axis=1) <= bounds).all()
    assert (few != batch).any()  # else the documents may promise more


class TestSolver:
    def _arguments(self) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        return dict(
            Cui=random_counts(30, 20),
            X=rng.random((30, 4), np.float32),
            Y=rng.random((20, 4), np.float32),
            regularization=0.1,
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"regularization": -1.0}, "regularization must be a finite number of at least 0, got"),
            ({"regularization": np.nan}, "regularization must be"),
            ({"regularization": "0.1"}, "regularization must be"),
            ({"Y": np.ones((20, 5))}, r"Y must have shape \(n_columns, 4\)"),
            ({"Y": np.ones(20)}, "Y must have shape"),
            ({"Cui": random_counts(29, 20)}, "must contain 1 row for every user"),
            ({"Cui": random_counts(30, 21, density=0.9)}, "an entry in column"),
        ],
    )
    def test_bad_arguments_leave_x_alone(self, change: dict[str, Any], message: str) -> None:
        given = {**self._arguments(), **change}
        before = given["X"].copy()
        with pytest.raises(ValueError, match=message):
            _fitted().solver(**given)
        np.testing.assert_array_equal(given["X"], before)

    def test_an_x_that_cannot_hold_the_solution(self) -> None:
        given = self._arguments()
        locked = given["X"].copy()
        locked.flags.writeable = False
        for wrong in (locked, given["X"].tolist(), given["X"].astype(int), given["X"][0]):
            with pytest.raises(ValueError, match="X must be a writeable 2-D array of floats"):
                _fitted().solver(**{**given, "X": wrong})

    def test_rows_that_fail_leave_x_alone(self) -> None:
        given = self._arguments()
        given["Cui"].data[5] = 3e38
        before = given["X"].copy()
        with pytest.raises(ModelFitError, match="1 of 30 rows"):
            _fitted().solver(**{**given, "Y": 1e3 * given["Y"]})
        np.testing.assert_array_equal(given["X"], before)


def test_complex_rows_keep_the_model_as_it_was() -> None:
    model, rows = _fitted(), _wide(2, 20).astype(np.complex64)
    before = _tables(model)
    calls = [
        lambda: model.recommend([0, 1], rows),
        lambda: model.recommend(0, rows[0], recalculate_user=True),
        lambda: model.recalculate_user([0, 1], rows),
        lambda: model.partial_fit_users([0, 1], rows),
        lambda: model.transform(rows),
        lambda: model.explain(0, rows, 1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="[Cc]omplex"):
            call()
    for ours, table in zip(_tables(model), before, strict=True):
        np.testing.assert_array_equal(ours, table)
