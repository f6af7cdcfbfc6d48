"""Splits that hold out whole items or whole users, to measure models that know their features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from tpu_als.evaluation import holdout
from tpu_als.parameters import random_generator
from tpu_als.validation import fractions


class ColdItemSplit(NamedTuple):
    """What `cold_item_split` returns.

    Attributes
    ----------
    train : csr_matrix of shape (n_users, n_items)
        The entries of all other items. The columns of cold items are empty.
    test : csr_matrix of shape (n_users, n_items)
        The entries of cold items.
    items : ndarray of int64 and shape (n,)
        The ids of the cold items, ascending.
    """

    train: sparse.csr_matrix
    test: sparse.csr_matrix
    items: np.ndarray


class ColdUserSplit(NamedTuple):
    """What `cold_user_split` returns.

    Attributes
    ----------
    train : csr_matrix of shape (n_users, n_items)
        The entries of all other users. The rows of cold users are empty.
    test : csr_matrix of shape (n_users, n_items)
        The entries of cold users.
    users : ndarray of int64 and shape (n,)
        The ids of the cold users, ascending.
    """

    train: sparse.csr_matrix
    test: sparse.csr_matrix
    users: np.ndarray


def cold_item_split(
    user_items: sparse.spmatrix | sparse.sparray,
    test_size: float = 0.2,
    random_state: object = None,
) -> ColdItemSplit:
    """Hold out all entries of some items, as if these items were new.

    Both parts have the shape of `user_items`, so ids stay the same, and a table of item features
    fits both. ``ranking_metrics_at_k(model, train, test, items=items)`` ranks the cold items only;
    without ``items`` they compete with all others.

    Parameters
    ----------
    user_items : sparse matrix or array of shape (n_users, n_items)
        The entries; one stored twice is summed.
    test_size : float, default=0.2
        Fraction, between 0 and 1, of the items with positive entries to hold out, at least one.
        Other items are not drawn, because nothing about them can be tested.
    random_state : None, int, RandomState or Generator, default=None
        Seed.

    Returns
    -------
    ColdItemSplit
        Unpacks as ``train, test, items``. Train and test part add up to `user_items`. Entries of a
        cold item that are not positive are in the test part too; the metrics ignore them.

    Raises
    ------
    TypeError
        For an object that is not a matrix of users by items.
    ValueError
        For a fraction out of range, NaN or infinity, or a matrix in which fewer than two items have
        positive entries, or too few for one of them to stay.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> plays = csr_matrix([[3, 1, 0, 0], [0, 4, 1, 0], [0, 0, 2, 5]])
    >>> train, test, items = cold_item_split(plays, 0.25, random_state=0)
    >>> items.tolist(), train.toarray().tolist()
    ([2], [[3, 1, 0, 0], [0, 4, 0, 0], [0, 0, 0, 5]])
    """
    fractions.require("test_size", test_size)
    rows = holdout.canonical(user_items)
    has_entries = np.bincount(rows.indices[rows.data > 0], minlength=rows.shape[1]) > 0
    items = _drawn(has_entries, test_size, "items", random_state)
    is_cold = np.zeros(rows.shape[1], bool)
    is_cold[items] = True
    return ColdItemSplit(*holdout.parts(rows, is_cold[rows.indices]), items)


def cold_user_split(
    user_items: sparse.spmatrix | sparse.sparray,
    test_size: float = 0.2,
    random_state: object = None,
) -> ColdUserSplit:
    """Hold out all entries of some users, as if these users were new.

    Both parts have the shape of `user_items`, so ids stay the same, and a table of user features
    fits both. `strong_generalization_split` is for new users of whom some entries are known.

    Parameters
    ----------
    user_items : sparse matrix or array of shape (n_users, n_items)
        The entries; one stored twice is summed.
    test_size : float, default=0.2
        Fraction, between 0 and 1, of the users with positive entries to hold out, at least one.
    random_state : None, int, RandomState or Generator, default=None
        Seed.

    Returns
    -------
    ColdUserSplit
        Unpacks as ``train, test, users``. Train and test part add up to `user_items`. Entries of a
        cold user that are not positive are in the test part too; the metrics ignore them.

    Raises
    ------
    TypeError
        For an object that is not a matrix of users by items.
    ValueError
        For a fraction out of range, NaN or infinity, or a matrix in which fewer than two users have
        positive entries, or too few for one of them to stay.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> plays = csr_matrix([[3, 1, 0, 0], [0, 4, 1, 0], [0, 0, 2, 5]])
    >>> train, test, users = cold_user_split(plays, 0.3, random_state=0)
    >>> users.tolist(), test.toarray().tolist()
    ([2], [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 5]])
    """
    fractions.require("test_size", test_size)
    rows = holdout.canonical(user_items)
    users = _drawn(holdout.positive_counts(rows) > 0, test_size, "users", random_state)
    is_cold = np.zeros(rows.shape[0], bool)
    is_cold[users] = True
    is_chosen = np.repeat(is_cold, np.diff(rows.indptr))
    return ColdUserSplit(*holdout.parts(rows, is_chosen), users)


def _drawn(has_entries: np.ndarray, fraction: float, what: str, random_state: object) -> np.ndarray:
    """Draw a fraction, and at least one, of the ids with entries; sorted."""
    rng = random_generator(random_state)
    ids = np.flatnonzero(has_entries)
    if len(ids) < 2:
        raise ValueError(
            f"user_items must have at least two {what} with positive entries, one to hold out and "
            f"one to train on, got {len(ids)}"
        )
    n_cold = max(round(fraction * len(ids)), 1)
    if n_cold == len(ids):
        raise ValueError(
            f"test_size={fraction} of {len(ids)} {what} with positive entries leaves none to train "
            "on: hold out fewer"
        )
    return np.sort(rng.permutation(ids)[:n_cold])
