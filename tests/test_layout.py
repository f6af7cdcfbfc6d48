"""Every entry in exactly one cell, every row in exactly one slot, whatever the shapes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from tpu_als import layout
from tpu_als.layout import Plan, RowMap

PLANS = st.builds(
    Plan,
    lengths=st.sampled_from([(8,), (8, 16), (8, 24, 64), (2, 3, 5), (1,)]),
    chunk=st.sampled_from([1, 8, 32, 256]),
    most_rows=st.sampled_from([1, 3, 1 << 30]),
    n_shards=st.integers(1, 4),
)
LENGTHS = st.lists(st.integers(0, 90), max_size=60).map(lambda n: np.array(n, np.int64))


@st.composite
def matrices(draw: st.DrawFn) -> sparse.csr_matrix:
    """Up to 40 x 70, of any density; stored zeros, empty rows and empty matrices among them."""
    shape = draw(st.integers(0, 40)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    stored = rng.random(shape) < rng.random((shape[0], 1)) * draw(st.sampled_from([0, 0.3, 1.5]))
    rows, columns = np.nonzero(stored)
    values = rng.integers(-3, 4, len(rows)).astype(draw(st.sampled_from([np.float32, np.float64])))
    return sparse.csr_matrix((values, (rows, columns)), shape)


def _check_map(rows: RowMap, lengths: np.ndarray, plan: Plan) -> None:
    assert rows.n_shards == plan.n_shards
    assert len(np.unique(rows.slots)) == len(rows.slots) == len(lengths)
    assert rows.pad_slot not in rows.slots
    assert rows.pad_slot == rows.n_shards * rows.n_slots - 1
    shard, slot = np.divmod(rows.slots, rows.n_slots)
    shard_too, cell = np.divmod(rows.cells, rows.n_cells)
    np.testing.assert_array_equal(shard, shard_too)
    assert np.all((shard >= 0) & (shard < plan.n_shards))
    seen = np.zeros(len(lengths), bool)
    floor = 0
    for rung in rows.rungs:
        assert rung.rows == plan.rows(rung.length)
        last = rung.first_slot + rung.n_chunks * rung.rows
        mine = (slot >= rung.first_slot) & (slot < last)
        seen |= mine
        assert mine.any()
        assert np.all((lengths[mine] <= rung.length) & (lengths[mine] >= floor))
        floor = rung.length
        # the k-th slot of a rung owns the k-th run of L cells
        own = rung.first_cell + (slot[mine] - rung.first_slot) * rung.length
        np.testing.assert_array_equal(cell[mine], own)
        per_shard = np.bincount(shard[mine], minlength=plan.n_shards)
        assert np.ptp(per_shard) <= 1
        assert per_shard.max() > (rung.n_chunks - 1) * rung.rows  # no chunk without a row
    np.testing.assert_array_equal(~seen, lengths > plan.lengths[-1])
    np.testing.assert_array_equal(~seen, slot >= rows.long_slot)
    _check_long(rows, lengths, plan, ~seen)


def _check_long(rows: RowMap, lengths: np.ndarray, plan: Plan, long: np.ndarray) -> None:
    shard, slot = np.divmod(rows.slots[long], rows.n_slots)
    cell = rows.cells[long] % rows.n_cells
    block = plan.lengths[-1]
    blocks = -(-lengths[long] // block)
    np.testing.assert_array_equal((cell - rows.long_cell) % block, 0)
    per_shard = np.bincount(shard, minlength=plan.n_shards)
    assert rows.n_long == per_shard.max()
    assert np.ptp(per_shard) <= 1
    assert np.ptp(np.bincount(shard, blocks, plan.n_shards)) <= 2 * blocks.max(initial=0)
    for own in range(plan.n_shards):
        order = np.argsort(slot[shard == own])
        slots, starts = slot[shard == own][order], cell[shard == own][order]
        np.testing.assert_array_equal(slots, rows.long_slot + np.arange(len(slots)))
        ends = starts + blocks[shard == own][order] * block
        np.testing.assert_array_equal(starts[1:], ends[:-1])  # whole blocks, one after another
        assert np.all(starts[:1] == rows.long_cell)
        assert np.all(ends <= rows.n_cells)


@given(lengths=LENGTHS, plan=PLANS)
def test_every_row_has_one_slot_and_its_cells(lengths: np.ndarray, plan: Plan) -> None:
    _check_map(layout.map_rows(lengths, plan), lengths, plan)


def _check_cells(
    matrix: sparse.csr_matrix, rows: RowMap, source_slots: np.ndarray, pad_slot: int
) -> None:
    cells = layout.fill(matrix, rows, source_slots, pad_slot)
    assert cells.ids.shape == cells.values.shape == (rows.n_shards, rows.n_cells)
    assert cells.ids.dtype == np.int32 and cells.values.dtype == matrix.dtype
    ids, values = cells.ids.ravel(), cells.values.ravel()
    free = np.ones(len(ids), bool)
    for row in range(matrix.shape[0]):
        entries = slice(matrix.indptr[row], matrix.indptr[row + 1])
        own = slice(rows.cells[row], rows.cells[row] + entries.stop - entries.start)
        np.testing.assert_array_equal(ids[own], source_slots[matrix.indices[entries]])
        np.testing.assert_array_equal(values[own], matrix.data[entries])
        assert free[own].all()
        free[own] = False
    assert np.count_nonzero(~free) == matrix.nnz
    assert np.all(ids[free] == pad_slot) and np.all(values[free] == 0)
    lengths = np.diff(matrix.indptr)
    np.testing.assert_array_equal(cells.lengths.ravel()[rows.slots], lengths)
    assert cells.lengths.shape == (rows.n_shards, rows.n_slots)
    assert cells.lengths.sum() == matrix.nnz
    for row in np.flatnonzero(rows.slots % rows.n_slots >= rows.long_slot):
        shard, slot = divmod(rows.slots[row], rows.n_slots)
        first = cells.long_cells[shard, slot - rows.long_slot]
        assert first + shard * rows.n_cells == rows.cells[row]


@given(matrix=matrices(), plan=PLANS, waste=st.sampled_from([0, 1 << 30]))
def test_every_entry_is_in_one_cell(matrix: sparse.csr_matrix, plan: Plan, waste: int) -> None:
    turned = matrix.T.tocsr()
    lengths = np.diff(matrix.indptr), np.diff(turned.indptr)
    users, items = (layout.map_rows(n, plan) for n in lengths)
    users, items = layout.share_shapes(users, items, waste)
    for rows, n in zip((users, items), lengths, strict=True):
        _check_map(rows, n, plan)
    _check_cells(matrix, users, items.slots, items.pad_slot)
    _check_cells(turned, items, users.slots, users.pad_slot)


@given(first=LENGTHS, second=LENGTHS, plan=PLANS, waste=st.integers(0, 200))
def test_sides_share_shapes_where_it_is_cheap(
    first: np.ndarray, second: np.ndarray, plan: Plan, waste: int
) -> None:
    before = layout.map_rows(first, plan), layout.map_rows(second, plan)
    after = layout.share_shapes(*before, waste)
    most = max(rows.n_slots for rows in before)
    if sum(most - rows.n_slots for rows in before) * plan.n_shards > waste:
        assert [(rows.n_slots, rows.n_cells) for rows in after] == [
            (rows.n_slots, rows.n_cells) for rows in before
        ]
    else:
        assert after[0].n_slots == after[1].n_slots == most
        assert after[0].n_cells == after[1].n_cells == max(rows.n_cells for rows in before)
    for old, new in zip(before, after, strict=True):
        assert new.rungs == old.rungs and new.n_long == old.n_long
        np.testing.assert_array_equal(new.slots % new.n_slots, old.slots % old.n_slots)
        np.testing.assert_array_equal(new.cells // new.n_cells, old.cells // old.n_cells)


@given(lengths=LENGTHS, plan=PLANS)
def test_tables_travel_there_and_back(lengths: np.ndarray, plan: Plan) -> None:
    rows = layout.map_rows(lengths, plan)
    table = np.random.default_rng(0).normal(size=(len(lengths), 3)).astype(np.float32)
    slots = layout.to_slots(table, rows)
    assert slots.shape == (rows.n_shards, rows.n_slots, 3) and slots.dtype == table.dtype
    unused = np.ones(rows.n_shards * rows.n_slots, bool)
    unused[rows.slots] = False
    assert not slots.reshape(-1, 3)[unused].any()
    back = layout.from_slots(slots, rows)
    np.testing.assert_array_equal(back, table)
    assert back.flags.writeable and not np.shares_memory(back, slots)


def test_filling_in_parts_is_filling_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = sparse.random(50, 40, 0.4, "csr", random_state=3)
    rows = layout.map_rows(np.diff(matrix.indptr), Plan((8, 16), 32, 4, 2))
    whole = layout.fill(matrix, rows, np.arange(40), 63)
    monkeypatch.setattr(layout, "_FILL_ENTRIES", 5)  # below the longest row
    for one, other in zip(
        vars(whole).values(),
        vars(layout.fill(matrix, rows, np.arange(40), 63)).values(),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


ROW_LENGTHS = st.lists(st.integers(0, 9000), max_size=40).map(lambda n: np.array(n, np.int64))


@given(lengths=ROW_LENGTHS, rung_cells=st.sampled_from([0.0, 10.0, 1e3, 1e9]))
def test_ladders_hold_every_row(lengths: np.ndarray, rung_cells: float) -> None:
    ladder = layout.ladder(lengths, rung_cells)
    assert list(ladder) == sorted(set(ladder))
    assert ladder[0] >= layout.SHORTEST and 1 <= len(ladder) <= 16
    assert min(lengths.max(initial=1), layout.LONGEST) <= ladder[-1] <= layout.LONGEST
    if rung_cells == 1e9:
        assert len(ladder) == 1
    assert layout.padded_cells(lengths, ladder) >= lengths.sum()


@given(lengths=ROW_LENGTHS, rung_cells=st.sampled_from([0.0, 10.0, 300.0, 1e4]))
def test_no_other_choice_of_rungs_costs_less(lengths: np.ndarray, rung_cells: float) -> None:
    def cost(ladder: tuple[int, ...]) -> float:
        return layout.padded_cells(lengths, ladder) + rung_cells * len(ladder)

    best = cost(layout.ladder(lengths, rung_cells))
    *some, last = layout.ladder(lengths, 0.0, most=9)
    for count in range(len(some) + 1):
        for others in itertools.combinations(some, count):
            assert best <= cost((*others, last))


@given(lengths=LENGTHS, plan=PLANS)
def test_padded_cells_are_those_that_rows_take(lengths: np.ndarray, plan: Plan) -> None:
    rows = layout.map_rows(lengths, plan)
    slot = rows.slots % rows.n_slots
    taken = 0
    for rung in rows.rungs:
        last = rung.first_slot + rung.n_chunks * rung.rows
        taken += rung.length * np.count_nonzero((slot >= rung.first_slot) & (slot < last))
    block = plan.lengths[-1]
    taken += (-(-lengths[slot >= rows.long_slot] // block) * block).sum()
    assert layout.padded_cells(lengths, plan.lengths) == taken


@given(count=st.integers(0, 1 << 40), more=st.integers(0, 1 << 20))
def test_rounding_up_keeps_sizes_few_and_close(count: int, more: int) -> None:
    rounded = layout.round_up(count)
    assert rounded >= count and rounded % 8 == 0
    assert layout.round_up(rounded) == rounded
    assert layout.round_up(count + more) >= rounded
    assert rounded <= max(2 * count, 8)
    if count > 1 << 13:
        assert 8 * rounded <= 9 * count + 8


@pytest.mark.parametrize("shape", [(0, 5), (4, 5)])
def test_a_matrix_without_entries(shape: tuple[int, int]) -> None:
    matrix = sparse.csr_matrix(shape, dtype=np.float32)
    plan = Plan(layout.ladder(np.diff(matrix.indptr), 10.0), 64, 8, 2)
    rows = layout.map_rows(np.diff(matrix.indptr), plan)
    cells = layout.fill(matrix, rows, np.arange(5), 7)
    assert np.all(cells.ids == 7) and not cells.values.any() and not cells.lengths.any()
    assert cells.long_cells.shape == (2, 0)
    assert len(np.unique(rows.slots)) == shape[0]
