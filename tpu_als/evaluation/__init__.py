"""Splits and ranking metrics, for any model that has implicit's `recommend`.

Functions with implicit's names return implicit's values for a test matrix of positive entries. Here
only positive entries are relevant; in implicit all stored entries are. Splits are vectorised and
reproducible for a seed. Ids may have any integer dtype, and id -1 is never a hit. `compare`
measures several models on the same users.
"""

from __future__ import annotations

from tpu_als.evaluation.cold import (
    ColdItemSplit,
    ColdUserSplit,
    cold_item_split,
    cold_user_split,
)
from tpu_als.evaluation.comparison import compare
from tpu_als.evaluation.metrics import (
    METRICS,
    metrics_of_rankings,
)
from tpu_als.evaluation.ranking_metrics import (
    AUC_at_k,
    AUC_unseen_at_k,
    coverage_at_k,
    hit_rate_at_k,
    make_ranking_scorer,
    mean_average_precision_at_k,
    mean_average_precision_full_at_k,
    mrr_at_k,
    ndcg_at_k,
    novelty_at_k,
    precision_at_k,
    precision_full_at_k,
    ranking_metrics_at_k,
    recall_at_k,
    recall_full_at_k,
)
from tpu_als.evaluation.splits import (
    leave_k_out_split,
    strong_generalization_split,
    time_split,
    train_test_split,
)

__all__ = [
    "METRICS",
    "AUC_at_k",
    "AUC_unseen_at_k",
    "ColdItemSplit",
    "ColdUserSplit",
    "cold_item_split",
    "cold_user_split",
    "compare",
    "coverage_at_k",
    "hit_rate_at_k",
    "leave_k_out_split",
    "make_ranking_scorer",
    "mean_average_precision_at_k",
    "mean_average_precision_full_at_k",
    "metrics_of_rankings",
    "mrr_at_k",
    "ndcg_at_k",
    "novelty_at_k",
    "precision_at_k",
    "precision_full_at_k",
    "ranking_metrics_at_k",
    "recall_at_k",
    "recall_full_at_k",
    "strong_generalization_split",
    "time_split",
    "train_test_split",
]


def __dir__() -> list[str]:
    return sorted(__all__)
