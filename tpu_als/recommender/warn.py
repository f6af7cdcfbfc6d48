"""Warnings that are reported at the caller's line."""

from __future__ import annotations

import sys
import warnings

from tpu_als.exceptions import DataWarning

_PACKAGE = __name__.partition(".")[0]


def warn(message: str, category: type[Warning] = DataWarning) -> None:
    """Warn at the line of the nearest caller outside the package."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
