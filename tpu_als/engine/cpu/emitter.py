"""Emits LLVM vector instructions for the intrinsics of `vectors` and `comparisons`.

Axis letters: G vectors of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils

from tpu_als.engine.cpu.intrinsics import emit_prefetch
from tpu_als.engine.cpu.jit import Context

_FAST = "reassoc", "contract", "arcp", "nsz"
_INDEX = ir.IntType(32)


def _register_bytes() -> int:
    """Size of a vector register of this CPU."""
    features = llvmlite.binding.get_host_cpu_features()
    return 64 if features.get("avx512f") else 32 if features.get("avx2") else 16


REGISTER_BYTES = _register_bytes()


class Emitter:
    """Writes the instructions that the intrinsics share."""

    def __init__(self, context: Context, builder: ir.IRBuilder, dtype: types.Type) -> None:
        self.context, self.builder = context, builder
        self.kind = context.get_value_type(dtype)
        self.lanes = REGISTER_BYTES // size_of(self.kind)
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
        found = self.builder.load(pointer, align=size_of(pointer.type.pointee.element))
        return found if found.type == self.vector else self.builder.fpext(found, self.vector)

    def store(self, value: ir.Value, data: ir.Value, at: ir.Value) -> None:
        """Store a vector of sums, rounded to the dtype of the array."""
        pointer = self.pointer(data, at)
        if pointer.type.pointee != value.type:
            value = self.builder.fptrunc(value, pointer.type.pointee)
        self.builder.store(value, pointer, align=size_of(pointer.type.pointee.element))

    def spread(self, data: ir.Value, at: ir.Value) -> ir.Value:
        """A vector of copies of one element."""
        return self.copies(self.builder.load(self.builder.gep(data, [at])))

    def copies(self, value: ir.Value) -> ir.Value:
        """A vector of copies of a number."""
        first = self.builder.insert_element(
            ir.Constant(self.vector, ir.Undefined), value, _INDEX(0)
        )
        return self.shuffled(first, first, [0] * self.lanes)

    def constant(self, number: float) -> ir.Value:
        """A vector of copies of a number that is known."""
        return ir.Constant(self.vector, [ir.Constant(self.kind, number)] * self.lanes)

    def if_scaled(self, factor: ir.Value, write: Callable[[bool], None]) -> None:
        """Emit both branches: scaled if the offset `factor` is at least 0, else unscaled."""
        is_scaled = self.builder.icmp_signed(">=", factor, factor.type(0))
        with self.builder.if_else(is_scaled) as (scaled, plain):
            with scaled:
                write(True)
            with plain:
                write(False)

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
            offset = self.builder.add(at, at.type(number * (len(variables) // len(found))))
            pointer = self.builder.bitcast(
                self.builder.gep(data, [offset]), value.type.as_pointer()
            )
            self.builder.store(value, pointer, align=size_of(self.kind))

    def prefetch(self, data: ir.Value, at: ir.Value) -> None:
        """Prefetch an element's cache line."""
        address = self.builder.gep(data, [at])
        emit_prefetch(self.builder, self.builder.bitcast(address, ir.IntType(8).as_pointer()))


def size_of(kind: ir.Type) -> int:
    """Bytes of a float."""
    return 8 if isinstance(kind, ir.DoubleType) else 4
