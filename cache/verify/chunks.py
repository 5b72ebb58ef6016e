"""Checks one stored file by the format alone: digest, checksums, decoding. Neither zarr nor zarrs is asked."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from kdpipe.cache.codecs import (
    CHECKSUM_BYTES,
    CHUNK_ALIGNMENT,
    Block,
    array_metadata,
    checksum_follows,
    chunk_gap,
    crc32c,
    decompress,
)
from kdpipe.cache.format.record import check_size
from kdpipe.cache.write.arrays import SHARD_CHUNKS, shard_name

_BLOCK = 1 << 20
INDEX_ENTRY_BYTES = 16

# Is told how many bytes were read.
Tick = Callable[[int], None]
# What is wrong with the values of a chunk, given its number: a reason, and which of its rows; None where nothing is.
Look = Callable[[int, Block], "tuple[str, Block] | None"]


@dataclass(frozen=True)
class Layout:
    """How an array lies in its files.

    Attributes:
        shape: of the array.
        dtype: numpy's name of its type.
        chunk: shape of a chunk.
        shard: shape of a shard, a multiple of `chunk`; None where each chunk has a file of its own.
        codec: "zstd", "lz4" or "none".
        checksums: of all chunks in order, 8 hexadecimal digits each; None where each has a file of its own.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    shard: tuple[int, ...] | None
    codec: str
    checksums: str | None

    @property
    def chunks(self) -> int:
        """Number of chunks, all of which are divisions of the first dimension."""
        if not self.shape:
            return 1
        return -(-self.shape[0] // self.chunk[0]) if math.prod(self.shape) else 0

    def files(self) -> dict[str, range]:
        """The numbers of the chunks in each file, by its name within the array's folder."""
        if not self.shape:
            return {"c": range(1)}
        step = 1 if self.shard is None else self.shard[0] // self.chunk[0]
        starts = range(0, self.chunks, max(1, step))
        dims = len(self.shape) - 1
        return {shard_name(n, dims): range(s, min(s + step, self.chunks)) for n, s in enumerate(starts)}


def read_layout(data: bytes, codec: str) -> Layout:
    """The layout in a `zarr.json` of an array that kdpipe wrote.

    Args:
        data: the file.
        codec: of the cache.

    Raises:
        ValueError: it is not as kdpipe writes it.
    """
    try:
        values: dict[str, Any] = json.loads(data)
        grid = tuple(values["chunk_grid"]["configuration"]["chunk_shape"])
        first, attributes = values["codecs"][0], values["attributes"]
        sharded = first["name"] == "sharding_indexed"
        chunk = tuple(first["configuration"]["chunk_shape"]) if sharded else grid
        shard = grid if sharded else None
        layout = Layout(
            tuple(values["shape"]),
            values["data_type"],
            chunk,
            shard,
            codec,
            attributes["checksums"] if sharded else None,
        )
        as_written = array_metadata(layout.shape, layout.dtype, chunk, shard, codec, attributes)
        known = len(bytes.fromhex(attributes["checksums"])) // CHECKSUM_BYTES if sharded else None
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"it cannot be understood ({type(error).__name__}: {error})") from error
    if as_written != data or min(chunk, default=1) < 1:
        raise ValueError(f"it is not as this kdpipe writes it for the codec {codec!r}")
    if known not in (None, layout.chunks):
        raise ValueError(f"it has {known} checksums for {layout.chunks} chunks")
    return layout


@dataclass(frozen=True)
class Found:
    """What is wrong with a file.

    Attributes:
        reason: to follow the name of the file.
        chunk: number of the chunk concerned, within the array; None where it is the whole file.
        rows: bool per row of that chunk, the rows concerned; None where it is all of them.
    """

    reason: str
    chunk: int | None = None
    rows: Block | None = None


