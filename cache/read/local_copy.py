"""Keeps a fixed part of a cache on a local disk, for runs that read it from afar."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.layout import part_layout
from kdpipe.cache.format.record import Files, files_below, files_key, read_files, read_part_record
from kdpipe.cache.format.root import Root
from kdpipe.cache.read.root import read_root
from kdpipe.cache.store.folder import Folder
from kdpipe.cache.store.location import Location, part_key
from kdpipe.cache.store.temporary import NoLocksError, remove_dead, take_lock, temporary_folder

_THREADS = 4
_WAIT_SECONDS = 2.0
# Of the space that is free, where nobody says how many bytes may be used.
_SHARE = 0.9


class _StoppedError(Exception):
    """Nobody waits for the rest."""


class LocalCopy:
    """While this context lasts, a thread copies arrays of a cache to a local folder, part after part.

    Each array is checked against its digests and appears in one act; readers take it from then on. It stays for later
    runs. The parts are always the same: every sample is read once per epoch, and if those read last were kept, each
    would be dropped before its next use. Of the processes of a node, the one that holds the folder's lock copies.

    Args:
        location: of the cache; its `copy` is set.
        folder: in which the copy's folder lies, which bears the digest of the cache, so that others do not mix in.
        limit: bytes that may be used; None takes nine tenths of what is free.
        fields: that are read, some of those of the specification.
        say: is told, in a line, how it ended.
    """

    def __init__(
        self, location: Location, folder: Path, limit: int | None, fields: Collection[str], say: Callable[[str], None]
    ) -> None:
        self._location, self._limit, self._say = location, limit, say
        with location.explained("Reading the cache"):
            self._root: Root = read_root(location)
        spec = self._root.spec
        arrays = {name for field in fields for name in spec.arrays_of(field)} | {"index", "file_names"}
        self._arrays = [name for name in part_layout(spec) if name in arrays]
        self._folder = folder / f"kdpipe-{self._root.digest[:16]}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(
                f"The local copy cannot be made in {folder}: {error.strerror}. Choose another --local-copy."
            ) from error
        location.copy = self._folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kdpipe-copy", daemon=True)

    def __enter__(self) -> "LocalCopy":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(_WAIT_SECONDS)

    def wait(self) -> None:
        """Until nothing more is copied."""
        self._thread.join()

    def _run(self) -> None:
        try:
            lock = self._wait_for_lock()
        except (NoLocksError, OSError) as error:
            self._say(f"There is no local copy: {self._folder} cannot be locked ({error}).")
            return
        if lock is None:
            return
        try:
            with self._location.explained("The local copy"):
                self._fill()
        except _StoppedError:
            pass
        except CacheError as error:
            self._say(f"{error} What is not copied is read from {self._location}.")
        finally:
            os.close(lock)

    def _wait_for_lock(self) -> int | None:
        """The lock, which another process may have and lose; None where nobody waits any more."""
        while (lock := take_lock(self._folder)) is None:
            if self._stop.wait(_WAIT_SECONDS):
                return None
        return lock

    def _fill(self) -> None:
        try:
            self._copy_parts()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CacheError(f"The local copy ends here: the disk of {self._folder} is full.") from error

    def _copy_parts(self) -> None:
        copy = Folder(self._folder)
        for place in [self._folder / "parts", *self._folder.glob("parts/*"), *self._folder.glob("parts/*/*")]:
            remove_dead(place)
        used = copy.size("")
        limit = used + int(_SHARE * copy.free_bytes()) if self._limit is None else self._limit
        parts = 0
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="kdpipe-copy") as pool:
            for number, arrays in self._missing():
                size = sum(size for files in arrays.values() for size, _ in files.values())
                if used + size > limit:
                    break
                for _ in pool.map(self._copy_array, arrays, arrays.values()):
                    pass
                used += size
                parts = number + 1
        whole = parts == len(self._root.parts)
        what = "all parts" if whole else f"the first {parts} of {len(self._root.parts)} parts"
        self._say(f"Local copy in {self._folder}: {what}, {used / 2**30:.1f} GiB.")

    def _missing(self) -> Iterator[tuple[int, dict[str, Files]]]:
        """The parts that are there, in order, with the files of those of their arrays that are not copied yet."""
        for number, span in enumerate(self._root.parts):
            record = read_part_record(self._location, number, span, self._root.digest)
            key = "" if record is None else files_key(part_key(number), record)
            files = None if record is None else read_files(self._location, key, record["files"])
            if files is None:
                continue  # it is not made yet, or damaged, which whoever reads it is told
            names = [f"{key}/{name}" for name in self._arrays if not (self._folder / key / name).is_dir()]
            yield number, {name: files_below(files, name.removeprefix(f"{key}/")) for name in names}

    def _copy_array(self, key: str, files: Files) -> None:
        with temporary_folder(self._folder / key) as aside:
            new = aside / "new"
            new.mkdir()
            for name, (_, expected_digest) in files.items():
                digest = hashlib.sha256()
                with (new / name).open("wb") as out:
                    for block in self._location.stream(f"{key}/{name}"):
                        if self._stop.is_set():
                            raise _StoppedError
                        out.write(block)
                        digest.update(block)
                    out.flush()
                    os.fsync(out.fileno())
                if digest.hexdigest() != expected_digest:
                    raise CacheError(
                        f"The local copy ends at {key}/{name} of {self._location}, which has other content than was "
                        f"written: run `kdpipe verify {self._location} --repair`."
                    )
            new.rename(self._folder / key)
