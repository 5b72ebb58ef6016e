import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kdpipe.cache import CacheError, open_cache
from kdpipe.cache.identity import canonical_json, digest_json
from kdpipe.cache.verify.verification import remove_faults, verify_cache

if TYPE_CHECKING:
    from tests.cache.conftest import Kit

ARRAYS = ("features", "scale", "boxes", "logits", "deltas", "embeddings", "index", "file_names")


KINDS = [("zstd", kind) for kind in ("start", "shard index", "cut", "gone", "metadata", "no metadata")]


BITS = [(codec, kind) for codec in ("zstd", "lz4", "none") for kind in ("a third", "a half")]


@pytest.mark.parametrize(("codec", "damage"), [*KINDS, *BITS, ("none", "start"), ("none", "shard index")])
@pytest.mark.parametrize("name", [*ARRAYS, "embedding_scale", "roi_features", "roi_scale", "roi_rows"])
def test_damage_is_named(tmp_path: Path, kit: "type[Kit]", codec: str, name: str, damage: str) -> None:
    tier, image_id = ("objects", 993) if name.startswith("roi") else ("pyramid", 1000)  # 1000 has no objects
    path = tmp_path / "x.zarr"
    kit.fill(kit.writer(path, kit.spec(tier=tier, codec=codec), kit.images(2), part_size=10**9))
    folder = kit.files(path, "parts/00000") / name
    (file,) = folder.glob("c.*")
    if damage == "start":
        kit.flip_bit(file, at=0.0)
    elif damage == "a third":
        kit.flip_bit(file, at=1 / 3)
    elif damage == "a half":
        kit.flip_bit(file, at=1 / 2)
    elif damage == "shard index":
        data = bytearray(file.read_bytes())
        data[-8] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "gone":
        file.unlink()
    elif damage == "metadata":
        text = (folder / "zarr.json").read_text()
        (folder / "zarr.json").write_text(text.replace('"fill_value": 0', '"fill_value": 1'))
    else:
        (folder / "zarr.json").unlink()
    cache = open_cache(path)
    with pytest.raises(CacheError) as caught:
        cache.targets(image_id)
    message = str(caught.value)
    assert f"array '{name}' of part 0" in message
    assert f"Run `kdpipe verify {path} --repair`, then `kdpipe cache-teacher` with the same options" in message
    if name not in ("index", "file_names") and damage in ("start", "a third", "a half", "shard index", "cut", "gone"):
        assert f"needed for image {image_id}" in message


def test_a_file_that_goes_while_the_cache_is_open(cache_path: Path, kit: "type[Kit]") -> None:
    cache = open_cache(cache_path)
    cache.targets(1000)
    (kit.files(cache_path, "parts/00000") / "features" / "c.0").unlink()
    with pytest.raises(CacheError, match=r"'features' of part 0, needed for image 1000"):
        cache.targets(1000)


def test_following_the_advice_mends_the_cache(tmp_path: Path, cache_path: Path, kit: "type[Kit]") -> None:
    before = kit.tree(cache_path)
    kit.flip_bit(kit.files(cache_path, "parts/00001") / "logits" / "c.0.0")
    assert remove_faults(cache_path, verify_cache(cache_path, lambda done, total: None)) == ["parts/00001"]
    kit.make(cache_path)
    assert kit.tree(cache_path) == before


@pytest.mark.parametrize("damage", ["remove", "truncate", "bit"])
def test_an_incomplete_cache(cache_path: Path, kit: "type[Kit]", damage: str) -> None:
    record = cache_path / "parts" / "00001" / "zarr.json"
    if damage == "remove":
        shutil.rmtree(record.parent)
    elif damage == "truncate":
        record.write_bytes(record.read_bytes()[:-1])
        record.write_bytes(record.read_bytes()[:100])
    else:
        kit.flip_bit(record, at=0.5)
    count = len(list((cache_path / "parts").glob("0*"))) + (damage == "remove")
    with pytest.raises(CacheError, match=rf"incomplete: 1 of {count} parts are missing or damaged \(part 1\)\. Run"):
        open_cache(cache_path)
    cache = open_cache(cache_path, allow_partial=True)
    writer = kit.writer(cache_path, kit.spec(), kit.images())
    missing_ids = [kit.images()[n].image_id for n in writer.parts[1]]
    assert sorted([*cache.image_ids.tolist(), *missing_ids]) == sorted(image.image_id for image in kit.images())
    assert cache.targets(1000).image_id == 1000
    with pytest.raises(CacheError, match="is not in the cache"):
        cache.targets(missing_ids[0])