def check_file(
    file: Path, size: int, digest: str, layout: Layout, chunks: range, look: Look | None, tick: Tick
) -> list[Found]:
    """Read a file once, with the memory of one chunk, and say all that is wrong with it.

    Args:
        file: of an array.
        size: bytes that it should have.
        digest: sha256 that it should have.
        layout: of the array.
        chunks: numbers of the chunks in the file.
        look: is given the values of each chunk that could be decoded.
        tick: is called after every read.
    """
    if reason := check_size(file, size):
        return [Found(reason)]
    sha = hashlib.sha256()
    found: list[Found] = []
    try:
        with file.open("rb") as opened:
            lengths = _lengths(opened, size, layout, len(chunks))
            if lengths is None:
                found.append(Found("has a damaged shard index"))
            for number, length in zip(chunks, lengths or (), strict=False):
                gap, data = opened.read(chunk_gap(opened.tell())), opened.read(length)
                sha.update(gap)
                sha.update(data)
                tick(len(gap) + len(data))
                found += _check_chunk(data, layout, number, look)
            while block := opened.read(_BLOCK):
                sha.update(block)
                tick(len(block))
    except OSError as error:
        return [*found, Found(f"cannot be read: {error.strerror}")]
    if sha.hexdigest() != digest and not found:
        found.append(Found("has other content than was written"))
    return found


def _lengths(opened: BinaryIO, size: int, layout: Layout, count: int) -> Sequence[int] | None:
    """Bytes of each chunk of a file, in their order; None where the shard index is damaged."""
    if layout.shard is None:
        return [size]
    entries = layout.shard[0] // layout.chunk[0]
    tail = entries * INDEX_ENTRY_BYTES + CHECKSUM_BYTES
    if size < tail or entries > SHARD_CHUNKS:
        return None
    opened.seek(size - tail)
    data = opened.read(tail)
    opened.seek(0)
    try:
        lengths: list[int] = parse_shard_index(data, size - tail)[:, 1].tolist()
    except ValueError:
        return None
    return lengths if len(lengths) == count else None


def parse_shard_index(data: bytes, end: int) -> npt.NDArray[np.uint64]:
    """Offset and stored bytes of each chunk that is in a shard, which lie one after the other, aligned.

    Args:
        data: the index as it is stored, checksum included.
        end: where it begins in its file, and the chunks end.

    Returns:
        [N, 2], within the file.

    Raises:
        ValueError: it is damaged; the message follows a word for it.
    """
    if crc32c(data[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]:
        raise ValueError("does not fit its checksum")
    index = np.frombuffer(data[:-CHECKSUM_BYTES], dtype="<u8").reshape(-1, 2)
    there = index[index[:, 0] < end]  # what is not has offsets of 2^64 - 1, after all others
    ends = there.sum(axis=1, dtype=np.uint64)
    sound = len(there) and there[0, 0] == 0 and there[:, 1].max() <= end and ends[-1] == end
    if not sound or not np.array_equal(ends[:-1] + -ends[:-1] % CHUNK_ALIGNMENT, there[1:, 0]):
        raise ValueError(f"does not fit the {end} bytes before it")
    return there.copy()


def _check_chunk(data: bytes, layout: Layout, number: int, look: Look | None) -> list[Found]:
    sums = set()
    if layout.checksums is not None:
        sums.add(layout.checksums[8 * number : 8 * number + 8])
    if checksum_follows(layout.codec, layout.shard is not None):
        data, follows = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        sums.add(follows.hex())
    if sums != {crc32c(data).hex()}:
        return [Found("is damaged: the checksum of a chunk does not fit", number)]
    values = np.empty(layout.chunk, dtype=layout.dtype)
    try:
        if layout.codec == "none":
            values[...] = np.frombuffer(data, dtype=values.dtype.newbyteorder("<")).reshape(layout.chunk)
        else:
            decompress(data, values)
    except ValueError as error:
        return [Found(f"is damaged: a chunk cannot be decoded ({error})", number)]
    wrong = None if look is None else look(number, values)
    return [] if wrong is None else [Found(wrong[0], number, wrong[1])]
