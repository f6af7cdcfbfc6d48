"""Tune a recommender on events: train on the past, score on what known users did next.

The samples of the search are events, so `TimeSeriesSplit` cuts them by time: each fold trains on
all events before a cut, and scores NDCG@10 of what the users of these events buy for the first time
after it. Sort the events by time first. The last fifth of the events is not part of the search, and
is used once, for the winner.

A half-life makes old events small, and so all weights: the weight of unobserved pairs is searched
together with it.
"""

from __future__ import annotations

import time

import pandas as pd
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit

from tpu_als import Recommender, TPUAlternatingLeastSquares
from tpu_als.datasets import load_groceries, split_by_time
from tpu_als.weighting import LogWeighting

GRID = [
    {"weighting": [None, LogWeighting()], "half_life": [None]},
    {"weighting": [LogWeighting()], "half_life": ["90D"], "model__unobserved_weight": [0.5, 2.0]},
]


def main() -> None:
    """Run the search and print its table."""
    transactions, products = load_groceries()
    popular = transactions["product_id"].value_counts()
    popular = popular[products["kind"].reindex(popular.index) == "product"].index[:3_000]
    events = transactions[transactions["product_id"].isin(popular)]
    events = events.sort_values("transaction_timestamp", kind="stable")
    past, future = split_by_time(events, "transaction_timestamp", 0.2)
    print(f"{len(past)} events for the search, {len(future)} after it")

    model = TPUAlternatingLeastSquares(
        factors=32, regularization=4e-3, iterations=6, random_state=0,
        objective="ials", unobserved_weight=1.0,
    )  # fmt: skip
    rec = Recommender("household_id", "product_id", timestamp="transaction_timestamp", model=model)
    search = GridSearchCV(rec, GRID, cv=TimeSeriesSplit(3, test_size=len(past) // 10))
    start = time.perf_counter()
    search.fit(past, show_progress=False)
    print(
        f"{len(search.cv_results_['params'])} candidates in {time.perf_counter() - start:.1f} s\n"
    )

    found = pd.DataFrame(search.cv_results_)
    table = pd.DataFrame(found["params"].tolist()).rename(columns=lambda name: name.split("__")[-1])
    for fold in range(3):
        table[f"fold {fold + 1}"] = found[f"split{fold}_test_score"]
    table["mean NDCG@10"] = found["mean_test_score"]
    table = table.sort_values("mean NDCG@10", ascending=False)
    print(table.to_string(index=False, float_format="{:.4f}".format, na_rep="-"))
    print(f"\nafter the search: NDCG@10 {search.score(future):.4f}")
    some = search.best_estimator_.recommend([1], n=3)
    print(some.assign(item=some["item"].map(products["label"])).to_string(index=False))


if __name__ == "__main__":
    main()
