"""A running fit: its tables, early stopping and checkpoints."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike

from tpu_als import parameters
from tpu_als.engine import als, digests
from tpu_als.engine.backends import Table
from tpu_als.engine.data import Data
from tpu_als.engine.objective import Objective
from tpu_als.training.early_stopping import EarlyStopping, Factors
from tpu_als.training.initial import Identity
from tpu_als.validation import arguments
from tpu_als.validation.features import FeatureTable

if TYPE_CHECKING:
    from tpu_als.engine.xla.data import XlaData
    from tpu_als.estimator import TPUAlternatingLeastSquares
    from tpu_als.training.checkpoint import Checkpoints


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
    state: als.AlsState = field(init=False)
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
        arguments.finite_counts(failed, self.done)
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

    def _tables(self, state: als.AlsState) -> tuple[Table, Table]:
        """User and item table, without the matrix."""
        backend, data = self.data.backend, self.data
        users = backend.table(state.users, data.users, data)
        return users, backend.table(state.items, data.items, data)

    def _readable(self, state: als.AlsState) -> tuple[Factors, Factors]:
        """User and item table as arrays on the host, or on the devices if they stay there."""
        users, items = self._tables(state)
        if users.is_resident:
            return users, items
        return users.fetch(), items.fetch()


def settings_of(
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


class _Fetched:
    """A table on the devices; it is fetched to the host when a checkpoint is written.

    Checkpoints hold the best tables as whole arrays; the current tables are saved in parts.
    """

    def __init__(self, table: Table) -> None:
        self._table = table

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self._table.fetch()
