"""Where a cache lies: what reading, writing and verifying ask of a folder or of an object store."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kdpipe.cache.errors import CacheError

T = TypeVar("T")
R = TypeVar("R")

# The commit record of a cache, of a part, or of the head.
RECORD = "zarr.json"
# What is said of something below a cache that kdpipe did not write.
FOREIGN = "does not belong there: remove it by hand"


@dataclass(frozen=True)
class Leftover:
    """Something below a cache that belongs to no committed part.

    Attributes:
        key: relative to the cache; a folder stands for all below it.
        state: what is known of it, to follow its name.
        is_removable: whether nobody is at work on it any more, as far as can be known.
        is_fault: whether it should not be there; False where somebody is, or may be, at work on it.
    """

    key: str
    state: str
    is_removable: bool
    is_fault: bool


class GoneError(Exception):
    """Something that was committed is not there, or no longer as long as it was.

    Args:
        key: of the file.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is missing or cut off")


class Location(ABC):
    """Where a cache lies. Keys are relative to it, with `/` between names.

    Nothing below a key counts before its record (`zarr.json`) is there, and that appears in one atomic act.

    Attributes:
        name: for people and messages, without credentials.
        address: what `open_location` opens it again by, in any folder; without credentials and options.
        threads: how many files are best read at once.
        copy: folder on a local disk in which some of the arrays of parts lie, too; None where there is none.
    """

    name: str
    address: str
    threads: int
    copy: Path | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def title(self) -> str:
        """The last part of its name, such as `coco.zarr`."""
        return self.name.rstrip("/").rpartition("/")[2]

    def at_once(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """The results of a function that asks for files, for several things: as many at once as is best here."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(function, items))

    def nearest(self, key: str) -> "Location":
        """Where a folder of files is best read: in the local copy, if it is there."""
        from kdpipe.cache.store.folder import Folder

        return Folder(self.copy) if self.copy is not None and (self.copy / key).is_dir() else self

    @abstractmethod
    def check_new(self) -> bool:
        """Whether nothing is there yet, so that a cache can be made.

        Raises:
            CacheError: no cache can be made there, such as within another cache or in place of a file.
        """

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """The content of a file; None where there is none."""

    @abstractmethod
    def stream(self, key: str) -> Iterator[bytes]:
        """The content of a file in blocks.

        Raises:
            GoneError: there is none.
        """

    @abstractmethod
    def sizes(self, key: str, names: Collection[str]) -> dict[str, int]:
        """Bytes of those of the named files below a key that are there, by name."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of all files below a key, where others may be at work."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where a key lies on a local file system; None where it does not."""

    @abstractmethod
    def is_absent(self) -> bool:
        """Whether there is nothing at all, not even something that is no cache."""

    async def fetch(self, key: str, start: int, stop: int) -> bytes:
        """Bytes of a file that lies on no local file system; any number of them may be asked for at once.

        Args:
            key: of the file.
            start: first byte.
            stop: the byte behind the last.

        Raises:
            GoneError: it is missing, or ends before them.
        """
        raise NotImplementedError(key)

    @abstractmethod
    def staging(self, key: str) -> AbstractContextManager[Path]:
        """A local folder in which the files of a key are made. It is removed at the end, published or not."""

    @abstractmethod
    def publish(self, folder: Path, key: str) -> bool:
        """Let what is in a staging folder, its record last, appear below a key, in one atomic act.

        Args:
            folder: of `staging`; all its files are finished.
            key: of the part, the head, or "" for the cache itself.

        Returns:
            False where a record is there already, which then stays.
        """

    @abstractmethod
    def discard(self, key: str) -> None:
        """Remove a file, or a folder with all that is below it, the record first."""

    @abstractmethod
    def tidy(self) -> None:
        """Remove what dead writers left behind, as far as it is certain that they are dead."""

    @abstractmethod
    def leftovers(self, known_keys: Collection[str]) -> list[Leftover]:
        """What is there and is none of the known files.

        Args:
            known_keys: keys of all files that belong to the cache; a key that ends in `/` stands for all below it.
        """

    @abstractmethod
    def explained(self, action: str) -> AbstractContextManager[None]:
        """Turn errors of the system into `CacheError` that says what to do; `action` begins the sentence."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes that can still be written; None where there is no limit that could be known."""


def part_key(index: int) -> str:
    """Key of a part."""
    return f"parts/{index:05d}"


_shared: dict[str, Location] = {}


def share_location(location: Location) -> None:
    """Let `open_location` give this location for its address in this process, with the options that it was opened by.

    What a run records, and its parts are built from, is the address alone.
    """
    _shared[location.address] = location


# A path, a URL such as `s3://bucket/coco.zarr`, or a location.
Place = str | os.PathLike[str] | Location


def open_location(place: Place, options: "dict[str, str] | None" = None) -> Location:
    """The location that a path or URL names.

    Args:
        place: a path, or a URL such as `s3://bucket/coco.zarr`; a location is given back as it is.
        options: of the object store, such as {"endpoint": "http://127.0.0.1:9000"}.

    Raises:
        CacheError: the URL is of no kind that is known, or an option is not.
    """
    from kdpipe.cache.store.folder import Folder

    if isinstance(place, Location):
        return place
    if not options and str(place) in _shared:
        return _shared[str(place)]
    if isinstance(place, str) and "://" in place and not place.startswith("file://"):
        from kdpipe.cache.store.bucket import Bucket

        return Bucket(place, options or {})
    if options:
        raise CacheError(f"{place} is a folder: options of a store (--store-option) are for URLs such as s3://...")
    return Folder(Path(str(place).removeprefix("file://")))
