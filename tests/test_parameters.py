"""Every parameter has a rule, and each call that uses a parameter checks it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
from models import make
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares, parameters


class TestParameters:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("factors", 0),
            ("factors", True),
            ("factors", 8.0),
            ("regularization", -0.1),
            ("regularization", np.nan),
            ("regularization", "0.1"),
            ("alpha", np.inf),
            ("iterations", -1),
            ("num_threads", -2),
            ("unobserved_weight", -1.0),
            ("regularization_exponent", -0.5),
            ("linear_solver", "gauss"),
            ("linear_solver", ["cg"]),
            ("cg_steps", 0),
            ("validation_fraction", 1.0),
            ("validation_fraction", 0),
            ("n_iter_no_change", 0),
            ("tol", -1e-9),
        ],
    )
    def test_out_of_range(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
            parameters.check_parameters({name: value})

    def test_in_range(self) -> None:
        parameters.check_parameters(
            {
                "factors": np.int64(3),
                "regularization": np.float32(0),
                "alpha": 2,
                "iterations": 0,
                "regularization_exponent": None,
                "linear_solver": None,
                "validation_fraction": 0.5,
                "a name without a rule": object(),
            }
        )

    @pytest.mark.parametrize(
        ("dtype", "name"),
        [
            (np.float32, "float32"),
            ("float64", "float64"),
            (np.dtype("f8"), "float64"),
            ("bfloat16", "bfloat16"),
        ],
    )
    def test_storage_dtype(self, dtype: Any, name: str) -> None:
        assert parameters.storage_dtype(dtype) == name

    @pytest.mark.parametrize("dtype", [np.float16, np.int32, "half a float", -1, None.__class__])
    def test_other_dtypes(self, dtype: Any) -> None:
        with pytest.raises(ValueError, match="dtype must be np.float32, np.float64 or 'bfloat16'"):
            parameters.storage_dtype(dtype)

    def test_generators(self) -> None:
        expected = np.random.default_rng(5).random(3)
        np.testing.assert_array_equal(parameters.random_generator(5).random(3), expected)
        rng = np.random.default_rng(0)
        assert parameters.random_generator(rng) is rng
        drawn = [
            parameters.random_generator(np.random.RandomState(seed)).random() for seed in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]


def test_every_default_follows_its_rule() -> None:
    defaults = {
        name: p.default
        for name, p in inspect.signature(TPUAlternatingLeastSquares).parameters.items()
    }
    assert list(parameters.RULES) == list(defaults)
    parameters.check_parameters(defaults)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("use_cg", [True, False, np.True_, 0, 1], ["False", None, 2, 1.0, [True]]),
        ("warm_start", [True, np.False_], ["no", None]),
        ("use_native", [True], ["yes"]),
        ("calculate_training_loss", [False], ["no", 5]),
        ("early_stopping", [1], ["no"]),
        ("use_gpu", [None, True], ["cuda", 2]),
        ("verbose", [None, False], ["no"]),
        ("alpha", [0, 1.0, np.float32(2), 10**20], [1j, 1 + 0j, "1", None, True, 10**400]),
        ("regularization", [np.int8(0)], [-0.0001, np.nan, np.inf, np.complex64(1)]),
        ("random_state", [None, 3, np.uint8(3), [1, 2], np.random.SeedSequence(3)], [-1, 1.5, "x"]),
        ("objective", ["ials"], ["warp", None, ["ials"]]),
        ("table_layout", ["sharded"], ["scattered", None]),
        ("dtype", ["float64", np.dtype("f4")], ["float16", -1, complex]),
        ("devices", [None, 2, (1,)], [0, -1, True, "cpu", [], 1.5]),
        ("num_threads", [0, 3], [-1, None, 2.0]),
    ],
)
def test_rules(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        parameters.check_parameters({name: value})
    for value in bad:
        with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
            parameters.check_parameters({name: value})


@pytest.fixture(scope="module")
def fitted(groups: sparse.csr_matrix) -> TPUAlternatingLeastSquares:
    """A model fitted to the planted groups."""
    return make(TPUAlternatingLeastSquares, iterations=1).fit(groups, show_progress=False)


EMPTY = sparse.csr_matrix((1, 18), dtype=np.float32)
FOLDS = {
    "transform": lambda m, x: m.transform(x),
    "transform nothing": lambda m, x: m.transform(EMPTY),
    "score": lambda m, x: m.score(x),
    "recalculate_user": lambda m, x: m.recalculate_user(0, x[0]),
    "recalculate nothing": lambda m, x: m.recalculate_user(0, EMPTY),
    "recalculate_item": lambda m, x: m.recalculate_item(0, x.T.tocsr()[0]),
    "partial_fit_users": lambda m, x: m.partial_fit_users([0], x[0]),
    "partial_fit_items": lambda m, x: m.partial_fit_items([0], x.T.tocsr()[0]),
    "recommend": lambda m, x: m.recommend(0, x[0], recalculate_user=True),
    "explain": lambda m, x: m.explain(0, x, 1),
    "solver": lambda m, x: m.solver(x, m.user_factors, m.item_factors, 0.1, 1),
    "save": lambda m, x: m.save("/nowhere"),
    "fit": lambda m, x: m.fit(x, show_progress=False),
}
OTHERS = {
    "approximate_recall": lambda m, x: m.recommend(0, x[0]),
    "num_threads": lambda m, x: m.transform(x),
    "devices": lambda m, x: m.recommend(range(24), x),
    "use_gpu": lambda m, x: m.transform(x),
    "table_layout": lambda m, x: m.transform(x),
    "linear_solver": FOLDS["solver"],
    "use_cg": FOLDS["solver"],
    "cg_steps": FOLDS["solver"],
}


@pytest.mark.parametrize("call", FOLDS)
@pytest.mark.parametrize("value", [-5, np.nan, "x", 1j, None], ids=str)
def test_a_parameter_changed_after_the_fit_is_checked(
    fitted: Any, groups: sparse.csr_matrix, call: str, value: Any
) -> None:
    for name in ("alpha", "regularization", "unobserved_weight"):
        model = copy.deepcopy(fitted).set_params(**{name: value})
        with pytest.raises(ValueError, match=f"^{name} must be a finite number of at least 0, got"):
            FOLDS[call](model, groups)
        np.testing.assert_array_equal(model.user_factors, fitted.user_factors)


@pytest.mark.parametrize("name", OTHERS)
def test_other_parameters_that_serving_uses(
    fitted: Any, groups: sparse.csr_matrix, name: str
) -> None:
    for value in ("x", -1, 1j):
        model = copy.deepcopy(fitted).set_params(**{name: value})
        with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
            OTHERS[name](model, groups)


def test_the_solvers_own_arguments(fitted: Any, groups: sparse.csr_matrix) -> None:
    model = copy.deepcopy(fitted)
    for arguments, name in (((-1.0, 1), "regularization"), ((0.1, -1), "num_threads")):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            model.solver(groups, model.user_factors, model.item_factors, *arguments)
    np.testing.assert_array_equal(model.user_factors, fitted.user_factors)


def test_a_fit_callback_that_is_not_callable(fitted: Any, groups: sparse.csr_matrix) -> None:
    model = copy.deepcopy(fitted)
    model.fit_callback = 5
    with pytest.raises(TypeError, match="fit_callback must be callable"):
        model.fit(groups, show_progress=False)
    np.testing.assert_array_equal(model.item_factors, fitted.item_factors)


WRONG = {
    "_YtY": [np.eye(5), np.ones(6), np.full((6, 6), np.nan), "x", np.eye(6) * 1j],
    "_item_norms": [np.ones(3), np.ones((18, 1)), np.full(18, np.inf), np.zeros(18)],
    "_XtX": [np.eye(7)],
    "_user_norms": [np.ones(25), -np.ones(24)],
}
USES = {
    "_YtY": [FOLDS["transform"], FOLDS["recalculate_user"], FOLDS["explain"], lambda m, x: m.YtY],
    "_item_norms": [lambda m, x: m.similar_items(0), lambda m, x: m.item_norms],
    "_XtX": [FOLDS["recalculate_item"], lambda m, x: m.XtX],
    "_user_norms": [lambda m, x: m.similar_users(0)],
}


@pytest.mark.parametrize("name", WRONG)
def test_derived_values_that_do_not_fit(fitted: Any, groups: sparse.csr_matrix, name: str) -> None:
    for value in WRONG[name]:
        for use in USES[name]:
            model = copy.deepcopy(fitted)
            setattr(model, name, value)
            with pytest.raises(ValueError, match=f"^{name} must hold finite .* Set {name} to None"):
                use(model, groups)
            setattr(model, name, None)
            use(model, groups)


class TestAssignedTables:
    @pytest.mark.parametrize("side", ["user", "item"])
    @pytest.mark.parametrize(
        "table",
        [
            np.array([[1, np.nan]]),
            np.array([[1, np.inf]], np.float32),
            [[1e300, 1], [1, 1]] * np.ones(1, np.longdouble),
            np.ones(3),
            np.ones((3, 0)),
            [],
            np.ones((2, 2, 2)),
            np.ones((2, 2)) * 1j,
            np.array([["a"]]),
            np.zeros(2, "f4,f4").reshape(1, 2),
        ],
        ids=str,
    )
    def test_values_that_are_not_a_table(self, fitted: Any, side: str, table: Any) -> None:
        model = copy.deepcopy(fitted)
        with pytest.raises(ValueError, match=f"^{side}_factors must"):
            setattr(model, f"{side}_factors", table)
        for name in ("user_factors", "item_factors"):
            np.testing.assert_array_equal(getattr(model, name), getattr(fitted, name))

    def test_a_row_whose_sum_overflows_is_finite(self) -> None:
        model = TPUAlternatingLeastSquares()
        model.item_factors = np.full((2, 4), 3e38, np.float32)
        assert model.item_factors.shape == (2, 4)

    def test_widths_may_differ_until_both_are_used(
        self, fitted: Any, groups: sparse.csr_matrix
    ) -> None:
        model = copy.deepcopy(fitted)
        model.item_factors = np.random.default_rng(0).random((18, 3), np.float32)
        for call in (
            lambda: model.recommend(0, groups[0]),
            lambda: model.recommend(range(24), groups),
            lambda: model.recommend(0, groups[0], items=[1]),
            lambda: model.score_pairs([0], [0]),
        ):
            with pytest.raises(ValueError, match="equally many columns to be multiplied"):
                call()
        assert model.similar_items(0, N=3)[0].shape == (3,)
        assert model.recommend(0, groups[0], N=3, recalculate_user=True)[0].shape == (3,)
        model.user_factors = model.user_factors[:, :3].copy()
        assert model.recommend(0, groups[0], N=3)[0].shape == (3,)


def test_an_empty_path_is_no_directory() -> None:
    """As of a variable of the environment that is not set; it meant the current directory."""
    with pytest.raises(ValueError, match="checkpoint_dir must be None or the path of a directory"):
        TPUAlternatingLeastSquares(4, checkpoint_dir="").fit(sparse.eye(4, format="csr"))
