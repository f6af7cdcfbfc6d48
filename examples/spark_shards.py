"""From events in Spark to the Parquet shards of docs/shards.md, and a fit from them.

    python examples/spark_shards.py [--events 5000000]

PySpark in local mode makes up events, numbers the ids, and writes the rows of users and those of
items. `fit` reads them with `open_shards` and gives the same factors as a fit from memory. On a
cluster change only the session and the paths; Spark then does the work that exceeds a machine.

Needs Java 17 or newer (Debian: apt-get install default-jre-headless), PySpark and pyarrow: pip
install pyspark "tpu-als[shards]". Skipped where they are absent.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares

N_SHARDS = 8


def missing() -> str:
    """What this machine lacks, in words; empty if nothing."""
    if shutil.which("java") is None:
        return "Java is not installed: apt-get install default-jre-headless"
    absent = [name for name in ("pyspark", "pyarrow") if importlib.util.find_spec(name) is None]
    return f"{absent[0]} is not installed: pip install {absent[0]}" if absent else ""


@contextmanager
def standard_error_in(path: Path) -> Iterator[None]:
    """Processes that start here write their standard error to a file: Spark's is long."""
    sys.stderr.flush()
    own = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def session(folder: Path) -> Any:
    """A Spark session in this process, with its log in a file."""
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[2]").appName("shards")
    for name, value in {
        "spark.driver.memory": "2g",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.local.dir": str(folder),
        "spark.ui.enabled": "false",
        # For small data in one process, compiling costs more than it saves.
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.sql.codegen.wholeStage": "false",
        "spark.sql.shuffle.partitions": str(N_SHARDS),
        # Otherwise small partitions are merged, and the two folders get different numbers of files.
        "spark.sql.adaptive.coalescePartitions.enabled": "false",
        # Row groups of readable size; see docs/shards.md.
        "spark.hadoop.parquet.block.size": str(16 << 20),
    }.items():
        builder = builder.config(name, value)
    with standard_error_in(folder / "spark.log"):
        return builder.getOrCreate()


def events_of(spark: Any, n_events: int) -> Any:
    """Made-up events with text ids; a few users and items have many of them."""
    from pyspark.sql import functions as f

    n_users, n_items = n_events // 20, n_events // 100
    skewed = [f.floor(n * f.pow(f.rand(seed), 2)) for n, seed in ((n_users, 1), (n_items, 2))]
    return spark.range(n_events).select(
        f.concat(f.lit("u"), skewed[0]).alias("user"),
        f.concat(f.lit("i"), skewed[1]).alias("item"),
        f.floor(1 + 3 * f.rand(3)).cast("float").alias("quantity"),
    )


def numbered(events: Any, name: str) -> Any:
    """Distinct ids of a column, with numbers from 0 without gaps, the same in each run."""
    from pyspark.sql import Window
    from pyspark.sql import functions as f

    ids = events.select(name).distinct().withColumn("bucket", f.pmod(f.hash(name), f.lit(256)))
    counts = dict(ids.groupBy("bucket").count().collect())
    offsets, total = [], 0
    for bucket in range(256):
        offsets.append(f.lit(total))
        total += counts.get(bucket, 0)
    place = f.row_number().over(Window.partitionBy("bucket").orderBy(name))
    number = f.element_at(f.array(*offsets), f.col("bucket") + 1) + place - 1
    return ids.select(name, number.cast("long").alias(f"{name}_id"))


def write_shards(events: Any, path: Path) -> tuple[Any, Any]:
    """Write the shards; return the tables of ids of users and items."""
    from pyspark.sql import functions as f

    users, items = (numbered(events, name).cache() for name in ("user", "item"))
    cells = (
        events.groupBy("user", "item").agg(f.sum("quantity").alias("value"))
        .join(users, "user").join(items, "item")
        .select("user_id", "item_id", f.col("value").cast("float")).cache()
    )  # fmt: skip
    for side, other in (("user", "item"), ("item", "user")):
        entry = f.struct(f.col(f"{other}_id").cast("int").alias("id"), "value")
        rows = cells.groupBy(f.col(f"{side}_id").alias("row_id")).agg(
            f.collect_list(entry).alias("entries")
        )
        (
            rows.select("row_id", f.col("entries.id").alias("col_ids"),
                        f.col("entries.value").alias("values"))
            .repartition(N_SHARDS, "row_id")
            .write.parquet(str(path / side))
        )  # fmt: skip
    totals = {
        "format": 1, "n_users": users.count(), "n_items": items.count(),
        "n_entries": cells.count(), "n_shards": N_SHARDS, "has_values": True,
    }  # fmt: skip
    (path / "totals.json").write_text(json.dumps(totals))  # last: it makes the data complete
    return users, items


def in_memory(events: Any, users: Any, items: Any, path: Path) -> sparse.csr_matrix:
    """The same interactions, without the shards."""
    from pyarrow import parquet

    joined = events.join(users, "user").join(items, "item")
    joined.select("user_id", "item_id", "quantity").write.parquet(str(path))
    table = parquet.read_table(path)
    at = tuple(table[name].to_numpy() for name in ("user_id", "item_id"))
    shape = users.count(), items.count()
    return sparse.csr_matrix((table["quantity"].to_numpy(), at), shape=shape).astype(np.float32)


def main() -> None:
    """Write, read, fit twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=50_000)
    arguments = parser.parse_args()
    lacking = missing()
    if lacking:
        print(f"skipped: {lacking}")
        return
    from tpu_als.shards import open_shards  # needs pyarrow

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "purchases"
        begin = time.perf_counter()
        spark = session(Path(folder))
        events = events_of(spark, arguments.events).cache()
        users, items = write_shards(events, path)
        print(f"Spark wrote shards of {arguments.events} events", end=" ")
        print(f"in {time.perf_counter() - begin:.1f} s, its start included")
        whole = in_memory(events, users, items, Path(folder) / "table")
        spark.stop()

        matrix = open_shards(str(path))
        print(f"{matrix.shape[0]} users, {matrix.shape[1]} items, {matrix.nnz} pairs")
        tables = [fitted(data) for data in (matrix, whole)]
        difference = np.abs(tables[0] - tables[1]).max() / np.abs(tables[1]).max()
        print(f"largest difference of the users' factors: {difference:.0e} of the largest factor")
        if difference > 1e-3:
            sys.exit("the two fits differ")


def fitted(data: Any) -> np.ndarray:
    """Users' factors of a fit to shards or to a matrix in memory."""
    rng = np.random.default_rng(0)
    model = TPUAlternatingLeastSquares(factors=16, alpha=5, iterations=5)
    # Both start from the same tables. With random_state they would not: those of a fit from shards
    # are drawn by JAX, so that each process can draw its own part.
    for name, size in zip(("user_factors", "item_factors"), data.shape, strict=True):
        setattr(model, name, 0.01 * rng.random((size, model.factors), np.float32))
    begin = time.perf_counter()
    model.fit(data, show_progress=False)
    print(f"fit to a {type(data).__name__} in {time.perf_counter() - begin:.1f} s")
    assert model.user_factors is not None
    return model.user_factors


if __name__ == "__main__":
    main()
