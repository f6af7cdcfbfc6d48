"""Subclasses of the estimator: their own parameters, and how model files keep these."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from tpu_als import parameters
from tpu_als.exceptions import DataWarning, ModelFileError

Estimator = TypeVar("Estimator")


def own_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Parameters of the constructors of a class and its bases that are not those of the engine."""
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(_base(cls))]):
        found.update(parameters.named(base.__init__))  # type: ignore[misc]
    return {name: p for name, p in found.items() if name not in parameters.RULES}


def own_values(estimator: object) -> dict[str, object]:
    """Values of these parameters, where an attribute of the same name stores them."""
    names = own_parameters(type(estimator))
    return {name: getattr(estimator, name) for name in names if hasattr(estimator, name)}


def warn_if_unfitted(estimator: Any) -> None:
    """Warn if a model to be saved has no user or item table."""
    lacking = [side for side in ("user", "item") if estimator._fitted.table(side).is_absent]
    if lacking:
        warnings.warn(
            f"the model has no {' and no '.join(lacking)} factors: the file has its "
            "parameters only, and a loaded model cannot recommend. Call fit before save",
            DataWarning,
            stacklevel=3,
        )


def warn_of_lost(estimator: object, unsaved: Iterable[str]) -> None:
    """Warn about attributes that a model file does not keep.

    Parameters
    ----------
    estimator : object
        The model that was saved.
    unsaved : iterable of str
        Parameters whose values the file cannot hold.
    """
    base = _base(type(estimator))
    kept = own_parameters(type(estimator))
    others = [name for name in vars(estimator) if name not in kept and not hasattr(base, name)]
    hooks = [name for name in ("fit_callback",) if vars(estimator).get(name) is not None]
    lost = sorted({*unsaved, *others, *hooks})
    if lost:
        warnings.warn(
            f"{len(lost)} attribute(s) of {type(estimator).__name__} are not kept by save: "
            f"{', '.join(lost)}. Set them again after load, or pickle the model",
            DataWarning,
            stacklevel=3,
        )


def construct(
    cls: type[Estimator], ours: Mapping[str, object], own: Mapping[str, object]
) -> Estimator:
    """Make an estimator with given parameters, whatever parameters its constructor has.

    Parameters
    ----------
    cls : type
        `TPUAlternatingLeastSquares` or a subclass.
    ours : dict
        Parameters of the engine. Those that the constructor does not name become attributes.
    own : dict
        Additional parameters of the subclass and its bases. Treated in the same way.

    Raises
    ------
    ModelFileError
        If the constructor requires a parameter that is not given.
    """
    wanted = parameters.named(cls.__init__)
    given = {name: value for name, value in {**ours, **own}.items() if name in wanted}
    missing = [n for n, p in wanted.items() if p.default is p.empty and n not in given]
    if missing:
        raise ModelFileError(
            f"the file has no value for {', '.join(missing)}, which {cls.__name__} requires. Load "
            "it with the class that saved it, or give the parameter a default"
        )
    estimator = cls(**given)
    # The file has no entries for parameters that are None.
    base = _base(cls)
    nones = [name for name in parameters.RULES if getattr(base, name) is None]
    for name, value in {**dict.fromkeys(nones), **ours, **own}.items():
        if name not in given:
            with contextlib.suppress(AttributeError):  # a read-only property of a subclass
                setattr(estimator, name, value)
    return estimator


def copy_unnamed(source: object, target: object) -> None:
    """Copy to a clone the parameters that its constructor takes as ``**kwargs``."""
    from sklearn.base import clone  # late: a service does not need scikit-learn

    named = parameters.named(type(source).__init__)
    for name in (*parameters.RULES, *own_parameters(type(source))):
        if name in vars(source) and name not in named:
            setattr(target, name, clone(getattr(source, name), safe=False))


def _base(cls: type) -> type:
    """The base class that has the engine's parameters and their defaults."""
    return next(c for c in reversed(cls.__mro__) if parameters.RULES.keys() <= vars(c).keys())
