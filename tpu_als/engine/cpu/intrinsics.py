"""Instructions of LLVM that Python has no word for, as functions for compiled loops."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from tpu_als.engine.cpu.jit import Context, Intrinsic

_BYTE = ir.IntType(8).as_pointer()
_NUMBER = ir.IntType(32)


def emit_prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Write the instruction that prefetches the cache line at an address, to be read."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE, _NUMBER, _NUMBER, _NUMBER])
    word = builder.module.declare_intrinsic("llvm.prefetch", [_BYTE], kind)
    read, nearest, data = _NUMBER(0), _NUMBER(3), _NUMBER(1)
    builder.call(word, [address, read, nearest, data])


def _prefetch_intrinsic(_: Context, __: types.Type) -> Intrinsic:
    """Prefetch the cache line at an address."""

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emit_prefetch(builder, builder.inttoptr(args[0], _BYTE))
        return context.get_dummy_value()

    return types.void(types.uintp), emit


prefetch: Any = intrinsic(_prefetch_intrinsic)


def _widen_intrinsic(_: Context, number: types.Type) -> Intrinsic:
    """Return a float unchanged, and the bits of a bfloat16 number (uint16) as float32."""
    if number != types.uint16:
        return number(number), lambda *given: given[-1][0]

    def emit(_: Context, builder: ir.IRBuilder, __: Signature, args: list[ir.Value]) -> ir.Value:
        upper = builder.shl(builder.zext(args[0], _NUMBER), _NUMBER(16))
        return builder.bitcast(upper, ir.FloatType())

    return types.float32(number), emit


widen: Any = intrinsic(_widen_intrinsic)
