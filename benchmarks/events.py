"""What does a `Recommender` cost around its fit, and how good is it after many updates?

Another process writes events with text ids to Parquet files. A fresh recommender reads them, fits,
recommends to everybody into a Parquet file, and adds new events by `update`, also after `save` and
`load`. Each phase has its seconds and, on Linux, the highest resident size during it.

Then, on a year of real grocery purchases in order of time, 100 updates of 1,000 events are compared
with a fit on the same events: NDCG@10 of later purchases among the products that a household had
not bought.

    python benchmarks/events.py [--quick] [--users N] [--updates N]
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd

from tpu_als import Recommender, TPUAlternatingLeastSquares
from tpu_als.weighting import LogWeighting

SIZES = (1_000_000, 100_000, 10_000_000)
QUICK_SIZES = (2_000, 500, 20_000)


class Phases(logging.Handler):
    """Collects the seconds of the steps that the package logs, and the peak of each."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float | None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the seconds and the peak of a step, which has just ended."""
        if record.msg == "%s: %.3f s" and isinstance(record.args, tuple):
            name = str(record.args[0])
            self.seconds[name] = float(str(record.args[1]))
            self.peaks[name] = common.peak_gigabytes()


def events(n_users: int, n_items: int, n_events: int) -> pd.DataFrame:
    """Events of users who like one of some groups of items, with popular and rare items."""
    rng, n_groups = np.random.default_rng(0), max(n_items // 500, 2)
    rest = n_events - n_users
    users = np.append(np.arange(n_users), (n_users * rng.random(rest) ** 2).astype(np.int64))
    own = rng.integers(0, n_groups, n_users)[users]
    groups = np.where(rng.random(n_events) < 0.8, own, rng.integers(0, n_groups, n_events))
    size = n_items // n_groups
    items = groups * size + (rng.random(n_events) ** 3 * size).astype(np.int64)
    order = rng.permutation(n_events)
    return pd.DataFrame(
        {
            "customer": np.char.add("c", users[order].astype(str)),
            "sku": np.char.add("sku-", items[order].astype(str)),
            "quantity": rng.integers(1, 4, n_events),
            "time": pd.Timestamp("2026-01-01") + pd.to_timedelta(np.arange(n_events), unit="s"),
        }
    )


def write(folder: Path, sizes: tuple[int, int, int], n_updates: int) -> None:
    """Write the events, and in a folder of their own those of updates."""
    frame = events(*sizes)
    for at in range(10):
        frame[at::10].to_parquet(folder / f"part-{at}.parquet", index=False)
    (folder / "updates").mkdir()
    for at in range(n_updates):  # a few events of new users and of new items
        part = frame.sample(1000, random_state=at)
        part.iloc[:20, part.columns.get_loc("customer")] = [f"new-{at}-{n}" for n in range(20)]
        part.iloc[15:25, part.columns.get_loc("sku")] = [f"new-{at}-{n}" for n in range(10)]
        part.to_parquet(folder / "updates" / f"{at:04d}.parquet", index=False)


def phases(sizes: tuple[int, int, int], n_ranked: int | None, repeats: int) -> None:
    """Seconds and peak of each phase, from files to recommendations for everybody."""
    log, watch = logging.getLogger("tpu_als"), Phases()
    level = log.level
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own, so that its memory is in no peak.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(write, folder, sizes, 2 * repeats).result()
        some = [pd.read_parquet(file) for file in sorted((folder / "updates").iterdir())]
        model = TPUAlternatingLeastSquares(64, random_state=0, verbose=False)
        rec = Recommender("customer", "sku", "quantity", "time", model=model)
        log.addHandler(watch)
        log.setLevel(logging.DEBUG)
        common.peak_gigabytes()
        before = common.peak_gigabytes()
        seconds = common.seconds(lambda: rec.fit(folder / "part-*.parquet"))
        log.setLevel(level)
        common.emit(
            what="fit", events=sizes[2], users=sizes[0], items=sizes[1], seconds=seconds,
            phases=watch.seconds, ids_over_fit=watch.seconds["ids"] / watch.seconds["model"],
            gigabytes_before=before, peak_gigabytes=watch.peaks,
        )  # fmt: skip
        users = None if n_ranked is None else rec.users_[:n_ranked]
        began = time.perf_counter()
        n_rows = rec.recommend_to_parquet(folder / "all.parquet", users)
        common.emit(
            what="recommend to everybody" if users is None else "recommend",
            users=sizes[0] if users is None else len(users), rows=n_rows,
            seconds=time.perf_counter() - began, peak_gigabytes=common.peak_gigabytes(),
        )  # fmt: skip
        updates(rec, some[:repeats], "update with 1,000 events")
        seconds = common.seconds(lambda: rec.save(folder / "shop.tpuals"))
        common.emit(what="save", seconds=seconds, peak_gigabytes=common.peak_gigabytes())
        del rec
        began = time.perf_counter()
        rec = Recommender.load(folder / "shop.tpuals")
        seconds = time.perf_counter() - began
        common.emit(what="load", seconds=seconds, peak_gigabytes=common.peak_gigabytes())
        updates(rec, some[repeats:], "update with 1,000 events after load")


def updates(rec: Recommender, some: list[pd.DataFrame], what: str) -> None:
    """Seconds of the first update and of later ones."""
    times = [common.seconds(functools.partial(rec.update, part)) for part in some]
    common.emit(
        what=what, first=times[0], median=statistics.median(times[1:]),
        p99=float(np.quantile(times[1:], 0.99)), most=max(times[1:]), updates=len(times),
        peak_gigabytes=common.peak_gigabytes(),
    )  # fmt: skip


def quality(n_updates: int, size: int) -> None:
    """NDCG@10 after updates, beside that of a fit on the same events."""
    try:
        from tpu_als.datasets import load_groceries

        frame = load_groceries()[0].sort_values("transaction_timestamp", ignore_index=True)
    except ImportError as error:
        common.emit(what="quality", skipped=str(error))
        return
    end = len(frame) * 4 // 5
    begin = end - n_updates * size
    model = TPUAlternatingLeastSquares(
        64, regularization=1e-3, iterations=10, random_state=0, objective="ials",
        unobserved_weight=2.0, verbose=False,
    )  # fmt: skip

    def fresh(events: pd.DataFrame) -> Recommender:
        made = Recommender("household_id", "product_id", weighting=LogWeighting(), model=model)
        return made.fit(events)

    later = frame[end:]
    scores: dict[str, Any] = {"fit": fresh(frame[:end]).score(later)}
    rec = fresh(frame[:begin])
    began = time.perf_counter()
    for low in range(begin, end, size):
        rec.update(frame[low : low + size])
    seconds = time.perf_counter() - began
    scores["updates"] = rec.score(later)
    common.emit(
        what="quality", updates=n_updates, events=size, ndcg_at_10=scores,
        difference=scores["updates"] - scores["fit"], seconds_an_update=seconds / n_updates,
    )  # fmt: skip


def main() -> None:
    """Phases and quality."""
    parser = common.parser(__doc__)
    parser.add_argument("--users", type=int, help="recommend to so many users, not to everybody")
    parser.add_argument("--updates", type=int, help="updates after fit, and again after load")
    args = parser.parse_args()
    common.emit(**common.machine())
    n_updates = args.updates or (3 if args.quick else 20)
    phases(QUICK_SIZES if args.quick else SIZES, args.users, n_updates)
    quality(*((5, 200) if args.quick else (100, 1000)))


if __name__ == "__main__":
    main()
