"""Select the largest scores of each query; traced.

Axis letters: B queries of a batch, S slots of a shard.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_BLOCKS = (32, 8)  # columns of a block; see `engine.cpu.ranking`


def without(scores: Array, query: Array | np.ndarray, slot: Array, lanes: int) -> Array:
    """Set scores (B, S) to -inf for pairs of a query and a slot. Slots of S or more are ignored.

    To set single numbers, a TPU copies the array to an untiled layout and back. So a whole row of
    lanes is updated, by the minimum with a row that is -inf in one lane and inf elsewhere.
    """
    n_queries, n_slots = scores.shape
    lanes = math.gcd(lanes, n_slots)
    if lanes == 1:
        return scores.at[query, slot].set(-jnp.inf, mode="drop")
    is_slot = jnp.arange(lanes)[None, :] == slot[:, None] % lanes
    hidden = jnp.where(is_slot, -jnp.inf, jnp.inf)
    rows = scores.reshape(n_queries, n_slots // lanes, lanes)
    rows = rows.at[query, slot // lanes].min(hidden.astype(scores.dtype), mode="drop")
    return rows.reshape(n_queries, n_slots)


def largest(scores: Array, k: int, recall: float | None = None) -> tuple[Array, Array]:
    """Top k values (B, k) and columns of scores (B, n); traced.

    With `recall`, a TPU finds this share of them in expectation, in one pass.
    """
    if recall is not None:
        best, columns = lax.approx_max_k(scores, k, recall_target=recall)
        return best, columns
    n_queries, n_columns = scores.shape
    for size in _BLOCKS:
        n_blocks = n_columns // size
        if n_columns % size == 0 and n_blocks >= 4 * k:
            break
    else:
        best, columns = lax.top_k(scores, k)
        return best, columns
    members = scores.reshape(n_queries, size, n_blocks)
    _, blocks = lax.top_k(members.max(axis=1), k)
    inside = jnp.take_along_axis(members, blocks[:, None, :], axis=2, mode="promise_in_bounds")
    best, at = largest(inside.reshape(n_queries, -1), k)
    return best, at // k * n_blocks + jnp.take_along_axis(blocks, at % k, axis=1)
