"""Read events from frames of any library, or from CSV and Parquet files, as a pandas DataFrame."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

_MISSING = ["", "NA", "N/A", "NaN", "nan", "NULL", "null", "None"]
_CSV = (".csv", ".csv.gz", ".csv.bz2", ".csv.xz", ".csv.zip", ".csv.zst")
_UNREADABLE = pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError
_PARQUET = (".parquet", ".pq")
_KNOWN = "a DataFrame of pandas, polars or PyArrow, a DuckDB relation, or the path or glob of files"


def read(events: object, columns: list[str], ids: list[str]) -> tuple[pd.DataFrame, str, bool]:
    """Read columns of events.

    Parameters
    ----------
    events : frame, path, or list of paths
        As in `Recommender.fit`.
    columns : list of str
        The columns to read; a DataFrame of pandas is returned with all of its columns. The caller
        reports missing columns.
    ids : list of str
        The columns among them that hold ids. They are read from CSV files as text, and dates stay
        dates. Names that the frame lacks are ignored.

    Returns
    -------
    frame : DataFrame
    library : str
        Name of the frame library: "pandas", "polars", "pyarrow", "duckdb" and others that narwhals
        supports; "pandas" for files.
    is_text : bool
        Whether all events come from CSV files, whose ids are read as text.

    Raises
    ------
    FileNotFoundError
        If there are no such files.
    ImportError
        For Parquet files without pyarrow.
    TypeError
        For anything else.
    """
    if isinstance(events, pd.DataFrame):
        return events, "pandas", False
    if isinstance(events, (str, os.PathLike)) or _are_paths(events):
        paths = _paths_of(events)
        is_text = all(path.name.endswith(_CSV) for path in paths)
        return _read_files(paths, columns, ids), "pandas", is_text
    return *_read_frame(events, columns, ids), False


def _are_paths(events: object) -> bool:
    return (
        isinstance(events, (list, tuple))
        and bool(events)
        and all(isinstance(path, (str, os.PathLike)) for path in events)
    )


def _paths_of(given: Any) -> list[Path]:
    """The files that paths, directories and globs name, in order of their names."""
    if _is_text_in_parts(given):
        raise TypeError(
            f"events are the single characters {given!r:.40}: scikit-learn's searches and splits "
            "divide a path into its characters. Pass them a frame, such as pandas.read_csv(path) "
            "or pandas.read_parquet(path)"
        )
    found: list[Path] = []
    for one in [given] if isinstance(given, (str, os.PathLike)) else given:
        path = Path(os.fspath(one))
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if _is_data(p.relative_to(path)))
        elif path.exists():
            files = [path]
        else:
            files = [Path(name) for name in sorted(glob.glob(os.fspath(one), recursive=True))]
        if not files:
            raise FileNotFoundError(f"no CSV or Parquet files at {os.fspath(one)!r}")
        found += files
    return found


def _is_text_in_parts(given: Any) -> bool:
    """Whether a list holds characters, as scikit-learn takes them from a path for a fold."""
    if isinstance(given, (str, os.PathLike)) or len(given) < 2:
        return False
    are_characters = all(isinstance(one, str) and len(one) == 1 for one in given)
    return are_characters and not all(map(os.path.isfile, given))


def _is_data(path: Path) -> bool:
    """Whether a file of a directory has events; names with "_" or "." are those of other files."""
    is_hidden = any(part.startswith(("_", ".")) for part in path.parts)
    return path.name.endswith((*_CSV, *_PARQUET)) and not is_hidden


def _read_files(paths: list[Path], columns: list[str], ids: list[str]) -> pd.DataFrame:
    unknown = [path for path in paths if not path.name.endswith((*_CSV, *_PARQUET))]
    if unknown:
        raise ValueError(
            f"{unknown[0]} must be a CSV or Parquet file, with one of {(*_CSV, *_PARQUET)}"
        )
    frames = [_read_csv(path, columns, ids) for path in paths if path.name.endswith(_CSV)]
    parquet = [path for path in paths if path.name.endswith(_PARQUET)]
    if parquet:
        frames.append(_read_parquet(parquet, columns))
    return frames[0] if len(frames) == 1 else pd.concat(frames, ignore_index=True)


def _read_csv(path: Path, columns: list[str], ids: list[str]) -> pd.DataFrame:
    # The text "NA" may be an id.
    missing = {name: [""] if name in ids else _MISSING for name in columns}
    try:
        header = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False)
        names = header.iloc[0].tolist()
        # All columns are read: with `usecols` pandas accepts lines with too many fields.
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                path, index_col=False, dtype=dict.fromkeys(ids, str), na_values=missing,
                keep_default_na=False,
            )  # fmt: skip
    except (*_UNREADABLE, UnicodeError) as error:
        raise ValueError(
            f"{path} cannot be read as a CSV file in UTF-8 with a header: {error}. Fix the file, "
            "or read it with pandas.read_csv and pass the frame"
        ) from error
    for name in columns:
        if names.count(name) > 1:
            raise ValueError(f"{path} has {names.count(name)} columns named {name!r}, expected one")
        if name not in names:
            raise ValueError(f"{path} has no column {name!r}, only {names}")
    return frame[columns]


def _read_parquet(paths: list[Path], columns: list[str]) -> pd.DataFrame:
    try:
        from pyarrow import dataset
    except ImportError as error:
        message = f"{paths[0]}: Parquet files need pyarrow: pip install 'tpu-als[shards]'"
        raise ImportError(message) from error
    files = dataset.dataset(paths, format="parquet")
    present = [name for name in columns if name in files.schema.names]
    return files.to_table(columns=present).to_pandas(split_blocks=True, self_destruct=True)


def _read_frame(events: object, columns: list[str], ids: list[str]) -> tuple[pd.DataFrame, str]:
    import narwhals as nw  # late: pandas frames do not need it

    try:
        frame: Any = nw.from_native(events)
    except TypeError as error:
        kind = f"{type(events).__module__}.{type(events).__qualname__}"
        raise TypeError(f"events must be {_KNOWN}, got {kind}") from error
    library = str(frame.implementation.value)
    schema = frame.collect_schema()
    present = [name for name in columns if name in schema]
    dates = [name for name in present if name in ids and schema[name] == nw.Date]
    frame = frame.select(present)
    if isinstance(frame, nw.LazyFrame):
        frame = frame.collect()
    try:
        found = frame.to_pandas()
    except ModuleNotFoundError:  # polars converts text to pandas through pyarrow
        found = pd.DataFrame({name: frame[name].to_numpy() for name in present})
    return found.assign(**{name: _as_dates(found[name]) for name in dates}), library


def _as_dates(column: pd.Series) -> pd.Series:
    """Dates as objects, as in lists. narwhals converts those of polars to times."""
    if column.dtype.kind != "M":
        return column
    codes, distinct = pd.factorize(column)
    dates = pd.Index(pd.DatetimeIndex(distinct).date, dtype=object)
    return pd.Series(pd.Categorical.from_codes(codes, dates), column.index, name=column.name)


def names_of(frame: Any) -> list[str]:
    """The columns of a frame of any library."""
    if isinstance(frame, pd.DataFrame):
        return list(frame.columns)
    import narwhals as nw

    return list(nw.from_native(frame).collect_schema().names())


def as_library(columns: Mapping[str, object], library: str) -> Any:
    """A frame of a library with these columns (arrays or pandas Series of one length)."""
    frame = pd.DataFrame(columns)
    if library == "pandas":
        return frame
    import narwhals as nw

    eager: Any = "pyarrow" if library == "duckdb" else library
    series = {name: _plain_values(frame[name]) for name in frame}
    # An empty list has no type, but text is the usual one.
    types = {name: nw.String if isinstance(v, list) else None for name, v in series.items()}
    made = nw.from_dict(series, backend=eager)
    if not len(frame):
        made = made.with_columns(nw.col(name).cast(t) for name, t in types.items() if t)
    made = made.to_native()
    if library != "duckdb":
        return made
    import duckdb

    return duckdb.from_arrow(made)


def _plain_values(series: pd.Series) -> np.ndarray | list[object]:
    """Values that other libraries convert to their own type."""
    is_numeric = isinstance(series.dtype, np.dtype) and series.dtype.kind in "biufM"
    return series.to_numpy() if is_numeric else series.to_list()
