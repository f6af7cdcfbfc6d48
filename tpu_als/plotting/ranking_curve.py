"""A metric of several models against the length of the ranking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from scipy import sparse

from tpu_als.evaluation import compare
from tpu_als.plotting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class RankingCurveDisplay:
    """A ranking metric against K for several models, with intervals over users.

    Use `from_models`, or `from_table` for a table that `tpu_als.evaluation.compare` returned.

    Parameters
    ----------
    lengths : list of int
        Values of K, ascending.
    values : dict of str to array of shape (len(lengths),)
        The metric by the name of the model.
    intervals : dict of str to array of shape (2, len(lengths))
        Lower and upper ends by the name of the model; empty for metrics without intervals.
    metric : str
        Its name.
    baseline : str, optional
        The model that is drawn as a thin grey line without markers.

    Attributes
    ----------
    ax_ : Axes
        Where the curves are, after `plot`.
    figure_ : Figure
        Its figure.
    lines_ : list of Line2D
        The line of each model.

    Examples
    --------
    >>> from tpu_als import TPUAlternatingLeastSquares
    >>> from tpu_als.baselines import PopularityRecommender
    >>> from tpu_als.datasets import power_law
    >>> from tpu_als.evaluation import train_test_split
    >>> train, test = train_test_split(power_law(80, 50, 900, random_state=0), random_state=0)
    >>> models = {
    ...     "ALS": TPUAlternatingLeastSquares(8, random_state=0).fit(train, show_progress=False),
    ...     "popular": PopularityRecommender().fit(train),
    ... }
    >>> display = RankingCurveDisplay.from_models(models, train, test, baseline="popular")
    >>> [line.get_label() for line in display.lines_]
    ['ALS', 'popular']
    """

    def __init__(
        self,
        lengths: Iterable[int],
        values: Mapping[str, np.ndarray],
        intervals: Mapping[str, np.ndarray],
        metric: str,
        baseline: str | None = None,
    ) -> None:
        self.lengths, self.values, self.intervals = list(lengths), values, intervals
        self.metric, self.baseline = metric, baseline

    @classmethod
    def from_models(
        cls,
        models: Mapping[str, Any],
        train_user_items: sparse.spmatrix | sparse.sparray,
        test_user_items: sparse.spmatrix | sparse.sparray,
        K: int | Iterable[int] = (1, 2, 5, 10, 20, 50),
        metric: str = "ndcg",
        *,
        baseline: str | None = None,
        ax: Axes | None = None,
        **compare_kwargs: Any,
    ) -> Self:
        """Measure models on the same held-out entries, and draw a curve for each.

        Parameters
        ----------
        models, train_user_items, test_user_items
            As in `tpu_als.evaluation.compare`.
        K : int or list of int, default=(1, 2, 5, 10, 20, 50)
            Lengths of the rankings. Those above the number of items are left out.
        metric : str, default="ndcg"
            Of `tpu_als.evaluation.METRICS`.
        baseline : str, optional
            Name of the model that the others are to be compared with; a thin grey line.
        ax : Axes, optional
            None makes a figure.
        **compare_kwargs
            Passed to `compare`: `confidence`, `n_resamples`, `random_state`.

        Returns
        -------
        display : RankingCurveDisplay

        Raises
        ------
        TypeError, ValueError
            As `compare`.
        """
        wanted = list(K) if isinstance(K, Iterable) else [K]
        lengths = [k for k in wanted if k <= max(np.shape(train_user_items)[-1:] or (0,))]
        table = compare(
            models, train_user_items, test_user_items, lengths or wanted, [metric],
            baseline=baseline, **compare_kwargs,
        )  # fmt: skip
        return cls.from_table(table, metric, baseline=baseline, ax=ax)

    @classmethod
    def from_table(
        cls,
        table: pd.DataFrame,
        metric: str = "ndcg",
        *,
        baseline: str | None = None,
        ax: Axes | None = None,
    ) -> Self:
        """Draw the columns of a metric in the result of `tpu_als.evaluation.compare`.

        Parameters
        ----------
        table : DataFrame
            One row for each model, with columns such as "ndcg@10", "ndcg@10 low", "ndcg@10 high".
        metric : str, default="ndcg"
            The part of the names before "@".
        baseline : str, optional
            One of the rows.
        ax : Axes, optional
            None makes a figure.

        Returns
        -------
        display : RankingCurveDisplay

        Raises
        ------
        ValueError
            If the table has no columns of the metric, no row of the baseline, or several rows with
            the same name.
        """
        names = [str(name) for name in table.columns]
        lengths = sorted(
            int(k) for head, _, k in (name.partition("@") for name in names)
            if head == metric and k.isdigit()
        )  # fmt: skip
        if not lengths:
            found = sorted({name.partition("@")[0] for name in names if "@" in name})
            raise ValueError(f"the table has metrics {found}, and no columns of {metric!r}")
        if baseline is not None and baseline not in table.index:
            raise ValueError(f"baseline must be one of {list(table.index)}, got {baseline!r}")
        if not table.index.is_unique:
            raise ValueError(f"the table must have one row for each model, got {list(table.index)}")
        columns = [f"{metric}@{k}" for k in lengths]
        values = {str(name): table.loc[name, columns].to_numpy(float) for name in table.index}
        intervals = {}
        if {f"{name} low" for name in columns} <= {*names}:
            ends = [[f"{name} {end}" for name in columns] for end in ("low", "high")]
            intervals = {
                str(name): np.array([table.loc[name, end].to_numpy(float) for end in ends])
                for name in table.index
            }
        named = None if baseline is None else str(baseline)
        return cls(lengths, values, intervals, metric, named).plot(ax=ax)

    def plot(self, *, ax: Axes | None = None, **line_kwargs: Any) -> Self:
        """Draw the curves.

        Parameters
        ----------
        ax : Axes, optional
            None makes a figure.
        **line_kwargs
            Passed to `Axes.plot` for each model.

        Returns
        -------
        display : RankingCurveDisplay
        """
        self.ax_ = style.one_axes(ax)
        self.figure_ = style.figure_of(self.ax_)
        self.lines_, n_models = [], 0
        for name, values in self.values.items():
            look: dict[str, Any] = {"color": style.GREY, "linewidth": 1}
            if name != self.baseline:
                look, n_models = {**style.line_style(n_models), "markersize": 5}, n_models + 1
            look = {**look, **line_kwargs, "label": style.plain(name)}
            self.lines_ += self.ax_.plot(self.lengths, values, **look)
            if name in self.intervals:
                low, high = self.intervals[name]
                self.ax_.fill_between(
                    self.lengths, low, high, color=self.lines_[-1].get_color(), alpha=0.15, lw=0
                )
        self.ax_.set(xlabel="K, items in the ranking", ylabel=f"{_title(self.metric)}@K")
        if len(self.lengths) > 2:
            self.ax_.set_xscale("log")
        self.ax_.set_xticks(self.lengths, [str(k) for k in self.lengths])
        self.ax_.minorticks_off()
        self.ax_.grid(alpha=0.3)
        self.ax_.legend()
        return self


def _title(metric: str) -> str:
    return metric.upper() if metric in ("ndcg", "map", "mrr", "auc") else metric
