"""Save a recommender to one file, and load it. Nothing is pickled.

The file is an .npz archive. Its member "model" has the bytes of the model's own file.
"""

from __future__ import annotations

import io
import json
import os
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import clone

from tpu_als import compat, weighting
from tpu_als.estimator import TPUAlternatingLeastSquares
from tpu_als.exceptions import ModelFileError
from tpu_als.recommender import encoders, features, stored_ids
from tpu_als.recommender.counting import Clock
from tpu_als.recommender.encoders import Column, Encoder
from tpu_als.recommender.history import Cells, History
from tpu_als.recommender.schema import schema_of
from tpu_als.recommender.state import State, liked, with_events
from tpu_als.recommender.warn import warn
from tpu_als.storage.atomic import replacing
from tpu_als.storage.npz import NpzFile, write_npz

FORMAT = 4  # files get the first format that can hold what they hold, so 1 for most
_MODELS: dict[str, Any] = {
    "TPUAlternatingLeastSquares": TPUAlternatingLeastSquares,
    "AlternatingLeastSquares": compat.AlternatingLeastSquares,
}


_CELLS = ("indptr", "items", "values", "weights")
_DTYPES = {"indptr": "<i8", "items": "<i4", "values": "<f8", "weights": "<f4", "pending": "<i8"}


def save(path: str | os.PathLike[str], recommender: Any, state: State) -> None:
    """Write a file; see `Recommender.save`."""
    kinds = {name: kind for name, kind in _MODELS.items() if type(state.model) is kind}
    if not kinds:
        raise ValueError(
            f"a file can hold models of {sorted(_MODELS)}, got {type(state.model).__name__}: save "
            "model_ with its own method"
        )
    schema_of(recommender)  # refuses parameters with which `load` would refuse the file
    arrays: dict[str, Any] = {}
    about = {
        "model": next(iter(kinds)),
        "library": state.library,
        "parameters": _parameters(recommender),
        "weighting": _weighting(state.weighting, arrays),
        "clock": None
        if state.clock is None
        else [state.clock.kind, np.asarray(state.clock.latest).item()],
        "newest": None if state.clock is None else np.asarray(state.clock.newest).item(),
        "users": stored_ids.write(state.users, "user_ids", arrays),
        "items": stored_ids.write(state.items, "item_ids", arrays),
    }
    of_ids = max(stored_ids.format_of(about[side]) for side in ("users", "items"))
    about["format"] = max(of_ids, 2 if state.encoders else 1)
    if state.encoders:
        about["encoders"] = {}
        for side, encoder in state.encoders.items():
            about["encoders"][side] = _encoder(encoder, side, arrays)
    cells = state.history.all_cells()
    arrays |= {name: np.asarray(getattr(cells, name), _DTYPES[name]) for name in _CELLS}
    arrays["pending"] = np.asarray(state.pending, "<i8")
    if cells.times is not None:
        arrays["times"] = cells.times
    with io.BytesIO() as file:
        state.model.save(file)
        arrays["model"] = np.frombuffer(file.getbuffer(), np.uint8).copy()
    arrays["recommender"] = _bytes(json.dumps(about))
    with replacing(Path(path)) as file:
        write_npz(file, arrays)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], State]:
    """Read a file: the constructor's parameters, and the state."""
    name = os.fspath(path)
    with open(path, "rb") as file, NpzFile(file, name, lambda _: True) as found:
        if "recommender" not in found.headers:
            raise ModelFileError(
                f"{name}: expected a file that Recommender.save wrote; it has no 'recommender'"
            )
        arrays = {key: found.read(key) for key in found.headers}
    try:
        return _loaded(arrays)
    except ModelFileError as error:
        raise ModelFileError(f"{name}: {error}") from error
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise ModelFileError(
            f"{name}: the file is damaged or is not a recommender's ({error}): save it again, or "
            "restore it from a copy"
        ) from error


def _loaded(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], State]:
    about = json.loads(arrays["recommender"].tobytes().decode())
    if not isinstance(about, dict) or about["format"] > FORMAT:
        raise ModelFileError(
            f"format {about['format']} is later than {FORMAT}: upgrade tpu_als to read it"
        )
    model = _MODELS[about["model"]].load(io.BytesIO(arrays["model"].tobytes()))
    users, items = (stored_ids.read(about[side], arrays) for side in ("users", "items"))
    cells = _checked(arrays, len(users), len(items))
    tables = model.user_factors, model.item_factors
    if tables[0].shape[0] != len(users) or tables[1].shape[0] != len(items):
        shapes = [table.shape for table in tables]
        raise ValueError(f"tables of {len(users)} and {len(items)} rows expected, got {shapes}")
    if arrays["pending"].shape != (len(items),):
        raise ValueError(f"pending must have shape ({len(items)},), got {arrays['pending'].shape}")
    transformer = _read_weighting(about["weighting"], arrays)
    clock = about["clock"]
    parameters = dict(about["parameters"])
    pairs = parameters.pop("event_weights")
    parameters["event_weights"] = None if pairs is None else dict(pairs)
    parameters["weighting"] = None if transformer is None else clone(transformer)
    parameters["model"] = clone(model)
    schema = schema_of(SimpleNamespace(**parameters))
    return parameters, State(
        schema=schema,
        users=users,
        items=items,
        history=History.of(cells, len(items)),
        model=model,
        weighting=transformer,
        popularity=liked(cells, len(items)),
        pending=arrays["pending"].astype(np.int64),
        has_events=with_events(cells, len(items)),
        clock=None if clock is None else Clock(clock[0], clock[1], about.get("newest", clock[1])),
        library=str(about["library"]),
        encoders=_read_encoders(about.get("encoders", {}), arrays, model),
    )


