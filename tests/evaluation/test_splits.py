"""Splits: the parts are disjoint and complete, and held-out entries are positive."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import random_counts
from scipy import sparse

from tpu_als import evaluation
from tpu_als.datasets import Interactions
from tpu_als.evaluation import holdout

KINDS = ["coo_matrix", "coo_array", "csr_matrix", "csr_array", "csc_matrix"]


def stored(
    seed: int, kind: str = "coo_matrix", dtype: Any = np.float64, shape: tuple[int, int] = (9, 7)
) -> Any:
    """Entries in any order, many of them repeated, with zeros, negatives and empty rows."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 90))
    rows = rng.choice(np.flatnonzero(rng.random(shape[0]) < 0.8), n) if n and seed % 5 else []
    rows = np.asarray(rows, int)
    columns = rng.integers(0, shape[1], len(rows))
    values = rng.integers(-2, 6, len(rows)).astype(dtype)
    if kind.startswith("coo"):
        return getattr(sparse, kind)((values, (rows, columns)), shape=shape)
    major = rows if kind.startswith("csr") else columns
    order = np.argsort(major, kind="stable")
    length = shape[0] if kind.startswith("csr") else shape[1]
    indptr = np.append(0, np.cumsum(np.bincount(major, minlength=length)))
    minor = columns if kind.startswith("csr") else rows
    return getattr(sparse, kind)((values[order], minor[order], indptr), shape=shape)


def check_parts(matrix: Any, train: Any, test: Any) -> None:
    """Check that each (summed) entry is in one part, and that held-out entries are positive."""
    summed = matrix.toarray()
    np.testing.assert_array_equal(train.toarray() + test.toarray(), summed)
    pattern = sparse.coo_matrix(matrix)
    cells = len(np.unique(pattern.row.astype(np.int64) * matrix.shape[1] + pattern.col))
    assert train.nnz + test.nnz == cells
    both = (train.toarray() != 0) & (test.toarray() != 0)
    assert not both.any()
    assert (test.data > 0).all()
    for part in (train, test):
        assert isinstance(part, sparse.csr_matrix) and part.has_canonical_format
        assert part.dtype == matrix.dtype


@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([np.float32, np.float64, np.int32, np.int64]),
    part=st.floats(0, 1),
)
def test_random_split(seed: int, kind: str, dtype: Any, part: float) -> None:
    matrix = stored(seed, kind, dtype)
    train, test = evaluation.train_test_split(matrix, part, random_state=seed)
    check_parts(matrix, train, test)


@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    k=st.integers(1, 4),
    spared=st.floats(0, 0.999),
)
def test_leave_k_out(seed: int, kind: str, k: int, spared: float) -> None:
    matrix = stored(seed, kind)
    train, test = evaluation.leave_k_out_split(matrix, k, spared, random_state=seed)
    check_parts(matrix, train, test)
    assert set(np.diff(test.indptr)) <= {0, k}
    enough = (matrix.toarray() > 0).sum(axis=1) > k + 1
    assert not np.diff(test.indptr)[~enough].any()
    summed = holdout.canonical(matrix)
    users = np.count_nonzero(np.diff(summed.indptr))
    n_spared = min(max(int(np.float32(users) * np.float32(spared)), spared > 0), users)
    n_tested = np.count_nonzero(np.diff(test.indptr))
    assert enough.sum() - n_spared <= n_tested <= min(enough.sum(), users - n_spared)


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), fraction=st.floats(0.01, 0.99))
def test_strong_generalization(seed: int, kind: str, fraction: float) -> None:
    matrix = stored(seed, kind)
    n_users, testable = matrix.shape[0], ((matrix.toarray() > 0).sum(axis=1) > 1).sum()
    error = None
    if not testable:
        error = "no user has two positive entries"
    elif min(testable, max(round(fraction * n_users), 1)) == n_users:
        error = "leaves none to train on"
    if error:
        with pytest.raises(ValueError, match=error):
            evaluation.strong_generalization_split(matrix, fraction, random_state=seed)
        return
    train, visible, held_out = evaluation.strong_generalization_split(
        matrix, fraction, random_state=seed
    )
    rows = [*train.toarray().tolist(), *(visible + held_out).toarray().tolist()]
    assert sorted(rows) == sorted(matrix.toarray().tolist())
    assert not (visible.toarray() * held_out.toarray()).any()
    assert (held_out.data > 0).all() and (np.diff(held_out.indptr) > 0).all()


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), fraction=st.floats(0.01, 0.99))
def test_time_split(seed: int, kind: str, fraction: float) -> None:
    matrix = stored(seed, kind)
    times = matrix.copy()
    times.data = np.random.default_rng(seed).integers(0, 50, len(times.data))
    train, test = evaluation.time_split(matrix, times, fraction)
    np.testing.assert_array_equal((train + test).toarray(), matrix.toarray())
    first: dict[tuple[int, int], int] = {}
    entries = times.tocoo()
    for row, column, time in zip(entries.row, entries.col, entries.data, strict=True):
        first[row, column] = min(first.get((row, column), 99), time)
    assert train.nnz + test.nnz == len(first)
    early, late = ([first[cell] for cell in zip(*p.nonzero(), strict=True)] for p in (train, test))
    assert not early or not late or max(early) < min(late)


