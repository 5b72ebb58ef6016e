"""`verify_cache` finds whatever is wrong, names whom it concerns, and removes it so that it is made again."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zarr

from kdpipe.cache import CacheError, CacheSpec
from kdpipe.cache.format.layout import index_columns
from kdpipe.cache.store.temporary import temporary_folder
from kdpipe.cache.verify.verification import Verification, remove_faults, verify_cache

if TYPE_CHECKING:
    from tests.cache.conftest import Kit


def verify(path: Path) -> Verification:
    return verify_cache(path, lambda done, total: None, threads=2)


@pytest.mark.parametrize("dtype", ["int4", "int8", "float16", "float32"])
@pytest.mark.parametrize("tier", ["predictions", "objects", "pyramid"])
def test_a_sound_cache(tmp_path: Path, kit: "type[Kit]", tier: str, dtype: str) -> None:
    codec = {"int4": "lz4", "int8": "zstd", "float16": "lz4", "float32": "none"}[dtype]
    path = kit.make(tmp_path / "x.zarr", kit.spec(tier=tier, dtype=dtype, codec=codec, views=("identity", "hflip")))
    progress: list[tuple[int, int]] = []
    verification = verify_cache(path, lambda done, total: progress.append((done, total)), threads=2)
    assert not any((verification.faults, verification.notes, verification.missing, verification.bad_parts))
    assert (verification.images, verification.skipped) == (7, 0)
    chunks = [file for file in path.rglob("c*") if re.fullmatch(r"c[.\d]*", file.name)]
    assert verification.bytes_read == sum(file.stat().st_size for file in chunks)
    assert progress[-1] == (verification.bytes_read, verification.bytes_read)


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
    verification = verify(tmp_path / "x.zarr")
    assert verification.faults == ()
    assert verification.skipped > 1


def test_images_without_boxes_are_no_fault(tmp_path: Path, kit: "type[Kit]") -> None:
    spec = kit.spec()
    writer = kit.writer(tmp_path / "x.zarr", spec, kit.images(5), part_size=1 << 30)
    writer.write_head(kit.head())
    with writer.part(0) as part:
        for image, rois in zip(writer.images, (0, 3, 0, 5, 0), strict=True):
            part.add(kit.record(image, "identity", spec, rois=rois))
    assert verify(tmp_path / "x.zarr").faults == ()
    kit.flip_bit(kit.files(tmp_path / "x.zarr", "parts/00000") / "logits" / "c.0.0")
    (fault,) = verify(tmp_path / "x.zarr").faults
    assert {kit.images()[1].image_id, kit.images()[3].image_id} <= set(fault.image_ids)


@pytest.mark.parametrize(
    "name", ["features", "scale", "boxes", "logits", "deltas", "embeddings", "index", "file_names"]
)
@pytest.mark.parametrize("damage", ["bit", "shard index", "cut", "gone", "folder", "metadata", "list"])
def test_damage_to_a_part(cache_path: Path, kit: "type[Kit]", name: str, damage: str) -> None:
    before = kit.tree(cache_path)
    (file,) = (kit.files(cache_path, "parts/00001") / name).glob("c.*")
    spoil(file, damage, kit)
    verification = verify(cache_path)
    (fault,) = verification.faults
    writer = kit.writer(cache_path, kit.spec(), kit.images())
    assert (fault.part, fault.array, fault.where) == (1, None if damage == "list" else name, "part 1")
    assert set(fault.image_ids) == {kit.images()[n].image_id for n in writer.parts[1]}
    assert verification.bad_parts == (1,)
    assert remove_faults(cache_path, verification) == ["parts/00001"]
    verification = verify(cache_path)
    assert verification.missing == verification.bad_parts == (1,)
    assert remove_faults(cache_path, verification) == []
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
    elif damage == "list":
        kit.flip_bit(file.parents[1] / "files.json")
    else:
        file.unlink()
        if damage == "folder":
            file.mkdir()


@pytest.mark.parametrize("damage", ["bit", "gone", "metadata", "list", "record", "no head", "file"])
def test_damage_to_the_head(cache_path: Path, kit: "type[Kit]", damage: str) -> None:
    before = kit.tree(cache_path)
    folder = cache_path / "head"
    weight = kit.files(cache_path, "head") / "roi_head.fc.weight" / "c.0.0"
    if damage == "record":
        kit.flip_bit(folder / "zarr.json", at=0.5)
    elif damage in ("no head", "file"):
        shutil.rmtree(folder)
        if damage == "file":
            folder.write_text("head")
    else:
        spoil(weight, damage, kit)
    verification = verify(cache_path)
    (fault,) = verification.faults
    assert (fault.where, fault.part) == ("the head", None)
    assert verification.bad_parts == ()
    assert bool(remove_faults(cache_path, verification)) == (damage not in ("no head", "file"))
    kit.make(cache_path)
    assert verify(cache_path).faults == ()
    assert kit.tree(cache_path) == before


DAMAGED = "has a damaged commit record (zarr.json)"


def test_records_and_missing_parts(cache_path: Path, kit: "type[Kit]") -> None:
    before = kit.tree(cache_path)
    parts = sorted((cache_path / "parts").glob("0*"))
    assert len(parts) >= 3
    shutil.rmtree(parts[0])
    kit.flip_bit(parts[1] / "zarr.json", at=0.5)
    shutil.rmtree(parts[2])
    parts[2].write_text("no folder")
    verification = verify(cache_path)
    assert verification.missing == (0, 2)
    assert verification.bad_parts == (0, 1, 2)
    assert [fault.message for fault in verification.faults] == ["is missing", DAMAGED, "is missing"]
    assert remove_faults(cache_path, verification) == ["parts/00001"]
    kit.make(cache_path)
    assert kit.tree(cache_path) == before


def test_leftovers(cache_path: Path, kit: "type[Kit]") -> None:
    """Of dead writers, which are removed; of live ones, which are noted; and what is not kdpipe's, which stays."""
    before = kit.tree(cache_path)
    parts, files = cache_path / "parts", kit.files(cache_path, "parts/00000")
    foreign = [files / "logits" / "more" / "c.1.0", files / "logits" / "c.1.0", cache_path / "notes\x1b[31m.txt"]
    foreign += [parts / "00000" / "note", parts / "00099" / "x", cache_path / "head" / "x", cache_path / "plan" / "x"]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"mine")
    dead = parts / f".00001.{'0' * 16}.tmp"
    (dead / "features").mkdir(parents=True)
    with temporary_folder(parts / "00002") as alive:
        verification = verify(cache_path)
        places = {fault.where for fault in verification.faults if fault.remove is None}
        expected = {str(file.relative_to(cache_path)) for file in foreign}
        expected -= {str((files / "logits" / "more" / "c.1.0").relative_to(cache_path)), "parts/00099/x"}
        assert places == expected | {str((files / "logits" / "more").relative_to(cache_path)), "parts/00099"}
        assert all(fault.repairable == (fault.remove is not None) for fault in verification.faults)
        assert verification.notes == (f"parts/{alive.name} is being written by another process",)
        assert verification.bad_parts == ()
        assert remove_faults(cache_path, verification) == [f"parts/{dead.name}"]
        assert alive.exists()
    assert all(file.read_bytes() == b"mine" for file in foreign)
    for file in foreign:
        file.unlink()
    for folder in (files / "logits" / "more", parts / "00099"):
        folder.rmdir()
    assert kit.tree(cache_path) == before
    assert verify(cache_path).faults == ()


