"""A hint to the processor for `_loops`, which Python has no word for. Imports numba."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_READ, _NEAREST, _DATA = 0, 3, 1


@intrinsic
def prefetch(_: Any, address: Any) -> Any:
    """Begin to bring the cache line at an address to the nearest cache."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        hint = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        line = builder.inttoptr(args[0], pointer)
        builder.call(hint, [line, *map(number, (_READ, _NEAREST, _DATA))])
        return context.get_dummy_value()

    return types.void(types.uintp), emit
