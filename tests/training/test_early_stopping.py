"""Stopping a fit by held-out entries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.engine.cpu.backend import CpuBackend
from tpu_als.engine.xla import mesh, resident
from tpu_als.evaluation import holdout
from tpu_als.training.early_stopping import EarlyStopping

TRAIN = sparse.csr_matrix(np.array([[1, 0, 0], [0, 1, 0]], np.float32))
HIDDEN = sparse.csr_matrix(np.array([[0, 1, 0], [0, 0, 1]], np.float32))
USERS = np.eye(2, dtype=np.float32)


def items_that_rank(first: int) -> np.ndarray:
    """Item factors by which user 0 has its hidden item at place `first`."""
    scores = np.array([[9, 2, 1], [0, 9, 1]], np.float32)
    if first:
        scores[0] = [9, 1, 2]
    return np.ascontiguousarray(scores.T)


def test_patience_counts_from_the_last_gain() -> None:
    backend = CpuBackend(1)
    watch = EarlyStopping(TRAIN, HIDDEN, patience=2, tol=1e-4)
    bad, good = items_that_rank(1), items_that_rank(0)
    assert watch.measure(USERS, bad, backend) < 1
    assert watch.measure(USERS, good, backend) == pytest.approx(1)
    assert not watch.is_over
    watch.measure(USERS, bad, backend)
    assert not watch.is_over
    watch.measure(USERS, good.copy(), backend)
    assert watch.is_over
    assert watch.best is not None
    assert watch.best[1] is good


def test_nothing_to_hold_out() -> None:
    with pytest.raises(ValueError, match="no entries to hold out.*early_stopping=False"):
        EarlyStopping(TRAIN, sparse.csr_matrix((2, 3)), patience=1, tol=0.0)


def test_the_message_says_which_users_could_be_held_out() -> None:
    with pytest.raises(ValueError, match="none of the 2 users has two positive entries"):
        EarlyStopping(TRAIN, sparse.csr_matrix((2, 3)), 1, 0.0, 0.1)
    counts = random_counts(60, 25, density=0.1, seed=3)
    n_able = np.count_nonzero(np.diff(counts.indptr) >= 2)
    expected = (
        rf"{n_able} of 60 users have two positive entries or more.*"
        r"validation_fraction=1e-07 is too small.*Raise it to ([0-9.e-]+) or more"
    )
    model = TPUAlternatingLeastSquares(
        4, iterations=2, early_stopping=True, validation_fraction=1e-7
    )
    with pytest.raises(ValueError, match=expected) as caught:
        model.fit(counts, show_progress=False)
    found = re.search(expected, str(caught.value))
    assert found is not None
    enough = float(found[1])
    assert holdout.least_fraction(counts) <= enough <= 1.1 * holdout.least_fraction(counts)
    assert holdout.hide(counts, enough)[1].nnz > 0
    assert holdout.hide(counts, 0.9 * enough)[1].nnz == 0
    model.set_params(validation_fraction=enough).fit(counts, show_progress=False)


COUNTS = random_counts(60, 25, density=0.3)
PLACES = {
    "loops": dict(devices=1),
    "threads": dict(devices=1, use_native=False, num_threads=2),
    "replicated": dict(devices=4, table_layout="replicated"),
    "sharded": dict(devices=4, table_layout="sharded"),
}


def stopped(**changes: Any) -> TPUAlternatingLeastSquares:
    """A model whose third iteration is its best and whose fifth is its last."""
    settings = dict(iterations=40, random_state=2, alpha=3.0, n_iter_no_change=2)
    return TPUAlternatingLeastSquares(8, early_stopping=True, **{**settings, **changes})


@pytest.mark.parametrize(
    "place",
    [pytest.param(name, marks=pytest.mark.slow) if name == "sharded" else name for name in PLACES],
)
def test_a_fit_stops_and_keeps_its_best_tables(place: str) -> None:
    """Later iterations do not write over them."""
    tables: list[tuple[np.ndarray, np.ndarray]] = []

    def note(*_: Any) -> None:
        tables.append((model.user_factors.copy(), model.item_factors.copy()))

    model = stopped(**PLACES[place])
    model.fit(COUNTS, show_progress=False, callback=note)
    ndcg = model.history_["ndcg"]
    assert len(ndcg) == model.n_iter_ == len(tables) < 40
    assert len(model.history_["seconds"]) == model.n_iter_
    best = int(np.argmax(ndcg))
    assert best < len(ndcg) - 1
    for found, expected in zip((model.user_factors, model.item_factors), tables[best], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_devices_stop_at_the_same_iteration_and_keep_sharded_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = stopped(**PLACES["threads"]).fit(COUNTS, show_progress=False)
    for place in ("replicated", "sharded"):
        many = stopped(**PLACES[place])
        with monkeypatch.context() as patch:
            if place == "sharded":  # no table comes to the host during the fit

                def refuse(*_: Any) -> None:
                    raise AssertionError("a table was fetched")

                patch.setattr(resident.Table, "fetch", refuse)
                patch.setattr(mesh.DeviceMesh, "get", refuse)
            many.fit(COUNTS, show_progress=False)
        assert many.n_iter_ == one.n_iter_
        np.testing.assert_allclose(many.history_["ndcg"], one.history_["ndcg"], atol=1e-6)
        for side in ("user_factors", "item_factors"):
            expected = getattr(one, side)
            np.testing.assert_allclose(
                getattr(many, side), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
            )


@pytest.mark.parametrize("place", ["threads", "sharded"])
def test_a_resumed_fit_has_its_best_tables_back(place: str, tmp_path: Path) -> None:
    pytest.importorskip("orbax.checkpoint")
    whole = stopped(**PLACES[place]).fit(COUNTS, show_progress=False)
    best = int(np.argmax(whole.history_["ndcg"]))

    def cut(iteration: int, *_: Any) -> None:
        if iteration == best + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped(**PLACES[place], checkpoint_dir=tmp_path).fit(
            COUNTS, show_progress=False, callback=cut
        )
    resumed = stopped(**PLACES[place], checkpoint_dir=tmp_path).fit(COUNTS, show_progress=False)
    assert resumed.history_["ndcg"] == whole.history_["ndcg"]
    for side in ("user_factors", "item_factors"):
        np.testing.assert_array_equal(getattr(resumed, side), getattr(whole, side))
