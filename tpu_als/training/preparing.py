"""The start of a fit: choose the backend, lay out the data, and initialise or resume."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from tpu_als import engine_options, parameters
from tpu_als.engine import als, digests
from tpu_als.engine.data import AlsParams, Side
from tpu_als.engine.features import Features
from tpu_als.engine.objective import Objective
from tpu_als.evaluation import holdout
from tpu_als.serving.fitted import SIDES, FittedModel
from tpu_als.shards import ShardedMatrix
from tpu_als.training import initial
from tpu_als.training.early_stopping import EarlyStopping
from tpu_als.training.loop import Training
from tpu_als.validation import features as checked_features
from tpu_als.validation.features import FeatureTable

if TYPE_CHECKING:
    from tpu_als.estimator import TPUAlternatingLeastSquares


def prepare(
    estimator: TPUAlternatingLeastSquares,
    rows: sparse.csr_matrix | ShardedMatrix,
    fitted: FittedModel,
    params: AlsParams,
    features: tuple[FeatureTable | None, FeatureTable | None],
    at_end: contextlib.ExitStack,
) -> Training:
    """Choose the backend, lay out the data, and initialise or resume the training.

    Parameters
    ----------
    estimator : TPUAlternatingLeastSquares
        Its parameters must be valid.
    rows : csr_matrix or ShardedMatrix
        The data, canonical.
    fitted : FittedModel
        The new model, without tables.
    params : AlsParams
        The parameters in the engine's terms.
    features : two of FeatureTable or None
        Features of the users and of the items.
    at_end : ExitStack
        Receives what must be closed after the fit.
    """
    before, checkpoints, monitor = estimator._fitted, None, None
    objective, on_devices = engine_options.objective_of(estimator), isinstance(rows, ShardedMatrix)
    given = before.tables_to_start_from(estimator.warm_start)
    if given[1] is not None:
        initial.check_columns(before.feature_names, fitted.feature_names)
    identity, settings = initial.identity(rows), {}
    if estimator.checkpoint_dir is not None:
        from tpu_als.training.checkpoint import Checkpoints  # brings JAX in

        checkpoints = Checkpoints(estimator.checkpoint_dir, estimator.checkpoint_every)
        at_end.callback(checkpoints.close)
        # "exact" and "cholesky" differ by rounding only, so either resumes the other's checkpoint.
        solver = params.linear_solver.replace("exact", "cholesky")
        settings = _settings_of(estimator, objective, solver, given, on_devices)
        settings.update(_features_of(estimator, features))
    fitted_to = identity, initial.warn_if_restarted(estimator, identity)
    if estimator.early_stopping:
        fraction = float(estimator.validation_fraction)
        rows, hidden = holdout.hide(rows, estimator.validation_fraction)
        monitor = EarlyStopping(rows, hidden, estimator.n_iter_no_change, estimator.tol, fraction)
        if checkpoints is not None:
            settings["held out (digest)"] = f"{digests.entries(hidden):016x}"
    backend = engine_options.backend_of(estimator, params)
    with backend.watched():
        data = backend.place(rows, params, with_digest=checkpoints is not None)
        at_end.callback(backend.release, data)  # runs before the model's tables are fetched
        placed = [_engine_features(estimator, table, params) for table in features]
        if any(placed):
            data = als.with_features(data, *placed)
        training = Training(
            data,
            objective,
            iterations=int(estimator.iterations),
            over_relaxation=float(estimator.over_relaxation),
            with_loss=bool(estimator.calculate_training_loss),
            monitor=monitor,
            checkpoints=checkpoints,
            settings=settings,
            fitted_to=fitted_to,
            features=features,
        )
        is_resumed = training.resume()
        draws = isinstance(estimator.random_state, (np.random.RandomState, np.random.Generator))
        # Draw after a resume too, so that a generator ends in the same state in both cases.
        if not is_resumed or draws:
            given = [
                _without_empty(t, side)
                for t, side in zip(given, (data.users, data.items), strict=True)
            ]
            start = initial.state(data, given, estimator, on_devices)
            training.state = training.state if is_resumed else start
    return training


def feature_tables(
    estimator: TPUAlternatingLeastSquares,
    shape: tuple[int, int],
    user_features: object,
    item_features: object,
) -> tuple[FeatureTable | None, FeatureTable | None]:
    """Check the features that `fit` got for a matrix of this shape."""
    if estimator.regularization == 0 and not (user_features is None and item_features is None):
        raise ValueError(
            "regularization must be above 0 with user_features or item_features, got 0: without it "
            "features have no effect. Set for example regularization=0.01"
        )
    given = ((user_features, "user_features", "users"), (item_features, "item_features", "items"))
    users, items = (
        None if values is None else checked_features.table_for(values, n_rows, name, rows)
        for (values, name, rows), n_rows in zip(given, shape, strict=True)
    )
    return users, items


def _without_empty(table: np.ndarray | None, side: Side) -> np.ndarray | None:
    """A table to start from, with zeros for rows without entries, as they are during a fit.

    The last fit has set such rows to what their features predict.
    """
    if table is None or side.features is None:
        return table
    is_empty = side.lengths[: len(table)] == 0
    return np.where(is_empty[:, None], table.dtype.type(0), table) if is_empty.any() else table


def _engine_features(
    estimator: TPUAlternatingLeastSquares, given: FeatureTable | None, params: AlsParams
) -> Features | None:
    """Features in the engine's terms."""
    if given is None:
        return None
    gamma, weight = float(estimator.feature_regularization), float(estimator.feature_weight)
    matrix = checked_features.in_dtype(given.matrix, params.compute_dtype, "features")
    return Features(matrix, gamma, weight)


