"""What surrounds a command: its output, folders, memory. One message, and never a traceback."""

import io
import multiprocessing.util
import os
import subprocess
import sys
import tempfile
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.runtime.console import ProgressBar, robust_output
from kdpipe.pipelines.training import parcel
from kdpipe.pipelines.training import workers as worker
from kdpipe.pipelines.training.faults import training_faults

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

SCRIPT = Path(sys.executable).with_name("kdpipe")
NAME = "große 猫 \udcff.zarr"  # with a byte that is not UTF-8


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "gb2312"])
def test_any_output_shows_any_name(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding, errors="strict"))
    with robust_output():
        print(NAME)
        with ProgressBar(Console(file=sys.stdout, force_terminal=True), NAME, 3) as bar:
            bar.update(1, "1 image/s")
        sys.stdout.flush()
    assert output.getvalue().startswith(NAME.encode(encoding, "backslashreplace"))


def test_output_that_was_closed_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with robust_output():
        print("nobody reads this")
        print("nor this", file=sys.stderr)
        sys.stdout.close()
        sys.stderr.close()
        monkeypatch.setattr(sys, "stdout", io.StringIO())


def test_a_reader_that_ends_early(work: Path) -> None:
    """As `kdpipe ... | head -1` does; the name is there for the encoding of standard error."""
    command = f"'{SCRIPT}' cache-teacher --help | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=work, env=environment)
    assert done.stdout.startswith("Usage")
    assert done.stderr == ""
    read, write = os.pipe()
    os.close(read)
    closed = subprocess.run([SCRIPT, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, cwd=work)
    os.close(write)
    assert (closed.returncode, closed.stderr) == (1, "")
    missing = subprocess.run([SCRIPT, "inspect", NAME], capture_output=True, text=True, cwd=work, env=environment)
    assert missing.returncode == 1
    assert missing.stderr.startswith("Error: There is no cache at gro")
    assert len(missing.stderr.splitlines()) == 1


def test_a_folder_that_was_deleted(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted = work / "gone"
    deleted.mkdir()
    monkeypatch.chdir(deleted)
    deleted.rmdir()
    assert "The current folder cannot be used" in kit.refused("inspect", "x.zarr")
    assert "Usage" in kit.run("--help").out


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "There is too little memory: the machine's memory ran out\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory. 2 MiB is free. Of the"),
            "memory: CUDA out of memory. 2 MiB is free.\n",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), "too little memory"),
        (PermissionError(13, "Permission denied", "a.jpg"), "Permission denied: 'a.jpg'"),
        (UnicodeEncodeError("utf-8", "a\udcff.jpg", 1, 2, "surrogates not allowed"), r"a\udcff.jpg"),
    ],
)
def test_what_the_machine_refuses_is_no_fault_of_kdpipe(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("kdpipe.cache.read.reader.open_cache", fail)
    assert message in kit.refused("train-student", "--cache", "x.zarr")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's", "--shm-size"),
        ("unable to write to file </torch_12_34_0>: No space left on device (28)", "--shm-size"),
        ("unable to mmap 64 bytes from file </torch_12_34_0>: Cannot allocate memory (12)", "--shm-size"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "A loader worker (process 7, 8) was killed"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "A loader worker (process 7) was killed"),
        ("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory", "too little memory"),
    ],
)
@pytest.mark.parametrize("steps", [0, 5])
def test_what_ends_a_training_is_told_with_what_to_do(text: str, message: str, steps: int, tmp_path: Path) -> None:
    runner = SimpleNamespace(iter=0)
    with pytest.raises(KdpipeError) as caught, training_faults(runner, tmp_path):
        runner.iter = steps
        raise RuntimeError(text)
    assert message in str(caught.value)
    assert "--resume" in str(caught.value)


@pytest.mark.parametrize("kind", [ConnectionResetError, ConnectionRefusedError, BrokenPipeError, FileNotFoundError])
def test_a_socket_of_a_worker_that_is_gone(kind: type[OSError], tmp_path: Path) -> None:
    with (
        pytest.raises(KdpipeError, match="A loader worker was killed"),
        training_faults(SimpleNamespace(iter=1), tmp_path),
    ):
        raise kind(1, "the socket")
    with pytest.raises(FileNotFoundError), training_faults(SimpleNamespace(iter=1), tmp_path):
        raise FileNotFoundError(2, "No such file or directory", "a.jpg")


def test_a_long_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    process = multiprocessing.process.current_process()
    monkeypatch.setitem(process._config, "tempdir", None)  # type: ignore[attr-defined]
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    worker.preload_workers()
    with Listener(family="AF_UNIX") as listener:
        assert str(listener.address).startswith("/tmp/")
    assert tempfile.gettempdir() == str(long)  # all but sockets go where they were sent
    monkeypatch.setattr(worker, "_SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(KdpipeError, match=r"Set TMPDIR to a folder with a shorter name"):
        worker.preload_workers()


def test_no_shared_memory_for_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("multiprocessing.synchronize.Lock.__init__", refuse)
    with pytest.raises(KdpipeError, match="--workers 0"):
        worker.preload_workers()


def test_a_batch_needs_no_room_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.statvfs("/dev/shm").f_bfree
    packed = parcel.pack_batch([{"inputs": torch.ones(1 << 24, dtype=torch.uint8)}])
    assert before - os.statvfs("/dev/shm").f_bfree < (1 << 24) // os.statvfs("/dev/shm").f_bsize
    del packed

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(KdpipeError, match=r"no memory for a batch of 16\.0 MiB"):
        parcel.pack_batch([{"inputs": torch.ones(1 << 24, dtype=torch.uint8)}])
