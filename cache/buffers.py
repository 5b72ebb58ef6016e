"""Memory for what is read, used again when nobody looks at it any more.

The kernel clears each page of fresh memory before it can be written, which takes longer than to copy a file's bytes
into it; and glibc returns blocks of more than 32 MiB to the kernel as soon as they are freed.
"""

import mmap
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]

# Smaller blocks are malloc's, which is quick with them.
_SMALLEST = 128 << 10
# Kept for the next reads, at most, per process.
_MOST_FREE = 128 << 20
_free: dict[int, deque[_Bytes]] = {}


class _Loan:
    """What all arrays and tensors on a block of memory keep alive; without them the block is free again.

    This runs wherever the last of them goes, in any thread, also within `take`, and in a child that was forked within
    `take`: so there is no lock here, only operations that are atomic in themselves.
    """

    __slots__ = ("__array_interface__", "_memory")

    def __init__(self, memory: _Bytes, size: int) -> None:
        self._memory = memory
        self.__array_interface__: dict[str, Any] = {**memory.__array_interface__, "shape": (size,)}

    def __del__(self) -> None:
        if _free_bytes() + self._memory.nbytes <= _MOST_FREE:
            _free.setdefault(self._memory.nbytes, deque()).append(self._memory)


def take(size: int) -> _Bytes:
    """[size] bytes that nobody else has, of any value, at the beginning of a page.

    A destination that lies a few bytes further into its page than the source does into its own takes the kernel half as
    long again to copy to (its loads look as if they depended on the stores before), and that is where malloc puts it.
    """
    if size < _SMALLEST:
        return _page_aligned(size)
    step = 1 << (size.bit_length() - 3)
    capacity = -(-size // step) * step  # of four sizes per power of two
    try:
        memory = _free[capacity].pop()
    except (KeyError, IndexError):
        if _free_bytes() + capacity > _MOST_FREE:
            _free.clear()  # of other sizes than are read now
        memory = _page_aligned(capacity)
    return np.asarray(_Loan(memory, size))


def _free_bytes() -> int:
    return sum(capacity * len(blocks) for capacity, blocks in list(_free.items()))


def _page_aligned(size: int) -> _Bytes:
    memory = np.empty(size + mmap.PAGESIZE, dtype=np.uint8)
    start = -memory.__array_interface__["data"][0] % mmap.PAGESIZE
    return memory[start : start + size]
