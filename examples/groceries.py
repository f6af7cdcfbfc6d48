"""Recommend groceries to households: a year of real purchases, with the names of the products.

The first 80% of the year's purchases train the model. The model should recommend what each
household bought for the first time in the last 20%. Products that it had bought before are excluded
from the recommendations and from the metrics: 44% of the later purchases are such repeats, and a
list of the household's most frequent purchases predicts them without a model.

Lines that are not products, such as fuel and coupons, are left out. The parameters were chosen with
another split by time, within the first 80%.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import psutil

from tpu_als import Recommender, TPUAlternatingLeastSquares
from tpu_als.baselines import PopularityRecommender
from tpu_als.datasets import interactions_from_frame, load_groceries, split_by_time
from tpu_als.evaluation import compare
from tpu_als.weighting import LogWeighting

seconds: dict[str, float] = {}


@contextmanager
def step(name: str) -> Iterator[None]:
    """Measure how long a step takes."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def purchases() -> pd.DataFrame:
    """Household, product and time of each purchase of a product; the product by its name."""
    transactions, products = load_groceries()
    kind = transactions["product_id"].map(products["kind"])
    others = kind[kind != "product"].value_counts()
    print(f"left out {others.sum()} of {len(kind)} lines: {others.to_dict()}")
    kept = transactions[kind == "product"]
    return pd.DataFrame({
        "household": kept["household_id"],
        "product": kept["product_id"].map(products["label"]),
        "time": kept["transaction_timestamp"],
    })  # fmt: skip


def compare_with_popularity(rec: Recommender, early: pd.DataFrame, late: pd.DataFrame) -> None:
    """Print NDCG@10 and recall@10 of both for new purchases, with intervals over households."""
    is_known = late["household"].isin(rec.users_) & late["product"].isin(rec.items_)
    maps = {"users": rec.users_, "items": rec.items_}
    train = interactions_from_frame(early, "household", "product", **maps).matrix
    later = interactions_from_frame(late[is_known], "household", "product", **maps).matrix
    new = later - later.multiply(train > 0)  # bought for the first time
    new.eliminate_zeros()
    print(f"to find: {new.nnz} first purchases of a known product by a known household;", end=" ")
    print(f"{(~is_known).sum()} of {len(late)} later lines are of others")
    models = {"tpu_als": rec.model_, "popularity": PopularityRecommender().fit(train)}
    table = compare(models, train, new, K=10, metrics=["ndcg", "recall"], n_resamples=200)
    for name, row in table.iterrows():
        found = (f"{m} {row[m]:.4f} ({row[f'{m} low']:.4f} to {row[f'{m} high']:.4f})"
                 for m in ("ndcg@10", "recall@10"))  # fmt: skip
        print(f"{name:>12}: {', '.join(found)}")


def main() -> None:
    """Load, split, fit, measure and show."""
    seconds["import"] = time.time() - psutil.Process().create_time()
    with step("load and name the purchases"):
        events = purchases()
    with step("split by time"):
        early, late = split_by_time(events, "time", 0.2)
    model = TPUAlternatingLeastSquares(
        factors=64, regularization=1e-3, iterations=10, random_state=0,
        objective="ials", unobserved_weight=2.0,
    )  # fmt: skip
    # Ten purchases are stronger evidence than one, but not ten times as strong.
    rec = Recommender(user="household", item="product", weighting=LogWeighting(), model=model)
    with step("fit"):
        rec.fit(early, show_progress=False)
    print(f"{len(rec.users_)} households, {len(rec.items_)} products, {len(early)} lines")
    with step("recommend 10 products to every household"):
        everybody = rec.recommend(n=10)
    with step("compare with popularity"):
        compare_with_popularity(rec, early, late)

    pd.set_option("display.width", 120, "display.max_colwidth", 80)
    some = [*rec.users_[[0, 100]], -1]
    print(f"\nfor households {some[0]} and {some[1]}, and for one that is not in the data:")
    print(rec.recommend(some, n=5).round({"score": 3}).to_string(index=False))
    best = everybody["item"].iloc[0]
    print(f"\nwhy household {everybody['user'].iloc[0]} should like {best}:")
    print(rec.explain(everybody["user"].iloc[0], best, n=3).round(3).to_string(index=False))
    print(f"\nsimilar to {best}:")
    print(rec.similar_items(best, n=3)[["similar_item", "score"]].round(3).to_string(index=False))

    total = time.time() - psutil.Process().create_time()
    seconds["show"] = total - sum(seconds.values())
    print(f"\n{total:.1f} s since the process started")
    for name, spent in seconds.items():
        print(f"{spent:6.2f} s  {name}")
    print("the first run on a machine also compiles loops, in the steps that need them")


if __name__ == "__main__":
    main()
