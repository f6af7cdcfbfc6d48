"""Events for the tests of `Recommender`, and a slow reference of it, written with dictionaries."""

from __future__ import annotations

from typing import Any

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


class Reference:
    """What a `Recommender` does, one event at a time; rows are solved by the dense oracle.

    Its model is trained by the estimator, on a matrix made from a dictionary.
    """

    def __init__(self, repeated: str, half_life: float | None, kinds: dict[str, float]) -> None:
        self.repeated, self.half_life, self.kinds = repeated, half_life, kinds
        self.objective = oracle.Objective(regularization=0.1, alpha=2.0)

    def fit(self, rows: list[tuple]) -> None:
        rows = [row for row in rows if self.kinds[row[3]] != 0]
        self.latest = max(time for *_, time in rows)
        self.users = sorted({row[0] for row in rows})
        self.items = sorted({row[1] for row in rows})
        self.values: dict[tuple, float] = {}
        self.times: dict[tuple, float] = {}
        self.changed = dict.fromkeys(self.items, 0)
        self._add(rows)
        params = {"regularization": 0.1, "alpha": 2.0}
        fitted = model(**params).fit(self.matrix(), show_progress=False)
        self.user_factors = fitted.user_factors.astype(np.float64)
        self.item_factors = fitted.item_factors.astype(np.float64)

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

    def update(self, rows: list[tuple]) -> None:
        rows = [row for row in rows if self.kinds[row[3]] != 0]
        self.users += sorted({row[0] for row in rows} - set(self.users))
        self.items += sorted({row[1] for row in rows} - set(self.items))
        for name, ids in (("user_factors", self.users), ("item_factors", self.items)):
            table = getattr(self, name)
            setattr(self, name, np.pad(table, ((0, len(ids) - len(table)), (0, 0))))
        cells = self._add(rows)
        matrix = self.matrix()
        touched = sorted({self.users.index(user) for user, _ in cells})
        due = []
        for item in {item for _, item in cells}:
            self.changed[item] = self.changed.get(item, 0) + sum(i == item for _, i in cells)
            likes = sum(value > 0 for (_, i), value in self.values.items() if i == item)
            if self.changed[item] * 20 >= likes:
                due.append(self.items.index(item))
                self.changed[item] = 0
        self._solve(matrix, touched, self.user_factors, self.item_factors)
        if due:
            columns = sparse.csr_matrix(matrix.T)
            self._solve(columns, sorted(due), self.item_factors, self.user_factors)
            self._solve(matrix, touched, self.user_factors, self.item_factors)

    def _solve(self, matrix: Any, rows: list[int], target: np.ndarray, source: np.ndarray) -> None:
        target[rows] = oracle.half_epoch(matrix[rows], source, self.objective)

    def scores(self, user: str) -> dict[str, float]:
        """Score of each item that the user has not had."""
        row = self.item_factors @ self.user_factors[self.users.index(user)]
        seen = {item for owner, item in self.values if owner == user}
        return {item: row[at] for at, item in enumerate(self.items) if item not in seen}
