"""Public data sets, downloaded once into a folder of the user."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import pandas as pd

from tpu_als.storage.atomic import replacing

HOME = "TPU_ALS_DATA_HOME"  # environment variable
_TIMEOUT = 30  # seconds without an answer or a byte
_LONGEST_PAUSE = 10  # seconds between two attempts

log = logging.getLogger("tpu_als")


@dataclass(frozen=True)
class RemoteFile:
    """A file to download.

    Attributes
    ----------
    name : str
        Its name in the folder, which may include a folder.
    url : str
        Its address.
    checksum : str or None
        Such as "md5:0e33842e24a9c977be4e0107933c0723", as its publisher gives it; None if there is
        none.
    """

    name: str
    url: str
    checksum: str | None


def data_home(given: str | os.PathLike[str] | None = None) -> Path:
    """The folder of downloaded data: the given one, or TPU_ALS_DATA_HOME, or the user's cache.

    Parameters
    ----------
    given : path, optional
        The caller's choice; "~" is expanded. The folder need not exist.

    Raises
    ------
    TypeError, ValueError
        If it is not a path, or an empty one.
    NotADirectoryError
        If it is a file.
    """
    named = given if given is not None else os.environ.get(HOME)
    if named is not None and not isinstance(named, (str, os.PathLike)):
        raise TypeError(f"data_home must be a path or None, got {type(named).__name__}")
    if given is not None and not os.fspath(given):
        raise ValueError("data_home must be a path or None, got an empty text")
    try:
        home = Path(named).expanduser() if named else Path(_pooch().os_cache("tpu_als"))
    except RuntimeError as error:  # "~somebody" who has no home folder
        raise ValueError(f"data_home {named!r}: {error}") from error
    if home.exists() and not home.is_dir():
        raise NotADirectoryError(f"data_home must be a folder, and {home} is a file")
    return home.absolute()


def require_variant(variant: object, variants: Collection[str]) -> None:
    """Raise ValueError unless `variant` is one of the names in `variants`."""
    if not isinstance(variant, str) or variant not in variants:
        raise ValueError(f"variant must be one of {[*variants]}, got {variant!r}")


def fetched(
    file: RemoteFile,
    home: Path,
    *,
    download_if_missing: bool = True,
    n_retries: int = 3,
    show_progress: bool | None = None,
) -> Path:
    """The path of a file, which is downloaded if it is missing or damaged.

    It gets its name only when it is complete and its checksum is right. A process that is killed
    leaves a temporary file, which the next download of the file removes.

    Parameters
    ----------
    file : RemoteFile
        What to download.
    home : Path
        Where to.
    download_if_missing : bool, default=True
        Whether it may be downloaded.
    n_retries : int, default=3
        Further attempts after a failure, with growing pauses of at most 10 seconds.
    show_progress : bool, optional
        Whether to show a bar on the standard error; None shows it on a terminal.

    Returns
    -------
    Path

    Raises
    ------
    OSError
        If the file is missing and may not be, or cannot be, downloaded.
    """
    path = home / file.name
    if not download_if_missing and not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist, and download_if_missing is False: allow the download, or put "
            f"the file {file.url} there"
        )
    if not isinstance(n_retries, Integral) or n_retries < 0:
        raise ValueError(f"n_retries must be an integer of at least 0, got {n_retries!r}")
    if path.exists():
        with path.open("rb") as present:
            if file.checksum is None or _checksum(present, file.checksum) == file.checksum:
                return path
    if not download_if_missing:
        raise OSError(
            f"{path} is damaged: its checksum is not {file.checksum}. Remove it and allow the "
            f"download, or replace it by the file {file.url}"
        )
    log.info("downloading %s to %s", file.url, path)
    shows = sys.stderr.isatty() if show_progress is None else show_progress
    downloader = _pooch().HTTPDownloader(progressbar=bool(shows), timeout=_TIMEOUT)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as part:
            _download(file, part, downloader, int(n_retries))
        return path
    except Exception as error:  # those of requests, and ValueError for a wrong checksum
        is_there = path.exists()
        state = (
            f"The file that is at {path} has another checksum" if is_there else "Nothing was stored"
        )
        advice = (
            "replace it by one that you get in another way"
            if is_there
            else (f"get the file in another way and put it at {path}")
        )
        raise OSError(
            f"cannot download {file.url}: {type(error).__name__}: {error}. {state}. Try again "
            f"later, or {advice}"
        ) from error


def _download(
    file: RemoteFile, part: BinaryIO, downloader: Callable[..., object], n_retries: int
) -> None:
    """Download to an open file; after a failure wait and start again, up to `n_retries` times."""
    from requests.exceptions import RequestException

    for n_left in range(n_retries, -1, -1):
        try:
            part.seek(0)
            part.truncate()
            downloader(file.url, part, None)
            if file.checksum is not None:
                found = _checksum(part, file.checksum)
                if found != file.checksum:
                    raise ValueError(f"the checksum is {found}, and not {file.checksum}")
            return
        except (ValueError, RequestException) as error:
            if not n_left:
                raise
            log.info("cannot download %s: %s; further attempts: %d", file.url, error, n_left)
            time.sleep(min(n_retries - n_left + 1, _LONGEST_PAUSE))


def _checksum(file: BinaryIO, expected: str) -> str:
    """The checksum of an open file, by the algorithm of the expected one."""
    algorithm, _, _ = expected.partition(":")
    file.seek(0)
    digest = hashlib.file_digest(
        file,  # type: ignore[arg-type]  # every binary file has readinto
        lambda: hashlib.new(algorithm, usedforsecurity=False),
    )
    return f"{algorithm}:{digest.hexdigest()}"


@contextlib.contextmanager
def exact_columns() -> Iterator[None]:
    """Scope in which pandas refuses a table with more columns than names, with a ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            yield
        except pd.errors.ParserWarning as error:
            raise ValueError(f"the file has another number of columns: {error}") from error


def _pooch() -> ModuleType:
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            "downloads need the package pooch: pip install 'tpu-als[fetch]'"
        ) from error
    return pooch
