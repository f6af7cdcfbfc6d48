"""CSR matrices whose arrays contradict each other, although their flags say that they are valid.

As a program, it passes each of them to a group of entry points and prints the result. If compiled
code reads an invalid array, that process crashes, and not the test runner.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from tpu_als.engine.data import AlsParams
from tpu_als.engine.objective import Objective
from tpu_als.engine.xla import backend

N_USERS, N_ITEMS = 40, 30
GROUPS = ("training", "serving", "items", "engine", "preparing")


def valid() -> sparse.csr_matrix:
    """40 users by 30 items."""
    return sparse.random(N_USERS, N_ITEMS, 0.3, "csr", np.float32, np.random.default_rng(1))


def _set(name: str, at: Any, value: Any) -> Callable[[Any], None]:
    def change(matrix: Any) -> None:
        array = getattr(matrix, name)
        array[at(len(array)) if callable(at) else at] = value

    return change


def _replace(name: str, make: Callable[[np.ndarray], Any]) -> Callable[[Any], None]:
    return lambda matrix: setattr(matrix, name, make(getattr(matrix, name)))


DAMAGES: dict[str, Callable[[Any], None]] = {
    "indptr far beyond": _set("indptr", lambda n: n // 2, 10**7),
    "indptr beyond nnz": _set("indptr", lambda n: n // 2, 400),
    "indptr negative": _set("indptr", lambda n: n // 2, -5),
    "indptr falls": _set("indptr", lambda n: n // 2, 1),
    "indptr starts late": _set("indptr", 0, 2),
    "indptr ends early": _replace("indptr", lambda a: np.minimum(a, a[-1] - 3)),
    "indptr ends late": _set("indptr", -1, 10**6),
    "indptr longer": _replace("indptr", lambda a: np.append(a, a[-1])),
    "indptr shorter": _replace("indptr", lambda a: a[:-1]),
    "indptr of floats": _replace("indptr", lambda a: a.astype(float)),
    "indptr a list": _replace("indptr", lambda a: a.tolist()),
    "indptr 2-D": _replace("indptr", lambda a: a[:, None]),
    "id too large": _set("indices", 3, 10**8),
    "id just too large": _set("indices", 3, N_ITEMS),
    "id negative": _set("indices", 3, -7),
    "indices shorter": _replace("indices", lambda a: a[:-2]),
    "indices of floats": _replace("indices", lambda a: a.astype(float)),
    "data shorter": _replace("data", lambda a: a[:-2]),
    "data longer": _replace("data", lambda a: np.append(a, a)),
    "data 2-D": _replace("data", lambda a: a[None]),
}


def damaged(damage: str) -> sparse.csr_matrix:
    """Make a matrix with this damage, whose flags say that it is canonical."""
    matrix = valid()
    matrix.has_sorted_indices = matrix.has_canonical_format = True
    DAMAGES[damage](matrix)
    return matrix


def _calls(group: str) -> dict[str, Callable[[Any], Any]]:
    """Entry points by name; each takes a matrix of users by items."""
    # Imported late, so that a test can import this module without starting a backend.
    import tpu_als
    from tpu_als import TPUAlternatingLeastSquares, evaluation, weighting
    from tpu_als.engine.xla import fold_in
    from tpu_als.engine.xla.mesh import device_mesh
    from tpu_als.shards import write_shards

    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        tpu_als.enable_compilation_cache(cache)

    def new(**parameters: Any) -> Any:
        return TPUAlternatingLeastSquares(4, iterations=1, random_state=0, **parameters)

    matrix, users = valid(), np.arange(N_USERS)
    model = new().fit(matrix, show_progress=False)
    flipped = new().fit(sparse.csr_matrix(matrix.T), show_progress=False)
    params, mesh = AlsParams(4), device_mesh(1)
    source = fold_in.source(model.item_factors, params, mesh)
    objective = Objective.of("implicit", 0.1, 1.0)

    def write(rows: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(rows, Path(folder) / "shards")

    groups: dict[str, dict[str, Callable[[Any], Any]]] = {
        "training": {
            "fit": lambda m: new().fit(m, show_progress=False),
            "fit without loops": lambda m: new(use_native=False).fit(m, show_progress=False),
            "early stopping": lambda m: new(early_stopping=True).fit(m, show_progress=False),
            "transform": model.transform,
            "score": model.score,
            "solver": lambda m: model.solver(m, np.ones((40, 4)), np.ones((30, 4)), 0.1),
        },
        "serving": {
            "recommend": lambda m: model.recommend(users, m),
            "recommend, solved": lambda m: model.recommend(users, m, recalculate_user=True),
            "recommend_all": model.recommend_all,
            "recalculate_user": lambda m: model.recalculate_user(users, m),
            "partial_fit_users": lambda m: model.partial_fit_users(users, m),
            "explain": lambda m: model.explain(1, m, 2),
        },
        "items": {
            "similar_items": lambda m: flipped.similar_items(
                users, recalculate_item=True, item_users=m
            ),
            "recalculate_item": lambda m: flipped.recalculate_item(users, m),
            "partial_fit_items": lambda m: flipped.partial_fit_items(users, m),
        },
        "engine": {
            "place": lambda m: backend.place(m, params, mesh),
            "solve_rows": lambda m: source.solve(m, objective),
            "write_shards": write,
        },
        "preparing": {
            "LogWeighting": lambda m: weighting.LogWeighting().fit(matrix).transform(m),
            "TfidfWeighting": lambda m: weighting.TfidfWeighting().fit_transform(m),
            "BM25Weighting": lambda m: weighting.BM25Weighting().fit(m),
            "train_test_split": evaluation.train_test_split,
            "leave_k_out_split": evaluation.leave_k_out_split,
            "strong_generalization_split": evaluation.strong_generalization_split,
            "time_split": lambda m: evaluation.time_split(matrix, m),
            "ranking_metrics_at_k, train": lambda m: evaluation.ranking_metrics_at_k(
                model, m, matrix
            ),
            "ranking_metrics_at_k, test": lambda m: evaluation.ranking_metrics_at_k(
                model, matrix, m
            ),
            "make_ranking_scorer": lambda m: evaluation.make_ranking_scorer("ndcg")(model, m),
        },
    }
    return groups[group]


def report(text: str) -> None:
    """Write without a buffer: this process may crash in the next call."""
    sys.stdout.write(text)
    sys.stdout.flush()


def main(group: str) -> None:
    """Print a line for each call that was not refused, and the number of calls."""
    warnings.simplefilter("ignore")
    count = 0
    for name, call in _calls(group).items():
        for damage in DAMAGES:
            count += 1
            report(f"{name}: {damage} ")  # printed before the call, which may crash the process
            try:
                call(damaged(damage))
            except ValueError as error:
                known = "is a damaged csr_matrix" in str(error) or "outside its shape" in str(error)
                report("refused\n" if known else f"OTHER ERROR: {error}\n")
            else:
                report("ACCEPTED\n")
    report(f"done {count}\n")


if __name__ == "__main__":
    main(sys.argv[1])
