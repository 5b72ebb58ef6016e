"""Chunks as they lie in a file: read into memory, checked, and decoded."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdpipe.cache.codecs import CHECKSUM_BYTES, crc32c, decompress

_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class StoredChunk:
    """A chunk with its checksum behind it.

    Attributes:
        file: descriptor.
        offset: in the file, bytes.
        size: bytes in the file, checksum included.
        checksum: where it is known from elsewhere, too.
        codec: "zstd", "lz4" or "none".
        out: [N] uint8, where the decoded bytes go, of which there must be N exactly.
    """

    file: int
    offset: int
    size: int
    checksum: bytes | None
    codec: str
    out: _Bytes

    def read(self) -> None:
        """Read, check and decode it.

        Raises:
            ValueError: it is damaged; `out` may hold anything.
            OSError: the file cannot be read.
        """
        data = self.out if self.codec == "none" else np.empty(self.size - CHECKSUM_BYTES, np.uint8)
        tail = bytearray(CHECKSUM_BYTES)
        _read_into(self.file, [data.data, memoryview(tail)], self.offset)
        if crc32c(data) != tail or self.checksum not in (None, bytes(tail)):
            raise _damaged(self.size, self.offset)
        if self.codec == "none":
            return
        try:
            decompress(data, self.out)
        except ValueError as error:
            what = f"the {self.size} bytes at {self.offset}"
            raise ValueError(f"{what} are not a chunk of this array ({error})") from error


@dataclass(frozen=True)
class RawChunks:
    """Uncompressed chunks that lie one after the other in a file, with nothing between them: read in one go.

    Attributes:
        file: descriptor.
        offset: of the first one in the file, bytes.
        checksums: of all of them.
        out: [N] uint8, where they go, all of the same size.
    """

    file: int
    offset: int
    checksums: bytes
    out: _Bytes

    def read(self) -> None:
        """Read and check them.

        Raises:
            ValueError: one is damaged; `out` may hold anything.
            OSError: the file cannot be read.
        """
        _read_into(self.file, [self.out.data], self.offset)
        size = len(self.out) * CHECKSUM_BYTES // len(self.checksums)
        for number, start in enumerate(range(0, len(self.out), size)):
            expected = self.checksums[CHECKSUM_BYTES * number : CHECKSUM_BYTES * (number + 1)]
            if crc32c(self.out[start : start + size]) != expected:
                raise _damaged(size, self.offset + start)


def _damaged(size: int, offset: int) -> ValueError:
    return ValueError(f"the checksum of the {size} bytes at {offset} does not fit")


def _read_into(file: int, views: list[Any], offset: int) -> None:
    """Fill the views, one after the other, with what is at the offset."""
    while views:
        count = os.preadv(file, views, offset)
        if count == 0:
            raise ValueError(f"the file ends at {offset}")
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
