"""Events for the tests of `Recommender`, and a slow reference of it, written with dictionaries."""

from __future__ import annotations

from typing import Any

import feature_oracle
import numpy as np
import oracle
import pandas as pd
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares


def model(**params: Any) -> TPUAlternatingLeastSquares:
    """A small model that shows no progress."""
    return TPUAlternatingLeastSquares(
        **{"factors": 4, "iterations": 3, "random_state": 0, "verbose": False, **params}
    )


def events(n: int = 400, seed: int = 0) -> pd.DataFrame:
    """Events of 30 users and 20 items in two groups, in order of time."""
    rng = np.random.default_rng(seed)
    users = rng.integers(0, 30, n)
    items = np.where(rng.random(n) < 0.9, users % 2 * 10, 0) + rng.integers(0, 10, n)
    return pd.DataFrame(
        {
            "customer": [f"c{user:02d}" for user in users],
            "sku": [f"sku{item:02d}" for item in items],
            "quantity": rng.integers(1, 5, n),
            "kind": rng.choice(["view", "buy", "dislike"], n, p=[0.6, 0.3, 0.1]),
            "time": pd.Timestamp("2026-01-01") + pd.to_timedelta(np.arange(n), unit="h"),
        }
    )


def many_users() -> pd.DataFrame:
    """Events of 300 users and 200 items: an update of a few changes few of them."""
    parts = [
        events(seed=seed).assign(
            customer=lambda frame, seed=seed: frame["customer"] + str(seed),
            sku=lambda frame, seed=seed: frame["sku"] + str(seed),
        )
        for seed in range(10)
    ]
    return pd.concat(parts)


