"""Uncompressed arrays are the file itself, mapped: they outlive it, do not change it, and hold nothing else."""

import errno
import gc
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from kdpipe.cache import CacheError, TeacherTargets, open_cache
from kdpipe.cache.mapped import map_file, populate

if TYPE_CHECKING:
    from tests.cache.conftest import Kit

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")


@pytest.fixture
def path(tmp_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("kdpipe.cache.array_reader._LEAST_MAPPED_BYTES", 1)
    return kit.make(tmp_path / "x.zarr", kit.spec(codec="none"), count=3)


def mappings(path: Path) -> int:
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def pyramids(targets: TeacherTargets) -> list[torch.Tensor]:
    return [level for level in targets.features or () if level is not None]


def equal(a: TeacherTargets, b: TeacherTargets) -> bool:
    return torch.equal(a.boxes, b.boxes) and all(map(torch.equal, pyramids(a), pyramids(b)))


@linux
def test_a_mapping_lives_as_long_as_the_last_tensor_and_holds_no_descriptor(path: Path) -> None:
    cache = open_cache(path)
    cache.targets(1000)
    gc.collect()
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    kept = [cache.targets(image_id) for image_id in cache.image_ids.tolist()]
    level = pyramids(kept[0])[0]
    expected = level.clone()
    assert mappings(path) >= len(kept)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == descriptors
    del kept
    gc.collect()
    assert mappings(path) == 1
    assert torch.equal(level, expected)
    del level
    gc.collect()
    assert mappings(path) == 0


def test_what_is_written_to_a_tensor_stays_there(path: Path) -> None:
    cache = open_cache(path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    targets, other = cache.targets(1000), cache.targets(1000)
    for level in pyramids(targets):
        level.zero_()
    assert all(file.read_bytes() == data for file, data in before.items())
    assert equal(cache.targets(1000), other)


def test_tensors_outlive_the_file(path: Path) -> None:
    cache = open_cache(path)
    targets = cache.targets(1000)
    expected = [level.clone() for level in pyramids(targets)]
    for file in path.rglob("c.*"):
        file.unlink()
    assert all(map(torch.equal, pyramids(targets), expected))
    with pytest.raises(CacheError, match="damaged"):
        cache.targets(1000)


@pytest.mark.parametrize("lacking", ["kdpipe.cache.array_reader.map_file", "kdpipe.cache.stored.populate"])
def test_where_the_system_cannot_map(path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    cache = open_cache(path)
    expected = [cache.targets(image_id) for image_id in cache.image_ids.tolist()]
    monkeypatch.setattr(lacking, lambda *arguments: None)
    found = [cache.targets(image_id) for image_id in cache.image_ids.tolist()]
    assert all(map(equal, found, expected))


def test_an_error_of_the_disk_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(path)
    cache.targets(1000)
    monkeypatch.setattr("kdpipe.cache.stored.populate", lambda memory: False)

    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(CacheError, match=r"cannot be read \(Input/output error"):
        cache.targets(1000)


@linux
def test_populate_says_where_there_is_no_file_any_more(tmp_path: Path) -> None:
    """Touching such memory would kill the process."""
    file = tmp_path / "x"
    file.write_bytes(bytes(range(256)) * 64)
    with file.open("r+b") as opened:
        memory = map_file(opened.fileno(), 100, 16000)
        assert memory is not None
        assert populate(memory)
        np.testing.assert_array_equal(memory, np.frombuffer(file.read_bytes(), np.uint8)[100:16100])
        opened.truncate(4096)
        assert not populate(memory)
