"""What happened in a fit, iteration by iteration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted

from tpu_als.estimator import TPUAlternatingLeastSquares
from tpu_als.plotting import style
from tpu_als.plotting.models import model_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIT = "fit"  # marks the lines of fits among others in the axes
_LABELS = {"loss": "loss", "ndcg": "validation NDCG@10", "seconds": "seconds in all"}


class FitHistoryDisplay:
    """Loss, validation metric and seconds of the iterations of a fit.

    Use `from_estimator`. Each series that the fit measured has a panel of its own.

    Parameters
    ----------
    history : dict of list of float
        As the attribute `history_` of the estimator: "seconds", and "loss" and "ndcg" where they
        were measured. Series have equal lengths, one value for each iteration; NaN is left out.
    name : str, optional
        Title of the first panel; a legend if the panels have several fits.

    Attributes
    ----------
    axes_ : ndarray of Axes
        The panels, after `plot`.
    figure_ : Figure
        Their figure.
    lines_ : list of Line2D
        The line of each panel.

    Examples
    --------
    >>> from tpu_als import TPUAlternatingLeastSquares
    >>> from tpu_als.datasets import power_law
    >>> model = TPUAlternatingLeastSquares(factors=4, iterations=5, calculate_training_loss=True)
    >>> model = model.fit(power_law(50, 40, 500, random_state=0), show_progress=False)
    >>> display = FitHistoryDisplay.from_estimator(model)
    >>> [axes.get_ylabel() for axes in display.axes_]
    ['loss', 'seconds in all']
    """

    def __init__(self, history: Mapping[str, Sequence[float]], name: str | None = None) -> None:
        self.history, self.name = history, name

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        *,
        series: Iterable[str] | None = None,
        name: str | None = None,
        ax: Axes | Sequence[Axes] | None = None,
    ) -> Self:
        """Draw the history of a fitted model.

        Parameters
        ----------
        estimator : TPUAlternatingLeastSquares, Recommender or RecommenderPipeline
            A fitted model; that of a Recommender and the last step of a pipeline have the history.
        series : list of str, optional
            Of "loss", "ndcg" and "seconds"; None means all that were measured.
        name : str, optional
            Title of the first panel.
        ax : Axes or sequence of Axes, optional
            One for each series; None makes a figure.

        Returns
        -------
        display : FitHistoryDisplay

        Raises
        ------
        TypeError
            For a model of another class.
        sklearn.exceptions.NotFittedError
            If there was no fit, or the model was loaded from a file.
        ValueError
            For a series that was not measured, or another number of axes.
        """
        model = model_in(estimator)
        if not isinstance(model, TPUAlternatingLeastSquares):
            raise TypeError(
                "expected a TPUAlternatingLeastSquares, or a Recommender or pipeline with one, got "
                f"{type(model).__name__}, which has no history of its fit"
            )
        check_is_fitted(model, "history_")
        return cls(model.history_, name).plot(series=series, ax=ax)

    def plot(
        self,
        *,
        series: Iterable[str] | None = None,
        ax: Axes | Sequence[Axes] | None = None,
        **line_kwargs: Any,
    ) -> Self:
        """Draw one panel for each series.

        Parameters
        ----------
        series, ax
            As in `from_estimator`.
        **line_kwargs
            Passed to `Axes.plot`.

        Returns
        -------
        display : FitHistoryDisplay
        """
        names = self._chosen(series)
        self.axes_ = style.row_of_axes(ax, len(names))
        self.figure_ = style.figure_of(self.axes_[0])
        self.lines_ = []
        for at, (axes, name) in enumerate(zip(self.axes_, names, strict=True)):
            values = np.asarray(self.history[name], dtype=float)
            steps = np.arange(1, len(values) + 1)
            is_shown = np.isfinite(values)
            shown = np.nancumsum(values) if name == "seconds" else values
            n_fits = sum(line.get_gid() == _FIT for line in axes.lines)
            look = style.line_style(at + len(names) * n_fits)  # each fit looks different
            named = {} if self.name is None else {"label": style.plain(self.name)}
            options = {**look, **named, "markersize": 4, "gid": _FIT, **line_kwargs}
            self.lines_ += axes.plot(steps[is_shown], shown[is_shown], **options)
            axes.set(xlabel="iteration", ylabel=_LABELS.get(name, name))
            if axes.get_xscale() == "linear":
                axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            if name == "ndcg" and is_shown.any():
                self._mark_best(axes, steps, shown)
            if name == "seconds":
                axes.set_ylim(bottom=0)
        fits = [line for line in self.axes_[0].lines if line.get_gid() == _FIT]
        if len(fits) > 1:
            self.axes_[0].set_title("", loc="left")
            self.axes_[0].legend()
        elif self.name is not None:
            self.axes_[0].set_title(style.plain(self.name), loc="left")
        return self

    def _chosen(self, series: Iterable[str] | None) -> list[str]:
        found = [name for name, values in self.history.items() if _is_measured(values)]
        if series is None:
            names = [name for name in _LABELS if name in found]
            names += [name for name in found if name not in names]
            if not names:
                raise ValueError("the history has no values: the fit ran no iterations")
            return names
        names = [series] if isinstance(series, str) else list(series)
        if not names or not {*names} <= {*found}:
            raise ValueError(
                f"series must be names of {found}, got {names!r}. Fit with "
                'calculate_training_loss=True for "loss", and early_stopping=True for "ndcg"'
            )
        return names

    @staticmethod
    def _mark_best(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
        best = np.nanargmax(values)
        axes.axvline(steps[best], color=style.GREY, linewidth=0.8)
        side = "right" if best > len(steps) / 2 else "left"
        shift = -4 if side == "right" else 4
        axes.annotate(
            f"best: {values[best]:.4f}", (steps[best], 0), (shift, 4),
            xycoords=("data", "axes fraction"), textcoords="offset points",
            color=style.GREY, ha=side, fontsize="small",
        )  # fmt: skip


def _is_measured(values: ArrayLike) -> bool:
    return bool(np.isfinite(np.asarray(values, dtype=float)).any())
