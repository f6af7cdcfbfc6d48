"""Gives corrupt CSR matrices to a fitted model; run as a script, since it may end the process.

Prints a line of JSON before each case, and one with what became of it.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import numpy as np
from matrices import planted_groups
from scipy import sparse

ROWS = planted_groups()
N_USERS = ROWS.shape[0]


def _corrupt(name: str) -> sparse.csr_matrix:
    """A matrix whose arrays contradict each other, as memory errors and wrong code leave them."""
    out = ROWS.copy()
    how = name.split(":")[0]
    if how == "far beyond nnz":
        out.indptr[7] = 10**7
    elif how == "beyond nnz":
        out.indptr[7] = out.nnz + 3
    elif how == "negative":
        out.indptr[7] = -5
    elif how == "decreasing":
        out.indptr[7], out.indptr[8] = out.indptr[8], out.indptr[7]
    elif how == "not from 0":
        out.indptr[0] = 2
    elif how == "ends before nnz":
        out.indptr[-3:] = out.indptr[-4]
    elif how == "ends after nnz":
        out.indptr[-1] += 4
    elif how == "fewer values":
        out.data = out.data[:-5]
    elif how == "fewer indices":
        out.indices = out.indices[:-5]
    elif how == "a column beyond the shape":
        out.indices[3] = 10**6
    elif how == "a column below 0":
        out.indices[3] = -1
    elif how == "fewer offsets":
        out.indptr = out.indptr[:-4]
    if name.endswith(", flagged"):
        out.has_sorted_indices = out.has_canonical_format = True
    return out


CORRUPT = (
    "far beyond nnz", "beyond nnz", "negative", "decreasing", "not from 0", "ends before nnz",
    "ends after nnz", "fewer values", "fewer indices", "a column beyond the shape",
    "a column below 0", "fewer offsets",
)  # fmt: skip
_EVERYONE = np.arange(N_USERS)
# Rows picked by the caller are picked by SciPy, so single rows are corrupt matrices of their own.
CALLS: dict[str, Any] = {
    "fit": lambda model, matrix: model.fit(matrix, show_progress=False),
    "transform": lambda model, matrix: model.transform(matrix),
    "recommend": lambda model, matrix: model.recommend(_EVERYONE, matrix),
    "recalculate_user": lambda model, matrix: model.recalculate_user(_EVERYONE, matrix),
    "partial_fit_users": lambda model, matrix: model.partial_fit_users(_EVERYONE, matrix),
    "explain": lambda model, matrix: model.explain(7, matrix, 1),
}
NAMES = [
    f"{how}: {call}, {flag}"
    for how in CORRUPT
    for call in CALLS
    for flag in ("flagged", "not flagged")
]


def _one_row(how: str) -> sparse.csr_matrix:
    row = ROWS[3].copy()
    if how == "one row, ends beyond nnz":
        row.indptr[1] = 10**6
    elif how == "one row, not from 0":
        row.indptr[0] = 2
    elif how == "one row, a column beyond the shape":
        row.indices[0] = 10**6
    row.has_sorted_indices = row.has_canonical_format = True
    return row


ONE_ROW = (
    "one row, ends beyond nnz", "one row, not from 0", "one row, a column beyond the shape",
)  # fmt: skip
NAMES += [f"{how}: one, flagged" for how in ONE_ROW]


def _verdict(model: Any, name: str, before: list[Any]) -> str:
    how, call = name.split(": ")
    try:
        if how in ONE_ROW:
            model.recommend(3, _one_row(how))
        else:
            CALLS[call.split(", ")[0]](model, _corrupt(name))
    except Exception as error:  # noqa: BLE001  (it is reported)
        same = all(
            np.array_equal(now, then) for now, then in zip(_answers(model), before, strict=True)
        )
        return f"{type(error).__name__}, {'as before' if same else 'changed'}: {error}"
    return "no error"


def _answers(model: Any) -> list[Any]:
    return [*model.recommend(_EVERYONE, ROWS), model.user_factors.copy(), model.item_factors.copy()]


def main(names: list[str]) -> None:
    """Try the cases in order."""
    from models import load_class, make

    warnings.simplefilter("ignore")
    for name in names:
        print(json.dumps([name, ""]), flush=True)  # noqa: T201
        model = make(load_class("tpu_als"), use_cg=True, devices=1, iterations=2)
        model.fit(ROWS, show_progress=False)
        verdict = _verdict(model, name, _answers(model))
        print(json.dumps([name, verdict]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
