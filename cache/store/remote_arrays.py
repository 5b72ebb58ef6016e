"""Arrays in an object store, as zarr reads them: nothing that is missing reads as zeros."""

import asyncio
from collections import OrderedDict
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import ObjectStore
from zarr.abc.store import ByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import ObjectStore as ZarrObjectStore
from zarr.storage import WrapperStore

from kdpipe.cache.store.client import Client
from kdpipe.cache.store.location import GoneError
from kdpipe.cache.store.remote_errors import is_beyond_end

# Kept in memory per process: the indices of shards, of which each is at most 8 KiB.
_INDEX_BYTES = 32 << 20


class RemoteArrays(WrapperStore[ZarrObjectStore[Any]]):
    """A store of zarr that reads and never writes.

    zarr takes for zeros what is missing, and asks for the index of a shard, its last bytes, on every read: here what is
    missing, or shorter than it was, is an error, and indices are kept.

    Args:
        client: of the object store.
    """

    def __init__(self, client: Client) -> None:
        super().__init__(ZarrObjectStore(client.store(), read_only=True))
        self._client = client
        self._indices: OrderedDict[tuple[str, int], Buffer] = OrderedDict()
        self._asked: dict[tuple[str, int], asyncio.Task[Buffer]] = {}
        self._bytes = 0

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer:
        """The bytes of a file.

        Raises:
            GoneError: it is missing, or ends before them.
        """
        if not isinstance(byte_range, SuffixByteRequest):
            return await self._fetch(key, prototype, byte_range)
        index = (key, byte_range.suffix)
        if index in self._indices:
            self._indices.move_to_end(index)
            return self._indices[index]
        if index not in self._asked:
            self._asked[index] = asyncio.create_task(self._fetch(key, prototype, byte_range))
        try:
            found = await self._asked[index]
        finally:
            self._asked.pop(index, None)
        self._keep(index, found)
        return found

    def _keep(self, index: tuple[str, int], found: Buffer) -> None:
        if index not in self._indices:
            self._indices[index] = found
            self._bytes += len(found)
        while self._bytes > _INDEX_BYTES:
            self._bytes -= len(self._indices.popitem(last=False)[1])

    async def _fetch(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer:
        async def get(store: ObjectStore) -> Buffer | None:
            return await ZarrObjectStore(store, read_only=True).get(key, prototype, byte_range)

        try:
            found = await self._client.ask(get)
        except BaseError as error:
            if is_beyond_end(error):
                raise GoneError(key) from None
            raise
        if not found:
            raise GoneError(key)
        return found
