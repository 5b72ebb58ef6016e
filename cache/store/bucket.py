"""A cache in an object store: S3, Google Cloud Storage, Azure, and what speaks S3 (MinIO, SeaweedFS, ...)."""

import asyncio
import contextlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore

from kdpipe.cache.errors import CacheError
from kdpipe.cache.store.client import Client
from kdpipe.cache.store.location import FOREIGN, RECORD, GoneError, Leftover, Location
from kdpipe.cache.store.remote_errors import advice, is_beyond_end, is_no_bucket
from kdpipe.cache.store.temporary import remove_dead, temporary_folder

if TYPE_CHECKING:
    from obstore import ObjectMeta

_BLOCK = 8 << 20
_UPLOADS = 4  # files of up to 64 MiB, held in memory
# Folders of files, which kdpipe names by their digest. Their writer may still be at work on those of today.
_FILES_FOLDER = re.compile(r"(parts/\d{5,}|head|plan)/[0-9a-f]{16}")
_MIN_AGE = timedelta(days=1)


class Bucket(Location):
    """A cache in an object store.

    What is being made lies in a local temporary folder. Its files are uploaded first; nobody looks at them before the
    record is there, which is put last and only where there is none. So of two that write the same part the second is
    told. Files of parts that were never finished stay until they are a day old and `leftovers` are removed.

    Args:
        url: `s3://bucket/path`, `gs://bucket/path`, `az://container/path`.
        options: of the store, such as {"endpoint": "http://127.0.0.1:9000", "region": "eu-west-1"}.

    Raises:
        CacheError: the URL is of no kind that is known, or an option is not.
    """

    threads = 32

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        self._client = Client(url, options)
        self.name = self.address = self._client.name

    def check_new(self) -> bool:
        parents = PurePosixPath(self._client.prefix).parents if self._client.prefix else ()
        for parent in map(str, parents):
            place = "" if parent == "." else parent
            if not self.name.startswith("memory:") and self._get(RECORD, self._client.open(place)) is not None:
                raise CacheError(f"{self} lies in a cache at /{place} of its bucket: choose another --out.")
        return self.is_absent()

    def is_absent(self) -> bool:
        """Also where another process is about to make a cache, or died of it: its files are there before the record."""
        return self.read(RECORD) is None and all(_FILES_FOLDER.match(meta["path"]) for meta in self._list(""))

    def size(self, key: str) -> int:
        return sum(meta["size"] for meta in self._list(key))

    def local_path(self, key: str) -> None:
        return None

    def read(self, key: str) -> bytes | None:
        return self._get(key)

    def stream(self, key: str) -> Iterator[bytes]:
        data, size = self._range(key, 0)
        start = len(data)
        while data:
            yield data
            data = self._range(key, start)[0] if start < size else b""
            start += len(data)

    def sizes(self, key: str, names: Collection[str]) -> dict[str, int]:
        start = len(key) + 1 if key else 0
        listed = {meta["path"][start:]: meta["size"] for meta in self._list(key)}
        return {name: listed[name] for name in names if name in listed}

    async def fetch(self, key: str, start: int, stop: int) -> bytes:
        async def get(store: ObjectStore) -> bytes:
            return bytes(await obstore.get_range_async(store, key, start=start, end=stop))

        with _missing_is_gone(key):
            data = await self._client.ask(get)
            if len(data) < stop - start:
                raise GoneError(key)
            return data

    @contextlib.contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        with temporary_folder(_scratch() / (key.replace("/", "-") or "cache")) as folder:
            (folder / "new").mkdir()
            yield folder / "new"

    def publish(self, folder: Path, key: str) -> bool:
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / RECORD)
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        record, place = (folder / RECORD).read_bytes(), _join(key, RECORD)
        self._upload(key, files)
        try:
            self._client.run(lambda store: obstore.put_async(store, place, record, mode="create"))
        except AlreadyExistsError:
            return False
        # what another process took for the leftovers of a dead writer of this part, and removed meanwhile
        stored = self.sizes(key, files)
        self._upload(key, {name: path for name, path in files.items() if name not in stored})
        return True

    def discard(self, key: str) -> None:
        """Remove a record, and of what is below it that which no writer can be at work on: what is a day old."""
        self._delete([_join(key, RECORD)])
        limit = datetime.now(UTC) - _MIN_AGE
        below = self._list(key)
        self._delete([meta["path"] for meta in below if meta["last_modified"] < limit])
        if key and not below:
            self._delete([key])

    def tidy(self) -> None:
        """Remove what dead writers left in the local temporary folder; in the store itself nothing is certain."""
        remove_dead(_scratch())

    def leftovers(self, known_keys: Collection[str]) -> list[Leftover]:
        whole = tuple(name for name in known_keys if name.endswith("/"))
        parents = {str(parent) for name in known_keys for parent in PurePosixPath(name).parents}
        newest: dict[str, datetime] = {}
        for meta in self._list(""):
            path = meta["path"]
            if path in known_keys or path in parents or path.startswith(whole):
                continue
            above = [str(parent) for parent in reversed(PurePosixPath(path).parents)]
            key = next((place for place in above if place not in parents and place != "."), path)
            match = _FILES_FOLDER.match(path)
            key = match[0] if match and len(match[0]) > len(key) else key
            newest[key] = max(newest.get(key, meta["last_modified"]), meta["last_modified"])
        leftovers = []
        for key, time in sorted(newest.items()):
            if not _FILES_FOLDER.fullmatch(key):
                leftovers.append(Leftover(key, FOREIGN, False, True))
            elif datetime.now(UTC) - time > _MIN_AGE:
                leftovers.append(Leftover(key, "belongs to no record, and nothing was added for a day", True, True))
            else:
                state = "is being written, or was left behind less than a day ago"
                leftovers.append(Leftover(key, state, False, False))
        return leftovers

    @contextlib.contextmanager
    def explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except GoneError as error:
            raise CacheError(f"{action} failed: {error} in {self}.") from error
        except BaseError as error:
            raise CacheError(f"{action} failed. {advice(error, self.name)}.") from None
        except FileNotFoundError as error:
            if not is_no_bucket(error):
                raise
            raise CacheError(f"{action} failed. {advice(error, self.name)}.") from None
        except OSError as error:
            raise CacheError(
                f"{action} failed: {error.strerror or error} ({error.filename or _scratch()}). Parts are made in that "
                "local folder before they are uploaded: set TMPDIR to a disk with more space, and run the same command "
                "again."
            ) from error

    def free_bytes(self) -> None:
        return None

    def _get(self, key: str, store: ObjectStore | None = None) -> bytes | None:
        async def get(own_store: ObjectStore) -> bytes:
            return bytes(await (await obstore.get_async(store or own_store, key)).bytes_async())

        try:
            return self._client.run(get)
        except FileNotFoundError as error:
            if is_no_bucket(error):
                raise
            return None

    def _range(self, key: str, start: int) -> tuple[bytes, int]:
        """A block of a file, and the size of the whole file."""

        async def get(store: ObjectStore) -> tuple[bytes, int]:
            response = await obstore.get_async(store, key, options={"range": (start, start + _BLOCK)})
            return bytes(await response.bytes_async()), response.meta["size"]

        with _missing_is_gone(key):
            try:
                return self._client.run(get)
            except BaseError as error:
                if start or not is_beyond_end(error):
                    raise
                return b"", 0  # it is empty

    def _upload(self, key: str, files: Mapping[str, Path]) -> None:
        turns = asyncio.Semaphore(_UPLOADS)

        async def put(name: str, path: Path) -> None:
            async with turns:
                # in one request: what is left of one in several would be invisible, and cost money
                await self._client.upload(
                    lambda store: obstore.put_async(store, _join(key, name), path, use_multipart=False)
                )

        async def put_all(store: ObjectStore) -> None:
            tasks = [asyncio.create_task(put(name, path)) for name, path in files.items()]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        self._client.run(put_all)

    def _delete(self, keys: Sequence[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            if keys:
                self._client.run(lambda store: obstore.delete_async(store, keys))

    def _list(self, key: str) -> "Sequence[ObjectMeta]":
        async def collect(store: ObjectStore) -> "Sequence[ObjectMeta]":
            return await obstore.list(store, key or None).collect_async()

        return self._client.run(collect)


@contextlib.contextmanager
def _missing_is_gone(key: str) -> Iterator[None]:
    """Say `GoneError` of a file that is not there, or is shorter than was asked for."""
    try:
        yield
    except FileNotFoundError as error:
        if is_no_bucket(error):
            raise
        raise GoneError(key) from None
    except BaseError as error:
        if not is_beyond_end(error):
            raise
        raise GoneError(key) from None


def _join(key: str, name: str) -> str:
    return f"{key}/{name}" if key else name


def _scratch() -> Path:
    """Where parts are made before they are uploaded: a folder of this user alone."""
    folder = Path(tempfile.gettempdir()) / f"kdpipe-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():
        raise CacheError(f"{folder} belongs to another user: set TMPDIR to another folder.")
    return folder
