"""The local copy of a part of a cache: what is copied, who reads it, and what happens when it is bad or too large."""

import errno
import itertools
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import obstore
import pytest

from kdpipe.cache import CacheError, TeacherCache, open_cache
from kdpipe.cache.read.local_copy import LocalCopy
from kdpipe.cache.store.bucket import Bucket
from kdpipe.cache.store.folder import Folder
from kdpipe.cache.store.location import Location
from kdpipe.cache.store.temporary import take_lock

_count = itertools.count()
ALL = ("features", "boxes", "logits", "deltas", "embeddings")


@pytest.fixture
def remote(cache_path: Path) -> Bucket:
    """A finished cache in an object store."""
    location = Bucket(f"memory://local-copy-{next(_count)}", {})
    upload(cache_path, location)
    return location


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where the copies go; it is not there yet."""
    return tmp_path / "disk"


def upload(folder: Path, location: Bucket) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            obstore.put(location._client.open(), file.relative_to(folder).as_posix(), file)


def fill(location: Location, folder: Path, limit: int | None = None, fields: tuple[str, ...] = ALL) -> list[str]:
    """Copy, and return what was said."""
    lines: list[str] = []
    with LocalCopy(location, folder, limit, fields, lines.append) as copy:
        copy.wait()
    return lines


def read(cache: TeacherCache) -> dict[int, Any]:
    return {
        i: [None if level is None else level.tolist() for level in cache.targets(i).features or ()]
        for i in cache.image_ids.tolist()
    }


def lose_arrays(location: Bucket, *names: str) -> None:
    """Remove arrays from the store, so that only copies can be read."""
    keys = [meta["path"] for meta in location._list("parts")]
    obstore.delete(location._client.open(), [key for key in keys if key.count("/") > 3 and key.split("/")[3] in names])


def test_all_is_read_from_the_copy(remote: Bucket, cache_path: Path, disk: Path) -> None:
    assert fill(remote, disk)[0].endswith("all parts, 0.0 GiB.")
    arrays = [key["path"] for key in remote._list("parts") if "/c." in key["path"] or key["path"].count("/") == 4]
    (copy,) = disk.iterdir()
    for key in arrays:
        assert (copy / key).read_bytes() == (cache_path / key).read_bytes()
    cache = open_cache(remote)
    lose_arrays(remote, *(path.name for path in next(copy.glob("parts/*/*")).iterdir()))
    assert read(cache) == read(open_cache(cache_path))


def test_as_many_parts_as_fit_in_order(remote: Bucket, cache_path: Path, disk: Path) -> None:
    first = Folder(cache_path).size("parts/00000")
    (line,) = fill(remote, disk, limit=first + 100)
    assert "the first 1 of 3 parts" in line
    (copy,) = disk.iterdir()
    assert [path.name for path in (copy / "parts").iterdir()] == ["00000"]
    assert read(open_cache(remote)) == read(open_cache(cache_path))
    before = Folder(copy).size("")
    assert before <= first + 100
    fill(remote, disk, limit=first + 100)  # a later run: the same part
    assert Folder(copy).size("") == before
    assert "all parts" in fill(remote, disk)[0]


def test_only_the_fields_that_are_read(remote: Bucket, disk: Path) -> None:
    fill(remote, disk, fields=("boxes", "logits"))
    (copy,) = disk.glob("kdpipe-*")
    names = {path.name for path in copy.glob("parts/*/*/*")}
    assert names == {"boxes", "logits", "index", "file_names"}
    fill(remote, disk, fields=("boxes", "features"))
    assert {path.name for path in copy.glob("parts/*/*/*")} == names | {"features", "scale"}


def test_open_readers_take_it_up(remote: Bucket, cache_path: Path, disk: Path) -> None:
    cache = open_cache(remote)
    good = read(cache)
    fill(remote, disk)
    lose_arrays(remote, "features", "scale")
    assert read(cache) == good


def test_of_a_folder(cache_path: Path, disk: Path) -> None:
    """Such as one of a network file system."""
    location = Folder(cache_path)
    good = read(open_cache(location))
    fill(location, disk)
    cache = open_cache(location)
    for array in cache_path.glob("parts/*/*/features"):
        shutil.rmtree(array)
    assert read(cache) == good


def test_caches_do_not_mix(remote: Bucket, tmp_path: Path, disk: Path, kit: Any) -> None:
    disk.mkdir()
    (disk / "notes.txt").write_text("mine")
    other = Bucket(f"memory://other-{next(_count)}", {})
    upload(kit.make(tmp_path / "other.zarr", kit.spec(proposals=9)), other)
    fill(remote, disk)
    fill(other, disk)
    assert len(list(disk.glob("kdpipe-*"))) == 2
    assert (disk / "notes.txt").read_text() == "mine"
    assert len(list(disk.iterdir())) == 3
    assert read(open_cache(other)) == read(open_cache(tmp_path / "other.zarr"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "gone"])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_bad_copy_is_not_used(
    remote: Bucket, cache_path: Path, disk: Path, kit: Any, damage: str, is_open: bool, caplog: Any
) -> None:
    good = read(open_cache(cache_path))
    fill(remote, disk)
    cache = open_cache(remote)
    if is_open:
        read(cache)
    (file,) = disk.glob("*/parts/00001/*/features/c.0")
    if damage == "gone":
        shutil.rmtree(disk)
    elif damage == "missing":
        file.unlink()
    elif damage == "truncated":
        os.truncate(file, 100)
    else:
        kit.flip_bit(file)
    with caplog.at_level(logging.WARNING, "kdpipe"):
        assert read(cache) == good
    messages = [record.getMessage() for record in caplog.records]
    if damage != "gone":
        assert len(messages) == 1
        assert "The local copy of the array 'features' of part 1 is damaged" in messages[0]


def test_damage_of_the_cache_is_still_told(remote: Bucket, disk: Path, kit: Any) -> None:
    (key,) = [key["path"] for key in remote._list("parts/00001") if key["path"].endswith("features/c.0")]
    data = bytearray(remote.read(key) or b"")
    data[50] ^= 1
    obstore.put(remote._client.open(), key, bytes(data))
    (line,) = fill(remote, disk)
    assert f"{key} of {remote}, which has other content than was written" in line
    assert f"What is not copied is read from {remote}" in line
    assert not list(disk.glob("*/parts/00001/*/features"))
    with pytest.raises(CacheError, match=r"'features' of part 1.*damaged"):
        read(open_cache(remote))


def test_full_disk(remote: Bucket, cache_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = itertools.count()

    def fsync(handle: int) -> None:
        if next(writes) > 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    (line,) = fill(remote, disk)
    assert "The local copy ends here: the disk of" in line
    assert "is full. What is not copied is read from memory://" in line
    assert not list(disk.rglob("*.tmp"))
    assert read(open_cache(remote)) == read(open_cache(cache_path))


def test_a_place_that_is_none(remote: Bucket, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match=r"local copy cannot be made in .*file.*--local-copy"):
        LocalCopy(remote, tmp_path / "file", None, ALL, print)


def test_one_process_of_a_node_copies(remote: Bucket, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.cache.read.local_copy._WAIT_SECONDS", 0.02)
    lines: list[str] = []
    copy = LocalCopy(remote, disk, None, ALL, lines.append)
    (folder,) = disk.iterdir()
    lock = take_lock(folder)
    assert lock is not None
    with copy:
        threading.Event().wait(0.2)
        assert not list(folder.glob("parts"))
        os.close(lock)  # that process ended
        copy.wait()
    assert "all parts" in lines[0]
    lock = take_lock(folder)
    assert lock is not None
    with LocalCopy(remote, disk, None, ALL, lines.append) as copy:
        pass  # a run that ends meanwhile
    copy.wait()
    assert len(lines) == 1
    os.close(lock)


def test_a_run_that_ends_leaves_no_halves(remote: Bucket, disk: Path) -> None:
    lines: list[str] = []
    copy = LocalCopy(remote, disk, None, ALL, lines.append)
    copy._stop.set()
    copy._thread.start()
    copy.wait()
    assert lines == []
    assert [path.name for path in disk.glob("*/*")] in ([".lock"], [".lock", "parts"], ["parts", ".lock"])
    assert not list(disk.glob("*/parts/*/*/*"))
    killed = next(disk.iterdir()) / "parts" / "00000" / "0123456789abcdef" / ".features.0123456789abcdef.tmp"
    killed.mkdir(parents=True)
    fill(remote, disk)
    assert not killed.exists()
