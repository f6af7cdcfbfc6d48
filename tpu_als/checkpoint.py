"""Models to and from .npz files that implicit reads and writes too: atomic, and never unpickled."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PREFIX = "tpu_als_"
FORMAT = 1
# implicit's own names. Its loader sets every other key as an attribute nobody reads.
_IMPLICIT = frozenset(
    "user_factors item_factors regularization factors num_threads iterations use_native use_cg "
    "cg_steps calculate_training_loss dtype random_state alpha".split()
)


def save_npz(target: str | os.PathLike | BinaryIO, values: dict[str, Any]) -> None:
    """Write named values in implicit's format.

    Parameters
    ----------
    target : str, path or binary file object
        A path gets ".npz" where it lacks it, and is replaced only once the new file is complete.
    values : dict
        Arrays, numbers and strings. None, and what NumPy could only pickle (generators, device
        handles), is left out. Names that implicit lacks are prefixed.
    """
    arrays = {"tpu_als_format": np.asarray(FORMAT)}
    for name, value in values.items():
        array = None if value is None else np.asarray(value)
        if array is not None and not array.dtype.hasobject:
            arrays[name if name in _IMPLICIT else PREFIX + name] = array
    if hasattr(target, "write"):
        np.savez(target, **arrays)
        return
    with _replacing(_with_suffix(target)) as file:
        np.savez(file, **arrays)


def load_npz(source: str | os.PathLike | BinaryIO) -> dict[str, Any]:
    """Read what `save_npz`, or implicit's `save`, wrote.

    Parameters
    ----------
    source : str, path or binary file object
        A path may lack its ".npz".

    Returns
    -------
    values : dict
        By name without prefix; arrays without axes are Python numbers and strings.

    Raises
    ------
    FileNotFoundError
        Where there is no such file.
    ValueError
        Where the file holds pickled objects, or comes from a later format.
    """
    if not hasattr(source, "read") and not Path(source).is_file():
        source = _with_suffix(source)
    with np.load(source, allow_pickle=False) as data:
        values = {}
        for key in data.files:
            value = data[key]
            values[key.removeprefix(PREFIX)] = value.item() if value.ndim == 0 else value
    found = values.pop("format", FORMAT)
    if found > FORMAT:
        raise ValueError(
            f"the file has format {found}, but this version reads formats up to {FORMAT}: "
            "it was written by a later tpu_als; upgrade to read it"
        )
    return values


def _with_suffix(path: str | os.PathLike) -> Path:
    text = os.fspath(path)
    return Path(text if text.endswith(".npz") else text + ".npz")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name `path` only after all of it is on disk."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
