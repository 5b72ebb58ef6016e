"""Arrays that grow by rows and are streamed to disk as Zarr v3 shards."""

import hashlib
import math
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kdpipe.cache.codecs import Block, array_metadata, checksum_follows, chunk_gap, crc32c, encode_chunk
from kdpipe.cache.store.files import FileRecord, write_file

SHARD_CHUNKS = 2048
_ABSENT = 2**64 - 1
# Written bytes after which the disk is asked to catch up, so that the commit has little left to wait for.
_SYNC_BYTES = 32 << 20
# Larger arrays that are written whole are divided into files of about this many bytes.
_FILE_BYTES = 64 << 20
# Chunks of an array that are encoded at the same time.
_AHEAD = 8


class ArrayWriter:
    """Writes one array of shape (rows, *row_shape), row after row, into chunks of `chunk_rows` rows.

    A shard has up to 2048 chunks; an array with fewer is one file. Memory is that of a few chunks, which are encoded by
    the threads of `pool` and written in order. Rows of zeros fill the last chunk, and belong to the array: a library
    that checks the checksum of a chunk only where it is read whole can read it so.

    The attribute `checksums` of the array holds the checksum of each chunk, 8 hexadecimal digits as they are stored: so
    a file that was put in the place of another is found as a damaged one is.

    Args:
        folder: of the array; it is made, and must not be there.
        row_shape: shape of one row.
        dtype: numpy's name of the type.
        chunk_rows: rows per chunk.
        codec: "zstd", "lz4" or "none".
        pool: encodes the chunks.
        attributes: user attributes of the array.
    """

    def __init__(
        self,
        folder: Path,
        row_shape: tuple[int, ...],
        dtype: str,
        chunk_rows: int,
        codec: str,
        pool: Executor,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        folder.mkdir()
        self.rows = 0
        self._folder, self._codec, self._attributes = folder, codec, attributes
        self._row_shape, self._chunk_rows = row_shape, chunk_rows
        self._chunk = np.zeros((chunk_rows, *row_shape), dtype=dtype)
        self._filled = 0
        self._pool = pool
        self._pending: deque[Future[tuple[bytes, bytes]]] = deque()
        self._index: list[tuple[int, int]] = []
        self._checksums: list[str] = []
        self._shards = 0
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._size = self._unsynced = 0
        self._files: dict[str, FileRecord] = {}

    def append(self, rows: Block) -> None:
        """Add rows [N, *row_shape] of the array's type, which must not change any more."""
        if rows.shape[1:] != self._row_shape or rows.dtype != self._chunk.dtype:
            raise ValueError(f"rows are {rows.shape} {rows.dtype}, not (N, *{self._row_shape}) {self._chunk.dtype}")
        self.rows += len(rows)
        start = 0
        while start < len(rows):
            if self._filled == 0 and len(rows) - start >= self._chunk_rows:
                self._encode(np.ascontiguousarray(rows[start : start + self._chunk_rows]))
                start += self._chunk_rows
                continue
            count = min(len(rows) - start, self._chunk_rows - self._filled)
            self._chunk[self._filled : self._filled + count] = rows[start : start + count]
            self._filled += count
            start += count
            if self._filled == self._chunk_rows:
                self._encode(self._chunk)
                self._chunk, self._filled = np.zeros_like(self._chunk), 0

    def close(self) -> dict[str, FileRecord]:
        """Write what is left and the metadata, and force all to disk.

        Returns:
            Size and digest of each file, by its name within the array's folder.
        """
        if self._filled:
            self._chunk[self._filled :] = 0
            self._encode(self._chunk)
        self._write_encoded(ahead=0)
        if self._index:
            self._finish_shard(len(self._index) if self._shards == 0 else SHARD_CHUNKS)
        chunks = -(-self.rows // self._chunk_rows)
        shard_rows = self._chunk_rows * min(max(chunks, 1), SHARD_CHUNKS)
        metadata = array_metadata(
            (chunks * self._chunk_rows, *self._row_shape),
            str(self._chunk.dtype),
            (self._chunk_rows, *self._row_shape),
            (shard_rows, *self._row_shape),
            self._codec,
            {**(self._attributes or {}), "checksums": "".join(self._checksums)},
        )
        return {**self._files, "zarr.json": write_file(self._folder / "zarr.json", metadata)}

    def abort(self) -> None:
        """Let go of the open file; the folder is the caller's to remove."""
        if self._file is not None:
            self._file.close()

    def _encode(self, block: Block) -> None:
        self._pending.append(self._pool.submit(encode_chunk, block, self._codec))
        self._write_encoded(ahead=_AHEAD)

    def _write_encoded(self, ahead: int) -> None:
        """Write chunks in order until no more than `ahead` are still being encoded."""
        while self._pending and (len(self._pending) > ahead or self._pending[0].done()):
            data, checksum = self._pending.popleft().result()
            self._checksums.append(checksum.hex())
            if not checksum_follows(self._codec, sharded=True):
                checksum = b""
            if len(self._index) == SHARD_CHUNKS:
                self._finish_shard(SHARD_CHUNKS)
            self._write(bytes(chunk_gap(self._size)))
            self._index.append((self._size, len(data) + len(checksum)))
            self._write(data)
            self._write(checksum)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._file = (self._folder / self._shard_name()).open("wb", buffering=0)
        view = memoryview(data)
        while len(view):  # a raw file may take fewer bytes than it was given
            view = view[self._file.write(view) :]
        self._digest.update(data)
        self._size += len(data)
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_BYTES:
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def _finish_shard(self, entries: int) -> None:
        index = np.full((entries, 2), _ABSENT, dtype="<u8")
        index[: len(self._index)] = self._index
        self._write(index.tobytes() + crc32c(index.tobytes()))
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
        self._files[self._shard_name()] = (self._size, self._digest.hexdigest())
        self._file, self._index = None, []
        self._size = self._unsynced = 0
        self._digest = hashlib.sha256()
        self._shards += 1

    def _shard_name(self) -> str:
        return shard_name(self._shards, len(self._row_shape))


def shard_name(number: int, row_dims: int) -> str:
    """File name of a shard of an array that has `row_dims` dimensions beside the rows."""
    return ".".join(["c", str(number), *["0"] * row_dims])


def rows_per_chunk(row_shape: tuple[int, ...], dtype: str, target: int) -> int:
    """A power of two of rows that takes at most about `target` bytes, between 1 and 1024."""
    row = math.prod(row_shape) * np.dtype(dtype).itemsize
    return 1 << min(10, max(0, (target // max(row, 1)).bit_length() - 1))


def write_array(folder: Path, values: Block, codec: str) -> dict[str, FileRecord]:
    """Write a whole array, of any shape, as chunks along its first dimension in files of their own.

    Returns:
        Size and digest of each file, by its name within the array's folder.
    """
    folder.mkdir()
    chunk = values.shape
    if values.nbytes > _FILE_BYTES:
        chunk = (max(1, _FILE_BYTES // max(1, values.nbytes // len(values))), *values.shape[1:])
    chunk = tuple(max(1, side) for side in chunk)
    files = {}
    for number in range(-(-len(values) // chunk[0]) if values.ndim and values.size else int(values.ndim == 0)):
        block = np.zeros(chunk, dtype=values.dtype)
        part = values[number * chunk[0] : (number + 1) * chunk[0]] if values.ndim else values
        block[tuple(slice(side) for side in part.shape)] = part
        name = shard_name(number, values.ndim - 1) if values.ndim else "c"
        files[name] = write_file(folder / name, b"".join(encode_chunk(block, codec)))
    metadata = array_metadata(values.shape, str(values.dtype), chunk, None, codec)
    return {**files, "zarr.json": write_file(folder / "zarr.json", metadata)}
