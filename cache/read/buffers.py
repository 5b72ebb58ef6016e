"""Memory for what is read, used again when nobody looks at it any more.

The kernel clears each page of fresh memory before it can be written, which takes longer than to copy a file's bytes
into it; and glibc returns blocks of more than 32 MiB to the kernel as soon as they are freed.
"""

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]

# Smaller blocks are malloc's, which is quick with them.
_SMALLEST = 128 << 10


class Buffers:
    """Lends blocks of memory, and keeps those that are free again for the next who want as much.

    There is no lock: blocks come back wherever the last array on them goes, which may be in any thread, within `take`
    itself, or in a child that was forked then. All that is done here is atomic, step by step.

    Args:
        most: bytes that are kept free; what comes back beyond is let go of.
    """

    def __init__(self, most: int = 128 << 20) -> None:
        self._most = most
        self._free: dict[int, list[_Bytes]] = {}

    def take(self, size: int) -> _Bytes:
        """[size] bytes of any value, at the beginning of a page, lent for as long as an array or tensor is on them.

        A destination that lies a few bytes further into its page than the source does into its own takes the kernel
        half as long again to copy to (its loads look as if they depended on the stores before), and that is where
        malloc puts it.
        """
        if size < _SMALLEST:
            return _page_aligned(size)
        step = 1 << (size.bit_length() - 3)
        capacity = -(-size // step) * step  # of four per power of two
        try:
            memory = self._free[capacity].pop()
        except (KeyError, IndexError):
            if self.free_bytes() + capacity > self._most:
                self._free.clear()  # of other sizes than are wanted now
            memory = _page_aligned(capacity)
        return np.asarray(_Loan(self, memory, size))

    def give(self, memory: _Bytes) -> None:
        """Take a block back that nobody uses any more."""
        if self.free_bytes() + memory.nbytes <= self._most:
            self._free.setdefault(memory.nbytes, []).append(memory)

    def free_bytes(self) -> int:
        """Memory that is kept and not lent."""
        return sum(capacity * len(blocks) for capacity, blocks in list(self._free.items()))


class _Loan:
    """What all arrays and tensors on a block keep alive; it goes with the last of them."""

    __slots__ = ("__array_interface__", "_buffers", "_memory")

    def __init__(self, buffers: Buffers, memory: _Bytes, size: int) -> None:
        self._buffers, self._memory = buffers, memory
        self.__array_interface__: dict[str, Any] = {**memory.__array_interface__, "shape": (size,)}

    def __del__(self) -> None:
        self._buffers.give(self._memory)


def _page_aligned(size: int) -> _Bytes:
    memory = np.empty(size + mmap.PAGESIZE, dtype=np.uint8)
    start = -memory.__array_interface__["data"][0] % mmap.PAGESIZE
    return memory[start : start + size]
