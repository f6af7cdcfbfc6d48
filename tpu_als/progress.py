"""The progress bar of a fit: whether it is shown, and what it says."""

from __future__ import annotations

import os

import tqdm.auto
import tqdm.std

_OFF = ("", "0", "false", "no")  # values of TQDM_DISABLE that do not disable
# tqdm cannot tell a notebook's output from a file's, but it has found out where it runs.
_IN_NOTEBOOK = tqdm.auto.notebook_tqdm is not tqdm.std.tqdm


def is_disabled(show_progress: bool | None, verbose: bool | None) -> bool | None:
    """Whether to show no bar, in the words of tqdm's parameter ``disable``.

    Parameters
    ----------
    show_progress : bool or None
        Of the call; wins unless None.
    verbose : bool or None
        Of the estimator; wins over the default unless None.

    Returns
    -------
    bool or None
        None leaves it to tqdm, which shows a bar on a terminal only.
    """
    # tqdm itself looks at the variable only where `disable` is not given.
    if os.environ.get("TQDM_DISABLE", "").lower() not in _OFF:
        return True
    asked = verbose if show_progress is None else show_progress
    if asked is None:
        return False if _IN_NOTEBOOK else None
    return not asked


def bar(total: int, done: int, disable: bool | None) -> tqdm.auto.tqdm:
    """Make a bar of `total` iterations, of which some are done."""
    return tqdm.auto.tqdm(total=total, initial=done, disable=disable)


def advance(shown: tqdm.auto.tqdm, report: dict[str, float]) -> None:
    """Count an iteration, and show what is known of it."""
    shown.set_postfix({name: f"{value:.4g}" for name, value in report.items()})
    shown.update(1)
