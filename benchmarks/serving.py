"""How fast is everything that follows a fit, and an exact fit, beside implicit and irspack?

Both models get the same tables, and calls of both alternate; a ratio is the median of the turns'
ratios, and above 1 if tpu_als is faster. `--latency` instead prints the latencies of single calls
of mixed shapes in a new process.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import common
import libraries
import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_info

from tpu_als import TPUAlternatingLeastSquares

REGULARIZATION, ALPHA = 10.0, 40.0
Call = Callable[[Any], Any]


def models(user_items: sparse.csr_matrix, factors: int) -> dict[str, Any]:
    """Models of both libraries with the tables of the same fit."""
    fitted = TPUAlternatingLeastSquares(
        factors, REGULARIZATION, ALPHA, iterations=5, random_state=0
    ).fit(user_items, show_progress=False)
    made: dict[str, Any] = {"tpu_als": fitted}
    if common.installed("implicit"):
        from implicit.cpu.als import AlternatingLeastSquares

        made["implicit"] = AlternatingLeastSquares(factors, REGULARIZATION, ALPHA)
        for name in ("user_factors", "item_factors"):
            setattr(made["implicit"], name, np.array(getattr(fitted, name)))
    return made


def saved_and_loaded(model: Any) -> Any:
    """A model that was written to memory and read."""
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return type(model).load(file)


def calls(user_items: sparse.csr_matrix, many: int) -> dict[str, tuple[Call, int]]:
    """What is timed, and how many times in a turn."""
    n_users, n_items = user_items.shape
    users, items = np.arange(min(many, n_users)), np.arange(min(many, n_items))
    rows, row, item_users = user_items[users], user_items[0], user_items.T.tocsr()[items]
    some = {n: (users[:n], user_items[users[:n]]) for n in (20, 100, 200)}
    return {
        "recalculate_user, many": (lambda m: m.recalculate_user(users, rows), 1),
        "partial_fit_items, many": (lambda m: m.partial_fit_items(items, item_users), 1),
        "recommend with recalculate_user, many": (
            lambda m: m.recommend(users, rows, recalculate_user=True),
            1,
        ),
        "partial_fit_users, 100": (lambda m: m.partial_fit_users(*some[100]), 3),
        "partial_fit_users, one": (lambda m: m.partial_fit_users([0], row), 10),
        "recommend, one": (lambda m: m.recommend(0, row), 100),
        "recommend with recalculate_user, one": (
            lambda m: m.recommend(0, row, recalculate_user=True),
            100,
        ),
        "recommend, 20": (lambda m: m.recommend(*some[20]), 20),
        "recommend, 200": (lambda m: m.recommend(*some[200]), 5),
        "recommend, many": (lambda m: m.recommend(users, rows), 1),
        "recommend, many, N 100": (lambda m: m.recommend(users, rows, N=100), 1),
        "similar_items, one": (lambda m: m.similar_items(0), 100),
        "similar_items, many": (lambda m: m.similar_items(items), 1),
        "similar_users, many": (lambda m: m.similar_users(users), 1),
        "save and load": (saved_and_loaded, 1),
    }


def compare(made: dict[str, Any], call: Call, times: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of each library and their ratio, in turns after an untimed one."""
    taken: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(-1, repeats):
        for name in list(made)[:: 1 if turn % 2 == 0 else -1]:
            begin = time.perf_counter()
            for _ in range(times):
                call(made[name])
            if turn >= 0:
                taken[name].append((time.perf_counter() - begin) / times)
    ratio = None
    if "implicit" in taken:
        ratio = float(np.median(np.divide(taken["implicit"], taken["tpu_als"])))
    return {
        "milliseconds": {name: 1e3 * float(np.median(values)) for name, values in taken.items()},
        "ratio": ratio,
    }


def exact_iteration(user_items: sparse.csr_matrix, factors: int, repeats: int) -> dict[str, Any]:
    """Seconds of an exact iteration, beside a default one and Cholesky of others, in turns."""
    problem = libraries.Problem(user_items, factors, ALPHA, REGULARIZATION)
    names = ("tpu_als exact", "tpu_als cg", "irspack cholesky", "implicit cholesky")
    made = {name: libraries.BUILDERS[name](problem) for name in libraries.available(list(names))}
    taken: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(-2, repeats):
        for name, library in made.items():
            seconds = common.seconds(library.step)
            if turn >= 0:
                taken[name].append(seconds)
    middle = {name: float(np.median(values)) for name, values in taken.items()}
    return {"seconds": middle, "of_default": middle["tpu_als exact"] / middle["tpu_als cg"]}


