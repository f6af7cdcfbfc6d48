"""A running fit: iterate, stop early, save checkpoints, publish the model."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from tpu_als.engine import als
from tpu_als.engine.als import AlsState
from tpu_als.engine.backends import Table
from tpu_als.engine.data import Data
from tpu_als.engine.objective import Objective
from tpu_als.exceptions import ModelFitError
from tpu_als.serving.factor_table import FactorTable
from tpu_als.serving.features import FittedFeatures
from tpu_als.serving.fitted import SIDES, FittedModel, tables_of
from tpu_als.training import progress
from tpu_als.training.early_stopping import EarlyStopping, Factors
from tpu_als.validation.features import FeatureTable
from tpu_als.validation.tables import finite_counts

if TYPE_CHECKING:
    from tqdm import tqdm

    from tpu_als.engine.xla.data import XlaData
    from tpu_als.estimator import TPUAlternatingLeastSquares
    from tpu_als.training.checkpoint import Checkpoints
    from tpu_als.training.initial import Identity

log = logging.getLogger("tpu_als")


@dataclass
class Training:
    """Runs single iterations, from initial tables or from a checkpoint.

    Attributes
    ----------
    data : Data
        The placed matrix.
    objective : Objective
        The function to minimise.
    iterations : int
        Number of iterations to run in total.
    over_relaxation : float
        omega of equation (5) in all iterations except the first and the last.
    with_loss : bool
        Whether to compute the loss after each iteration.
    monitor : EarlyStopping or None
        Early stopping, which may end the fit before `iterations`.
    checkpoints : Checkpoints or None
        Where to save checkpoints.
    settings : dict
        All settings that affect the result. With the data they identify the run.
    fitted_to : tuple
        Identity of the data, and whether a repeated fit on them has warned.
    features : two of FeatureTable or None
        Features of the users and of the items, as given.
    state : AlsState
        The tables; set by `resume`, or by the caller.
    done : int
        Number of iterations run.
    history : dict of list of float
        The values that the iterations reported, by name.
    """

    data: Data
    objective: Objective
    iterations: int
    over_relaxation: float
    with_loss: bool
    monitor: EarlyStopping | None
    checkpoints: Checkpoints | None
    settings: dict[str, object]
    fitted_to: tuple[Identity, bool]
    features: tuple[FeatureTable | None, FeatureTable | None] = (None, None)
    state: AlsState = field(init=False)
    done: int = 0
    history: dict[str, list[float]] = field(default_factory=lambda: {"seconds": []})

    @property
    def hides_progress(self) -> bool:
        """Whether another process of the job shows the progress."""
        return bool(self.data.backend.process != 0)

    @property
    def is_over(self) -> bool:
        """Whether all iterations are done, or early stopping ended the fit."""
        is_stale = self.monitor is not None and self.monitor.is_over
        return is_stale or self.done >= self.iterations

    def resume(self) -> bool:
        """Resume from the last checkpoint; return False if there is none."""
        if self.checkpoints is None:
            return False
        found = self.checkpoints.restore(self.settings, self._saved_as, self.iterations)
        if found is None:
            return False
        self.state = self.data.backend.from_checkpoint(found.state, self.data)
        self.done, self.history = found.iteration, found.history
        if self.with_loss:  # the earlier fit may not have computed it
            self.history.setdefault("loss", [math.nan] * self.done)
        if self.monitor is not None:
            best: tuple[Factors, Factors] = found.extra["best_users"], found.extra["best_items"]
            if self._tables(self.state)[0].is_resident:
                best = self._readable(als.start(self.data, *best))
            self.monitor.resume(self.history["ndcg"], best)
        return True

    def step(self) -> dict[str, float]:
        """Run one iteration; return its seconds and, if they are computed, its loss and NDCG."""
        started = time.perf_counter()
        # The first iteration may start from random tables, and the last must end at solutions: both
        # use plain ALS.
        is_outer = self.done in (0, self.iterations - 1)
        relaxation = 1.0 if is_outer else self.over_relaxation
        self.state, failed = als.epoch(self.state, self.data, self.objective, relaxation)
        finite_counts(failed, self.done)
        self.done += 1
        report = {"seconds": time.perf_counter() - started}
        if self.with_loss:
            report["loss"] = als.loss(self.state, self.data, self.objective)
        if self.monitor is not None:
            users, items = self._readable(self.state)
            report["ndcg"] = self.monitor.measure(users, items, self.data.backend.alone)
        self._record(report)
        self._save()
        return report

    def _record(self, report: dict[str, float]) -> None:
        """Add an iteration to the history; NaN where a series was not measured."""
        for name in {**self.history, **report}:
            series = self.history.setdefault(name, [])
            series.extend([math.nan] * (self.done - 1 - len(series)))
            series.append(report.get(name, math.nan))

    def _save(self) -> None:
        if self.checkpoints is None:
            return
        from tpu_als.training.checkpoint import Saved  # brings JAX in

        extra: dict[str, np.ndarray | _Fetched] = {}
        if self.monitor is not None and self.monitor.best is not None:
            best = (t if isinstance(t, np.ndarray) else _Fetched(t) for t in self.monitor.best)
            extra = dict(zip(("best_users", "best_items"), best, strict=True))
        state = self.data.backend.to_checkpoint(self.state, self.data)
        saved = Saved(state, self.done, self.history, extra)
        self.checkpoints.save(saved, self._saved_as, self.settings, force=self.is_over)

    @functools.cached_property
    def _saved_as(self) -> XlaData:
        """The data in the form that checkpoints have."""
        return self.data.backend.describe_for_checkpoint(self.data)

    def _tables(self, state: AlsState) -> tuple[Table, Table]:
        """User and item table, without the matrix."""
        backend, data = self.data.backend, self.data
        users = backend.table(state.users, data.users, data)
        return users, backend.table(state.items, data.items, data)

    def _readable(self, state: AlsState) -> tuple[Factors, Factors]:
        """User and item table as arrays on the host, or on the devices if they stay there."""
        users, items = self._tables(state)
        if users.is_resident:
            return users, items
        return users.fetch(), items.fetch()


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


def _after(training: Training, fitted: FittedModel) -> FittedModel:
    """The model after the iterations run so far."""
    tables = tables_of(training.state, training.data)
    return fitted.trained(tables, training.done, training.history)


class _Fetched:
    """A table on the devices; it is fetched to the host when a checkpoint is written.

    Checkpoints hold the best tables as whole arrays; the current tables are saved in parts.
    """

    def __init__(self, table: Table) -> None:
        self._table = table

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self._table.fetch()
