"""A cache in a folder of a local or shared file system: kernel locks, durable writes, publication by rename."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from zarr.storage import LocalStore

from kdpipe.cache.errors import CacheError
from kdpipe.cache.store.location import RECORD, GoneError, Leftover, Location

_BLOCK = 1 << 20
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp")
_LOCK = ".lock"
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Whoever is at work in a temporary folder holds its lock, which the kernel drops with the process.
_STATES = {
    "dead": "was left behind by a process that ended",
    "alive": "is being written by another process",
    "unknown": "is, or was, being written by another process: this file system has no locks that could tell",
}


class Folder(Location):
    """A cache in a folder.

    What is being made lies in a hidden folder beside its final place, in which its writer holds a lock: a writer is
    alive as long as the kernel keeps the lock, on whatever machine or in whatever container of a shared file system.

    Args:
        path: of the cache.
    """

    is_local = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)

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
        return not any(self.path.iterdir())

    def read(self, key: str) -> bytes | None:
        try:
            file = os.open(f"{self.path}/{key}", os.O_RDONLY)
        except _ABSENT:
            return None
        try:
            data = os.read(file, os.fstat(file).st_size)
            while more := os.read(file, _BLOCK):
                data += more
            return data
        except IsADirectoryError:
            return None
        finally:
            os.close(file)

    def stream(self, key: str) -> Iterator[bytes]:
        try:
            with (self.path / key).open("rb") as file:
                while block := file.read(_BLOCK):
                    yield block
        except _ABSENT as error:
            raise GoneError(key) from error

    def sizes(self, key: str, names: Collection[str]) -> dict[str, int]:
        found = {}
        for name in names:
            with contextlib.suppress(*_ABSENT):
                state = os.stat(f"{self.path}/{key}/{name}")
                if stat.S_ISREG(state.st_mode):
                    found[name] = state.st_size
        return found

    def zarr_store(self) -> LocalStore:
        return LocalStore(self.path, read_only=True)

    @contextlib.contextmanager
    def staging(self, key: str) -> Iterator[Path]:
        with _temporary(self.path / key) as folder:
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
        with _temporary(self.path / key) as aside, contextlib.suppress(FileNotFoundError):
            (self.path / key).rename(aside / "old")

    def tidy(self) -> None:
        for parent, name in ((self.path.parent, self.path.name), (self.path, None), (self.path / "parts", None)):
            for entry in parent.iterdir() if parent.is_dir() else ():
                match = _TEMPORARY.fullmatch(entry.name)
                if match and name in (None, match["name"]):
                    _state(entry, remove=True)

    def leftovers(self, known: Collection[str]) -> list[Leftover]:
        found = []
        for key in _strays(self.path, known):
            if not _TEMPORARY.fullmatch(Path(key).name):
                found.append(Leftover(key, "does not belong there: remove it by hand", False, True))
            elif state := _state(self.path / key, remove=False):
                found.append(Leftover(key, _STATES[state], state == "dead", state == "dead"))
        return found

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except GoneError as error:
            raise CacheError(f"{what} failed: {error} of {self} is gone.") from error
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
            raise CacheError(f"{what} failed: {error.strerror or error} ({where}). {advice}.") from error

    def free_bytes(self) -> int:
        path = self.path.resolve()
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free


@contextlib.contextmanager
def _temporary(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final`, locked as long as the context lasts, and removed at its end."""
    final.parent.mkdir(parents=True, exist_ok=True)
    lock: int | None = None
    while True:
        folder = final.parent / f".{final.name}.{secrets.token_hex(8)}.tmp"
        folder.mkdir()
        try:
            lock = _lock(folder)
        except _NoLocksError:
            break
        if lock is not None:
            break  # otherwise another process, which tidied up, was quicker: it removes the folder
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


class _NoLocksError(Exception):
    """The file system knows no locks."""


def _lock(folder: Path) -> int | None:
    """Take the lock of a temporary folder: a descriptor that holds it; None where another process has it."""
    try:
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:  # the folder is gone
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink:
            return file
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        os.close(file)
        if error.errno in _NO_LOCKS:
            raise _NoLocksError from error
        raise
    os.close(file)  # whoever had it before has removed it
    return None


def _state(folder: Path, remove: bool) -> str | None:
    """Of the writer of a temporary folder: "dead", "alive" or "unknown"; None where the folder has gone meanwhile."""
    if not folder.is_dir():
        return None
    try:
        lock = _lock(folder)
    except (_NoLocksError, PermissionError):
        return "unknown"
    except OSError as error:
        if error.errno == errno.EROFS:
            return "unknown"
        raise
    if lock is None:
        return "alive" if folder.is_dir() else None
    try:
        if remove:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
    return "dead"


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


def _strays(folder: Path, known: Collection[str]) -> Iterator[str]:
    """Keys of all files and folders below a folder that are none of the known files' or theirs."""
    files = {name for name in known if not name.endswith("/")}
    whole = {name.rstrip("/") for name in known if name.endswith("/")}
    parents = {str(parent) for name in (*files, *whole) for parent in Path(name).parents}
    for top, folders, names in os.walk(folder):
        place = Path(top).relative_to(folder)
        for name in sorted(folders):
            path = str(place / name)
            if path not in parents and path not in whole:
                yield path
        folders[:] = [name for name in folders if str(place / name) in parents and str(place / name) not in whole]
        yield from (path for name in sorted(names) if (path := str(place / name)) not in files)
