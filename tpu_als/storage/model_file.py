"""Save and load models as .npz files in implicit's format, atomically and without pickle."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tpu_als import parameters as rules
from tpu_als.exceptions import DataWarning, ModelFileError
from tpu_als.storage import feature_keys
from tpu_als.storage.atomic import replacing
from tpu_als.storage.npz import Header, NpzFile, write_npz
from tpu_als.validation.tables import factor_table, same_width

PREFIX = "tpu_als_"
FORMAT = 2  # files without features are written as format 1, which earlier versions read
# The keys that implicit uses. implicit loads other keys as attributes and never reads them.
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
# Only the ALS model of implicit has all of these keys.
_IMPLICIT_ALS = {"factors", "regularization", "iterations", "use_cg"}
_TABLES = ("user_factors", "item_factors")
_SERIES, _OWN, _JSON = "history_", "own_", "json_"
_KNOWN_SCALARS = ("format", "storage_dtype")
_NEVER_LOADED = ("checkpoint_dir",)  # a file must not choose where the next fit writes


def save_model(
    target: str | os.PathLike | BinaryIO,
    parameters: Mapping[str, object],
    fitted: Mapping[str, Any],
    own: Mapping[str, object] | None = None,
) -> list[str]:
    """Write an estimator's parameters and fitted attributes.

    Parameters
    ----------
    target : str, path or binary file object
        As in `save_npz`.
    parameters : dict
        Constructor parameters. Random generators, device handles and `checkpoint_dir` are not
        saved.
    fitted : dict
        Any of user_factors, item_factors, feature_names_in_, item_popularity_, n_iter_, history_,
        assigned, the names of tables that the next fit starts from, and keys of `feature_keys`.
    own : dict, optional
        A subclass's own parameters. Arrays, numbers and text are saved, and lists, dicts and tuples
        of them.

    Returns
    -------
    unsaved : list of str
        Names of parameters whose values the file cannot hold.

    Raises
    ------
    ValueError
        If the tables hold NaN or infinity, or if their widths and `factors` are not all equal.
    """
    parameters = {key: _plain_number(value) for key, value in parameters.items()}
    name = rules.storage_dtype(parameters.get("dtype", np.float32))
    values = {k: v for k, v in {**parameters, **fitted}.items() if k not in _NEVER_LOADED}
    # implicit reads "dtype" and does not support bfloat16.
    values.update(dtype=name.replace("bfloat16", "float32"), storage_dtype=name)
    if not isinstance(values.get("devices"), int):
        values["devices"] = None
    if values.get("feature_names_in_") is not None:
        values["feature_names_in_"] = values["feature_names_in_"].astype(str)
    values["assigned"] = ",".join(values.get("assigned") or ()) or None
    for key, series in (values.pop("history_", None) or {}).items():
        values[_SERIES + key] = np.asarray(series, np.float64)
    # Make the checks of `load_model` first: a file that it refuses must not replace a good one.
    _fitted({key: value for key, value in values.items() if value is not None})
    packed = {key: _packed(key, value) for key, value in (own or {}).items()}
    values.update(pair for pair in packed.values() if pair is not None)
    save_npz(target, values)
    unsaved = [key for key, value in parameters.items() if _is_unsaved(value, key)]
    return unsaved + [key for key, pair in packed.items() if pair is None]


def load_model(
    source: str | os.PathLike | BinaryIO,
    parameter_names: Iterable[str],
    own_names: Iterable[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a file written by `save_model` or by implicit's `save`.

    Parameters
    ----------
    source : str, path or binary file object
        As in `load_npz`.
    parameter_names : iterable of str
        Constructor parameters to read.
    own_names : iterable of str, optional
        Further parameters of a subclass to read.

    Returns
    -------
    parameters, fitted : dict
        The parameters and attributes in the file. Other keys and `checkpoint_dir` are ignored.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If there is no such file.
    ModelFileError
        If the file is damaged, is not a model of this class or of implicit's, or if its values
        contradict each other.
    """
    own_names, name = set(own_names), _name_of(source)
    values = load_npz(source, own_names)
    with _errors_naming(name):
        # implicit's GPU models may have float16 tables, which are read as float32.
        dtype = str(values.get("storage_dtype", values.get("dtype", "float32")))
        dtype = dtype.replace("float16", "float32") if dtype == "float16" else dtype
        values["dtype"] = (
            dtype if dtype == "bfloat16" else np.dtype(rules.storage_dtype(dtype)).type
        )
        wanted = [key for key in parameter_names if key in values and key not in _NEVER_LOADED]
        parameters = {key: values[key] for key in wanted}
        if parameters.get("linear_solver") == "subspace":  # removed; earlier files may have it
            warnings.warn(
                f"{name}: linear_solver 'subspace' was removed, so that fits use 'cg'",
                DataWarning,
                stacklevel=3,
            )
            parameters["linear_solver"] = "cg"
        rules.check_parameters(parameters)
        parameters.update(_unpacked(values, own_names))
        fitted = _fitted(values)
    return parameters, fitted


