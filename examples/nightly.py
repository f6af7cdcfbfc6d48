"""A nightly job: evaluate yesterday's model on the newest day, refit or keep it, and publish.

    python examples/nightly.py [FOLDER]

FOLDER has one file of events for each day, ``events/2026-01-31.csv`` and the like, with the columns
customer, sku and time. The job writes

* ``models/<day>.tpuals``, which includes the events up to this day, and
* ``current.json``, which names the model in use. ``examples/serve.py`` reads it.

For each new day the job scores two models that have not seen it: the one in use, which was updated
night by night, and a new fit to all earlier days. The new fit is promoted if it is clearly better;
otherwise the model in use is kept. The chosen one is updated with the day and published.

`os.replace` of ``current.json`` is the only step that changes what others see. A job that is killed
before it leaves the model of yesterday in use, and can be repeated; after it, a repetition has
nothing to do. Without FOLDER, the script makes up two weeks of events, runs a job for each of the
last days, and stops one of them half-way.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tpu_als import Recommender, TPUAlternatingLeastSquares

KEPT = 3  # models, to go back to
LEAST_GAIN = 0.005  # in NDCG@10, because one day's score has noise


def new_recommender() -> Recommender:
    """The settings of the next fit."""
    model = TPUAlternatingLeastSquares(
        factors=16, regularization=0.01, random_state=0, objective="ials", unobserved_weight=0.2
    )
    return Recommender(user="customer", item="sku", timestamp="time", half_life="30D", model=model)


def current(folder: Path) -> dict[str, Any] | None:
    """What ``current.json`` says: the file of the model in use, and the last day in it."""
    path = folder / "current.json"
    return json.loads(path.read_text()) if path.exists() else None


def run(folder: Path, before_promotion: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Include every day that is not yet in the model; return what was published."""
    files = sorted((folder / "events").glob("*.csv"))
    if len(files) < 2:
        raise FileNotFoundError(f"expected files of two days or more, {folder / 'events'}/*.csv")
    in_use = current(folder)
    due = files[-1:] if in_use is None else [f for f in files if f.stem > in_use["day"]]
    published = []
    for newest in due:
        earlier = [file for file in files if file < newest]
        winner, chosen = better_model(folder, in_use, earlier, newest)
        in_use = {"model": f"models/{newest.stem}.tpuals", "day": newest.stem, **chosen}
        (folder / "models").mkdir(exist_ok=True)
        winner.save(folder / in_use["model"])  # the file has this name only when it is complete
        before_promotion()
        promote(folder, in_use)
        published.append(in_use)
    for old in sorted((folder / "models").glob("*.tpuals"))[:-KEPT]:
        old.unlink()
    return published


def better_model(
    folder: Path, in_use: dict[str, Any] | None, earlier: list[Path], newest: Path
) -> tuple[Recommender, dict[str, Any]]:
    """The model to publish, which includes the newest day, and how it was chosen."""
    refit = new_recommender().fit(earlier, show_progress=False)
    if in_use is None:
        return refit.update(newest), {"decision": "first fit"}
    yesterday = Recommender.load(folder / in_use["model"])
    scores = {"in use": yesterday.score(newest), "refit": refit.score(newest)}
    is_better = scores["refit"] >= scores["in use"] + LEAST_GAIN
    winner = refit if is_better else yesterday
    return winner.update(newest), {"decision": "promote" if is_better else "keep", **scores}


def promote(folder: Path, about: dict[str, Any]) -> None:
    """Replace ``current.json`` in one step."""
    path = folder / "current.json.new"
    with path.open("w") as file:
        json.dump(about, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, folder / "current.json")


def write_day(folder: Path, number: int, n_events: int = 3_000) -> None:
    """Made-up purchases of a day; tastes of customers move on slowly, and new products come."""
    rng = np.random.default_rng(number)
    day = pd.Timestamp("2026-01-01") + pd.Timedelta(days=number)
    customers = rng.integers(1_500 + 20 * number, size=n_events)
    groups = (customers + customers % 7 * number // 40) % 20
    ranks = rng.geometric(0.06, n_events) % 40 + number // 3  # in the group's list of products
    events = {
        "customer": [f"c{customer}" for customer in customers],
        "sku": [f"sku {group}-{rank}" for group, rank in zip(groups, ranks, strict=True)],
        "time": day + pd.to_timedelta(np.sort(rng.integers(86_400, size=n_events)), "s"),
    }
    (folder / "events").mkdir(exist_ok=True)
    pd.DataFrame(events).to_csv(folder / "events" / f"{day:%Y-%m-%d}.csv", index=False)


class Killed(BaseException):
    """Stops a job of this script half-way, as the loss of its machine would."""


def kill() -> None:
    """Stop."""
    raise Killed


def show(published: list[dict[str, Any]]) -> None:
    """Print what was published."""
    for one in published:
        line = f"{one['day']}: {one['decision']}"
        if "refit" in one:
            line += f", NDCG@10 of the day: in use {one['in use']:.4f}, refit {one['refit']:.4f}"
        print(line)


def demonstrate(folder: Path) -> None:
    """Two weeks; the job of one night is stopped half-way."""
    for number in range(10):
        write_day(folder, number)
    show(run(folder))
    for number in range(10, 15):
        write_day(folder, number)
        if number == 12:
            before = (folder / "current.json").read_bytes()
            try:
                run(folder, before_promotion=kill)
            except Killed:
                same = (folder / "current.json").read_bytes() == before
                print(f"killed before promotion; current.json is unchanged: {same}; once more:")
        show(run(folder))
    print(f"once more, with nothing to do: {run(folder)}")
    about = current(folder)
    assert about is not None
    print(f"\nin use: {about['model']}")
    rec = Recommender.load(folder / about["model"])
    print(rec.recommend(rec.users_[:1], n=3).to_string(index=False))


def main() -> None:
    """Run the job in the folder of the first argument, or show it with made-up events."""
    if len(sys.argv) > 1:
        show(run(Path(sys.argv[1])))
        return
    with tempfile.TemporaryDirectory() as folder:
        demonstrate(Path(folder))


if __name__ == "__main__":
    main()
