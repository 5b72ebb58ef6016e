"""`verify_cache` finds whatever is wrong, names whom it concerns, and removes it so that it is made again."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kdpipe.cache import CacheError, CacheSpec
from kdpipe.cache.codecs import encode_chunk
from kdpipe.cache.format.record import read_record, write_record
from kdpipe.cache.store.files import file_record, temporary_folder
from kdpipe.cache.verify.verification import Verification, remove_faults, verify_cache

if TYPE_CHECKING:
    from tests.cache.conftest import Kit


def verify(path: Path) -> Verification:
    return verify_cache(path, lambda done, total: None, threads=2)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
@pytest.mark.parametrize("tier", ["predictions", "roi", "pyramid"])
def test_a_sound_cache(tmp_path: Path, kit: "type[Kit]", tier: str, dtype: str) -> None:
    codec = {"int8": "zstd", "float16": "lz4", "float32": "none"}[dtype]
    spec = kit.spec(tier=tier, dtype=dtype, codec=codec, views=("identity", "hflip"))
    found = verify(kit.make(tmp_path / "x.zarr", spec))
    assert not any((found.faults, found.notes, found.missing, found.bad_parts))
    assert (found.images, found.skipped) == (7, 0)
    files = list((tmp_path / "x.zarr" / "parts").rglob("c.*"))
    assert found.bytes_read == sum(file.stat().st_size for file in files)


def test_skipped_images_are_no_fault(tmp_path: Path, kit: "type[Kit]") -> None:
    writer = kit.writer(tmp_path / "x.zarr", kit.spec(), kit.images())
    writer.write_head(kit.head())
    for index in writer.pending():
        with writer.part(index) as part:
            for position in writer.parts[index]:
                image = writer.images[position]
                if index == 0 or position % 2:
                    part.skip(image.image_id, image.file_name, "no image")
                else:
                    part.add(kit.record(image, "identity", writer.spec))
    found = verify(tmp_path / "x.zarr")
    assert found.faults == ()
    assert found.skipped > 1


def test_images_without_boxes_are_no_fault(tmp_path: Path, kit: "type[Kit]") -> None:
    spec = kit.spec()
    writer = kit.writer(tmp_path / "x.zarr", spec, kit.images(5), part_size=1 << 30)
    writer.write_head(kit.head())
    with writer.part(0) as part:
        for image, rois in zip(writer.images, (0, 3, 0, 5, 0), strict=True):
            part.add(kit.record(image, "identity", spec, rois=rois))
    assert verify(tmp_path / "x.zarr").faults == ()
    kit.flip_bit(tmp_path / "x.zarr" / "parts" / "00000" / "logits" / "c.0.0")
    (fault,) = verify(tmp_path / "x.zarr").faults
    assert {kit.images()[1].image_id, kit.images()[3].image_id} <= set(fault.image_ids)


@pytest.mark.parametrize(
    "name", ["features", "scale", "boxes", "logits", "deltas", "embeddings", "index", "file_names"]
)
@pytest.mark.parametrize("damage", ["bit", "shard index", "cut", "gone", "folder", "metadata"])
def test_damage_to_a_part(cache_path: Path, kit: "type[Kit]", name: str, damage: str) -> None:
    before = kit.tree(cache_path)
    (file,) = (cache_path / "parts" / "00001" / name).glob("c.*")
    spoil(file, damage, kit)
    found = verify(cache_path)
    (fault,) = found.faults
    writer = kit.writer(cache_path, kit.spec(), kit.images())
    assert (fault.part, fault.array, fault.where) == (1, name, "part 1")
    assert set(fault.image_ids) == {kit.images()[n].image_id for n in writer.parts[1]}
    assert found.bad_parts == (1,)
    assert remove_faults(cache_path, found) == [Path("parts/00001")]
    found = verify(cache_path)
    assert found.missing == found.bad_parts == (1,)
    assert remove_faults(cache_path, found) == []
    kit.make(cache_path)
    assert kit.tree(cache_path) == before


def spoil(file: Path, damage: str, kit: "type[Kit]") -> None:
    if damage == "bit":
        kit.flip_bit(file, at=0.1)
    elif damage == "shard index":
        kit.flip_bit(file, at=0.9999)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "metadata":
        kit.flip_bit(file.with_name("zarr.json"))
    else:
        file.unlink()
        if damage == "folder":
            file.mkdir()


@pytest.mark.parametrize("damage", ["bit", "gone", "extra", "metadata", "record", "no head", "file"])
def test_damage_to_the_head(cache_path: Path, kit: "type[Kit]", damage: str) -> None:
    before = kit.tree(cache_path)
    folder = cache_path / "head"
    weight = folder / "roi_head.fc.weight" / "c.0.0"
    if damage == "extra":
        weight.with_name("c.0.1").write_bytes(b"x")
    elif damage == "record":
        kit.flip_bit(folder / "zarr.json", at=0.5)
    elif damage in ("no head", "file"):
        shutil.rmtree(folder)
        if damage == "file":
            folder.write_text("head")
    else:
        spoil(weight, damage, kit)
    found = verify(cache_path)
    (fault,) = found.faults
    assert (fault.where, fault.part) == ("the head", None)
    assert found.bad_parts == ()
    assert bool(remove_faults(cache_path, found)) == (damage != "no head")
    kit.make(cache_path)
    assert verify(cache_path).faults == ()
    assert kit.tree(cache_path) == before


def test_records_and_missing_parts(cache_path: Path, kit: "type[Kit]") -> None:
    before = kit.tree(cache_path)
    parts = sorted((cache_path / "parts").glob("0*"))
    assert len(parts) >= 3
    shutil.rmtree(parts[0])
    kit.flip_bit(parts[1] / "zarr.json", at=0.5)
    shutil.rmtree(parts[2])
    parts[2].write_text("no folder")
    found = verify(cache_path)
    assert found.missing == (0,)
    assert found.bad_parts == (0, 1, 2)
    assert [fault.message for fault in found.faults][1:] == ["has a damaged commit record (zarr.json)"] * 2
    assert remove_faults(cache_path, found) == [Path("parts/00001"), Path("parts/00002")]
    kit.make(cache_path)
    assert kit.tree(cache_path) == before


def test_strays(cache_path: Path, kit: "type[Kit]") -> None:
    before = kit.tree(cache_path)
    (cache_path / "parts" / "00000" / "logits" / "more").mkdir()
    (cache_path / "parts" / "00000" / "logits" / "more" / "c.1.0").write_bytes(b"x")
    (cache_path / "notes\x1b[31m.txt").write_text("mine")
    (cache_path / "parts" / "00099").mkdir()
    dead = temporary_folder(cache_path / "parts" / "00001")
    dead = dead.rename(dead.with_name(dead.name.replace(dead.name.split(".")[-3], "00000000")))
    (dead / "features").mkdir()
    alive = temporary_folder(cache_path / "parts" / "00002")
    found = verify(cache_path)
    assert {fault.where: fault.remove for fault in found.faults} == {
        "part 0": Path("parts/00000/logits/more"),
        "notes\x1b[31m.txt": None,
        "parts/00099": None,
        f"parts/{dead.name}": Path("parts") / dead.name,
    }
    assert found.notes == (f"parts/{alive.name} is being written by a process of this machine",)
    assert found.bad_parts == ()
    assert len(remove_faults(cache_path, found)) == 2
    (cache_path / "notes\x1b[31m.txt").unlink()
    (cache_path / "parts" / "00099").rmdir()
    alive.rmdir()
    assert kit.tree(cache_path) == before
    assert verify(cache_path).faults == ()


def test_a_damaged_root(cache_path: Path, kit: "type[Kit]") -> None:
    (cache_path / "parts" / "zarr.json").write_text("{}")
    (fault,) = verify(cache_path).faults
    assert (fault.where, fault.repairable, fault.remove) == ("the root", False, None)
    kit.flip_bit(cache_path / "zarr.json", at=0.9)
    with pytest.raises(CacheError, match="damaged"):
        verify(cache_path)


def rewrite(path: Path, array: str, change: "Callable[[np.ndarray[Any, Any]], None]", spec: CacheSpec) -> None:
    """Change values of part 0 as a wrong writer would have: with sound checksums. For caches without compression."""
    folder = path / "parts" / "00000"
    (file,) = (folder / array).glob("c.*")
    metadata = json.loads((folder / array / "zarr.json").read_bytes())
    chunk = metadata["codecs"][0]["configuration"]["chunk_shape"]
    data = file.read_bytes()
    dtype = np.dtype(metadata["data_type"])
    size = dtype.itemsize * int(np.prod(chunk))
    values = np.frombuffer(data[:size], dtype).reshape(chunk).copy()
    change(values)
    encoded, checksum = encode_chunk(values, "none")
    sums = metadata["attributes"]["checksums"]
    metadata["attributes"]["checksums"] = checksum.hex() + sums[8:]
    text = json.dumps(metadata, separators=(",", ":"), sort_keys=True).encode() + b"\n"
    (folder / array / "zarr.json").write_bytes(text)
    file.write_bytes(encoded + data[size:])
    record = read_record(folder) or {}
    files = {name: tuple(entry) for name, entry in record.pop("files").items()}
    for name in (f"{array}/zarr.json", f"{array}/{file.name}"):
        files[name] = file_record((folder / name).read_bytes())
    write_record(folder, record, files)


def put(place: Any, value: float) -> "Callable[[np.ndarray[Any, Any]], None]":
    def change(values: "np.ndarray[Any, Any]") -> None:
        values[place] = value

    return change


@pytest.mark.parametrize(
    ("array", "change", "message"),
    [
        ("logits", put((20, 1), np.nan), "not finite"),
        ("features", put(7, np.inf), "not finite"),
        ("boxes", put((20, 2), 1e4), "outside of their image"),
        ("boxes", put((20, 0), -1.0), "outside of their image"),
        ("boxes", put((20, 3), 0.0), "outside of their image, or upside down"),
        ("index", put((1, 0), 5), "the images and views of the plan"),
        ("index", put((1, 7), 3), "row_start that leave gaps"),
        ("index", put((1, 9), 3), "element_start that leave gaps"),
        ("index", put((1, 10), 0), "name_start that leave gaps"),
        ("index", put((0, 6), 13), "impossible numbers of proposals"),
        ("index", put((0, 2), 0), "a size that is not positive"),
        ("index", put((0, 4), 32), "gives image 1000 the network input"),
        ("file_names", put(0, 0xFF), "is wrong about image 1000"),
    ],
)
def test_what_a_wrong_writer_wrote(
    tmp_path: Path, kit: "type[Kit]", array: str, change: "Callable[[np.ndarray[Any, Any]], None]", message: str
) -> None:
    spec = kit.spec(dtype="float16", codec="none")
    path = tmp_path / "x.zarr"
    kit.fill(kit.writer(path, spec, kit.images(4), part_size=1 << 30))
    rewrite(path, array, change, spec)
    found = verify(path)
    (fault,) = found.faults
    assert message in fault.message
    assert fault.part == 0
    ids = [image.image_id for image in kit.images(4)]
    rows = {"logits": [ids[1]], "boxes": [ids[1]], "features": [ids[0]]}
    assert set(fault.image_ids) == set(rows.get(array, ids))


def test_values_of_the_head(tmp_path: Path, kit: "type[Kit]") -> None:
    writer = kit.writer(tmp_path / "x.zarr", kit.spec(), kit.images())
    writer.write_head({**kit.head(), "x": torch.tensor([1.0, float("nan")])})
    (fault,) = (fault for fault in verify(tmp_path / "x.zarr").faults if fault.part is None)
    assert fault.message == "x/c.0 has values that are not finite"


def test_another_specification(tmp_path: Path, kit: "type[Kit]") -> None:
    """Parts of a cache with another width among those of this one."""
    path = kit.make(tmp_path / "x.zarr", kit.spec())
    other = kit.make(tmp_path / "y.zarr", replace(kit.spec(), embedding_dim=11, proposals=11), count=7)
    shutil.rmtree(path / "parts" / "00000")
    shutil.copytree(other / "parts" / "00000", path / "parts" / "00000")
    found = verify(path)
    assert found.bad_parts == (0,)