def _checked(arrays: dict[str, np.ndarray], n_users: int, n_items: int) -> Cells:
    """The cells of a file; ValueError if they are not those of a history."""
    for name in (*_CELLS, "pending"):
        if arrays[name].ndim != 1 or arrays[name].dtype != np.dtype(_DTYPES[name]):
            raise ValueError(f"{name} of shape {arrays[name].shape} and {arrays[name].dtype}")
    indptr, items = arrays["indptr"], arrays["items"]
    lengths = np.diff(indptr)
    if len(indptr) != n_users + 1 or indptr[0] != 0 or (lengths < 0).any():
        raise ValueError("indptr is not that of the rows of the users")
    times = arrays.get("times")
    given = [arrays[name] for name in _CELLS[1:]] + ([] if times is None else [times])
    if any(array.shape != (indptr[-1],) for array in given):
        raise ValueError(f"arrays of other lengths than {indptr[-1]}")
    if len(items) and not 0 <= items.min() <= items.max() < n_items:
        raise ValueError("items out of range")
    starts = np.zeros(len(items), bool)
    starts[indptr[:-1][lengths > 0]] = True
    if not ((np.diff(items, prepend=-1) > 0) | starts).all():
        raise ValueError("items of a row must ascend")
    if not (np.isfinite(arrays["values"]).all() and np.isfinite(arrays["weights"]).all()):
        raise ValueError("values that are not finite")
    return Cells(indptr, items, arrays["values"], arrays["weights"], times)


def _parameters(recommender: Any) -> dict[str, Any]:
    names = ("user", "item", "value", "timestamp", "event", "repeated", "unknown")
    found = {name: getattr(recommender, name) for name in names}
    half_life = recommender.half_life
    if isinstance(half_life, Real):
        half_life = float(half_life)
    is_plain = half_life is None or isinstance(half_life, (str, float))
    found["half_life"] = half_life if is_plain else pd.Timedelta(half_life).isoformat()
    weights = recommender.event_weights
    if weights is not None:
        weights = [[key, float(value)] for key, value in weights.items()]
        if json.loads(json.dumps(weights)) != weights:
            raise ValueError("event types must be text or numbers to be saved")
    return {**found, "event_weights": weights}


def _weighting(transformer: Any, arrays: dict[str, Any]) -> Any:
    if transformer is None:
        return None
    name = type(transformer).__name__
    if getattr(weighting, name, None) is not type(transformer):
        raise ValueError(
            f"a file can hold the transformers of tpu_als.weighting, got {name}: use one of them, "
            "or pickle the recommender"
        )
    learnt = {k: v for k, v in vars(transformer).items() if k.endswith("_") and k[0] != "_"}
    for key, value in learnt.items():
        arrays[f"weighting.{key}"] = np.asarray(value)
    return [name, transformer.get_params(), sorted(learnt)]


def _read_weighting(about: Any, arrays: dict[str, np.ndarray]) -> Any:
    if about is None:
        return None
    name, parameters, learnt = about
    if name not in weighting.__all__:
        raise ValueError(f"weighting {name!r}")
    made = getattr(weighting, name)(**parameters)
    for key in learnt:
        value = arrays[f"weighting.{key}"]
        setattr(made, key, value.item() if value.ndim == 0 else value)
    return made


def _encoder(encoder: Encoder, side: str, arrays: dict[str, Any]) -> list[Any]:
    """Write an encoder; return its columns, its categories, and its number of features."""
    if not encoder.is_built_in:
        warn(
            f"a file cannot hold {side}_encoder. After load the recommender answers as before, but "
            "cannot encode new features: pickle it to keep the encoder",
        )
        return [encoder.columns, None, encoder.n_features]
    categories, scaler = encoders.parts_of(encoder.transformer)
    scales = np.empty((2, 0)) if scaler is None else np.array([scaler.mean_, scaler.scale_])
    arrays[f"{side}_scales"] = scales.astype("<f8")
    return [encoder.columns, categories, encoder.n_features]


def _read_encoders(about: Any, arrays: dict[str, np.ndarray], model: Any) -> dict[str, Encoder]:
    found = {}
    for side in features.SIDES:
        known = features.of_model(model, side)
        if (side in about) != (known is not None):
            raise ValueError(f"features of {side}s in the model or the encoders, but not in both")
        if known is None:
            continue
        columns, categories, n_features = about[side]
        columns = tuple(Column(str(name), str(kind), bool(one)) for name, kind, one in columns)
        made = Encoder(columns, None, False, int(n_features))
        if categories is not None:
            scales = arrays[f"{side}_scales"]
            if scales.dtype != np.dtype("<f8") or not np.isfinite(scales).all():
                raise ValueError(f"{side}_scales must be finite numbers, got {scales.dtype}")
            made = encoders.restored(columns, categories, scales)
        if made.n_features != len(known.weights):
            raise ValueError(
                f"{made.n_features} features of {side}s, but {len(known.weights)} weights"
            )
        found[side] = made
    return found


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)
