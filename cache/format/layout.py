"""Which arrays a part has, and how each lies in its files: shapes, types, chunks, shards and codecs. Zarr v3 only."""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from zarr.abc.codec import ArrayBytesCodec, BytesBytesCodec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from kdpipe.cache.plan import level_shapes
from kdpipe.cache.spec import CacheSpec

Block = npt.NDArray[Any]

# Elements per chunk of features: at most and at least, and so many chunks per image in between.
_MOST_ELEMENTS, _FEWEST_ELEMENTS, _CHUNKS_PER_IMAGE = 1 << 20, 1 << 14, 8
# Raw bytes per chunk of the other arrays: rows of an image are read together.
_CHUNK_BYTES = 128 << 10
# A shard is written at once, from memory.
_SHARD_BYTES, _SHARD_CHUNKS = 64 << 20, 512
_LEVELS: dict[Literal["zstd", "lz4"], int] = {"zstd": 1, "lz4": 5}
# Types whose bits zstd compresses as well without a shuffle, and decodes twice as fast.
_AS_THEY_ARE = ("int8", "float16", "float32")


# What the arrays of a part have rows for.
PER = ("view", "box", "object", "element", "byte")


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a cache.

    Attributes:
        per: what it has a row for: "view" (an image in a view), "box", "object" (a box with RoI features), "element"
            (a stored number of `features`), "byte" (of the file names); "" for arrays outside of parts.
        row_shape: shape of one row.
        dtype: numpy's name of its type.
        chunk_rows: rows per chunk.
        shard_rows: rows per shard, a multiple of `chunk_rows`; each shard is one file.
        codec: "zstd", "lz4" or "none".
    """

    per: str
    row_shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    shard_rows: int
    codec: str

    def shard(self, rows: int) -> int:
        """Rows per shard of an array of so many rows: one that fits into a shard has a smaller one."""
        return min(self.shard_rows, max(1, -(-rows // self.chunk_rows)) * self.chunk_rows)

    def metadata(self, rows: int) -> dict[str, Any]:
        """The array's `zarr.json` as JSON values, for so many rows."""
        return _metadata((rows, *self.row_shape), self.dtype, self.shard(rows), [self._sharding()])

    def chunk_metadata(self, rows: int) -> dict[str, Any]:
        """As `metadata`, of an array in which each chunk of a shard lies by itself."""
        codecs = self._sharding()["configuration"]["codecs"]
        return _metadata((rows, *self.row_shape), self.dtype, self.chunk_rows, codecs)

    def index_metadata(self, rows: int) -> tuple[dict[str, Any], int]:
        """As `metadata`, of the index at the end of a shard (offset and size of each chunk); and its bytes."""
        chunks = self.shard(rows) // self.chunk_rows
        metadata = _metadata((chunks, 2), "uint64", chunks, self._sharding()["configuration"]["index_codecs"])
        return metadata, 16 * chunks + 4

    def num_files(self, rows: int) -> int:
        """How many files `files` would give; a number that was not checked may be too many to list."""
        return len(self._starts(rows))

    def files(self, rows: int) -> dict[str, range]:
        """The rows in each of its files, by name, of an array of so many rows."""
        return {
            self.file(number): range(start, min(start + self.shard(rows), rows))
            for number, start in enumerate(self._starts(rows))
        }

    def file(self, shard: int) -> str:
        """The name of the file of a shard, by its number."""
        return ".".join(["c", str(shard), *["0"] * len(self.row_shape)])

    def _starts(self, rows: int) -> range:
        return range(0, rows, self.shard(rows))

    def _sharding(self) -> dict[str, Any]:
        return _sharding((self.chunk_rows, *self.row_shape), self.dtype, self.codec)


def _metadata(shape: tuple[int, ...], dtype: str, chunk_rows: int, codecs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": dtype != "bool" and 0,
        "codecs": codecs,
    }


