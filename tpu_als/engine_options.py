"""Convert the estimator's parameters for the engine. Each function checks what it reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from tpu_als import parameters
from tpu_als.engine import choice
from tpu_als.engine.backends import Backend
from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective, solver_for


def objective_of(estimator: Any) -> Objective:
    """The objective, equations (1)-(2), for an estimator's parameters."""
    parameters.check(estimator, parameters.OBJECTIVE)
    return Objective.of(
        estimator.objective,
        estimator.regularization,
        estimator.alpha,
        estimator.unobserved_weight,
        estimator.regularization_exponent,
    )


def objective_for(estimator: Any, has_features: bool) -> Objective:
    """The objective for new rows, whose ridge is larger if it draws them to what features say."""
    objective = objective_of(estimator)
    if not has_features:
        return objective
    parameters.check(estimator, ("feature_weight",))
    lam = estimator.feature_weight * objective.regularization
    return objective._replace(regularization=lam)


def linear_solver_of(estimator: Any, objective: Objective) -> str:
    """The linear solver for an objective: "auto", "cg", "exact" or "cholesky"."""
    parameters.check(estimator, ("linear_solver", "use_cg"))
    requested = estimator.linear_solver or ("cg" if estimator.use_cg else "exact")
    return solver_for(requested, objective)


def training_params(estimator: Any) -> AlsParams:
    """Parameters of a fit; all parameters of the estimator are checked."""
    parameters.check(estimator)
    return AlsParams(
        factors=int(estimator.factors),
        dtype=parameters.storage_dtype(estimator.dtype),
        linear_solver=linear_solver_of(estimator, objective_of(estimator)),
        cg_steps=int(estimator.cg_steps),
        positive=estimator.objective == "ials",
    )


def params_against(estimator: Any, table: Any, linear_solver: str = "cholesky") -> AlsParams:
    """Parameters to solve rows against a table, of its width and dtype; exact by default."""
    parameters.check(estimator, ("cg_steps",))
    # Only `fit` stores tables as bfloat16. The results of a fold-in are not rounded to it.
    return AlsParams(
        factors=table.shape[1],
        dtype="float64" if table.dtype == np.float64 else "float32",
        linear_solver="cg" if linear_solver == "auto" else linear_solver,
        cg_steps=estimator.cg_steps,
        positive=estimator.objective == "ials",
    )


def backend_of(
    estimator: Any, params: AlsParams | None = None, num_threads: int | None = None
) -> Backend:
    """The backend for a fit or a solve with these parameters; by default for tables on the host.

    A fit uses the devices of all processes. Other calls use `Backend.alone`.
    """
    parameters.check(estimator, parameters.BACKEND)
    wishes = choice.Wishes(
        estimator.devices,
        num_threads or estimator.num_threads,
        estimator.use_gpu,
        estimator.table_layout,
        bool(estimator.use_native),
    )
    if params is None:
        return choice.choose(wishes, None)
    return choice.choose(wishes, params.linear_solver)
