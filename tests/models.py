"""implicit's class and ours by short names, and a small exact model for tests."""

from __future__ import annotations

from typing import Any

import oracle
import pytest

FACTORS = 6
OBJECTIVE = oracle.Objective("implicit", 0.05, 2.0)


def load_class(name: str) -> Any:
    """The estimator class by the short name used in test ids."""
    if name == "implicit":
        return pytest.importorskip("implicit.cpu.als").AlternatingLeastSquares
    from tpu_als import TPUAlternatingLeastSquares

    return TPUAlternatingLeastSquares


def make(cls: Any, **changes: Any) -> Any:
    """A small exact model: one thread, Cholesky, a fixed seed."""
    settings = dict(
        factors=FACTORS,
        regularization=0.05,
        alpha=2.0,
        use_cg=False,
        iterations=10,
        num_threads=1,
        random_state=0,
    )
    return cls(**{**settings, **changes})
