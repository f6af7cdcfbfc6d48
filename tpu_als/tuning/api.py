"""The public function: check the arguments, search, fit the best settings on all data."""

from __future__ import annotations

import logging
from numbers import Integral
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.base import clone

from tpu_als import parameters
from tpu_als.estimator import TPUAlternatingLeastSquares
from tpu_als.evaluation import inputs
from tpu_als.recommender import Recommender
from tpu_als.recommender.schema import schema_of
from tpu_als.tuning import events, result, scales
from tpu_als.tuning.budget import Budget, seconds_of
from tpu_als.tuning.halving import Found
from tpu_als.tuning.result import TuneResult
from tpu_als.tuning.search import Options, search
from tpu_als.tuning.split import split
from tpu_als.tuning.trials import fit_until
from tpu_als.validation import fractions, matrices
from tpu_als.validation.features import FeatureTable
from tpu_als.validation.refusals import require_matrix

log = logging.getLogger("tpu_als")

METRICS = (
    "ndcg", "recall", "map", "precision", "hit_rate", "mrr",
    "recall_full", "map_full", "precision_full",
)  # fmt: skip


def tune(
    data: Any,
    *,
    timestamps: Any = None,
    recommender: Recommender | None = None,
    budget: float | str | None = "10min",
    metric: str = "ndcg",
    k: int = 20,
    model: TPUAlternatingLeastSquares | None = None,
    max_factors: int = 256,
    n_candidates: int = 64,
    validation_fraction: float = 0.1,
    random_state: Any = None,
    verbose: bool = False,
) -> TuneResult:
    """Find objective, weighting and parameters within a time budget, and fit them on all data.

    A part of the entries is held out, and candidates are compared by how well they rank it. Only
    `data` are used, so a test part that is not in them stays unseen. The search is successive
    halving: many candidates with few factors, and fewer with more.

    Parameters
    ----------
    data : csr_matrix, csr_array or array-like of shape (n_users, n_items); or events
        Counts, ratings or ones, as for the estimator's `fit`, without a weighting. With
        `recommender`, a table of events as for `Recommender.fit`: a frame, a path or paths.
    timestamps : sparse matrix of shape (n_users, n_items), optional
        The time of each entry of `data`, in any unit. The latest entries are then held out, which
        is what a model in use has to find. Otherwise a part of the positive entries of at most
        4,000 rows is held out, at least one of a row.
    recommender : Recommender, optional
        What the columns of events mean. It is not modified. Its `timestamp`, if it has one, is used
        in place of `timestamps`, and its `model` in place of `model`; its `weighting` must be None.
        Items that a user has in the earlier events do not count as relevant in the later ones. Its
        `item_features` and `user_features` are used in all fits.
    budget : float, str or None, default="10min"
        Seconds, or text such as "90s", "10min" or "1h", for all of the call, the final fit
        included. The search ends earlier if it has no candidates left. None sets no limit:
        `n_candidates` and `max_factors` then determine the work, and the result depends on
        `random_state` only.
    metric : str, default="ndcg"
        What to maximise: "ndcg", "recall", "map", "precision", "hit_rate", "mrr", "recall_full",
        "map_full" or "precision_full", as defined in `evaluation.metrics_of_rankings`.
    k : int, default=20
        Length of the rankings.
    model : TPUAlternatingLeastSquares, optional
        Parameters that are not tuned, such as `dtype` or `num_threads`, are taken from it. It is
        not modified.
    max_factors : int, default=256
        Maximum number of factors to try. A budget that is too small for the final fit lowers it.
    n_candidates : int, default=64
        Candidates of the first round, without the neighbours of the best ones.
    validation_fraction : float, default=0.1
        Part of the entries to hold out; without times, of at most 4,000 rows.
    random_state : int, RandomState, Generator or None, default=None
        Seed of the split, the candidates and the fits.
    verbose : bool, default=False
        Whether to show a progress bar. Each trial is logged by the logger "tpu_als" at the level
        INFO in any case.

    Returns
    -------
    TuneResult
        The fitted `estimator`, the `score`, all `trials`, and the settings as `code`.

    Raises
    ------
    TypeError
        For an object that is not a matrix, such as a table of events without `recommender`.
    ValueError
        For arguments out of range, and for data of which no entry can be held out.
    ModelFitError
        If every trial failed.
    KeyboardInterrupt
        If the call is interrupted before the first trial has ended, or before the first iteration
        of the final fit. Otherwise an interrupt ends the search, and the best settings so far are
        fitted; a second one ends that fit after a complete iteration. The result's `interrupted`
        is then True.

    Notes
    -----
    Candidates are numbers without a scale: the total weight of the cells without an entry, relative
    to that of the entries; the ridge, relative to the smallest one for which all factors are zero;
    epsilon of `LogWeighting`, relative to the median value. So they transfer from a part to all of
    the data, from few factors to many, and between data sets. docs/math.md has the formulas. The
    parameters of the final fit are computed from those numbers for all data, so they differ a
    little from those of the best trial.

    Examples
    --------
    >>> from tpu_als import tune
    >>> from tpu_als.datasets import power_law
    >>> purchases = power_law(60, 30, 400)
    >>> found = tune(purchases, budget=None, n_candidates=4, max_factors=8, k=5, random_state=0)
    >>> ids, scores = found.estimator.recommend(0, purchases[0], N=3)
    >>> len(ids)
    3

    From events to recommendations with the caller's ids:

    >>> import pandas as pd
    >>> from tpu_als import Recommender
    >>> events = pd.DataFrame({"customer": list("aabbccdd"), "sku": list("xyxzyzwx")})
    >>> shop = Recommender(user="customer", item="sku")
    >>> found = tune(events, recommender=shop, budget=None, n_candidates=2, max_factors=2)
    >>> found.estimator.recommend(["a"], n=1).shape
    (1, 5)
    """
    limit = Budget(seconds_of(budget))
    _check(metric, validation_fraction, k=k, max_factors=max_factors, n_candidates=n_candidates)
    if recommender is not None:
        _require_recommender(recommender, timestamps=timestamps, model=model)
        model = recommender.model
    template, seed = _template(model, random_state)
    rng = np.random.default_rng(seed)
    if recommender is None:
        require_matrix(data, "data", takes_frames=False)
        rows = matrices.canonical_csr(data, "data")
        problem = split(rows, timestamps, validation_fraction, rng)
    else:
        problem, rows = events.problem_of(data, recommender, validation_fraction, rng)
    options = Options(metric, int(k), int(max_factors), int(n_candidates), seed, bool(verbose))
    found = search(problem, rows, template, options, limit)
    settings = found.best.settings.for_all(problem.shrinkage)
    weighting = scales.weighting_of(settings, rows)

    def fit(weighted: sparse.csr_matrix, **features: FeatureTable) -> TPUAlternatingLeastSquares:
        values = scales.parameters_of(settings, weighted)
        made = clone(template).set_params(**values, **found.best.size._asdict())
        return _fitted(made, weighted, features, found, limit)

    if recommender is None:
        weighted = scales.weighted(weighting, rows)
        estimator = result.assembled(weighting, fit(weighted))
    else:
        estimator = events.fitted(recommender, data, weighting, fit)
    return TuneResult(
        estimator=estimator,
        score=found.best.score,
        metric=metric,
        k=options.k,
        trials=result.frame_of(found.trials),
        code=result.code_of(estimator),
        interrupted=found.is_interrupted,
        seconds=limit.elapsed,
    )


