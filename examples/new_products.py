"""Recommend yesterday's new products to households, by what kind of products they are.

The purchases are those of `groceries.py`. Products that nobody bought before the last days of the
data are new: the model is fitted to the time before, so that they have no purchases in it. It knows
their department, category, type, brand and size, which a shop knows before the first sale. Their
factors follow from these features.

The later purchases show how good the ranking is. The task is hard: most of these new products are
rare, and are bought once in the following days.
"""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.compose import make_column_transformer
from sklearn.preprocessing import OneHotEncoder

from tpu_als import FeatureTable, TPUAlternatingLeastSquares
from tpu_als.datasets import groceries_item_features, interactions_from_frame, load_groceries
from tpu_als.evaluation import compare
from tpu_als.weighting import LogWeighting

DAYS = 7
LEAST = 5  # purchases of a known product; rarer ones are left out


def purchases() -> tuple[pd.DataFrame, pd.Series, pd.Timestamp]:
    """Purchases of products, the products' names, and the moment at which the new ones begin."""
    frame, products = load_groceries()
    frame = frame[frame["product_id"].map(products["kind"]) == "product"]
    start = frame["transaction_timestamp"].max().normalize() - pd.Timedelta(days=DAYS)
    is_before = frame["transaction_timestamp"] < start
    n_before = is_before.groupby(frame["product_id"]).sum()
    kept = n_before.index[(n_before == 0) | (n_before >= LEAST)]
    return frame[frame["product_id"].isin(kept)], products["label"], start


def features_of(product_ids: pd.Index, is_known: np.ndarray) -> FeatureTable:
    """One-hot features of products, learnt from those that are known at the time of the fit."""
    frame = groceries_item_features(product_ids).fillna("unknown")
    columns = ["department", "product_category", "product_type", "brand", "size"]
    # Values of fewer than five products, and values that only new products have, are one feature.
    encoder = OneHotEncoder(min_frequency=5, handle_unknown="infrequent_if_exist")
    transformer = make_column_transformer((encoder, columns), verbose_feature_names_out=False)
    transformer.fit(frame[is_known])
    return FeatureTable(transformer.transform(frame), transformer.get_feature_names_out())


class PopularInCategory:
    """Ranks products by how often a household bought products of the same category."""

    def __init__(self, train: sparse.csr_matrix, categories: pd.Series) -> None:
        codes = pd.factorize(categories)[0]
        at = np.arange(len(codes)), codes
        self.of_products = sparse.csr_matrix((np.ones(len(codes)), at))
        self.of_households = (train > 0).astype(float) @ self.of_products
        self.sizes = np.asarray(self.of_households.sum(axis=0)).ravel() / len(codes)

    def recommend(
        self, userid: np.ndarray, user_items: sparse.csr_matrix, N: int, items: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rank some products for some households."""
        wanted = self.of_households[userid].toarray() + 1e-3 * self.sizes
        scores = wanted @ self.of_products[items].T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :N]
        return items[best], np.take_along_axis(scores, best, axis=1)


def show(table: pd.DataFrame, n_new: int) -> None:
    """Print recall and NDCG with their intervals."""
    for name, row in table.iterrows():
        found = (f"{m} {row[m]:.4f} ({row[f'{m} low']:.4f} to {row[f'{m} high']:.4f})"
                 for m in ("recall@20", "ndcg@20"))  # fmt: skip
        print(f"{name:>24}: {', '.join(found)}")
    print(f"{'random order':>24}: recall@20 {20 / n_new:.4f}")


def main() -> None:
    """Fit, recommend new products, explain, and compare."""
    begin = time.perf_counter()
    frame, labels, start = purchases()
    counts, households, product_ids = interactions_from_frame(frame, "household_id", "product_id")
    is_before = (frame["transaction_timestamp"] < start).to_numpy()
    before = frame[is_before]
    train = interactions_from_frame(
        before, "household_id", "product_id", users=households, items=product_ids
    ).matrix
    is_known = np.bincount(train.indices, minlength=train.shape[1]) > 0
    new = np.flatnonzero(~is_known)
    features = features_of(product_ids, is_known)
    print(f"{is_known.sum()} known products, {len(new)} new since {start:%d %B}; {features}")

    model = TPUAlternatingLeastSquares(
        factors=64, regularization=1e-3, iterations=10, random_state=0,
        objective="ials", unobserved_weight=2.0,
    )  # fmt: skip
    weighted = LogWeighting().fit_transform(train)
    model.fit(weighted, show_progress=False, item_features=features)
    print(f"read, encoded and fitted in {time.perf_counter() - begin:.1f} s")

    names = labels.reindex(product_ids).to_numpy()
    for household in (0, 100, 2000):
        ids, scores = model.recommend(
            household, weighted[household], N=3, items=new, recalculate_user=True
        )
        print(f"\nnew for household {households[household]}:")
        for item, score in zip(ids, scores, strict=True):
            print(f"  {score:.3f}  {names[item]}")
        reason = model.explain_features(household, weighted, int(ids[0]), N=3)
        print(f"  score {reason.score:.3f} of the first product, by its features:")
        for feature, part in reason.item_features:
            print(f"  {part:8.3f}  {feature}")
        print("  the same score, by what the household bought:")
        for item, part in reason.items[:2]:
            print(f"  {part:8.3f}  {names[item]}")

    later = counts - train
    later.eliminate_zeros()
    print(f"\n{later[:, new].nnz} purchases of new products in the following days, by ranking:")
    categories = groceries_item_features(product_ids)["product_category"].fillna("unknown")
    models = {"features": model, "popular in the category": PopularInCategory(train, categories)}
    metrics = ["recall", "ndcg"]
    table = compare(models, weighted, later, K=20, metrics=metrics, items=new, n_resamples=200)
    show(table, len(new))


if __name__ == "__main__":
    main()
