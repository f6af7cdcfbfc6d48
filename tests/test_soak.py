"""Concurrent reads and updates, in which a read sees one state; mixed calls in bounded memory.

The tables are made so that each result identifies its state, and a mixture of two states is
detected. The large numbers of calls are marked ``nightly``.
"""

from __future__ import annotations

import gc
import io
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares, host

THREADS, LEAST_UPDATES = 8, 8
K, N_USERS, N_ITEMS = 4, 12, 20
COUNTS = random_counts(N_USERS, N_ITEMS, density=0.3)
SCALES = (1.0, 2.0, 3.0, 5.0, 7.0)  # generation g of a table has scale g modulo 5
MOST_GROWTH = 80 << 20  # bytes that the process may grow by after its first calls
NEAR = 0.05  # tolerance for scores of 1; each update adds to the error; a missing row scores 0

Read = Callable[[np.random.Generator], None]


def reads_beside(update: Callable[[int], None], reads: list[Read], n_reads: int) -> None:
    """Run at least `n_reads` reads in threads, concurrently with at least a few updates."""
    begun, updates = itertools.count(), 0
    failures: list[BaseException] = []

    def reader(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            while (next(begun) < n_reads or updates < LEAST_UPDATES) and not failures:
                reads[int(rng.integers(len(reads)))](rng)
        except BaseException as error:  # noqa: BLE001  (raised again below)
            failures.append(error)

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not failures:
        update(updates)
        updates += 1
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def made(**parameters: Any) -> TPUAlternatingLeastSquares:
    """A model that is quick to fit, on one device."""
    settings = dict(
        factors=K, regularization=0.1, alpha=2.0, iterations=3, random_state=0, devices=1
    )
    return TPUAlternatingLeastSquares(**{**settings, **parameters})


many_reads = pytest.mark.parametrize(
    "n_reads", [400, pytest.param(50_000, marks=pytest.mark.nightly)]
)


@pytest.fixture
def count(request: pytest.FixtureRequest, record_property: Any) -> None:
    n_reads = request.getfixturevalue("n_reads")
    record_property("proof: concurrent reads and updates, each read of one state", n_reads)


@many_reads
@pytest.mark.usefixtures("count")
def test_reads_beside_assigned_tables(n_reads: int) -> None:
    """Each generation of the item table is a multiple of one table, and so are its results."""
    model, rng = made(), np.random.default_rng(0)
    base = rng.standard_normal((N_ITEMS, K)).astype(np.float32)
    users = rng.standard_normal((N_USERS, K)).astype(np.float32)
    model.user_factors, model.item_factors = users, base
    row, many = COUNTS[[3]], COUNTS[:8]
    answers = {}  # by scale: results of a model without updates
    for scale in SCALES:
        reference = made()
        reference.user_factors, reference.item_factors = users, base * np.float32(scale)
        answers[scale] = (
            reference.recalculate_user(0, row),
            reference.transform(many),
            reference.explain(3, COUNTS, 2)[0],
        )  # fmt: skip
    scores = users @ base.T
    cosines = base @ base.T / np.outer(*[np.linalg.norm(base, axis=1)] * 2)

    def scaled(found: np.ndarray, expected: np.ndarray) -> None:
        near = [np.allclose(found, expected * scale, rtol=1e-4, atol=1e-4) for scale in SCALES]
        assert sum(near) == 1, "scores of two generations"

    def recommend(rng: np.random.Generator) -> None:
        at = rng.integers(0, N_USERS, int(rng.choice([1, 3, 10])))
        ids, found = model.recommend(at, None, N=5, filter_already_liked_items=False)
        scaled(found, np.take_along_axis(scores[at], ids, axis=1))

    def pairs(rng: np.random.Generator) -> None:
        scaled(model.score_pairs(2, np.arange(N_ITEMS)), scores[2])

    def similar(rng: np.random.Generator) -> None:
        at = int(rng.integers(N_ITEMS))
        ids, found = model.similar_items(at, N=6)
        np.testing.assert_allclose(found, cosines[at, ids], atol=1e-4)

    def one_of(position: int, call: Callable[[], Any]) -> Read:
        def read(rng: np.random.Generator) -> None:
            found = call()
            assert any(
                np.allclose(found, answer[position], rtol=1e-3, atol=1e-5)
                for answer in answers.values()
            ), "a solve with parts of two generations"

        return read

    reads = [
        recommend, recommend, pairs, similar,
        one_of(0, lambda: model.recalculate_user(0, row)),
        one_of(1, lambda: model.transform(many)),
        one_of(2, lambda: model.explain(3, COUNTS, 2)[0]),
    ]  # fmt: skip

    def update(number: int) -> None:
        model.item_factors = base * np.float32(SCALES[number % len(SCALES)])

    reads_beside(update, reads, n_reads)


@many_reads
@pytest.mark.usefixtures("count")
def test_reads_beside_growth(n_reads: int) -> None:
    """Tables grow and are reset. All scores are 1, so a row that does not exist is detected."""
    model = made(regularization=1e-3, alpha=1.0)
    users, items = np.ones((N_USERS, K), np.float32), np.full((N_ITEMS, K), 1 / K, np.float32)
    model.user_factors, model.item_factors = users, items
    most = 40

    def recommend(rng: np.random.Generator) -> None:
        at = int(rng.integers(N_USERS))
        ids, found = model.recommend(at, None, N=most, filter_already_liked_items=False)
        known = int((ids >= 0).sum())
        assert sorted(ids[:known].tolist()) == list(range(known)), "items that do not exist yet"
        assert known >= N_ITEMS and (ids[known:] == -1).all()
        np.testing.assert_allclose(found[:known], 1, atol=NEAR)

    def similar(rng: np.random.Generator) -> None:
        ids, found = model.similar_items(np.arange(6), N=N_ITEMS)
        np.testing.assert_allclose(found, 1, atol=NEAR)
        assert all(len(set(row.tolist())) == N_ITEMS for row in ids)

    def similar_users(rng: np.random.Generator) -> None:
        _, found = model.similar_users(1, N=N_USERS)
        np.testing.assert_allclose(found, 1, atol=NEAR)

    def tables(rng: np.random.Generator) -> None:
        assert model.item_norms.shape[0] >= N_ITEMS
        assert np.isfinite(model.user_factors).all()
        twin = pickle.loads(pickle.dumps(model))
        assert twin.n_features_in_ == len(twin.item_factors)

    def all_of(n: int) -> sparse.csr_matrix:
        # With a small ridge, a new item that all users have gets a score near 1 for all of them.
        return sparse.csr_matrix(np.ones((1, n), np.float32))

    def update(number: int) -> None:
        n_items, n_users = len(model.item_factors), len(model.user_factors)
        model.partial_fit_items([n_items if n_items < most else number % N_ITEMS], all_of(n_users))
        n_items = len(model.item_factors)
        model.partial_fit_users([n_users if n_users < most else number % N_USERS], all_of(n_items))
        if number % 40 == 39:
            model.item_factors = items
            model.user_factors = users

    reads_beside(update, [recommend, recommend, similar, similar_users, tables], n_reads)


@many_reads
@pytest.mark.usefixtures("count")
def test_reads_beside_fits(n_reads: int) -> None:
    """A result belongs to the tables after an iteration, never to those in between."""
    model, states = made(), []

    def answer() -> np.ndarray:
        return model.recommend(
            np.arange(4), None, N=N_ITEMS, filter_already_liked_items=False
        )[1]  # fmt: skip

    def solved() -> np.ndarray:
        return model.recalculate_user(0, COUNTS[[0]])

    model.fit(COUNTS, show_progress=False, callback=lambda *_: states.append((answer(), solved())))

    def read(position: int, call: Callable[[], np.ndarray]) -> Read:
        return lambda rng: _among(call(), [state[position] for state in states])

    # A new fit publishes its initial tables before the first iteration ends.
    fresh = made(iterations=0).fit(COUNTS, show_progress=False)
    states.append((
        fresh.recommend(np.arange(4), None, N=N_ITEMS, filter_already_liked_items=False)[1],
        fresh.recalculate_user(0, COUNTS[[0]]),
    ))  # fmt: skip

    def update(number: int) -> None:
        model.fit(COUNTS, show_progress=False)

    reads_beside(update, [read(0, answer), read(1, solved)], n_reads)


def _among(found: np.ndarray, states: list[np.ndarray]) -> None:
    near = [np.allclose(found, state, rtol=1e-3, atol=1e-6) for state in states]
    assert any(near), "a result of no iteration"


def _mixed_calls(model: TPUAlternatingLeastSquares, rng: np.random.Generator) -> list[Any]:
    """Every kind of call, with random arguments."""

    def ids(n: int) -> np.ndarray:
        return rng.integers(0, n, int(rng.integers(1, 9)))

    def saved() -> None:
        file = io.BytesIO()
        model.save(file)
        file.seek(0)
        TPUAlternatingLeastSquares.load(file)

    def recommend() -> None:
        at = ids(N_USERS)
        model.recommend(at, COUNTS[at], N=int(rng.integers(1, 15)))

    def partial_fits() -> None:
        model.partial_fit_users([int(rng.integers(N_USERS))], COUNTS[[0]])
        model.partial_fit_items([int(rng.integers(N_ITEMS))], sparse.csr_matrix(COUNTS.T)[[0]])

    return [
        recommend, recommend, partial_fits, saved,
        lambda: model.recommend(1, COUNTS[1], recalculate_user=True),
        lambda: model.similar_items(ids(N_ITEMS)),
        lambda: model.similar_users(ids(N_USERS)),
        lambda: model.transform(COUNTS[: int(rng.integers(1, 9))]),
        lambda: model.explain(1, COUNTS, 3),
        lambda: model.fit(COUNTS, show_progress=False),
        lambda: pickle.loads(pickle.dumps(model)),
        lambda: setattr(model, "item_factors", model.item_factors * np.float32(1.01)),
        lambda: made(iterations=1).fit(
            random_counts(int(rng.integers(5, 200)), int(rng.integers(5, 200))),
            show_progress=False,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("n_calls", "n_first"), [(700, 300), pytest.param(10_000, 1_000, marks=pytest.mark.nightly)]
)
def test_mixed_calls_in_bounded_memory(n_calls: int, n_first: int, record_property: Any) -> None:
    model, rng, process = made(), np.random.default_rng(0), psutil.Process()
    model.fit(COUNTS, show_progress=False)
    calls = _mixed_calls(model, rng)
    first = 0
    for number in range(n_calls):
        if number == n_first:
            first = _resident(process)
        calls[int(rng.integers(len(calls)))]()
    growth = _resident(process) - first
    record_property("proof: mixed calls in bounded memory", n_calls)
    assert growth < MOST_GROWTH, f"{growth / 1e6:.0f} MB more after {n_calls - n_first} calls"


def _resident(process: psutil.Process) -> int:
    gc.collect()
    host.give_back_memory()
    return int(process.memory_info().rss)
