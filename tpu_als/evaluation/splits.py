"""Splits of interactions into a train part and a test part. NumPy only.

Functions with implicit's names behave as in implicit. All are vectorised, do not modify their
input, and are reproducible for a seed. Entries that are stored more than once are summed before the
split, and the parts add up to that sum. Test parts are drawn from the positive entries, because
only those are relevant; stored zeros and negative values stay in the train part. NaN and infinity
are errors.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from tpu_als.evaluation import holdout, inputs
from tpu_als.parameters import random_generator
from tpu_als.validation import fractions, structure


def train_test_split(
    ratings: sparse.spmatrix | sparse.sparray,
    train_percentage: float = 0.8,
    random_state: object = None,
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split entries at random.

    Parameters
    ----------
    ratings : sparse matrix or array of shape (n_users, n_items)
        The entries; one stored twice is summed.
    train_percentage : float, default=0.8
        Probability, from 0 to 1, that a positive entry goes to the train part; 1 leaves no test
        part.
    random_state : None, int, RandomState or Generator, default=None
        Seed. For an integer the test part equals implicit's, if `ratings` is a CSR matrix with
        sorted indices and without duplicates.

    Returns
    -------
    train, test : csr_matrix of shape (n_users, n_items)
        They add up to `ratings`. Entries below 0 stay in `train`; implicit drops those that it
        draws for the test part. Duplicates are summed; implicit may put them in both parts.
    """
    if not fractions.is_number(train_percentage) or not 0 <= train_percentage <= 1:
        raise ValueError(f"train_percentage must be from 0 to 1, got {train_percentage!r}")
    rows = holdout.canonical(ratings, "ratings")
    draws = random_generator(random_state).random(rows.nnz)
    return holdout.parts(rows, (draws >= train_percentage) & (rows.data > 0))


