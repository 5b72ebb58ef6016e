"""A cache in a folder of a local or shared file system: kernel locks, durable writes, publication by rename."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from io import FileIO
from pathlib import Path

from kdpipe.cache.errors import CacheError
from kdpipe.cache.store.location import FOREIGN, RECORD, GoneError, Leftover, Location
from kdpipe.cache.store.temporary import STATES, TEMPORARY, remove_dead, temporary_folder, writer_state

_BLOCK = 1 << 20
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Folder(Location):
    """A cache in a folder.

    What is being made lies in a hidden folder beside its final place, in which its writer holds a lock: a writer is
    alive as long as the kernel keeps the lock, on whatever machine or in whatever container of a shared file system.

    Args:
        path: of the cache.
    """

    threads = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.address = str(path.absolute())

    def check_new(self) -> bool:
        for place in self.path.resolve().parents:
            if (place / RECORD).exists():
                raise CacheError(f"{self} lies in the cache {place}: choose another --out.")
        try:
            mode = self.path.stat().st_mode  # asked once: another process may create it at any moment
        except FileNotFoundError:
            if not self.path.is_symlink():
                return True
            mode = 0  # a link that leads nowhere
        if not stat.S_ISDIR(mode):
            raise CacheError(f"{self} is there and is no folder: choose another --out.")
        if any(self.path.iterdir()):
            return False
        if kind := self._unreplaceable():
            raise CacheError(
                f"{self} is {kind}, and a cache cannot take its place. Name one in it: --out {self}/x.zarr."
            )
        return True

    def _unreplaceable(self) -> str:
        """What an empty folder is that a finished one cannot be renamed to; empty for any other."""
        if self.path.is_symlink():
            return "a link to a folder"
        if os.path.ismount(self.path):
            return "a mounted disk"
        return "the current folder" if self.path.samefile(Path.cwd()) else ""

    def read(self, key: str) -> bytes | None:
        try:
            with _open(f"{self.path}/{key}") as file:
                return file.read()
        except _ABSENT:
            return None

    def stream(self, key: str) -> Iterator[bytes]:
        try:
            with _open(f"{self.path}/{key}") as file:
                while block := file.read(_BLOCK):
                    yield block
        except _ABSENT as error:
            raise GoneError(key) from error

    def sizes(self, key: str, names: Collection[str]) -> dict[str, int]:
        sizes = {}
        for name in names:
            with contextlib.suppress(*_ABSENT):
                state = Path(f"{self.path}/{key}/{name}").stat()
                if stat.S_ISREG(state.st_mode):
                    sizes[name] = state.st_size
        return sizes

    def size(self, key: str) -> int:
        total = 0
        for parent, _, names in os.walk(self.path / key):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += (Path(parent) / name).stat().st_size
        return total

    def local_path(self, key: str) -> Path:
        return self.path / key

    def is_absent(self) -> bool:
        return not os.path.lexists(self.path)

    @contextlib.contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        with temporary_folder(self._inside(key)) as folder:
            (folder / "new").mkdir()
            yield folder / "new"

    def publish(self, folder: Path, key: str) -> bool:
        final = self.path / key
        _sync_tree(folder)
        try:
            folder.rename(final)
        except OSError as error:
            if error.errno in _OCCUPIED:
                return False
            raise
        _sync(final.parent)
        return True

    def discard(self, key: str) -> None:
        with temporary_folder(self._inside(key)) as aside, contextlib.suppress(FileNotFoundError):
            (self.path / key).rename(aside / "old")

    def tidy(self) -> None:
        remove_dead(self.path.parent, self.path.name)
        remove_dead(self.path)
        if not (self.path / "parts").is_symlink():
            remove_dead(self.path / "parts")

    def _inside(self, key: str) -> Path:
        """Where a key lies, if that is in this folder.

        Raises:
            CacheError: a link leads elsewhere; there may be another cache.
        """
        place = self.path / key
        if key and not place.parent.resolve().is_relative_to(self.path.resolve()):
            raise CacheError(
                f"{place.parent} is a link that leads out of the cache {self}: nothing is written there. Put the "
                "folder in the place of the link."
            )
        return place

    def leftovers(self, known_keys: Collection[str]) -> list[Leftover]:
        leftovers = []
        for key in _strays(self.path, known_keys):
            place = self.path / key
            if not TEMPORARY.fullmatch(place.name) or place.is_symlink() or place.is_file():
                leftovers.append(Leftover(key, FOREIGN, False, True))
            elif state := writer_state(place):
                leftovers.append(Leftover(key, STATES[state], state == "dead", state == "dead"))
        return leftovers

    @contextlib.contextmanager
    def explained(self, action: str) -> Iterator[None]:
        try:
            yield
        except GoneError as error:
            raise CacheError(f"{action} failed: {error} in {self}.") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                advice = (
                    f"The disk or quota of {self} is full. What was committed before is intact: free space, or cache "
                    "fewer bytes (--targets, --dtype, --codec), and run the same command again"
                )
            elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                advice = f"{self} cannot be written by this user: change its permissions or choose another --out"
            else:
                advice = "Check that the file system is there and sound, and run the same command again"
            where = error.filename or self
            raise CacheError(f"{action} failed: {error.strerror or error} ({where}). {advice}.") from error

    def free_bytes(self) -> int:
        path = self.path.resolve()
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free


def _open(path: str) -> FileIO:
    """Open a file for reading; only files that have an end.

    Raises:
        FileNotFoundError: there is none, or something else is in its place.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would be waited for
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return os.fdopen(handle, "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    """Force a folder and everything below it to disk."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(path) / name)
        _sync(Path(path))


def _strays(folder: Path, known_keys: Collection[str]) -> Iterator[str]:
    """Keys of all files and folders below a folder that are none of the known files' or theirs."""
    cache_keys = {name.rstrip("/") for name in known_keys}  # whatever is there in their place is a fault of its own
    parents = {str(parent) for name in cache_keys for parent in Path(name).parents}
    for top, folders, names in os.walk(folder):
        place = Path(top).relative_to(folder)
        for name in sorted(folders):
            path = str(place / name)
            if path not in parents and path not in cache_keys:
                yield path
        folders[:] = [name for name in folders if str(place / name) in parents and str(place / name) not in cache_keys]
        yield from (path for name in sorted(names) if (path := str(place / name)) not in cache_keys)
