"""MovieLens: ratings of films."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pandas as pd
from sklearn.utils import Bunch

from tpu_als.datasets import downloads

_ADDRESS = "https://files.grouplens.org/datasets/movielens/"
_RATINGS = ["user", "item", "rating", "timestamp"]
_ABOUT = """MovieLens {variant}: {size}.

Ratings are from 0.5 or 1 to 5 stars. Users were chosen at random from those with 20 ratings or
more. The data may be used for research under the conditions of its README, and may not be
redistributed; commercial use needs a permission: https://grouplens.org/datasets/movielens/

F. Maxwell Harper, Joseph A. Konstan. The MovieLens datasets: history and context. ACM Transactions
on Interactive Intelligent Systems 5(4), 2015.
"""


class _Variant(NamedTuple):
    """An archive: the MD5 that GroupLens gives, and what it holds."""

    md5: str
    size: str


_VARIANTS = {
    "100k": _Variant(
        "0e33842e24a9c977be4e0107933c0723", "100,000 ratings of 1,682 films by 943 users"
    ),
    "1m": _Variant(
        "c4d9eecfca2ab87c1945afe126590906", "1,000,209 ratings of 3,706 films by 6,040 users"
    ),
    "20m": _Variant(
        "cd245b17a1ae2cc31bb14903e1204af3", "20,000,263 ratings of 26,744 films by 138,493 users"
    ),
    "32m": _Variant(
        "d472be332d4daa821edc399621853b57", "32,000,204 ratings of 84,432 films by 200,948 users"
    ),
}


def fetch_movielens(
    variant: str = "100k",
    *,
    data_home: Any = None,
    download_if_missing: bool = True,
    n_retries: int = 3,
    show_progress: bool | None = None,
) -> Bunch:
    """Ratings of films, which are downloaded from GroupLens at the first call.

    Parameters
    ----------
    variant : {"100k", "1m", "20m", "32m"}, default="100k"
        Number of ratings. Downloads have 5 MB, 6 MB, 190 MB and 239 MB.
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
        * ``frame``: DataFrame with a row for each rating, and the columns "user" and "item"
          (integer ids), "rating" (float) and "timestamp" (datetime64[s], UTC without a zone);
        * ``item_frame``: DataFrame of the films by id, with "title" and "genres", joined by "|";
        * ``user_frame``: DataFrame of the users by id, with "gender", "age", "occupation" and
          "zip"; None for "20m" and "32m";
        * ``DESCR``: the source, its conditions, and the citation that it asks for;
        * ``path``: the downloaded archive.

    Raises
    ------
    OSError
        If the archive is missing and cannot be downloaded. Nothing is stored then.
    ValueError
        For an unknown variant, or an archive with other contents.
    ImportError
        If pooch, which the extra ``fetch`` installs, is missing.

    Examples
    --------
    >>> from tpu_als import Recommender
    >>> films = fetch_movielens("100k")  # doctest: +SKIP
    >>> rec = Recommender(value="rating", timestamp="timestamp")  # doctest: +SKIP
    >>> rec.fit(films.frame[films.frame["rating"] >= 4])  # doctest: +SKIP
    """
    downloads.require_variant(variant, _VARIANTS)
    name = f"ml-{variant}.zip"
    archive = downloads.RemoteFile(name, _ADDRESS + name, f"md5:{_VARIANTS[variant].md5}")
    path = downloads.fetched(
        archive,
        downloads.data_home(data_home),
        download_if_missing=download_if_missing,
        n_retries=n_retries,
        show_progress=show_progress,
    )
    return read_movielens(path, variant)


def read_movielens(path: Path, variant: str) -> Bunch:
    """The contents of an archive of MovieLens.

    Parameters
    ----------
    path : Path
        A zip file as GroupLens publishes it.
    variant : str
        As in `fetch_movielens`.
    """
    read = {"100k": _read_100k, "1m": _read_1m}.get(variant, _read_csv)
    with zipfile.ZipFile(path) as archive:
        try:
            frame, items, users = read(archive, f"ml-{variant}/")
        except KeyError as error:
            raise ValueError(
                f"{path} is not the archive of MovieLens {variant}: {error}"
            ) from error
    frame = frame.astype({"rating": "float32"})
    frame["timestamp"] = frame["timestamp"].astype("int64").astype("datetime64[s]")
    about = _ABOUT.format(variant=variant, size=_VARIANTS[variant].size)
    return Bunch(frame=frame, item_frame=items, user_frame=users, DESCR=about, path=path)


def _read_100k(archive: zipfile.ZipFile, folder: str) -> tuple[pd.DataFrame, ...]:
    with archive.open(f"{folder}u.data") as file:
        frame = _table(file, _RATINGS, "\t")
    with archive.open(f"{folder}u.genre") as file:
        genres = _table(file, ["genre", "place"], "|")["genre"].tolist()
    names = ["item", "title", "released", "video", "url", *genres]
    with archive.open(f"{folder}u.item") as file:
        films = _table(file, names, "|").set_index("item")
    flags = films[genres].to_numpy(dtype=bool)
    joined = ["|".join(genre for genre, has in zip(genres, row, strict=True) if has)
              for row in flags]  # fmt: skip
    with archive.open(f"{folder}u.user") as file:
        users = _table(file, ["user", "age", "gender", "occupation", "zip"], "|")
    return frame, films[["title"]].assign(genres=joined), users.set_index("user")


def _read_1m(archive: zipfile.ZipFile, folder: str) -> tuple[pd.DataFrame, ...]:
    columns = {
        "ratings": _RATINGS,
        "movies": ["item", "title", "genres"],
        "users": ["user", "gender", "age", "occupation", "zip"],
    }
    tables = {}
    for name, names in columns.items():
        # pandas reads one-character separators much faster, and no title has a tab.
        text = archive.read(f"{folder}{name}.dat").replace(b"::", b"\t")
        tables[name] = _table(io.BytesIO(text), names, "\t")
    return (
        tables["ratings"], tables["movies"].set_index("item"), tables["users"].set_index("user"),
    )  # fmt: skip


def _read_csv(archive: zipfile.ZipFile, folder: str) -> tuple[pd.DataFrame, pd.DataFrame, None]:
    kinds = {"userId": "int32", "movieId": "int32", "rating": "float32", "timestamp": "int64"}
    with archive.open(f"{folder}ratings.csv") as file:
        frame = pd.read_csv(file, dtype=kinds)
    with archive.open(f"{folder}movies.csv") as file:
        items = pd.read_csv(file, index_col="movieId")
    frame = frame.rename(columns={"userId": "user", "movieId": "item"})
    return frame[_RATINGS], items[["title", "genres"]].rename_axis("item"), None


def _table(file: IO[bytes], names: Sequence[str], separator: str) -> pd.DataFrame:
    """A table without a header, in the encoding of the two oldest variants."""
    kinds = {"zip": str, "genre": str, "title": str}
    with downloads.exact_columns():
        return pd.read_csv(
            file, sep=separator, names=list(names), encoding="latin-1", quoting=3, dtype=kinds,
            index_col=False, keep_default_na=False, na_values={"released": [""], "video": [""]},
        )  # fmt: skip
