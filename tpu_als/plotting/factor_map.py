"""Rows of a factor table in two dimensions."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError

from tpu_als.exceptions import DataWarning
from tpu_als.plotting import style
from tpu_als.plotting.labels import place_labels
from tpu_als.plotting.models import model_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_GROUPS = 7  # with a colour and a marker of their own


class FactorMapDisplay:
    """Items, or users, in two dimensions: near ones have similar factors.

    Use `from_estimator`. Rows are divided by their norms first, so that, as in `similar_items`,
    only directions count.

    Parameters
    ----------
    points : ndarray of shape (n, 2)
        Coordinates.
    labels : dict of int to str
        Texts for some of the points, by position.
    groups : array-like of shape (n,), optional
        A name for each point. The most frequent seven have a colour and a marker each, and the
        others have one in common.
    explained : float, optional
        Part of the variance that the two dimensions keep.

    Attributes
    ----------
    ax_ : Axes
        Where the map is, after `plot`.
    figure_ : Figure
        Its figure.
    texts_ : list of Annotation
        The labels.

    Examples
    --------
    >>> import pandas as pd
    >>> from tpu_als import Recommender, TPUAlternatingLeastSquares
    >>> events = pd.DataFrame({
    ...     "user": ["ann", "ann", "bob", "bob", "cat", "cat"],
    ...     "item": ["tea", "milk", "tea", "jam", "jam", "bread"],
    ... })
    >>> rec = Recommender(model=TPUAlternatingLeastSquares(factors=3, random_state=0)).fit(events)
    >>> display = FactorMapDisplay.from_estimator(rec, labels=["tea", "jam"])
    >>> [text.get_text() for text in display.texts_]
    ['tea', 'jam']
    """

    def __init__(
        self,
        points: np.ndarray,
        labels: Mapping[int, str],
        groups: ArrayLike | None = None,
        explained: float | None = None,
    ) -> None:
        self.points, self.labels, self.groups = points, labels, groups
        self.explained = explained

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        *,
        side: str = "items",
        labels: Mapping[Any, str] | Iterable[Any] = (),
        groups: Mapping[Any, str] | Sequence[Any] | None = None,
        max_points: int = 2000,
        projection: Any = None,
        ax: Axes | None = None,
    ) -> Self:
        """Draw a table of a fitted model.

        Parameters
        ----------
        estimator : TPUAlternatingLeastSquares, Recommender or another model
            With `item_factors` and `user_factors`, or a Recommender.
        side : {"items", "users"}, default="items"
            The table to draw.
        labels : dict or Series of text by id, or list of ids, optional
            The points that get a label. Ids are those of a Recommender, and rows otherwise.
        groups : dict or Series of names by id, or list of shape (n,), optional
            A group, such as a department, of each id, or of each row. Ids without one are
            "unknown".
        max_points : int, default=2000
            If there are more rows, the labelled ones and the most popular are drawn; the longest
            where the model does not know popularity.
        projection : transformer, default=None
            With a method ``fit_transform`` that returns two columns, such as scikit-learn's TSNE.
            None means PCA.
        ax : Axes, optional
            None makes a figure.

        Returns
        -------
        display : FactorMapDisplay

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If there was no fit.
        KeyError
            For the label of an unknown id.
        ValueError
            For another `side`, too few rows or factors, groups of another length or without any of
            the ids, or a projection that does not return two columns.

        Warns
        -----
        DataWarning
            If labelled rows are 0 and have no direction, or if ids have no group.
        """
        if side not in ("items", "users"):
            raise ValueError(f'side must be "items" or "users", got {side!r}')
        table, ids, popularity = _table_of(estimator, side)
        texts = _texts_of(labels)
        at = ids.get_indexer(list(texts)) if len(texts) else np.empty(0, dtype=np.intp)
        if (at < 0).any():
            unknown = [one for one, row in zip(texts, at, strict=True) if row < 0]
            raise KeyError(f"labels has {len(unknown)} ids that the model lacks: {unknown[:5]}")
        names = _groups_of(groups, ids)
        norms = np.linalg.norm(table, axis=1)
        rows = _chosen(at, norms, popularity if popularity is not None else norms, max_points)
        directions = table[rows].astype(np.float64) / norms[rows, None]
        points, explained = _projected(directions, projection)
        if n_zero := int((norms[at] == 0).sum()):
            warnings.warn(
                f"{n_zero} of {len(at)} labelled rows are 0, have no direction, and are not drawn",
                DataWarning,
                stacklevel=2,
            )
        order = {int(row): place for place, row in enumerate(rows)}
        return cls(
            points,
            {
                order[int(row)]: str(text)
                for row, text in zip(at, texts.values(), strict=True)
                if int(row) in order  # a row of zeros has no direction
            },
            None if names is None else names[rows],
            explained,
        ).plot(ax=ax)

    def plot(self, *, ax: Axes | None = None, **scatter_kwargs: Any) -> Self:
        """Draw the map.

        Parameters
        ----------
        ax : Axes, optional
            None makes a figure.
        **scatter_kwargs
            Passed to `Axes.scatter`.

        Returns
        -------
        display : FactorMapDisplay
        """
        is_new = ax is None
        self.ax_ = style.one_axes(ax, (6.0, 5.0))
        self.figure_ = style.figure_of(self.ax_)
        for name, is_in, look in self._scattered():
            size = 20 if len(self.points) < 500 else 12
            options = {"s": size, "alpha": 0.6, "linewidths": 0, **look, **scatter_kwargs}
            x, y = self.points[is_in].T
            self.ax_.scatter(x, y, label=name, **options)
        marked = list(self.labels)
        self.ax_.scatter(
            self.points[marked, 0],
            self.points[marked, 1],
            s=30,
            facecolors="none",
            edgecolors="black",
            linewidths=1,
        )
        self.ax_.set(xticks=[], yticks=[])
        if self.explained is not None:
            self.ax_.set_xlabel(f"two dimensions keep {self.explained:.0%} of the variance")
        if self.groups is not None:
            beside: dict[str, Any] = (
                {"loc": "upper left", "bbox_to_anchor": (1, 1)} if is_new else {}
            )
            self.ax_.legend(fontsize="small", markerscale=1.5, **beside)
        self.texts_ = place_labels(self.ax_, self.points, self.labels)
        return self

    def _scattered(self) -> list[tuple[str | None, np.ndarray, dict[str, Any]]]:
        """The name, the points and the look of each group."""
        if self.groups is None:
            return [(None, np.ones(len(self.points), dtype=bool), {"color": style.COLOURS[0]})]
        names = pd.Series(np.asarray(self.groups, dtype=object))
        frequent = names.value_counts().index[:_MAX_GROUPS]
        rest = (~names.isin(frequent)).to_numpy()
        found: list[tuple[str | None, np.ndarray, dict[str, Any]]] = []
        if rest.any():
            n_other = names.nunique() - len(frequent)
            label = f"{n_other} other groups"
            found.append((label, rest, {"color": "0.75", "marker": "."}))
        for name, colour, marker in zip(frequent, style.COLOURS, style.MARKERS, strict=False):
            is_in = (names == name).to_numpy()
            found.append((style.plain(name), is_in, {"color": colour, "marker": marker}))
        return found


def _table_of(estimator: Any, side: str) -> tuple[np.ndarray, pd.Index, np.ndarray | None]:
    """Factors, ids, and the number of users of each item where it is known."""
    model = model_in(estimator)
    table = getattr(model, f"{side[:-1]}_factors", None)
    if table is None:
        raise NotFittedError(
            f"the {type(model).__name__} has no {side[:-1]}_factors: call fit first"
        )
    table = np.asarray(table)
    ids = getattr(estimator, f"{side}_", None)
    popularity = getattr(model, "item_popularity_", None) if side == "items" else None
    if popularity is not None and len(popularity) != len(table):
        popularity = None
    return table, pd.RangeIndex(len(table)) if ids is None else pd.Index(ids), popularity


def _texts_of(labels: Any) -> dict[Any, str]:
    """The text of each labelled id."""
    if isinstance(labels, (Mapping, pd.Series)):
        return {one: str(text) for one, text in labels.items()}
    named = [labels] if isinstance(labels, str) else labels
    return {one: str(one) for one in named}


def _groups_of(groups: Mapping[Any, str] | Sequence[Any] | None, ids: pd.Index) -> Any:
    if groups is None:
        return None
    if isinstance(groups, (Mapping, pd.Series)):
        if isinstance(groups, pd.Series) and not groups.index.is_unique:
            raise ValueError("groups has several values for an id: pass one for each")
        by_id = dict(groups.items())
        named = [by_id.get(one) for one in ids]
        is_missing = np.array([pd.isna(name) for name in named], dtype=bool)
        if is_missing.all():
            raise ValueError(
                f"groups has none of the {len(ids)} ids, such as {ids[0]!r}: use them as its keys "
                "or index, or pass a list with a group for each row"
            )
        if is_missing.any():
            warnings.warn(
                f'{is_missing.sum()} of {len(ids)} ids have no group, and are "unknown"',
                DataWarning,
                stacklevel=3,
            )
        found = np.empty(len(ids), dtype=object)
        for at, name in enumerate(named):
            found[at] = "unknown" if is_missing[at] else name
        return found
    found = np.asarray(groups, dtype=object)
    if found.shape != (len(ids),):
        raise ValueError(f"groups must hold {len(ids)} names, got shape {found.shape}")
    return found


def _chosen(
    labelled: np.ndarray, norms: np.ndarray, weights: np.ndarray, max_points: int
) -> np.ndarray:
    """The rows to draw, ascending: those with a label, then the heaviest."""
    if max_points < 2:
        raise ValueError(f"max_points must be at least 2, got {max_points}")
    order = np.argsort(-weights, kind="stable")
    order = np.concatenate([labelled, order[~np.isin(order, labelled)]])
    order = order[norms[order] > 0][: max(max_points, len(labelled))]
    if len(order) < 3:
        raise ValueError(f"a map needs 3 rows with factors that are not 0, got {len(order)}")
    return np.sort(order)


def _projected(directions: np.ndarray, projection: Any) -> tuple[np.ndarray, float | None]:
    """Two columns, and the part of the variance in them if it is known."""
    if projection is None:
        if directions.shape[1] < 2:
            raise ValueError("a map needs at least 2 factors, got 1")
        projection = PCA(2, svd_solver="full")
    points = np.asarray(projection.fit_transform(directions))
    if points.shape != (len(directions), 2):
        raise ValueError(
            f"projection must return the shape {(len(directions), 2)}, got {points.shape}"
        )
    ratios = getattr(projection, "explained_variance_ratio_", None)
    return points, None if ratios is None else float(np.sum(ratios))
