"""Approximate search: the item factors in usearch and faiss, with the inner product handled right.

A score is the inner product of a user's and an item's factors. Both libraries have this metric, and
the factors go in as they are. An index for cosine similarity finds other items, because it ignores
the norms of the items, and norms express popularity. Where an index has only Euclidean distance,
one more dimension makes it right: items become (y, sqrt(m^2 - |y|^2)), with the largest norm m, and
users (x, 0). All items then have the norm m, so that the nearest ones are those with the largest
inner product (Bachrach et al. 2014, Speeding up the Xbox recommender system).

The items that a user has had cannot be excluded inside the index: ask for more, and drop them.

Needs packages of the extra `examples`: pip install "tpu-als[examples]", or usearch and faiss-cpu.
Below some 100,000 items `Recommender.recommend` is fast enough, and exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pandas as pd

from tpu_als import Recommender, TPUAlternatingLeastSquares

K = 10


def events(n: int = 300_000, n_users: int = 10_000, n_items: int = 10_000) -> pd.DataFrame:
    """Made-up events: each user likes 2 of 50 groups of items, and each group has popular items."""
    rng = np.random.default_rng(0)
    users, size = rng.integers(n_users, size=n), n_items // 50
    groups = (users + 7 * rng.integers(2, size=n)) % 50
    groups = np.where(rng.random(n) < 0.8, groups, rng.integers(50, size=n))
    ranks = (size * rng.random(n) ** 2.5).astype(int)
    return pd.DataFrame({"user": users, "item": groups * size + ranks})


def with_norm(items: np.ndarray) -> np.ndarray:
    """Items (N, K) with the dimension that gives all of them the same norm (N, K + 1)."""
    squares = np.einsum("nk,nk->n", items, items)
    return np.column_stack([items, np.sqrt(squares.max() - squares)]).astype(np.float32)


def with_zero(users: np.ndarray) -> np.ndarray:
    """Users (m, K) in the space of `with_norm`."""
    return np.column_stack([users, np.zeros(len(users), np.float32)])


def usearch_index(items: np.ndarray, metric: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from users (m, K) to the ids (m, 10) that a graph of usearch finds."""
    from usearch.index import Index

    index = Index(
        ndim=items.shape[1], metric=metric, dtype="f32",
        connectivity=32, expansion_add=128, expansion_search=128,
    )  # fmt: skip
    index.add(np.arange(len(items)), items)
    return lambda users: index.search(users, K).keys


def faiss_index(items: np.ndarray, metric: int) -> Callable[[np.ndarray], np.ndarray]:
    """As `usearch_index`, by faiss."""
    import faiss

    index = faiss.IndexHNSWFlat(items.shape[1], 32, metric)
    index.hnsw.efSearch = 128
    index.add(items)
    return lambda users: index.search(users, K)[1]


def measure(
    name: str, build: Callable[[], Callable[[np.ndarray], np.ndarray]], users: np.ndarray,
    exact: np.ndarray,
) -> None:  # fmt: skip
    """Print recall and times of an index."""
    begin = time.perf_counter()
    search = build()
    built = time.perf_counter()
    found = search(users)
    searched = time.perf_counter() - built
    recall = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, exact, strict=True)])
    print(
        f"{name:<40} recall@{K} {recall:.3f}, built in {built - begin:4.1f} s, "
        f"{1e6 * searched / len(users):4.0f} us for a user"
    )


def main() -> None:
    """Fit, build each index, and compare with the exact answer."""
    model = TPUAlternatingLeastSquares(factors=32, alpha=5, iterations=5, random_state=0)
    rec = Recommender(model=model).fit(events(), show_progress=False)
    # Row i of the table belongs to rec.items_[i]; these positions are the ids of the index.
    items, users = rec.model_.item_factors, rec.model_.user_factors[:1_000]
    exact = np.argsort(-(users @ items.T), axis=1, kind="stable")[:, :K]
    print(f"{len(items)} items with {items.shape[1]} factors; the best {K} of {len(users)} users")

    try:
        import usearch  # noqa: F401
    except ImportError:
        print("skipped usearch, which is not installed: pip install usearch")
    else:
        measure("usearch, inner product", lambda: usearch_index(items, "ip"), users, exact)
        measure("usearch, cosine: wrong", lambda: usearch_index(items, "cos"), users, exact)
    try:
        import faiss
    except ImportError:
        print("skipped faiss, which is not installed: pip install faiss-cpu")
    else:
        product, distance = faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2
        measure("faiss, inner product", lambda: faiss_index(items, product), users, exact)
        measure("faiss, Euclidean: wrong", lambda: faiss_index(items, distance), users, exact)
        measure(
            "faiss, Euclidean with one more dimension",
            lambda: faiss_index(with_norm(items), distance), with_zero(users), exact,
        )  # fmt: skip

    first = rec.items_[exact[0]].tolist()
    print(f"the first user's items by id: {first}")
    assert first == rec.recommend(rec.users_[0], n=K, exclude_seen=False)["item"].tolist()


if __name__ == "__main__":
    main()
