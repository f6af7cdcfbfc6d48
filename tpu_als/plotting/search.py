"""The score of a search for parameters, over two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from tpu_als.plotting import style
from tpu_als.plotting.trials import (
    SCORE,
    Trials,
    column_of,
    is_number,
    key_of,
    short,
    texts_of,
    trials_of,
    values_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_CELLS = 15  # values of a parameter; a search with more is drawn as points
_BESIDE = 0.12  # distance of points without a number from the others, in parts of their range


class SearchDisplay:
    """The score of a search over two of its parameters.

    Use `from_search`. A cell has the best score of the trials with these two values, whatever their
    other parameters. The cell or point of the best trial has a frame: the one that the search
    refitted, or else the one with the best score.

    Parameters
    ----------
    trials : Trials
        Parameters and scores, and the best trial.
    x, y : str
        The parameters of the axes.

    Attributes
    ----------
    ax_ : Axes
        Where the scores are, after `plot`.
    figure_ : Figure
        Its figure.
    best_ : dict
        The values of `x` and `y`, and the score of the best trial.

    Examples
    --------
    >>> from sklearn.model_selection import GridSearchCV
    >>> from tpu_als import TPUAlternatingLeastSquares
    >>> from tpu_als.datasets import power_law
    >>> grid = {"factors": [2, 4], "regularization": [0.1, 1.0]}
    >>> search = GridSearchCV(TPUAlternatingLeastSquares(iterations=2, random_state=0), grid, cv=2)
    >>> search = search.fit(power_law(60, 40, 600, random_state=0))
    >>> display = SearchDisplay.from_search(search)
    >>> display.ax_.get_xlabel(), display.ax_.get_ylabel()
    ('factors', 'regularization')
    """

    def __init__(self, trials: Trials, x: str, y: str) -> None:
        self.trials, self.x, self.y = trials, x, y

    @classmethod
    def from_search(
        cls, search: Any, x: str | None = None, y: str | None = None, *, ax: Axes | None = None
    ) -> Self:
        """Draw the scores of a search.

        Parameters
        ----------
        search : fitted search of scikit-learn, TuneResult, or DataFrame
            An object with `cv_results_`, such as GridSearchCV; the result of `tpu_als.tune`; or a
            frame with a column "score" and one for each parameter. Of a search by halving, the last
            round is drawn. Of a search with several metrics, the one that `refit` names.
        x, y : str, optional
            The parameters of the axes: names as in `search`, or the part after the last "__". By
            default the first two that have several values.
        ax : Axes, optional
            None makes a figure.

        Returns
        -------
        display : SearchDisplay

        Raises
        ------
        TypeError
            For another object, or a search that was not fitted.
        ValueError
            For unknown parameters, fewer than two with several values, or no trial with a score.
        """
        trials = trials_of(search)
        names = trials.parameters
        varied = [name for name in names if trials.frame[name].map(key_of).nunique(False) > 1]
        chosen = [column_of(given, names) for given in (x, y) if given is not None]
        spare = [name for name in varied if name not in chosen]
        if len(chosen) + len(spare) < 2:
            raise ValueError(
                f"two parameters with several values are needed, and the search has {varied}"
            )
        first = chosen.pop(0) if x is not None else spare.pop(0)
        second = chosen.pop(0) if y is not None else spare.pop(0)
        if first == second:
            raise ValueError(f"x and y must be two parameters, got {first!r} for both")
        return cls(trials, first, second).plot(ax=ax)

    def plot(self, *, ax: Axes | None = None, cmap: str = "cividis") -> Self:
        """Draw the scores.

        They are cells if each parameter has at most 15 values, and at least half of the pairs of
        values were tried; otherwise points, with those without a number on a line of their own.

        Parameters
        ----------
        ax : Axes, optional
            None makes a figure.
        cmap : str, default="cividis"
            A colour map; this one becomes lighter steadily, so that it can be read in grey.

        Returns
        -------
        display : SearchDisplay
        """
        self.ax_ = style.one_axes(ax)
        self.figure_ = style.figure_of(self.ax_)
        frame = self.trials.frame
        best = frame.iloc[self.trials.best]
        self.best_ = {self.x: best[self.x], self.y: best[self.y], "score": float(best[SCORE])}
        columns = [frame[name] for name in (self.x, self.y)]
        values = [values_of(column) for column in columns]
        n_pairs = len(set(zip(*(column.map(key_of) for column in columns), strict=True)))
        is_grid = 2 * n_pairs >= len(values[0]) * len(values[1])
        is_grid = is_grid and max(map(len, values)) <= _MAX_CELLS
        scores = self._cells(frame, values, cmap) if is_grid else self._points(frame, cmap)
        self.figure_.colorbar(scores, ax=self.ax_, label="score")
        names = [short(self.x), short(self.y)]
        names = [self.x, self.y] if names[0] == names[1] else names
        self.ax_.set(xlabel=names[0], ylabel=names[1])
        return self

    def _cells(self, frame: pd.DataFrame, values: list[list[Any]], cmap: str) -> Any:
        """One cell for each pair of values, with its score as text."""
        scores = np.full((len(values[1]), len(values[0])), np.nan)
        places = [{key_of(value): at for at, value in enumerate(each)} for each in values]
        cells = [
            (places[1][key_of(other)], places[0][key_of(one)])
            for one, other in zip(frame[self.x], frame[self.y], strict=True)
        ]
        for at, score in zip(cells, frame[SCORE], strict=True):
            scores[at] = np.fmax(scores[at], score)
        image = self.ax_.imshow(scores, cmap=cmap, aspect="auto", origin="lower")
        self.ax_.set_xticks(range(len(values[0])), texts_of(values[0]))
        self.ax_.set_yticks(range(len(values[1])), texts_of(values[1]))
        if len(values[0]) > 6:
            self.ax_.tick_params("x", rotation=45)
        best, middle = cells[self.trials.best], (np.nanmin(scores) + np.nanmax(scores)) / 2
        digits = _digits(scores[np.isfinite(scores)])
        for row, column in np.argwhere(np.isfinite(scores)).tolist():
            score = scores[row, column]
            self.ax_.text(
                column, row, f"{score:.{digits}f}", ha="center", va="center", fontsize="small",
                color="black" if score > middle else "white",
                weight="bold" if (row, column) == best else "normal",
            )  # fmt: skip
        frame_of_best = style.pyplot().Rectangle(
            (best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2.5
        )
        frame_of_best.set_clip_on(False)
        self.ax_.add_patch(frame_of_best)
        return image

    def _points(self, frame: pd.DataFrame, cmap: str) -> Any:
        """One point for each trial; better ones are larger and in front."""
        coordinates = [self._coordinates(frame[self.x], "x"), self._coordinates(frame[self.y], "y")]
        order = np.argsort(frame[SCORE].to_numpy(), kind="stable")
        sizes = 15 + 60 * np.linspace(0, 1, len(order)) ** 2
        points = self.ax_.scatter(
            coordinates[0][order], coordinates[1][order], s=sizes, cmap=cmap,
            c=frame[SCORE].to_numpy()[order], edgecolors="0.3", linewidths=0.5,
        )  # fmt: skip
        best = [each[self.trials.best] for each in coordinates]
        self.ax_.scatter(
            best[0], best[1], s=190, facecolors="none", edgecolors="black", linewidths=1.5
        )
        self.ax_.set_title(f"best: {self.best_['score']:.4f}", fontsize="medium", loc="left")
        self.ax_.margins(0.08)
        self.ax_.grid(alpha=0.3)
        self.ax_.set_axisbelow(True)
        return points

    def _coordinates(self, column: pd.Series, axis: str) -> np.ndarray:
        """Places of values on an axis: numbers by value, others below them; else by number."""
        is_numeric = np.array([is_number(value) for value in column])
        others = values_of(column[~is_numeric])
        if len(others) > 1 or not is_numeric.any():
            values = values_of(column)
            places = {key_of(value): at for at, value in enumerate(values)}
            getattr(self.ax_, f"set_{axis}ticks")(range(len(values)), texts_of(values))
            return np.array([places[key_of(value)] for value in column], dtype=float)
        numeric = np.array([float(value) for value in column[is_numeric]])
        low, high = numeric.min(), numeric.max()
        is_log = low > 0 and high > 30 * low
        if is_log:
            getattr(self.ax_, f"set_{axis}scale")("log")
        beside = low * (low / high) ** _BESIDE if is_log else low - _BESIDE * ((high - low) or 1.0)
        found = np.full(len(column), beside)
        found[is_numeric] = numeric
        if others:
            at = {"x": (beside, 0.01), "y": (0.01, beside)}[axis]
            transform = getattr(self.ax_, f"get_{axis}axis_transform")()
            self.ax_.text(*at, texts_of(others)[0], transform=transform, color=style.GREY,
                          fontsize="small", ha="center" if axis == "x" else "left")  # fmt: skip
        return found


def _digits(scores: np.ndarray) -> int:
    """Decimals that show differences of 1/50 of the range of some scores, from 3 to 8."""
    spread = float(np.ptp(scores))
    return 3 if spread == 0 else int(np.clip(1 - np.floor(np.log10(spread)), 3, 8))
