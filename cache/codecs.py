"""From float tensors to stored bytes: int8 per channel, the chunk codecs, and the Zarr metadata that names them.

Chunks are encoded here one by one, so that a part is streamed to disk with the memory of one chunk per array and its
bytes depend on nothing but the values. What is written is plain Zarr v3: `bytes`, `blosc` (unless the codec is "none")
and `crc32c` within `sharding_indexed`; any Zarr library reads it. Reading is zarr-python's, with the zarrs pipeline.
"""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
import zarr
from numcodecs import blosc
from torch import Tensor
from zarr.storage import LocalStore, StorePath

Block = npt.NDArray[Any]

INT8_MAX = 127
_COMPRESSORS = {"zstd": ("zstd", 1), "lz4": ("lz4", 5)}
# The encoded order of blocks within a blosc chunk depends on threads: one thread, so that equal values are equal bytes.
blosc.use_threads = False

_zarrs_used_in: list[int] = []


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per channel: `values` is about `quantized * scale`, off by at most half a scale.

    Args:
        values: [..., C, H, W] float, any device; H and W are positive.

    Returns:
        [..., C, H, W] int8 within -127 .. 127, and [..., C] float32 scale = max|x| / 127. A channel of zeros has
        scale 0 and values 0. A channel that is not finite has a scale that is not finite.
    """
    values = values.detach().float()
    scale = values.abs().amax(dim=(-2, -1)) / INT8_MAX
    steps = values / torch.where(scale > 0, scale, 1.0)[..., None, None]
    return steps.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float values of `quantize`'s result, on the device of `values`.

    Args:
        values: [..., C, H, W] int8.
        scale: [..., C] float32.
        dtype: of the result; the product is taken in float32.

    Returns:
        [..., C, H, W] of `dtype`.
    """
    return (values.float() * scale.to(values.device)[..., None, None]).to(dtype)


def crc32c(data: bytes) -> bytes:
    """Checksum as Zarr's crc32c codec appends it: 4 bytes, little endian."""
    return int(google_crc32c.value(data)).to_bytes(4, "little")


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


def open_array(folder: Path) -> "zarr.Array[Any]":
    """Open an array for reading, with the zarrs pipeline where that is installed and safe.

    Not by `zarr.open_array`, whose round trips to an event loop take longer than reading a small file. A process forked
    from one that has used zarrs would hang in it: such a process reads by zarr's own pipeline.
    """
    if _zarrs_installed() and (not _zarrs_used_in or _zarrs_used_in[0] == os.getpid()):
        _zarrs_used_in[:] = [os.getpid()]
        pipeline = "zarrs.ZarrsCodecPipeline"
    else:
        pipeline = "zarr.core.codec_pipeline.BatchedCodecPipeline"
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        metadata = json.loads((folder / "zarr.json").read_bytes())
        return zarr.Array.from_dict(StorePath(LocalStore(folder, read_only=True)), metadata)


@cache
def _zarrs_installed() -> bool:
    if importlib.util.find_spec("zarrs") is None:
        return False
    importlib.import_module("zarrs")
    return True
