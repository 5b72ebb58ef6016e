"""Zarr arrays by their layout: opened for writing and for reading, with nothing believed that a file says of itself."""

import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import torch
import zarr
from zarr import AsyncArray
from zarr.abc.store import Store
from zarr.core.array_spec import ArrayConfig
from zarr.core.buffer import Buffer
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import LocalStore, StorePath, WrapperStore

from kdpipe.cache.format.layout import ArrayLayout, is_as_written
from kdpipe.cache.format.record import Files

_OWN = {"codec_pipeline.path": "zarr.core.codec_pipeline.BatchedCodecPipeline"}
_RUST = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
_lock = threading.Lock()  # zarr takes the pipeline of an array from its global configuration
_rust_pid: int | None = None


class WrittenFiles(WrapperStore[LocalStore]):
    """A folder that notes size and sha256 of what zarr writes to it, so that no byte is read again for that."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalStore(folder))
        self.files: Files = {}

    async def set(self, key: str, value: Buffer) -> None:
        data = value.as_buffer_like()
        self.files[key] = (len(value), hashlib.sha256(data).hexdigest())
        await super().set(key, value)


def writable_array(store: Store, key: str, layout: ArrayLayout) -> "AsyncArray[Any]":
    """An array without rows, written through zarr's own pipeline: zarrs does not give equal bytes for equal values."""
    return _array(store, key, layout, 0, _OWN)


def readable_array(store: Store, key: str, layout: ArrayLayout, rows: int, is_local: bool) -> "AsyncArray[Any]":
    """An array of so many rows. Its `zarr.json` is not looked at: see `check_metadata`.

    Args:
        store: of the cache.
        key: of the array.
        layout: of the array.
        rows: number of rows.
        is_local: whether zarrs may read it: it does so in files, and not in a forked child of a process that did.
    """
    return _array(store, key, layout, rows, _RUST if is_local and _may_use_rust() else _OWN)


def check_metadata(data: bytes | None, layout: ArrayLayout, rows: int) -> str | None:
    """What is wrong with a `zarr.json`, to follow its name; None where it says what is written for that layout."""
    try:
        found = json.loads(data or b"")
    except (ValueError, RecursionError):
        return "is missing or no JSON"
    if not isinstance(found, dict) or not is_as_written(found, layout, rows):
        return f"does not describe an array of {rows} rows {layout.row_shape} {layout.dtype} as kdpipe writes it"
    return None


def _array(store: Store, key: str, layout: ArrayLayout, rows: int, pipeline: dict[str, Any]) -> "AsyncArray[Any]":
    metadata = ArrayV3Metadata.from_dict(layout.metadata(rows))
    threads = {"threading.max_workers": torch.get_num_threads()} if pipeline is _RUST else {}
    with _lock, zarr.config.set({**pipeline, **threads}):
        return AsyncArray(metadata, StorePath(store, key), ArrayConfig.from_dict({"write_empty_chunks": True}))


def _may_use_rust() -> bool:
    """Whether zarrs can run in this process: its threads do not survive a fork."""
    global _rust_pid
    import zarrs  # noqa: F401  # registers the pipeline; imported late, since it starts with torch's threads

    if _rust_pid is None:
        _rust_pid = os.getpid()
    elif _rust_pid != os.getpid():
        logging.getLogger("kdpipe").info(
            "Reading with zarr's own codecs, which are slower: this process was forked from one that had used zarrs. "
            "Start workers with forkserver or spawn."
        )
        return False
    return True
