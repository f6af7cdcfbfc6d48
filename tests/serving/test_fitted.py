"""One call sees one state of a model, whatever other threads do; an interrupted fit stays whole."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.engine.cpu import exact, ranking
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.serving import derived, factor_table
from tpu_als.serving.factor_table import FactorTable
from tpu_als.training import loop

COUNTS = random_counts(30, 20)
USERS = np.arange(30)
FILES = {
    "estimator.py",
    "preparing.py",
    "loop.py",
    "attributes.py",
    "factor_table.py",
    "fitted.py",
    "als.py",
    "backend.py",
}


def _model(**changes: Any) -> TPUAlternatingLeastSquares:
    settings = dict(factors=4, iterations=4, random_state=0, num_threads=1)
    return TPUAlternatingLeastSquares(**{**settings, **changes})


def _fitted(**changes: Any) -> TPUAlternatingLeastSquares:
    return _model(**changes).fit(COUNTS, show_progress=False)


def _in_the_middle(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, write: Callable[[], Any]
) -> None:
    """Let a writer in just before the first call of a function that a reader makes."""
    original, is_first = getattr(owner, name), [True]

    def interleaved(*args: Any, **kwargs: Any) -> Any:
        if is_first.pop() if is_first else False:
            write()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interleaved)


def _grow_items(model: Any) -> None:
    model.partial_fit_items([2, 24], sparse.csr_matrix(np.ones((2, 30), np.float32)))


def _grow_users(model: Any) -> None:
    model.partial_fit_users([2, 34], sparse.csr_matrix(np.ones((2, 20), np.float32)))


def _assign(model: Any) -> None:
    model.item_factors = np.ones((7, 4), np.float32)


def _refit(model: Any) -> None:
    model.fit(random_counts(40, 50, seed=3), show_progress=False)


WRITERS = {"grow items": _grow_items, "grow users": _grow_users, "assign": _assign, "fit": _refit}
READERS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "one user": (ranking, "_scratch", lambda m: m.recommend(3, COUNTS[3], N=5)),
    "all users": (ranking.Catalog, "top_k", lambda m: m.recommend(USERS, COUNTS, N=5)),
    "catalog": (CpuBackend, "catalog", lambda m: m.recommend(USERS, COUNTS, N=5)),
    "similar items": (derived, "norms", lambda m: m.similar_items(3, N=5)),
    "all similar users": (derived, "norms", lambda m: m.similar_users(USERS, N=5)),
    "gramian": (exact.Source, "_gramian", lambda m: m.recalculate_user(0, COUNTS[0])),
    "source": (CpuBackend, "source", lambda m: m.transform(COUNTS)),
    "score": (exact.Source, "solve", lambda m: m.score(COUNTS)),
    "pairs": (factor_table.FactorTable, "rows", lambda m: m.score_pairs(USERS[:20], USERS[:20])),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", READERS)
def test_a_writer_in_the_middle_of_a_call_is_not_seen(
    reader: str, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, read = READERS[reader]
    model, write = _fitted(), WRITERS[writer]
    expected, changed = read(copy.deepcopy(model)), copy.deepcopy(model)
    write(changed)
    _in_the_middle(monkeypatch, owner, name, lambda: write(model))
    np.testing.assert_array_equal(read(model), expected)
    monkeypatch.undo()
    # what the reader derived from the old tables is not used with the new ones
    np.testing.assert_array_equal(model.item_factors, changed.item_factors)
    np.testing.assert_array_equal(model.YtY, changed.YtY)
    np.testing.assert_array_equal(model.item_norms, changed.item_norms)
    everybody = np.arange(len(model.user_factors))
    for mine, theirs in zip(
        model.recommend(everybody, None, filter_already_liked_items=False),
        changed.recommend(everybody, None, filter_already_liked_items=False),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_rows_solved_against_a_model_that_is_gone_are_solved_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, row = _fitted(), COUNTS[:1]
    expected = copy.deepcopy(model)
    _in_the_middle(monkeypatch, exact.Source, "_gramian", lambda: _refit(model))
    model.partial_fit_users([3], row)
    _refit(expected)
    expected.partial_fit_users([3], row)
    np.testing.assert_array_equal(model.user_factors, expected.user_factors)


def test_a_copy_does_not_see_what_is_changed_in_the_original() -> None:
    model = _fitted()
    twin, expected = copy.copy(model), model.recommend(USERS, COUNTS)
    for write in (_grow_users, _grow_items, _refit):
        write(model)
        for mine, theirs in zip(twin.recommend(USERS, COUNTS), expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert twin.n_features_in_ == 20 and model.n_features_in_ == 50


def test_readers_during_a_fit_see_the_model_before() -> None:
    """Without a callback, nothing is published until the end."""
    model, seen = _fitted(), []
    before = model.item_factors.copy()
    original = model._fitted.item

    step = loop.Training.step

    def watched(training: Any) -> Any:
        seen.append(model._fitted.item is original)
        return step(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "step", watched)
        model.fit(random_counts(40, 50, seed=3), show_progress=False)
    assert seen == [True] * 4
    assert model.item_factors.shape == (50, 4) and before.shape == (20, 4)


def test_a_fit_that_fails_keeps_what_was_assigned_meanwhile() -> None:
    model, table = _fitted(), np.ones((20, 4), np.float32)

    def assign_and_fail(training: Any) -> Any:
        model.item_factors = table
        raise MemoryError("no memory left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "step", assign_and_fail)
        with pytest.raises(MemoryError, match="no memory left"):
            model.fit(COUNTS, show_progress=False)
    np.testing.assert_array_equal(model.item_factors, table)


def test_the_state_of_a_table_has_plain_types() -> None:
    """Libraries that load only named types, such as skops, need the documented ones only."""
    table = FactorTable(np.ones((3, 2), np.float32)).with_given(("a", "b"), norms=np.full(3, 2.0))
    state = table.__getstate__()
    kinds = {type(value) for value in (*state.values(), *state["given"])}
    assert kinds <= {np.ndarray, bool, tuple, type(None)}
    again = pickle.loads(pickle.dumps(table))
    np.testing.assert_array_equal(again.norms(), np.full(3, 2.0))


def test_state_of_a_pickle_has_no_locks_and_no_devices() -> None:
    model = _fitted()
    model.recommend(USERS, COUNTS)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.item_factors, model.item_factors)
    assert (again.n_iter_, again.history_, again.n_features_in_) == (4, model.history_, 20)
    assert len(pickle.dumps(model)) < 20_000
    _grow_users(again)
    assert len(again.user_factors) == 35


class _Interrupt:
    """A trace function that raises KeyboardInterrupt at one line of the package's own files."""

    def __init__(self, at: int) -> None:
        self.left, self.at = at, at
        self.lines = 0

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if Path(frame.f_code.co_filename).name not in FILES:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self


