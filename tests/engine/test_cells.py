"""Every entry is in exactly one cell, for all shapes and orders of reading."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import PLANS
from scipy import sparse

from tpu_als.engine import cells, layout
from tpu_als.engine.cells import InMemory, LongCells, LongRows, LongShape
from tpu_als.engine.layout import Plan, RowMap


@st.composite
def matrices(draw: st.DrawFn) -> sparse.csr_matrix:
    """Up to 40 x 70, of any density; stored zeros, empty rows and empty matrices among them."""
    shape = draw(st.integers(0, 40)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    stored = rng.random(shape) < rng.random((shape[0], 1)) * draw(st.sampled_from([0, 0.3, 1.5]))
    rows, columns = np.nonzero(stored)
    values = rng.integers(-3, 4, len(rows)).astype(draw(st.sampled_from([np.float32, np.float64])))
    return sparse.csr_matrix((values, (rows, columns)), shape)


def _maps(matrix: sparse.csr_matrix, plan: Plan) -> tuple[RowMap, RowMap]:
    transposed = matrix.T.tocsr()
    return layout.map_rows(np.diff(matrix.indptr), plan), layout.map_rows(
        np.diff(transposed.indptr), plan
    )


def _in_memory(matrix: sparse.csr_matrix) -> InMemory:
    return InMemory(matrix, matrix.T.tocsr())


def _same(a: int) -> int:
    return a


@given(matrix=matrices(), plan=PLANS)
def test_every_entry_of_a_short_row_is_in_one_cell(matrix: sparse.csr_matrix, plan: Plan) -> None:
    rows, source = _maps(matrix, plan)
    blocks = list(_in_memory(matrix).blocks("user"))
    every = range(plan.n_shards)
    ids, values = cells.fill(blocks, rows, source.slots, source.pad_slot, every, matrix.dtype)
    assert ids.shape == values.shape == (rows.n_shards, rows.n_cells)
    assert ids.dtype == np.int32 and values.dtype == matrix.dtype
    for number in every:
        one = range(number, number + 1)
        part = cells.fill(blocks, rows, source.slots, source.pad_slot, one, matrix.dtype)
        np.testing.assert_array_equal(part[0][0], ids[number])
        np.testing.assert_array_equal(part[1][0], values[number])
    flat_ids, flat_values = ids.ravel(), values.ravel()
    free = np.ones(len(flat_ids), bool)
    for row in np.flatnonzero(rows.cells >= 0):
        entries = slice(matrix.indptr[row], matrix.indptr[row + 1])
        own = slice(rows.cells[row], rows.cells[row] + entries.stop - entries.start)
        np.testing.assert_array_equal(flat_ids[own], source.slots[matrix.indices[entries]])
        np.testing.assert_array_equal(flat_values[own], matrix.data[entries])
        assert free[own].all()
        free[own] = False
    assert np.all(flat_ids[free] == source.pad_slot) and np.all(flat_values[free] == 0)


def _unpacked(long: LongRows, shard: int, block: int) -> dict[int, list[tuple[int, float]]]:
    """Entries of each long row that a shard has: (id of the cell, value)."""
    found: dict[int, list[tuple[int, float]]] = {}
    starts = long.starts[shard]
    for batch in range(len(starts) - 1):
        for at in range(starts[batch], starts[batch + 1]):
            assert 0 < long.n_entries[shard, at] <= block
            row = batch * cells.LONG_ROWS + int(long.rows[shard, at])
            kept = slice(0, long.n_entries[shard, at])
            own = found.setdefault(row, [])
            own += zip(long.ids[shard, at, kept], long.values[shard, at, kept], strict=True)
    return found


@given(matrix=matrices(), plan=PLANS, spread=st.booleans(), is_transposed=st.booleans())
def test_every_entry_of_a_long_row_is_in_one_block(
    matrix: sparse.csr_matrix, plan: Plan, spread: bool, is_transposed: bool
) -> None:
    rows, source = _maps(matrix, plan)
    lengths, block = np.diff(matrix.indptr), plan.lengths[-1]
    both = _in_memory(matrix)
    blocks = both.blocks("item" if is_transposed else "user")
    found = cells.long_entries(blocks, rows, is_transposed, np.dtype(np.float32))
    of_row = rows.slots[rows.long] // rows.n_slots
    slots = source.slots[found.source]
    shard = slots // source.n_slots if spread else of_row[found.long]
    every = range(plan.n_shards)
    long = cells.fill_long(
        LongCells(found, shard, slots), rows, lengths, LongShape(block), every, _same
    )
    total: dict[int, list[tuple[int, float]]] = {}
    for number in every:
        for index, entries in _unpacked(long, number, block).items():
            total.setdefault(index, []).extend(entries)
            if spread:
                assert all(slot // source.n_slots == number for slot, _ in entries)
            else:
                assert of_row[index] == number
        mine = long.slots[number] < rows.n_slots
        np.testing.assert_array_equal(np.flatnonzero(mine), np.flatnonzero(of_row == number))
        np.testing.assert_array_equal(
            long.slots[number][mine], rows.slots[rows.long][of_row == number] % rows.n_slots
        )
        np.testing.assert_array_equal(long.lengths[number][: len(rows.long)], lengths[rows.long])
        assert not long.lengths[number][len(rows.long) :].any()
    for index, row in enumerate(rows.long):
        entries = slice(matrix.indptr[row], matrix.indptr[row + 1])
        slots = source.slots[matrix.indices[entries]]
        expected = zip(slots, matrix.data[entries], strict=True)
        assert sorted(total.pop(index)) == sorted(expected)
    assert not total


def test_blocks_of_a_matrix_are_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = sparse.random(50, 40, 0.4, "csr", random_state=3)
    both = _in_memory(matrix)
    monkeypatch.setattr(cells, "_BLOCK_ENTRIES", 5)  # below the longest row
    for side, whole in (("user", matrix), ("item", matrix.T.tocsr())):
        rows, blocks = zip(*both.blocks(side), strict=True)
        assert len(blocks) > 10
        np.testing.assert_array_equal(np.concatenate(rows), np.arange(whole.shape[0]))
        assert (sparse.vstack(blocks, "csr") != whole).nnz == 0
        np.testing.assert_array_equal(both.lengths(side)[1], np.diff(whole.indptr))


@given(matrix=matrices(), values=st.sampled_from([1, 2]))
def test_a_matrix_of_ones_is_transposed_with_values_of_one_byte(
    matrix: sparse.csr_matrix, values: int
) -> None:
    matrix.data[:] = values
    entries = InMemory.with_transpose(matrix)
    assert entries.item_users is not None
    assert (entries.item_users.dtype == np.int8) == (values == 1 or not matrix.nnz)
    assert (entries.item_users != matrix.T).nnz == 0


@pytest.mark.parametrize("shape", [(0, 5), (4, 5)])
def test_a_matrix_without_entries(shape: tuple[int, int]) -> None:
    matrix = sparse.csr_matrix(shape, dtype=np.float32)
    plan = Plan(layout.ladder(np.diff(matrix.indptr), 10.0), 64, 8, 2)
    rows = layout.map_rows(np.diff(matrix.indptr), plan)
    blocks = _in_memory(matrix).blocks("user")
    ids, values = cells.fill(blocks, rows, np.arange(5), 7, range(2), np.float32)
    assert np.all(ids == 7) and not values.any()
    assert len(rows.long) == 0 and len(np.unique(rows.slots)) == shape[0]
