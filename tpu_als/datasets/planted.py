"""A seeded generator of interactions whose factors are partly explained by features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from tpu_als.datasets.generators import integer
from tpu_als.host import require_memory
from tpu_als.parameters import random_generator
from tpu_als.validation import fractions

_GROUPS = 4  # groups of features; a row has one feature of each group
_SHARPNESS = 2.0  # deviation of the logits of a user's items
_CELLS_AT_ONCE = 1 << 22


class PlantedFeatures(NamedTuple):
    """What `planted_features` returns, for K factors and P features of each side.

    Attributes
    ----------
    matrix : csr_matrix of shape (n_users, n_items)
        float32 ones.
    user_features, item_features : csr_matrix of shape (n_users, P) and (n_items, P)
        float32 ones: one in each of four groups of columns.
    user_factors, item_factors : ndarray of float64 and shape (n_users, K) and (n_items, K)
        The factors that the entries are drawn by.
    """

    matrix: sparse.csr_matrix
    user_features: sparse.csr_matrix
    item_features: sparse.csr_matrix
    user_factors: np.ndarray
    item_factors: np.ndarray


def planted_features(
    n_users: int,
    n_items: int,
    n_entries: int,
    *,
    explained: float = 0.5,
    factors: int = 8,
    n_features: int = 40,
    random_state: object = 0,
) -> PlantedFeatures:
    """Generate interactions, and features that explain a known part of the factors.

    The factors of a row are ``sqrt(explained) * f W + sqrt(1 - explained) * e``. Here f are the
    row's features, W is random and the same for all rows of a side, and e is independent random
    noise. Both terms have mean 0 and variance 1. The features so explain the fraction `explained`
    of the variance of the factors, and no more can be known of a row without entries.

    All users have the same number of entries, or one more. A user's items are drawn without
    repeats, with probability proportional to ``exp(2 x'y / sqrt(K))`` of the user's factors x and
    the item's factors y.

    Parameters
    ----------
    n_users, n_items, n_entries : int
        Shape and number of entries: at least two users, two items and one entry, and entries in at
        most a third of the cells.
    explained : float, default=0.5
        Part of the factors that features explain, from 0 to 1.
    factors : int, default=8
        K.
    n_features : int, default=40
        P, at least 8: four groups of features, of almost equal size.
    random_state : int, RandomState, Generator or None, default=0
        Seed; the same integer gives the same data.

    Returns
    -------
    PlantedFeatures
        Unpacks as ``matrix, user_features, item_features, user_factors, item_factors``.

    Raises
    ------
    ValueError
        For numbers that are not integers or too small, more entries than a third of the cells, a
        part out of range, or a seed of a wrong type.
    MemoryError
        If the result does not fit into memory.

    Examples
    --------
    >>> planted = planted_features(200, 100, 2_000, explained=1.0)
    >>> planted.matrix.nnz, planted.item_features.shape, planted.item_factors.shape
    (2000, (100, 40), (100, 8))
    """
    n_users, n_items = integer("n_users", n_users, 2), integer("n_items", n_items, 2)
    n_entries, factors = integer("n_entries", n_entries), integer("factors", factors)
    n_features = integer("n_features", n_features, 2 * _GROUPS)
    if not fractions.is_number(explained) or not 0 <= explained <= 1:
        raise ValueError(f"explained must be from 0 to 1, got {explained!r}")
    most = n_users * n_items // 3
    if n_entries > most:
        raise ValueError(
            f"n_entries must be at most a third of the {n_users} x {n_items} cells, {most}, "
            f"got {n_entries}"
        )
    parts = {"factors": 32 * (n_users + n_items) * factors, "entries": 32 * n_entries}
    require_memory(parts, "ask for a smaller matrix")
    rng = random_generator(random_state)
    sides = []
    for n_rows in (n_users, n_items):
        features = _one_of_each_group(n_rows, n_features, rng)
        linear = _standardised(features @ rng.standard_normal((n_features, factors)))
        noise = _standardised(rng.standard_normal((n_rows, factors)))
        sides.append((features, np.sqrt(explained) * linear + np.sqrt(1 - explained) * noise))
    (user_features, users), (item_features, items) = sides
    matrix = _drawn(users, items, n_entries, rng)
    return PlantedFeatures(matrix, user_features, item_features, users, items)


def _one_of_each_group(n_rows: int, n_features: int, rng: np.random.Generator) -> sparse.csr_matrix:
    """Features (n_rows, n_features): one of each group, drawn uniformly."""
    groups = np.array_split(np.arange(n_features), _GROUPS)
    columns = np.stack([rng.choice(group, n_rows) for group in groups], axis=1).ravel()
    indptr = np.arange(n_rows + 1) * _GROUPS
    ones = np.ones(len(columns), np.float32)
    return sparse.csr_matrix((ones, columns, indptr), shape=(n_rows, n_features))


def _standardised(table: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and variance 1.

    A linear function of features stays one: every row has the same number of features, so a
    constant is linear in them.
    """
    deviations = table.std(axis=0)
    return (table - table.mean(axis=0)) / np.where(deviations > 0, deviations, 1)


def _drawn(
    users: np.ndarray, items: np.ndarray, n_entries: int, rng: np.random.Generator
) -> sparse.csr_matrix:
    """Draw distinct items of each user, by the factors of both."""
    n_users, n_items = len(users), len(items)
    counts = n_entries // n_users + (rng.permutation(n_users) < n_entries % n_users)
    indptr = np.append(0, np.cumsum(counts))
    indices = np.empty(n_entries, np.int32)
    step = max(_CELLS_AT_ONCE // n_items, 1)
    for low in range(0, n_users, step):
        # The largest sums of a logit and Gumbel noise are a draw without repeats.
        logits = users[low : low + step] @ items.T * (_SHARPNESS / np.sqrt(users.shape[1]))
        order = np.argsort(-(logits + rng.gumbel(size=logits.shape)), axis=1)
        for row, ranked in enumerate(order, start=low):
            indices[indptr[row] : indptr[row + 1]] = np.sort(ranked[: counts[row]])
    return sparse.csr_matrix(
        (np.ones(n_entries, np.float32), indices, indptr), shape=(n_users, n_items)
    )
