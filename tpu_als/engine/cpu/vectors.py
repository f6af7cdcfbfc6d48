"""Products of a few rows that lie one after the other, written in LLVM's vector instructions.

numba's own loops over four rows take 1.2 to 1.6 times as long: the compiler gives one row of sums
two registers, tests whether arrays overlap, and never prefetches.

The width of rows is a multiple of a cache line's, as `half_epoch.eigenbasis_of` makes it. The order
of a sum depends on the width and the type only.

Axis letters: E rows, G rows of a group, P numbers of a row.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

from tpu_als.engine.cpu.intrinsics import emit_prefetch
from tpu_als.engine.cpu.jit import Context, Intrinsic
from tpu_als.engine.cpu.memory import LINE

GROUP = 8  # rows that are processed together
_FAST = "reassoc", "contract", "arcp", "nsz"
_INDEX = ir.IntType(32)


def _register_bytes() -> int:
    """Size of a vector register of this CPU."""
    features = llvmlite.binding.get_host_cpu_features()
    return 64 if features.get("avx512f") else 32 if features.get("avx2") else 16


REGISTER_BYTES = _register_bytes()
# Columns of a product that are computed together, in cache lines: as many as fill registers.
TILES = 2 if REGISTER_BYTES == LINE else 1


class _Emitter:
    """Writes the instructions that the intrinsics share."""

    def __init__(self, context: Context, builder: ir.IRBuilder, dtype: types.Type) -> None:
        self.context, self.builder = context, builder
        self.kind = context.get_value_type(dtype)
        self.lanes = REGISTER_BYTES // _size(self.kind)
        self.vector = ir.VectorType(self.kind, self.lanes)

    def array(self, kind: types.Array, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Address and number of columns of an array."""
        found = self.context.make_array(kind)(self.context, self.builder, value)
        return found.data, cgutils.unpack_tuple(self.builder, found.shape)[-1]

    def pointer(self, data: ir.Value, at: ir.Value) -> ir.Value:
        """Address of a vector of elements."""
        element = self.builder.gep(data, [at])
        kind = ir.VectorType(element.type.pointee, self.lanes)
        return self.builder.bitcast(element, kind.as_pointer())

    def load(self, data: ir.Value, at: ir.Value) -> ir.Value:
        """A vector of elements, in the dtype of the sums."""
        pointer = self.pointer(data, at)
        found = self.builder.load(pointer, align=_size(pointer.type.pointee.element))
        return found if found.type == self.vector else self.builder.fpext(found, self.vector)

    def store(self, value: ir.Value, data: ir.Value, at: ir.Value) -> None:
        """Store a vector of sums, rounded to the dtype of the array."""
        pointer = self.pointer(data, at)
        if pointer.type.pointee != value.type:
            value = self.builder.fptrunc(value, pointer.type.pointee)
        self.builder.store(value, pointer, align=_size(pointer.type.pointee.element))

    def spread(self, data: ir.Value, at: ir.Value) -> ir.Value:
        """A vector of copies of one element."""
        value = self.builder.load(self.builder.gep(data, [at]))
        first = self.builder.insert_element(
            ir.Constant(self.vector, ir.Undefined), value, _INDEX(0)
        )
        return self.shuffled(first, first, [0] * self.lanes)

    def shuffled(self, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
        """The elements of two vectors in this order."""
        mask = ir.Constant(ir.VectorType(_INDEX, len(order)), order)
        return self.builder.shuffle_vector(a, b, mask)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The sum a + b."""
        return self.builder.fadd(a, b, flags=_FAST)

    def multiply_add(self, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """The sum total + a b."""
        return self.add(total, self.builder.fmul(a, b, flags=_FAST))

    def add_to(self, total: ir.Value, a: ir.Value, b: ir.Value) -> None:
        """Add a b to a variable."""
        self.builder.store(self.multiply_add(self.builder.load(total), a, b), total)

    def zeros(self, count: int) -> list[ir.Value]:
        """Variables for sums, which the compiler keeps in registers."""
        zero = ir.Constant(self.vector, None)
        variables = [cgutils.alloca_once_value(self.builder, zero) for _ in range(count)]
        for variable in variables:
            self.builder.store(zero, variable)
        return variables

    def collected(self, variables: list[ir.Value]) -> list[ir.Value]:
        """The sums of the elements of each of G vectors, as few vectors in this order."""
        vectors, lanes = [self.builder.load(variable) for variable in variables], self.lanes
        while lanes > len(vectors):
            low, high = list(range(lanes // 2)), list(range(lanes // 2, lanes))
            vectors = [
                self.add(self.shuffled(v, v, low), self.shuffled(v, v, high)) for v in vectors
            ]
            lanes //= 2
        step = 1  # elements of one vector that lie together
        while step < lanes:
            starts = range(0, lanes, 2 * step)
            low = [at + i for s in starts for at in (s, lanes + s) for i in range(step)]
            high = [at + step for at in low]
            vectors = [
                self.add(self.shuffled(a, b, low), self.shuffled(a, b, high))
                for a, b in zip(vectors[::2], vectors[1::2], strict=True)
            ]
            step *= 2
        return vectors

    def store_sums(self, variables: list[ir.Value], data: ir.Value, at: ir.Value) -> None:
        """Store the sums of the elements of each of G vectors, one after the other."""
        found = self.collected(variables)
        for number, value in enumerate(found):
            place = self.builder.add(at, at.type(number * (GROUP // len(found))))
            pointer = self.builder.bitcast(self.builder.gep(data, [place]), value.type.as_pointer())
            self.builder.store(value, pointer, align=_size(self.kind))

    def prefetch(self, data: ir.Value, at: ir.Value) -> None:
        """Prefetch an element's cache line."""
        address = self.builder.gep(data, [at])
        emit_prefetch(self.builder, self.builder.bitcast(address, ir.IntType(8).as_pointer()))


def _size(kind: ir.Type) -> int:
    return 8 if isinstance(kind, ir.DoubleType) else 4


def _dots_intrinsic(
    _: Context, rows: types.Array, at: types.Type, p: types.Array, out: types.Array
) -> Intrinsic:
    """Write the products of rows at, ..., at + G - 1 of `rows` (E, P) and p (P,) to `out` (G,)."""

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emitter = _Emitter(context, builder, p.dtype)
        data, width = emitter.array(rows, args[0])
        given, _ = emitter.array(p, args[2])
        first, sums = builder.mul(args[1], width), emitter.zeros(GROUP)
        steps = width.type(0), width, width.type(emitter.lanes)
        with cgutils.for_range_slice(builder, *steps, inc=True) as (k, _):
            value, place = emitter.load(given, k), builder.add(first, k)
            for total in sums:
                emitter.add_to(total, emitter.load(data, place), value)
                place = builder.add(place, width)
        emitter.store_sums(sums, emitter.array(out, args[3])[0], width.type(0))
        return context.get_dummy_value()

    return types.void(rows, at, p, out), emit


def _dots_of_table_intrinsic(
    _: Context, table: types.Array, at: types.Type, p: types.Array, out: types.Array
) -> Intrinsic:
    """Write the products of rows at, ..., at + G - 1 of a table (N, K) to these places of `out`.

    K is any number of at least a register's. A register may hold the last numbers of a row twice:
    `p` has the first numbers of the other factor, as many as fill registers, and then its last ones
    in a further register, with zeros in place of those that it repeats. The G rows after these are
    prefetched.
    """

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emitter = _Emitter(context, builder, p.dtype)
        data, width = emitter.array(table, args[0])
        given, size = emitter.array(p, args[2])
        first, sums = builder.mul(args[1], width), emitter.zeros(GROUP)
        soon, lanes = builder.mul(width, width.type(GROUP)), width.type(emitter.lanes)
        most = builder.sub(width, lanes)
        with cgutils.for_range_slice(builder, width.type(0), size, lanes, inc=True) as (k, _):
            is_last = builder.icmp_signed(">", k, most)
            column = builder.select(is_last, most, k)
            value, place = emitter.load(given, k), builder.add(first, column)
            for total in sums:
                emitter.prefetch(data, builder.add(place, soon))
                emitter.add_to(total, emitter.load(data, place), value)
                place = builder.add(place, width)
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
        emitter = _Emitter(context, builder, out.dtype)
        data, width = emitter.array(rows, args[0])
        given, _ = emitter.array(factors, args[2])
        target, _ = emitter.array(out, args[3])
        spread = [emitter.spread(given, width.type(j)) for j in range(GROUP)]
        first = builder.mul(args[1], width)
        soon = builder.add(first, builder.mul(width, width.type(GROUP)))
        line = LINE // _size(context.get_value_type(rows.dtype))
        steps = width.type(0), width, width.type(emitter.lanes)
        with cgutils.for_range_slice(builder, *steps, inc=True) as (k, _):
            total, place = emitter.load(target, k), builder.add(first, k)
            for factor in spread:
                total = emitter.multiply_add(total, emitter.load(data, place), factor)
                place = builder.add(place, width)
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
    place: types.Type,
    sign: types.Type,
    out: types.Array,
) -> Intrinsic:
    """Add sign F^T E to G rows of `out` (P, P), in the columns of one register.

    E and F are the first rows of `rows` and `factors`. `place` has their number, and the first row
    and the first column of `out`. Sums stay in registers.
    """

    def emit(
        context: Context, builder: ir.IRBuilder, _: Signature, args: list[ir.Value]
    ) -> ir.Value:
        emitter = _Emitter(context, builder, out.dtype)
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
        first = builder.insert_element(
            ir.Constant(emitter.vector, ir.Undefined), args[3], _INDEX(0)
        )
        signs = emitter.shuffled(first, first, [0] * emitter.lanes)
        for j, total in enumerate(sums):
            at = builder.add(builder.mul(builder.add(row, width.type(j)), width), column)
            before = emitter.load(target, at)
            emitter.store(emitter.multiply_add(before, builder.load(total), signs), target, at)
        return context.get_dummy_value()

    return types.void(rows, factors, place, sign, out), emit


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
        emitter = _Emitter(context, builder, tiles.dtype)
        given, _ = emitter.array(columns, args[0])
        data, line = emitter.array(tiles, args[1])
        target, width = emitter.array(out, args[3])
        shape = context.make_array(tiles)(context, builder, args[1]).shape
        count = cgutils.unpack_tuple(builder, shape)[1]
        pitch = builder.mul(count, line)
        first, place = builder.mul(args[2], pitch), builder.mul(args[2], line)
        for part in range(0, LINE // _size(emitter.kind), emitter.lanes):
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
                low = builder.add(place, builder.mul(line, line.type(number)))
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
