"""Writers of one cache know of each other by locks of the kernel: by no process number, host name or clock."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdpipe.cache.store.folder import Folder
from kdpipe.cache.verify.verification import remove_faults, verify_cache

WRITER = """
import os, socket, sys, time
from pathlib import Path
from kdpipe.cache.store.folder import Folder

location, key, note = Folder(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
location.tidy()
with location.staging(key) as folder:
    (folder / "data").write_bytes(b"x" * 100_000)
    (folder / "zarr.json").write_text("{}")
    note.with_suffix(".ready").write_text(f"{os.getpid()} {socket.gethostname()}")
    while not note.with_suffix(".go").exists():
        time.sleep(0.01)
    print((folder / "data").stat().st_size, location.publish(folder, key))
"""
KNOWN = ("zarr.json", "plan/", "head/", "parts/00000/", "parts/00001/", "parts/00002/")  # of the finished cache
CONTAINERS = (
    ["unshare", "--pid", "--fork", "--mount-proc"],
    ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"],
)


class Writer:
    """A process that begins a part, waits, and publishes it."""

    def __init__(self, prefix: list[str], cache: Path, key: str, note: Path) -> None:
        self._note = note
        command = [*prefix, sys.executable, "-W", "ignore", "-c", WRITER, str(cache), key, str(note)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def begun(self) -> tuple[str, str]:
        """Wait until it is at work; its process number and host name, as it sees them."""
        ready = self._note.with_suffix(".ready")
        until = time.monotonic() + 120
        while not ready.exists() or not ready.read_text():
            assert self._process.poll() is None, "it ended before it began"
            assert time.monotonic() < until
            time.sleep(0.01)
        pid, host = ready.read_text().split()
        return pid, host

    def finish(self) -> str:
        """Let it publish; what it says: the size of its file, and whether it was first."""
        self._note.with_suffix(".go").touch()
        return self._process.communicate(timeout=120)[0].strip()

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


def permitted(prefix: list[str]) -> bool:
    return (
        shutil.which(prefix[0]) is not None and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    )


@pytest.fixture(params=["processes", "containers"])
def prefix(request: pytest.FixtureRequest) -> list[str]:
    """What a writer is started by: nothing, or a container with its own process numbers and the host's name."""
    if request.param == "processes":
        return []
    containers = [container for container in CONTAINERS if permitted(container)]
    if not containers:
        pytest.skip("this user may make no process namespaces (unshare)")
    return containers[0]


@pytest.fixture
def writers(prefix: list[str], cache_path: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts writers of the finished cache `cache_path`, and ends them with the test."""
    started: list[Writer] = []

    def start(key: str) -> Writer:
        started.append(Writer(prefix, cache_path, key, tmp_path / f"writer{len(started)}"))
        return started[-1]

    yield start
    for writer in started:
        if writer._process.poll() is None:
            writer.kill()


def temporary(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "parts").iterdir() if path.name.endswith(".tmp"))


def test_two_writers_leave_each_other_alone(writers: Any, cache_path: Path, prefix: list[str]) -> None:
    first = writers("parts/00008")
    begun = [first.begun()]
    before = temporary(cache_path)
    second, third = writers("parts/00008"), writers("parts/00009")
    begun += [second.begun(), third.begun()]
    if prefix:
        assert len(set(begun)) == 1  # nothing but the lock tells them apart
    assert len(temporary(cache_path)) == 3
    assert set(before) < set(temporary(cache_path))
    assert second.finish() == "100000 True"
    assert first.finish() == "100000 False"
    assert third.finish() == "100000 True"
    assert temporary(cache_path) == []
    assert (cache_path / "parts" / "00008" / "data").stat().st_size == 100_000


def test_verify_leaves_a_writer_alone(writers: Any, cache_path: Path) -> None:
    writer = writers("parts/00001")
    writer.begun()
    verification = verify_cache(cache_path, lambda done, total: None)
    assert verification.faults == ()
    assert [note for note in verification.notes if "is being written by another process" in note]
    assert remove_faults(cache_path, verification) == []
    Folder(cache_path).tidy()
    assert writer.finish() == "100000 False"


def test_what_a_killed_writer_left_is_removed_by_the_next(writers: Any, cache_path: Path, kit: Any) -> None:
    killed, alive = writers("parts/00008"), writers("parts/00009")
    killed.begun()
    alive.begun()
    killed.kill()
    assert len(temporary(cache_path)) == 2
    verification = verify_cache(cache_path, lambda done, total: None)
    assert [fault.message for fault in verification.faults] == ["was left behind by a process that ended"]
    kit.writer(cache_path, kit.spec(), kit.images())
    assert [name.split(".")[1] for name in temporary(cache_path)] == ["00009"]
    assert alive.finish() == "100000 True"


def test_repair_removes_what_a_killed_writer_left(writers: Any, cache_path: Path) -> None:
    killed = writers("parts/00008")
    killed.begun()
    killed.kill()
    verification = verify_cache(cache_path, lambda done, total: None)
    assert len(remove_faults(cache_path, verification)) == 1
    assert temporary(cache_path) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_nothing_is_removed(cache_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """On file systems that have none, nobody can tell whether a writer lives."""

    def flock(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    location = Folder(cache_path)
    with location.staging("parts/00008") as folder:
        (folder / "zarr.json").write_text("{}")
        location.tidy()
        (leftovers,) = location.leftovers(KNOWN)
        assert not leftovers.is_removable
        assert not leftovers.is_fault
        assert "no locks" in leftovers.state
        assert location.publish(folder, "parts/00008")
    assert temporary(cache_path) == []
