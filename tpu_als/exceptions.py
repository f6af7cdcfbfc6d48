"""All error and warning classes of the package."""

from __future__ import annotations

__all__ = ["DataWarning", "ModelFileError", "ModelFitError", "ParameterWarning"]

try:  # Code that catches implicit's classes must also catch ours.
    from implicit.recommender_base import ModelFitError as _ModelFitErrorBase
    from implicit.utils import ParameterWarning as _ParameterWarningBase
except ImportError:
    _ModelFitErrorBase, _ParameterWarningBase = Exception, Warning


class ModelFitError(_ModelFitErrorBase):
    """A solve gave values that are not finite. Derives from implicit's class if installed."""


class ModelFileError(ValueError):
    """A model file is damaged, is not a model file, or has inconsistent values.

    The message names the file, the key, what was found and what was expected.
    """


class ParameterWarning(_ParameterWarningBase):
    """Input had to be converted. Derives from implicit's class if installed."""


class DataWarning(UserWarning):
    """Part of the input was ignored, or is not used as the caller may expect.

    The message gives the number of entries, ids or attributes.
    """


def __dir__() -> list[str]:
    return sorted(__all__)
