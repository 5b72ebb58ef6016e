"""Caches on a real S3 server, SeaweedFS: with signatures, rights, and a server that is killed and started again."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kdpipe.cache import CacheError, TeacherCache, open_cache
from kdpipe.cache.store.bucket import Bucket
from kdpipe.cache.verify.verification import remove_faults, verify_cache

pytestmark = pytest.mark.slow

URL = "s3://kdpipe/caches/shapes.zarr"


def boxes(cache: TeacherCache) -> list[Any]:
    return [cache.targets(image_id).boxes.tolist() for image_id in cache.image_ids.tolist()]


def download(location: Bucket, folder: Path) -> None:
    for meta in location._list(""):
        (folder / meta["path"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / meta["path"]).write_bytes(location.read(meta["path"]) or b"")


def test_the_whole_way(weed: Any, kit: Any, tmp_path: Path) -> None:
    location = Bucket(URL, weed.options)
    kit.fill(kit.writer(location, kit.spec(), kit.images()))
    kit.make(tmp_path / "x.zarr")
    download(location, tmp_path / "copy.zarr")
    assert kit.tree(tmp_path / "copy.zarr") == kit.tree(tmp_path / "x.zarr")
    assert boxes(open_cache(location)) == boxes(open_cache(tmp_path / "x.zarr"))
    assert verify_cache(location, lambda done, total: None).faults == ()
    location.discard("parts/00001/zarr.json")
    with pytest.raises(CacheError, match="incomplete"):
        open_cache(location)
    kit.fill(kit.writer(location, kit.spec(), kit.images()))
    assert verify_cache(location, lambda done, total: None).faults == ()


def test_killed_in_the_middle_of_a_part(weed: Any, kit: Any, tmp_path: Path) -> None:
    """The server dies again and again while parts are written, and comes back: nothing is lost, nothing is wrong."""
    location = Bucket(URL, weed.options)
    writer = kit.writer(location, kit.spec(), kit.images(30), part_size=3_000)
    done = threading.Event()
    deaths = 0

    def write() -> None:
        kit.fill(writer)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set() and thread.is_alive() and deaths < 3:
        time.sleep(0.4)
        weed.stop()
        time.sleep(0.5)
        weed.start()
        deaths += 1
    thread.join()
    assert done.is_set()
    assert deaths > 0
    local = kit.writer(tmp_path / "x.zarr", kit.spec(), kit.images(30), part_size=3_000)
    kit.fill(local)
    verification = verify_cache(location, lambda done, total: None)
    if verification.faults:  # the server itself may lose what it had not yet written to its disk
        remove_faults(location, verification)
        kit.fill(kit.writer(location, kit.spec(), kit.images(30), part_size=3_000))
        assert verify_cache(location, lambda done, total: None).faults == ()
    assert boxes(open_cache(location)) == boxes(open_cache(tmp_path / "x.zarr"))


def test_killed_while_it_is_read(weed: Any, kit: Any, tmp_path: Path) -> None:
    location = Bucket(URL, weed.options)
    kit.fill(kit.writer(location, kit.spec(), kit.images()))
    good = boxes(open_cache(kit.make(tmp_path / "x.zarr")))
    cache = open_cache(location)
    assert cache.targets(int(cache.image_ids[0])).boxes.tolist() == good[0]
    weed.stop()
    threading.Timer(1.5, weed.start).start()
    assert boxes(cache) == good


def test_two_writers(weed: Any, kit: Any, tmp_path: Path) -> None:
    assert kit.fill_at_once(lambda: Bucket(URL, weed.options)) == []
    download(Bucket(URL, weed.options), tmp_path / "copy.zarr")
    assert kit.tree(tmp_path / "copy.zarr") == kit.tree(kit.make(tmp_path / "x.zarr"))


def test_rights(weed: Any, kit: Any) -> None:
    kit.fill(kit.writer(Bucket(URL, weed.options), kit.spec(), kit.images()))
    reader = Bucket(URL, {**weed.options, "access_key_id": "reader"})
    assert len(open_cache(reader)) == 7
    assert verify_cache(reader, lambda done, total: None).faults == ()
    other = Bucket("s3://kdpipe/other.zarr", {**weed.options, "access_key_id": "reader"})
    with pytest.raises(CacheError, match=r"other\.zarr must not be read or written.*403 Forbidden \(AccessDenied\)"):
        kit.writer(other, kit.spec(), kit.images())
    for options, message in (
        ({"secret_access_key": "wrong-one"}, r"not accepted: it answers 403 Forbidden \(SignatureDoesNotMatch\)"),
        ({"access_key_id": "nobody"}, r"not accepted: it answers 403 Forbidden \(InvalidAccessKeyId\)"),
        ({"skip_signature": "true"}, "must not be read"),
    ):
        with pytest.raises(CacheError, match=message) as error:
            open_cache(Bucket(URL, {**weed.options, **options}))
        assert "wrong-one" not in str(error.value)
    with pytest.raises(CacheError, match="no such bucket"):
        open_cache(Bucket("s3://missing/x.zarr", weed.options))
