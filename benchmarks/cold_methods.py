"""Methods that rank new items by their features, for `cold_start_items.py`.

Each method is a function of a problem and of settings. It returns an object with implicit's
`recommend`. Its space lists its defaults, which are tried first, and what is drawn for a trial.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import loguniform
from sklearn.preprocessing import OneHotEncoder

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.weighting import LogWeighting

FIELDS = ("department", "product_category", "product_type", "brand", "manufacturer", "size")


class Problem(NamedTuple):
    """Train entries, and features of all items.

    Attributes
    ----------
    train : csr_matrix of shape (n_users, n_items)
        Counts. New items have no entries.
    features : csr_matrix of shape (n_items, n_features)
        One-hot, float32.
    of_users : csr_matrix of shape (n_users, n_user_features)
        One-hot, float32; rows of zeros for users of whom nothing is known.
    fields : ndarray of int and shape (n_features,)
        The column of the frame that each feature is from.
    categories : dict of str to ndarray of int and shape (n_items,)
        Levels of categories: the category of each item.
    factors : int
        Of the models.
    seed : int
        Of the models.
    """

    train: sparse.csr_matrix
    features: sparse.csr_matrix
    of_users: sparse.csr_matrix
    fields: np.ndarray
    categories: dict[str, np.ndarray]
    factors: int
    seed: int

    def is_warm(self) -> np.ndarray:
        """Whether an item has entries, (n_items,)."""
        return np.bincount(self.train.indices, minlength=self.train.shape[1]) > 0

    def weighted(self) -> sparse.csr_matrix:
        """Confidence of the train entries, the same for all models."""
        return LogWeighting().fit_transform(self.train)


class Scores:
    """Ranks by scores, which a function computes for some users and some items."""

    def __init__(self, of: Callable[[np.ndarray, np.ndarray], np.ndarray], n_items: int) -> None:
        self.of, self.n_items = of, n_items

    @classmethod
    def of_factors(cls, users: np.ndarray, items: np.ndarray) -> Scores:
        """Scores are products of factors."""
        return cls(lambda rows, columns: users[rows] @ items[columns].T, len(items))

    def recommend(
        self,
        userid: np.ndarray,
        user_items: sparse.csr_matrix,
        N: int,
        items: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rank items that the users do not have."""
        chosen = np.arange(self.n_items) if items is None else items
        scores, n = self.of(userid, chosen).astype(np.float64), min(N, len(chosen))
        scores[user_items[:, chosen].nonzero()] = -np.inf
        best = np.argpartition(-scores, n - 1, axis=1)[:, :n]
        found = np.take_along_axis(scores, best, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        found = np.take_along_axis(found, order, axis=1)
        ids = chosen[np.take_along_axis(best, order, axis=1)]
        return np.where(np.isneginf(found), -1, ids), found


class Method(NamedTuple):
    """A function that fits a method, its defaults, and what is drawn for other trials."""

    fit: Callable[..., Any]
    defaults: dict[str, Any]
    space: dict[str, Any]


def popularity(problem: Problem, level: str, taste: float, size: float, smoothing: float) -> Scores:
    """Popularity within the user's categories.

    A score is ``share ** taste * popularity ** size``: the smoothed share of the item's category
    among the user's items, and the number of users of the item. A new item has the mean number of
    the known items of its category.
    """
    category, is_warm = problem.categories[level], problem.is_warm()
    n_categories = int(category.max()) + 1
    liked = problem.train > 0
    users_of = np.asarray(liked.sum(axis=0)).ravel()
    total = np.bincount(category, users_of, n_categories)
    known = np.bincount(category, is_warm, n_categories)
    mean = (total + users_of.sum() / is_warm.sum()) / (known + 1)
    popular = np.where(is_warm, users_of, mean[category])
    to_category = sparse.csr_matrix(
        (np.ones(len(category)), (np.arange(len(category)), category)),
        shape=(len(category), n_categories),
    )
    counts = np.asarray((liked.astype(np.float64) @ to_category).todense())
    prior = (total + 1) / (total + 1).sum()
    counts += smoothing * prior
    # The share is that of one of the category's items.
    shares = counts / counts.sum(axis=1, keepdims=True) / np.maximum(known, 1)
    weights = shares**taste
    popular = popular**size
    return Scores(
        lambda users, items: weights[users][:, category[items]] * popular[items], len(category)
    )


def content(problem: Problem, idf: float, counted: str, **of_fields: float) -> Scores:
    """Cosine of an item's features with the features of the user's items."""
    features, n_items = problem.features.astype(np.float64), problem.features.shape[0]
    items_of = np.bincount(features.indices, minlength=features.shape[1])
    rarity = np.log((1 + n_items) / (1 + items_of)) ** idf
    emphasis = np.array([of_fields[name] for name in FIELDS])[problem.fields]
    scaled = features @ sparse.diags_array(rarity * emphasis)
    lengths = np.sqrt(np.asarray(scaled.multiply(scaled).sum(axis=1)).ravel())
    scaled = sparse.csr_matrix(sparse.diags_array(1 / np.maximum(lengths, 1e-12)) @ scaled)
    rows = {"ones": problem.train > 0, "logarithms": problem.weighted(), "counts": problem.train}
    profiles = np.asarray((rows[counted].astype(np.float64) @ scaled).todense())
    return Scores(lambda users, items: (scaled[items] @ profiles[users].T).T, n_items)


def cmfrec(problem: Problem, niter: int = 10, **settings: Any) -> Scores:
    """Collective factorisation of entries and features, by the package cmfrec."""
    from cmfrec import CMF_implicit

    is_warm, features = problem.is_warm(), problem.features
    # Its conjugate gradients return NaN with NA_as_zero_item, so use_cg is False.
    model = CMF_implicit(
        k=problem.factors, niter=niter, use_cg=False, NA_as_zero_item=True, center_I=False,
        random_state=problem.seed, verbose=False, **settings,
    )  # fmt: skip
    warm = np.flatnonzero(is_warm)
    model.fit(problem.weighted()[:, warm].tocoo(), I=features[warm].tocoo())
    # The minimum of its objective for an item without entries. The ranking is better than by
    # `item_factors_cold`, which does not count features that are 0.
    of_features, weight = model.D_.astype(np.float64), settings["w_item"]
    gramian = weight * of_features.T @ of_features + settings["lambda_"] * np.eye(problem.factors)
    table = np.linalg.solve(gramian, weight * (features @ of_features).T).T
    table[warm] = model.B_
    return Scores.of_factors(model.A_, table)


def tpu_als(problem: Problem, **settings: Any) -> Any:
    """The model of this package, with features of items."""
    return _fitted(problem, settings, item_features=problem.features)


def both_sides(problem: Problem, **settings: Any) -> Any:
    """The model of this package, with features of items and users."""
    given = {"item_features": problem.features, "user_features": problem.of_users}
    return _fitted(problem, settings, **given)


def without_features(problem: Problem, **settings: Any) -> Any:
    """The model of this package without features."""
    return _fitted(problem, settings)


def _fitted(problem: Problem, settings: dict[str, Any], **features: sparse.csr_matrix) -> Any:
    model = TPUAlternatingLeastSquares(
        problem.factors, iterations=10, objective="ials", random_state=problem.seed, **settings
    )
    return model.fit(problem.weighted(), **features)


_ALS: dict[str, Any] = {
    "regularization": loguniform(1e-4, 3e-2), "unobserved_weight": loguniform(0.1, 10),
}  # fmt: skip
_DEFAULTS = {"regularization": 1e-3, "unobserved_weight": 1.0}
_WITH_FEATURES = {
    **_ALS, "feature_weight": loguniform(0.1, 10), "feature_regularization": loguniform(1e-3, 100),
}  # fmt: skip
_WITH_DEFAULTS = {**_DEFAULTS, "feature_weight": 1.0, "feature_regularization": 1.0}
METHODS: dict[str, Method] = {
    "popularity": Method(
        popularity,
        {"level": "product_category", "taste": 1.0, "size": 1.0, "smoothing": 10.0},
        {
            "level": ["product_category", "product_type"], "taste": loguniform(0.3, 3),
            "size": loguniform(0.3, 3), "smoothing": loguniform(1, 300),
        },
    ),
    "content": Method(
        content,
        {"idf": 1.0, "counted": "logarithms", **dict.fromkeys(FIELDS, 1.0)},
        {
            "idf": [0.0, 0.5, 1.0, 1.5], "counted": ["ones", "logarithms", "counts"],
            **dict.fromkeys(FIELDS, loguniform(0.3, 3)),
        },
    ),
    "cmfrec": Method(
        cmfrec,
        {"lambda_": 1.0, "alpha": 1.0, "w_item": 10.0},
        {
            "lambda_": loguniform(0.1, 100), "alpha": loguniform(0.1, 30),
            "w_item": loguniform(0.03, 100),
        },
    ),
    "tpu_als": Method(tpu_als, _WITH_DEFAULTS, _WITH_FEATURES),
    "tpu_als, both sides": Method(both_sides, _WITH_DEFAULTS, _WITH_FEATURES),
    "without features": Method(without_features, _DEFAULTS, _ALS),
}  # fmt: skip


def problem_of(
    train: sparse.csr_matrix, items: pd.DataFrame, users: pd.DataFrame, factors: int, seed: int
) -> Problem:
    """One-hot features of frames with one row for each item and each user."""
    features, fields = _one_hot(items)
    levels = items.columns[:3]
    categories = {name: pd.factorize(items[name].fillna("unknown"))[0] for name in levels}
    return Problem(train, features, _one_hot(users)[0], fields, categories, factors, seed)


def _one_hot(frame: pd.DataFrame) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Features, and the column of the frame that each is from. Rare values of a column are one."""
    numbered = frame.set_axis([str(field) for field in range(frame.shape[1])], axis=1)
    encoder = OneHotEncoder(handle_unknown="ignore", min_frequency=5, dtype=np.float32)
    features = encoder.fit(numbered.dropna()).transform(numbered)
    names = encoder.get_feature_names_out()  # such as "3_Private"
    return features, np.array([int(name.partition("_")[0]) for name in names])