def _features_of(
    estimator: TPUAlternatingLeastSquares, tables: tuple[FeatureTable | None, FeatureTable | None]
) -> dict[str, object]:
    """What identifies the features of a run; nothing without features."""
    if tables == (None, None):
        return {}
    identity: dict[str, object] = {
        name: float(getattr(estimator, name))
        for name in ("feature_regularization", "feature_weight")
    }
    for side, given in zip(SIDES, tables, strict=True):
        if given is not None:
            parts = (given.matrix.data, given.matrix.indices, given.matrix.indptr)
            identity[f"{side} features"] = " ".join(map(digests.array, parts))
    return identity


def _settings_of(
    estimator: TPUAlternatingLeastSquares,
    objective: Objective,
    linear_solver: str,
    initial_tables: list[np.ndarray | None],
    on_devices: bool,
) -> dict[str, object]:
    """All settings that affect the result. A checkpoint is resumed only with the same ones.

    Parameters
    ----------
    estimator : TPUAlternatingLeastSquares
        Its parameters must be valid; they are not checked.
    objective : Objective
        The objective that they define.
    linear_solver : str
        The solver that they choose.
    initial_tables : two of ndarray or None
        User and item table that the fit starts from; None for a table that is drawn.
    on_devices : bool
        Whether tables are drawn on the devices.
    """
    is_watched = bool(estimator.early_stopping)
    watching = ("validation_fraction", "n_iter_no_change", "tol") if is_watched else ()
    drawn = "drawn on the devices" if on_devices else "drawn"
    return {
        **{name: float(value) for name, value in objective._asdict().items()},
        "linear_solver": linear_solver,
        "random_state": parameters.seed_identity(estimator.random_state),
        "cg_steps": int(estimator.cg_steps),
        **{name: float(getattr(estimator, name)) for name in ("over_relaxation", *watching)},
        "early_stopping": is_watched,
        "objective": estimator.objective,
        # With over-relaxation the tables depend on which iteration is the last.
        "iterations": int(estimator.iterations) if estimator.over_relaxation != 1 else None,
        "initial tables": [
            drawn if table is None else digests.array(table) for table in initial_tables
        ],
    }
