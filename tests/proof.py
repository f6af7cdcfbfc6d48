"""Numbers of examples of the fuzz tests, and counts for the terminal summary.

``TPU_ALS_PROFILE=nightly`` in the environment chooses the large numbers. A test that records a
property ``proof: <what>`` with a number adds to the line ``<what>`` of the summary.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

PREFIX = "proof: "
PROFILE = os.environ.get("TPU_ALS_PROFILE", "ci" if os.environ.get("CI") else "dev")
EXAMPLES: Counter[str] = Counter()  # calls of the test functions that `counted` wraps


def examples(default: int, nightly: int) -> int:
    """Return the number of examples of a test for the profile in use."""
    return nightly if PROFILE == "nightly" else default


def counted(test: Callable[..., None]) -> Callable[..., None]:
    """Count the hypothesis examples of a test; apply below ``@given``."""

    @functools.wraps(test)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        EXAMPLES[test.__name__] += 1
        test(*args, **kwargs)

    return wrapper


def summary(reports: list[Any]) -> Counter[str]:
    """Sum the recorded numbers of finished tests, by name."""
    totals: Counter[str] = Counter()
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name.startswith(PREFIX) and getattr(report, "when", None) == "call":
                totals[name.removeprefix(PREFIX)] += value
    return totals