def _fitted(values: dict[str, Any]) -> dict[str, Any]:
    """Read fitted attributes from the values of a file; ValueError if they are inconsistent."""
    found: dict[str, Any] = {n: factor_table(values[n], n) for n in _TABLES if n in values}
    _check_widths([found.get(name) for name in _TABLES], values.get("factors"))
    if "feature_names_in_" in values:
        names = values["feature_names_in_"]
        if "item_factors" in found and len(names) != len(found["item_factors"]):
            raise ValueError(
                f"feature_names_in_ must have a name for each of the "
                f"{len(found['item_factors'])} items, got {len(names)}"
            )
        found["feature_names_in_"] = names.astype(object)
    if "item_popularity_" in values:
        counts = values["item_popularity_"]
        if "item_factors" not in found or len(counts) != len(found["item_factors"]):
            raise ValueError(f"item_popularity_ must have a count for each item, got {len(counts)}")
        if counts.min(initial=0) < 0:
            raise ValueError(f"item_popularity_ must be at least 0, got {counts.min()}")
        found["item_popularity_"] = counts.astype(np.int64)
    features = dict(feature_keys.unpacked(values, found))
    if features:
        found["features"] = features
    if "assigned" in values:
        found["assigned"] = tuple(values["assigned"].split(","))
        if not {f"{side}_factors" for side in found["assigned"]} <= found.keys():
            raise ValueError(f"assigned must name tables of the file, got {values['assigned']!r}")
    series = {k.removeprefix(_SERIES): v for k, v in values.items() if k.startswith(_SERIES)}
    lengths = {key: np.atleast_1d(value).size for key, value in series.items()}
    if "n_iter_" in values:
        found["n_iter_"] = lengths["n_iter_"] = values["n_iter_"]
    if len(set(lengths.values())) > 1:
        raise ValueError(f"history_ must have n_iter_ values in each series, got {lengths}")
    if series:
        found["history_"] = {key: np.atleast_1d(v).tolist() for key, v in series.items()}
    return found


def _check_widths(tables: list[np.ndarray | None], factors: object) -> None:
    widths = [table.shape[1] for table in tables if table is not None]
    if widths:
        same_width(widths[0], widths[-1])
    for name, table in zip(_TABLES, tables, strict=True):
        if table is not None and factors is not None and table.shape[1] != factors:
            raise ValueError(
                f"{name} must have as many columns as the parameter factors={factors}, got shape "
                f"{table.shape}. Set factors={table.shape[1]} before save"
            )


def _is_unsaved(value: object, name: str) -> bool:
    """Whether a parameter of the engine has a value that the file cannot hold."""
    if value is None or name in (*_NEVER_LOADED, "dtype"):
        return False
    if name == "devices":
        return not isinstance(value, int)
    return np.asarray(value).dtype.hasobject


def _plain_number(value: Any) -> Any:
    """Convert numbers that are objects in NumPy, such as fractions and 2**70, to float."""
    is_odd = isinstance(value, Real) and np.asarray(value).dtype.hasobject
    return float(value) if is_odd else value


def _packed(name: str, value: object) -> tuple[str, object] | None:
    """Key and value for a subclass's parameter in a file; None if the file cannot hold it."""
    if isinstance(value, (bool, int, float, str, np.generic, np.ndarray)):
        array = np.asarray(value)
        if array.dtype.kind in "biufcU" and (array.ndim or array.item() == value or value != value):
            return _OWN + name, array
    wrapped = {"tuple": list(value)} if isinstance(value, tuple) else {"value": value}
    try:
        text = json.dumps(wrapped)
        return (_OWN + _JSON + name, text) if json.loads(text) == wrapped else None
    except (TypeError, ValueError, RecursionError):
        return None


