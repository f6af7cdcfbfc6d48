"""Which metric of which library agrees with ours: the table of docs/metrics.md, on one ranking.

Every user has relevant items and a full ranking, some have more relevant items than the ranking has
places, so that the definitions differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tpu_als import evaluation

N_USERS, N_ITEMS, K = 25, 60, 10
DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def rankings() -> tuple[np.ndarray, sparse.csr_matrix]:
    """Ranked ids (N_USERS, K), and 1 to 24 relevant items for each user."""
    rng = np.random.default_rng(0)
    ids = np.array([rng.permutation(N_ITEMS)[:K] for _ in range(N_USERS)], np.int32)
    test = np.zeros((N_USERS, N_ITEMS), np.float32)
    for row in test:
        row[rng.permutation(N_ITEMS)[: rng.integers(1, 25)]] = 1
    return ids, sparse.csr_matrix(test)


def in_float64(ids: np.ndarray, test: sparse.csr_matrix) -> dict[str, float]:
    """Each definition of docs/metrics.md in dense float64."""
    likes, ranks = test.toarray() > 0, np.arange(1, ids.shape[1] + 1, dtype=np.float64)
    hits = np.take_along_axis(likes, ids, axis=1).astype(np.float64)
    h, m, k = hits.sum(axis=1), likes.sum(axis=1).astype(np.float64), float(ids.shape[1])
    precisions = (hits * np.cumsum(hits, axis=1) / ranks).sum(axis=1)
    best = np.minimum(k, m)
    ideal = np.array([sum(1 / np.log2(1 + rank) for rank in ranks[: int(n)]) for n in best])
    return {
        "precision": h.sum() / best.sum(),
        "precision_full": np.mean(h / k),
        "precision_at_k": np.mean(h / k),
        "recall": np.mean(h / best),
        "recall_full": np.mean(h / m),
        "map": np.mean(precisions / best),
        "map_full": np.mean(precisions / m),
        "ndcg": np.mean((hits / np.log2(1 + ranks)).sum(axis=1) / ideal),
        "hit_rate": np.mean(h > 0),
        "mrr": np.mean((hits / ranks).max(axis=1)),
        "coverage": len(np.unique(ids)) / test.shape[1],
    }


def implicit(ids: np.ndarray, test: sparse.csr_matrix) -> dict[str, float]:
    """Of a model that recommends the given ids."""
    theirs = pytest.importorskip("implicit.evaluation")

    class Model:
        def recommend(self, userid: Any, user_items: Any, N: int) -> tuple[np.ndarray, None]:
            return ids[np.asarray(userid), :N], None

    train = sparse.csr_matrix(test.shape, dtype=np.float32)
    return theirs.ranking_metrics_at_k(
        Model(), train, test, K=K, show_progress=False, num_threads=1
    )


def of_trec(ids: np.ndarray, test: sparse.csr_matrix) -> tuple[dict, dict]:
    """Relevant and ranked items by user, with texts as ids and descending scores."""
    qrels = {str(u): {str(i): 1 for i in test[u].indices} for u in range(len(ids))}
    run = {str(u): {str(i): float(K - p) for p, i in enumerate(row)} for u, row in enumerate(ids)}
    return qrels, run


def ranx(ids: np.ndarray, test: sparse.csr_matrix) -> dict[str, float]:
    library = pytest.importorskip("ranx")
    qrels, run = of_trec(ids, test)
    names = ["precision", "recall", "map", "ndcg", "hit_rate", "mrr"]
    found = library.evaluate(
        library.Qrels(qrels), library.Run(run), [f"{name}@{K}" for name in names]
    )
    return {name: float(found[f"{name}@{K}"]) for name in names}


def pytrec_eval(ids: np.ndarray, test: sparse.csr_matrix) -> dict[str, float]:
    library = pytest.importorskip("pytrec_eval")
    qrels, run = of_trec(ids, test)
    names = ["P", "recall", "map_cut", "ndcg_cut", "success"]
    asked = {f"{name}.{K}" for name in names} | {"recip_rank"}
    users = library.RelevanceEvaluator(qrels, asked).evaluate(run).values()
    columns = {name: f"{name}_{K}" for name in names} | {"recip_rank": "recip_rank"}
    return {name: float(np.mean([user[of] for user in users])) for name, of in columns.items()}


def rectools(ids: np.ndarray, test: sparse.csr_matrix) -> dict[str, float]:
    metrics = pytest.importorskip("rectools.metrics")
    users, items = np.repeat(np.arange(len(ids)), K), ids.ravel()
    ranks = np.tile(np.arange(1, K + 1), len(ids))
    reco = pd.DataFrame({"user_id": users, "item_id": items, "rank": ranks})
    rows, columns = test.nonzero()
    relevant = pd.DataFrame({"user_id": rows, "item_id": columns})
    asked = {
        "Precision": metrics.Precision(K),
        "Precision(r_precision=True)": metrics.Precision(K, r_precision=True),
        "Recall": metrics.Recall(K),
        "MAP": metrics.MAP(K),
        "NDCG": metrics.NDCG(K),
        "NDCG(divide_by_achievable=True)": metrics.NDCG(K, divide_by_achievable=True),
        "HitRate": metrics.HitRate(K),
        "MRR": metrics.MRR(K),
        "CatalogCoverage(normalize=True)": metrics.CatalogCoverage(K, normalize=True),
    }
    return metrics.calc_metrics(asked, reco=reco, interactions=relevant, catalog=np.arange(N_ITEMS))


def irspack(ids: np.ndarray, test: sparse.csr_matrix) -> dict[str, float]:
    evaluator = pytest.importorskip("irspack.evaluation").Evaluator
    scores = np.zeros(test.shape)
    np.put_along_axis(scores, ids.astype(np.int64), np.arange(K, 0, -1.0), axis=1)

    class Model:
        n_users, n_items = test.shape
        X_train_all = sparse.csr_matrix(test.shape)

        def get_score_block(self, begin: int, end: int) -> np.ndarray:
            return scores[begin:end].copy()

    found = evaluator(test, cutoff=K, n_threads=1).get_score(Model())
    capped = evaluator(test, cutoff=K, n_threads=1, recall_with_cutoff=True).get_score(Model())
    names = ["precision", "recall", "map", "ndcg", "hit", "catalog_coverage"]
    return {name: found[name] for name in names} | {
        "recall(recall_with_cutoff=True)": capped["recall"]
    }


def lenskit(ids: np.ndarray, test: sparse.csr_matrix) -> dict[str, float]:
    metrics = pytest.importorskip("lenskit.metrics")
    ranking = pytest.importorskip("lenskit.metrics.ranking")
    ItemList = pytest.importorskip("lenskit.data").ItemList
    asked = {
        "Precision": metrics.Precision(n=K),
        "Recall": metrics.Recall(n=K),
        "AveragePrecision": ranking.AveragePrecision(n=K),
        "NDCG": metrics.NDCG(n=K),
        "Hit": metrics.Hit(n=K),
        "RecipRank": metrics.RecipRank(n=K),
    }
    lists = [
        (ItemList(item_ids=row, ordered=True), ItemList(item_ids=test[u].indices))
        for u, row in enumerate(ids)
    ]
    return {
        name: float(np.mean([metric.measure_list(*pair) for pair in lists]))
        for name, metric in asked.items()
    }


def recbole(ids: np.ndarray, test: sparse.csr_matrix) -> dict[str, float]:
    metrics = pytest.importorskip("recbole.evaluator.metrics")
    collector = pytest.importorskip("recbole.evaluator.collector")
    torch = pytest.importorskip("torch")
    likes = test.toarray() > 0
    hits = np.take_along_axis(likes, ids, axis=1)
    collected = collector.DataStruct()
    table = np.hstack([hits, likes.sum(axis=1, keepdims=True)]).astype(np.int64)
    collected.set("rec.topk", torch.from_numpy(table))
    collected.set("rec.items", torch.from_numpy(ids.astype(np.int64)))
    collected.set("data.num_items", N_ITEMS)
    config = {"topk": [K], "metric_decimal_place": 12}
    names = ["Precision", "Recall", "MAP", "NDCG", "Hit", "MRR", "ItemCoverage"]
    with pytest.MonkeyPatch.context() as patch:  # RecBole uses a name that NumPy 2 removed
        patch.setattr(np, "float", float, raising=False)
        return {
            name: float(getattr(metrics, name)(config).calculate_metric(collected).popitem()[1])
            for name in names
        }


LIBRARIES = {
    "implicit": implicit,
    "ranx": ranx,
    "pytrec_eval": pytrec_eval,
    "RecTools": rectools,
    "irspack": irspack,
    "LensKit": lenskit,
    "RecBole": recbole,
}


def table() -> pd.DataFrame:
    """Metrics of the libraries (columns) that the document names for each of ours (rows)."""
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if "|" in line]
    begin = next(i for i, line in enumerate(lines) if line.startswith("| metric |"))
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[begin:])
    return pd.DataFrame(rows, columns=header).set_index("metric")


def test_equal_dense_float64() -> None:
    ids, test = rankings()
    got = evaluation.metrics_of_rankings(ids, test)
    expected = in_float64(ids, test)
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    for name in ("precision", "recall", "map"):
        assert got[f"{name}_full"] < 0.95 * got[name], name


def test_the_table_has_all_metrics() -> None:
    of_this_package = {"precision_at_k", "auc_unseen", "novelty"}
    assert [*LIBRARIES] == [*table().columns[1:]]
    assert {name.strip("`") for name in table().index} == {*evaluation.METRICS} - of_this_package


@pytest.mark.parametrize(
    "library",
    # ranx compiles for minutes when it runs for the first time.
    [pytest.param(name, marks=pytest.mark.slow if name == "ranx" else ()) for name in LIBRARIES],
)
def test_each_cell_of_the_table(library: str) -> None:
    ids, test = rankings()
    ours = evaluation.metrics_of_rankings(ids, test)
    theirs = LIBRARIES[library](ids, test)
    equal = {
        f"`{name}`": {
            f"`{of}`" for of in theirs if theirs[of] == pytest.approx(ours[name], abs=1e-6)
        }
        for name in {*evaluation.METRICS} - {"precision_at_k"}
    }
    for name, cell in table()[library].items():
        assert ({cell} - {"-"}) == equal[name], name
