"""The score of a search for parameters, over two of them."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from tpu_als.plotting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_CELLS = 15  # values of a parameter; a search with more is drawn as points
_DESCRIBES = {"rung", "score", "seconds", "rows"}  # columns of trials that are no parameters


class SearchDisplay:
    """The score of a search over two of its parameters.

    Use `from_search`. A cell, or a point, has the best score of the trials with these two values,
    whatever their other parameters. The best one has a frame, and its text is bold.

    Parameters
    ----------
    trials : DataFrame
        One row for each trial: the parameters, and the column "score".
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

    def __init__(self, trials: pd.DataFrame, x: str, y: str) -> None:
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
            frame with a column "score" and one for each parameter.
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
        trials = _trials_of(search)
        names = [name for name in trials.columns if name not in _DESCRIBES]
        varied = [name for name in names if trials[name].map(_key).nunique() > 1]
        chosen = [_column(given, names) for given in (x, y) if given is not None]
        spare = [name for name in varied if name not in chosen]
        if len(chosen) + len(spare) < 2:
            raise ValueError(
                f"two parameters with several values are needed, and the search has {varied}"
            )
        first = chosen.pop(0) if x is not None else spare.pop(0)
        second = chosen.pop(0) if y is not None else spare.pop(0)
        if first == second:
            raise ValueError(f"x and y must be two parameters, got {first!r} for both")
        if not np.isfinite(trials["score"]).any():
            raise ValueError("no trial of the search has a score: all fits failed")
        return cls(trials, first, second).plot(ax=ax)

    def plot(self, *, ax: Axes | None = None, cmap: str = "cividis") -> Self:
        """Draw cells if few values of the parameters make up most pairs, otherwise points.

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
        known = self.trials[np.isfinite(self.trials["score"])]
        best = known.loc[known["score"].idxmax()]
        self.best_ = {self.x: best[self.x], self.y: best[self.y], "score": float(best["score"])}
        values = [_values(known[name]) for name in (self.x, self.y)]
        n_cells = len(values[0]) * len(values[1])
        n_pairs = len({(_key(one), _key(other)) for one, other in known[[self.x, self.y]].values})
        is_grid = max(map(len, values)) <= _MAX_CELLS and 2 * n_pairs >= n_cells
        scores = self._cells(known, values, cmap) if is_grid else self._points(known, cmap)
        self.figure_.colorbar(scores, ax=self.ax_, label="score")
        self.ax_.set(xlabel=_short(self.x), ylabel=_short(self.y))
        return self

    def _cells(self, known: pd.DataFrame, values: list[list[Any]], cmap: str) -> Any:
        """One cell for each pair of values, with its score as text."""
        scores = np.full((len(values[1]), len(values[0])), np.nan)
        places = [{_key(value): at for at, value in enumerate(each)} for each in values]
        triples = zip(known[self.x], known[self.y], known["score"], strict=True)
        for one, other, score in triples:
            at = places[1][_key(other)], places[0][_key(one)]
            scores[at] = np.fmax(scores[at], score)
        image = self.ax_.imshow(scores, cmap=cmap, aspect="auto", origin="lower")
        self.ax_.set_xticks(range(len(values[0])), [_text(value) for value in values[0]])
        self.ax_.set_yticks(range(len(values[1])), [_text(value) for value in values[1]])
        if len(values[0]) > 6:
            self.ax_.tick_params("x", rotation=45)
        best = divmod(int(np.nanargmax(scores)), scores.shape[1])
        middle = (np.nanmin(scores) + np.nanmax(scores)) / 2
        for row, column in np.argwhere(np.isfinite(scores)).tolist():
            score = scores[row, column]
            self.ax_.text(
                column, row, f"{score:.3f}", ha="center", va="center", fontsize="small",
                color="black" if score > middle else "white",
                weight="bold" if (row, column) == best else "normal",
            )  # fmt: skip
        frame = style.pyplot().Rectangle(
            (best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2.5
        )
        frame.set_clip_on(False)
        self.ax_.add_patch(frame)
        return image

    def _points(self, known: pd.DataFrame, cmap: str) -> Any:
        """One point for each trial; better ones are larger and in front."""
        ordered = known.sort_values("score")
        ranks = np.linspace(0, 1, len(ordered))
        coordinates = []
        for name, axis in ((self.x, "x"), (self.y, "y")):
            column = ordered[name]
            if all(_is_number(value) for value in column):
                numeric = column.astype(float).to_numpy()
                coordinates.append(numeric)
                if (numeric > 0).all() and numeric.max() > 30 * numeric.min():
                    getattr(self.ax_, f"set_{axis}scale")("log")
            else:
                values = _values(column)
                places = {_key(value): at for at, value in enumerate(values)}
                coordinates.append(np.array([places[_key(value)] for value in column]))
                ticks = getattr(self.ax_, f"set_{axis}ticks")
                ticks(range(len(values)), [_text(value) for value in values])
        points = self.ax_.scatter(
            coordinates[0], coordinates[1], c=ordered["score"], s=15 + 60 * ranks**2, cmap=cmap,
            edgecolors="0.3", linewidths=0.5,
        )  # fmt: skip
        best = [each[-1:] for each in coordinates]
        self.ax_.scatter(
            best[0], best[1], s=190, facecolors="none", edgecolors="black", linewidths=1.5
        )
        self.ax_.set_title(f"best: {self.best_['score']:.4f}", fontsize="medium", loc="left")
        self.ax_.margins(0.08)
        self.ax_.grid(alpha=0.3)
        self.ax_.set_axisbelow(True)
        return points


def _trials_of(search: Any) -> pd.DataFrame:
    """One row for each trial."""
    if isinstance(search, pd.DataFrame):
        found = search
    elif hasattr(search, "cv_results_"):
        results = search.cv_results_
        if "mean_test_score" not in results:
            raise ValueError(
                "a search with several metrics: pass a DataFrame of its parameters with the column "
                "score"
            )
        found = pd.DataFrame(list(results["params"])).assign(score=results["mean_test_score"])
    elif isinstance(getattr(search, "trials", None), pd.DataFrame):
        found = search.trials
    else:
        raise TypeError(
            "expected a fitted search with cv_results_, a TuneResult or a DataFrame, got "
            f"{type(search).__name__}" + (": call fit" if hasattr(search, "fit") else "")
        )
    if "score" not in found.columns:
        raise ValueError(f"the frame has columns {list(found.columns)}, and no column score")
    return found.reset_index(drop=True)


def _column(given: str, names: list[str]) -> str:
    """The column with this name, or the only one that ends with it."""
    found = [name for name in names if name == given]
    found = found or [name for name in names if _short(name) == given]
    if len(found) != 1:
        raise ValueError(f"{given!r} is not one of the parameters {names}")
    return found[0]


def _short(name: str) -> str:
    return str(name).rpartition("__")[2]


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _key(value: Any) -> Any:
    """A hashable value that is equal for equal parameters."""
    if _is_number(value):
        return None if np.isnan(value) else float(value)
    return value if isinstance(value, (str, bool, type(None))) else repr(value)


def _values(column: pd.Series) -> list[Any]:
    """Distinct values: numbers ascending, others in the order in which they first occur."""
    found = list({_key(value): value for value in column}.values())
    return sorted(found) if all(map(_is_number, found)) else found


def _text(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else str(value)
