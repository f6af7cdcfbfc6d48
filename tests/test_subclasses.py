"""Subclasses with their own constructors keep the engine's parameters in all calls."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrices import random_counts
from models import make
from sklearn.base import clone

from tpu_als import DataWarning, ModelFileError, TPUAlternatingLeastSquares

COUNTS = random_counts(15, 10)
OURS = dict(factors=3, alpha=20.0, regularization=5.0, iterations=2, random_state=0, num_threads=1)
OURS.update(objective="ials", linear_solver="cholesky", unobserved_weight=0.5)


class Named(TPUAlternatingLeastSquares):
    """Passes all parameters except its own to the base class."""

    def __init__(self, names: Any = None, **kw: Any) -> None:
        super().__init__(**kw)
        self.names = names


class Positional(TPUAlternatingLeastSquares):
    """Names none of the parameters."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)


class Fewer(TPUAlternatingLeastSquares):
    """Does not call the constructor of its base."""

    def __init__(self, factors: int = 3, depth: int = 1) -> None:
        self.factors = factors
        self.depth = depth


class Fixed(TPUAlternatingLeastSquares):
    """Has none of the engine's parameters, and requires a parameter of its own."""

    def __init__(self, tag: str) -> None:
        super().__init__(**OURS)
        self.tag = tag


MODELS = {
    "named": lambda: Named(names=["a", "b"], **OURS),
    "positional": lambda: Positional(3, 5.0, 20.0, **dict(list(OURS.items())[3:])),
    "fixed": lambda: Fixed("night"),
}


def plain() -> TPUAlternatingLeastSquares:
    """The same model of the base class, fitted."""
    return TPUAlternatingLeastSquares(**OURS).fit(COUNTS, show_progress=False)


@pytest.mark.parametrize("kind", MODELS)
class TestKinds:
    def test_fit_and_fold_in_use_the_parameters(self, kind: str) -> None:
        model, expected = MODELS[kind]().fit(COUNTS, show_progress=False), plain()
        np.testing.assert_array_equal(model.item_factors, expected.item_factors)
        np.testing.assert_array_equal(model.transform(COUNTS), expected.transform(COUNTS))
        np.testing.assert_array_equal(
            model.recalculate_user(0, COUNTS[0]), expected.recalculate_user(0, COUNTS[0])
        )

    def test_bad_parameters_are_refused(self, kind: str) -> None:
        model = MODELS[kind]()
        model.alpha = -5
        with pytest.raises(ValueError, match="alpha must be"):
            model.fit(COUNTS, show_progress=False)

    def test_files_keep_them(self, kind: str, tmp_path: Path) -> None:
        model = MODELS[kind]().fit(COUNTS, show_progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save(tmp_path / "model")
            read = type(model).load(tmp_path / "model")
        assert {name: getattr(read, name) for name in OURS} == OURS
        assert getattr(read, "names", None) == getattr(model, "names", None)
        assert getattr(read, "tag", None) == getattr(model, "tag", None)
        np.testing.assert_array_equal(read.transform(COUNTS), model.transform(COUNTS))
        as_base = TPUAlternatingLeastSquares.load(tmp_path / "model")
        assert {name: getattr(as_base, name) for name in OURS} == OURS

    def test_pickles_and_copies_keep_everything(self, kind: str) -> None:
        model = MODELS[kind]().fit(COUNTS, show_progress=False)
        model.note = {"night": 3}
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model.to_gpu()):
            assert twin.note == {"night": 3}
            assert {name: getattr(twin, name) for name in OURS} == OURS

    def test_checkpoints_compare_them(self, kind: str, tmp_path: Path) -> None:
        model = MODELS[kind]()
        model.checkpoint_dir = tmp_path
        model.fit(COUNTS, show_progress=False)
        first = model.item_factors.copy()
        model.alpha = 21.0
        model.fit(COUNTS, show_progress=False)
        alone = MODELS[kind]()
        alone.alpha = 21.0
        alone.fit(COUNTS, show_progress=False)
        np.testing.assert_array_equal(model.item_factors, alone.item_factors)
        assert not np.array_equal(model.item_factors, first)


def test_attributes_that_a_constructor_lacks_have_their_defaults(tmp_path: Path) -> None:
    model = Fewer(depth=4).fit(COUNTS, show_progress=False)
    assert (model.alpha, model.iterations, model.n_iter_) == (1.0, 15, 15)
    assert "alpha" not in vars(model)
    model.save(tmp_path / "model")
    read = Fewer.load(tmp_path / "model")
    assert (read.factors, read.depth, read.alpha) == (3, 4, 1.0)


@pytest.mark.parametrize(
    "value",
    [None, 3, 2.5, np.nan, True, "text", "", ["a", 1, None], ("a", 2), {"a": [1, {"b": None}]}],
    ids=str,
)
def test_parameters_of_a_subclass_are_saved(value: Any, tmp_path: Path) -> None:
    model = Named(value, **OURS).fit(COUNTS, show_progress=False)
    model.save(tmp_path / "model")
    read = Named.load(tmp_path / "model").names
    assert type(read) is type(value) and (read == value or value != value)


def test_arrays_of_a_subclass_are_saved(tmp_path: Path) -> None:
    Named(np.arange(4), **OURS).fit(COUNTS, show_progress=False).save(tmp_path / "model")
    np.testing.assert_array_equal(Named.load(tmp_path / "model").names, np.arange(4))


def test_one_warning_names_unsaved_attributes(tmp_path: Path) -> None:
    model = Named({1, 2}, **{**OURS, "random_state": np.random.default_rng(0)})
    model.fit(COUNTS, show_progress=False)
    model.note, model.fit_callback = 1, print
    with pytest.warns(DataWarning) as warned:
        model.save(tmp_path / "model")
    assert len(warned) == 1
    assert (
        "4 attribute(s) of Named are not kept by save: fit_callback, names, note, random_state"
        in (str(warned[0].message))
    )
    assert Named.load(tmp_path / "model").names is None


def test_a_required_parameter_that_the_file_lacks(tmp_path: Path) -> None:
    make(TPUAlternatingLeastSquares).fit(COUNTS, show_progress=False).save(tmp_path / "model")
    with pytest.raises(ModelFileError, match="no value for tag, which Fixed requires"):
        Fixed.load(tmp_path / "model")


def test_clones_keep_parameters_that_the_constructor_does_not_name(tmp_path: Path) -> None:
    class Named(TPUAlternatingLeastSquares):
        def __init__(self, names: Any = None, **parameters: Any) -> None:
            super().__init__(**parameters)
            self.names = names

    class Longer(Named):
        def __init__(self, extra: int = 1, **parameters: Any) -> None:
            super().__init__(**parameters)
            self.extra = extra

    for cls in (Named, Longer):
        model = cls(names=["tea"], factors=6, alpha=20.0, regularization=5.0, iterations=1)
        loaded = tmp_path / f"{cls.__name__}.npz"
        model.fit(random_counts(9, 7, density=0.5), show_progress=False).save(loaded)
        for twin in (clone(model), cls.load(loaded)):
            found = twin.names, twin.factors, twin.alpha, twin.regularization
            assert found == (["tea"], 6, 20.0, 5.0)
    assert clone(Longer(extra=3)).extra == 3
