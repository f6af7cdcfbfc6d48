"""Damaged and unusual matrices: refused with a clear error, or read correctly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import corrupt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import random_counts
from scipy import sparse

from tpu_als import TPUAlternatingLeastSquares
from tpu_als.shards import write_shards
from tpu_als.validation import matrices, structure

HERE = Path(__file__).parents[1]
FORMATS = ("csr", "csc", "coo", "bsr", "dia", "lil", "dok")


@pytest.mark.slow
@pytest.mark.parametrize("group", corrupt.GROUPS)
def test_no_damaged_matrix_reaches_compiled_code(group: str) -> None:
    """A corrupt `indptr` could cause a crash, or a result from unrelated memory."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(HERE / "corrupt.py"), group],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])
    assert lines.pop() == f"done {len(lines)}"
    assert [line for line in lines if not line.endswith(" refused")] == []


@pytest.mark.parametrize("damage", corrupt.DAMAGES)
def test_the_fitted_model_answers_as_before(damage: str) -> None:
    matrix = corrupt.valid()
    model = TPUAlternatingLeastSquares(3, iterations=1, random_state=0)
    before = model.fit(matrix, show_progress=False).recommend(2, matrix[2])
    with pytest.raises(ValueError, match="damaged|outside its shape"):
        model.fit(corrupt.damaged(damage), show_progress=False)
    for ours, expected in zip(model.recommend(2, matrix[2]), before, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("indptr", "indices"),
    [
        ([0, 10**7], [0, 2]),
        ([0, -1], [0, 2]),
        ([0, 1], [0, 2]),
        ([0, 2], [0, 9]),
        ([0, 2], [-1, 2]),
    ],
)
def test_one_damaged_row(indptr: list[int], indices: list[int]) -> None:
    row = sparse.csr_matrix(np.array([[1.0, 0, 2, 0]], np.float32))
    row.has_canonical_format = True
    row.indptr, row.indices = np.array(indptr, np.int32), np.array(indices, np.int32)
    with pytest.raises(ValueError, match=r"damaged csr_matrix|outside its shape \(1, 4\)"):
        matrices.canonical_csr(row)


class TestWrongFlags:
    def _lying(self, indices: list[int], indptr: list[int]) -> sparse.csr_matrix:
        values = np.arange(1, len(indices) + 1, dtype=np.float32)
        out = sparse.csr_matrix((values, np.array(indices), np.array(indptr)), shape=(2, 4))
        out.has_sorted_indices = out.has_canonical_format = True
        return out

    @pytest.mark.parametrize(
        ("indices", "expected"),
        [([3, 0, 1], [[2, 0, 0, 1], [0, 3, 0, 0]]), ([2, 2, 1], [[0, 0, 3, 0], [0, 3, 0, 0]])],
    )
    def test_order_and_duplicates(self, indices: list[int], expected: list[list[int]]) -> None:
        given = self._lying(indices, [0, 2, 3])
        for out in (matrices.canonical_csr(given), matrices.canonical(given)):
            np.testing.assert_array_equal(out.toarray(), expected)
            assert (np.diff(out.indices[:-1]) > 0).all()
        np.testing.assert_array_equal(given.indices, indices)

    def test_a_row_may_start_below_the_last_id(self) -> None:
        given = self._lying([2, 3, 0], [0, 2, 3])
        assert matrices.canonical_csr(given) is given

    def test_a_single_row_of_recommend(self, counts: sparse.csr_matrix) -> None:
        model = TPUAlternatingLeastSquares(3, iterations=1, random_state=0)
        model.fit(counts, show_progress=False)
        row = sparse.csr_matrix((np.ones(3, np.float32), [4, 1, 4], [0, 3]), shape=(1, 20))
        expected = model.recalculate_user(0, sparse.csr_matrix(row.toarray()))
        row.has_sorted_indices = row.has_canonical_format = True
        np.testing.assert_array_equal(model.recalculate_user(0, row), expected)


def _coo(rows: Any, columns: Any) -> sparse.coo_matrix:
    out = sparse.coo_matrix(np.diag([1.0, 2.0, 3.0]))
    out.coords = np.asarray(rows), np.asarray(columns)
    return out