def _check(metric: Any, validation_fraction: Any, **counts: Any) -> None:
    """Raise ValueError for the first argument that is out of range."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r:.200}")
    fractions.require("validation_fraction", validation_fraction)
    for name, value in counts.items():
        inputs.integer(name, value)


def _require_recommender(recommender: object, **others: object) -> None:
    """Check that `recommender` is one, and that the arguments it replaces are None."""
    if not isinstance(recommender, Recommender):
        raise TypeError(
            "recommender must be a Recommender, whose parameters name the columns of data, got "
            f"{type(recommender).__name__}"
        )
    if recommender.weighting is not None:
        raise ValueError(
            "recommender must have weighting=None, because the weighting is tuned, got "
            f"{recommender.weighting!r:.200}"
        )
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None with recommender=, got {type(value).__name__}: use the "
                f"recommender's parameter {name.removesuffix('s')!r}"
            )
    schema_of(recommender)


def _template(
    model: TPUAlternatingLeastSquares | None, random_state: Any
) -> tuple[TPUAlternatingLeastSquares, int]:
    """An unfitted model with the parameters that are not tuned, and the seed of the search."""
    if model is not None and not isinstance(model, TPUAlternatingLeastSquares):
        raise TypeError(
            "model must be a TPUAlternatingLeastSquares, whose other parameters are kept, got "
            f"{type(model).__name__}"
        )
    template = TPUAlternatingLeastSquares() if model is None else clone(model)
    parameters.check(template)
    is_number = isinstance(random_state, Integral) and not isinstance(random_state, bool)
    generator = parameters.random_generator(random_state)  # refuses what is not a seed
    seed = int(random_state) if is_number else int(generator.integers(1 << 31))
    if template.early_stopping or template.checkpoint_dir is not None:
        raise ValueError(
            "model must have early_stopping=False and checkpoint_dir=None, got "
            f"early_stopping={template.early_stopping!r} and checkpoint_dir="
            f"{template.checkpoint_dir!r}: tune holds entries out itself; fit its result again "
            "for checkpoints"
        )
    if template.random_state is None:
        template.set_params(random_state=int(seed))
    return template, int(seed)


def _fitted(
    model: TPUAlternatingLeastSquares,
    weighted: sparse.csr_matrix,
    features: dict[str, FeatureTable],
    found: Found,
    limit: Budget,
) -> TPUAlternatingLeastSquares:
    """Fit a model on all data within the budget; an interrupt keeps its last iteration."""
    try:
        done = fit_until(model, weighted, limit.end, features)
    except KeyboardInterrupt:
        if model.user_factors is None:
            raise
        found.is_interrupted, done = True, model.n_iter_
    if done < model.iterations:
        log.warning(
            "tune: the final fit ended after %d of %d iterations, when the time was over or an "
            "interrupt came", done, model.iterations,
        )  # fmt: skip
        model.iterations = done
    return model
