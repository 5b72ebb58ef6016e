"""From float tensors to stored bytes: int8 per channel, the chunk codecs, and the Zarr metadata that names them.

Chunks are encoded here one by one, so that a part is streamed to disk with the memory of one chunk per array and its
bytes depend on nothing but the values. What is written is plain Zarr v3: `bytes`, then `blosc` and `crc32c` unless the
codec is "none", within `sharding_indexed`; any Zarr library reads it. kdpipe reads it without one, and no byte without
having checked the checksum of its chunk.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from awscrt import checksums
from numcodecs import blosc

Block = npt.NDArray[Any]

_COMPRESSORS = {"zstd": ("zstd", 1), "lz4": ("lz4", 5)}
# The encoded order of blocks within a blosc chunk depends on threads: one thread, so that equal values are equal bytes.
blosc.use_threads = False
_BLOSC_HEADER = 16
CHECKSUM_BYTES = 4
# Chunks of a shard begin at multiples of this: copied from the page cache to where another alignment of the cache line
# is wanted, uncompressed ones take half as long again.
CHUNK_ALIGNMENT = 64


def crc32c(data: Any) -> bytes:
    """Checksum of bytes or of a contiguous array, as Zarr's crc32c codec appends it: 4 bytes, little endian."""
    return int(checksums.crc32c(data)).to_bytes(CHECKSUM_BYTES, "little")


def encode_chunk(block: Block, codec: str) -> tuple[bytes, bytes]:
    """The stored bytes of one whole chunk, and their checksum.

    Args:
        block: C-contiguous array of the chunk's shape.
        codec: "zstd", "lz4" or "none".
    """
    if codec == "none":
        data = block.astype(block.dtype.newbyteorder("<"), copy=False).tobytes()
    else:
        name, level = _COMPRESSORS[codec]
        data = bytes(blosc.Blosc(name, clevel=level, shuffle=blosc.Blosc.BITSHUFFLE).encode(block))
    return data, crc32c(data)


def decompress(data: Any, out: Block) -> None:
    """Decode what blosc made of a chunk.

    Args:
        data: bytes or a contiguous array of them, without the checksum.
        out: of as many bytes as the chunk had.

    Raises:
        ValueError: `data` is something else; `out` may hold anything.
    """
    if int.from_bytes(bytes(data[4:8]), "little") != out.nbytes:  # of blosc's header
        raise ValueError("it has another size")
    try:
        blosc.decompress(data, out)
    except RuntimeError as error:
        raise ValueError(f"it cannot be decompressed: {error}") from error


def chunk_gap(size: int) -> int:
    """Unused bytes of a shard between a chunk that takes so many and the next one."""
    return -size % CHUNK_ALIGNMENT


def checksum_follows(codec: str, sharded: bool) -> bool:
    """Whether the checksum of a chunk lies behind it, as Zarr's crc32c codec puts it.

    Uncompressed chunks of a shard have theirs in the metadata of the array only: they lie one after the other as the
    values do, and any number of them is read in one piece.
    """
    return codec != "none" or not sharded


def stored_sizes(chunk_bytes: int, codec: str, sharded: bool) -> range:
    """How many bytes a chunk may have in its file, with the checksum behind it."""
    after = CHECKSUM_BYTES * checksum_follows(codec, sharded)
    if codec == "none":
        return range(chunk_bytes + after, chunk_bytes + after + 1)
    return range(_BLOSC_HEADER + after, chunk_bytes + _BLOSC_HEADER + after + 1)


def array_metadata(
    shape: Sequence[int],
    dtype: str,
    chunk: Sequence[int],
    shard: Sequence[int] | None,
    codec: str,
    attributes: Mapping[str, Any] | None = None,
) -> bytes:
    """`zarr.json` of an array.

    Args:
        shape: of the array.
        dtype: numpy's name of its type.
        chunk: shape of a chunk, as given to `encode_chunk`.
        shard: shape of a shard, a multiple of `chunk`; None stores each chunk in a file of its own.
        codec: "zstd", "lz4" or "none".
        attributes: user attributes of the array.
    """
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    itemsize = np.dtype(dtype).itemsize
    codecs: list[dict[str, Any]] = [{"name": "bytes"} if itemsize == 1 else little]
    if codec != "none":
        name, level = _COMPRESSORS[codec]
        options = {"cname": name, "clevel": level, "shuffle": "bitshuffle", "typesize": itemsize, "blocksize": 0}
        codecs.append({"name": "blosc", "configuration": options})
    if checksum_follows(codec, shard is not None):
        codecs.append({"name": "crc32c"})
    if shard is not None:
        sharding = {
            "chunk_shape": list(chunk),
            "codecs": codecs,
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return node_json(
        {
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard or chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": dtype != "bool" and 0,
            "codecs": codecs,
            "attributes": dict(attributes or {}),
        }
    )


def group_metadata(attributes: Mapping[str, Any] | None = None) -> bytes:
    """`zarr.json` of a group."""
    return node_json({"node_type": "group", "attributes": dict(attributes or {})})


def node_json(values: Mapping[str, Any]) -> bytes:
    """A `zarr.json`: the same bytes for the same values."""
    text = json.dumps(
        {"zarr_format": 3, **values}, separators=(",", ":"), sort_keys=True, ensure_ascii=True, allow_nan=False
    )
    return text.encode() + b"\n"
