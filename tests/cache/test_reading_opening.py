"""What is done to open a cache, counted in files and not in seconds."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kdpipe.cache import CacheError, open_cache
from kdpipe.cache.format.record import read_part_record
from kdpipe.cache.read.root import read_root
from kdpipe.cache.store.location import part_key

if TYPE_CHECKING:
    from tests.cache.conftest import Kit

_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_note)


def opened_below(folder: Path, act: Callable[[], object]) -> list[str]:
    """Files that are opened meanwhile, relative to the folder."""
    global _opened
    _opened = []
    try:
        act()
        names = _opened
    finally:
        _opened = None
    return [str(Path(name).relative_to(folder)) for name in names if name.startswith(f"{folder}/")]


def make(path: Path, kit: "type[Kit]", parts: int) -> Path:
    writer = kit.writer(path, kit.spec(tier="predictions"), kit.images(parts), part_size=1)
    kit.fill(writer)
    assert len(writer.parts) == parts
    return path


def test_opening_reads_one_file_per_part(tmp_path: Path, kit: "type[Kit]") -> None:
    few, many = make(tmp_path / "few.zarr", kit, 2), make(tmp_path / "many.zarr", kit, 9)
    of_few, of_many = opened_below(few, lambda: open_cache(few)), opened_below(many, lambda: open_cache(many))
    assert sorted(name for name in of_many if name.startswith("parts")) == [
        f"parts/{n:05d}/zarr.json" for n in range(9)
    ]
    assert len(of_many) - len(of_few) == 7
    assert len(of_few) - 2 <= 10  # the root, and its plan by checksum and by content


def test_a_look_up_reads_nothing_and_a_read_only_its_part(tmp_path: Path, kit: "type[Kit]") -> None:
    path = make(tmp_path / "x.zarr", kit, 4)
    cache = open_cache(path)
    image_id = kit.images(4)[2].image_id
    assert opened_below(path, lambda: image_id in cache) == []
    assert {name[:11] for name in opened_below(path, lambda: cache.targets(image_id))} == {"parts/00002"}
    assert opened_below(path, lambda: cache.targets(image_id)) == []  # but for the data, which tensorstore opens


def test_a_part_that_goes_after_opening(tmp_path: Path, kit: "type[Kit]") -> None:
    path = make(tmp_path / "x.zarr", kit, 3)
    cache = open_cache(path)
    shutil.rmtree(path / part_key(1))
    kit.flip_bit(path / part_key(2) / "zarr.json", at=0.5)
    for position, state in ((1, "of the cache .* is gone"), (2, "of the cache .* is no longer whole")):
        with pytest.raises(CacheError, match=f"Part {position} {state}"):
            cache.targets(kit.images(3)[position].image_id)


def test_every_changed_byte_makes_a_record_none(tmp_path: Path, kit: "type[Kit]") -> None:
    images = kit.images(3)
    writer = kit.writer(tmp_path / "x.zarr", kit.spec(tier="predictions"), images, part_size=10**9)
    with writer.part(0) as part:
        part.add(kit.record(images[0], "identity", writer.spec))
        part.skip(images[1].image_id, 'a"name,"images":[1]}.jpg', 'it says "images":[1,2] },"images":[')
        part.add(kit.record(images[2], "identity", writer.spec))
    location, span = writer.location, range(0, 3)
    root = read_root(location).digest
    record = read_part_record(location, 0, span, root)
    assert record is not None
    assert record["skipped"] != []
    assert read_part_record(location, 0, range(0, 2), root) is None
    assert read_part_record(location, 1, span, root) is None
    assert read_part_record(location, 0, span, "0" * 64) is None
    folder = tmp_path / "x.zarr" / "parts"
    shutil.copytree(folder / "00000", folder / "00001")
    assert read_part_record(location, 1, span, root) is None
    file = folder / "00000" / "zarr.json"
    data = file.read_bytes()
    file.write_bytes((tmp_path / "x.zarr" / "zarr.json").read_bytes())
    assert read_part_record(location, 0, span, root) is None
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert read_part_record(location, 0, span, root) is None, at
    for length in range(0, len(data) - 1, 37):
        file.write_bytes(data[:length])
        assert read_part_record(location, 0, span, root) is None
    file.unlink()
    file.mkdir()
    assert read_part_record(location, 0, span, root) is None
