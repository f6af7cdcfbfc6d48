"""Compare models on the same held-out entries, with confidence intervals over users."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

from tpu_als import host
from tpu_als.evaluation import holdout, inputs
from tpu_als.evaluation.metrics import (
    METRICS,
    HeldOut,
    Ratio,
    coverage,
    held_out_entries,
    popularity_of,
    ranked_in,
    ratios,
    warn_of_overlap,
)
from tpu_als.evaluation.ranking_metrics import candidates, catalogue_of, ranked_ids, within
from tpu_als.parameters import random_generator
from tpu_als.validation import fractions

_ROWS_AT_ONCE = 1 << 20


class _Measured(NamedTuple):
    """Metrics of a model by name, such as "ndcg@10", and the seconds that its ranking took."""

    ratios: dict[str, Ratio]
    coverages: dict[str, float]
    seconds: float


def compare(
    models: Mapping[str, Any],
    train_user_items: sparse.spmatrix | sparse.sparray,
    test_user_items: sparse.spmatrix | sparse.sparray,
    K: int | Iterable[int] = (5, 10, 20),
    metrics: Iterable[str] = ("ndcg", "recall", "map", "coverage"),
    *,
    baseline: str | None = None,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    random_state: Any = 0,
    per_user: bool = False,
    items: ArrayLike | None = None,
) -> Any:
    """Rank items with several models and compare their metrics.

    Each model ranks once, with the largest K. Intervals are percentiles of a bootstrap over users:
    all models are measured on the same draws of users, with replacement [1]_. They express how much
    the metric would change with other users, and not with another split or another seed of a fit.

    Parameters
    ----------
    models : dict of str to object
        Fitted models by name, with implicit's ``recommend(userids, user_items, N)``: models of this
        package and of implicit, `PopularityRecommender`, or a `RecommenderPipeline`, which weights
        the train entries itself.
    train_user_items, test_user_items : csr_matrix of shape (n_users, n_items)
        As in `ranking_metrics_at_k`, and the same for all models.
    K : int or list of int, default=(5, 10, 20)
        Lengths of the rankings.
    metrics : list of str, default=("ndcg", "recall", "map", "coverage")
        Of `METRICS`.
    baseline : str, optional
        Name of a model. The table then has the differences from its metrics, with intervals for
        the same users.
    confidence : float, default=0.95
        Level of the intervals, between 0 and 1.
    n_resamples : int, default=1000
        Number of draws.
    random_state : int, RandomState, Generator or None, default=0
        Seed of the draws.
    per_user : bool, default=False
        Whether to return the values of each user too.
    items : array-like of int, or mask of bool, optional
        Rank these items only, as in `ranking_metrics_at_k`.

    Returns
    -------
    table : DataFrame
        One row for each model. For each metric and K, for example,

        * "ndcg@10": the value, the same as that of `ranking_metrics_at_k`;
        * "ndcg@10 low", "ndcg@10 high": its interval;
        * "ndcg@10 difference", "ndcg@10 difference low", "ndcg@10 difference high": the value minus
          the baseline's, and its interval.

        "coverage" is not a mean over users and has no interval. "users" is the number of users with
        positive test entries, and "seconds" is how long their ranking took, with the compilation of
        loops in the first call of a process.
    values : DataFrame
        With `per_user`: one row for each model and user, with the levels "model" and "user" (a row
        of the matrices), and the columns "ndcg@10" and the like. NaN where a metric is undefined.
        For "precision" a user's value is its hits over min(K, m), and the metric is the mean
        weighted by min(K, m). For "novelty" it is the mean over the user's items.

    Raises
    ------
    TypeError
        For objects that are not matrices, or models without `recommend`.
    ValueError
        For unknown names of metrics or of the baseline, NaN or infinity, matrices of different
        shapes or without users to measure, no `items`, or rankings of another shape or with ids
        that are not in `items`.
    IndexError
        For `items` that are not columns of the matrices.

    Warns
    -----
    DataWarning
        As `ranking_metrics_at_k`, once for all models.

    References
    ----------
    .. [1] Efron, Tibshirani. An introduction to the bootstrap. 1993. Chapter 13.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> from tpu_als.baselines import PopularityRecommender
    >>> train = csr_matrix([[3, 1, 0, 0], [0, 4, 1, 0], [0, 0, 2, 5]])
    >>> test = csr_matrix([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    >>> table = compare({"popular": PopularityRecommender().fit(train)}, train, test, 1, ["recall"])
    >>> table.drop(columns="seconds").round(2).to_dict("index")
    {'popular': {'recall@1': 1.0, 'recall@1 low': 1.0, 'recall@1 high': 1.0, 'users': 3}}
    """
    names, lengths = _checked_metrics(metrics), _checked_lengths(K)
    _check_models(models, baseline)
    fractions.require("confidence", confidence)
    n_resamples, rng = inputs.integer("n_resamples", n_resamples), random_generator(random_state)
    train = holdout.canonical(train_user_items, "train_user_items")
    test = holdout.relevant(test_user_items, "test_user_items")
    if train.shape != test.shape:
        raise ValueError(f"train has shape {train.shape}, but test {test.shape}")
    chosen = candidates(items, test.shape[1])
    test, known = within(test, chosen), within(train, chosen)
    users = np.flatnonzero(np.diff(test.indptr))
    if not len(users):
        where = "" if chosen is None else " of these items"
        raise ValueError(
            f"test_user_items has no positive entries{where}, so there are no users to measure"
        )
    _require_memory(len(users), len(models) * len(names) * len(lengths))
    n_users = max(train.shape[0], 1)
    truth = held_out_entries(test[users], popularity_of(known), n_users, known[users])
    warn_of_overlap(truth, stacklevel=3)
    found = {}
    for name, model in models.items():
        begin = time.perf_counter()
        try:
            ids = ranked_ids(model, train, users, lengths[-1], chosen)
        except Exception as error:
            error.add_note(f"while ranking with the model {name!r} of compare")
            raise
        seconds = time.perf_counter() - begin
        ids = holdout.rankings(ids, len(users))
        n_items = catalogue_of(model) if chosen is None else None
        found[name] = _measured(ids, truth, n_items, (names, lengths), seconds)
    sums = _resampled(found, len(users), n_resamples, rng)
    table = _table(found, sums, baseline, confidence).assign(
        users=len(users), seconds=[measured.seconds for measured in found.values()]
    )
    return (table, _values(found, users)) if per_user else table


def _checked_metrics(metrics: Iterable[str]) -> list[str]:
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    if not names or not {*names} <= {*METRICS}:
        raise ValueError(f"metrics must be names of {METRICS}, got {names!r}")
    return list(dict.fromkeys(names))


def _checked_lengths(K: int | Iterable[int]) -> list[int]:
    """Distinct lengths, ascending."""
    lengths = list(K) if isinstance(K, Iterable) else [K]
    if not lengths:
        raise ValueError("K must be an integer or a list of integers, got an empty list")
    return sorted({inputs.integer("K", k) for k in lengths})


def _check_models(models: Mapping[str, Any], baseline: str | None) -> None:
    if not isinstance(models, Mapping) or not models:
        raise TypeError(
            f"models must be a dict of fitted models by name, got {type(models).__name__}"
            + (" without entries" if isinstance(models, Mapping) else "")
        )
    for name, model in models.items():
        if hasattr(model, "recommend_for_history"):
            raise TypeError(
                f"the model {name!r} is a {type(model).__name__}, which takes events: pass the "
                "model in it, model_, and if it has a weighting_, both as the steps of a "
                "RecommenderPipeline"
            )
        if not callable(getattr(model, "recommend", None)):
            raise TypeError(
                f"the model {name!r} of class {type(model).__name__} has no method recommend"
                + (": use a tpu_als.RecommenderPipeline" if hasattr(model, "steps") else "")
            )
    if baseline is not None and baseline not in models:
        raise ValueError(f"baseline must be one of the models {list(models)}, got {baseline!r}")


def _require_memory(n_users: int, n_columns: int) -> None:
    size = 32 * n_users * n_columns  # numerators and denominators, and a copy of them
    host.require_memory(
        {f"{n_columns} metrics of {n_users} users": size},
        "compare fewer models or metrics, or fewer users",
    )


def _measured(
    ids: np.ndarray,
    truth: HeldOut,
    n_items: int | None,
    wanted: tuple[list[str], list[int]],
    seconds: float,
) -> _Measured:
    """Metrics of a model's rankings (n, K), in the order of the names and lengths in `wanted`."""
    ranked, names, lengths = ranked_in(ids, truth), *wanted
    found: dict[str, Ratio] = {}
    for k in lengths:
        of_k = ratios(ranked.first(k), truth, n_items)
        found |= {f"{name}@{k}": of_k[name] for name in names if name in of_k}
    in_order = [f"{name}@{k}" for name in names for k in lengths if f"{name}@{k}" in found]
    coverages = {f"coverage@{k}": coverage(ranked.first(k), truth, n_items) for k in lengths}
    return _Measured(
        {name: found[name] for name in in_order},
        coverages if "coverage" in names else {},
        seconds,
    )


def _resampled(
    found: dict[str, _Measured], n_users: int, n_resamples: int, rng: np.random.Generator
) -> dict[str, dict[str, np.ndarray]]:
    """Metrics of each model on the same draws of users, with shape (n_resamples,)."""
    parts = [ratio for measured in found.values() for ratio in measured.ratios.values()]
    if not parts:
        return {name: {} for name in found}
    columns, below_at = [_of_users(ratio.above, n_users) for ratio in parts], []
    for ratio in parts:
        is_mean = len(ratio.below) > 0 and bool((ratio.below == 1).all())
        below_at.append(-1 if is_mean else len(columns))  # all means share the last column
        columns += [] if is_mean else [_of_users(ratio.below, n_users)]
    with host.single_blas_thread():  # its threads wait long for cores that are in use
        sums = _sums_of_draws(np.stack([*columns, np.ones(n_users)]).T, n_resamples, rng)
    above, below = sums[:, : len(parts)], sums[:, below_at]
    values = np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
    series = iter(values.T)
    return {name: {of: next(series) for of in m.ratios} for name, m in found.items()}


def _sums_of_draws(table: np.ndarray, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Sums (n_draws, n_columns) over n rows of a table (n, n_columns), drawn with replacement."""
    n = len(table)
    sums, step = np.empty((n_draws, table.shape[1])), max(_ROWS_AT_ONCE // n, 1)
    for low in range(0, n_draws, step):
        size = min(step, n_draws - low)
        drawn = rng.integers(0, n, (size, n), dtype=np.uint32) + n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        sums[low : low + size] = times.astype(np.float64) @ table
    return sums


def _of_users(part: np.ndarray, n_users: int) -> np.ndarray:
    """A part of a ratio as float64; zeros for a metric that is undefined for all users."""
    return part.astype(np.float64) if len(part) else np.zeros(n_users)


def _table(
    found: dict[str, _Measured],
    draws: dict[str, dict[str, np.ndarray]],
    baseline: str | None,
    confidence: float,
) -> pd.DataFrame:
    """One row for each model: values, intervals, and differences from the baseline."""
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    rows: dict[str, dict[str, float]] = {}
    for name, measured in found.items():
        row = rows[name] = {}
        for of, ratio in measured.ratios.items():
            row[of] = ratio.value()
            row[f"{of} low"], row[f"{of} high"] = _quantiles(draws[name][of], ends)
            if baseline is not None:
                row[f"{of} difference"] = row[of] - found[baseline].ratios[of].value()
                paired = draws[name][of] - draws[baseline][of]
                low, high = _quantiles(paired, ends)
                row[f"{of} difference low"], row[f"{of} difference high"] = low, high
        row.update(measured.coverages)
    return pd.DataFrame.from_dict(rows, orient="index")


def _quantiles(values: np.ndarray, ends: list[float]) -> tuple[float, float]:
    """Quantiles of the draws in which a metric is defined."""
    defined = values[~np.isnan(values)]
    low, high = np.quantile(defined, ends) if len(defined) else (np.nan, np.nan)
    return float(low), float(high)


def _values(found: dict[str, _Measured], users: np.ndarray) -> pd.DataFrame:
    """Each user's metrics, by model and user."""
    tables = {}
    for name, measured in found.items():
        columns = {}
        for of, ratio in measured.ratios.items():
            above, below = _of_users(ratio.above, len(users)), _of_users(ratio.below, len(users))
            undefined = np.full(len(users), np.nan)
            columns[of] = np.divide(above, below, out=undefined, where=below > 0)
        tables[name] = pd.DataFrame(columns, index=users)
    return pd.concat(tables, names=["model", "user"])
