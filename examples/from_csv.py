"""From a CSV file of events to recommendations with names.

    python examples/from_csv.py [FILE]

The file has the columns customer, sku, quantity and time. Without an argument, the script first
writes a small one: customers who buy mostly what one of four kitchens needs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from tpu_als import Recommender, TPUAlternatingLeastSquares
from tpu_als.weighting import LogWeighting

KITCHENS = {
    "italian": ["basil", "olive oil", "parmesan", "pasta", "passata", "rocket", "mozzarella"],
    "indian": ["basmati", "cumin", "ghee", "lentils", "naan", "paneer", "turmeric"],
    "japanese": ["dashi", "miso", "mirin", "nori", "sesame", "soba", "tofu"],
    "english": ["bacon", "baked beans", "cheddar", "crumpets", "marmalade", "scones", "tea"],
}


def write_events(path: Path, n_events: int = 20_000, n_customers: int = 5_000) -> None:
    """Write purchases of a year; nine in ten are for the customer's own kitchen."""
    rng = np.random.default_rng(0)
    products = np.array(list(KITCHENS.values()))
    customers = rng.integers(n_customers, size=n_events)
    is_own = rng.random(n_events) < 0.9
    kitchens = np.where(
        is_own, customers % len(products), rng.integers(len(products), size=n_events)
    )
    popular_first = rng.geometric(0.3, n_events) % products.shape[1]
    minutes = np.sort(rng.integers(365 * 24 * 60, size=n_events))
    events = {
        "customer": [f"customer {number:04d}" for number in customers],
        "sku": products[kitchens, popular_first],
        "quantity": rng.integers(1, 4, n_events),
        "time": pd.Timestamp("2026-01-01") + pd.to_timedelta(minutes, "min"),
    }
    pd.DataFrame(events).to_csv(path, index=False)


def recommend(path: Path) -> None:
    """Fit, and print recommendations, similar items and an explanation."""
    model = TPUAlternatingLeastSquares(factors=8, alpha=10, random_state=0)
    rec = Recommender(
        user="customer", item="sku", value="quantity", timestamp="time", half_life="90D",
        weighting=LogWeighting(), model=model,
    )  # fmt: skip
    rec.fit(path)
    customers = rec.users_[:2].tolist()
    print(rec.recommend([*customers, "a new customer"], n=3).to_string(index=False), end="\n\n")
    print(rec.similar_items(rec.items_[0], n=3).to_string(index=False), end="\n\n")
    first = rec.recommend(customers[0], n=1)["item"][0]
    print(f"{first} for {customers[0]}, because of")
    print(rec.explain(customers[0], first, n=3).to_string(index=False))


def main() -> None:
    """Read the file of the first argument, or write one."""
    pd.set_option("display.precision", 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "events.csv"
        if len(sys.argv) == 1:
            write_events(path)
        recommend(path)


if __name__ == "__main__":
    main()
