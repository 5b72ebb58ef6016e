"""The client of an object store: its address and options, its requests repeated while the store is busy or away."""

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import BaseError, UnknownConfigurationKeyError
from obstore.store import AzureStore, GCSStore, MemoryStore, ObjectStore, S3Store
from zarr.core.sync import sync

from kdpipe.cache.errors import CacheError
from kdpipe.cache.store.aws_profile import complete_options
from kdpipe.cache.store.remote_errors import is_temporary, reason

T = TypeVar("T")

_STORES: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
# Seconds for which a request is repeated: until the store has answered for the first time, and afterwards. A wrong
# address is told soon, and a long run survives that its store is away for a while.
_FIRST_PATIENCE, _PATIENCE = 8.0, 300.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
_TOLD_EVERY = 30.0
# Seconds that a request may take, its body included; files of up to 64 MiB go up in one.
_TIMEOUT, _UPLOAD_TIMEOUT = 30, 900
_memory: dict[str, MemoryStore] = {}
_pid: int | None = None
_lock = threading.Lock()


class Client:
    """Where a URL leads, and how to ask there. It can be pickled; nothing is opened before the first request.

    Args:
        url: `s3://bucket/path`, `gs://bucket/path`, `az://container/path` or `memory://name`.
        options: of obstore's store of that kind, and `patience`, the seconds for which requests are repeated.

    Attributes:
        name: the URL.
        prefix: path in the bucket.

    Raises:
        CacheError: the URL is of no kind that is known, or an option is not.
    """

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        self.name = check_url(url)
        self._scheme, _, place = self.name.partition("://")
        self._bucket, _, self.prefix = place.partition("/")
        self._options = dict(options)
        try:
            self._patience = float(self._options.pop("patience", _PATIENCE))
        except ValueError:
            raise CacheError("--store-option patience is a number of seconds.") from None
        self._was_reached = False
        self._stores: dict[int, ObjectStore] = {}
        self._last_told = 0.0
        self.open()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stores": {}}

    def open(self, prefix: str | None = None, timeout: int = _TIMEOUT) -> ObjectStore:
        """The store of obstore.

        Args:
            prefix: before all keys; the path of the URL unless given.
            timeout: seconds that a request may take.
        """
        if self._scheme == "memory":
            return _memory.setdefault(self.name, MemoryStore())
        options, more = dict(self._options), {}
        if self._scheme == "s3":
            options, provider = complete_options(options)
            more = {} if provider is None else {"credential_provider": provider}
        if (endpoint := _endpoint(options)) and not endpoint.startswith(("http://", "https://")):
            raise CacheError(f"The endpoint for {self.name} is no http:// or https:// address: correct it.")
        if endpoint.startswith("http://"):  # asked for by the user, as for MinIO and SeaweedFS in a local network
            options = {"allow_http": "true", **options}
        try:
            store: ObjectStore = _STORES[self._scheme](
                self._bucket,
                prefix=(self.prefix if prefix is None else prefix) or None,
                config={"timeout": f"{timeout}s", **options},
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout)},
                **more,
            )
            return store
        except UnknownConfigurationKeyError as error:
            unknown = "".join(str(error).split("'")[1:2])
            raise CacheError(
                f"{_STORES[self._scheme].__name__} has no option {unknown}. Among those of obstore's documentation are "
                "endpoint, region and skip_signature."
            ) from None
        except (BaseError, ValueError) as error:
            raise CacheError(
                f"The options of {self.name} do not fit: {reason(error)}. Correct --store-option."
            ) from None

    def run(self, request: Callable[[ObjectStore], Awaitable[T]]) -> T:
        """The answer to a request, from any thread but that of the event loop."""
        return sync(self.ask(request))

    async def ask(self, request: Callable[[ObjectStore], Awaitable[T]], timeout: int = _TIMEOUT) -> T:
        """The answer to a request, which is repeated while the store is busy or cannot be reached.

        Raises:
            BaseError: the store refuses, or did not answer for as long as the patience lasts.
            FileNotFoundError: there is no such object, or no such bucket.
        """
        start, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                result = await request(self.store(timeout))
                self._was_reached = True
                return result
            except BaseError as error:
                waited = time.monotonic() - start
                patience = self._patience if self._was_reached else min(self._patience, _FIRST_PATIENCE)
                if not is_temporary(error) or waited + pause > patience:
                    raise
                self._tell(error, patience)
            except FileNotFoundError:
                self._was_reached = True
                raise
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def upload(self, request: Callable[[ObjectStore], Awaitable[T]]) -> T:
        """As `ask`, with time for a large body."""
        return await self.ask(request, _UPLOAD_TIMEOUT)

    def store(self, timeout: int = _TIMEOUT) -> ObjectStore:
        """The store of obstore in this process.

        Raises:
            CacheError: the process was forked from one that had used an object store.
        """
        global _pid
        with _lock:
            _pid = _pid or os.getpid()
            if _pid != os.getpid():
                raise CacheError(
                    f"{self.name} cannot be read here: this process was forked from one that had used an object store, "
                    "whose threads it lacks. Start workers with forkserver or spawn."
                )
            if timeout not in self._stores:
                self._stores[timeout] = self.open(timeout=timeout)
            return self._stores[timeout]

    def _tell(self, error: BaseError, patience: float) -> None:
        now = time.monotonic()
        if now - self._last_told > _TOLD_EVERY:
            self._last_told = now
            logging.getLogger("kdpipe").warning(
                f"{self.name}: {reason(error)}. Trying again for up to {patience:.0f} s."
            )


def check_url(url: str) -> str:
    """A URL as it is shown and recorded.

    Raises:
        CacheError: it is of no kind that is known, or holds credentials.
    """
    parts = urlsplit(url)
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
    if parts.scheme not in (*_STORES, "memory"):
        raise CacheError(f"{address} is neither a path nor s3://bucket/path, gs://bucket/path or az://container/path.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise CacheError(
            f"The address of {address} holds more than a bucket and a path. Credentials go into environment variables "
            "or configuration files, options into --store-option KEY=VALUE."
        )
    if not parts.netloc or "//" in parts.path.rstrip("/"):
        raise CacheError(f"{address} has an empty name in it: expected {parts.scheme}://bucket/path.")
    return address


def _endpoint(options: Mapping[str, str]) -> str:
    endpoint = next((value for name, value in options.items() if "endpoint" in name.lower()), "")
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
    return endpoint or next((os.environ[name] for name in names if os.environ.get(name)), "")
