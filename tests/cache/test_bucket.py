"""Object stores as the place of a cache: what appears there, what stays, what is told, and what goes wrong."""

import asyncio
import hashlib
import os
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest

from kdpipe.cache import open_cache
from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.record import check_sizes, files_key, read_files, read_record, write_record
from kdpipe.cache.store import bucket as bucket_module
from kdpipe.cache.store import client as client_module
from kdpipe.cache.store.bucket import Bucket
from kdpipe.cache.store.folder import Folder
from kdpipe.cache.store.location import GoneError, Location

_count = iter(range(1_000_000))


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for seconds."""
    monkeypatch.setattr(client_module, "_FIRST_PATIENCE", 1.0)
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.02)


@pytest.fixture
def faulty(moto: Any, proxy: Any) -> Bucket:
    """An empty place in an object store behind a proxy."""
    return Bucket(f"s3://kdpipe/tests/faulty-{os.getpid()}-{next(_count)}", {**moto.options, "endpoint": proxy.url})


CONTENT = {"boxes/c.0": b"boxes" * 1000, "boxes/zarr.json": b"{}", "index/c.0": bytes(range(256)) * 300}


def make(location: Location, key: str, content: dict[str, bytes] | None = None) -> bool:
    """Write and publish a group of files with a record."""
    content = CONTENT if content is None else content
    with location.staging(key) as folder:
        for name, data in content.items():
            (folder / "new" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "new" / name).write_bytes(data)
        files = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()}
        write_record(folder, {"part": 0}, files)
        return location.publish(folder, key)


def everything(location: Bucket) -> dict[str, bytes]:
    store = location._client.open()
    return {meta["path"]: bytes(obstore.get(store, meta["path"]).bytes()) for meta in obstore.list(store).collect()}


def test_appears_as_it_does_in_a_folder(location: Bucket, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "cache")
    assert location.check_new()
    for each in (location, folder):
        assert make(each, "parts/00000")
    files = sorted(path for path in folder.path.rglob("*") if path.is_file())
    assert everything(location) == {str(path.relative_to(folder.path)): path.read_bytes() for path in files}
    assert not location.check_new()
    record = read_record(location, "parts/00000")
    assert record is not None
    place = files_key("parts/00000", record)
    listed = read_files(location, place, record["files"])
    assert listed is not None
    assert check_sizes(location, place, listed) == []
    assert location.read("parts/00001/zarr.json") is None
    assert b"".join(location.stream(f"{place}/index/c.0")) == CONTENT["index/c.0"]
    with pytest.raises(GoneError):
        list(location.stream(f"{place}/none"))


def test_the_second_writer_is_told(location: Bucket) -> None:
    assert make(location, "parts/00000")
    before = everything(location)
    assert not make(location, "parts/00000")
    assert everything(location) == before
    assert not make(location, "parts/00000", {"boxes/c.0": b"other"})
    after = everything(location)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2  # its files, which no record names


def test_record_comes_last(faulty: Bucket, proxy: Any) -> None:
    make(faulty, "parts/00000")
    uploads = [request.rpartition("/")[2] for request in proxy.requests if request.startswith("PUT")]
    assert uploads[-1] == "zarr.json"
    assert len(uploads) == len(CONTENT) + 2


def test_large_files_go_and_come_in_order(location: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "_BLOCK", 1000)
    data = os.urandom(12_500)
    make(location, "head", {"big": data, "empty": b""})
    record = read_record(location, "head")
    assert record is not None
    blocks = list(location.stream(f"{files_key('head', record)}/big"))
    assert b"".join(blocks) == data
    assert max(map(len, blocks)) == 1000
    assert list(location.stream(f"{files_key('head', record)}/empty")) == []


def test_discard(faulty: Bucket, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make(faulty, "parts/00000")
    make(faulty, "parts/000001")
    before = everything(faulty)
    faulty.discard("parts/00000")
    assert faulty.read("parts/00000/zarr.json") is None
    assert len(everything(faulty)) == len(before) - 1  # the rest may be that of a writer at work
    monkeypatch.setattr(bucket_module, "_MIN_AGE", timedelta(seconds=-5))
    proxy.requests.clear()
    faulty.discard("parts/00000")
    assert {name.split("/")[1] for name in everything(faulty)} == {"000001"}
    faulty.discard("parts/00000")
    assert faulty.read("parts/000001/zarr.json") is not None
    faulty.discard("parts/000001/zarr.json")
    assert faulty.read("parts/000001/zarr.json") is None


def test_files_that_were_taken_for_leftovers(faulty: Bucket, proxy: Any) -> None:
    """Another process removes the old files of a dead writer while the same ones are uploaded."""
    store = faulty._client.open()

    def fault(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("parts/00000/zarr.json"):
            proxy.fault = lambda method, path: None
            obstore.delete(store, [name for name in everything(faulty) if name.endswith("c.0")])

    proxy.fault = fault
    make(faulty, "parts/00000")
    assert len(everything(faulty)) == len(CONTENT) + 2


def test_staging_is_removed(location: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make(location, "parts/00000")
    left = tmp_path / f"kdpipe-{os.getuid()}"
    assert list(left.iterdir()) == []
    assert left.stat().st_mode & 0o077 == 0
    (left / ".parts-00000.0123456789abcdef.tmp").mkdir()  # of a process that was killed
    with location.staging("parts/00001"):
        location.tidy()
        assert [path.name.split(".")[1] for path in left.iterdir()] == ["parts-00001"]


def test_leftovers(location: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    make(location, "parts/00000")
    make(location, "parts/00000", {"boxes/c.0": b"other"})
    known_keys = {"parts/00000/zarr.json"}
    record = read_record(location, "parts/00000")
    assert record is not None
    place = files_key("parts/00000", record)
    known_keys |= {f"{place}/files.json", f"{place}/index/", *(f"{place}/{name}" for name in CONTENT)}
    before = everything(location)
    store = location._client.open()
    obstore.put(store, "parts/00003/0123456789abcdef/boxes/c.0", b"of a writer that died")
    obstore.put(store, "notes/mine.txt", b"of the user")
    obstore.put(store, f"{place}/boxes/more", b"of the user")
    (other,) = {"/".join(name.split("/")[:3]) for name in before if name.count("/") > 2} - {place}
    leftovers = {left.key: (left.is_removable, left.is_fault) for left in location.leftovers(known_keys)}
    assert leftovers.pop(other) == (False, False)
    assert leftovers == {
        "parts/00003/0123456789abcdef": (False, False),
        "notes": (False, True),
        f"{place}/boxes/more": (False, True),
    }
    monkeypatch.setattr(bucket_module, "_MIN_AGE", timedelta(0))
    leftovers = {left.key: (left.is_removable, left.is_fault) for left in location.leftovers(known_keys)}
    assert leftovers["parts/00003/0123456789abcdef"] == leftovers[other] == (True, True)
    assert leftovers["notes"] == leftovers[f"{place}/boxes/more"] == (False, True)
    location.discard(other)
    location.discard("parts/00003/0123456789abcdef")
    assert {left.key for left in location.leftovers(known_keys)} == {"notes", f"{place}/boxes/more"}


def test_not_within_another_cache(moto: Any) -> None:
    outer = f"s3://kdpipe/outer-{os.getpid()}-{next(_count)}"
    make(Bucket(outer, moto.options), "")
    inner = Bucket(f"{outer}/a/b", moto.options)
    with pytest.raises(CacheError, match="lies in a cache at /outer"):
        inner.check_new()
    assert Bucket(f"{outer}-2", moto.options).check_new()


def fetch(location: Bucket, key: str, start: int, stop: int) -> bytes:
    return asyncio.run(location.fetch(key, start, stop))


def test_fetched_whole_or_not_at_all(location: Bucket) -> None:
    store = location._client.open()
    obstore.put(store, "short", b"12345")
    obstore.put(store, "empty", b"")
    assert fetch(location, "short", 1, 3) == b"23"
    assert fetch(location, "short", 0, 5) == b"12345"
    for key, start, stop in (("none", 0, 2), ("short", 3, 6), ("short", 10, 20), ("empty", 0, 1)):
        with pytest.raises(GoneError, match=f"{key} is missing or cut off"):
            fetch(location, key, start, stop)


def test_few_requests(faulty: Bucket, proxy: Any, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per sample one of each array, whose chunks lie one behind the other; the index of a shard is asked for once."""
    monkeypatch.setattr("kdpipe.cache.format.layout._CHUNK_BYTES", 100)
    spec = kit.spec(tier="embeddings", dtype="float16")
    kit.fill(kit.writer(faulty, spec, kit.images(4), part_size=1 << 30))
    cache = open_cache(faulty)
    first, second = cache.image_ids.tolist()[:2]
    cache.targets(first)
    proxy.requests.clear()
    good = cache.targets(second)
    assert sorted(request.split("/")[-2] for request in proxy.requests) == ["boxes", "deltas", "embeddings", "logits"]
    monkeypatch.setattr("kdpipe.cache.read.range_array._REQUEST_BYTES", 1)
    proxy.requests.clear()
    again = cache.targets(second)
    assert len(proxy.requests) > 4  # every chunk by itself
    for name in ("boxes", "deltas", "embeddings", "logits"):
        assert getattr(good, name).tolist() == getattr(again, name).tolist()


