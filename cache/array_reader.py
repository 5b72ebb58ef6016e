"""Reads stored arrays: the rows that are asked for, whole chunks at a time, each with its checksum checked.

The chunks go straight from the file into the array that is returned (uncompressed ones without any copy), so nothing
here is shared with another read. A file is opened for each read and closed after it: a process that reads from any
number of parts has no more descriptors than one read needs, and a child inherits none.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kdpipe.cache.arrays import shard_name
from kdpipe.cache.codecs import CHECKSUM_BYTES, Block, crc32c, read_chunk, stored_sizes

_MAX_THREADS = 8
_ENTRY_BYTES = 16

Item = TypeVar("Item")


@dataclass(frozen=True)
class Layout:
    """How an array is divided into chunks and files, from its `zarr.json`.

    Attributes:
        shape: of the array.
        dtype: of its elements.
        chunk: shape of a chunk.
        chunks_per_file: in the index of a shard; 0 where each chunk has a file of its own.
        codec: "zstd", "lz4" or "none".
        checksums: of all chunks in their order, 4 bytes each; None where the array does not keep them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk: tuple[int, ...]
    chunks_per_file: int
    codec: str
    checksums: bytes | None

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunk) * self.dtype.itemsize


def read_layout(folder: Path) -> Layout:
    """The layout of an array that `array_metadata` describes."""
    metadata = json.loads((folder / "zarr.json").read_bytes())
    outer = chunk = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    codecs, chunks_per_file = metadata["codecs"], 0
    if codecs[0]["name"] == "sharding_indexed":
        sharding = codecs[0]["configuration"]
        chunk, codecs = tuple(sharding["chunk_shape"]), sharding["codecs"]
        chunks_per_file = outer[0] // chunk[0]
    codec = next((codec["configuration"]["cname"] for codec in codecs if codec["name"] == "blosc"), "none")
    dtype = np.dtype(metadata["data_type"]).newbyteorder("<")
    checksums = metadata["attributes"].get("checksums") if chunks_per_file else None
    return Layout(
        shape=tuple(metadata["shape"]),
        dtype=dtype,
        chunk=chunk,
        chunks_per_file=chunks_per_file,
        codec=codec,
        checksums=None if checksums is None else bytes.fromhex(checksums),
    )


@dataclass(frozen=True)
class StoredChunk:
    """A chunk to be read: where it is, its checksum, and where its decoded bytes go."""

    file: int
    offset: int
    size: int
    codec: str
    checksum: bytes | None
    out: npt.NDArray[np.uint8]

    def read(self) -> None:
        """Read it.

        Raises:
            ValueError: it is damaged.
            OSError: the file cannot be read.
        """
        read_chunk(self.file, self.offset, self.size, self.codec, self.checksum, self.out)


@dataclass(frozen=True)
class Request:
    """Rows to be read.

    Attributes:
        chunks: to be read before `values` is called.
        buffer: [rows of these chunks, *row_shape] that the chunks are decoded into.
        place: of the rows within `buffer`.
    """

    chunks: list[StoredChunk]
    buffer: Block
    place: slice | npt.NDArray[np.int64]

    def values(self) -> Block:
        """[N, *row_shape] the rows."""
        rows: Block = self.buffer[self.place]
        return rows


