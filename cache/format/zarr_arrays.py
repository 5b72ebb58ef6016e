"""Zarr arrays by their layout: files that are written, and arrays to read, with nothing believed that a file says."""

import asyncio
import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore
import torch
from zarr import AsyncArray
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import LocalStore, StorePath, WrapperStore

from kdpipe.cache.format.layout import ArrayLayout, Block, is_as_written
from kdpipe.cache.format.record import Files
from kdpipe.cache.store.location import GoneError

_first_pid: int | None = None  # of the process that used tensorstore first, in this line of forks


class PendingRead(Protocol):
    """Rows that are being read."""

    def result(self) -> Block:
        """Wait for them.

        Raises:
            ValueError: what is stored is damaged, or cannot be read.
        """


class WrittenFiles(WrapperStore[Store]):
    """A store that notes size and sha256 of what is written to it, so that no byte is read again for that."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.files: Files = {}

    async def set(self, key: str, value: Buffer) -> None:
        self.files[key] = (len(value), hashlib.sha256(value.as_buffer_like()).hexdigest())
        await super().set(key, value)

    async def set_bytes(self, key: str, value: bytes) -> None:
        """Write a file."""
        await self.set(key, default_buffer_prototype().buffer.from_bytes(value))

    async def set_metadata(self, key: str, layout: ArrayLayout, rows: int) -> None:
        """Write the `zarr.json` of an array.

        Args:
            key: of the array.
            layout: of the array.
            rows: how many it has.
        """
        metadata = ArrayV3Metadata.from_dict(layout.metadata(rows))
        for name, value in metadata.to_buffer_dict(default_buffer_prototype()).items():
            await self.set(f"{key}/{name}", value)


class FileArray:
    """An array in a local folder, read by tensorstore.

    tensorstore checks the checksum of every chunk that it decodes, and so does zarr; zarrs does not where it reads a
    part of a shard. Its threads do not survive a fork: see `may_read_files`.

    Args:
        folder: of the array.
        layout: of the array; what its `zarr.json` says does not count.
        rows: number of rows.
    """

    def __init__(self, folder: Path, layout: ArrayLayout, rows: int) -> None:
        self._array = tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": os.path.abspath(folder)},  # noqa: PTH100  # keeps links
                "metadata": layout.metadata(rows),
                "fill_missing_data_reads": False,
                "recheck_cached_data": False,
            },
            open=True,
            assume_metadata=True,
            context=reading_context(torch.get_num_threads()),
        ).result()

    def start(self, rows: range) -> PendingRead:
        """Begin to read rows."""
        reading: PendingRead = self._array[rows.start : rows.stop].read()
        return reading


class StoreArray:
    """An array in a local folder, read by zarr where tensorstore cannot be used.

    Args:
        folder: of the array.
        layout: of the array; what its `zarr.json` says does not count.
        rows: number of rows.
    """

    def __init__(self, folder: Path, layout: ArrayLayout, rows: int) -> None:
        self._array = _zarr_array(_LocalArrays(folder, read_only=True), "", layout, rows)
        self._chunk = layout.chunk_rows

    def start(self, rows: range) -> PendingRead:
        """Begin to read rows."""
        reading: PendingRead = asyncio.run_coroutine_threadsafe(self._read(rows), event_loop())
        return reading

    async def _read(self, rows: range) -> Any:
        """All chunks at once: zarr would ask for those of one shard one after the other."""
        starts = [*range(rows.start - rows.start % self._chunk, max(rows.stop, rows.start + 1), self._chunk)]
        pieces = [slice(max(start, rows.start), min(start + self._chunk, rows.stop)) for start in starts]
        blocks = await asyncio.gather(*(self._array.getitem(piece) for piece in pieces))
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


class _LocalArrays(LocalStore):
    """A store of zarr, which takes for zeros what is missing: here it is an error."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer:
        """The bytes of a file.

        Raises:
            GoneError: it is missing or empty.
        """
        content = await super().get(key, prototype, byte_range)
        if not content:
            raise GoneError(key)
        return content


def check_metadata(data: bytes | None, layout: ArrayLayout, rows: int) -> str | None:
    """What is wrong with a `zarr.json`, to follow its name; None where it says what is written for that layout.

    Args:
        data: content of the file; None where it is missing.
        layout: of the array.
        rows: how many it has.
    """
    try:
        metadata = json.loads(data or b"", object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return "is missing or no JSON"
    if not isinstance(metadata, dict) or not is_as_written(metadata, layout, rows):
        return f"does not describe {rows} rows of {layout.row_shape} {layout.dtype} as kdpipe writes them"
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON mapping; one that says something twice is read in two ways."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("an entry is given twice")
    return mapping


def may_read_files() -> bool:
    """Whether tensorstore can run in this process; otherwise it was forked from one that had used it."""
    global _first_pid
    if _first_pid is None:
        _first_pid = os.getpid()
    elif _first_pid != os.getpid():
        logging.getLogger("kdpipe").info(
            "Reading with zarr's own codecs, which are slower: this process was forked from one that had read a cache. "
            "Start workers with forkserver or spawn."
        )
        return False
    return True


def _zarr_array(store: Store, key: str, layout: ArrayLayout, rows: int) -> "AsyncArray[Any]":
    metadata = ArrayV3Metadata.from_dict(layout.metadata(rows))
    return AsyncArray(metadata, StorePath(store, key))


_contexts: dict[int, tensorstore.Context] = {}
_loops: dict[int, asyncio.AbstractEventLoop] = {}
_lock = threading.Lock()


def reading_context(threads: int) -> tensorstore.Context:
    """So many threads for all arrays together; decoded chunks are not kept."""
    with _lock:
        if threads not in _contexts:
            limits = {name: {"limit": threads} for name in ("data_copy_concurrency", "file_io_concurrency")}
            _contexts[threads] = tensorstore.Context({**limits, "cache_pool": {"total_bytes_limit": 0}})
        return _contexts[threads]


def event_loop() -> asyncio.AbstractEventLoop:
    """A loop of this process that runs in a thread of its own."""
    with _lock:
        if os.getpid() not in _loops:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="kdpipe-read", daemon=True).start()
        return _loops[os.getpid()]
