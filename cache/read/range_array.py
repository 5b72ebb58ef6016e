"""Reads rows of an array in an object store by ranges of its files."""

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorstore
import torch

from kdpipe.cache.format.layout import ArrayLayout, Block
from kdpipe.cache.format.zarr_arrays import PendingRead, event_loop, reading_context
from kdpipe.cache.store.location import Location

# Chunks that lie one behind the other are asked for together, up to so many bytes.
_REQUEST_BYTES = 2 << 20


class RangeArray:
    """An array of which ranges are fetched, all at once, and decoded in memory by tensorstore, which checks them.

    zarr reads object stores, too; it takes four times the processor's time for a training sample, since it asks for
    each chunk by itself and for the index of a shard on every read, and it reads zeros where an answer is empty.

    Args:
        location: of the cache.
        key: of the array.
        layout: of the array; what its `zarr.json` says does not count.
        rows: number of rows.
        sizes: bytes of its files, by name.
    """

    def __init__(self, location: Location, key: str, layout: ArrayLayout, rows: int, sizes: Mapping[str, int]) -> None:
        self._location, self._key, self._layout, self._sizes = location, key, layout, sizes
        self._rows, self._names = rows, list(layout.files(rows))
        self._chunks = layout.shard(rows) // layout.chunk_rows  # per shard
        self._indices: dict[int, asyncio.Task[Block]] = {}

    def start(self, rows: range) -> PendingRead:
        """Begin to read rows."""
        reading: PendingRead = asyncio.run_coroutine_threadsafe(self._read(rows), event_loop())
        return reading

    async def _read(self, rows: range) -> Block:
        if not rows:
            return np.empty((0, *self._layout.row_shape), self._layout.dtype)
        first, last = rows.start // self._layout.chunk_rows, (rows.stop - 1) // self._layout.chunk_rows
        shards = range(first // self._chunks, last // self._chunks + 1)
        parts = await asyncio.gather(*(self._fetch_chunks(shard, range(first, last + 1)) for shard in shards))
        chunks = {number: data for part in parts for number, data in part.items()}
        array = _in_memory(self._layout.chunk_metadata(self._rows), chunks)
        return np.asarray(await array[rows.start : rows.stop].read())

    async def _fetch_chunks(self, shard: int, chunks: range) -> dict[int, bytes]:
        """The encoded chunks of a shard among those wanted, by number."""
        start = shard * self._chunks
        numbers = range(max(chunks.start, start), min(chunks.stop, start + self._chunks))
        index = await self._index(shard)
        spans = [(number, int(index[number - start, 0]), int(index[number - start, 1])) for number in numbers]
        groups: list[list[tuple[int, int, int]]] = []
        for span in sorted(spans, key=lambda span: span[1]):
            ahead = groups[-1] if groups else []
            if ahead and ahead[-1][1] + ahead[-1][2] == span[1] and span[1] + span[2] - ahead[0][1] <= _REQUEST_BYTES:
                ahead.append(span)
            else:
                groups.append([span])
        fetched = await asyncio.gather(
            *(self._fetch(shard, group[0][1], group[-1][1] + group[-1][2]) for group in groups)
        )
        return {
            number: data[offset - group[0][1] : offset - group[0][1] + size]
            for group, data in zip(groups, fetched, strict=True)
            for number, offset, size in group
        }

    async def _index(self, shard: int) -> Block:
        """Offset and size of each chunk of a shard, uint64; fetched once."""
        if shard not in self._indices:
            self._indices[shard] = asyncio.create_task(self._fetch_index(shard))
        try:
            return await self._indices[shard]
        except BaseException:
            self._indices.pop(shard, None)
            raise

    async def _fetch_index(self, shard: int) -> Block:
        metadata, size = self._layout.index_metadata(self._rows)
        end = self._sizes[self._names[shard]]
        data = await self._fetch(shard, end - size, end)
        return np.asarray(await _in_memory(metadata, {0: data}).read())

    async def _fetch(self, shard: int, start: int, stop: int) -> bytes:
        if not 0 <= start < stop <= self._sizes[self._names[shard]]:
            raise ValueError(f"{self._names[shard]} names bytes {start} to {stop}, which it does not have")
        return await self._location.fetch(f"{self._key}/{self._names[shard]}", start, stop)


def _in_memory(metadata: dict[str, Any], chunks: Mapping[int, bytes]) -> Any:
    """An array of tensorstore with some of its encoded chunks, numbered along the first axis."""
    memory = tensorstore.Context({"memory_key_value_store": {}}, parent=reading_context(torch.get_num_threads()))
    array: Any = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "memory"},
            "metadata": metadata,
            "fill_missing_data_reads": False,
        },
        open=True,
        assume_metadata=True,
        context=memory,
    ).result()
    zeros = ["0"] * (len(metadata["shape"]) - 1)
    for number, data in chunks.items():
        array.kvstore.write(".".join(["c", str(number), *zeros]), data).result()
    return array
