"""The progress bar of a fit."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

_OFF = ("", "0", "false", "no")  # values of TQDM_DISABLE that do not disable


def is_disabled(show_progress: bool | None, verbose: bool | None) -> bool | None:
    """Value for tqdm's parameter ``disable``.

    Parameters
    ----------
    show_progress : bool or None
        Argument of `fit`; overrides `verbose` unless None.
    verbose : bool or None
        Parameter of the estimator; overrides the default unless None.

    Returns
    -------
    bool or None
        With None tqdm decides: it shows a bar on a terminal only.
    """
    # tqdm itself reads the variable only if `disable` is not given.
    if os.environ.get("TQDM_DISABLE", "").lower() not in _OFF:
        return True
    asked = verbose if show_progress is None else show_progress
    if asked is None:
        return False if _is_in_notebook() else None
    return not asked


def _is_in_notebook() -> bool:
    """Whether tqdm has detected a notebook, whose output it cannot distinguish from a file."""
    import tqdm.auto
    import tqdm.std

    return tqdm.auto.notebook_tqdm is not tqdm.std.tqdm


def bar(total: int, done: int, disable: bool | None) -> tqdm:
    """Make a bar of `total` iterations, of which `done` are done."""
    import tqdm.auto  # late, because serving does not need it

    return tqdm.auto.tqdm(total=total, initial=done, disable=disable)


def advance(shown: tqdm, report: dict[str, float]) -> None:
    """Advance by one iteration, and show the values that it reported."""
    shown.set_postfix({name: f"{value:.4g}" for name, value in report.items()})
    shown.update(1)