class Reference:
    """What a `Recommender` does, one event at a time; rows are solved by the dense oracle.

    Its model is trained by the estimator, on a matrix made from a dictionary. `features` has, for
    "user" or "item", a category and a number of each id, either of which may be None.
    """

    def __init__(
        self, repeated: str, half_life: float | None, kinds: dict[str, float],
        features: dict[str, dict[str, tuple]] | None = None,
    ) -> None:  # fmt: skip
        self.repeated, self.half_life, self.kinds = repeated, half_life, kinds
        self.features = {side: dict(rows) for side, rows in (features or {}).items()}
        self.scales = {side: _scale(rows) for side, rows in self.features.items()}
        self.weights: dict[str, np.ndarray] = {}
        self.objective = oracle.Objective(regularization=0.1, alpha=2.0)

    def fit(self, rows: list[tuple]) -> None:
        rows = [row for row in rows if self.kinds[row[3]] != 0]
        self.latest = max(time for *_, time in rows)
        self.users = sorted({row[0] for row in rows})
        self.items = sorted({row[1] for row in rows})
        self._add_ids(self.features)
        self.values: dict[tuple, float] = {}
        self.times: dict[tuple, float] = {}
        self.changed = dict.fromkeys(self.items, 0)
        self._add(rows)
        # With features the comparison needs float64: a fit to one user gives parallel rows.
        dtype = np.float64 if self.features else np.float32
        params = {"regularization": 0.1, "alpha": 2.0, "dtype": dtype}
        tables = {f"{side}_features": self.encoded(side) for side in self.features}
        fitted = model(**params).fit(self.matrix(), show_progress=False, **tables)
        self.weights = {s: getattr(fitted, f"{s}_feature_weights_") for s in self.features}
        self.user_factors = fitted.user_factors.astype(np.float64)
        self.item_factors = fitted.item_factors.astype(np.float64)

    def _add_ids(self, given: dict[str, dict[str, tuple]]) -> None:
        self.users += sorted(set(given.get("user", ())) - set(self.users))
        self.items += sorted(set(given.get("item", ())) - set(self.items))

    def encoded(self, side: str) -> np.ndarray:
        """Features of all ids of a side, one-hot and standardised; zeros where unknown."""
        categories, mean, deviation = self.scales[side]
        ids = self.users if side == "user" else self.items
        table = np.zeros((len(ids), len(categories) + 1))
        for at, one in enumerate(ids):
            category, number = self.features[side].get(one, (None, None))
            if category in categories:
                table[at, categories.index(category)] = 1
            if number is not None:
                table[at, -1] = (number - mean) / deviation
        return table

    def _add(self, rows: list[tuple]) -> set[tuple]:
        cells = set()
        for user, item, value, kind, time in rows:
            cell, number = (user, item), value * self.kinds[kind]
            if self.half_life is not None:
                number *= 2.0 ** ((time - self.latest) / self.half_life)
            cells.add(cell)
            if cell not in self.values:
                self.values[cell], self.times[cell] = number, time
            elif self.repeated == "sum":
                self.values[cell] += number
            elif self.repeated == "max":
                self.values[cell] = max(self.values[cell], number)
            elif time >= self.times[cell]:
                self.values[cell], self.times[cell] = number, time
        return cells

    def matrix(self) -> sparse.csr_matrix:
        at = [(self.users.index(u), self.items.index(i)) for u, i in self.values]
        entries = np.array(list(self.values.values()), np.float32), np.array(at).T
        return sparse.csr_matrix(entries, shape=(len(self.users), len(self.items)))

    def update(
        self, rows: list[tuple], features: dict[str, dict[str, tuple]] | None = None
    ) -> None:
        given = features or {}
        rows = [row for row in rows if self.kinds[row[3]] != 0]
        self.users += sorted({row[0] for row in rows} - set(self.users))
        self.items += sorted({row[1] for row in rows} - set(self.items))
        self._add_ids(given)
        for side, new in given.items():
            self.features[side].update(new)
        for name, ids in (("user_factors", self.users), ("item_factors", self.items)):
            table = getattr(self, name)
            setattr(self, name, np.pad(table, ((0, len(ids) - len(table)), (0, 0))))
        cells = self._add(rows)
        matrix = self.matrix()
        of_features = [self.users.index(user) for user in given.get("user", ())]
        touched = sorted({self.users.index(user) for user, _ in cells} | set(of_features))
        due = [self.items.index(item) for item in given.get("item", ())]
        self.changed.update(dict.fromkeys(given.get("item", ()), 0))
        for item in {item for _, item in cells}:
            self.changed[item] = self.changed.get(item, 0) + sum(i == item for _, i in cells)
            likes = sum(value > 0 for (_, i), value in self.values.items() if i == item)
            if self.changed[item] * 20 >= likes:
                due.append(self.items.index(item))
                self.changed[item] = 0
        self._solve("user", matrix, touched)
        if due:
            self._solve("item", sparse.csr_matrix(matrix.T), sorted(set(due)))
            self._solve("user", matrix, touched)

    def _solve(self, side: str, matrix: Any, rows: list[int]) -> None:
        if not rows:
            return
        target, source = self.user_factors, self.item_factors
        if side == "item":
            target, source = source, target
        if side not in self.features:
            target[rows] = oracle.half_epoch(matrix[rows], source, self.objective)
            return
        prior = self.encoded(side)[rows] @ self.weights[side]
        solved = feature_oracle.solve(matrix[rows], prior, source, self.objective)
        lengths = np.diff(matrix[rows].indptr)
        target[rows] = np.where(lengths[:, None] > 0, solved, prior)

    def reason(self, user: str, item: str) -> str:
        """The reason for an item that the model recommends."""
        owners, owned = zip(*self.values, strict=True)
        return "model" if user in owners and item in owned else "features"

    def scores(self, user: str) -> dict[str, float]:
        """Score of each item that the user has not had."""
        row = self.item_factors @ self.user_factors[self.users.index(user)]
        seen = {item for owner, item in self.values if owner == user}
        if "item" in self.features:  # items of which nothing is known are not recommended
            owned = {item for _, item in self.values}
            is_zero = ~self.encoded("item").any(axis=1)
            seen |= {i for i, blank in zip(self.items, is_zero, strict=True) if blank} - owned
        return {item: row[at] for at, item in enumerate(self.items) if item not in seen}


def _scale(rows: dict[str, tuple]) -> tuple[list[str], float, float]:
    """The categories of a feature frame, and mean and standard deviation of its numbers."""
    categories = sorted({category for category, _ in rows.values() if category is not None})
    numbers = [number for _, number in rows.values() if number is not None]
    mean = sum(numbers) / len(numbers)
    deviation = (sum((number - mean) ** 2 for number in numbers) / len(numbers)) ** 0.5
    return categories, mean, deviation or 1.0


def feature_frame(column: str, rows: dict[str, tuple]) -> pd.DataFrame:
    """A frame of features: a category and a number of each id."""
    return pd.DataFrame(
        {
            column: list(rows),
            "group": pd.Series([category for category, _ in rows.values()], dtype=object),
            "size": np.array([number for _, number in rows.values()], np.float64),
        }
    )