def _interrupted(model: Any, at: int) -> int:
    """Fit, interrupted at a line; the number of lines that ran."""
    trace, before = _Interrupt(at), sys.gettrace()
    sys.settrace(trace)
    try:
        model.fit(COUNTS, show_progress=False)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return trace.lines


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.nightly)])
def test_an_interrupted_fit_leaves_a_whole_iteration(step: int) -> None:
    states: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    watched = _model(calculate_training_loss=True)
    watched.fit(
        COUNTS,
        show_progress=False,
        callback=lambda i, *_: states.__setitem__(
            i + 1, (watched.user_factors.copy(), watched.item_factors.copy())
        ),
    )
    n_lines = _interrupted(_model(calculate_training_loss=True), at=-1)
    assert n_lines > 100
    found = set()
    for at in range(1, n_lines + 1, step):
        model = _model(calculate_training_loss=True)
        _interrupted(model, at)
        if not hasattr(model, "n_iter_"):
            assert model.user_factors is None and model.item_factors is None
            continue
        users, items = states[model.n_iter_]
        np.testing.assert_array_equal(model.user_factors, users)
        np.testing.assert_array_equal(model.item_factors, items)
        assert {len(values) for values in model.history_.values()} == {model.n_iter_}
        found.add(model.n_iter_)
    assert found >= {1, 2, 3}


def test_first_assignments_of_two_threads() -> None:
    users, items = np.ones((3, 2), np.float32), np.ones((4, 2), np.float32)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            model, barrier = TPUAlternatingLeastSquares(2), threading.Barrier(2)

            def assign(name: str, table: np.ndarray, model: Any, barrier: Any) -> None:
                barrier.wait()
                setattr(model, name, table)

            pairs = (("user_factors", users), ("item_factors", items))
            threads = [
                threading.Thread(target=assign, args=(*pair, model, barrier)) for pair in pairs
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert model.user_factors is not None and model.item_factors is not None
    finally:
        sys.setswitchinterval(before)