def test_paths_that_are_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"There is no cache at"):
        open_cache(tmp_path / "nothing.zarr")
    with pytest.raises(CacheError, match=r"has no zarr\.json"):
        open_cache(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="not a kdpipe cache"):
        open_cache(tmp_path / "file")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(CacheError, match="no `kdpipe` attribute"):
        open_cache(str(tmp_path))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (9, r"format version 9, and this kdpipe reads version 1: install a newer"),
        (2, "development version"),
        (0, "found 0"),
    ],
)
def test_another_format(cache_path: Path, version: int, message: str) -> None:
    file = cache_path / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"]["kdpipe"]["spec"] = {"version": version, "something": "new"}
    file.write_text(json.dumps(content))
    with pytest.raises(CacheError, match=message):
        open_cache(cache_path)


@pytest.mark.parametrize("damage", ["cut", "value", "no spec", "plan", "plan metadata", "plan gone"])
def test_a_damaged_root(cache_path: Path, kit: "type[Kit]", damage: str) -> None:
    file = cache_path / "zarr.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    elif damage == "value":
        file.write_text(file.read_text().replace('"channels":6', '"channels":7'))
    elif damage == "no spec":
        content = json.loads(file.read_text())
        del content["attributes"]["kdpipe"]["spec"]
        file.write_text(json.dumps(content))
    elif damage == "plan":
        kit.flip_bit(kit.files(cache_path, "plan") / "image_ids" / "c.0", at=0.3)
    elif damage == "plan metadata":
        kit.flip_bit(kit.files(cache_path, "plan") / "part_starts" / "zarr.json")
    else:
        (kit.files(cache_path, "plan") / "part_starts" / "c.0").unlink()
    with pytest.raises(CacheError, match="damaged"):
        open_cache(cache_path)
    before = kit.tree(cache_path)
    with pytest.raises(CacheError, match="damaged"):
        kit.writer(cache_path, kit.spec(), kit.images())
    assert kit.tree(cache_path) == before


def test_a_sound_checksum_over_a_wrong_spec(cache_path: Path) -> None:
    group = json.loads((cache_path / "zarr.json").read_text())
    record = group["attributes"]["kdpipe"]
    del record["spec"]["channels"], record["checksum"]
    record["checksum"] = digest_json(record)
    (cache_path / "zarr.json").write_bytes(canonical_json(group))
    with pytest.raises(CacheError, match="missing entries"):
        open_cache(cache_path)


@pytest.mark.parametrize("damage", ["bit", "gone", "record", "never written"])
def test_a_damaged_head(cache_path: Path, kit: "type[Kit]", damage: str) -> None:
    folder = cache_path / "head"
    if damage == "bit":
        kit.flip_bit(kit.files(cache_path, "head") / "roi_head.fc.weight" / "c.0.0")
    elif damage == "gone":
        (kit.files(cache_path, "head") / "roi_head.fc.weight" / "c.0.0").unlink()
    elif damage == "record":
        kit.flip_bit(folder / "zarr.json", at=0.5)
    else:
        shutil.rmtree(folder)
    message = "head in the cache .* is damaged" if damage in ("bit", "gone") else "head in the cache .* is missing"
    with pytest.raises(CacheError, match=message):
        open_cache(cache_path).head()


def test_parts_and_heads_of_another_cache(tmp_path: Path, kit: "type[Kit]", cache_path: Path) -> None:
    other = tmp_path / "other.zarr"
    kit.fill(kit.writer(other, kit.spec(), kit.images(), identity={"teacher": "t2", "data": "d1"}))
    for place in ("head", "parts/00001"):
        shutil.rmtree(cache_path / place)
        shutil.copytree(other / place, cache_path / place)
    with pytest.raises(CacheError, match=r"\(part 1\)"):
        open_cache(cache_path)
    cache = open_cache(cache_path, allow_partial=True)
    with pytest.raises(CacheError, match="made for another cache"):
        cache.head()
    verification = verify_cache(cache_path, lambda done, total: None)
    assert [(fault.where, fault.part) for fault in verification.faults] == [("the head", None), ("part 1", 1)]
    writer = kit.writer(cache_path, kit.spec(), kit.images())
    assert writer.pending() == [1]
    kit.fill(writer)
    assert kit.tree(cache_path) == kit.tree(kit.make(tmp_path / "y.zarr"))