def test_arrays_of_several_shards(location: Bucket, tmp_path: Path, kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.cache.format.layout._SHARD_BYTES", 200)
    monkeypatch.setattr("kdpipe.cache.format.layout._CHUNK_BYTES", 100)
    kit.fill(kit.writer(location, kit.spec(), kit.images(), part_size=1 << 30))
    assert [meta["path"] for meta in location._list("parts") if meta["path"].endswith("embeddings/c.1.0")]
    remote, here = open_cache(location), open_cache(kit.make(tmp_path / "x.zarr"))
    for image_id in here.image_ids.tolist():
        one, two = remote.targets(image_id), here.targets(image_id)
        for name in ("boxes", "logits", "deltas", "embeddings"):
            assert getattr(one, name).tolist() == getattr(two, name).tolist()


def test_goes_to_other_processes(location: Bucket) -> None:
    make(location, "parts/00000")
    assert read_record(pickle.loads(pickle.dumps(location)), "parts/00000") == read_record(location, "parts/00000")


def test_a_forked_process_is_told(moto: Any) -> None:
    location = Bucket(f"s3://kdpipe/tests/forked-{os.getpid()}", moto.options)
    make(location, "parts/00000")
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        with os.fdopen(writing, "w") as out:
            try:
                location.read("parts/00000/zarr.json")
            except CacheError as error:
                out.write(str(error))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        assert "forkserver" in answer.read()
    os.waitpid(pid, 0)
