"""Arrays that grow by rows, written shard by shard: numcodecs encodes their chunks on a few threads."""

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from zarr.core.sync import sync

from kdpipe.cache.format.layout import ArrayLayout, Block
from kdpipe.cache.format.shards import encode_chunk, join_chunks
from kdpipe.cache.format.zarr_arrays import WrittenFiles

_THREADS = 4  # which encode 1.5 GB/s and more


@contextmanager
def encoding_threads() -> Iterator[Executor]:
    """Threads that encode the chunks of arrays; what they have not begun at the end is left."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="kdpipe-encode")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class ArrayWriter:
    """Writes one array, row after row.

    A chunk is encoded as soon as it is full, on another thread; encoded chunks are kept until they fill a shard, which
    is one file. The bytes are those that zarr would write; its own pipeline takes half a millisecond of Python for each
    chunk, during which a teacher on a GPU waits.

    Args:
        files: store to write to.
        name: of the array.
        layout: of the array.
        threads: that encode.
    """

    def __init__(self, files: WrittenFiles, name: str, layout: ArrayLayout, threads: Executor) -> None:
        self.rows = 0
        self._files, self._name, self._layout, self._threads = files, name, layout, threads
        self._pending: list[Block] = []  # rows of the chunk that is not full
        self._filled = 0
        self._chunks: list[Future[bytes]] = []  # of the shard that is not full
        self._shards = 0

    def append(self, rows: Block) -> None:
        """Add rows [N, *row_shape] of the array's type, which must not change any more."""
        if rows.shape[1:] != self._layout.row_shape or rows.dtype != np.dtype(self._layout.dtype):
            raise ValueError(f"rows are {rows.shape} {rows.dtype}, not {self._layout.row_shape} {self._layout.dtype}")
        while len(rows):
            some, rows = np.split(rows, [self._layout.chunk_rows - self._filled])
            self._pending.append(some)
            self._filled += len(some)
            self.rows += len(some)
            if self._filled == self._layout.chunk_rows:
                self._end_chunk()
            if len(self._chunks) * self._layout.chunk_rows == self._layout.shard_rows:
                self._end_shard()

    def close(self) -> None:
        """Write what is left, and the array's metadata."""
        if self._filled:
            self._end_chunk()
        if self._chunks:
            self._end_shard()
        sync(self._files.set_metadata(self._name, self._layout, self.rows))

    def _end_chunk(self) -> None:
        self._chunks.append(self._threads.submit(encode_chunk, self._pending, self._layout))
        self._pending, self._filled = [], 0

    def _end_shard(self) -> None:
        chunks = [chunk.result() for chunk in self._chunks]
        shard = join_chunks(chunks, self._layout.shard(self.rows) // self._layout.chunk_rows)
        sync(self._files.set_bytes(f"{self._name}/{self._layout.file(self._shards)}", shard))
        self._chunks, self._shards = [], self._shards + 1


def write_array(files: WrittenFiles, name: str, layout: ArrayLayout, values: Block) -> None:
    """Write a whole array.

    Args:
        files: where it is written.
        name: of the array.
        layout: of the array.
        values: [rows, *row_shape] of its type.
    """
    with encoding_threads() as threads:
        writer = ArrayWriter(files, name, layout, threads)
        writer.append(values)
        writer.close()
