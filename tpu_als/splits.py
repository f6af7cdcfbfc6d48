"""Splits of interactions into a part to learn from and a part to find. NumPy only.

Names that implicit has mean what they mean there. All are vectorised, leave their input as it is,
and are the same for the same seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from tpu_als import holdout
from tpu_als.parameters import random_generator


def train_test_split(
    ratings: Any, train_percentage: float = 0.8, random_state: Any = None
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split entries at random; those of the test part below 0 are dropped, as in implicit.

    Parameters
    ----------
    ratings : sparse matrix or array of shape (n_users, n_items)
        The entries.
    train_percentage : float, default=0.8
        Probability, from 0 to 1, that an entry goes to the train part; 1 leaves no test part.
    random_state : None, int, RandomState or Generator, default=None
        Seed. The split of an integer is implicit's.

    Returns
    -------
    train, test : csr_matrix of shape (n_users, n_items)
    """
    if not 0 <= train_percentage <= 1:
        raise ValueError(f"train_percentage must be from 0 to 1, got {train_percentage}")
    entries = sparse.coo_matrix(ratings)
    draws = random_generator(random_state).random(len(entries.data))
    in_train = draws < train_percentage
    return _part(entries, in_train), _part(entries, ~in_train & (entries.data > 0))


def leave_k_out_split(
    ratings: Any, K: int = 1, train_only_size: float = 0.0, random_state: Any = None
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Hold out K entries of every user with more than K + 1; unlike implicit's, reproducible.

    Parameters
    ----------
    ratings : sparse matrix or array of shape (n_users, n_items)
        The entries.
    K : int, default=1
        Entries to hold out of a user.
    train_only_size : float, default=0.0
        Part of the users of whom nothing is held out.
    random_state : None, int, RandomState or Generator, default=None
        Seed.

    Returns
    -------
    train, test : csr_matrix of shape (n_users, n_items)
    """
    if K < 1:
        raise ValueError(f"K must be 1 or more, got {K}")
    if not 0 <= train_only_size < 1:
        raise ValueError(f"train_only_size must be at least 0 and below 1, got {train_only_size}")
    entries, rng = sparse.coo_matrix(ratings), random_generator(random_state)
    counts = np.bincount(entries.row, minlength=entries.shape[0])
    tested = (counts > K + 1) & (rng.random(entries.shape[0]) >= train_only_size)
    order = np.argsort(entries.row + rng.random(entries.nnz), kind="stable")
    place = np.arange(entries.nnz) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(entries.nnz, bool)
    held[order[(place < K) & tested[entries.row[order]]]] = True
    return _part(entries, ~held), _part(entries, held & (entries.data > 0))


def strong_generalization_split(
    user_items: Any,
    test_users: float = 0.1,
    fold_in: float = 0.8,
    random_state: Any = None,
) -> tuple[sparse.csr_matrix, sparse.csr_matrix, sparse.csr_matrix]:
    """Split users into training ones and unseen ones, of whom a part of the entries is folded in.

    Parameters
    ----------
    user_items : sparse matrix or array of shape (n_users, n_items)
        The entries; one stored twice is summed.
    test_users : float, default=0.1
        Part of all users to hold out of training, from those with two positive entries or more.
    fold_in : float, default=0.8
        Part of each such user's positive entries to fold in; at least one is left to be found.
        Other entries are folded in.
    random_state : None, int, RandomState or Generator, default=None
        Seed.

    Returns
    -------
    train : csr_matrix of shape (n_users - n, n_items)
    visible, held_out : csr_matrix of shape (n, n_items)
        The entries to fold in, and those to rank, of the n unseen users.

    References
    ----------
    Liang, Krishnan, Hoffman, Jebara (2018), Variational Autoencoders for Collaborative Filtering,
    section 4.1; also the protocol of ALX.
    """
    _check_fraction("test_users", test_users)
    _check_fraction("fold_in", fold_in)
    rows, rng = holdout.canonical(user_items), random_generator(random_state)
    positive = np.append(0, np.cumsum(rows.data > 0))[rows.indptr]
    able = np.flatnonzero(np.diff(positive) > 1)
    if not len(able):
        raise ValueError("no user has two positive entries, one to fold in and one to find")
    chosen = np.sort(rng.permutation(able)[: max(round(test_users * rows.shape[0]), 1)])
    train = rows[np.setdiff1d(np.arange(rows.shape[0]), chosen)]
    visible, held_out = holdout.hide(rows[chosen], 1 - fold_in, at_least=1, rng=rng)
    return train, visible, held_out


def time_split(
    user_items: Any, timestamps: Any, fraction: float = 0.2
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split entries into the earlier ones and the latest `fraction`; ties stay in the earlier part.

    For a matrix, whose entries are a user and an item each. `datasets.split_by_time` has the same
    cut for a table of single interactions, of which a user may have several with an item.

    Parameters
    ----------
    user_items : sparse matrix or array of shape (n_users, n_items)
        The entries.
    timestamps : sparse matrix or array of the same entries
        When each of them happened, in any unit.
    fraction : float, default=0.2
        Part of the entries to hold out.

    Returns
    -------
    train, test : csr_matrix of shape (n_users, n_items)

    Raises
    ------
    ValueError
        For a fraction out of range, other entries, or a missing time (NaN).
    """
    _check_fraction("fraction", fraction)
    entries, times = _sorted(user_items), _sorted(timestamps)
    same = entries.shape == times.shape and np.array_equal(entries.indptr, times.indptr)
    if not same or not np.array_equal(entries.indices, times.indices):
        raise ValueError("timestamps must be a sparse matrix with the entries of user_items")
    if np.isnan(times.data).any():
        raise ValueError("timestamps must have no missing values (NaN): drop those entries first")
    cut = np.quantile(times.data, 1 - fraction, method="lower") if times.nnz else 0
    late = times.data > cut
    return _part(entries.tocoo(), ~late), _part(entries.tocoo(), late)


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def _sorted(matrix: Any) -> sparse.csr_matrix:
    """CSR with sorted indices; where that takes sorting, in a copy, as others may share them."""
    rows = sparse.csr_matrix(matrix)
    return rows if rows.has_sorted_indices else rows.sorted_indices()


def _part(entries: sparse.coo_matrix, chosen: np.ndarray) -> sparse.csr_matrix:
    kept = (entries.data[chosen], (entries.row[chosen], entries.col[chosen]))
    return sparse.csr_matrix(kept, shape=entries.shape, dtype=entries.dtype)