def _with(matrix: Any, **arrays: Any) -> Any:
    for name, array in arrays.items():
        setattr(matrix, name, array)
    return matrix


def _lists(rows: list[list[Any]], values: list[list[float]]) -> sparse.lil_matrix:
    out = sparse.lil_matrix((len(rows), 3))
    for at, (ids, row) in enumerate(zip(rows, values, strict=True)):
        out.rows[at], out.data[at] = ids, row
    return out


def _keys(entries: dict[tuple[int, int], float]) -> sparse.dok_matrix:
    out = sparse.dok_matrix((3, 3))
    out._dict.update(entries)
    return out


def _blocks() -> sparse.bsr_matrix:
    return sparse.bsr_matrix(np.eye(4), blocksize=(2, 2))


TWICE = _with(sparse.dia_matrix(np.eye(3)), offsets=np.array([0, 0]), data=np.ones((2, 3)))
OTHERS: dict[str, Any] = {
    "coo, negative row": _coo([0, -1, 2], [0, 1, 2]),
    "coo, row too large": _coo([0, 1, 10**6], [0, 1, 2]),
    "coo, negative column": _coo([0, 1, 2], [0, -10, 2]),
    "coo, column too large": _coo([0, 1, 2], [0, 1, 3]),
    "coo, fewer rows": _coo([0, 1], [0, 1, 2]),
    "coo, floats": _coo([0.0, 1.0, 2.0], [0, 1, 2]),
    "csc, row too large": _with(sparse.csc_matrix(np.eye(3)), indices=np.array([0, 1, 10**7])),
    "csc, indptr": _with(sparse.csc_matrix(np.eye(3)), indptr=np.array([0, 10**7, 2, 3])),
    "bsr, indptr": _with(_blocks(), indptr=np.array([0, 10**6, 2])),
    "bsr, block": _with(_blocks(), indices=np.array([0, 2])),
    "bsr, data": _with(_blocks(), data=np.ones((1, 2, 2))),
    "bsr, block shape": _with(_blocks(), data=np.ones((2, 3, 3))),
    "dia, fewer diagonals": _with(sparse.dia_matrix(np.eye(3)), offsets=np.array([0, 1, 2])),
    "dia, repeated": TWICE,
    "lil, fewer values": _lists([[0, 1, 2], []], [[1.0], []]),
    "lil, column too large": _lists([[7]], [[1.0]]),
    "lil, no number": _lists([["a"]], [[1.0]]),
    "dok, key": _keys({(0, 7): 1.0}),
    "dok, negative": _keys({(-4, 0): 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_other_formats(what: str) -> None:
    kind = rf"damaged {what[:3]}_matrix|damaged coo_matrix|outside its shape"
    for check in (matrices.canonical_csr, matrices.canonical, structure.checked):
        with pytest.raises(ValueError, match=kind):
            check(OTHERS[what])


@pytest.mark.parametrize("kind", FORMATS)
@given(seed=st.integers(0, 1 << 32), as_array=st.booleans())
def test_valid_matrices_are_accepted_in_every_format(kind: str, seed: int, as_array: bool) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.integers(-2, 4, (rng.integers(0, 6), rng.integers(1, 7))).astype(np.float32)
    make = getattr(sparse, f"{kind}_{'array' if as_array else 'matrix'}")
    given_ = make(dense)
    for out in (matrices.canonical_csr(given_), matrices.canonical(given_)):
        assert type(out) is sparse.csr_matrix and out.has_canonical_format
        np.testing.assert_array_equal(out.toarray(), dense)
    assert structure.checked(given_) is given_ or kind in ("lil", "dok")


class TestValues:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_complex_numbers_are_refused(self, kind: str) -> None:
        given = sparse.csr_matrix(np.array([[1 + 2j, 0]])).asformat(kind)
        with pytest.raises(ValueError, match="complex numbers, whose imaginary part would be lost"):
            matrices.canonical_csr(given)

    def test_complex_numbers_to_shards(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="imaginary part would be lost"):
            write_shards(sparse.csr_matrix([[1 + 2j, 0]]), tmp_path / "shards")
        assert not (tmp_path / "shards").exists()

    def test_complex_numbers_that_are_dense(self) -> None:
        with pytest.raises(ValueError, match="imaginary part would be lost"):
            matrices.canonical_csr(np.array([[1 + 2j, 0]]))

    def _objects(self, values: list[Any]) -> sparse.csr_matrix:
        out = sparse.csr_matrix(np.ones((1, len(values))))
        out.data = np.array(values, dtype=object)
        return out

    def test_objects(self) -> None:
        out = matrices.canonical_csr(self._objects([1, 2.5, True]))
        np.testing.assert_array_equal(out.toarray(), [[1, 2.5, 1]])
        with pytest.raises(ValueError, match="imaginary part would be lost"):
            matrices.canonical_csr(self._objects([1, 2j]))
        for wrong in ("1", b"1", [], {}):
            with pytest.raises(ValueError, match="must hold real numbers, got values of dtype obj"):
                matrices.canonical_csr(self._objects([1, wrong]))
        with pytest.raises(ValueError, match="contains NaN"):
            matrices.canonical_csr(self._objects([1, None]))

    @pytest.mark.parametrize("dtype", ["S3", "U3", "datetime64[s]", "timedelta64[s]", "V4"])
    def test_values_that_are_not_numbers(self, dtype: str) -> None:
        out = sparse.csr_matrix(np.ones((1, 2)))
        out.data = np.zeros(2, dtype)
        with pytest.raises(ValueError, match="must hold real numbers, got values of dtype"):
            matrices.canonical_csr(out)
        with pytest.raises((TypeError, ValueError), match="real numbers|array of text or records"):
            matrices.canonical_csr(np.zeros((1, 2), dtype))

    @pytest.mark.parametrize("dtype", ["?", "i1", "u8", ">i4", "f2", ">f4", ">f8", "g"])
    @pytest.mark.parametrize("kind", ["csr", "csc", "coo"])
    def test_any_real_dtype(self, dtype: str, kind: str) -> None:
        dense = np.array([[1, 0, 1], [0, 1, 0]])
        given = sparse.csr_matrix(dense).asformat(kind)
        given.data = given.data.astype(dtype)
        out = matrices.canonical_csr(given)
        assert out.dtype == np.float32 and out.dtype.isnative
        np.testing.assert_array_equal(out.toarray(), dense)

    @pytest.mark.parametrize("kind", ["csr", "coo", "csc"])
    def test_sums_of_small_integers_do_not_wrap(self, kind: str) -> None:
        given = sparse.coo_matrix((np.full(3, 100, np.int8), ([0, 0, 0], [1, 1, 1])), (1, 2))
        if kind != "coo":
            given = getattr(sparse, f"{kind}_matrix")((1, 2), dtype=np.int8)
            given.data = np.full(3, 100, np.int8)
            given.indices = np.array([1, 1, 1] if kind == "csr" else [0, 0, 0], np.int32)
            given.indptr = np.array([0, 3] if kind == "csr" else [0, 0, 3], np.int32)
        for out in (matrices.canonical_csr(given), matrices.canonical(given)):
            np.testing.assert_array_equal(out.toarray(), [[0, 300]])
        assert matrices.canonical(given).dtype == np.int64
        model = TPUAlternatingLeastSquares(2, iterations=0).fit(np.eye(2), show_progress=False)
        expected = model.transform(np.array([[0, 300]]))
        np.testing.assert_array_equal(model.transform(given), expected)

    def test_the_dtype_is_kept_if_the_sums_fit(self) -> None:
        given = sparse.coo_matrix((np.ones(3, np.int8), ([0, 0, 0], [1, 1, 0])), (1, 2))
        assert matrices.canonical(given).dtype == np.int8
        assert matrices.canonical(given.astype(bool)).dtype == bool

    def test_near_the_limit_of_float32(self) -> None:
        most = float(np.finfo(np.float32).max)
        assert matrices.canonical_csr(np.array([[most]])).data[0] == np.float32(most)
        with pytest.raises(ValueError, match="contains infinity, or values too large"):
            matrices.canonical_csr(np.array([[most * 1.001]]))
        twice = sparse.csr_matrix((np.full(2, most, np.float32), [0, 0], [0, 2]), shape=(1, 1))
        with pytest.raises(ValueError, match="contains infinity, or values too large"):
            matrices.canonical_csr(twice)


class TestIndexArrays:
    @pytest.mark.parametrize("first", ["i4", "i8", "u4", "u8", "i2", ">i4", ">i8"])
    @pytest.mark.parametrize("second", ["i4", "i8"])
    def test_dtypes(self, first: str, second: str) -> None:
        counts = random_counts(30, 20)
        given = counts.copy()
        given.indices, given.indptr = given.indices.astype(first), given.indptr.astype(second)
        out = matrices.canonical_csr(given)
        assert out.indices.dtype == out.indptr.dtype and out.indices.dtype in (np.int32, np.int64)
        np.testing.assert_array_equal(out.toarray(), counts.toarray())

    @pytest.mark.parametrize("dtype", ["i8", "u8"])
    def test_ids_that_int32_would_wrap(self, dtype: str) -> None:
        given = random_counts(30, 20)
        given.indices = given.indices.astype(dtype)
        given.indices[5] = 2**32 + 1 if dtype == "i8" else 2**63 + 1
        with pytest.raises(ValueError, match="outside its shape"):
            matrices.canonical_csr(given)

    def test_strides(self) -> None:
        counts = random_counts(30, 20)
        given = counts.copy()
        for name in ("data", "indices", "indptr"):
            setattr(given, name, np.repeat(getattr(given, name), 2)[::2])
        out = matrices.canonical_csr(given)
        assert all(a.flags.c_contiguous for a in (out.data, out.indices, out.indptr))
        np.testing.assert_array_equal(out.toarray(), counts.toarray())

    def test_one_dimension(self) -> None:
        row = sparse.csr_array(np.array([0.0, 2.0, 3.0]))
        np.testing.assert_array_equal(matrices.canonical_csr(row).toarray(), [[0, 2, 3]])
        row.indices = np.array([1, 9])
        with pytest.raises(ValueError, match="outside its shape"):
            matrices.canonical_csr(row)

    def test_three_dimensions(self) -> None:
        with pytest.raises(ValueError, match="must have at most 2 dimensions, got .* of 3"):
            matrices.canonical_csr(sparse.coo_array(np.ones((1, 2, 2))))
        with pytest.raises(ValueError, match="must be a matrix of shape .* of 3 dimensions"):
            matrices.canonical_csr(np.ones((1, 2, 2)))

    def test_unused_trailing_entries_are_refused(self) -> None:
        given = random_counts(30, 20)
        expected = given.toarray()
        given.data, given.indices = np.append(given.data, 1), np.append(given.indices, 0)
        with pytest.raises(ValueError, match=r"matrix\.prune\(\) drops spare entries"):
            matrices.canonical_csr(given)
        given.prune()
        np.testing.assert_array_equal(matrices.canonical_csr(given).toarray(), expected)


@pytest.mark.parametrize("kind", ["coo_matrix", "coo_array", "csc_matrix", "dia_matrix"])
@pytest.mark.parametrize("function", [matrices.canonical, matrices.canonical_csr])
def test_more_rows_than_memory_holds(kind: str, function: Any) -> None:
    """As of hashed ids: a CSR matrix has a number for each row, also for empty ones."""
    few = sparse.coo_matrix(([1.0, 2.0], ([0, 1], [0, 1])), shape=(2**44, 3))
    if kind == "csc_matrix":
        wide = sparse.csc_matrix(([1.0, 2.0], [0, 1], [0, 1, 2, 2]), shape=(2**44, 3))
    elif kind == "dia_matrix":
        wide = sparse.dia_matrix((np.array([[1.0, 2.0, 0.0]]), [0]), shape=(2**44, 3))
    else:
        wide = getattr(sparse, kind)(few)
    with pytest.raises(MemoryError, match=r"row pointers of 17592186044416 rows of user_items"):
        function(wide)
