"""How fast are recommendations and neighbours, in batches and one at a time, beside implicit's?

Both models get the same tables of normal numbers and the same users' items; the scores that they
return are compared before the clock starts. Calls of both take turns; a ratio is the median of the
turns' ratios.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares

BATCH = 1000


def models(n_users: int, n_items: int, factors: int) -> dict[str, Any]:
    """Models of both libraries with the same tables."""
    rng = np.random.default_rng(0)
    users, items = (rng.standard_normal((n, factors), dtype=np.float32) for n in (n_users, n_items))
    made: dict[str, Any] = {"tpu_als": TPUAlternatingLeastSquares(factors)}
    if common.installed("implicit"):
        from implicit.cpu.als import AlternatingLeastSquares

        made["implicit"] = AlternatingLeastSquares(factors)
    for model in made.values():
        model.user_factors, model.item_factors = users.copy(), items.copy()
    return made


def calls(
    model: Any, user_items: sparse.csr_matrix, n: int, singles: int
) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, with the number of queries in it."""
    everyone = np.arange(user_items.shape[0])
    batches = [everyone[low : low + BATCH] for low in range(0, len(everyone), BATCH)]
    rows = [user_items[batch] for batch in batches]
    alone = [user_items[user] for user in range(singles)]
    items = np.arange(min(BATCH, user_items.shape[1]))
    some = np.linspace(0, user_items.shape[1] - 1, 100).astype(int)
    few = min(n, len(some))
    return {
        "recommend, batches": (
            lambda: [model.recommend(b, r, N=n) for b, r in zip(batches, rows, strict=True)],
            len(everyone),
        ),
        "recommend, single": (
            lambda: [model.recommend(user, row, N=n) for user, row in enumerate(alone)],
            singles,
        ),
        "similar_items, batch": (lambda: model.similar_items(items, N=n), len(items)),
        "similar_items, single": (
            lambda: [model.similar_items(item, N=n) for item in range(singles)],
            singles,
        ),
        "recommend of 100 items, batches": (
            lambda: [
                model.recommend(b, r, N=few, items=some) for b, r in zip(batches, rows, strict=True)
            ],
            len(everyone),
        ),
        "recommend of 100 items, single": (
            lambda: [
                model.recommend(user, row, N=few, items=some) for user, row in enumerate(alone)
            ],
            singles,
        ),
        "recalculate_user, single": (
            lambda: [model.recalculate_user(user, row) for user, row in enumerate(alone)],
            singles,
        ),
    }


def agreement(made: dict[str, Any], user_items: sparse.csr_matrix, n: int) -> float:
    """Largest difference between the scores of the two libraries."""
    users = np.arange(min(BATCH, user_items.shape[0]))
    scores = [model.recommend(users, user_items[users], N=n)[1] for model in made.values()]
    return float(max(np.abs(other - scores[0]).max() for other in scores))


def in_turns(made: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
    """Wall-clock and core seconds (repeats, 2) of each call, in turns after an untimed round.

    Core seconds, of all threads, hardly change when others use the machine.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for turn in range(-1, repeats):
        for name in list(made)[:: 1 if turn % 2 == 0 else -1]:
            core = time.process_time()
            wall = common.seconds(made[name])
            if turn >= 0:
                taken[name].append((wall, time.process_time() - core))
    return {name: np.array(values) for name, values in taken.items()}


def main() -> None:
    """Time all calls for each N."""
    parser = common.parser(__doc__)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=27_000)
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--results", type=int, nargs="+", default=[10, 100])
    args = parser.parse_args()
    singles = 300
    if args.quick:
        args.users, args.items, args.factors, args.repeats, singles = 300, 500, 16, 2, 20
    user_items = common.power_law(args.users, args.items, 100 * args.users)
    made = models(args.users, args.items, args.factors)
    common.emit(benchmark="recommend", what="machine", **common.machine())
    for n in args.results:
        about = {
            "benchmark": "recommend", "users": args.users, "items": args.items,
            "factors": args.factors, "N": n, "dtype": "float32",
        }  # fmt: skip
        common.emit(
            **about, what="largest difference of scores", value=agreement(made, user_items, n)
        )
        by_model = {name: calls(model, user_items, n, singles) for name, model in made.items()}
        for what in by_model["tpu_als"]:
            count = by_model["tpu_als"][what][1]
            taken = in_turns({name: c[what][0] for name, c in by_model.items()}, args.repeats)
            middle = {name: np.median(times, axis=0) for name, times in taken.items()}
            ours, theirs = taken["tpu_als"], taken.get("implicit")
            ratios = None if theirs is None else np.median(theirs / ours, axis=0)
            common.emit(
                **about, what=what,
                per_second={name: count / wall for name, (wall, _) in middle.items()},
                milliseconds_each={name: 1e3 * wall / count for name, (wall, _) in middle.items()},
                core_milliseconds_each={n: 1e3 * core / count for n, (_, core) in middle.items()},
                ratio=None if ratios is None else ratios[0],
                ratio_of_core_time=None if ratios is None else ratios[1],
            )  # fmt: skip


if __name__ == "__main__":
    main()