def leave_k_out_split(
    ratings: sparse.spmatrix | sparse.sparray,
    K: int = 1,
    train_only_size: float = 0.0,
    random_state: object = None,
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Hold out K positive entries of every user with more than K + 1 of them.

    Unlike implicit's, it is reproducible, loses no entries, and counts positive entries only.

    Parameters
    ----------
    ratings : sparse matrix or array of shape (n_users, n_items)
        The entries; one stored twice is summed.
    K : int, default=1
        Entries to hold out of a user.
    train_only_size : float, default=0.0
        Fraction, from 0 to below 1, of the n users with entries from whom nothing is held out. As
        in implicit, these are ``int(n * train_only_size)`` users, but at least one if it is not 0.
    random_state : None, int, RandomState or Generator, default=None
        Seed.

    Returns
    -------
    train, test : csr_matrix of shape (n_users, n_items)
        They add up to `ratings`.
    """
    K = inputs.integer("K", K)
    if not fractions.is_number(train_only_size) or not 0 <= train_only_size < 1:
        raise ValueError(f"train_only_size must be at least 0 and below 1, got {train_only_size!r}")
    rows, rng = holdout.canonical(ratings, "ratings"), random_generator(random_state)
    is_tested = holdout.positive_counts(rows) > K + 1
    users = np.flatnonzero(np.diff(rows.indptr))
    if train_only_size > 0 and len(users):
        # As in implicit, multiply in float32: 0.29 * 100 is 29 there, but 28.999... in float64.
        size = int(np.float32(len(users)) * np.float32(train_only_size))
        size = min(max(size, 1), len(users))
        is_tested[users[rng.choice(len(users), size, replace=False)]] = False
    return holdout.parts(rows, holdout.drawn(rows, np.where(is_tested, K, 0), rng))


def strong_generalization_split(
    user_items: sparse.spmatrix | sparse.sparray,
    test_users: float = 0.1,
    fold_in: float = 0.8,
    random_state: object = None,
) -> tuple[sparse.csr_matrix, sparse.csr_matrix, sparse.csr_matrix]:
    """Split users into training users and unseen users, and split the entries of the latter.

    Parameters
    ----------
    user_items : sparse matrix or array of shape (n_users, n_items)
        The entries; one stored twice is summed.
    test_users : float, default=0.1
        Fraction of all users to hold out of training. They are drawn from those with at least two
        positive entries.
    fold_in : float, default=0.8
        Fraction of each such user's positive entries to fold in; at least one is left to be found.
        All other entries are folded in too.
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
    fractions.require("test_users", test_users)
    fractions.require("fold_in", fold_in)
    rows, rng = holdout.canonical(user_items), random_generator(random_state)
    testable = np.flatnonzero(holdout.positive_counts(rows) > 1)
    if not len(testable):
        raise ValueError("no user has two positive entries, one to fold in and one to find")
    chosen = np.sort(rng.permutation(testable)[: max(round(test_users * rows.shape[0]), 1)])
    if len(chosen) == rows.shape[0]:
        raise ValueError(
            f"test_users={test_users} of {rows.shape[0]} users leaves none to train on: hold out "
            "fewer"
        )
    train = rows[np.setdiff1d(np.arange(rows.shape[0]), chosen)]
    visible, held_out = holdout.hide(rows[chosen], 1 - fold_in, at_least=1, rng=rng)
    return train, visible, held_out


def time_split(
    user_items: sparse.spmatrix | sparse.sparray,
    timestamps: sparse.spmatrix | sparse.sparray,
    fraction: float = 0.2,
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Split entries into the earlier ones and the latest `fraction`; ties stay in the earlier part.

    A matrix has one entry for a user and an item. `datasets.split_by_time` splits a table of
    interactions in the same way; it may have several rows for a user and an item.

    Parameters
    ----------
    user_items : sparse matrix or array of shape (n_users, n_items)
        The entries; one stored twice is summed.
    timestamps : sparse matrix or array of the same entries
        The time of each entry, in any unit. If an entry is stored twice, the earlier time is used.
    fraction : float, default=0.2
        Fraction of the entries to hold out.

    Returns
    -------
    train, test : csr_matrix of shape (n_users, n_items)
        They add up to `user_items`. Late entries that are not positive are in `test` too, because a
        model must not be trained on later entries; the metrics ignore them.

    Raises
    ------
    ValueError
        For a fraction out of range, other entries, or a missing time (NaN).
    """
    fractions.require("fraction", fraction)
    entries = holdout.canonical(user_items)
    return holdout.parts(entries, fractions.is_latest(times_of(entries, timestamps), fraction))


def times_of(
    entries: sparse.csr_matrix,
    timestamps: sparse.spmatrix | sparse.sparray,
    of_repeats: np.ufunc = np.minimum,
) -> np.ndarray:
    """Times of the entries of a matrix, in its order.

    Parameters
    ----------
    entries : csr_matrix of shape (n_users, n_items)
        Canonical.
    timestamps : sparse matrix or array of the same entries
        Their times, in any unit.
    of_repeats : ufunc, default=np.minimum
        Which time to use if an entry is stored twice: the earlier one, or np.maximum for the later.

    Returns
    -------
    ndarray of shape (nnz,)

    Raises
    ------
    ValueError
        For other entries, or a missing time (NaN).
    """
    times = _one_of_each(timestamps, of_repeats)
    same = entries.shape == times.shape and np.array_equal(entries.indptr, times.indptr)
    if not same or not np.array_equal(entries.indices, times.indices):
        raise ValueError("timestamps must be a sparse matrix with the entries of user_items")
    if np.isnan(times.data).any():
        raise ValueError("timestamps must have no missing values (NaN): drop those entries first")
    return times.data


def _one_of_each(
    timestamps: sparse.spmatrix | sparse.sparray, of_repeats: np.ufunc
) -> sparse.csr_matrix:
    """Canonical CSR with one of the values stored for each entry, which `of_repeats` chooses."""
    name = "timestamps"
    times = holdout.require_users_by_items(timestamps, name)
    if sparse.issparse(times):
        times, is_canonical = structure.checked_with_order(times, name, widen=False)
        if is_canonical and times.ndim == 2:
            return sparse.csr_matrix((times.data, times.indices, times.indptr), shape=times.shape)
    else:
        times = sparse.coo_matrix(structure.real_numbers(times, name))
    times = (times.reshape(1, -1) if times.ndim == 1 else times).tocoo()
    order = np.lexsort((times.col, times.row))
    rows, columns, values = times.row[order], times.col[order], times.data[order]
    is_first = np.append(True, (np.diff(rows) != 0) | (np.diff(columns) != 0))[: len(order)]
    if len(order):
        values = of_repeats.reduceat(values, np.flatnonzero(is_first))
    counts = np.bincount(rows[is_first], minlength=times.shape[0])
    entries = (values, columns[is_first], np.append(0, np.cumsum(counts)))
    return sparse.csr_matrix(entries, shape=times.shape)
