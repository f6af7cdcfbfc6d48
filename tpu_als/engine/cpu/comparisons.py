"""Comparisons of numbers that lie one after the other, written in LLVM's vector instructions.

The loops that numba vectorizes take several times as long. For the maximum of a few adjacent
numbers they need one instruction for each halving of the register.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from tpu_als.engine.cpu.emitter import Emitter
from tpu_als.engine.cpu.jit import Context, Intrinsic


def _maxima_intrinsic(
    _: Context, numbers: types.Array, factors: types.Array, offsets: types.Type, out: types.Array
) -> Intrinsic:
    """Write the maximum of each column to `out`; a register holds one row of the columns.

    A column has `count` numbers, one register apart. `offsets` is a tuple: offset of the first
    number, `count`, offset of the first factor, offset of the first maximum in `out`. Numbers are
    multiplied by `factors`, unless the factor's offset is negative. Returns whether a number is
    NaN or plus infinity. If one is NaN, the maxima are undefined.
    """

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emitter = Emitter(context, builder, numbers.dtype)
        data, scales = (
            emitter.array(*pair)[0] for pair in ((numbers, args[0]), (factors, args[1]))
        )
        first, count, factor, offset = cgutils.unpack_tuple(builder, args[2])
        lowest, highest = (emitter.constant(sign * math.inf) for sign in (-1, 1))
        none_wrong = ir.Constant(ir.VectorType(ir.IntType(1), emitter.lanes), None)
        top, wrong = (cgutils.alloca_once_value(builder, start) for start in (lowest, none_wrong))
        builder.store(lowest, top)
        builder.store(none_wrong, wrong)

        def compare(is_scaled: bool) -> None:
            with cgutils.for_range(builder, count) as loop:
                step = builder.mul(loop.index, first.type(emitter.lanes))
                value = emitter.load(data, builder.add(first, step))
                if is_scaled:
                    scale = emitter.load(scales, builder.add(factor, step))
                    value = builder.fmul(value, scale)
                is_wrong = builder.fcmp_unordered(">=", value, highest)
                builder.store(builder.or_(builder.load(wrong), is_wrong), wrong)
                is_larger = builder.fcmp_ordered(">", value, builder.load(top))
                builder.store(builder.select(is_larger, value, builder.load(top)), top)

        emitter.if_scaled(factor, compare)
        emitter.store(builder.load(top), emitter.array(out, args[3])[0], offset)
        mask = builder.bitcast(builder.load(wrong), ir.IntType(emitter.lanes))
        return builder.icmp_unsigned("!=", mask, mask.type(0))

    return types.boolean(numbers, factors, offsets, out), emit


def _at_least_intrinsic(
    _: Context, numbers: types.Array, factors: types.Array, offsets: types.Type, least: types.Type
) -> Intrinsic:
    """Compare one register of numbers with `least`; bit i of the result says if number i is >= it.

    `offsets` are the first number's offset, and that of its factor as in `maxima`.
    """

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emitter = Emitter(context, builder, numbers.dtype)
        data, scales = (
            emitter.array(*pair)[0] for pair in ((numbers, args[0]), (factors, args[1]))
        )
        first, factor = cgutils.unpack_tuple(builder, args[2])
        found = cgutils.alloca_once(builder, ir.IntType(emitter.lanes))

        def compare(is_scaled: bool) -> None:
            value = emitter.load(data, first)
            if is_scaled:
                value = builder.fmul(value, emitter.load(scales, factor))
            is_large = builder.fcmp_ordered(">=", value, emitter.copies(args[3]))
            builder.store(builder.bitcast(is_large, ir.IntType(emitter.lanes)), found)

        emitter.if_scaled(factor, compare)
        return builder.zext(builder.load(found), ir.IntType(64))

    return types.int64(numbers, factors, offsets, least), emit


maxima: Any = intrinsic(_maxima_intrinsic)
at_least: Any = intrinsic(_at_least_intrinsic)
