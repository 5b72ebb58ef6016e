"""Writers that are killed: whatever the moment, the next run finishes the cache, byte for byte the undisturbed one."""

import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kdpipe.cache import open_cache

if TYPE_CHECKING:
    from tests.cache.conftest import Kit
    from tests.conftest import Forked, Forks

# Writes the cache, and dies at the n-th system call that changes a file or a folder: instead of it, or, where bytes are
# written, after half of them. Prints the number of calls. `all`: every part, not only those that are missing.
WRITE = """
import io, os, signal, sys
from pathlib import Path
import conftest

path, point, parts = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = 0

def reached():
    global calls
    calls += 1
    if calls == point:
        os.kill(os.getpid(), signal.SIGKILL)

class Torn(io.FileIO):
    def write(self, data):
        data = memoryview(data).cast("B")
        if calls + 1 == point:
            super().write(data[: len(data) // 2])
        reached()
        return super().write(data)

def opened(file, mode="r", buffering=-1, *args, **options):
    if "w" not in mode:
        return plain_open(file, mode, buffering, *args, **options)
    reached()
    raw = Torn(file, "w")
    return raw if buffering == 0 else io.BufferedWriter(raw)

def counted(call):
    def wrapper(*args, **options):
        reached()
        return call(*args, **options)
    return wrapper

plain_open, io.open, os.fsync = io.open, opened, lambda handle: reached()
os.rename, os.mkdir, os.rmdir, os.unlink = map(counted, (os.rename, os.mkdir, os.rmdir, os.unlink))

kit = conftest.Kit
writer = kit.writer(path, kit.spec(), kit.images(5))
if parts == "all":
    kit.fill(writer, range(len(writer.parts)))
else:
    kit.fill(writer)
print(calls)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, kit: "type[Kit]") -> dict[str, str]:
    """Digests of the files of the finished cache."""
    return kit.tree(kit.make(tmp_path_factory.mktemp("undisturbed") / "x.zarr", count=5))


def write(forks: "Forks", path: Path, point: int = 0, parts: str = "missing") -> "Forked":
    """Start a process that writes the cache, and dies at a point, counted from 1."""
    return forks.start(WRITE, path, point, parts, cwd=path.parent)


def stamps(path: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the files of each committed part."""
    return {
        str(file.relative_to(path)): (file.stat().st_ino, file.stat().st_mtime_ns)
        for part in path.glob("parts/0*")
        for file in part.rglob("*")
    }


def check_finish(forks: "Forks", kit: "type[Kit]", path: Path, undisturbed: dict[str, str], processes: int = 1) -> None:
    """Run again, and compare: bytes, nothing left over, and nothing made again that was there."""
    before = stamps(path)
    running = [write(forks, path) for _ in range(processes)]
    assert [process.wait() for process in running] == [0] * processes, [process.err for process in running]
    assert kit.tree(path) == undisturbed
    assert list(path.parent.glob(".*")) == []
    after = stamps(path)
    assert {name: after[name] for name in before} == before


def count_calls(forks: "Forks", path: Path) -> int:
    process = write(forks, path / "counted.zarr")
    assert process.wait() == 0, process.err
    return int(process.out)


def kill_at(forks: "Forks", kit: "type[Kit]", folder: Path, undisturbed: dict[str, str], point: int) -> None:
    folder.mkdir()
    process = write(forks, folder / "x.zarr", point)
    assert process.wait() == -signal.SIGKILL, process.err
    check_finish(forks, kit, folder / "x.zarr", undisturbed, processes=1 + point % 2)
    shutil.rmtree(folder)


