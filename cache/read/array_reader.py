"""Reads stored arrays: the rows that are asked for, whole chunks at a time, each with its checksum checked.

The chunks go straight from the file into the array that is returned (uncompressed ones without any copy), in memory
that nobody else has while that array lives. A file is opened for each read and closed after it: a process that reads
from any number of parts has no more descriptors than one read needs, and a child inherits none.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from kdpipe.cache.codecs import CHECKSUM_BYTES, Block, chunk_gap, stored_sizes
from kdpipe.cache.read.buffers import Buffers
from kdpipe.cache.read.stored import RawChunks, StoredChunk
from kdpipe.cache.verify.chunks import INDEX_ENTRY_BYTES, Layout, parse_shard_index, read_layout
from kdpipe.cache.write.arrays import shard_name

_MAX_THREADS = 8
# Uncompressed chunks that are read in one go: a thread each for less is slower, since threads wait for each other
# between chunks (Python runs one at a time).
_LEAST_RUN_BYTES, _MOST_RUN_BYTES = 1 << 20, 10 << 20
# Of this process: a forked child has its own copy.
_BUFFERS = Buffers()

# Of an array: a range, or numbers in any order.
Rows = range | npt.NDArray[np.int64]
Item = TypeVar("Item")
# What is read in one go.
Run = RawChunks | StoredChunk


@dataclass(frozen=True)
class Request:
    """Rows to be read.

    Attributes:
        runs: chunks to be read before `values` is called.
        buffer: [rows of these chunks, *row_shape] that the chunks are decoded into.
        place: of the rows within `buffer`.
    """

    runs: list[Run]
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
        codec: of the cache.

    Raises:
        ValueError: its `zarr.json` is not as kdpipe writes it.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int], codec: str) -> None:
        self._folder, self._sizes, self._codec = folder, sizes, codec
        layout = read_layout((folder / "zarr.json").read_bytes(), codec)
        if layout.shard is None:
            raise ValueError("it is not divided into shards")
        self._row_shape, self._chunk_rows = layout.shape[1:], layout.chunk[0]
        self._per_shard = layout.shard[0] // layout.chunk[0]
        self._dtype, self._chunk_bytes = _dtype(layout), _chunk_bytes(layout)
        self._checksums = bytes.fromhex(layout.checksums or "")
        # Whether chunks lie one after the other as the values do.
        self._packed = codec == "none" and not chunk_gap(self._chunk_bytes)
        self._indices: dict[int, npt.NDArray[np.uint64]] = {}
        self.rows = layout.shape[0]

    def request(self, rows: Rows, files: ExitStack) -> Request:
        """Prepare to read rows; nothing but shard indices is read yet.

        Args:
            rows: numbers of the rows, in any order where it is an array.
            files: keeps the files open until the chunks have been read.

        Raises:
            ValueError: a file is damaged, or the array has fewer rows.
            OSError: a file cannot be opened or read.
        """
        count = self._chunk_rows
        place: slice | npt.NDArray[np.int64]
        if isinstance(rows, range):
            first = rows.start // count
            numbers = list(range(first, -(-rows.stop // count) if rows else first))
            place = slice(rows.start - first * count, rows.stop - first * count)
        else:
            unique, inverse = np.unique(rows // count, return_inverse=True)
            numbers, place = unique.tolist(), inverse * count + rows % count
        if numbers and numbers[-1] * count >= self.rows:
            raise ValueError(f"it has {self.rows} rows only")
        decoded = _BUFFERS.take(len(numbers) * self._chunk_bytes)
        buffer = decoded.view(self._dtype).reshape(len(numbers) * count, *self._row_shape)
        opened: dict[int, tuple[int, npt.NDArray[np.uint64]]] = {}
        runs: list[Run] = []
        for first, stop in self._pieces(numbers):
            shard, inside = divmod(numbers[first], self._per_shard)
            if shard not in opened:
                opened[shard] = self._open(shard, files)
            file, index = opened[shard]
            if inside + stop - first > len(index):
                raise ValueError(f"{self._name(shard)} lacks chunk {inside + stop - first - 1}")
            offset, size = index[inside].tolist()
            out = decoded[first * self._chunk_bytes : stop * self._chunk_bytes]
            start = CHECKSUM_BYTES * numbers[first]
            checksums = self._checksums[start : start + CHECKSUM_BYTES * (stop - first)]
            if self._codec == "none":
                runs.append(RawChunks(file, offset, checksums, out))
            else:
                runs.append(StoredChunk(file, offset, size, checksums, self._codec, out))
        return Request(runs, buffer, place)

    def _pieces(self, numbers: list[int]) -> Iterator[tuple[int, int]]:
        """First and stop, of positions, of chunks to be read in one go, given the ascending numbers of all."""
        most = 1
        if self._packed:
            least, most = (max(1, size // self._chunk_bytes) for size in (_LEAST_RUN_BYTES, _MOST_RUN_BYTES))
            most = min(max(-(-len(numbers) // _threads()), least), most)
        first = 0
        for stop in range(1, len(numbers) + 1):
            at_end = stop == len(numbers) or numbers[stop] != numbers[stop - 1] + 1
            if at_end or stop - first == most or numbers[stop] % self._per_shard == 0:
                yield first, stop
                first = stop

    def _name(self, shard: int) -> str:
        return shard_name(shard, len(self._row_shape))

    def _open(self, shard: int, files: ExitStack) -> tuple[int, npt.NDArray[np.uint64]]:
        """Descriptor of a shard's file and its index, of the chunks that are there."""
        name = self._name(shard)
        file = os.open(f"{self._folder}/{name}", os.O_RDONLY)  # quicker than a Path
        files.callback(os.close, file)
        size, expected = os.fstat(file).st_size, self._sizes.get(name)
        if size != expected:
            raise ValueError(f"{self._folder.name}/{name} has {size} bytes instead of {expected}")
        if shard not in self._indices:
            self._indices[shard] = self._read_index(file, size, name)
        return file, self._indices[shard]

    def _read_index(self, file: int, size: int, name: str) -> npt.NDArray[np.uint64]:
        """Offset and stored bytes of each chunk in a shard, both known to lie within the file."""
        tail = self._per_shard * INDEX_ENTRY_BYTES + CHECKSUM_BYTES
        if size < tail:
            raise ValueError(f"the index of {name} does not fit its {size} bytes")
        try:
            index = parse_shard_index(os.pread(file, tail, size - tail), size - tail)
        except ValueError as error:
            raise ValueError(f"the index of {name} {error}") from error
        allowed = stored_sizes(self._chunk_bytes, self._codec, sharded=True)
        if index[:, 1].min() < allowed.start or index[:, 1].max() >= allowed.stop:
            raise ValueError(f"the index of {name} does not fit: chunks of this array have other sizes")
        return index


