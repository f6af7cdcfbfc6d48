"""Every row in exactly one slot, whatever the shapes."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from plans import PLANS

from tpu_als.engine import layout
from tpu_als.engine.layout import Plan, RowMap

LENGTHS = st.lists(st.integers(0, 90), max_size=60).map(lambda n: np.array(n, np.int64))


def _check_map(rows: RowMap, lengths: np.ndarray, plan: Plan) -> None:
    assert rows.n_shards == plan.n_shards
    assert len(np.unique(rows.slots)) == len(rows.slots) == len(lengths)
    assert rows.pad_slot not in rows.slots
    assert rows.pad_slot == rows.n_shards * rows.n_slots - 1
    shard, slot = np.divmod(rows.slots, rows.n_slots)
    assert np.all((shard >= 0) & (shard < plan.n_shards))
    seen = np.zeros(len(lengths), bool)
    floor = end = 0
    for rung in rows.rungs:
        assert rung.rows == plan.rows(rung.length) and rung.first_slot == end
        end = rung.first_slot + rung.n_chunks * rung.rows
        mine = (slot >= rung.first_slot) & (slot < end)
        seen |= mine
        assert mine.any()
        assert np.all((lengths[mine] <= rung.length) & (lengths[mine] >= floor))
        floor = rung.length
        # the k-th slot of a rung owns the k-th run of L cells
        shard_too, cell = np.divmod(rows.cells[mine], rows.n_cells)
        np.testing.assert_array_equal(shard[mine], shard_too)
        own = rung.first_cell + (slot[mine] - rung.first_slot) * rung.length
        np.testing.assert_array_equal(cell, own)
        per_shard = np.bincount(shard[mine], minlength=plan.n_shards)
        assert np.ptp(per_shard) <= 1 or plan.n_owners > 1
        assert per_shard.max() > (rung.n_chunks - 1) * rung.rows  # no chunk without a row
    np.testing.assert_array_equal(~seen, lengths > plan.lengths[-1])
    np.testing.assert_array_equal(np.sort(rows.long), np.flatnonzero(~seen))
    assert np.all(rows.cells[rows.long] == -1)
    for number in range(plan.n_shards):
        own = np.sort(slot[~seen & (shard == number)])
        np.testing.assert_array_equal(own, end + np.arange(len(own)))
    if plan.n_owners == 1:
        assert np.ptp(np.bincount(shard[~seen], minlength=plan.n_shards)) <= 1
        sums = np.bincount(shard[~seen], lengths[~seen], plan.n_shards)
        assert np.ptp(sums) <= 2 * lengths.max(initial=0)


def _padded_cells(lengths: np.ndarray, ladder: tuple[int, ...]) -> int:
    """Padded cells of rows of these lengths; long rows take multiples of the last rung."""
    rungs = np.array(ladder)
    at = np.minimum(np.searchsorted(rungs, lengths), len(rungs) - 1)
    return int((rungs[at] * np.maximum(-(-lengths // rungs[at]), 1)).sum())


@given(lengths=LENGTHS, plan=PLANS)
def test_every_row_has_one_slot_and_its_cells(lengths: np.ndarray, plan: Plan) -> None:
    _check_map(layout.map_rows(lengths, plan), lengths, plan)


@given(lengths=LENGTHS, plan=PLANS, n_owners=st.integers(1, 3), seed=st.integers(0, 99))
def test_rows_stay_with_their_owners(
    lengths: np.ndarray, plan: Plan, n_owners: int, seed: int
) -> None:
    plan = dataclasses.replace(plan, n_shards=plan.n_shards * n_owners, n_owners=n_owners)
    owners = np.random.default_rng(seed).integers(0, n_owners, len(lengths))
    rows = layout.map_rows(lengths, plan, owners)
    _check_map(rows, lengths, plan)
    shard = rows.slots // rows.n_slots
    np.testing.assert_array_equal(shard // (plan.n_shards // n_owners), owners)


@given(first=LENGTHS, second=LENGTHS, plan=PLANS, waste=st.integers(0, 200))
def test_sides_share_shapes_if_few_slots_are_added(
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
        assert new.rungs == old.rungs
        np.testing.assert_array_equal(new.long, old.long)
        np.testing.assert_array_equal(new.slots % new.n_slots, old.slots % old.n_slots)
        np.testing.assert_array_equal(new.cells // new.n_cells, old.cells // old.n_cells)
        n_short = np.count_nonzero(old.cells >= 0)
        assert len(np.unique(new.cells[new.cells >= 0])) == n_short == np.sum(new.cells >= 0)


@given(first=LENGTHS, second=LENGTHS, plan=PLANS)
def test_sides_of_one_size_share_their_rungs(
    first: np.ndarray, second: np.ndarray, plan: Plan
) -> None:
    before = layout.map_rows(first, plan), layout.map_rows(second, plan)
    if before[0].n_slots != before[1].n_slots:
        assert all(a is b for a, b in zip(layout.share_rungs(*before), before, strict=True))
    before = layout.share_shapes(*before, 1 << 60)
    after = layout.share_rungs(*before)
    shapes = [[(rung.length, rung.rows) for rung in rows.rungs] for rows in after]
    assert shapes[0] == shapes[1] == sorted(shapes[0])
    for old, new in zip(before, after, strict=True):
        assert tuple(rung for rung in new.rungs if rung.n_chunks) == old.rungs
        np.testing.assert_array_equal(new.slots, old.slots)
        np.testing.assert_array_equal(new.cells, old.cells)


@given(lengths=LENGTHS, plan=PLANS)
def test_tables_are_moved_to_another_layout_and_back(lengths: np.ndarray, plan: Plan) -> None:
    rows = layout.map_rows(lengths, plan)
    table = np.random.default_rng(0).normal(size=(len(lengths), 3)).astype(np.float32)
    slots = layout.to_slots(table, rows, range(rows.n_shards))
    assert slots.shape == (rows.n_shards, rows.n_slots, 3) and slots.dtype == table.dtype
    unused = np.ones(rows.n_shards * rows.n_slots, bool)
    unused[rows.slots] = False
    assert not slots.reshape(-1, 3)[unused].any()
    for number in range(rows.n_shards):
        one = layout.to_slots(table, rows, range(number, number + 1))
        np.testing.assert_array_equal(one[0], slots[number])
    back = layout.from_slots(slots, rows)
    np.testing.assert_array_equal(back, table)
    assert back.flags.writeable and not np.shares_memory(back, slots)


ROW_LENGTHS = st.lists(st.integers(0, 9000), max_size=40).map(lambda n: np.array(n, np.int64))


@given(
    lengths=ROW_LENGTHS,
    rung_cells=st.sampled_from([0.0, 10.0, 1e3, 1e9]),
    longest=st.sampled_from([layout.LONGEST, 1 << 16]),
)
def test_ladders_hold_every_row(lengths: np.ndarray, rung_cells: float, longest: int) -> None:
    ladder = layout.ladder(lengths, rung_cells, longest=longest)
    assert list(ladder) == sorted(set(ladder))
    assert ladder[0] >= layout.SHORTEST and 1 <= len(ladder) <= 2 * len(layout.doubling(longest))
    assert min(lengths.max(initial=1), longest) <= ladder[-1] <= longest
    if rung_cells == 1e9:
        assert len(ladder) == 1
    assert _padded_cells(lengths, ladder) >= lengths.sum()


@given(lengths=ROW_LENGTHS, rung_cells=st.sampled_from([0.0, 10.0, 300.0, 1e4]))
def test_no_other_choice_of_powers_of_two_costs_less(
    lengths: np.ndarray, rung_cells: float
) -> None:
    def cost(ladder: tuple[int, ...]) -> float:
        return _padded_cells(lengths, ladder) + rung_cells * len(ladder)

    best = cost(layout.ladder(lengths, rung_cells))
    *some, last = layout.doubling(lengths.max(initial=1))
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
    taken += (-(-lengths[rows.long] // block) * block).sum()
    assert _padded_cells(lengths, plan.lengths) == taken


@given(count=st.integers(0, 1 << 40), more=st.integers(0, 1 << 20))
def test_rounding_up_keeps_sizes_few_and_close(count: int, more: int) -> None:
    rounded = layout.round_up(count)
    assert rounded >= count and rounded % 8 == 0
    assert layout.round_up(rounded) == rounded
    assert layout.round_up(count + more) >= rounded
    assert rounded <= max(2 * count, 8)
    if count > 1 << 13:
        assert 8 * rounded <= 9 * count + 8
