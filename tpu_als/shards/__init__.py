"""Interactions that exceed a host's memory: a directory of Parquet files, by user and by item."""

from __future__ import annotations

from tpu_als.shards.sharded_matrix import ShardedMatrix, open_shards
from tpu_als.shards.writing import write_features, write_shards

__all__ = ["ShardedMatrix", "open_shards", "write_features", "write_shards"]


def __dir__() -> list[str]:
    return sorted(__all__)
