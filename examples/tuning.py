"""Tune "implicit" and "ials" in the same way by GridSearchCV, and compare them on held-out data.

If a directory is given, as an argument or in the environment variable TPU_ALS_DATA, the data are
MovieLens-1M from it (``ml1m_rand80_train.npz`` and ``ml1m_rand80_test.npz``, with a fifth of each
user's entries held out). Otherwise they are a year of real grocery purchases, split by time. The
search uses only the train part, and the estimator's `score`: NDCG@10 of a hidden fifth of each row,
for rows that are not in the fit. The test part is used once, for the two winners: NDCG@10 of its
entries among all items that the user does not have in the train part.

    python examples/tuning.py [DIRECTORY] [--full]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from scipy import sparse
from sklearn.model_selection import GridSearchCV, KFold

from tpu_als import RecommenderPipeline, TPUAlternatingLeastSquares
from tpu_als.datasets import interactions_from_frame, load_groceries, split_by_time
from tpu_als.evaluation import ranking_metrics_at_k
from tpu_als.weighting import LogWeighting

QUICK: dict[str, dict[str, list[float]]] = {
    "implicit": {"als__regularization": [3.0, 30.0], "als__alpha": [1.0, 4.0]},
    "ials": {"als__regularization": [1e-3, 4e-3], "als__unobserved_weight": [0.2, 1.0]},
}
FULL: dict[str, dict[str, list[float]]] = {
    "implicit": {
        "als__regularization": [1.0, 3.0, 10.0, 30.0, 100.0, 300.0],
        "als__alpha": [1.5, 3.0, 6.0, 12.0, 24.0],
    },
    "ials": {
        "als__regularization": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2],
        "als__unobserved_weight": [0.05, 0.1, 0.2, 0.4, 1.0],
    },
}


def movies(directory: Path) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Train and test part of MovieLens-1M."""
    train, test = (
        sparse.load_npz(directory / f"ml1m_rand80_{part}.npz").tocsr() for part in ("train", "test")
    )
    return train, test


def groceries() -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Counts of the 3,000 most popular products, and pairs that first occur in the last fifth."""
    transactions, _ = load_groceries()
    popular = transactions["product_id"].value_counts().index[:3000]
    kept = transactions[transactions["product_id"].isin(popular)]
    early, late = split_by_time(kept, "transaction_timestamp", 0.2)
    train = interactions_from_frame(early, "household_id", "product_id")
    maps = {"users": train.users, "items": train.items}
    late = late[late["household_id"].isin(train.users) & late["product_id"].isin(train.items)]
    later = interactions_from_frame(late, "household_id", "product_id", **maps).matrix
    new = later - later.multiply(train.matrix > 0)
    new.eliminate_zeros()
    return train.matrix, new


def search(
    objective: str, grid: dict[str, Any], train: sparse.csr_matrix, settings: dict[str, Any]
) -> GridSearchCV:
    """Search the grid on folds of the users in the train part; refit the winner on all of them."""
    model = TPUAlternatingLeastSquares(objective=objective, random_state=0, **settings)
    pipeline = RecommenderPipeline([("weight", LogWeighting()), ("als", model)])
    folds = KFold(3, shuffle=True, random_state=0)
    return GridSearchCV(pipeline, grid, cv=folds).fit(train, als__show_progress=False)


def main() -> None:
    """Search both grids and compare the winners."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", default=os.environ.get("TPU_ALS_DATA"))
    parser.add_argument("--full", action="store_true", help="the wide grids, which take minutes")
    args = parser.parse_args()
    found = args.directory and Path(args.directory, "ml1m_rand80_train.npz").exists()
    train, test = movies(Path(args.directory)) if found else groceries()
    name = "MovieLens-1M" if found else "groceries"
    print(f"{name}: {train.shape[0]} x {train.shape[1]}, {train.nnz} entries, {test.nnz} to find")

    settings = {"factors": 64, "iterations": 15} if args.full else {"factors": 32, "iterations": 6}
    results = {}
    for objective, grid in (FULL if args.full else QUICK).items():
        begin = time.perf_counter()
        found_best = search(objective, grid, train, settings)
        n_candidates = len(found_best.cv_results_["params"])
        best = found_best.best_estimator_  # weights the counts before it ranks
        results[objective] = ranking_metrics_at_k(best, train, test, K=10)["ndcg"]
        print(
            f"{objective:>8}: NDCG@10 {results[objective]:.4f} on the test part, "
            f"{found_best.best_score_:.4f} in the search; {found_best.best_params_}; "
            f"{n_candidates} candidates in {time.perf_counter() - begin:.0f} s"
        )
    print(f"better here: {max(results, key=lambda objective: results[objective])}")


if __name__ == "__main__":
    main()
