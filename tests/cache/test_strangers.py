"""Caches that somebody made who means harm: every checksum in them fits, and nothing that they say is believed.

Whatever is wrong gives one `CacheError` from reading and a fault from `verify`; nothing is decoded by what a file says
of itself, no code runs, nothing outside of the cache is read or written, and no number takes the memory.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from kdpipe.cache import CacheError, open_cache
from kdpipe.cache.format.layout import index_columns
from kdpipe.cache.format.root import PLAN_LAYOUT
from kdpipe.cache.format.zarr_arrays import WrittenFiles
from kdpipe.cache.verify.verification import remove_faults, verify_cache
from kdpipe.cache.write.arrays import write_array

if TYPE_CHECKING:
    from tests.cache.conftest import Kit

PART = "parts/00001"
DEEP = "[" * 100_000 + "]" * 100_000


def read_all(path: Path) -> None:
    """Read everything that a training would."""
    cache = open_cache(path)
    cache.head()
    for image_id in cache.image_ids.tolist():
        cache.index(image_id)
        cache.targets(image_id)


def refused(path: Path, part: int | None = 1) -> None:
    """Reading gives a `CacheError`, and so does verifying, or it has a fault of that part, or of none (the head)."""
    with pytest.raises(CacheError):
        read_all(path)
    if part is None:
        with pytest.raises(CacheError):
            verify_cache(path, lambda done, total: None, threads=1)
    else:
        verification = verify_cache(path, lambda done, total: None, threads=1)
        assert {fault.part for fault in verification.faults if fault.repairable} == {None if part < 0 else part}


class Touch:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._file), "w")


def pickled(folder: Path, mark: Path) -> None:
    """A chunk that runs code, in each of the files of an array."""
    for file in folder.glob("c*"):
        file.write_bytes(pickle.dumps(Touch(mark)))


def v2(folder: Path, mark: Path) -> None:
    pickled(folder, mark)
    (folder / "zarr.json").unlink()
    array = {"zarr_format": 2, "shape": [9], "chunks": [9], "dtype": "|O", "order": "C", "fill_value": None}
    (folder / ".zarray").write_text(json.dumps({**array, "compressor": None, "filters": [{"id": "pickle"}]}))


def v2_beside(folder: Path, mark: Path) -> None:
    zarr_json = (folder / "zarr.json").read_bytes()
    v2(folder, mark)
    (folder / "zarr.json").write_bytes(zarr_json)


def metadata(**entries: Any) -> Callable[[Path, Path], None]:
    def change(folder: Path, mark: Path) -> None:
        pickled(folder, mark)
        content = json.loads((folder / "zarr.json").read_text())
        (folder / "zarr.json").write_text(json.dumps({**content, **entries}))

    return change


def codec(**entries: Any) -> Callable[[Path, Path], None]:
    def change(folder: Path, mark: Path) -> None:
        (sharding,) = json.loads((folder / "zarr.json").read_text())["codecs"]
        metadata(codecs=[{**sharding, "configuration": {**sharding["configuration"], **entries}}])(folder, mark)

    return change


def text(change: Callable[[str], str]) -> Callable[[Path, Path], None]:
    def write(folder: Path, mark: Path) -> None:
        (folder / "zarr.json").write_text(change((folder / "zarr.json").read_text()))

    return write


BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
ARRAYS = {
    "version 2 with a pickle filter": v2,
    "version 2 beside version 3": v2_beside,
    "said to be version 2": metadata(zarr_format=2),
    "a codec that unpickles": metadata(codecs=[{"name": "numcodecs.pickle", "configuration": {"id": "pickle"}}]),
    "an inner codec that unpickles": codec(codecs=[BYTES, {"name": "numcodecs.pickle"}]),
    "no sharding": metadata(codecs=[BYTES]),
    "no checksums": codec(codecs=[BYTES]),
    "another compressor": codec(codecs=[BYTES, {"name": "gzip", "configuration": {"level": 1}}, {"name": "crc32c"}]),
    "an index without checksum": codec(index_codecs=[BYTES]),
    "an index at the start": codec(index_location="start"),
    "a larger chunk": codec(chunk_shape=[1 << 40]),
    "a chunk that does not fit": codec(chunk_shape=[7]),
    "a huge shape": metadata(shape=[10**12]),
    "a negative shape": metadata(shape=[-1]),
    "objects": metadata(data_type="object"),
    "text": metadata(data_type={"name": "fixed_length_utf32", "configuration": {"length_bytes": 1 << 40}}),
    "a storage transformer": metadata(storage_transformers=[{"name": "x"}]),
    "a group": metadata(node_type="group"),
    "an entry that must be understood": metadata(kdpipe={"must_understand": True}),
    "a shape given twice": text(lambda found: found.replace('"shape"', '"shape": [9], "shape"', 1)),
    "very deep": text(lambda found: DEEP),
    "no mapping": text(lambda found: "[]"),
}


@pytest.mark.parametrize("name", ["features", "logits", "index"])
@pytest.mark.parametrize("attack", ARRAYS)
def test_arrays(tmp_path: Path, cache_path: Path, kit: "type[Kit]", name: str, attack: str) -> None:
    ARRAYS[attack](kit.files(cache_path, PART) / name, tmp_path / "mark")
    kit.forge(cache_path, PART)
    refused(cache_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("attack", ARRAYS)
def test_arrays_of_head_and_plan(tmp_path: Path, cache_path: Path, kit: "type[Kit]", attack: str) -> None:
    ARRAYS[attack](kit.files(cache_path, "head") / "roi_head.fc.bias", tmp_path / "mark")
    kit.forge(cache_path, "head")
    refused(cache_path, part=-1)
    ARRAYS[attack](kit.files(cache_path, "plan") / "image_ids", tmp_path / "mark")
    kit.forge(cache_path, "")
    refused(cache_path, part=None)
    assert not (tmp_path / "mark").exists()


SHA = "0" * 64
FILES: dict[str, Callable[[dict[str, Any]], object]] = {
    "above": lambda files: files.update({"../../../../pipe": [1, SHA]}),
    "above from an array": lambda files: files.update({"logits/../../../../../pipe": [1, SHA]}),
    "absolute": lambda files: files.update({"/dev/zero": [1, SHA]}),
    "a control character": lambda files: files.update({"logits/c\0": [1, SHA]}),
    "an empty name": lambda files: files.update({"": [1, SHA]}),
    "more of an array": lambda files: files.update({"logits/c.9.0": [1, SHA]}),
    "fewer of an array": lambda files: files.pop("logits/c.0.0"),
    "a negative size": lambda files: files["logits/c.0.0"].__setitem__(0, -1),
    "a size that is true": lambda files: files["logits/c.0.0"].__setitem__(0, True),
    "a size of text": lambda files: files["logits/c.0.0"].__setitem__(0, "1"),
    "a fraction": lambda files: files["logits/c.0.0"].__setitem__(0, 1.5),
    "a huge size": lambda files: files["logits/c.0.0"].__setitem__(0, 10**4000),
    "no digest": lambda files: files["logits/c.0.0"].__setitem__(1, None),
    "half a digest": lambda files: files["logits/c.0.0"].__setitem__(1, "0" * 32),
    "no pair": lambda files: files.update({"logits/c.0.0": [1]}),
    "nothing": lambda files: files.clear(),
}


@pytest.mark.parametrize("attack", FILES)
def test_lists_of_files(tmp_path: Path, cache_path: Path, kit: "type[Kit]", attack: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for ever
    kit.forge(cache_path, PART, listed=FILES[attack])
    refused(cache_path)


def test_files_of_no_array_are_found(cache_path: Path, kit: "type[Kit]") -> None:
    for key in (PART, "head", ""):
        kit.forge(cache_path, key, listed=lambda files: files.update({"more/zarr.json": [1, SHA]}))
    verification = verify_cache(cache_path, lambda done, total: None, threads=1)
    places = [fault.where for fault in verification.faults if "files.json lists 1 files of no array" in fault.message]
    assert set(places) == {"the root", "the head", "part 1"}


LISTS = {
    "a list": b"[]",
    "nothing": b"null",
    "cut": b"{",
    "very deep": DEEP.encode(),
    "a name given twice": b'{"a":[1,"' + SHA.encode() + b'"],"a":[1,"' + SHA.encode() + b'"]}',
    "no bytes": b"",
    "no text": b"\xff\xfe",
    "no number": b'{"a":[NaN,"' + SHA.encode() + b'"]}',
    "a number of 5000 digits": b'{"a":[1' + b"0" * 5000 + b',"' + SHA.encode() + b'"]}',
}


@pytest.mark.parametrize("attack", LISTS)
def test_lists_that_are_none(cache_path: Path, kit: "type[Kit]", attack: str) -> None:
    kit.forge(cache_path, PART, content=LISTS[attack])
    refused(cache_path)


def entry(*path: Any, value: Any = None) -> Callable[[Any], object]:
    """Set an entry of nested mappings and lists; None removes it."""

    def change(record: Any) -> None:
        for step in path[:-1]:
            record = record[step]
        if value is None:
            del record[path[-1]]
        else:
            record[path[-1]] = value

    return change


def skip(**changes: Any) -> Callable[[Any], object]:
    return entry("skipped", value=[{"image_id": 1, "file_name": "a", "reason": "b", **changes}])


NUMBERS = [-1, True, 1.5, "1", [], 10**12, 10**15, 10**18, 10**4000]
RECORDS: dict[str, Callable[[Any], object]] = {
    **{f"{value!r:.9} rows per {per}": entry("rows", per, value=value) for per in ("view", "box") for value in NUMBERS},
    **{f"{value!r:.9} elements": entry("rows", "element", value=value) for value in NUMBERS},
    **{f"{value!r:.9} bytes": entry("rows", "byte", value=value) for value in NUMBERS},
    "objects, of which the tier has none": entry("rows", "object", value=1),
    "rows of nothing known": entry("rows", "more", value=1),
    "no rows per box": entry("rows", "box"),
    "no rows": entry("rows"),
    "rows that are a list": entry("rows", value=[1]),
    **{f"files {value}": entry("files", value=value) for value in ("../../../../..", "/etc", SHA.replace("0", "A"), 1)},
    "no files": entry("files"),
    "no skipped images": entry("skipped"),
    "skipped images that are a mapping": entry("skipped", value={"1": 1}),
    "skipped images that are numbers": entry("skipped", value=[1]),
    "a skipped image of another part": skip(),
    "a skipped image without a number": skip(image_id="1"),
    "a skipped image with a huge number": skip(image_id=1 << 63),
    "a skipped image without a name": skip(file_name=None),
    "a skipped image with more": skip(more=1),
}


@pytest.mark.parametrize("attack", RECORDS)
def test_records_of_parts(tmp_path: Path, cache_path: Path, kit: "type[Kit]", attack: str) -> None:
    (tmp_path / "files.json").write_text("{}")
    kit.forge(cache_path, PART, RECORDS[attack])
    refused(cache_path)


BIAS = ("parameters", "roi_head.fc.bias")
HEADS: dict[str, Callable[[Any], object]] = {
    **{
        f"a parameter named {name!r}": entry("parameters", name, value={"shape": [5], "dtype": "float32"})
        for name in ("..", "../../x", "/x", "", "a\0", "a\n", "files.json", "x" * 5000)
    },
    **{f"a side of {value!r:.9}": entry(*BIAS, "shape", value=[value]) for value in NUMBERS},
    "many sides": entry(*BIAS, "shape", value=[1] * 100),
    "no shape": entry(*BIAS, "shape"),
    "a shape that is text": entry(*BIAS, "shape", value="5"),
    "objects": entry(*BIAS, "dtype", value="object"),
    "a type that is a list": entry(*BIAS, "dtype", value=["float32"]),
    "another type": entry(*BIAS, "dtype", value="int32"),
    "a missing parameter": entry("parameters", "more", value={"shape": [5], "dtype": "float32"}),
    "parameters that are a list": entry("parameters", value=[1]),
    "no parameters": entry("parameters"),
    "another root": entry("root", value=SHA),
    "no root": entry("root"),
    "files above": entry("files", value="../../../../.."),
}


@pytest.mark.parametrize("attack", HEADS)
def test_records_of_heads(cache_path: Path, kit: "type[Kit]", attack: str) -> None:
    kit.forge(cache_path, "head", HEADS[attack])
    refused(cache_path, part=-1)


ROOTS: dict[str, Callable[[Any], object]] = {
    **{f"{name} {value!r:.9}": entry("plan", name, value=value) for name in ("images", "parts") for value in NUMBERS},
    **{f"no {name}": entry(name) for name in ("plan", "identity", "metadata", "files")},
    **{f"{name} that is a list": entry(name, value=[1]) for name in ("spec", "plan", "identity", "metadata")},
    "no images": entry("plan", "images"),
    "a digest that is none": entry("plan", "digest", value="x"),
    "files above": entry("files", value="../../../../.."),
    **{
        f"{name} {value!r:.9}": entry("spec", name, value=value)
        for name in ("channels", "embedding_dim", "proposals")
        for value in (-1, True, "6", 10**12, 10**4000)
    },
    "huge strides": entry("spec", "strides", value=[1 << 40, 1 << 41, 1 << 42, 1 << 43]),
    "many strides": entry("spec", "strides", value=[8] * 100_000),
    "a huge scale": entry("spec", "scale", value=[10**15, 10**15]),
    "huge stds": entry("spec", "box_stds", value=[10**400, 1, 1, 1]),
    "a huge category": entry("spec", "category_ids", value=[1, 2, 10**30]),
    "a tier that is a list": entry("spec", "tier", value=[1]),
}


@pytest.mark.parametrize("attack", ROOTS)
def test_records_of_caches(cache_path: Path, kit: "type[Kit]", attack: str) -> None:
    kit.forge(cache_path, "", ROOTS[attack])
    refused(cache_path, part=None)


GROUPS: dict[str, Callable[[bytes], bytes]] = {
    "very deep": lambda data: DEEP.encode(),
    "deep within": lambda data: data.replace(b'"kdpipe":{', b'"kdpipe":{"a":' + DEEP.encode() + b",", 1),
    "an entry given twice": lambda data: data.replace(b'"files":', b'"files":"../..","files":', 1),
    "no number": lambda data: data.replace(b'"kdpipe":{', b'"kdpipe":{"a":NaN,', 1),
    "infinity": lambda data: data.replace(b'"kdpipe":{', b'"kdpipe":{"a":1e999,', 1),
    "a number of 5000 digits": lambda data: data.replace(b'"kdpipe":{', b'"kdpipe":{"a":' + b"1" * 5000 + b",", 1),
    "spaces": lambda data: data.replace(b'"kdpipe":{', b'"kdpipe": {', 1),
    "no text": lambda data: b"\xff\xfe" + data,
    "a list": lambda data: b"[1]",
    "text": lambda data: b'"kdpipe"',
    "no bytes": lambda data: b"",
}


@pytest.mark.parametrize("attack", GROUPS)
def test_groups(cache_path: Path, attack: str) -> None:
    for key, part in ((PART, 1), ("head", -1), ("", None)):
        file = cache_path / key / "zarr.json"
        data = file.read_bytes()
        file.write_bytes(GROUPS[attack](data))
        refused(cache_path, part)
        file.write_bytes(data)


def index(column: str, value: int, row: int = 0) -> Callable[[Any, Any], object]:
    """Set a number of the index."""

    def change(values: "np.ndarray[Any, Any]", columns: list[str]) -> None:
        values[row, columns.index(column)] = value

    return change


MOST = (1 << 63) - 1
INDICES = {
    **{
        f"{name} {value}": index(name, value)
        for name in ("box_start", "element_start")
        for value in (-1, 1, MOST, -MOST)
    },
    **{f"{name} {value}": index(name, value) for name in ("box_stop", "name_stop") for value in (-1, 0, MOST)},
    **{f"{name} {value}": index(name, value) for name in ("height", "input_width") for value in (-1, 0, 1, MOST)},
    **{f"level 0 {value}": index("level0_height", value) for value in (-1, 0, 100_000, MOST)},
    "objects": index("object_stop", 1),
    "a view of another cache": index("view", 1),
    "view 7": index("view", 7),
    "more proposals than boxes": index("num_proposals", 13),
    "proposals below 0": index("num_proposals", -1),
    "jittered boxes that the tier has not": index("num_jittered", 1),
    "jittered boxes below 0": index("num_jittered", -1),
    "the id of another image": index("image_id", 5),
}


@pytest.mark.parametrize("attack", INDICES)
def test_indices(cache_path: Path, kit: "type[Kit]", attack: str) -> None:
    array: Any = zarr.open_array(kit.files(cache_path, PART) / "index", mode="r")
    values = np.array(array[:])
    INDICES[attack](values, index_columns(kit.spec()))
    kit.put(cache_path, 1, "index", values)
    refused(cache_path)


def test_names_that_are_no_text(cache_path: Path, kit: "type[Kit]") -> None:
    rows = json.loads((cache_path / PART / "zarr.json").read_text())["attributes"]["kdpipe"]["rows"]
    values = np.full(rows["byte"], 0xFF, dtype=np.uint8)
    kit.put(cache_path, 1, "file_names", values)
    refused(cache_path)


STARTS = {
    "negative": [0, -(2**62), 7],
    "overlapping": [0, 5, 3, 7],
    "an empty part": [0, 3, 3, 7],
    "not from the first": [1, 7],
    "not to the last": [0, 6],
    "beyond": [0, 10**15, 7],
}


@pytest.mark.parametrize("attack", STARTS)
def test_plans(cache_path: Path, kit: "type[Kit]", attack: str) -> None:
    folder = kit.files(cache_path, "plan")
    shutil.rmtree(folder / "part_starts")
    values = np.array(STARTS[attack], dtype=np.int64)
    write_array(WrittenFiles(LocalStore(folder)), "part_starts", PLAN_LAYOUT, values)
    kit.forge(cache_path, "", entry("plan", "parts", value=len(values) - 1))
    refused(cache_path, part=None)


def test_an_image_in_two_parts_cannot_be_repaired(cache_path: Path, kit: "type[Kit]") -> None:
    folder = kit.files(cache_path, "plan")
    shutil.rmtree(folder / "image_ids")
    write_array(WrittenFiles(LocalStore(folder)), "image_ids", PLAN_LAYOUT, np.full(7, 1000, dtype=np.int64))
    kit.forge(cache_path, "")
    verification = verify_cache(cache_path, lambda done, total: None, threads=1)
    root = [fault for fault in verification.faults if fault.where == "the root"]
    assert [(fault.repairable, fault.remove) for fault in root] == [(False, None)]


@pytest.mark.parametrize("name", ["zarr.json", "head/zarr.json", f"{PART}/zarr.json", "files", "array", "chunks"])
def test_pipes(cache_path: Path, kit: "type[Kit]", name: str) -> None:
    """Whoever opens a pipe waits until somebody writes to it."""
    folder = kit.files(cache_path, PART)
    inner = {"files": "files.json", "array": "logits/zarr.json", "chunks": "logits/c.0.0"}
    file = folder / inner[name] if name in inner else cache_path / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CacheError):
        read_all(cache_path)
    try:
        assert verify_cache(cache_path, lambda done, total: None, threads=1).faults
    except CacheError:
        assert name == "zarr.json"


def test_a_link_to_the_parts_of_another_cache(tmp_path: Path, cache_path: Path, kit: "type[Kit]") -> None:
    """Repairing, or going on with, one cache must not remove the parts of the other."""
    other = tmp_path / "other.zarr"
    kit.fill(kit.writer(other, kit.spec(), kit.images(), identity={"teacher": "t2"}))
    before = kit.tree(other)
    shutil.rmtree(cache_path / "parts")
    (cache_path / "parts").symlink_to(other / "parts")
    verification = verify_cache(cache_path, lambda done, total: None, threads=1)
    assert verification.bad_parts
    with pytest.raises(CacheError, match="a link that leads out of the cache"):
        remove_faults(cache_path, verification)
    writer = kit.writer(cache_path, kit.spec(), kit.images())
    with pytest.raises(CacheError, match="a link that leads out of the cache"):
        kit.fill(writer)
    assert kit.tree(other) == before


def test_links_in_the_place_of_temporary_folders(tmp_path: Path, cache_path: Path, kit: "type[Kit]") -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "photo.jpg").write_text("mine")
    linked = cache_path / "parts" / f".00000.{'0' * 16}.tmp"
    linked.symlink_to(outside)
    lock = cache_path / "parts" / f".00001.{'1' * 16}.tmp"
    lock.mkdir()
    (lock / ".lock").symlink_to(outside / "made")
    before = kit.tree(outside)
    kit.writer(cache_path, kit.spec(), kit.images())
    verification = verify_cache(cache_path, lambda done, total: None, threads=1)
    remove_faults(cache_path, verification)
    assert [(fault.where, fault.remove) for fault in verification.faults] == [(f"parts/{linked.name}", None)]
    assert len(verification.notes) == 1
    assert kit.tree(outside) == before
