"""Rank the rows of a fitted table: on the host for a few queries, else by the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import numpy as np
from scipy import sparse

from tpu_als.engine.backends import Backend
from tpu_als.engine.cpu import ranking
from tpu_als.serving.factor_table import ONE_THREAD, FactorTable
from tpu_als.validation import arguments, tables
from tpu_als.validation.refusals import all_finite

NO_ID = -1  # id that pads short results, as in implicit's batches
_FEW = 4  # whitelists of at most 1 / _FEW of the table are ranked by themselves, on the host


class Limits(NamedTuple):
    """Which rows of a table may be in a result.

    Attributes
    ----------
    seen : CSR matrix (B, N) or None
        Rows to leave out of each query's result.
    chosen : int array or None
        The only rows to rank, ascending.
    excluded : int array or None
        Rows to leave out of every result.
    """

    seen: sparse.csr_matrix | None = None
    chosen: np.ndarray | None = None
    excluded: np.ndarray | None = None


class How(NamedTuple):
    """How to rank.

    Attributes
    ----------
    backend : callable
        Returns the backend for many queries.
    approximate_recall : float or None
        As the estimator's parameter.
    cosine : bool
        Rank by cosine, with queries of length 1, instead of by product.
    """

    backend: Callable[[], Backend]
    approximate_recall: float | None = None
    cosine: bool = False


def rank_one(
    table: FactorTable, query: np.ndarray, n: int, limits: Limits, how: How
) -> tuple[np.ndarray, np.ndarray]:
    """`rank` for one query (K,): ids and scores (n,). It is the usual call of a service."""
    if limits.chosen is None and limits.excluded is None and table.resident is None:
        catalog = cast(ranking.Catalog, table.catalog(ONE_THREAD, cosine=how.cosine))
        best = catalog.best_of_one(query, n, limits.seen)
        if best is not None:
            return best
    ids, scores = rank(table, query[None], n, limits, how)
    return ids[0], scores[0]


def rank(
    table: FactorTable, queries: np.ndarray, n: int, limits: Limits, how: How
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores (B, n) of the best rows of a table for each query (B, K).

    If fewer rows may be in a result, excluded ones follow, as in implicit, and then `NO_ID`.

    Raises
    ------
    ValueError
        If queries and table differ in width, or NaN was written into the table.
    MemoryError
        If the result would not fit into the free memory; raised before any work.
    """
    seen, chosen, excluded = limits
    n_rows, width = table.shape
    tables.same_width(queries.shape[-1], width)
    if chosen is not None:
        n = min(n, len(chosen))
    arguments.require_results(len(queries), n, n_rows, queries.dtype)
    if chosen is not None and len(chosen) <= n_rows // _FEW:
        rows = table.rows(chosen)
        own = table.norms()[chosen] if how.cosine else None
        queries = queries.astype(rows.dtype, copy=False)
        found = ranking.top_k_of_chosen(queries, rows, chosen, n, lengths=own, seen=seen)
    else:
        hidden = excluded
        if chosen is not None:
            hidden = np.setdiff1d(np.arange(n_rows), chosen, assume_unique=True)
        # For a few queries a dispatch to a device takes longer than the product.
        is_few = len(queries) <= ranking.FEW
        catalog = table.catalog(ONE_THREAD if is_few else how.backend(), cosine=how.cosine)
        found = catalog.top_k(
            queries.astype(catalog.dtype, copy=False), n,
            seen=seen, excluded=hidden, approximate_recall=how.approximate_recall,
        )  # fmt: skip
        if not all_finite(found[1]):
            table.require_finite()
    if n and n_rows:
        _fill(found[0][:, :n_rows], limits)
    return found


def _fill(ids: np.ndarray, limits: Limits) -> None:
    """Pad short results with the excluded ids, larger ids first as in implicit.

    Callers of implicit expect that all ids of a whitelist are returned, filtered items last.
    """
    seen, chosen, excluded = limits
    if len(ids) == 1 and ids.item(-1) != NO_ID:  # the usual call of a service
        return
    for row in (ids[:, -1] == NO_ID).nonzero()[0]:
        out = np.empty(0, np.int64) if excluded is None else excluded
        if seen is not None:
            liked = seen.indices[seen.indptr[row] : seen.indptr[row + 1]]
            out = np.union1d(out, liked)
        if chosen is not None:
            out = np.intersect1d(out, chosen)
        places = np.flatnonzero(ids[row] == NO_ID)
        tail = out[::-1][: len(places)]
        ids[row, places[: len(tail)]] = tail