def test_killed_at_some_points(tmp_path: Path, forks: "Forks", kit: "type[Kit]", undisturbed: dict[str, str]) -> None:
    calls = count_calls(forks, tmp_path)
    for point in (1, calls // 7, calls // 2, calls - 1, calls):
        kill_at(forks, kit, tmp_path / str(point), undisturbed, point)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_many_points(tmp_path: Path, forks: "Forks", kit: "type[Kit]", undisturbed: dict[str, str]) -> None:
    calls = count_calls(forks, tmp_path)
    assert calls > 200
    points = range(1, calls + 1, 3)
    with ThreadPoolExecutor(2) as two:  # at once, each in a folder of its own
        list(two.map(lambda point: kill_at(forks, kit, tmp_path / str(point), undisturbed, point), points))


def kill_at_random(
    forks: "Forks", kit: "type[Kit]", folder: Path, undisturbed: dict[str, str], seed: int, seconds: float
) -> None:
    """One or two writers at once, of which one or both are killed within so many seconds."""
    choose = random.Random(seed)
    folder.mkdir()
    path = folder / "x.zarr"
    writers = [write(forks, path, parts=choose.choice(["missing", "all"])) for _ in range(choose.randint(1, 2))]
    for process in writers[: choose.randint(1, len(writers))]:
        time.sleep(choose.uniform(0, seconds))
        process.kill()
        assert process.code in (0, -signal.SIGKILL), process.err
    assert all(process.wait() in (0, -signal.SIGKILL) for process in writers), [process.err for process in writers]
    check_finish(forks, kit, path, undisturbed, processes=choose.randint(1, 2))
    shutil.rmtree(folder)


def duration(forks: "Forks", folder: Path) -> float:
    """Seconds that a writer takes where nobody disturbs it."""
    count_calls(forks, folder)  # the server may still be importing
    shutil.rmtree(folder / "counted.zarr")
    begin = time.monotonic()
    count_calls(forks, folder)
    return time.monotonic() - begin


def test_killed_at_a_few_moments(tmp_path: Path, forks: "Forks", kit: "type[Kit]", undisturbed: dict[str, str]) -> None:
    seconds = duration(forks, tmp_path)
    for seed in range(3):
        kill_at_random(forks, kit, tmp_path / str(seed), undisturbed, seed, seconds)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_many_moments(tmp_path: Path, forks: "Forks", kit: "type[Kit]", undisturbed: dict[str, str]) -> None:
    seconds = duration(forks, tmp_path)
    for seed in range(100, 130):
        kill_at_random(forks, kit, tmp_path / str(seed), undisturbed, seed, seconds)


def test_two_writers_of_the_same_parts(
    tmp_path: Path, forks: "Forks", kit: "type[Kit]", undisturbed: dict[str, str]
) -> None:
    """Both live on; of each part one is kept, whole."""
    path = tmp_path / "x.zarr"
    writers = [write(forks, path, parts="all") for _ in range(3)]
    assert [process.wait() for process in writers] == [0, 0, 0], [process.err for process in writers]
    check_finish(forks, kit, path, undisturbed)


def test_torn_commit_record(tmp_path: Path, kit: "type[Kit]", undisturbed: dict[str, str]) -> None:
    """A record of which only the first bytes came to the disk is none, wherever it was cut."""
    path = kit.make(tmp_path / "x.zarr", count=5)
    record = path / "parts" / "00001" / "zarr.json"
    whole = record.read_bytes()
    for cut in [*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        for torn in (whole[:cut], whole[:cut].ljust(len(whole), b"\0")):
            record.write_bytes(torn)
            writer = kit.writer(path, kit.spec(), kit.images(5))
            assert writer.pending() == [1]
            assert len(open_cache(path, allow_partial=True)) == 5 - len(writer.parts[1])
    kit.fill(writer)
    assert kit.tree(path) == undisturbed


def test_readers_of_a_cache_that_is_being_written(tmp_path: Path, forks: "Forks", kit: "type[Kit]") -> None:
    """What is committed can be read, and is right, while the rest is still being made."""
    path = kit.make(tmp_path / "x.zarr", count=5)
    boxes_of = {image_id: open_cache(path).targets(image_id).boxes for image_id in open_cache(path).image_ids.tolist()}
    shutil.rmtree(path)
    process = write(forks, path)
    lengths = set()
    while process.poll() is None:
        if (path / "zarr.json").exists():
            cache = open_cache(path, allow_partial=True)
            lengths.add(len(cache))
            for image_id in cache.image_ids.tolist():
                assert cache.targets(image_id).boxes.equal(boxes_of[image_id])
    assert process.code == 0, process.err
    assert len(open_cache(path)) == 5
    assert len(lengths) > 1, lengths


def test_a_finished_cache_is_not_written_to(tmp_path: Path, forks: "Forks", kit: "type[Kit]") -> None:
    path = kit.make(tmp_path / "x.zarr", count=5)
    times = {file: file.stat().st_mtime_ns for file in (path, *path.rglob("*"))}
    assert [process.wait() for process in [write(forks, path) for _ in range(2)]] == [0, 0]
    assert {file: file.stat().st_mtime_ns for file in (path, *path.rglob("*"))} == times
