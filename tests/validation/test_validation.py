"""Messages of the input checks, and accepted input."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from tpu_als.exceptions import ModelFitError, ParameterWarning
from tpu_als.validation import arguments, tables

ROWS = sparse.csr_matrix(np.array([[1, 0, 2], [0, 3, 0]], dtype=np.float32))


class TestFitArguments:
    def test_either_convention(self) -> None:
        callback = print
        assert arguments.fit_arguments(None, True, None) == (True, None)
        assert arguments.fit_arguments(np.ones(3), False, callback) == (False, callback)
        assert arguments.fit_arguments(False, True, None) == (False, None)
        assert arguments.fit_arguments(np.True_, callback, None) == (True, callback)
        assert arguments.fit_arguments(False, callback, None) == (False, callback)
        assert arguments.fit_arguments(None, None, None) == (None, None)
        assert arguments.fit_arguments(None, callback, None) == (None, callback)
        assert arguments.fit_arguments(None, False, None, callback) == (False, callback)
        assert arguments.fit_arguments(None, False, max, callback) == (False, max)

    def test_a_callback_is_callable(self) -> None:
        with pytest.raises(TypeError, match="callback must be callable"):
            arguments.fit_arguments(None, True, 3)
        with pytest.raises(TypeError, match="fit_callback must be callable"):
            arguments.fit_arguments(None, True, None, 5)

    @pytest.mark.parametrize("value", ["no", 2, np.ones(2)], ids=str)
    def test_progress_is_a_flag(self, value: Any) -> None:
        with pytest.raises(TypeError, match="show_progress must be True, False or None, got"):
            arguments.fit_arguments(None, value, None)


class TestCanonicalCsr:
    def test_the_input_is_not_modified(self) -> None:
        data = np.array([1.0, 2.0, 4.0], np.float32)
        given = sparse.csr_matrix((data, np.array([2, 0, 2]), np.array([0, 3])), shape=(1, 3))
        out = arguments.canonical_csr(given)
        assert out.has_canonical_format
        np.testing.assert_array_equal(out.toarray(), [[2, 0, 5]])
        np.testing.assert_array_equal(given.indices, [2, 0, 2])

    def test_stored_zeros_are_entries_and_dense_zeros_are_not(self) -> None:
        stored = sparse.csr_matrix((np.zeros(2), np.array([0, 2]), np.array([0, 2])), shape=(1, 3))
        assert arguments.canonical_csr(stored).nnz == 2
        assert arguments.canonical_csr(np.array([[0.0, 1.0]])).nnz == 1

    @pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csr_array, sparse.coo_matrix])
    def test_kinds(self, make: Any) -> None:
        out = arguments.canonical_csr(make(ROWS.astype(np.int64)))
        assert type(out) is sparse.csr_matrix
        assert out.dtype == np.float32
        np.testing.assert_array_equal(out.toarray(), ROWS.toarray())

    def test_a_row_of_a_sparse_array(self) -> None:
        row = sparse.csr_array(ROWS)[1]
        assert row.ndim == 1
        np.testing.assert_array_equal(arguments.canonical_csr(row).toarray(), [[0, 3, 0]])

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
    def test_values_that_float32_cannot_hold(self, value: float) -> None:
        with pytest.raises(ValueError, match="contains (NaN|infinity)"):
            arguments.canonical_csr(np.array([[1.0, value]]))

    def test_a_broken_matrix(self) -> None:
        broken = ROWS.copy()
        broken.indices[0] = 7
        with pytest.raises(ValueError, match="outside its shape"):
            arguments.canonical_csr(broken)


class TestRowsFor:
    @pytest.mark.parametrize("wrong", [None, ROWS.toarray(), ROWS.tocsc(), ROWS.tocoo()])
    def test_not_csr(self, wrong: Any) -> None:
        with pytest.raises(ValueError, match="needs to be a CSR sparse matrix, got "):
            arguments.rows_for(wrong, 2, 3)

    def test_not_strict_about_the_format(self) -> None:
        assert arguments.rows_for(ROWS.tocoo(), 2, 3, strict=False).format == "csr"

    def test_another_number_of_rows(self) -> None:
        with pytest.raises(ValueError, match="must contain 1 row for every user in userids") as e:
            arguments.rows_for(ROWS, 1, 3)
        assert "got 2 rows of shape (2, 3) for 1 ids" in str(e.value)
        assert "user_items[userids]" in str(e.value)

    def test_more_columns(self) -> None:
        with pytest.raises(ValueError, match="an entry in column 2, .* 2 items.*transposed"):
            arguments.rows_for(ROWS, 2, 2)
        with pytest.raises(ValueError, match="new users .*partial_fit_users"):
            arguments.rows_for(ROWS, 2, 2, "item_users")

    def test_other_widths_without_entries_beyond(self) -> None:
        assert arguments.rows_for(ROWS, 2, 9).shape == (2, 9)
        wide = sparse.csr_matrix((ROWS.data, ROWS.indices, ROWS.indptr), shape=(2, 50))
        assert arguments.rows_for(wide, 2, 3).shape == (2, 3)

    def test_a_mask_picks_its_rows(self) -> None:
        mask = np.array([False, True])
        picked = arguments.rows_for(ROWS, 1, 3, mask=mask)
        np.testing.assert_array_equal(picked.toarray(), [[0, 3, 0]])
        np.testing.assert_array_equal(
            arguments.rows_for(ROWS[1], 1, 3, mask=mask).toarray(), [[0, 3, 0]]
        )


class TestIds:
    @pytest.mark.parametrize(
        "ids",
        [[0, 2], (0, 2), range(0, 3, 2), {2, 0}, np.array([0, 2], np.uint8), {0: 1, 2: 1}.keys()],
    )
    def test_kinds(self, ids: Any) -> None:
        array, is_scalar, mask = arguments.ids_of(ids, 3)
        assert sorted(array.tolist()) == [0, 2]
        assert not is_scalar
        assert mask is None

    def test_a_memoryview(self) -> None:
        array, _, _ = arguments.ids_of(memoryview(np.array([1, 2], np.int32)), 3)
        assert array.tolist() == [1, 2]

    @pytest.mark.parametrize("one", [2, np.int64(2), np.array(2)])
    def test_one(self, one: Any) -> None:
        array, is_scalar, _ = arguments.ids_of(one, 3)
        assert array.tolist() == [2]
        assert is_scalar

    def test_a_mask(self) -> None:
        array, _, mask = arguments.ids_of([True, False, True], 3)
        assert array.tolist() == [0, 2]
        assert mask.tolist() == [True, False, True]
        with pytest.raises(IndexError, match="mask of length 2, expected 3"):
            arguments.ids_of([True, False], 3)

    def test_none(self) -> None:
        assert arguments.ids_of([], 3)[0].shape == (0,)
        assert arguments.ids_of([], 0)[0].dtype == np.int64

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (3, "userid 3 is not in the model, which has ids 0 to 2"),
            ([0, -1], "userid -1 is not in the model"),
            (1.0, "must hold integers, got dtype float64"),
            ("1", "must hold integers"),
            (True, "must hold integers, got dtype bool"),
            (None, "must hold integers"),
            ([[0, 1]], "1-D list of ids, got shape"),
        ],
    )
    def test_wrong(self, ids: Any, message: str) -> None:
        with pytest.raises(IndexError, match=message.replace("(", r"\(")):
            arguments.ids_of(ids, 3)

    def test_the_check_of_the_range_is_optional(self) -> None:
        assert arguments.ids_of([-5, 99], None)[0].tolist() == [-5, 99]


class TestSelection:
    NAMES = ("items", "filter_items")

    def test_neither(self) -> None:
        assert arguments.selection(None, None, 4, self.NAMES) == (None, None)
        assert arguments.selection(None, np.array([]), 4, self.NAMES) == (None, None)

    def test_either(self) -> None:
        chosen, excluded = arguments.selection([3, 1, 3], [], 4, self.NAMES)
        assert chosen.tolist() == [1, 3]
        assert excluded is None
        chosen, excluded = arguments.selection(None, (2, 0), 4, self.NAMES)
        assert chosen is None
        assert excluded.tolist() == [0, 2]

    @pytest.mark.parametrize("dropped", [[0], np.array([0, 2])])
    def test_both(self, dropped: Any) -> None:
        with pytest.raises(ValueError, match="Can't set both items and filter_items"):
            arguments.selection([1], dropped, 4, self.NAMES)

    @pytest.mark.parametrize("ids", [[4], [-1]])
    def test_out_of_range(self, ids: list[int]) -> None:
        with pytest.raises(IndexError, match="^items .* is not in the model"):
            arguments.selection(ids, None, 4, self.NAMES)
        with pytest.raises(IndexError, match="^filter_items .* is not in the model"):
            arguments.selection(None, ids, 4, self.NAMES)


class TestTables:
    def test_an_array_is_not_copied(self) -> None:
        table = np.ones((2, 3))
        assert tables.factor_table(table, "user_factors") is table
        assert tables.factor_table(None, "user_factors") is None

    def test_converted(self) -> None:
        class Wrapped:
            def to_numpy(self) -> np.ndarray:
                return np.ones((2, 3), np.float16)

        assert tables.factor_table(Wrapped(), "user_factors").dtype == np.float32
        assert tables.factor_table([[1, 2]], "user_factors").dtype == np.float32

    @pytest.mark.parametrize("table", [np.ones(3), [["a"]], np.array([[None]])])
    def test_not_a_table(self, table: Any) -> None:
        with pytest.raises(ValueError, match="user_factors must be a 2-D array of numbers"):
            tables.factor_table(table, "user_factors")

    def test_rows_that_are_not_finite(self) -> None:
        rows = np.array([[1.0], [np.nan]])
        with pytest.raises(ModelFitError, match="1 of 2 rows .*first: row 1"):
            tables.finite_rows(rows, "fold-in")
        assert tables.finite_rows(rows[:1], "fold-in").tolist() == [[1.0]]

    def test_counts_that_are_not_zero(self) -> None:
        tables.finite_counts((0, 0), 1)
        with pytest.raises(ModelFitError, match="4 item rows are not finite after iteration 2"):
            tables.finite_counts((0, 4), 2)


def test_number_of_results() -> None:
    assert arguments.result_count(np.int32(3)) == 3
    with pytest.raises(ValueError, match="N must be at least 0, got -1"):
        arguments.result_count(-1)
    with pytest.raises(TypeError, match="N must be an integer, got float"):
        arguments.result_count(2.0)


def test_only_conversions_warn() -> None:
    with pytest.warns(ParameterWarning, match="was passed coo_matrix"):
        arguments.warn_if_converted(ROWS.tocoo())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (ROWS, sparse.csr_array(ROWS), sparse.csr_array(ROWS)[0], ROWS.toarray()):
            arguments.warn_if_converted(fine)


def test_implicits_classes_catch_ours() -> None:
    base = pytest.importorskip("implicit.recommender_base")
    utils = pytest.importorskip("implicit.utils")
    assert issubclass(ModelFitError, base.ModelFitError)
    assert issubclass(ParameterWarning, utils.ParameterWarning)
