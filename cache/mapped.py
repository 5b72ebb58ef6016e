"""Files seen as memory: what lies in the page cache is read without a copy.

The standard library's `mmap` keeps a descriptor per mapping, and holds the interpreter while it waits for the disk; so
the system's calls are used directly.
"""

import ctypes
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap, _madvise = _libc.mmap, _libc.munmap, _libc.madvise
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_mmap.restype = ctypes.c_void_p
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value
# Of Linux, since 5.14: bring pages in, and say where that fails instead of killing who touches them.
_MADV_POPULATE_READ = 22
# Of Linux: pages that nobody writes to need no memory of their own.
_MAP_NORESERVE = 0x4000


def map_file(file: int, offset: int, size: int) -> _Bytes | None:
    """[size] bytes of a file, for as long as an array or tensor is on them; what is written to them stays private.

    Nothing is read yet: `populate` does that, and must be called before anybody looks.

    Args:
        file: descriptor; it may be closed afterwards.
        offset: in the file, bytes.
        size: positive, and within the file.

    Returns:
        None where the system cannot do it.
    """
    if not _SUPPORTED:
        return None
    before = offset % mmap.ALLOCATIONGRANULARITY
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = _mmap(None, before + size, protection, mmap.MAP_PRIVATE | _MAP_NORESERVE, file, offset - before)
    return None if address == _FAILED else np.asarray(_Mapping(address, before, size))


def populate(memory: _Bytes) -> bool:
    """Bring a stretch of a mapped file into memory.

    Returns:
        False where it cannot be read in this way: reading it from the file into the same place says why.
    """
    address = memory.__array_interface__["data"][0]
    before = address % mmap.PAGESIZE
    failed: int = _madvise(address - before, before + memory.nbytes, _MADV_POPULATE_READ)
    return not failed


class _Mapping:
    """What all arrays and tensors on a mapping keep alive; it goes with the last of them."""

    __slots__ = ("__array_interface__", "_address", "_size", "_unmap")

    def __init__(self, address: int, before: int, size: int) -> None:
        self._address, self._size, self._unmap = address, before + size, _munmap
        self.__array_interface__: dict[str, Any] = {
            "data": (address + before, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        self._unmap(self._address, self._size)


def _supported() -> bool:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        page = np.frombuffer(memory, dtype=np.uint8)
        done = populate(page)
        del page
    return done


_SUPPORTED = _supported()
