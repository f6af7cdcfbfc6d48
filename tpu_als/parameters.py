"""Parameters of the estimator: constraints, storage dtypes and seeds."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

LINEAR_SOLVERS = ("auto", "cg", "exact", "cholesky")
OBJECTIVES = ("implicit", "ials")
LAYOUTS = ("auto", "replicated", "sharded")
DTYPES = ("float32", "float64", "bfloat16")
# The parameters of the objective and of the choice of a backend: calls check what they read.
OBJECTIVE = (
    "objective",
    "regularization",
    "alpha",
    "unobserved_weight",
    "regularization_exponent",
)
BACKEND = ("devices", "num_threads", "use_gpu", "table_layout", "use_native")

Check = Callable[[Any], bool]
Rule = tuple[Check, str]
Class = TypeVar("Class", bound=type)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _integer(least: int) -> Check:
    return lambda v: _is_integer(v) and int(v) >= least


def _real(low: float, high: float = math.inf, is_open: bool = False) -> Check:
    def accepts(v: Any) -> bool:
        if not isinstance(v, Real) or isinstance(v, bool):
            return False
        try:
            number = float(v)
        except OverflowError:  # an integer beyond the range of floats
            return False
        if not math.isfinite(number):
            return False
        return low < number < high if is_open else low <= number <= high

    return accepts


def _at_least_zero(v: Any) -> bool:
    # Every ranking call checks such parameters, so the usual type is tested first.
    return 0.0 <= v < math.inf if type(v) is float else _real(0.0)(v)


def _or_none(accepts: Check) -> Check:
    return lambda v: v is None or accepts(v)


def _one_of(names: tuple[str, ...]) -> Check:
    return lambda v: isinstance(v, str) and v in names


def is_flag(v: object) -> bool:
    """Whether a value is True, False, 1 or 0."""
    return isinstance(v, (bool, np.bool_)) or (_is_integer(v) and v in (0, 1))


def _is_dtype(v: object) -> bool:
    try:
        storage_dtype(v)
    except ValueError:
        return False
    return True


def _is_seed(v: Any) -> bool:
    if v is None or type(v) is int:  # a generator takes a tenth of a millisecond
        return v is None or v >= 0
    try:
        random_generator(v, draw=False)
    except ValueError:
        return False
    return True


def _are_devices(v: Any) -> bool:
    # Only JAX knows how many devices there are, and JAX may not have started yet.
    is_mesh = hasattr(v, "axis_names") and hasattr(v, "devices")
    return v is None or is_mesh or _integer(1)(v) or (isinstance(v, (list, tuple)) and len(v) > 0)


_FLAG: Rule = (is_flag, "True or False")
_WEIGHT: Rule = (_at_least_zero, "a finite number of at least 0")
_COUNT: Rule = (_integer(1), "an integer of at least 1")
_SHARE: Rule = (_real(0.0, 1.0, is_open=True), "a number between 0 and 1")

# One rule for each parameter of `TPUAlternatingLeastSquares`.
RULES: dict[str, Rule] = {
    "factors": _COUNT,
    "regularization": _WEIGHT,
    "alpha": _WEIGHT,
    "dtype": (_is_dtype, "np.float32, np.float64 or 'bfloat16'"),
    "use_native": _FLAG,
    "use_cg": _FLAG,
    "iterations": (_integer(0), "an integer of at least 0"),
    "calculate_training_loss": _FLAG,
    "num_threads": (_integer(0), "an integer of at least 0 (0: all cores)"),
    "random_state": (
        _is_seed,
        "None, an integer of at least 0, a numpy.random.RandomState or a numpy.random.Generator",
    ),
    "objective": (_one_of(OBJECTIVES), f"one of {OBJECTIVES}"),
    "unobserved_weight": _WEIGHT,
    "regularization_exponent": (
        _or_none(_at_least_zero),
        "None or a finite number of at least 0",
    ),
    "linear_solver": (
        _or_none(_one_of(LINEAR_SOLVERS)),
        f"None or one of {LINEAR_SOLVERS} ('subspace' was removed: 'cg' reaches the same loss in "
        "less time)",
    ),
    "cg_steps": _COUNT,
    "feature_regularization": _WEIGHT,
    "feature_weight": (lambda v: _at_least_zero(v) and v > 0, "a finite number above 0"),
    "devices": (
        _are_devices,
        "None, an integer of at least 1, a list of jax.Device or a jax.sharding.Mesh",
    ),
    "table_layout": (_one_of(LAYOUTS), f"one of {LAYOUTS}"),
    "over_relaxation": (
        _real(0.0, 2.0, is_open=True),
        "a number between 0 and 2, where 1 is plain ALS",
    ),
    "warm_start": _FLAG,
    "use_gpu": (_or_none(is_flag), "None, True or False"),
    "early_stopping": _FLAG,
    "validation_fraction": _SHARE,
    "n_iter_no_change": _COUNT,
    "tol": _WEIGHT,
    "approximate_recall": (_or_none(_SHARE[0]), "None or a number between 0 and 1"),
    "checkpoint_dir": (
        # An empty text, as of an unset variable, would mean the current directory.
        lambda v: v is None or isinstance(v, os.PathLike) or (isinstance(v, str) and bool(v)),
        "None or the path of a directory, not an empty one",
    ),
    "checkpoint_every": _COUNT,
    "verbose": (_or_none(is_flag), "None, True or False"),
}


def check(estimator: Any, names: Iterable[str] = tuple(RULES)) -> None:
    """Raise ValueError for the first of an estimator's parameters that is invalid.

    Parameters
    ----------
    estimator : object
        Has the parameters as attributes. Its constructor may have other parameters.
    names : iterable of str, optional
        Parameters to check; by default all.
    """
    for name in names:
        accepts, expected = RULES[name]
        value = getattr(estimator, name)
        if not accepts(value):
            raise ValueError(f"{name} must be {expected}, got {value!r:.200}")


def check_parameters(parameters: Mapping[str, object]) -> None:
    """Raise ValueError for the first parameter that is invalid.

    Parameters
    ----------
    parameters : dict
        Name to value; names without a rule are ignored.
    """
    for name, (accepts, expected) in RULES.items():
        if name in parameters and not accepts(parameters[name]):
            raise ValueError(f"{name} must be {expected}, got {parameters[name]!r:.200}")


@functools.lru_cache(maxsize=32)  # `inspect.signature` takes a tenth of a millisecond
def named(function: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """Parameters that a constructor names, without ``self``, ``*args`` and ``**kwargs``."""
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.items()
    return MappingProxyType(
        {name: p for name, p in found if p.kind not in various and name != "self"}
    )


def with_defaults(cls: Class) -> Class:
    """Class decorator: make the constructor's defaults class attributes.

    A subclass whose constructor sets only some parameters then has defaults for the others.
    """
    for name, parameter in named(cls.__init__).items():  # type: ignore[misc]
        setattr(cls, name, parameter.default)
    return cls


def storage_dtype(dtype: Any) -> str:
    """Name of the storage dtype: "float32", "float64" or "bfloat16".

    Parameters
    ----------
    dtype : dtype-like
        np.float32, np.float64 or their names, or "bfloat16".

    Raises
    ------
    ValueError
        For anything else.
    """
    try:
        name = dtype if isinstance(dtype, str) and dtype in DTYPES else np.dtype(dtype).name
    except (TypeError, ValueError):
        name = None
    if name not in DTYPES:
        raise ValueError(f"dtype must be np.float32, np.float64 or 'bfloat16', got {dtype!r}")
    return name


def random_generator(random_state: Any, *, draw: bool = True) -> np.random.Generator:
    """Return the generator that implicit would use to draw the initial tables.

    Parameters
    ----------
    random_state : int, None, numpy.random.RandomState, numpy.random.Generator or seed-like
        A seed is drawn from a RandomState (which fails in implicit). Everything else is passed to
        NumPy's `default_rng`, which returns a Generator unchanged.
    draw : bool, default=True
        False only checks whether `random_state` is valid, and draws nothing from a RandomState.

    Raises
    ------
    ValueError
        For anything else; the message names `random_state`.
    """
    if isinstance(random_state, np.random.RandomState):
        seed = random_state.randint(2**31, dtype=np.int64) if draw else 0
        return np.random.default_rng(seed)
    try:
        if isinstance(random_state, (bool, np.bool_)):
            raise TypeError
        return np.random.default_rng(random_state)
    except (TypeError, ValueError):
        raise ValueError(
            f"random_state must be {RULES['random_state'][1]}, got {random_state!r:.200}"
        ) from None


def seed_identity(random_state: Any) -> Any:
    """Return a value that identifies a `random_state`: None, an integer, or JSON text."""
    if random_state is None or isinstance(random_state, Integral):
        return None if random_state is None else int(random_state)
    if isinstance(random_state, np.random.RandomState):
        state: Any = random_state.get_state(legacy=False)
    else:
        source = getattr(random_state, "bit_generator", random_state)
        state = source.state if hasattr(source, "state") else np.asarray(source)
    return json.dumps(state, default=lambda value: value.tolist(), sort_keys=True)


def random_seed(random_state: Any) -> int:
    """Draw a seed with the generator that `random_generator` returns."""
    return int(random_generator(random_state).integers(1 << 31))
