"""Hidden folders in which something is made before it appears, each locked by its writer as long as that lives."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp")
# Whoever is at work in a temporary folder holds its lock, which the kernel drops with the process.
STATES = {
    "dead": "was left behind by a process that ended",
    "alive": "is being written by another process",
    "unknown": "is, or was, being written by another process: this file system has no locks that could tell",
}
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def temporary_folder(final: Path) -> Iterator[Path]:
    """A hidden folder beside `final`, locked as long as the context lasts, and removed at its end.

    What dead writers of `final` left behind is removed first.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(final.parent, final.name)
    lock: int | None = None
    while True:
        folder = final.parent / f".{final.name}.{secrets.token_hex(8)}.tmp"
        folder.mkdir()
        try:
            lock = take_lock(folder)
        except NoLocksError:
            break
        if lock is not None:
            break  # otherwise another process, which tidied up, was quicker: it removes the folder
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


class NoLocksError(Exception):
    """The file system knows no locks."""


def take_lock(folder: Path) -> int | None:
    """Take the lock of a folder: a descriptor that holds it; None where another process has it.

    Raises:
        NoLocksError: the file system knows no locks.
    """
    try:
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
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
            raise NoLocksError from error
        raise
    os.close(file)  # whoever had it before has removed it
    return None


def writer_state(folder: Path, remove: bool = False) -> str | None:
    """Of the writer of a temporary folder: "dead", "alive" or "unknown"; None where the folder has gone meanwhile."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    try:
        lock = take_lock(folder)
    except (NoLocksError, PermissionError):
        return "unknown"
    except OSError as error:
        if error.errno in (errno.EROFS, errno.ELOOP, errno.EISDIR):  # the last two: it is no lock of kdpipe's
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


def remove_dead(parent: Path, name: str | None = None) -> None:
    """Remove the temporary folders in `parent` whose writers are dead: all, or those for the thing of a name."""
    for entry in parent.iterdir() if parent.is_dir() else ():
        match = TEMPORARY.fullmatch(entry.name)
        if match and name in (None, match["name"]):
            writer_state(entry, remove=True)