@functools.cache
def _sharding(chunk: tuple[int, ...], dtype: str, codec: str) -> dict[str, Any]:
    """The codec of an array, as JSON values."""
    itemsize = np.dtype(dtype).itemsize
    inner: list[ArrayBytesCodec | BytesBytesCodec] = [BytesCodec(endian="little" if itemsize > 1 else None)]
    if codec == "zstd" and dtype in _AS_THEY_ARE:
        inner.append(ZstdCodec(level=_LEVELS["zstd"]))
    elif codec != "none":
        name: Literal["zstd", "lz4"] = "zstd" if codec == "zstd" else "lz4"
        inner.append(BloscCodec(cname=name, clevel=_LEVELS[name], shuffle="bitshuffle", typesize=itemsize, blocksize=0))
    inner.append(Crc32cCodec())
    index: list[ArrayBytesCodec | BytesBytesCodec] = [BytesCodec(endian="little"), Crc32cCodec()]
    sharding = ShardingCodec(chunk_shape=chunk, codecs=inner, index_codecs=index, index_location="end")
    values: dict[str, Any] = json.loads(json.dumps(sharding.to_dict()))
    return values


def array_layout(per: str, row_shape: tuple[int, ...], dtype: str, codec: str, chunk_rows: int = 0) -> ArrayLayout:
    """The layout of an array; chunks have a power of two of rows of about 128 KiB unless their size is given.

    Args:
        per: what the array has a row for: one of `PER`, or empty.
        row_shape: of one row.
        dtype: by numpy's name.
        codec: one of `CODECS`.
        chunk_rows: rows per chunk; 0 chooses.
    """
    row = max(1, math.prod(row_shape) * np.dtype(dtype).itemsize)
    chunk_rows = chunk_rows or 1 << min(10, max(0, (_CHUNK_BYTES // row).bit_length() - 1))
    chunks = max(1, min(_SHARD_CHUNKS, _SHARD_BYTES // (chunk_rows * row)))
    return ArrayLayout(per, row_shape, dtype, chunk_rows, chunk_rows * chunks, codec)


def part_layout(spec: CacheSpec) -> dict[str, ArrayLayout]:
    """The arrays of a part, by name."""
    layout: dict[str, ArrayLayout] = {}
    if "features" in spec.fields:
        layout["features"] = array_layout("element", (), spec.element_dtype, spec.codec, _feature_chunk(spec))
        if spec.is_quantized:
            layout["scale"] = array_layout("view", (len(spec.strides), spec.channels), "float32", spec.codec)
    for per, arrays in (("box", spec.box_arrays()), ("object", spec.object_arrays())):
        layout |= {name: array_layout(per, shape, dtype, spec.codec) for name, (shape, dtype) in arrays.items()}
    layout["index"] = array_layout("view", (len(index_columns(spec)),), "int64", spec.codec)
    layout["file_names"] = array_layout("byte", (), "uint8", spec.codec, 1 << 16)
    return layout


def index_columns(spec: CacheSpec) -> list[str]:
    """Names of the columns of a part's index: one row per image and view, int64."""
    columns = ["image_id", "view", "height", "width", "input_height", "input_width"]
    columns += ["num_proposals", "num_jittered"]
    columns += ["box_start", "box_stop", "object_start", "object_stop", "element_start"]
    columns += ["name_start", "name_stop", "file_digest"]
    for level in range(len(spec.strides) if "features" in spec.fields else 0):
        columns += [f"level{level}_height", f"level{level}_width"]
    return columns


def is_as_written(metadata: Mapping[str, Any], layout: ArrayLayout, rows: int) -> bool:
    """Whether a `zarr.json` says what kdpipe writes for a layout; nothing in it is trusted, or run, before that.

    What zarr adds where it is empty, and names of dimensions, do not count.

    Args:
        metadata: the content of a `zarr.json`.
        layout: of the array.
        rows: how many it has.
    """
    ignored = ("attributes", "dimension_names", "storage_transformers")
    entries = {name: value for name, value in metadata.items() if name not in ignored}
    return entries == layout.metadata(rows) and not metadata.get("storage_transformers")


def _feature_chunk(spec: CacheSpec) -> int:
    """Elements per chunk of features, a power of two. Images are read one by one: small ones want small chunks."""
    cells = sum(height * width for height, width in level_shapes(spec.scale, spec.strides))
    share = max(1, spec.channels * cells // _CHUNKS_PER_IMAGE)
    return min(_MOST_ELEMENTS, max(_FEWEST_ELEMENTS, 1 << (share.bit_length() - 1)))
