"""Last.fm: how often listeners played artists."""

from __future__ import annotations

import csv
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pandas as pd
from sklearn.utils import Bunch

from tpu_als.datasets import downloads
from tpu_als.exceptions import DataWarning

_ARCHIVE = downloads.RemoteFile(
    "lastfm-dataset-360K.tar.gz",
    "https://zenodo.org/records/6090214/files/lastfm-dataset-360K.tar.gz",
    "md5:635e6ed3fc873aa4ba33aba0ebce02b1",
)
_PLAYS = "usersha1-artmbid-artname-plays.tsv"
_PROFILES = "usersha1-profile.tsv"
_ROWS_AT_ONCE = 1 << 20
_MOST_PLAYS = (1 << 31) - 1
_ABOUT = """Last.fm 360K: plays of artists by 359,347 listeners, 17,559,530 lines.

The data were collected through the interface of Last.fm, which permits their non-commercial use:
https://zenodo.org/records/6090214

Oscar Celma. Music recommendation and discovery. Springer, 2010.
"""


def fetch_lastfm_360k(
    *,
    data_home: Any = None,
    download_if_missing: bool = True,
    n_retries: int = 3,
    show_progress: bool | None = None,
) -> Bunch:
    """Plays of artists by listeners, which are downloaded from Zenodo at the first call.

    The download has 569 MB.

    Parameters
    ----------
    data_home : path, optional
        Folder of the downloaded file. None means the environment variable TPU_ALS_DATA_HOME, or
        the user's cache folder.
    download_if_missing : bool, default=True
        False raises FileNotFoundError if the file is not in the folder.
    n_retries : int, default=3
        Further attempts after a failed download.
    show_progress : bool, optional
        Whether to show the progress of the download; None shows it on a terminal.

    Returns
    -------
    data : sklearn.utils.Bunch
        * ``frame``: DataFrame with a row for each listener and artist, and the columns "user" (a
          hash, categorical), "item" (the artist's name, categorical) and "plays" (int32). The same
          name may occur twice for a listener, with two MusicBrainz ids;
        * ``user_frame``: DataFrame of the listeners by id, with "gender", "age", "country" and
          "signup", as text, "" where it is not known;
        * ``DESCR``: the source, its conditions, and the citation that it asks for;
        * ``path``: the downloaded archive.

    Raises
    ------
    OSError
        If the archive is missing and cannot be downloaded. Nothing is stored then.
    ValueError
        For an archive with other contents.
    ImportError
        If pooch, which the extra ``fetch`` installs, is missing.

    Warns
    -----
    DataWarning
        With the number of lines that were left out, because the artist is empty or plays is not a
        whole number below 2**31.

    Examples
    --------
    >>> from tpu_als import Recommender
    >>> music = fetch_lastfm_360k()  # doctest: +SKIP
    >>> rec = Recommender(value="plays").fit(music.frame)  # doctest: +SKIP
    """
    path = downloads.fetched(
        _ARCHIVE,
        downloads.data_home(data_home),
        download_if_missing=download_if_missing,
        n_retries=n_retries,
        show_progress=show_progress,
    )
    return read_lastfm_360k(path)


def read_lastfm_360k(path: Path) -> Bunch:
    """The contents of the archive of Last.fm 360K.

    Parameters
    ----------
    path : Path
        A compressed tar file as Zenodo has it.
    """
    tables: dict[str, Any] = {}
    with tarfile.open(path, "r:gz") as archive:  # members in order, so it is decompressed once
        for member in archive:
            name = member.name.rpartition("/")[2]
            is_table = member.isfile() and name in (_PLAYS, _PROFILES)
            file = archive.extractfile(member) if is_table else None
            if file is not None:
                tables[name] = _plays(file) if name == _PLAYS else _profiles(file)
    if missing := {_PLAYS, _PROFILES} - {*tables}:
        raise ValueError(f"{path} is not the archive of Last.fm 360K: it has no {sorted(missing)}")
    frame, n_left_out = tables[_PLAYS]
    if n_left_out:
        warnings.warn(
            f"{n_left_out} of {len(frame) + n_left_out} lines were left out, because the artist is "
            "empty or plays is not a whole number below 2**31",
            DataWarning,
            stacklevel=3,
        )
    return Bunch(frame=frame, user_frame=tables[_PROFILES], DESCR=_ABOUT, path=path)


def _plays(file: IO[bytes]) -> tuple[pd.DataFrame, int]:
    """Listeners, artists and plays; and the number of lines without an artist or a number."""
    names = ["user", "mbid", "item", "plays"]
    users, items = _Codes(), _Codes()
    parts, n_left_out = [], 0
    for block in _blocks(file, names):
        plays = pd.to_numeric(block["plays"], errors="coerce")
        is_count = (plays >= 0) & (plays % 1 == 0) & (plays <= _MOST_PLAYS)
        is_good = is_count & (block["item"].str.strip() != "")
        n_left_out += int((~is_good).sum())
        kept = block[is_good]
        parts.append(
            pd.DataFrame({
                "user": users.of(kept["user"]),
                "item": items.of(kept["item"].str.strip()),
                "plays": plays[is_good].astype("int32"),
            })
        )  # fmt: skip
    frame = pd.concat(parts, ignore_index=True)
    frame["user"] = pd.Categorical.from_codes(frame["user"], users.labels())
    frame["item"] = pd.Categorical.from_codes(frame["item"], items.labels())
    return frame, n_left_out


def _profiles(file: IO[bytes]) -> pd.DataFrame:
    names = ["user", "gender", "age", "country", "signup"]
    return pd.concat(_blocks(file, names)).set_index("user")


def _blocks(file: IO[bytes], names: list[str]) -> Iterator[pd.DataFrame]:
    """Parts of a table of texts without a header; quotes are part of the texts."""
    with downloads.exact_columns():
        yield from pd.read_csv(
            file, sep="\t", names=names, dtype=str, quoting=csv.QUOTE_NONE, keep_default_na=False,
            encoding="utf-8", encoding_errors="replace", index_col=False, chunksize=_ROWS_AT_ONCE,
        )  # fmt: skip


class _Codes:
    """Numbers for texts, in the order in which they first occur."""

    def __init__(self) -> None:
        self._index = pd.Index([], dtype=object)

    def of(self, texts: pd.Series) -> Any:
        """The code of each text."""
        new = pd.Index(texts.unique(), dtype=object)
        self._index = self._index.append(new[self._index.get_indexer(new) < 0])
        return self._index.get_indexer(pd.Index(texts, dtype=object)).astype("int32")

    def labels(self) -> pd.Index:
        """The texts by code."""
        return self._index
