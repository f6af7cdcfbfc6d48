"""Every error and warning class of the package."""

from __future__ import annotations

try:  # Code that catches implicit's classes must catch ours as well.
    from implicit.recommender_base import ModelFitError as _ModelFitErrorBase
    from implicit.utils import ParameterWarning as _ParameterWarningBase
except ImportError:
    _ModelFitErrorBase, _ParameterWarningBase = Exception, Warning


class ModelFitError(_ModelFitErrorBase):
    """A solve gave values that are not finite. A subclass of implicit's, where it is installed."""


class ModelFileError(ValueError):
    """A model file is damaged, comes from elsewhere, or contradicts itself.

    The message names the file, the key, what came and what was expected.
    """


class ParameterWarning(_ParameterWarningBase):
    """Input was accepted but had to be converted. A subclass of implicit's, where installed."""


class DataWarning(UserWarning):
    """A part of the input was left out, or cannot count as the caller may expect.

    The message has the count.
    """