class ArrayReader:
    """Reads rows of one array in shards. Its shard indices are kept, its files are not.

    Args:
        folder: of the array.
        sizes: bytes of each of its files by name.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self._folder, self._sizes = folder, sizes
        self._layout = read_layout(folder)
        self._indices: dict[int, npt.NDArray[np.uint64]] = {}
        self.rows = self._layout.shape[0]

    def request(self, rows: range | npt.NDArray[np.int64], files: ExitStack) -> Request:
        """Prepare to read rows; nothing but shard indices is read yet.

        Args:
            rows: numbers of the rows, in any order where it is an array.
            files: keeps the files open until the chunks have been read.

        Raises:
            ValueError: a file is damaged, or the array has fewer rows.
            OSError: a file cannot be opened or read.
        """
        layout = self._layout
        count = layout.chunk[0]
        place: slice | npt.NDArray[np.int64]
        if isinstance(rows, range):
            first = rows.start // count
            numbers = list(range(first, -(-rows.stop // count) if rows else first))
            place = slice(rows.start - first * count, rows.stop - first * count)
        else:
            unique, inverse = np.unique(rows // count, return_inverse=True)
            numbers, place = unique.tolist(), inverse * count + rows % count
        buffer = np.empty((len(numbers) * count, *layout.shape[1:]), dtype=layout.dtype)
        decoded = buffer.reshape(-1).view(np.uint8)
        chunks, opened = [], {}
        for position, number in enumerate(numbers):
            shard, inside = divmod(number, layout.chunks_per_file)
            if number * count >= self.rows:
                raise ValueError(f"it has {self.rows} rows only")
            if shard not in opened:
                opened[shard] = self._open(shard, files)
            file, index = opened[shard]
            if inside >= len(index):
                raise ValueError(f"{self._name(shard)} lacks chunk {inside}")
            offset, size = index[inside].tolist()
            out = decoded[position * layout.chunk_bytes : (position + 1) * layout.chunk_bytes]
            checksum = None if layout.checksums is None else layout.checksums[4 * number : 4 * number + 4]
            chunks.append(StoredChunk(file, offset, size, layout.codec, checksum, out))
        return Request(chunks, buffer, place)

    def _name(self, shard: int) -> str:
        return shard_name(shard, len(self._layout.shape) - 1)

    def _open(self, shard: int, files: ExitStack) -> tuple[int, npt.NDArray[np.uint64]]:
        """Descriptor of a shard's file and its index, of the chunks that are there."""
        name = self._name(shard)
        file = os.open(self._folder / name, os.O_RDONLY)
        files.callback(os.close, file)
        size, expected = os.fstat(file).st_size, self._sizes.get(name)
        if size != expected:
            raise ValueError(f"{self._folder.name}/{name} has {size} bytes instead of {expected}")
        if shard not in self._indices:
            self._indices[shard] = self._read_index(file, size, name)
        return file, self._indices[shard]

    def _read_index(self, file: int, size: int, name: str) -> npt.NDArray[np.uint64]:
        """Offset and stored bytes of each chunk in a shard, both known to lie within the file."""
        index_bytes = self._layout.chunks_per_file * _ENTRY_BYTES
        end = size - index_bytes - CHECKSUM_BYTES
        data = os.pread(file, index_bytes + CHECKSUM_BYTES, max(0, end))
        if end < 0 or crc32c(data[:index_bytes]) != data[index_bytes:]:
            raise ValueError(f"the checksum of the index of {name} does not fit")
        index = np.frombuffer(data, dtype="<u8", count=2 * self._layout.chunks_per_file).reshape(-1, 2)
        there = index[index[:, 0] < size]  # what is not has offsets of 2^64 - 1, after all others
        allowed = stored_sizes(self._layout.chunk_bytes, self._layout.codec)
        sound = len(there) and there[:, 1].min() >= allowed.start and there[:, 1].max() < allowed.stop
        # The chunks lie one after the other, from the beginning of the file to the index.
        if not sound or not np.array_equal(np.cumsum(there[:, 1]), np.append(there[1:, 0], end)) or there[0, 0] != 0:
            raise ValueError(f"the index of {name} does not fit its {size} bytes")
        return there.copy()


class Readers:
    """Reads chunks by as many threads as torch uses in this process, so by one in a worker of a data loader.

    The threads are started when first needed; a forked child needs another one of these.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def run(self, read: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Call `read` with each item, in any order; the first error is raised when none is being read any more."""
        threads = min(torch.get_num_threads(), _MAX_THREADS, len(items))
        if threads < 2:
            for item in items:
                read(item)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_MAX_THREADS - 1, thread_name_prefix="kdpipe-read")
        pending = deque(items)

        def drain() -> None:
            while pending:
                try:
                    item = pending.popleft()
                except IndexError:  # another thread took the last one
                    return
                read(item)

        helpers = [self._pool.submit(drain) for _ in range(threads - 1)]
        try:
            drain()
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()


def read_array(folder: Path) -> Block:
    """Read a whole array that `write_array` wrote.

    Raises:
        ValueError: a chunk is damaged.
        OSError: a file is missing or cannot be read.
    """
    layout = read_layout(folder)
    if not layout.shape:
        scalar = np.empty((), dtype=layout.dtype)
        _read_file(folder / "c", layout, scalar)
        return scalar
    count = -(-layout.shape[0] // layout.chunk[0]) if math.prod(layout.shape) else 0
    values = np.empty((count * layout.chunk[0], *layout.shape[1:]), dtype=layout.dtype)
    for number in range(count):
        rows = slice(number * layout.chunk[0], (number + 1) * layout.chunk[0])
        _read_file(folder / shard_name(number, len(layout.shape) - 1), layout, values[rows])
    return values[: layout.shape[0]] if count else np.empty(layout.shape, dtype=layout.dtype)


def _read_file(path: Path, layout: Layout, out: Block) -> None:
    """Read the only chunk of a file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size not in stored_sizes(layout.chunk_bytes, layout.codec):
            raise ValueError(f"{path.name} has {size} bytes, which no chunk of this array has")
        read_chunk(file.fileno(), 0, size, layout.codec, None, out.reshape(-1).view(np.uint8))
