"""Whole caches in object stores: written, resumed, copied, read by several processes, damaged, verified."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import obstore
import pytest
import torch

from kdpipe.cache import CacheError, TeacherCache, TeacherTargets, open_cache
from kdpipe.cache.store import client as client_module
from kdpipe.cache.store.bucket import Bucket
from kdpipe.cache.verify import verification
from kdpipe.cache.verify.verification import remove_faults, verify_cache

if TYPE_CHECKING:
    from tests.conftest import Forks

_count = iter(range(1_000_000))


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.02)


def keys(location: Bucket) -> list[str]:
    return sorted(meta["path"] for meta in location._list(""))


def download(location: Bucket, folder: Path) -> None:
    """As `aws s3 sync` does."""
    for key in keys(location):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(location.read(key) or b"")


def upload(folder: Path, location: Bucket) -> None:
    store = location._client.open()
    for file in folder.rglob("*"):
        if file.is_file():
            obstore.put(store, file.relative_to(folder).as_posix(), file)


def assert_equal(one: TeacherTargets, two: TeacherTargets) -> None:
    for name, value in vars(one).items():
        other = getattr(two, name)
        pairs = zip(value, other, strict=True) if isinstance(value, tuple) else [(value, other)]
        for a, b in pairs:
            np.testing.assert_array_equal(a, b, strict=True)


def assert_same(one: TeacherCache, two: TeacherCache) -> None:
    assert one.image_ids.tolist() == two.image_ids.tolist()
    for image_id in one.image_ids.tolist():
        assert_equal(one.targets(image_id), two.targets(image_id))
    head, other = one.head(), two.head()
    assert head.keys() == other.keys()
    assert all(torch.equal(head[name], other[name]) for name in head)


def damage(location: Bucket, key: str, change: Callable[[bytes], bytes | None]) -> None:
    data = change(location.read(key) or b"")
    store = location._client.open()
    obstore.delete(store, [key])
    if data is not None:
        obstore.put(store, key, data)


def verify(location: Bucket) -> verification.Verification:
    return verify_cache(location, lambda done, total: None, threads=2)


def test_the_same_files_as_in_a_folder(location: Bucket, tmp_path: Path, kit: Any) -> None:
    spec = kit.spec()
    kit.fill(kit.writer(location, spec, kit.images()))
    folder = kit.make(tmp_path / "x.zarr", spec)
    download(location, tmp_path / "copy.zarr")
    assert kit.tree(tmp_path / "copy.zarr") == kit.tree(folder)
    assert_same(open_cache(location), open_cache(folder))
    assert verify(location).faults == ()
    assert verify_cache(tmp_path / "copy.zarr", lambda done, total: None).faults == ()


def test_copied_from_a_folder(location: Bucket, cache_path: Path) -> None:
    upload(cache_path, location)
    assert_same(open_cache(location), open_cache(cache_path))
    assert verify(location).faults == ()
    assert verify(location).notes == ()


@pytest.mark.parametrize("changes", [{"tier": "predictions"}, {"tier": "objects"}, {"codec": "none"}])
def test_tiers_and_codecs(tmp_path: Path, kit: Any, changes: dict[str, str]) -> None:
    location = Bucket(f"memory://tiers-{next(_count)}", {})
    spec = kit.spec(**changes)
    kit.fill(kit.writer(location, spec, kit.images()))
    assert_same(open_cache(location), open_cache(kit.make(tmp_path / "x.zarr", spec)))


def test_resumed(location: Bucket, tmp_path: Path, kit: Any) -> None:
    writer = kit.writer(location, kit.spec(), kit.images())
    kit.fill(writer, [1])
    with pytest.raises(CacheError, match="incomplete"):
        open_cache(location)
    again = kit.writer(location, kit.spec(), kit.images())
    assert again.pending() == [number for number in range(len(again.parts)) if number != 1]
    kit.fill(again)
    assert again.pending() == []
    assert_same(open_cache(location), open_cache(kit.make(tmp_path / "x.zarr")))
    with pytest.raises(CacheError, match="was made with something else"):
        kit.writer(location, kit.spec(proposals=11), kit.images())


def test_nothing_there(location: Bucket) -> None:
    with pytest.raises(CacheError, match=f"There is no cache at {location}"):
        open_cache(location)
    obstore.put(location._client.open(), "something.txt", b"else")
    with pytest.raises(CacheError, match="is not a kdpipe cache"):
        open_cache(location)


def test_a_cache_that_another_process_is_about_to_make(location: Bucket, kit: Any, tmp_path: Path) -> None:
    """Files come before the record; whoever comes meanwhile, or after the other died, makes the cache."""
    folder = kit.make(tmp_path / "x.zarr")
    for file in (folder / "plan").rglob("*"):
        if file.is_file():
            obstore.put(location._client.open(), file.relative_to(folder).as_posix(), file)
    with pytest.raises(CacheError, match="There is no cache"):
        open_cache(location)
    kit.fill(kit.writer(location, kit.spec(), kit.images()))
    assert_same(open_cache(location), open_cache(folder))


def test_something_else_is_there(location: Bucket, kit: Any) -> None:
    obstore.put(location._client.open(), "something.txt", b"else")
    with pytest.raises(CacheError, match="is not a kdpipe cache"):
        kit.writer(location, kit.spec(), kit.images())
    assert keys(location) == ["something.txt"]


def test_two_writers_of_all_parts(location: Bucket, tmp_path: Path, kit: Any) -> None:
    """Whoever is second keeps what the first committed, and both are content."""
    assert kit.fill_at_once(lambda: location) == []
    download(location, tmp_path / "copy.zarr")
    assert kit.tree(tmp_path / "copy.zarr") == kit.tree(kit.make(tmp_path / "x.zarr"))


def flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(data) // 3] ^= 16
    return bytes(changed)


@pytest.mark.parametrize(
    "change",
    [lambda data: None, lambda data: b"", lambda data: data[: len(data) // 2], flipped],
    ids=["missing", "empty", "truncated", "flipped"],
)
@pytest.mark.parametrize("name", ["features/c.0", "boxes/c.0.0", "index/c.0.0", "files.json"])
def test_damage(kit: Any, cache_path: Path, name: str, change: Any) -> None:
    """Never a wrong target: a message that names the part, and `--repair` makes it good."""
    location = Bucket(f"memory://damage-{next(_count)}", {})
    upload(cache_path, location)
    (key,) = [key for key in keys(location) if key.startswith("parts/00001/") and key.endswith(f"/{name}")]
    cache = open_cache(location)
    good = open_cache(cache_path)
    damage(location, key, change)
    messages = []
    for image_id in cache.image_ids.tolist():
        try:
            assert_equal(cache.targets(image_id), good.targets(image_id))
        except CacheError as error:
            messages.append(str(error))
    assert len(messages) == 3 or (0 < len(messages) < 3 and change is flipped)
    assert all("part 1" in message for message in messages)
    verification = verify(location)
    assert verification.bad_parts == (1,)
    assert remove_faults(location, verification) == ["parts/00001"]
    writer = kit.writer(location, kit.spec(), kit.images())
    assert writer.pending() == [1]
    kit.fill(writer)
    assert verify(location).faults == ()
    assert_same(open_cache(location), good)


def test_damage_while_it_is_read(moto: Any, cache_path: Path) -> None:
    """Files that are cut off or removed after they were opened never read as zeros."""
    location = Bucket(f"s3://kdpipe/tests/read-{os.getpid()}", moto.options)
    upload(cache_path, location)
    cache, good = open_cache(location), open_cache(cache_path)
    first, second = cache.image_ids.tolist()[:2]
    assert_equal(cache.targets(first), good.targets(first))
    for key in keys(location):
        if key.startswith("parts/00000/") and "/features/c." in key:
            damage(location, key, lambda data: data[: len(data) // 8])
        elif key.startswith("parts/00000/") and "/logits/c." in key:
            damage(location, key, lambda data: None)
    with pytest.raises(CacheError, match=r"'features' of part 0.*damaged"):
        cache.targets(second, fields=["features"])
    with pytest.raises(CacheError, match=r"'logits' of part 0.*logits/c\.0\.0 is missing or cut off"):
        cache.targets(second, fields=["logits"])
    assert torch.equal(cache.targets(second, fields=["boxes"]).boxes, good.targets(second).boxes)


def test_gone_while_it_is_read(location: Bucket, cache_path: Path) -> None:
    upload(cache_path, location)
    cache = open_cache(location)
    obstore.delete(location._client.open(), keys(location))
    with pytest.raises(CacheError, match="is gone"):
        cache.targets(int(cache.image_ids[0]))


def test_stays_away_while_it_is_read(moto: Any, proxy: Any, cache_path: Path) -> None:
    options = {**moto.options, "endpoint": proxy.url, "patience": "0.3"}
    location = Bucket(f"s3://kdpipe/tests/away-read-{os.getpid()}", options)
    upload(cache_path, location)
    cache = open_cache(location)
    first, second = cache.image_ids.tolist()[:2]
    cache.targets(first)
    proxy.fault = lambda method, path: 503
    with pytest.raises(CacheError, match="503 Service Unavailable"):
        cache.targets(second)
    proxy.fault = lambda method, path: None
    assert_equal(cache.targets(second), open_cache(cache_path).targets(second))


READING = """
import sys
from pathlib import Path
import pickle
from kdpipe.cache import open_cache
cache = open_cache(pickle.loads(Path(sys.argv[1]).read_bytes()))
print([cache.targets(image_id, fields=["boxes", "features"]).boxes.tolist() for image_id in cache.image_ids.tolist()])
"""


def test_other_processes(moto: Any, cache_path: Path, forks: "Forks", tmp_path: Path) -> None:
    location = Bucket(f"s3://kdpipe/tests/processes-{os.getpid()}", moto.options)
    upload(cache_path, location)
    cache = open_cache(location)
    boxes = [cache.targets(int(image_id)).boxes.tolist() for image_id in cache.image_ids]
    (tmp_path / "location").write_bytes(pickle.dumps(location))
    readers = [forks.start(READING, tmp_path / "location", cwd=tmp_path) for _ in range(2)]
    for reader in readers:
        assert reader.wait() == 0, reader.err
        assert json.loads(reader.out) == boxes