def one_of_many(n_users: int, repeats: int) -> dict[str, Any]:
    """A partial fit of one user in a table of many, 64 factors."""
    rng, made = np.random.default_rng(0), {}
    tables = {
        "user_factors": rng.standard_normal((n_users, 64), dtype=np.float32),
        "item_factors": rng.standard_normal((2_000, 64), dtype=np.float32),
    }
    made["tpu_als"] = TPUAlternatingLeastSquares(64, REGULARIZATION, ALPHA)
    if common.installed("implicit"):
        from implicit.cpu.als import AlternatingLeastSquares

        made["implicit"] = AlternatingLeastSquares(64, REGULARIZATION, ALPHA)
    for model in made.values():
        for name, table in tables.items():
            setattr(model, name, table.copy())
    row = common.power_law(100, 2_000, 5_000)[0]
    return compare(made, lambda m: m.partial_fit_users([5], row), 20, repeats)


def bfloat16_iteration(user_items: sparse.csr_matrix, factors: int, repeats: int) -> dict[str, Any]:
    """Seconds of a default iteration with tables in bfloat16 and in float32, in turns."""
    problem = libraries.Problem(user_items, factors, ALPHA, REGULARIZATION)
    made = {dtype: libraries.Ours(problem, dtype=dtype) for dtype in ("bfloat16", "float32")}
    for library in made.values():
        library.step()
    taken = common.in_turns({name: library.step for name, library in made.items()}, repeats)
    return {"seconds": taken, "of_float32": taken["bfloat16"] / taken["float32"]}


def latencies(user_items: sparse.csr_matrix, factors: int, n_calls: int) -> dict[str, Any]:
    """Microseconds of single calls of mixed shapes, after the first ten of this process."""
    rng, (n_users, n_items) = np.random.default_rng(0), user_items.shape
    model = TPUAlternatingLeastSquares(factors, REGULARIZATION, ALPHA)
    model.user_factors, model.item_factors = (
        rng.standard_normal((n, factors), dtype=np.float32) for n in (n_users, n_items)
    )
    kinds: list[Callable[[int], Any]] = [
        lambda u: model.recommend(u, user_items[u]),
        lambda u: model.recommend(u, user_items[u], N=50),
        lambda u: model.recommend(u, user_items[u], recalculate_user=True),
        lambda u: model.similar_items(u % n_items),
        lambda u: model.recalculate_user(u, user_items[u]),
        lambda u: model.recommend(u, user_items[u], items=np.arange(u % n_items, n_items)),
    ]
    taken = []
    for number in range(n_calls):
        user, kind = int(rng.integers(n_users)), kinds[number % len(kinds)]
        begin = time.perf_counter()
        kind(user)
        taken.append(time.perf_counter() - begin)
    rest = 1e6 * np.array(taken[10:])
    middle = float(np.median(rest))
    return {
        "first_ten_microseconds": [1e6 * value for value in taken[:10]], "p50": middle,
        "p99": float(np.quantile(rest, 0.99)), "maximum": float(rest.max()),
        "above_five_medians": int((rest > 5 * middle).sum()), "calls": n_calls,
    }  # fmt: skip


def main() -> None:
    """Print one line for each call."""
    parser = common.parser(__doc__, ("ml1m", "power-law"))
    parser.add_argument("--factors", type=int, default=128)
    parser.add_argument("--items", type=int, help="size of a random catalogue, without a data set")
    parser.add_argument("--many", type=int, default=6000, help="users or items of large calls")
    parser.add_argument("--users", type=int, default=1_000_000, help="rows of the largest table")
    parser.add_argument("--latency", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.factors, args.many, args.users, args.repeats = 8, 300, 10_000, 2
    if args.items:
        n_users = 20_000
        name, user_items = (
            f"power-law-{args.items}",
            common.power_law(n_users, args.items, 100 * n_users),
        )
    else:
        name, user_items = common.load(args)
    kernels = sorted({str(lib.get("architecture")) for lib in threadpool_info()})
    common.emit(benchmark="serving", what="machine", blas_kernels=kernels, **common.machine())
    about = {"benchmark": "serving", "dataset": name, "factors": args.factors}
    if args.latency:
        found = latencies(user_items, args.factors, 60 if args.quick else 10_000)
        common.emit(**about, what="latency", **found)
        return
    made = models(user_items, args.factors)
    for what, (call, times) in calls(user_items, args.many).items():
        common.emit(**about, what=what, **compare(made, call, times, args.repeats))
    large = one_of_many(args.users, args.repeats)
    common.emit(**{**about, "factors": 64}, what=f"partial_fit_users, one of {args.users}", **large)
    halved = bfloat16_iteration(user_items, args.factors, args.repeats)
    common.emit(**about, what="bfloat16 iteration", **halved)
    common.emit(
        **about, what="exact iteration",
        **exact_iteration(user_items, args.factors, args.repeats),
    )  # fmt: skip


if __name__ == "__main__":
    main()