def _unpacked(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Read a subclass's parameters from the values of a file."""
    found = {}
    for name in names:
        if _OWN + _JSON + name in values:
            wrapped = json.loads(values[_OWN + _JSON + name])
            found[name] = tuple(wrapped["tuple"]) if "tuple" in wrapped else wrapped["value"]
        elif _OWN + name in values:
            found[name] = values[_OWN + name]
        elif name in values:  # files of earlier versions
            found[name] = values[name]
    return found


def save_npz(target: str | os.PathLike | BinaryIO, values: Mapping[str, object]) -> None:
    """Write named values in implicit's format.

    Parameters
    ----------
    target : str, path or binary file object
        ".npz" is appended to a path without it. An existing file is replaced only after the new one
        is complete.
    values : dict
        Arrays, numbers and strings. None, and objects that NumPy could only pickle (generators,
        device handles), are not saved. Names that implicit does not use get a prefix.
    """
    has_features = any(values.get(key) is not None for key in feature_keys.KEYS)
    arrays: dict[str, Any] = {PREFIX + "format": np.asarray(FORMAT if has_features else 1)}
    for name, value in values.items():
        array = None if value is None else np.asarray(value)
        if array is not None and not array.dtype.hasobject:
            arrays[name if name in _IMPLICIT else PREFIX + name] = array
    if hasattr(target, "write"):
        write_npz(target, arrays)  # type: ignore[arg-type]
        return
    with replacing(_with_suffix(target)) as file:
        write_npz(file, arrays)


def load_npz(source: str | os.PathLike | BinaryIO, own_names: Iterable[str] = ()) -> dict[str, Any]:
    """Read a file written by `save_npz` or by implicit's `save`.

    Parameters
    ----------
    source : str, path or binary file object
        The ".npz" of a path is optional.
    own_names : iterable of str, optional
        Keys to read in addition to those that this version knows. Other keys are not decompressed.

    Returns
    -------
    values : dict
        Values by name without prefix. 0-dimensional arrays become Python numbers and strings.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        If there is no such file.
    ModelFileError
        If the file is damaged, is not a model, has a later format, or has a value of an unexpected
        dtype or shape.
    """
    name, wanted = _name_of(source), _wanted(own_names)
    with contextlib.ExitStack() as at_exit:
        if hasattr(source, "read"):
            file: Any = source
        else:
            path = Path(source)
            if not path.is_file() and (_with_suffix(path).exists() or not path.exists()):
                path = _with_suffix(path)
            file = at_exit.enter_context(open(path, "rb"))
        found = at_exit.enter_context(NpzFile(file, name, wanted))
        _check_origin(found, name)
        with _errors_naming(name):
            for key, header in found.headers.items():
                _check_header(key.removeprefix(PREFIX), header)
        values = {}
        for key in found.headers:
            value = found.read(key)
            values[key.removeprefix(PREFIX)] = value.item() if value.ndim == 0 else value
    values.pop("format", None)
    return values


def _wanted(own_names: Iterable[str]) -> Callable[[str], bool]:
    own = {PREFIX + form + name for name in own_names for form in (_OWN, _OWN + _JSON, "")}
    further = (
        "format", "storage_dtype", "n_iter_", "feature_names_in_", "item_popularity_", "assigned",
        *feature_keys.KEYS,
    )  # fmt: skip
    ours = {PREFIX + name for name in (*rules.RULES, *further) if name not in _NEVER_LOADED}
    known = own | (ours - {PREFIX + name for name in _IMPLICIT}) | _IMPLICIT
    return lambda key: key in known or key.startswith(PREFIX + _SERIES)


def _check_origin(found: NpzFile, name: str) -> None:
    """Raise ModelFileError for a file written neither by this class nor by implicit's ALS."""
    key = PREFIX + "format"
    if key not in found.headers:
        missing = sorted(_IMPLICIT_ALS - set(found.headers))
        if missing:
            raise ModelFileError(
                f"{name}: key {key!r} is missing, and so is {', '.join(missing)}, which a file of "
                "implicit's ALS has: expected a file that `save` of this class or of "
                "implicit.als.AlternatingLeastSquares wrote"
            )
        return
    header = found.headers[key]
    version = found.read(key).item() if header.shape == () and header.dtype.kind in "iu" else None
    if version is None or version < 1:
        raise ModelFileError(f"{name}: key {key!r} must be an integer of at least 1, got {header}")
    if version > FORMAT:
        raise ModelFileError(
            f"{name}: the file has format {version}, but this version reads formats up to "
            f"{FORMAT}: it was written by a later tpu_als; upgrade to read it"
        )
    if "factors" not in found.headers:  # the default would contradict the tables
        raise ModelFileError(
            f"{name}: key 'factors' is missing, which every file has that `save` wrote; save the "
            "model again, or restore the file from a copy"
        )


def _check_header(key: str, header: Header) -> None:
    """Raise ValueError for a value whose dtype or shape is wrong for its key."""
    if key in feature_keys.KEYS:
        feature_keys.check_header(key, header)
        return
    n_axes, kinds, expected = 0, "biufU", "a number or text"
    if key in _TABLES:
        n_axes, kinds, expected = 2, "f", "a 2-D array of floating-point numbers"
    elif key == "feature_names_in_":
        n_axes, kinds, expected = 1, "U", "a 1-D array of text"
    elif key == "item_popularity_":
        n_axes, kinds, expected = 1, "i", "a 1-D array of signed integers"
    elif key == "assigned":
        kinds, expected = "U", "text"
    elif key.startswith(_SERIES):
        n_axes, kinds, expected = 1, "fiu", "a 1-D array of numbers"
    elif key == "n_iter_":
        kinds, expected = "iu", "an integer"
    elif key == "random_state" or (key not in rules.RULES and key not in _KNOWN_SCALARS):
        # A seed may be an array of integers; a subclass's parameter may be any array.
        n_axes, kinds, expected = len(header.shape), "biufcU", "numbers or text"
    if len(header.shape) != n_axes or header.dtype.kind not in kinds or header.dtype.subdtype:
        raise ValueError(f"{key} must be {expected}, got {header}")


@contextlib.contextmanager
def _errors_naming(name: str) -> Iterator[None]:
    """Context in which errors about values become a ModelFileError that names the file."""
    try:
        yield
    except ModelFileError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelFileError(f"{name}: {error}") from error


def _name_of(source: Any) -> str:
    if not hasattr(source, "read"):
        return os.fspath(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "the model file"


def _with_suffix(path: str | os.PathLike) -> Path:
    text = os.fspath(path)
    return Path(text if text.endswith(".npz") else text + ".npz")
