"""Tune regularization and alpha in a scikit-learn Pipeline, on purchase counts.

Each candidate is scored on households that are not in its training data, by the estimator's
`score`: four fifths of their purchases are folded in, and NDCG@10 of the others is measured.
"""

from __future__ import annotations

import time

from sklearn.model_selection import GridSearchCV

from tpu_als import RecommenderPipeline, TPUAlternatingLeastSquares
from tpu_als.datasets import interactions_from_frame, load_groceries
from tpu_als.weighting import LogWeighting


def main() -> None:
    """Run the search and print its table."""
    transactions, products = load_groceries()
    goods = products.loc[products["kind"] == "product", "label"]  # no fuel, no coupons
    kept = transactions.assign(product=transactions["product_id"].map(goods))
    kept = kept[kept["product"].isin(kept["product"].value_counts().index[:5000])]
    purchases = interactions_from_frame(kept, "household_id", "product")
    print(f"{purchases.matrix.shape[0]} households, {purchases.matrix.shape[1]} products")

    model = TPUAlternatingLeastSquares(factors=32, iterations=8, random_state=0)
    pipeline = RecommenderPipeline([("weight", LogWeighting()), ("als", model)])
    grid = {"als__regularization": [1.0, 10.0, 100.0], "als__alpha": [1.0, 5.0, 20.0]}
    search = GridSearchCV(pipeline, grid, cv=3)
    start = time.perf_counter()
    search.fit(purchases.matrix, als__show_progress=False)
    print(f"{len(search.cv_results_['params'])} candidates in {time.perf_counter() - start:.1f} s")
    results = zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True)
    for parameters, score in sorted(results, key=lambda pair: -pair[1]):
        print(f"NDCG@10 {score:.4f}  {parameters}")

    # The best pipeline weights the counts before it recommends.
    ids, scores = search.best_estimator_.recommend([0, 1], purchases.matrix[[0, 1]], N=3)
    print(purchases.decode(ids, scores, [0, 1]).to_string(index=False))


if __name__ == "__main__":
    main()
