"""Recommend groceries to households: a year of real purchases, from counts to product names.

The first 80% of the year's purchases train the model. The model should recommend what each
household bought for the first time in the last 20%. Products that it had bought before are excluded
from the recommendations and from the metrics: 44% of the later purchases are such repeats, and a
list of the household's most frequent purchases predicts them without a model.

The parameters were chosen with another split by time, within the first 80%.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pandas as pd

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.baselines import PopularityRecommender
from tpu_als.datasets import interactions_from_frame, load_groceries, split_by_time
from tpu_als.evaluation import metrics_of_rankings
from tpu_als.weighting import LogWeighting


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print how long a step took."""
    start = time.perf_counter()
    yield
    print(f"[{time.perf_counter() - start:6.2f} s] {name}")


def main() -> None:
    """Load, split, fit, measure and show."""
    begin = time.perf_counter()
    with step("load the purchases"):
        transactions, products = load_groceries()
    with step("split by time, count"):
        early, late = split_by_time(transactions, "transaction_timestamp", 0.2)
        train = interactions_from_frame(early, "household_id", "product_id")
        later = interactions_from_frame(
            late, "household_id", "product_id", users=train.users, items=train.items
        ).matrix
        new = later - later.multiply(train.matrix > 0)  # bought for the first time
        new.eliminate_zeros()
        # Ten purchases are stronger evidence than one, but not ten times as strong.
        confidence = LogWeighting().fit_transform(train.matrix)
    print(f"{train.matrix.shape[0]} households, {train.matrix.shape[1]} products, ", end="")
    print(f"{train.matrix.nnz} pairs; later {new.nnz} new pairs")

    model = TPUAlternatingLeastSquares(
        factors=64, regularization=1e-3, iterations=10, random_state=0,
        objective="ials", unobserved_weight=2.0,
    )  # fmt: skip
    with step("fit"):
        model.fit(confidence, show_progress=False)

    buyers = np.flatnonzero(np.diff(new.indptr))
    with step("recommend 10 new products to every household"):
        ids, _ = model.recommend(buyers, confidence[buyers], N=10)
    with step("recommend the most popular products"):
        popular, _ = PopularityRecommender().fit(confidence).recommend(buyers, confidence[buyers])
    for name, ranked in (("tpu_als", ids), ("popularity", popular)):
        found = metrics_of_rankings(ranked, new[buyers])
        print(f"{name:>12}: NDCG@10 {found['ndcg']:.4f}, recall@10 {found['recall']:.4f}")

    names = product_names(products, train.items)
    for user in buyers[[0, 100, 200]]:
        bought = np.argsort(-train.matrix[user].toarray().ravel())[:3]
        print(f"\nhousehold {train.users[user]} buys {'; '.join(names[bought])}")
        print(f"  recommended: {'; '.join(names[ids[np.searchsorted(buyers, user)][:5]])}")
    item = int(np.argmax(np.diff(train.matrix.tocsc().indptr)))
    similar, _ = model.similar_items(item, N=6)
    print(f"\nsimilar to {names[item]}: {'; '.join(names[similar[1:]])}")
    print(f"\ntotal: {time.perf_counter() - begin:.1f} s")


def product_names(products: pd.DataFrame, items: pd.Index) -> np.ndarray:
    """Readable names, by column of the matrix."""
    known = products.reindex(items)
    names = known["product_type"].fillna(known["product_category"]).fillna("unnamed product")
    sizes = (" " + known["package_size"].str.lower()).fillna("")
    return (names.str.capitalize() + sizes).to_numpy(dtype=object)


if __name__ == "__main__":
    main()
