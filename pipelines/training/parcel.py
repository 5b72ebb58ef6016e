"""Batches from loader workers, as one piece of shared memory each.

torch hands over every tensor of a batch as a file descriptor of its own, for which the training process has to ask the
worker; a batch of cached targets is a hundred tensors. One piece takes 0.25 to 0.4 of the time of the training process
that these take, and no room in /dev/shm, which containers make small (`tests/benchmarks/batches.py`).
"""

import ctypes
import io
import math
import mmap
import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import FUNCTIONS
from torch import Tensor

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.runtime.console import bytes_text

__all__ = ["pack_batch"]

_ALIGNMENT = 64  # bytes


class _Packer(pickle.Pickler):
    """Pickles all but tensors, which it lists with their places."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[tuple[int, Tensor]] = []
        self.size = 0

    def persistent_id(self, value: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        if not isinstance(value, Tensor):
            return None
        start = self.size
        self.tensors.append((start, value))
        self.size += -(-value.numel() * value.element_size() // _ALIGNMENT) * _ALIGNMENT
        return start, value.dtype, tuple(value.shape)


class _Unpacker(pickle.Unpickler):
    """Puts views of the memory in the places of the tensors."""

    def __init__(self, memory: Tensor, text: bytes) -> None:
        super().__init__(io.BytesIO(text))
        self._memory = memory

    def persistent_load(self, place: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
        start, dtype, shape = place
        return self._memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class _Parcel:
    """Packed now, so that errors are the worker's; becomes what it holds where it is unpickled, or pinned."""

    def __init__(self, value: Any, pin: bool) -> None:
        self._pin = pin
        file = io.BytesIO()
        packer = _Packer(file)
        packer.dump(value)
        self._text = file.getvalue()
        self._memory = torch.empty(0, dtype=torch.uint8).set_(_shared_storage(packer.size))
        for start, tensor in packer.tensors:
            end = start + tensor.numel() * tensor.element_size()
            self._memory[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Arrived if self._pin else _unpack, (self._memory, self._text)


def _shared_storage(size: int) -> Any:
    """A torch storage that another process can map; not in /dev/shm, which containers make small.

    Raises:
        KdpipeError: There is not so much; as an error here, where torch's would be a bus error at the first write.
    """
    storage: Any = torch.UntypedStorage
    if not size or not hasattr(os, "memfd_create"):  # Linux only
        return storage._new_shared(size)
    try:
        file = os.memfd_create("kdpipe-batch")
        try:
            os.posix_fallocate(file, 0, size)
            return storage._new_shared_fd_cpu(file, size)
        finally:
            os.close(file)
    except OSError as error:
        raise KdpipeError(
            f"A loader worker found no memory for a batch of {bytes_text(size)} ({error.strerror}). Use a smaller "
            "--batch-size or fewer --workers, and go on with --resume where an epoch was finished."
        ) from error


def _unpack(memory: Tensor, text: bytes) -> Any:
    return _Unpacker(memory, text).load()


class _Arrived:
    """A batch in shared memory, for the thread of torch's loader that copies batches into page-locked memory."""

    def __init__(self, memory: Tensor, text: bytes) -> None:
        self._memory, self._text = memory, text

    def pin_memory(self) -> Any:
        """What was packed, in one piece of page-locked memory."""
        pinned = self._memory.pin_memory()
        _free_shared(self._memory)
        return _unpack(pinned, self._text)


def _free_shared(memory: Tensor) -> None:
    """Free shared memory that nobody reads any more.

    The system takes 0.4 ms per MB for that. Where it does so as the last tensor is dropped, it holds Python's lock, and
    the training stands still; a foreign function does not. Where it cannot be freed so, it is when the tensor is.
    """
    if hasattr(mmap, "MADV_REMOVE"):  # Linux only
        address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel())
        ctypes.CDLL(None).madvise(address, size, mmap.MADV_REMOVE)


@FUNCTIONS.register_module()  # type: ignore[untyped-decorator]
def pack_batch(samples: Sequence[Any], pin: bool = False) -> Any:
    """A batch as mmengine's `pseudo_collate` makes it, for a loader with workers: it arrives with one descriptor.

    Args:
        samples: Of the data set.
        pin: The loader copies batches into page-locked memory; then this is done in one piece, too.
    """
    return _Parcel(pseudo_collate(samples), pin)
