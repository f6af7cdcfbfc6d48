"""Seeded generators of interactions with heavy tails."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.host import require_memory
from tpu_als.parameters import random_generator

# For `web_graph`: pages per site, fraction of links within a site, and exponent of popularity.
_PAGES_PER_SITE = 64
_LINKS_WITHIN_SITE = 0.8
_EXPONENT = 0.6


def power_law(
    n_users: int,
    n_items: int,
    n_entries: int,
    *,
    exponent: float = 0.6,
    random_state: object = 0,
) -> sparse.csr_matrix:
    """Generate a binary matrix with heavy tails on both sides, as ratings have.

    Users' activity is log-normal (deviation 1.1, as in MovieLens); an item of popularity rank r is
    drawn with probability proportional to r ** -exponent. Entries are distinct.

    Parameters
    ----------
    n_users, n_items, n_entries : int
        Shape and number of stored entries: each at least one, and entries in at most a third of the
        cells.
    exponent : float, default=0.6
        Exponent of the items' popularity, from 0 to below 1. Close to 1, nearly all draws are the
        first item, so drawing distinct entries takes long.
    random_state : int, RandomState, Generator or None, default=0
        Seed; the same integer gives the same matrix.

    Returns
    -------
    csr_matrix of shape (n_users, n_items)
        float32 ones.

    Raises
    ------
    ValueError
        For numbers that are not integers, no entries, more than a third of the cells, an exponent
        out of range, or a seed of a wrong type.
    MemoryError
        If the sides or the entries do not fit in memory.
    """
    if not isinstance(exponent, Real) or not 0 <= exponent < 1:
        raise ValueError(f"exponent must be at least 0 and below 1, got {exponent!r}")
    n_users, n_items = integer("n_users", n_users), integer("n_items", n_items)
    most, n_entries = n_users * n_items // 3, integer("n_entries", n_entries, least=None)
    if not 1 <= n_entries <= most:
        raise ValueError(
            f"n_entries must be from 1 to a third of the {n_users} x {n_items} cells, {most}, "
            f"got {n_entries}"
        )
    _require_size((n_users, n_items), n_entries)
    rng = random_generator(random_state)
    activity = rng.lognormal(0, 1.1, n_users)
    item_of_rank = rng.permutation(n_items)

    def draw(users: np.ndarray) -> np.ndarray:
        return users * n_items + item_of_rank[_ranks(n_items, exponent, users, rng)]

    return _distinct((n_users, n_items), n_entries, activity, draw, rng)


def web_graph(
    n_nodes: int,
    n_links: int,
    *,
    n_sites: int | None = None,
    random_state: object = 0,
) -> sparse.csr_matrix:
    """Generate a directed graph of pages that link within their site, and to popular pages.

    Node i is a page of site ``i * n_sites // n_nodes``. Four of five links are drawn within the
    site; the others go to a site of popularity rank r with probability proportional to
    r ** -0.6. Pages within a site are drawn in the same way; the first page is the most popular.
    The number of links of a page is log-normal. No page links to itself, or twice to another.

    Parameters
    ----------
    n_nodes : int
        Pages, at least 3.
    n_links : int
        At least one, at most a third of the pairs of nodes. If most pages of a site already link
        to each other, further links of these pages leave the site.
    n_sites : int, optional
        From 1 to `n_nodes`; by default one for every 64 nodes.
    random_state : int, RandomState, Generator or None, default=0
        Seed; the same integer gives the same graph.

    Returns
    -------
    csr_matrix of shape (n_nodes, n_nodes)
        float32 ones; rows link to columns.

    Raises
    ------
    ValueError
        For numbers that are not integers, no links, more than a third of the pairs, a number of
        sites out of range, or a seed of a wrong type.
    MemoryError
        If the nodes or the links do not fit in memory.
    """
    n_nodes, n_links = integer("n_nodes", n_nodes), integer("n_links", n_links, least=None)
    most = n_nodes * (n_nodes - 1) // 3
    if not 1 <= n_links <= most:
        raise ValueError(
            f"n_links must be from 1 to a third of the pairs of {n_nodes} nodes, {most}, "
            f"got {n_links}"
        )
    n_sites = (
        max(n_nodes // _PAGES_PER_SITE, 1) if n_sites is None else integer("n_sites", n_sites, None)
    )
    if not 1 <= n_sites <= n_nodes:
        raise ValueError(f"n_sites must be from 1 to the {n_nodes} nodes, got {n_sites}")
    _require_size((n_nodes, n_nodes), n_links)
    rng = random_generator(random_state)
    site_of_rank = rng.permutation(n_sites)
    site_of = np.arange(n_nodes) * n_sites // n_nodes
    first = np.searchsorted(site_of, np.arange(n_sites + 1))

    def draw(pages: np.ndarray) -> np.ndarray:
        other_sites = site_of_rank[_ranks(n_sites, _EXPONENT, pages, rng)]
        sites = np.where(rng.random(len(pages)) < _LINKS_WITHIN_SITE, site_of[pages], other_sites)
        sizes = first[sites + 1] - first[sites]
        links = first[sites] + _ranks(sizes, _EXPONENT, pages, rng)
        return (pages * n_nodes + links)[links != pages]

    return _distinct((n_nodes, n_nodes), n_links, rng.lognormal(0, 1, n_nodes), draw, rng)


def integer(name: str, value: Any, least: int | None = 1) -> int:
    """Return a number as an int; it must be at least `least`, if that is given."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be an integer{bound}, got {value!r}")
    return int(value)


def _require_size(shape: tuple[int, int], n_entries: int) -> None:
    """Refuse a matrix with too many cells for int64 numbers, or too large for the memory."""
    if shape[0] * shape[1] >= 1 << 63:
        raise ValueError(f"a matrix must have less than 2**63 cells, got {shape[0]} x {shape[1]}")
    # Per row: activity, start and draws. Per column: popularity. Per entry: keys and draws.
    parts = {"rows": 32 * shape[0], "columns": 8 * shape[1], "entries": 64 * n_entries}
    require_memory(parts, "ask for a smaller matrix")


def _ranks(
    n: int | np.ndarray, exponent: float, like: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw a rank r below n for each of `like`, with probability ~ (r + 1) ** -exponent."""
    return (n * rng.random(len(like)) ** (1 / (1 - exponent))).astype(np.int64)


def _distinct(
    shape: tuple[int, int],
    n_entries: int,
    activity: np.ndarray,
    draw: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    """Draw `n_entries` distinct cells, and return a matrix of ones in them.

    `draw` takes an array of rows and draws a cell, row * n_columns + column, in each.
    """
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
