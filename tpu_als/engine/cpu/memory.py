"""Host memory that is used again."""

from __future__ import annotations

import math
import weakref

import numpy as np
from numpy.typing import DTypeLike

LINE = 64  # bytes of a cache line; vectors that straddle two take twice as long to read


class Memory:
    """A pool of memory blocks that are reused after the arrays in them are deleted.

    Page faults are expensive on a virtual machine, whose host reclaims memory that has been free
    for seconds: they were measured at 2 ns a byte, a hundred times the cost of writing.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike, room: int = 0) -> np.ndarray:
        """An uninitialised array that begins at a cache line.

        Parameters
        ----------
        shape, dtype
            Of the array.
        room : int, default=0
            Least number of elements for which to allocate memory, so that a larger array can reuse
            it later.
        """
        count = math.prod(shape)
        size = max(count, room) * np.dtype(dtype).itemsize
        try:
            block = self._free.setdefault(size, []).pop()
        except IndexError:
            block = np.empty(size + LINE, np.uint8)
        low = -block.ctypes.data % LINE
        lent: np.ndarray = np.asarray(_Lent(block, size, self))
        return lent[low : low + size].view(dtype)[:count].reshape(shape)

    def give_back(self, block: np.ndarray, size: int) -> None:
        """Return a block to the pool."""
        self._free.setdefault(size, []).append(block)

    def clear(self) -> None:
        """Release the free blocks."""
        self._free.clear()


class _Lent:
    """The base of an array from `Memory`; it returns the block when the last such array is gone."""

    def __init__(self, block: np.ndarray, size: int, memory: Memory) -> None:
        self.block, self.size, self.memory = block, size, weakref.ref(memory)
        self.__array_interface__ = block.__array_interface__

    def __del__(self) -> None:
        memory = self.memory()
        if memory is not None:
            memory.give_back(self.block, self.size)
