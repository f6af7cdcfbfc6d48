"""Numbers that do not fit into int32: counted right, or refused before anything is placed."""

from __future__ import annotations

import numpy as np
import pytest

from tpu_als.engine import layout
from tpu_als.shards.reader import cut_rows


def test_cells_beyond_int32_are_refused() -> None:
    plan = layout.Plan((4096,), 1 << 17, 1 << 13, 1)
    fits = layout.map_rows(np.full(450_000, 4096), plan)
    assert fits.n_cells < 2**31
    with pytest.raises(ValueError, match=r"need 2\d{9} cells of a device.*use more devices"):
        layout.map_rows(np.full(600_000, 4096), plan)


def test_slots_beyond_int32_are_refused() -> None:
    rows = np.ones(4, int)
    assert layout.map_rows(rows, layout.Plan((8,), 1 << 17, 1 << 14, 1 << 16)).pad_slot < 2**31
    with pytest.raises(ValueError, match=r"need \d{10} slots of a table.*fit fewer rows"):
        layout.map_rows(rows, layout.Plan((8,), 1 << 17, 1 << 14, 1 << 18))


def test_pieces_of_rows_close_to_the_limit() -> None:
    class Rows:
        """What `cut_rows` asks of a matrix whose entries would take 16 GB."""

        indptr = np.array([0, 2**30, 2**31 - 300, 2**31 - 200, 2**31 - 100], np.int32)
        nnz, shape = 2**31 - 100, (4, 1)

        def __getitem__(self, at: slice) -> slice:
            return at

    pieces = [at for _, at in cut_rows(np.arange(4), Rows(), 1000)]  # type: ignore[arg-type]
    assert pieces == [slice(0, 1), slice(1, 2), slice(2, 4)]
