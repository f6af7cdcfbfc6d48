"""Equations (1)-(2) of docs/math.md; no other module defines them.

The loops of the CPU backend, XLA's programs, fold-in, the loss and `explain` call these functions,
with numbers, NumPy arrays or JAX arrays. numba compiles `confidence` and `ridge`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from tpu_als.parameters import OBJECTIVES

_Values = TypeVar("_Values")  # floating-point numbers: NumPy or JAX arrays, or scalars

# CG starts at zero if the diagonal is this many times what the entries can add.
DOMINANT = 1e3


class Objective(NamedTuple):
    """The numbers of equations (1)-(2). They are traced, so new values need no compilation."""

    regularization: Any
    alpha: Any
    unobserved_weight: Any
    exponent: Any
    offset: Any

    @classmethod
    def of(
        cls,
        name: str,
        regularization: float,
        alpha: float,
        unobserved_weight: float = 1.0,
        exponent: float | None = None,
    ) -> Objective:
        """Return the numbers that make equations (1)-(2) the named objective.

        Parameters
        ----------
        name : {"implicit", "ials"}
            Hu, Koren, Volinsky (2008) in implicit's convention, or Rendle et al. (2022).
        regularization, alpha, unobserved_weight : float
            lam, alpha and a0.
        exponent : float, optional
            nu of equation (2). None means 0 for "implicit" and 1 for "ials".

        Raises
        ------
        ValueError
            For an unknown name.
        """
        if name not in OBJECTIVES:
            raise ValueError(f"objective must be one of {OBJECTIVES}, got {name!r}")
        implicit = name == "implicit"
        if exponent is None:
            exponent = 0.0 if implicit else 1.0
        # The total weight of an observed cell of "implicit" is |c|; the gramian adds a0 of it.
        offset = unobserved_weight if implicit else 0.0
        return cls(regularization, alpha, unobserved_weight, exponent, offset)


def solver_for(name: str, objective: Objective) -> str:
    """The solver to use when `name` is requested: "cholesky" if the diagonal is too small for CG.

    CG is preconditioned by a0 s + lam. If a0 and lam are both below the rounding error of alpha, a
    few steps are not enough, and only a direct solve finds the least-norm solution of singular
    systems.
    """
    least = float(np.finfo(np.float32).eps) * objective.alpha
    is_bare = max(objective.regularization, objective.unobserved_weight) <= least
    return "cholesky" if is_bare else name


def confidence(objective: Objective, values: _Values) -> tuple[_Values, _Values]:
    """Weights w and v of equation (1) for stored values; works on NumPy and JAX arrays.

    A negative value is a disliked item: its target is 0 and its weight |alpha x|.
    """
    c = objective.alpha * values
    size = abs(c)
    return size - objective.offset, (size + c) / 2


def ridge(objective: Objective, n_entries: _Values, n_source: Any) -> _Values:
    """Ridge lam_u of equation (2) for rows of `n_entries`; works on NumPy and JAX arrays."""
    scale = n_entries + objective.unobserved_weight * n_source
    return objective.regularization * scale**objective.exponent


def without_offset(objective: Objective) -> Objective:
    """The objective with weights w = |c|, of which the offset is subtracted later."""
    return objective._replace(offset=objective.offset * 0)


def total_weight(objective: Objective, absolute_sum: float, n_entries: int, n_cells: int) -> float:
    """Sum of the weights of all cells, given the sum of |x| over the stored ones."""
    stored = objective.alpha * absolute_sum - objective.offset * n_entries
    return stored + objective.unobserved_weight * n_cells


def typed(objective: Objective, dtype: DTypeLike) -> Objective:
    """The objective's numbers in the dtype that sums are done in."""
    kind = np.dtype(dtype).type
    with np.errstate(over="ignore"):  # an infinite ridge is bounded where it is used
        return Objective(*(kind(number) for number in objective))


def largest_weight(
    objective: Objective, magnitudes: tuple[float, float] | None, dtype: DTypeLike
) -> float:
    """Bound on the absolute weights w of (1), at most a quarter of the dtype's largest number.

    Parameters
    ----------
    objective : Objective
        Equations (1)-(2).
    magnitudes : (float, float) or None
        Smallest and largest absolute value of an entry. If they are unknown, values count as 1.
    dtype : dtype
        The dtype of sums.
    """
    largest = 1.0 if magnitudes is None else max(float(magnitudes[1]), 0.0)
    weight = float(objective.alpha) * largest + float(objective.offset)
    return min(weight, float(np.finfo(dtype).max) / 4)


def weights_vanish(
    objective: Objective, magnitudes: tuple[float, float] | None, dtype: DTypeLike
) -> bool:
    """Whether every weight w of (1) is 0, as for binary data with alpha 1 and "implicit"."""
    if magnitudes is None or magnitudes[0] != magnitudes[1]:
        return False
    value = np.asarray(magnitudes[0], dtype)
    return bool(confidence(typed(objective, dtype), value)[0] == 0)
