"""From float tensors to stored bytes: int8 per channel, the chunk codecs, and the Zarr metadata that names them.

Chunks are encoded here one by one, so that a part is streamed to disk with the memory of one chunk per array and its
bytes depend on nothing but the values. What is written is plain Zarr v3: `bytes`, `blosc` (unless the codec is "none")
and `crc32c` within `sharding_indexed`; any Zarr library reads it. kdpipe reads it without one: straight from the file
into the array that is returned, and no byte without having checked the checksum of its chunk.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from awscrt import checksums
from numcodecs import blosc
from torch import Tensor

Block = npt.NDArray[Any]

INT8_MAX = 127
_COMPRESSORS = {"zstd": ("zstd", 1), "lz4": ("lz4", 5)}
# The encoded order of blocks within a blosc chunk depends on threads: one thread, so that equal values are equal bytes.
blosc.use_threads = False
_BLOSC_HEADER = 16
CHECKSUM_BYTES = 4
# Chunks of a shard begin at multiples of this: copied from the page cache to where another alignment of the cache line
# is wanted, uncompressed ones take half as long again.
CHUNK_ALIGNMENT = 64


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per channel: `values` is about `quantized * scale`, off by at most half a scale.

    Args:
        values: [..., C, H, W] float, any device; H and W are positive.

    Returns:
        [..., C, H, W] int8 within -127 .. 127, and [..., C] float32 scale = max|x| / 127. A channel of zeros has
        scale 0 and values 0. A channel that is not finite has a scale that is not finite.
    """
    values = values.detach().float()
    # Without a copy of the values, which is larger than all caches; abs: a zero has no sign.
    largest, smallest = values.amax(dim=(-2, -1)), values.amin(dim=(-2, -1))
    scale = torch.maximum(largest, -smallest).abs() / INT8_MAX
    steps = values / torch.where(scale > 0, scale, 1.0)[..., None, None]
    return steps.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float values of `quantize`'s result, on the device of `values`.

    Args:
        values: [..., C, H, W] int8.
        scale: [..., C] float32.
        dtype: of the result; the product is taken in float32.

    Returns:
        [..., C, H, W] of `dtype`.
    """
    return values.float().mul_(scale.to(values.device)[..., None, None]).to(dtype)


def crc32c(data: Any) -> bytes:
    """Checksum of bytes or of a contiguous array, as Zarr's crc32c codec appends it: 4 bytes, little endian."""
    return int(checksums.crc32c(data)).to_bytes(CHECKSUM_BYTES, "little")


def encode_chunk(block: Block, codec: str) -> bytes:
    """The stored bytes of one whole chunk, checksum included.

    Args:
        block: C-contiguous array of the chunk's shape.
        codec: "zstd", "lz4" or "none".
    """
    if codec == "none":
        data = block.astype(block.dtype.newbyteorder("<"), copy=False).tobytes()
    else:
        name, level = _COMPRESSORS[codec]
        data = bytes(blosc.Blosc(name, clevel=level, shuffle=blosc.Blosc.BITSHUFFLE).encode(block))
    return data + crc32c(data)


@dataclass(frozen=True)
class StoredChunk:
    """What `encode_chunk` gave, to be read from a file.

    Attributes:
        size: stored bytes, checksum included.
        checksum: where it is known from elsewhere, too.
        out: [N] uint8, where the decoded bytes go, of which there must be N exactly.
    """

    size: int
    checksum: bytes | None
    out: npt.NDArray[np.uint8]


def read_chunks(file: int, offset: int, chunks: Sequence[StoredChunk], codec: str) -> None:
    """Read chunks that lie one after the other, check them, and decode them.

    Args:
        file: descriptor.
        offset: of the first chunk in the file, bytes.
        chunks: at most 512.
        codec: "zstd", "lz4" or "none".

    Raises:
        ValueError: a chunk is damaged; what it goes to may hold anything.
    """
    stored = [chunk.out if codec == "none" else np.empty(chunk.size - CHECKSUM_BYTES, np.uint8) for chunk in chunks]
    # What follows each: its checksum, and what is left to the beginning of the next.
    tails = [bytearray(CHECKSUM_BYTES + chunk_gap(chunk.size)) for chunk in chunks[:-1]] + [bytearray(CHECKSUM_BYTES)]
    pairs = zip(stored, tails, strict=True)
    _read_into(file, [view for data, tail in pairs for view in (data.data, memoryview(tail))], offset)
    for chunk, data, tail in zip(chunks, stored, tails, strict=True):
        what, checksum = f"{chunk.size} bytes at {offset}", tail[:CHECKSUM_BYTES]
        offset += chunk.size + chunk_gap(chunk.size)
        if crc32c(data) != checksum or chunk.checksum not in (None, bytes(checksum)):
            raise ValueError(f"the checksum of the {what} does not fit")
        if codec == "none":
            continue
        try:
            decompress(data, chunk.out)
        except ValueError as error:
            raise ValueError(f"the {what} are not a chunk of this array ({error})") from error


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
    """Unused bytes of a shard between a chunk of this size, checksum included, and the next one."""
    return -size % CHUNK_ALIGNMENT


def stored_sizes(chunk_bytes: int, codec: str) -> range:
    """How many bytes a chunk may have in its file, checksum included."""
    if codec == "none":
        return range(chunk_bytes + CHECKSUM_BYTES, chunk_bytes + CHECKSUM_BYTES + 1)
    return range(_BLOSC_HEADER + CHECKSUM_BYTES, chunk_bytes + _BLOSC_HEADER + CHECKSUM_BYTES + 1)


def _read_into(file: int, views: list[memoryview], offset: int) -> None:
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
