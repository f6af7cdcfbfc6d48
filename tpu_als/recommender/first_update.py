"""What the first update of a large model needs, computed as a part of `fit` and `load`."""

from __future__ import annotations

import numpy as np

from tpu_als.estimator import TPUAlternatingLeastSquares
from tpu_als.recommender.state import State, Steps
from tpu_als.serving import fold_in

_LARGE = 1 << 24  # numbers in both tables
_SOME = 64  # rows solved to load the loops: more than those that one thread solves


def prepare(state: State) -> None:
    """Do what the first update of a large model has to do once, as a part of `fit` and `load`.

    The results are caches: the values of the State do not change. For a smaller model the first
    update does this. Loading the compiled loops takes 0.1 s. Compiling them takes about 8 s, once
    on each machine, which is long compared with a short fit.
    """
    n_rows, model = len(state.users) + len(state.items), state.model
    is_large = isinstance(model, TPUAlternatingLeastSquares) and n_rows * model.factors >= _LARGE
    if not is_large:
        return
    step = Steps()
    state.users.prepare()
    state.items.prepare()
    users, items = (np.arange(min(_SOME, len(ids))) for ids in (state.users, state.items))
    fold_in.prepare(model, "user", state.rows(users))
    fold_in.prepare(model, "item", state.history.columns(items))
    step.done("prepare updates")