def test_repeated_events_are_in_one_part() -> None:
    rng = np.random.default_rng(0)
    rows, columns = np.repeat(rng.integers(0, [[40], [50]], (2, 500)), 4, axis=1)
    events = sparse.coo_matrix((np.ones(2000), (rows, columns)), shape=(40, 50))
    for split in (evaluation.train_test_split, evaluation.leave_k_out_split):
        train, test = split(events, random_state=0)
        assert test.nnz > 30
        assert train.multiply(test).nnz == 0


def test_leave_k_out_draws_positive_entries() -> None:
    matrix = sparse.csr_matrix([[5, -1, -1, -1, 4, 3], [5, -1, -1, 2, 4, 3]])
    drawn = set()
    for seed in range(40):
        train, test = evaluation.leave_k_out_split(matrix, 2, random_state=seed)
        np.testing.assert_array_equal((train + test).toarray(), matrix.toarray())
        np.testing.assert_array_equal(np.diff(test.indptr), [0, 2])
        drawn.update(test.indices.tolist())
    assert drawn == {0, 3, 4, 5}


@pytest.mark.parametrize("size", [0.0, 0.001, 0.29, 0.3, 0.5, 0.99])
def test_leave_k_out_train_only_users_equal_implicits(size: float) -> None:
    reference = pytest.importorskip("implicit.evaluation")
    counts = random_counts(100, 20, density=0.9, seed=4)
    ours, theirs = (
        np.diff(split(counts, 1, size, random_state=3)[1].indptr)
        for split in (evaluation.leave_k_out_split, reference.leave_k_out_split)
    )
    np.testing.assert_array_equal(ours, theirs)
    assert ours.sum() == 100 - max(round(100 * size), size > 0)


def test_leave_k_out_train_only_users_have_entries() -> None:
    counts = sparse.csr_matrix(np.repeat([[0.0], [1.0]], [150, 50], axis=0) * np.ones((1, 6)))
    test = evaluation.leave_k_out_split(counts, 1, 0.5, random_state=0)[1]
    assert test.nnz == 25


def test_times_of_repeated_events_are_not_summed() -> None:
    cells = (np.array([0, 0, 0]), np.array([0, 0, 1]))
    events = sparse.coo_matrix(([1, 1, 1], cells), shape=(1, 3))
    times = sparse.coo_matrix(([2011, 2010, 2015], cells), shape=(1, 3))
    train, test = evaluation.time_split(events, times, 0.4)
    np.testing.assert_array_equal(train.toarray(), [[2, 0, 0]])
    np.testing.assert_array_equal(test.toarray(), [[0, 1, 0]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, bool])
def test_sums_of_small_integers_do_not_wrap(dtype: Any) -> None:
    values = np.full(400, 100).astype(dtype)
    cells = np.zeros((2, 400), int)
    for matrix in (
        sparse.coo_matrix((values, cells), shape=(1, 2)),
        sparse.csr_matrix((values, cells[0], [0, 400]), shape=(1, 2)),
    ):
        train, test = evaluation.train_test_split(matrix, 0.0)
        assert train.nnz == 0
        assert test.toarray().tolist() == [[1 if dtype is bool else 40_000, 0]]
    assert evaluation.train_test_split(matrix[:, :2], 0.0)[1].dtype in (bool, np.int64)
    small = sparse.coo_matrix((values[:1], cells[:, :1]), shape=(1, 2))
    assert evaluation.train_test_split(small, 0.0)[1].dtype == dtype


def test_draws_close_to_1_stay_in_their_row() -> None:
    class Always:
        """A generator whose draws are the largest numbers below 1."""

        def random(self, n: int) -> np.ndarray:
            return np.full(n, np.nextafter(1.0, 0))

    rows = sparse.csr_matrix(np.ones((2000, 3)))
    chosen = holdout.drawn(rows, np.arange(2000) % 4, Always())  # type: ignore[arg-type]
    np.testing.assert_array_equal(chosen.reshape(2000, 3).sum(axis=1), np.arange(2000) % 4)


