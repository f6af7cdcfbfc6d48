"""How numba compiles the functions of this folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import numba
from llvmlite import ir
from numba.core.base import BaseContext
from numba.core.typing.templates import Signature

from tpu_als.engine.cpu import kept_code

log = logging.getLogger("tpu_als")
# What numba passes to an intrinsic, and what the intrinsic returns: a signature, and a function
# that writes LLVM's instructions.
Context: TypeAlias = BaseContext
Intrinsic: TypeAlias = tuple[Signature, Callable[..., ir.Value]]

# Sums may be reordered, to vectorise them; infinity and NaN are preserved.
_OPTIONS: Any = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function when it is called, and keep the result in numba's cache."""
    try:
        found = numba.njit(**_OPTIONS, cache=True)(function)
        if kept_code.IS_SUPPORTED:
            found._cache = kept_code.KeptCode(function)
        return found
    except RuntimeError as error:  # numba finds no directory that it can write to
        log.warning("compiled loops are not kept for later processes: %s", error)
        return numba.njit(**_OPTIONS)(function)


def inner(function: Callable[..., Any]) -> Any:
    """Compile a function that only compiled functions call, without wrappers for other callers.

    It is always inlined. Otherwise the process that compiles would call a copy of it that is
    optimised by itself, while later processes call the copy in the kept code: their results would
    differ in the last bits.
    """
    more: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}
    return numba.njit(**_OPTIONS, **more)(function)