class Readers:
    """Reads chunks by as many threads as torch uses in this process, so by one in a worker of a data loader.

    The threads are started when first needed; a forked child needs another one of these. This thread takes items from
    the beginning and the others from the end, so that of two, each mostly fills the same half of memory that is used
    again: what another core wrote last takes several times as long to write.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def run(self, read: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Call `read` with each item; the first error is raised when none is being read any more."""
        threads = min(_threads(), len(items))
        if threads < 2:
            for item in items:
                read(item)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_MAX_THREADS - 1, thread_name_prefix="kdpipe-read")
        pending = deque(items)

        def drain(take: Callable[[], Item]) -> None:
            while True:
                try:
                    item = take()
                except IndexError:  # none is left
                    return
                read(item)

        helpers = [self._pool.submit(drain, pending.pop) for _ in range(threads - 1)]
        try:
            drain(pending.popleft)
        finally:
            started = [helper for helper in helpers if not helper.cancel()]
            wait(started)
        for helper in started:
            helper.result()


def _threads() -> int:
    return min(torch.get_num_threads(), _MAX_THREADS)


def read_array(folder: Path, codec: str) -> Block:
    """Read a whole array that `write_array` wrote.

    Raises:
        ValueError: a file is damaged.
        OSError: a file is missing or cannot be read.
    """
    layout = read_layout((folder / "zarr.json").read_bytes(), codec)
    blocks = []
    for name in layout.files():
        block = np.empty(layout.chunk, dtype=_dtype(layout))
        with (folder / name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size not in stored_sizes(_chunk_bytes(layout), codec, sharded=False):
                raise ValueError(f"{name} has {size} bytes, which no chunk of this array has")
            StoredChunk(file.fileno(), 0, size, None, codec, block.reshape(-1).view(np.uint8)).read()
        blocks.append(block)
    if not layout.shape:
        return blocks[0]
    return np.concatenate(blocks)[: layout.shape[0]] if blocks else np.empty(layout.shape, dtype=_dtype(layout))


def _dtype(layout: Layout) -> np.dtype[Any]:
    return np.dtype(layout.dtype).newbyteorder("<")


def _chunk_bytes(layout: Layout) -> int:
    return math.prod(layout.chunk) * _dtype(layout).itemsize