SPLITS: dict[str, Callable[[Any], Any]] = {
    "random": lambda rows: evaluation.train_test_split(rows, 0.5, random_state=0),
    "leave-k-out": lambda rows: evaluation.leave_k_out_split(rows, random_state=0),
    "strong": lambda rows: evaluation.strong_generalization_split(rows, random_state=0),
    "time": lambda rows: evaluation.time_split(rows, rows),
    "cold items": lambda rows: evaluation.cold_item_split(rows, random_state=0)[:2],
    "cold users": lambda rows: evaluation.cold_user_split(rows, random_state=0)[:2],
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
class TestInput:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_values_must_be_finite(self, split: Any, value: float) -> None:
        rows = random_counts(5, 6, density=0.9)
        rows.data[7] = value
        entry = rows.tocoo()
        where = f"1 of {rows.nnz} entries .* row {entry.row[7]}, column {entry.col[7]}"
        with pytest.raises(ValueError, match=where):
            split(rows)

    @pytest.mark.parametrize(
        ("matrix", "advice"),
        [
            (pd.DataFrame({"user": [1, 2], "item": [3, 4]}), "interactions_from_frame"),
            (pa.table({"user": [1, 2], "item": [3, 4]}), "interactions_from_frame"),
            (Interactions(random_counts(2, 2), pd.Index([1]), pd.Index([1])), r"pass .*\.matrix"),
            ("purchases.npz", "load_npz"),
            (None, "sparse matrix"),
        ],
        ids=["frame", "arrow", "interactions", "path", "none"],
    )
    def test_other_objects(self, split: Any, matrix: Any, advice: str) -> None:
        with pytest.raises(TypeError, match=rf"must be a matrix of users by items.*{advice}"):
            split(matrix)

    @pytest.mark.parametrize(
        "matrix",
        [np.ones(3), np.ones((2, 2, 2)), [["a", "b"]], [[1j]]],
        ids=["1-D", "3-D", "text", "complex"],
    )
    def test_other_arrays(self, split: Any, matrix: Any) -> None:
        with pytest.raises(ValueError, match=r"users as rows|real numbers|complex numbers"):
            split(matrix)

    @pytest.mark.parametrize("position", [10**7, 1, -3])
    def test_a_corrupt_matrix(self, split: Any, position: int) -> None:
        rows = random_counts(5, 6, density=0.9)
        assert rows.has_canonical_format  # SciPy stores the result in the flags
        rows.indptr[3] = position
        with pytest.raises(ValueError, match="is a damaged csr_matrix.*: indptr falls"):
            split(rows)
        columns = random_counts(6, 5, density=0.9)
        columns.indices[3] = 10**6
        with pytest.raises(ValueError, match="column 1000000, expected 0 to 4"):
            split(columns)

    def test_flags_are_ignored(self, split: Any) -> None:
        rows = sparse.csr_matrix(
            (np.ones(8), np.array([1, 0, 1, 2, 3, 3, 2, 0]), np.array([0, 4, 8])), shape=(2, 4)
        )
        right = [part.toarray().tolist() for part in split(rows)]
        rows.has_canonical_format = rows.has_sorted_indices = True
        assert [part.toarray().tolist() for part in split(rows)] == right


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, "2", None])
def test_k_is_a_count(value: Any) -> None:
    with pytest.raises(ValueError, match="K must be an integer of at least 1, got"):
        evaluation.leave_k_out_split(random_counts(5, 6), value)


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, np.inf, "0.5", None, True])
def test_fractions_are_numbers(value: Any) -> None:
    rows = random_counts(5, 6, density=0.9)
    for call, name in (
        (lambda: evaluation.train_test_split(rows, value), "train_percentage"),
        (lambda: evaluation.leave_k_out_split(rows, 1, value), "train_only_size"),
        (lambda: evaluation.strong_generalization_split(rows, value), "test_users"),
        (lambda: evaluation.strong_generalization_split(rows, 0.5, value), "fold_in"),
        (lambda: evaluation.time_split(rows, rows, value), "fraction"),
        (lambda: evaluation.cold_item_split(rows, value), "test_size"),
        (lambda: evaluation.cold_user_split(rows, value), "test_size"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            call()


def test_an_empty_matrix_is_split() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((0, 0), (0, 4), (4, 0), (3, 3)):
            for name in ("random", "leave-k-out", "time"):
                assert [part.shape for part in SPLITS[name](sparse.csr_matrix(shape))] == [
                    shape
                ] * 2


def test_holding_out_all_users_is_refused() -> None:
    with pytest.raises(ValueError, match="test_users=0.9 of 3 users leaves none to train on"):
        evaluation.strong_generalization_split(random_counts(3, 9, density=0.9), test_users=0.9)


@pytest.mark.parametrize("kind", ["coo", "csr", "csc"])
@pytest.mark.parametrize("dtype", ["i8", "u8"])
def test_sums_beyond_int64_are_refused(kind: str, dtype: str) -> None:
    parts = np.array([2**62, 2**62, 1], dtype), (np.zeros(3, int), np.array([1, 1, 0]))
    given: Any = sparse.coo_matrix(parts, (2, 2))
    if kind == "csr":
        given = sparse.csr_matrix((2, 2), dtype=dtype)
        given.data, given.indices = parts[0], np.array([1, 1, 0], np.int32)
        given.indptr = np.array([0, 3, 3], np.int32)
    elif kind == "csc":
        given = sparse.csc_matrix((2, 2), dtype=dtype)
        given.data, given.indices = parts[0], np.zeros(3, np.int32)
        given.indptr = np.array([0, 0, 3], np.int32)
    with pytest.raises(ValueError, match="sums may exceed int64"):
        evaluation.train_test_split(given, 0.5, random_state=0)
