"""Instructions of LLVM that Python cannot express, as functions for compiled loops."""

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


def _bits_of(number: types.Type) -> tuple[ir.Type, ir.Type]:
    """LLVM's types of a float and of its bits."""
    if number == types.float32:
        return ir.FloatType(), ir.IntType(32)
    return ir.DoubleType(), ir.IntType(64)


def _mirrored(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Invert the bits of negative floats, except the sign, to sort them; it is its own inverse."""
    width = bits.type.width
    sign = builder.ashr(bits, bits.type(width - 1))
    return builder.xor(bits, builder.and_(sign, bits.type((1 << (width - 1)) - 1)))


def _order_of_intrinsic(_: Context, number: types.Type) -> Intrinsic:
    """Map a float to an integer with the same order; -0.0 maps below 0.0."""

    def emit(_: Context, builder: ir.IRBuilder, __: Signature, args: list[ir.Value]) -> ir.Value:
        bits = builder.bitcast(args[0], _bits_of(number)[1])
        return builder.sext(_mirrored(builder, bits), ir.IntType(64))

    return types.int64(number), emit


def _float_at_intrinsic(_: Context, __: types.Type, like: types.Type) -> Intrinsic:
    """Return the float of the type of `like` with this value of `order_of`."""

    def emit(_: Context, builder: ir.IRBuilder, _s: Signature, args: list[ir.Value]) -> ir.Value:
        kind, integer = _bits_of(like)
        bits = args[0] if integer.width == 64 else builder.trunc(args[0], integer)
        return builder.bitcast(_mirrored(builder, bits), kind)

    return like(types.int64, like), emit


def _lowest_bit_intrinsic(_: Context, bits: types.Type) -> Intrinsic:
    """Return the place of the lowest 1 of an integer that is not 0."""

    def emit(_: Context, builder: ir.IRBuilder, __: Signature, args: list[ir.Value]) -> ir.Value:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return bits(bits), emit


order_of: Any = intrinsic(_order_of_intrinsic)
float_at: Any = intrinsic(_float_at_intrinsic)
lowest_bit: Any = intrinsic(_lowest_bit_intrinsic)
