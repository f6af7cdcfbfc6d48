"""numba's cache of compiled code, checked when it is read, so that a damaged file stops no fit."""

from __future__ import annotations

import hashlib
import logging
import pickle
from typing import Any

try:
    from numba.core import sigutils
    from numba.core.caching import FunctionCache, IndexDataCacheFile

    IS_SUPPORTED = True
except ImportError:  # a version of numba that is arranged in another way
    sigutils = None  # type: ignore[assignment]
    FunctionCache = IndexDataCacheFile = object  # type: ignore[assignment, misc]
    IS_SUPPORTED = False

log = logging.getLogger("tpu_als")
_DIGEST = hashlib.sha256


class KeptCode(FunctionCache):
    """The compiled code of a function in files.

    numba raises an error in every call if a file is damaged or cannot be written. It does not
    notice a flipped bit in machine code, nor code for other types, which two processes can leave
    behind that compile a function at the same time. Here such code is compiled again, with a
    warning in the log, and the file is replaced.

    Parameters
    ----------
    py_func : function
        The function to compile.
    """

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        self._cache_file = _CheckedFiles(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=self._impl.locator.get_source_stamp(),
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code for some types of arguments; None if it must be compiled."""
        try:
            found = super().load_overload(sig, target_context)
            if found is not None and found.signature.args != sigutils.normalize_signature(sig)[0]:
                raise ValueError(f"code for {found.signature.args}")
            return found
        except Exception as error:  # noqa: BLE001  (damaged pickles raise any class)
            self._warn("cannot be read, and is compiled again", error)
        try:
            self.flush()  # numba reads the index again before it writes
        except OSError:
            log.debug("%s: the index stays as it is", self.cache_path)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code for some types of arguments."""
        try:
            super().save_overload(sig, data)
        except Exception as error:  # noqa: BLE001  (also those of a damaged index)
            self._warn("cannot be written, so later processes compile it again", error)

    def _warn(self, what: str, error: Exception) -> None:
        name = type(error).__name__
        log.warning("compiled code in %s %s: %s: %s", self.cache_path, what, name, error)


class _CheckedFiles(IndexDataCacheFile):
    """numba's files, each with a checksum at its end."""

    def _dump(self, obj: Any) -> bytes:
        content = super()._dump(obj)
        return content + _DIGEST(content).digest()

    def _load_data(self, name: str) -> Any:
        with open(self._data_path(name), "rb") as file:
            stored = file.read()
        size = _DIGEST().digest_size
        content, digest = stored[:-size], stored[-size:]
        if _DIGEST(content).digest() != digest:
            raise ValueError(f"{name} does not have its checksum")
        return pickle.loads(content)
