"""Products of a few rows that lie one after the other, written in LLVM's vector instructions.

numba's own loops over four rows take 1.2 to 1.6 times as long: the compiler gives one row of sums
two registers, tests whether arrays overlap, and never prefetches.

The width of rows is a multiple of a cache line's, as `half_epoch.eigenbasis_of` makes it. The order
of a sum depends on the width and the type only.

Axis letters: E rows, G rows of a group, P numbers of a row.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from tpu_als.engine.cpu.emitter import REGISTER_BYTES, Emitter, size_of
from tpu_als.engine.cpu.jit import Context, Intrinsic
from tpu_als.engine.cpu.memory import LINE

GROUP = 8  # rows that are processed together
# Columns of a product that are computed together, in cache lines: as many as fill registers.
TILES = 2 if REGISTER_BYTES == LINE else 1
_INDEX = ir.IntType(32)


def _dots_intrinsic(
    _: Context, rows: types.Array, at: types.Type, p: types.Array, out: types.Array
) -> Intrinsic:
    """Write the products of rows at, ..., at + G - 1 of `rows` (E, P) and p (P,) to `out` (G,)."""

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emitter = Emitter(context, builder, p.dtype)
        data, width = emitter.array(rows, args[0])
        given, _ = emitter.array(p, args[2])
        first, sums = builder.mul(args[1], width), emitter.zeros(GROUP)
        steps = width.type(0), width, width.type(emitter.lanes)
        with cgutils.for_range_slice(builder, *steps, inc=True) as (k, _):
            value, offset = emitter.load(given, k), builder.add(first, k)
            for total in sums:
                emitter.add_to(total, emitter.load(data, offset), value)
                offset = builder.add(offset, width)
        emitter.store_sums(sums, emitter.array(out, args[3])[0], width.type(0))
        return context.get_dummy_value()

    return types.void(rows, at, p, out), emit


def _dots_of_table_intrinsic(
    _: Context, table: types.Array, at: types.Type, p: types.Array, out: types.Array
) -> Intrinsic:
    """Write the products of rows at, ..., at + G - 1 of a table (N, K) to the same rows of `out`.

    K must be at least the numbers in a register. If K is not a multiple of them, the last register
    of a row overlaps the one before, and `p`, which is as long as the registers, is zero where they
    overlap. The G rows after these are prefetched.
    """

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emitter = Emitter(context, builder, p.dtype)
        data, width = emitter.array(table, args[0])
        given, size = emitter.array(p, args[2])
        first, sums = builder.mul(args[1], width), emitter.zeros(GROUP)
        soon, lanes = builder.mul(width, width.type(GROUP)), width.type(emitter.lanes)
        most = builder.sub(width, lanes)
        with cgutils.for_range_slice(builder, width.type(0), size, lanes, inc=True) as (k, _):
            is_last = builder.icmp_signed(">", k, most)
            column = builder.select(is_last, most, k)
            value, offset = emitter.load(given, k), builder.add(first, column)
            for total in sums:
                emitter.prefetch(data, builder.add(offset, soon))
                emitter.add_to(total, emitter.load(data, offset), value)
                offset = builder.add(offset, width)
        emitter.store_sums(sums, emitter.array(out, args[3])[0], args[1])
        return context.get_dummy_value()

    return types.void(table, at, p, out), emit


def _add_rows_intrinsic(
    _: Context, rows: types.Array, at: types.Type, factors: types.Array, out: types.Array
) -> Intrinsic:
    """Add the rows at, ..., at + G - 1 of `rows` (E, P), times `factors` (G,), to `out` (P,).

    The rows after them are prefetched.
    """

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emitter = Emitter(context, builder, out.dtype)
        data, width = emitter.array(rows, args[0])
        given, _ = emitter.array(factors, args[2])
        target, _ = emitter.array(out, args[3])
        spread = [emitter.spread(given, width.type(j)) for j in range(GROUP)]
        first = builder.mul(args[1], width)
        soon = builder.add(first, builder.mul(width, width.type(GROUP)))
        line = LINE // size_of(context.get_value_type(rows.dtype))
        steps = width.type(0), width, width.type(emitter.lanes)
        with cgutils.for_range_slice(builder, *steps, inc=True) as (k, _):
            total, offset = emitter.load(target, k), builder.add(first, k)
            for factor in spread:
                total = emitter.multiply_add(total, emitter.load(data, offset), factor)
                offset = builder.add(offset, width)
            emitter.store(total, target, k)
            ahead = builder.add(soon, builder.mul(k, width.type(GROUP)))
            for element in range(0, GROUP * emitter.lanes, line):
                emitter.prefetch(data, builder.add(ahead, width.type(element)))
        return context.get_dummy_value()

    return types.void(rows, at, factors, out), emit


def _add_tile_intrinsic(
    _: Context,
    rows: types.Array,
    factors: types.Array,
    position: types.Type,
    sign: types.Type,
    out: types.Array,
) -> Intrinsic:
    """Add sign F^T E to G rows of `out` (P, P), in the columns of one register.

    E and F are the first rows of `rows` and `factors`. `position` has their number, and the first
    row and column of `out`. Sums stay in registers.
    """

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emitter = Emitter(context, builder, out.dtype)
        (data, pitch), (given, pitch_given) = (
            emitter.array(rows, args[0]), emitter.array(factors, args[1]),
        )  # fmt: skip
        target, width = emitter.array(out, args[4])
        count, row, column = cgutils.unpack_tuple(builder, args[2])
        sums = emitter.zeros(GROUP)
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(builder.mul(loop.index, pitch), column)
            value, at = emitter.load(data, at), builder.mul(loop.index, pitch_given)
            for j, total in enumerate(sums):
                factor = emitter.spread(given, builder.add(at, builder.add(row, width.type(j))))
                emitter.add_to(total, value, factor)
        signs = emitter.copies(args[3])
        for j, total in enumerate(sums):
            at = builder.add(builder.mul(builder.add(row, width.type(j)), width), column)
            before = emitter.load(target, at)
            emitter.store(emitter.multiply_add(before, builder.load(total), signs), target, at)
        return context.get_dummy_value()

    return types.void(rows, factors, position, sign, out), emit


def _multiply_intrinsic(
    _: Context, columns: types.Array, tiles: types.Array, tile: types.Type, out: types.Array
) -> Intrinsic:
    """Write products of G rows, given as `columns` (K, G), and tiles (K, L) to `out` (G, P).

    `tiles` (P / L, K, L) are all columns of a matrix (K, P). L numbers fill a cache line. The tiles
    are those at `tile` and after it, `TILES` of them.
    """

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emitter = Emitter(context, builder, tiles.dtype)
        given, _ = emitter.array(columns, args[0])
        data, line = emitter.array(tiles, args[1])
        target, width = emitter.array(out, args[3])
        shape = context.make_array(tiles)(context, builder, args[1]).shape
        count = cgutils.unpack_tuple(builder, shape)[1]
        pitch = builder.mul(count, line)
        first, offset = builder.mul(args[2], pitch), builder.mul(args[2], line)
        for part in range(0, LINE // size_of(emitter.kind), emitter.lanes):
            sums = [emitter.zeros(GROUP) for _ in range(TILES)]
            with cgutils.for_range(builder, count) as loop:
                at = builder.add(first, builder.mul(loop.index, line))
                values = []
                for _tile in sums:
                    values.append(emitter.load(data, builder.add(at, line.type(part))))
                    at = builder.add(at, pitch)
                scalar = builder.mul(loop.index, line.type(GROUP))
                for j in range(GROUP):
                    factor = emitter.spread(given, builder.add(scalar, line.type(j)))
                    for value, totals in zip(values, sums, strict=True):
                        emitter.add_to(totals[j], value, factor)
            for number, of_tile in enumerate(sums):
                low = builder.add(offset, builder.mul(line, line.type(number)))
                for j, total in enumerate(of_tile):
                    at = builder.add(builder.mul(width, width.type(j)), low)
                    emitter.store(builder.load(total), target, builder.add(at, width.type(part)))
        return context.get_dummy_value()

    return types.void(columns, tiles, tile, out), emit


multiply: Any = intrinsic(_multiply_intrinsic)
dots: Any = intrinsic(_dots_intrinsic)
dots_of_table: Any = intrinsic(_dots_of_table_intrinsic)
add_rows: Any = intrinsic(_add_rows_intrinsic)
add_tile: Any = intrinsic(_add_tile_intrinsic)
