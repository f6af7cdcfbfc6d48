"""Small interaction matrices for the tests."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def random_counts(
    n_users: int, n_items: int, *, density: float = 0.2, negatives: bool = False, seed: int = 0
) -> sparse.csr_matrix:
    """A random float32 CSR matrix of weights 1 to 4, with a quarter of them negative if set."""
    rng = np.random.default_rng(seed)
    stored = rng.random((n_users, n_items)) < density
    values = rng.integers(1, 5, size=stored.shape).astype(np.float32)
    if negatives:
        values[rng.random(stored.shape) < 0.25] *= -1
    return sparse.csr_matrix(np.where(stored, values, np.float32(0)))


def planted_groups(n_groups: int = 3, users: int = 8, items: int = 6) -> sparse.csr_matrix:
    """Users and items in groups. A user has all items of its group but that of ``withheld``."""
    membership = np.kron(np.eye(n_groups, dtype=np.float32), np.ones((users, items), np.float32))
    everyone = np.arange(n_groups * users)
    membership[everyone, withheld(everyone, users, items)] = 0
    return sparse.csr_matrix(membership)


def withheld(userids: np.ndarray, users: int = 8, items: int = 6) -> np.ndarray:
    """The item of its group that each user of ``planted_groups`` lacks."""
    return userids // users * items + userids % users % items
