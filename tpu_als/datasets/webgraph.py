"""WebGraph: links of the web, as sharded files."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from sklearn.utils import Bunch

from tpu_als.datasets import downloads
from tpu_als.datasets.tfrecords import read_examples
from tpu_als.shards import open_shards
from tpu_als.shards.files import TOTALS, parquet_library
from tpu_als.shards.sharded_matrix import FORMAT
from tpu_als.shards.writer import write_totals
from tpu_als.storage.atomic import replacing
from tpu_als.storage.lock import FileLock

_ADDRESS = "https://storage.googleapis.com/gresearch/web_graph/"
_ROWS_AT_ONCE = 1 << 13
_DOWNLOADED = "downloaded"  # folder of the file that is being converted
_PARTS = "_parts.json"  # readers of shards ignore names that begin with "_"
_ABOUT = """WebGraph {variant}: links between pages, from a crawl of Common Crawl in June 2021.

Harsh Mehta, Steffen Rendle, Walid Krichene, Li Zhang. ALX: large scale matrix factorization on
TPUs. 2021. https://arxiv.org/abs/2112.02194
"""

log = logging.getLogger("tpu_als")


class _Variant(NamedTuple):
    folder: str
    n_files: int


_VARIANTS = {
    "sparse": _Variant("web_graph_min_10", 1000),
    "dense": _Variant("web_graph_min_50", 1000),
    "de-sparse": _Variant("web_graph_tld_de_min_10", 100),
    "de-dense": _Variant("web_graph_tld_de_min_50", 100),
    "in-sparse": _Variant("web_graph_tld_in_min_10", 10),
    "in-dense": _Variant("web_graph_tld_in_min_50", 10),
}
_SPLITS = {  # of the files: the directory, and the side in it
    "train": ("train", "user"),
    "train.transpose": ("train", "item"),
    "test": ("test", "user"),
}


def fetch_webgraph(
    variant: str = "in-dense",
    *,
    data_home: Any = None,
    download_if_missing: bool = True,
    n_retries: int = 3,
    show_progress: bool | None = None,
) -> Bunch:
    """Links of the web, downloaded and converted to sharded Parquet files at the first call.

    One file is downloaded, converted and removed at a time; the converted files stay. If a call
    ends early, the next one continues after the last converted file. `examples/webgraph.py`
    trains and evaluates on the result.

    Parameters
    ----------
    variant : str, default="in-dense"
        By ALX's paper: "in-dense" (0.5 million nodes, 0.12 billion links), "in-sparse" (1.5 and
        0.14), "de-dense" (5.7 and 0.82), "de-sparse" (19.7 and 1.19), "dense" (136.5 and 22) or
        "sparse" (365.4 and 30).
    data_home : path, optional
        Folder of the files. None means the environment variable TPU_ALS_DATA_HOME, or the user's
        cache folder.
    download_if_missing : bool, default=True
        False raises FileNotFoundError if the converted files are not complete.
    n_retries : int, default=3
        Further attempts after a failed download.
    show_progress : bool, optional
        Whether to show the progress of each download; None shows it on a terminal.

    Returns
    -------
    data : sklearn.utils.Bunch
        * ``train``: ShardedMatrix of the links, for `fit`;
        * ``test``: ShardedMatrix of the known links of the test nodes, which are not in ``train``;
          its `held_out` gives the links to find;
        * ``DESCR``: the source and the citation;
        * ``path``: the folder of both.

    Raises
    ------
    OSError
        If a file cannot be downloaded, or another process downloads to the same folder. The files
        that were converted before stay.
    ValueError
        For an unknown variant, or a damaged file.
    ImportError
        If pooch and google-crc32c, which the extra ``fetch`` installs, or pyarrow, which the extra
        ``shards`` installs, are missing.

    Notes
    -----
    The publisher gives no checksums of files. Those of the records are verified.
    """
    downloads.require_variant(variant, _VARIANTS)
    parquet_library()
    home = downloads.data_home(data_home)
    folder = home / f"webgraph-{variant}"
    directories = [folder / "train", folder / "test"]
    if not all((directory / TOTALS).exists() for directory in directories):
        if not download_if_missing:
            raise FileNotFoundError(
                f"{folder} has no complete data, and download_if_missing is False: allow the "
                f"download, or convert the files of {_ADDRESS}{_VARIANTS[variant].folder}"
            )
        options = {"n_retries": n_retries, "show_progress": show_progress}
        with _only_process(folder):
            _convert_all(_VARIANTS[variant], folder, options)
    train, test = map(open_shards, directories)
    about = _ABOUT.format(variant=variant)
    return Bunch(train=train, test=test, DESCR=about, path=folder)


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created, and removed again if it is empty at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    if not lock.acquire():
        raise OSError(
            f"another process ({lock.owner()}) downloads to {folder}: wait until it has ended, or "
            "choose another data_home"
        )
    try:
        lock.sign()
        yield
    finally:
        lock.release()
        folders = sorted(path for path in folder.rglob("*") if path.is_dir())
        for path in [*reversed(folders), folder]:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def _convert_all(variant: _Variant, folder: Path, options: dict[str, Any]) -> None:
    """Download and convert what is missing, and write the totals at the end."""
    done = _parts_of(folder)
    for split, (name, side) in _SPLITS.items():
        for number in range(variant.n_files):
            target = folder / name / side / f"part-{number:05d}.parquet"
            key = target.relative_to(folder).as_posix()
            if key in done and target.exists():
                continue
            remote = f"{variant.folder}/{split}.tfr-{number:05d}-of-{variant.n_files:05d}"
            file = downloads.RemoteFile(remote, _ADDRESS + remote, None)
            source = downloads.fetched(file, folder / _DOWNLOADED, **options)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                done[key] = convert(source, target, with_held_out=split == "test")
            finally:
                source.unlink()  # also if it is damaged, so that it is downloaded again
            with replacing(folder / _PARTS) as stream:
                stream.write(json.dumps(done).encode())
            log.info("%s: %d of %d files", folder, len(done), 3 * variant.n_files)
    shutil.rmtree(folder / _DOWNLOADED, ignore_errors=True)
    n_nodes = 1 + max(largest for _, _, largest in done.values())
    for name in ("train", "test"):
        counts = [part for key, part in done.items() if key.startswith(f"{name}/user/")]
        totals: dict[str, object] = {
            "format": FORMAT,
            "n_users": n_nodes,
            "n_items": n_nodes,
            "n_entries": sum(entries for _, entries, _ in counts),
            "n_shards": variant.n_files,
            "has_values": False,
        }
        write_totals(folder / name / TOTALS, totals)


def _parts_of(folder: Path) -> dict[str, list[int]]:
    """Rows, entries and the largest id of the files that are converted."""
    path = folder / _PARTS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def convert(source: Path, target: Path, *, with_held_out: bool = False) -> list[int]:
    """Convert a file of records to a Parquet file of shards.

    Parameters
    ----------
    source : Path
        TFRecord file with the integer features "row_tag", "col_tag" and "gt_tag".
    target : Path
        Parquet file with "row_id" and "col_ids", written atomically.
    with_held_out : bool, default=False
        Whether to write "gt_tag" too.

    Returns
    -------
    list of int
        The number of rows and of entries, and the largest id, -1 without rows.
    """
    pa, pq = parquet_library()
    names = ["col_ids", "gt_tag"] if with_held_out else ["col_ids"]
    lists = [(name, pa.list_(pa.int32())) for name in names]
    schema = pa.schema([("row_id", pa.int64()), *lists])
    n_rows, n_entries, largest = 0, 0, -1
    options = {"compression": "zstd", "write_page_checksum": True}
    with replacing(target) as stream, pq.ParquetWriter(stream, schema, **options) as writer:
        for rows, known, held_out in _blocks(source):
            matrices = [known, held_out] if with_held_out else [known]
            columns = [pa.array(rows, pa.int64())]
            for matrix in matrices:
                offsets = pa.array(matrix.indptr.astype(np.int32))
                values = pa.array(matrix.indices.astype(np.int32))
                columns.append(pa.ListArray.from_arrays(offsets, values))
                largest = max(largest, int(matrix.indices.max(initial=-1)))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            n_rows, n_entries = n_rows + len(rows), n_entries + known.nnz
            largest = max(largest, int(rows.max()))
    return [n_rows, n_entries, largest]


def _blocks(
    source: Path,
) -> Iterator[tuple[np.ndarray, sparse.csr_matrix, sparse.csr_matrix]]:
    """Ids of nodes, their links, and their held-out links; some thousands at a time."""
    examples = read_examples(source)
    while block := list(islice(examples, _ROWS_AT_ONCE)):
        for example in block:
            if len(example.get("row_tag", ())) != 1 or "col_tag" not in example:
                raise ValueError(
                    f"{source} has a record without one row_tag and a col_tag, but with "
                    f"{sorted(example)}: it is not a file of WebGraph"
                )
        rows = np.concatenate([example["row_tag"] for example in block])
        yield rows, _ones(block, "col_tag"), _ones(block, "gt_tag")


def _ones(block: list[dict[str, np.ndarray]], name: str) -> sparse.csr_matrix:
    """A matrix of ones whose rows have the ids of a feature as columns."""
    none = np.empty(0, dtype=np.int64)
    lists = [np.sort(example.get(name, none)) for example in block]
    indptr = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])])
    indices = np.concatenate(lists)
    width = int(indices.max(initial=-1)) + 1
    if width > np.iinfo(np.int32).max:
        raise ValueError(f"{name} has the id {width - 1}, which is not below 2**31 - 1")
    shape = (len(block), max(width, 1))
    return sparse.csr_matrix((np.ones(len(indices), np.float32), indices, indptr), shape=shape)