def test_a_damaged_root(cache_path: Path, kit: "type[Kit]") -> None:
    """Without the root nothing can be said of the rest, and nothing makes it anew."""
    for name in ("zarr.json", "plan/files.json", "plan/image_ids/zarr.json", "plan/part_starts/c.0"):
        folder = kit.files(cache_path, "plan").relative_to(cache_path)
        file = cache_path / name.replace("plan", str(folder))
        data = file.read_bytes()
        kit.flip_bit(file, at=0.9)
        before = kit.tree(cache_path)
        with pytest.raises(CacheError, match="damaged"):
            verify(cache_path)
        with pytest.raises(CacheError, match="damaged"):
            kit.writer(cache_path, kit.spec(), kit.images())
        assert kit.tree(cache_path) == before
        file.write_bytes(data)
    assert verify(cache_path).faults == ()


def test_values_of_the_plan_that_were_changed_with_their_checksums(cache_path: Path, kit: "type[Kit]") -> None:
    """The plan can be read, and still is not what was written: that cannot be repaired."""
    kit.forge(cache_path, "", listed=lambda files: files["image_ids/c.0"].__setitem__(1, "0" * 64))
    (fault,) = verify(cache_path).faults
    assert (fault.where, fault.repairable, fault.remove) == ("the root", False, None)
    assert fault.message.endswith("image_ids/c.0 has other content than was written")


def put(place: Any, value: float) -> "Callable[[np.ndarray[Any, Any], CacheSpec], None]":
    def change(values: "np.ndarray[Any, Any]", spec: CacheSpec) -> None:
        values[place] = value

    return change


def column(name: str, row: int, value: int) -> "Callable[[np.ndarray[Any, Any], CacheSpec], None]":
    def change(values: "np.ndarray[Any, Any]", spec: CacheSpec) -> None:
        values[row, index_columns(spec).index(name)] = value

    return change


@pytest.mark.parametrize(
    ("array", "change", "message"),
    [
        ("logits", put((20, 1), np.nan), "not finite"),
        ("features", put(7, np.inf), "not finite"),
        ("boxes", put((20, 2), 1e4), "outside of their image"),
        ("boxes", put((20, 0), -1.0), "outside of their image"),
        ("boxes", put((20, 3), 0.0), "outside of their image, or upside down"),
        ("index", column("image_id", 1, 5), "the images and views of the plan"),
        ("index", column("box_start", 1, 3), "box_start that leave gaps"),
        ("index", column("element_start", 1, 3), "element_start that leave gaps"),
        ("index", column("name_start", 1, 0), "name_start that leave gaps"),
        ("index", column("num_proposals", 0, 13), "impossible numbers of proposals"),
        ("index", column("height", 0, 0), "a size that is not positive"),
        ("index", column("input_height", 0, 32), "wrong about image 1000: a network input"),
        ("file_names", put(0, 0xFF), "wrong about image 1000: its name is no text"),
    ],
)
def test_what_a_wrong_writer_wrote(
    tmp_path: Path,
    kit: "type[Kit]",
    array: str,
    change: "Callable[[np.ndarray[Any, Any], CacheSpec], None]",
    message: str,
) -> None:
    """With sound checksums."""
    spec = kit.spec(dtype="float16")
    path = tmp_path / "x.zarr"
    kit.fill(kit.writer(path, spec, kit.images(4), part_size=1 << 30))
    stored: Any = zarr.open_array(kit.files(path, "parts/00000") / array, mode="r")
    values = np.array(stored[...])
    change(values, spec)
    kit.put(path, 0, array, values)
    verification = verify(path)
    (fault,) = verification.faults
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
    verification = verify(path)
    assert verification.bad_parts == (0,)
