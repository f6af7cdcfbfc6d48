"""One fit of the estimator: lay out the data, initialise or resume, iterate, publish the model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from tpu_als import engine_options
from tpu_als.engine import als, digests
from tpu_als.engine.als import AlsState
from tpu_als.engine.data import AlsParams, Side
from tpu_als.engine.features import Features
from tpu_als.evaluation import holdout
from tpu_als.exceptions import ModelFitError
from tpu_als.serving.features import FittedFeatures
from tpu_als.serving.fitted import SIDES, FactorTable, FittedModel, tables_of
from tpu_als.shards import ShardedMatrix
from tpu_als.training import initial, progress
from tpu_als.training.early_stopping import EarlyStopping
from tpu_als.training.loop import Training, settings_of
from tpu_als.validation import features as checked_features
from tpu_als.validation.features import FeatureTable

if TYPE_CHECKING:
    from tqdm import tqdm

    from tpu_als.estimator import TPUAlternatingLeastSquares

log = logging.getLogger("tpu_als")


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
        settings = settings_of(estimator, objective, solver, given, on_devices)
        settings.update(_identity_of(estimator, features))
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


def run(
    estimator: TPUAlternatingLeastSquares,
    training: Training,
    fitted: FittedModel,
    callback: Callable[[int, float, float | None], object] | None,
    bar: tqdm,
) -> None:
    """Run the iterations, and publish the model as a whole.

    After an error the estimator has its model from before `fit`. After a KeyboardInterrupt, or an
    error in the callback, it has the model of the last complete iteration, if there is one.
    """
    before, has_published, is_calling = vars(estimator).get("_fitted"), False, False
    try:
        fitted, state = _after(training, fitted), training.state
        while not training.is_over:
            with training.data.backend.watched():
                report = training.step()
            fitted, state = _after(training, fitted), training.state
            progress.advance(bar, report)
            log.debug("iteration %d: %s", training.done - 1, report)
            if callback:
                estimator._publish(_with_features(training, state, fitted))
                has_published = is_calling = True
                callback(training.done - 1, report["seconds"], report.get("loss"))
                is_calling = False
        estimator._publish(_finished(training, fitted))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and fitted.n_iter:
            estimator._publish(_with_features(training, state, fitted))
        elif has_published and not is_calling:
            estimator._publish(before)
        raise


def _finished(training: Training, fitted: FittedModel) -> FittedModel:
    """The model at the end of a fit; with early stopping, the best one."""
    state = training.state
    if training.monitor is not None and training.monitor.best is not None:
        users, items = (
            FactorTable(table) if isinstance(table, np.ndarray) else FactorTable(None, table)
            for table in training.monitor.best
        )
        fitted = replace(fitted, user=users, item=items)
        if training.features != (None, None):
            best = (t if isinstance(t, np.ndarray) else t.fetch() for t in training.monitor.best)
            state = als.start(training.data, *best)
    losses = training.history.get("loss")
    if losses:
        log.info("final training loss %.4f", losses[-1])
    return _with_features(training, state, fitted)


def _with_features(training: Training, state: AlsState, fitted: FittedModel) -> FittedModel:
    """The model with the weights of features, and with rows for users and items without entries."""
    changes: dict[str, Any] = {}
    data = training.data
    sides = zip(SIDES, ("users", "items"), state, training.features, strict=True)
    with data.backend.watched():
        for name, target, table, given in sides:
            if given is None:
                continue
            side, dtype = getattr(data, target), data.params.compute_dtype
            whole, weights = als.completed(table, data, training.objective, target=target)
            assert weights is not None
            if not np.isfinite(weights).all():
                raise ModelFitError(
                    f"the weights of {name} features are not finite: scale the features to "
                    "similar sizes, or raise feature_regularization"
                )
            changes[name] = FactorTable(unread=data.backend.table(whole, side, data))
            rows = given.matrix.astype(dtype)
            features = FittedFeatures(weights.astype(dtype), rows, given.names)
            changes[f"{name}_features"] = features
    return replace(fitted, **changes)


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


def _identity_of(
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


def _after(training: Training, fitted: FittedModel) -> FittedModel:
    """The model after the iterations run so far."""
    tables = tables_of(training.state, training.data)
    return fitted.trained(tables, training.done, training.history)
