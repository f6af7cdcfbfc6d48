"""Models to and from .npz files that implicit reads and writes too: atomic, and never unpickled."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ._atomic import replacing
from .validation import storage_dtype

PREFIX = "tpu_als_"
FORMAT = 1
# implicit's own names. Its loader sets every other key as an attribute nobody reads.
_IMPLICIT = frozenset(
    {
        "user_factors",
        "item_factors",
        "regularization",
        "factors",
        "num_threads",
        "iterations",
        "use_native",
        "use_cg",
        "cg_steps",
        "calculate_training_loss",
        "dtype",
        "random_state",
        "alpha",
    }
)
_SERIES = "history_"


def save_model(
    target: str | os.PathLike | BinaryIO, parameters: dict[str, Any], fitted: dict[str, Any]
) -> None:
    """Write an estimator's parameters and fitted attributes.

    Parameters
    ----------
    target : str, path or binary file object
        As in `save_npz`.
    parameters : dict
        Constructor parameters. Random generators and device handles are left out. A subclass may
        lack any.
    fitted : dict
        Any of user_factors, item_factors, feature_names_in_, n_iter_ and history_.
    """
    # Subclasses may have parameters of their own only.
    name = storage_dtype(parameters.get("dtype", np.float32))
    values = {**parameters, **fitted}
    # implicit knows no bfloat16, but reads what it finds under its own names.
    values.update(dtype=name.replace("bfloat16", "float32"), storage_dtype=name)
    if not isinstance(values.get("devices"), int):
        values["devices"] = None
    if values.get("checkpoint_dir") is not None:
        values["checkpoint_dir"] = os.fspath(values["checkpoint_dir"])
    if values.get("feature_names_in_") is not None:
        values["feature_names_in_"] = values["feature_names_in_"].astype(str)
    for key, series in (values.pop("history_", None) or {}).items():
        values[_SERIES + key] = np.asarray(series, np.float64)
    save_npz(target, values)


def load_model(
    source: str | os.PathLike | BinaryIO, parameter_names: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save_model`, or implicit's `save`, wrote.

    Parameters
    ----------
    source : str, path or binary file object
        As in `load_npz`.
    parameter_names : iterable of str
        Constructor parameters to look for.

    Returns
    -------
    parameters, fitted : dict
        Of what the file holds; other keys are ignored.
    """
    values = load_npz(source)
    parameter_names = set(parameter_names)
    parameters = {name: values[name] for name in parameter_names if name in values}
    name = values.get("storage_dtype", values.get("dtype", "float32"))
    if "dtype" in parameter_names:
        parameters["dtype"] = name if name == "bfloat16" else np.dtype(name).type
    plain = ("user_factors", "item_factors", "n_iter_")
    fitted = {name: values[name] for name in plain if name in values}
    if "feature_names_in_" in values:
        fitted["feature_names_in_"] = values["feature_names_in_"].astype(object)
    series = {k.removeprefix(_SERIES): v for k, v in values.items() if k.startswith(_SERIES)}
    if series:
        fitted["history_"] = {key: np.atleast_1d(v).tolist() for key, v in series.items()}
    return parameters, fitted


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
    arrays: dict[str, Any] = {PREFIX + "format": np.asarray(FORMAT)}
    for name, value in values.items():
        array = None if value is None else np.asarray(value)
        if array is not None and not array.dtype.hasobject:
            arrays[name if name in _IMPLICIT else PREFIX + name] = array
    if hasattr(target, "write"):
        np.savez(target, **arrays)
        return
    with replacing(_with_suffix(target)) as file:
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
