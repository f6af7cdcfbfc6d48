"""Small interaction matrices for the tests."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def random_counts(
    n_users: int, n_items: int, *, density: float = 0.2, negatives: bool = False, seed: int = 0
) -> sparse.csr_matrix:
    """A random float32 CSR matrix of weights 1 to 4, a quarter of them negative if asked for."""
    rng = np.random.default_rng(seed)
    stored = rng.random((n_users, n_items)) < density
    values = rng.integers(1, 5, size=stored.shape).astype(np.float32)
    if negatives:
        values[rng.random(stored.shape) < 0.25] *= -1
    return sparse.csr_matrix(np.where(stored, values, np.float32(0)))


def planted_groups(n_groups: int = 3, users: int = 8, items: int = 6) -> sparse.csr_matrix:
    """Users and items in groups: a user likes its whole group but one item, (u mod items) in it."""
    n_users, n_items = n_groups * users, n_groups * items
    dense = np.zeros((n_users, n_items), dtype=np.float32)
    for u in range(n_users):
        group = u // users
        dense[u, group * items : (group + 1) * items] = 1.0
        dense[u, group * items + u % items] = 0.0
    return sparse.csr_matrix(dense)
