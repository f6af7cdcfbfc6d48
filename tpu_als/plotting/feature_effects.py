"""The items that are nearest to some features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from sklearn.utils.validation import check_is_fitted

from tpu_als.plotting import style
from tpu_als.plotting.models import model_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LONGEST = 48  # characters of a label
_X_LABELS = {
    "item": "cosine of the item and the feature",
    "user": "what the feature adds to the item's score",
}


class FeatureEffectsDisplay:
    """What features mean: the items that are nearest to each of them.

    Use `from_estimator`. Each feature is a heading, below which its items are dots, best first. If
    the items of a feature make no sense, the model has learnt little about it.

    Parameters
    ----------
    effects : DataFrame
        As `feature_effects` of the estimator returns: columns "feature", "rank", "item" and
        "score". Features are drawn in this order.
    labels : dict of text by item, optional
        Names of items; others are shown as they are.
    side : {"item", "user"}, default="item"
        Whose features they are.

    Attributes
    ----------
    ax_ : Axes
        Where the dots are, after `plot`.
    figure_ : Figure
        Its figure.
    lines_ : list of Line2D
        The dots of each feature.

    Examples
    --------
    >>> import pandas as pd
    >>> from scipy.sparse import csr_matrix
    >>> from tpu_als import TPUAlternatingLeastSquares
    >>> plays = csr_matrix([[3, 1, 0, 0], [1, 4, 0, 0], [0, 0, 2, 5]])
    >>> genres = pd.DataFrame({"rock": [1, 1, 0, 0], "jazz": [0, 0, 1, 1]})
    >>> model = TPUAlternatingLeastSquares(factors=2, random_state=0)
    >>> model = model.fit(plays, show_progress=False, item_features=genres)
    >>> display = FeatureEffectsDisplay.from_estimator(model, n_items=2, features=["jazz"])
    >>> sorted(display.effects["item"].tolist())
    [2, 3]
    """

    def __init__(
        self, effects: pd.DataFrame, labels: Mapping[Any, str] | None = None, side: str = "item"
    ) -> None:
        self.effects, self.labels, self.side = effects, labels, side

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        *,
        side: str = "item",
        features: Sequence[Any] | None = None,
        n_features: int = 5,
        n_items: int = 4,
        labels: Mapping[Any, str] | None = None,
        ax: Axes | None = None,
    ) -> Self:
        """Draw features of a fitted model.

        Parameters
        ----------
        estimator : TPUAlternatingLeastSquares, Recommender or RecommenderPipeline
            Fitted with `item_features` or `user_features`.
        side : {"item", "user"}, default="item"
            Whose features.
        features : list of names, or of numbers if they have no names, optional
            The features to draw. None means those that move the rows' factors most: the weights of
            a feature, times the root of the sum of its squares over all rows, are the longest.
        n_features : int, default=5
            Number of features, if `features` is None.
        n_items : int, default=4
            Number of items for each.
        labels : dict or Series of text by id, optional
            Names of items. Ids are those of a Recommender, and columns otherwise.
        ax : Axes, optional
            None makes a figure.

        Returns
        -------
        display : FeatureEffectsDisplay

        Raises
        ------
        TypeError
            For a model that takes no features.
        sklearn.exceptions.NotFittedError
            If there was no fit.
        ValueError
            If the model was fitted without features of this side; for unknown features or numbers
            out of range.
        """
        model = model_in(estimator)
        if not hasattr(model, "feature_effects"):
            raise TypeError(
                "expected a TPUAlternatingLeastSquares, or a Recommender or pipeline with one, got "
                f"{type(model).__name__}, which has no features"
            )
        check_is_fitted(model)
        for name, number in (("n_features", n_features), ("n_items", n_items)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        effects = model.feature_effects(side, n_items)
        numbers = _chosen(model._fitted.features(side), features, n_features)
        per_feature = len(effects) // len(model._fitted.features(side).weights)
        rows = (numbers[:, None] * per_feature + np.arange(per_feature)).ravel()
        shown = effects.iloc[rows].reset_index(drop=True)
        ids = getattr(estimator, "items_", None)
        if ids is not None:
            shown["item"] = np.asarray(ids)[shown["item"]]
        return cls(shown, labels, side).plot(ax=ax)

    def plot(self, *, ax: Axes | None = None, **line_kwargs: Any) -> Self:
        """Draw the dots.

        Parameters
        ----------
        ax : Axes, optional
            None makes a figure, as high as the labels need.
        **line_kwargs
            Passed to `Axes.plot`.

        Returns
        -------
        display : FeatureEffectsDisplay
        """
        groups = list(self.effects.groupby("feature", sort=False))
        n_rows = len(self.effects) + 2 * len(groups) - 1  # a heading for each, and gaps
        self.ax_ = style.one_axes(ax, (7.0, 0.19 * n_rows + 0.7))
        self.figure_ = style.figure_of(self.ax_)
        ticks: list[int] = []
        texts: list[str] = []
        headings: list[int] = []
        self.lines_, top = [], 0
        for number, (feature, rows) in enumerate(groups):
            headings.append(len(ticks))
            places = top + 1 + np.arange(len(rows))
            ticks += [top, *places.tolist()]
            texts += [_short(feature), *(_short(self._label(item)) for item in rows["item"])]
            look = style.line_style(number)
            options = {"color": look["color"], "marker": look["marker"], **line_kwargs}
            self.ax_.hlines(places, 0, rows["score"], color="0.8", linewidth=1, zorder=1)
            self.lines_ += self.ax_.plot(rows["score"], places, linestyle="none", **options)
            top = int(places[-1]) + 2
        self.ax_.axvline(0, color=style.GREY, linewidth=0.8, zorder=0)
        self.ax_.set_yticks(ticks, texts, fontsize="small")
        self.ax_.tick_params(axis="y", length=0)
        for at in headings:
            self.ax_.get_yticklabels()[at].set_fontweight("bold")
        self.ax_.set_ylim(top - 1, -1)
        self.ax_.set_xlabel(_X_LABELS.get(self.side, "score"))
        self.ax_.grid(axis="x", alpha=0.3)
        for edge in ("top", "right", "left"):
            self.ax_.spines[edge].set_visible(False)
        return self

    def _label(self, item: Any) -> object:
        return item if self.labels is None else self.labels.get(item, item)


def _chosen(known: Any, features: Any, n_features: int) -> np.ndarray:
    """Numbers of the features to draw."""
    if features is None:
        spread = np.sqrt(np.asarray(known.rows.multiply(known.rows).sum(axis=0)).ravel())
        strength = spread * np.linalg.norm(known.weights, axis=1)
        return np.argsort(-strength, kind="stable")[:n_features]
    names = pd.Index([known.label(number) for number in range(len(known.weights))])
    wanted = pd.Index([features] if isinstance(features, str) else list(features))
    unknown = wanted.difference(names, sort=False)
    if len(unknown) or not len(wanted):
        raise ValueError(
            f"features must be some of the model's {len(names)}, such as {names[0]!r}, got "
            f"{unknown[:5].tolist()}"
        )
    return np.asarray(names.get_indexer_for(wanted))


def _short(text: object) -> str:
    """A text of limited length for matplotlib."""
    found = str(text)
    return style.plain(found if len(found) <= _LONGEST else found[: _LONGEST - 1] + "…")
