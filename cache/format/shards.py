"""Chunks and shards as zarr's sharding codec lays them out: encoded chunks, their index, and checksums of all."""

import functools
from collections.abc import Sequence

import google_crc32c
import numcodecs
import numpy as np
from numcodecs.abc import Codec

from kdpipe.cache.format.layout import ArrayLayout, Block

_ABSENT = np.iinfo(np.uint64).max  # offset and size of a chunk that a shard has room for, behind the end of the array


def encode_chunk(blocks: Sequence[Block], layout: ArrayLayout) -> bytes:
    """Bytes of a chunk: compressed, with a checksum; several threads may do so at once.

    Args:
        blocks: its rows `[n, *row_shape]` in pieces; those that are missing at the end of an array are zeros.
        layout: of the array.
    """
    dtype = np.dtype(layout.dtype).newbyteorder("<")
    if len(blocks) == 1 and len(blocks[0]) == layout.chunk_rows:
        chunk = np.ascontiguousarray(blocks[0], dtype)
    else:
        chunk = np.zeros((layout.chunk_rows, *layout.row_shape), dtype)
        np.concatenate(blocks, out=chunk[: sum(map(len, blocks))])
    compressor = _compressor(layout)
    return _with_checksum(chunk.tobytes() if compressor is None else bytes(compressor.encode(chunk)))


def join_chunks(chunks: Sequence[bytes], room: int) -> bytes:
    """Bytes of a shard: chunks, their index, and its checksum.

    Args:
        chunks: as `encode_chunk` gives them, in the order of their rows.
        room: how many the shard could have.
    """
    sizes = np.array([len(chunk) for chunk in chunks], dtype=np.uint64)
    index = np.full((room, 2), _ABSENT, dtype="<u8")  # offset and size of each
    index[: len(chunks)] = np.stack([sizes.cumsum() - sizes, sizes], axis=1)
    return b"".join([*chunks, _with_checksum(index.tobytes())])


def _with_checksum(data: bytes) -> bytes:
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


@functools.cache
def _compressor(layout: ArrayLayout) -> Codec | None:
    """numcodecs' codec of what a layout says to zarr; None where chunks are not compressed."""
    for codec in layout.chunk_metadata(0)["codecs"]:
        if codec["name"] in ("zstd", "blosc"):
            options = dict(codec["configuration"])
            if codec["name"] == "blosc":
                del options["typesize"]  # that of the chunk
                options["shuffle"] = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}[options["shuffle"]]
            return numcodecs.get_codec({"id": codec["name"], **options})
    return None
