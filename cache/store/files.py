"""Files that are there entirely or not at all: durable writes, temporary folders, publication by rename."""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from kdpipe.cache.errors import CacheError

# Size in bytes and sha256 of a file.
FileRecord = tuple[int, str]

_TOKEN = secrets.token_hex(4)
_COUNT = itertools.count()
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.(?P<token>[0-9a-f]{8})\.(?P<count>\d+)\.tmp")
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@contextlib.contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` of writing into a `CacheError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = (
                f"The disk or quota of {path} is full. What was committed before is intact: free space, or cache fewer "
                "bytes (--targets, --dtype, --codec), and run the same command again"
            )
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"{path} cannot be written by this user: change its permissions or choose another --out"
        else:
            advice = "Check that the file system is there and sound, and run the same command again"
        raise CacheError(f"{what} failed: {error.strerror or error} ({error.filename or path}). {advice}.") from error


def write_file(path: Path, data: bytes) -> FileRecord:
    """Write a file and force it to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return file_record(data)


def file_record(data: bytes) -> FileRecord:
    """Size and digest of a file's content."""
    return len(data), hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force the names in a folder and in all folders below it to disk."""
    for path, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(path))


def temporary_folder(final: Path) -> Path:
    """Make a folder beside `final` whose name tells which process owns it; stale ones for `final` are removed."""
    remove_stale(final.parent, final.name)
    host = _host()
    for count in _COUNT:  # never a name that another thread had: it may be about to remove it
        folder = final.parent / f".{final.name}.{host}.{os.getpid()}.{_TOKEN}.{count}.tmp"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def remove_stale(parent: Path, name: str | None = None) -> None:
    """Remove the temporary folders that dead processes of this host left behind.

    Args:
        parent: folder to look in.
        name: only those made for this name.
    """
    for entry in parent.iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and name in (None, match["name"]) and temporary_state(entry.name) == "dead":
            shutil.rmtree(entry, ignore_errors=True)


def temporary_state(name: str) -> str | None:
    """Of the process that a temporary folder belongs to: "dead", "alive", or "elsewhere" on another host.

    None where it is not the name of a temporary folder.
    """
    match = _TEMPORARY.fullmatch(name)
    if match is None:
        return None
    if match["host"] != _host():
        return "elsewhere"
    pid = int(match["pid"])
    dead = match["token"] != _TOKEN if pid == os.getpid() else not _alive(pid)
    return "dead" if dead else "alive"


def publish(folder: Path, final: Path) -> bool:
    """Give a finished temporary folder its final name, in one atomic act.

    Returns:
        False where `final` is there already; `folder` is then left as it is.
    """
    sync_tree(folder)
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno in _OCCUPIED:
            return False
        raise
    sync_folder(final.parent)
    return True


def discard(folder: Path) -> None:
    """Remove a folder (or a file in its place) that other processes may see, under a temporary name first."""
    aside = temporary_folder(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside / folder.name)
    shutil.rmtree(aside, ignore_errors=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname()) or "localhost"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
