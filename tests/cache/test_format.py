"""The bytes of format version 1, pinned; and other Zarr libraries, which read and check a cache like any other.

`format_v1.json` holds what `digests` gives. What depends on the version of blosc and zstd (compressed chunks, and
digests of them) is left out. Where a test of it fails:

- files of chunks (`c.0`) or records differ: caches that people have can no longer be finished, or are read wrongly.
  That takes a new format version, and a file of its own beside this one.
- only `zarr.json` of arrays, and with them `files.json` and records, differ after an update of zarr: it writes other
  metadata. Caches are still read if the tests of reading pass. Parts made by the two versions have other names, and
  equal targets are equal bytes with one version of zarr only: say so in docs/reference/format.md and the changelog,
  and make the file anew with `python -m tests.cache.test_format`.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from zarr.storage import LocalStore

from kdpipe.cache import CacheSpec, ImageInfo, TeacherRecord, open_cache
from kdpipe.cache.format.layout import array_layout, index_columns, part_layout
from kdpipe.cache.format.zarr_arrays import WrittenFiles
from kdpipe.cache.plan import level_shapes
from kdpipe.cache.spec import CODECS, DTYPES
from kdpipe.cache.views import input_size
from kdpipe.cache.write.arrays import write_array

if TYPE_CHECKING:
    from tests.cache.conftest import Kit
    from tests.conftest import Forks

GOLDEN = Path(__file__).with_name("format_v1.json")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "format.md"
IMAGES = [ImageInfo(7, "a.jpg", 32, 48, 1), ImageInfo(-3, "ordner/ä.jpg", 48, 32, 0)]
KINDS = [*((tier, dtype, "none") for tier in ("objects", "pyramid") for dtype in DTYPES)]
KINDS += [("pyramid", "int8", "zstd"), ("objects", "int8", "lz4")]

Array = np.ndarray[Any, np.dtype[Any]]


def whole_numbers(*shape: int, start: int = 0) -> torch.Tensor:
    """Values that no storage type rounds but int4, and among them the 127 that makes a scale of int8 exactly 1."""
    values = (torch.arange(int(np.prod(shape))).reshape(shape) + start) % 128
    values[..., 0] = 127
    return values.float()


def record(image: ImageInfo, view: str, spec: CacheSpec) -> TeacherRecord:
    size = input_size((image.height, image.width), spec.scale)
    count = spec.proposals + image.num_gt
    corners = torch.arange(count).float()[:, None] % 16
    return TeacherRecord(
        image_id=image.image_id,
        view=view,
        file_name=image.file_name,
        original_size=(image.height, image.width),
        input_size=size,
        num_proposals=spec.proposals,
        boxes=torch.cat([corners, corners + 1, corners + 8, corners + 10], dim=1),
        logits=whole_numbers(count, spec.num_classes + 1),
        deltas=whole_numbers(count, spec.num_classes, 4, start=3),
        embeddings=whole_numbers(count, spec.embedding_dim, start=5),
        roi_features=whole_numbers(count, spec.channels, 7, 7),
        features=[whole_numbers(spec.channels, h, w, start=h) for h, w in level_shapes(size, spec.strides)],
        file_digest=-image.image_id,
    )


def make(path: Path, kit: "type[Kit]", tier: str, dtype: str, codec: str) -> Path:
    spec = kit.spec(tier=tier, dtype=dtype, codec=codec, views=("identity", "hflip"))
    writer = kit.writer(path, spec, IMAGES, part_size=1)
    writer.write_head({"fc.weight": whole_numbers(3, 2), "fc.count": torch.tensor(17), "empty": torch.zeros(0, 3)})
    for index in writer.pending():
        with writer.part(index) as part:
            for view in spec.views:
                part.add(record(writer.images[index], view, spec))
    return path


def digests(path: Path, codec: str) -> dict[str, str]:
    """Of each file, without what depends on blosc or zstd: compressed chunks, and names and digests of them."""
    sums = {}
    for file in sorted(path.rglob("*")):
        name = re.sub("(?<=/)[0-9a-f]{16}(?=/)", "*", str(file.relative_to(path)))
        compressed = codec != "none" or name.startswith("plan/") or name == "zarr.json"
        data = file.read_bytes() if file.is_file() else b""
        if compressed and file.name == "files.json":
            data = json.dumps(sorted(json.loads(data))).encode()
        elif compressed:
            data = re.sub(rb'"(files|checksum)":"[0-9a-f]{64}"', b"", data)
        if file.is_file() and not (compressed and re.fullmatch(r"c[.\d]*", file.name)):
            sums[name] = hashlib.sha256(data).hexdigest()[:16]
    return sums


@pytest.mark.parametrize(("tier", "dtype", "codec"), KINDS)
def test_the_bytes_of_version_1(tmp_path: Path, kit: "type[Kit]", tier: str, dtype: str, codec: str) -> None:
    files = digests(make(tmp_path / "x.zarr", kit, tier, dtype, codec), codec)
    assert files == json.loads(GOLDEN.read_text())[f"{tier} {dtype} {codec}"]


def test_names_and_records_letter_by_letter(tmp_path: Path, kit: "type[Kit]") -> None:
    path = make(tmp_path / "x.zarr", kit, "objects", "int8", "none")
    part = path / "parts" / "00001"
    folder = kit.files(path, "parts/00001")
    text = (part / "zarr.json").read_text()
    content = json.loads(text)["attributes"]["kdpipe"]
    listed = (folder / "files.json").read_bytes()
    assert hashlib.sha256(listed).hexdigest() == content["files"]
    assert folder.name == content["files"][:16]
    root = {name: json.loads((path / "zarr.json").read_text())["attributes"]["kdpipe"][name] for name in ROOT}
    entries = (
        f'"files":"{content["files"]}","images":[1,2],"part":1,"root":"{digest(root)}",'
        '"rows":{"box":24,"byte":26,"element":0,"object":0,"view":2},"skipped":[]'
    )
    checksum = hashlib.sha256(f"{{{entries}}}".encode()).hexdigest()
    assert text == (
        f'{{"attributes":{{"kdpipe":{{"checksum":"{checksum}",{entries}}}}},"node_type":"group","zarr_format":3}}'
    )
    files = {name.relative_to(folder).as_posix(): name.read_bytes() for name in folder.rglob("*") if name.is_file()}
    del files["files.json"]
    expected = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in files.items()}
    assert listed == json.dumps(expected, sort_keys=True, separators=(",", ":")).encode()
    layout = part_layout(open_cache(path).spec)
    assert files.keys() == {f"{name}/zarr.json" for name in layout} | {
        f"{name}/{file}" for name in layout for file in layout[name].files(content["rows"][layout[name].per])
    }


ROOT = ("spec", "identity", "plan")


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_zarr(folder: Path, rows: slice) -> Array:
    """With the pipeline that comes with zarr."""
    return np.asarray(zarr.open_array(folder, mode="r", zarr_format=3)[rows])


def read_zarrs(folder: Path, rows: slice) -> Array:
    """With zarr and the codecs of zarrs."""
    pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
    with zarr.config.set(pipeline):
        return read_zarr(folder, rows)


def read_tensorstore(folder: Path, rows: slice) -> Array:
    """With tensorstore, which takes what is missing for zeros unless it is told not to."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder)}, "fill_missing_data_reads": False}
    return np.asarray(tensorstore.open(spec, open=True).result()[rows].read().result())


LIBRARIES: dict[str, Callable[[Path, slice], Array]] = {
    "zarr": read_zarr,
    "zarrs": read_zarrs,
    "tensorstore": read_tensorstore,
}
ALL = slice(None)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tier", ["objects", "pyramid"])
def test_other_libraries_read_the_same(tmp_path: Path, kit: "type[Kit]", tier: str, codec: str, library: str) -> None:
    path = make(tmp_path / "x.zarr", kit, tier, "int8", codec)
    cache, read = open_cache(path), LIBRARIES[library]
    assert read(kit.files(path, "plan") / "image_ids", ALL).tolist() == [7, -3]
    for part in ("parts/00000", "parts/00001"):
        folder = kit.files(path, part)
        names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
        assert names
        arrays = {name: read(folder / name, ALL) for name in names}
        for number, values in enumerate(arrays["index"].tolist()):
            row = dict(zip(index_columns(cache.spec), values, strict=True))
            targets = cache.targets(row["image_id"], ("identity", "hflip")[row["view"]])
            boxes, objects = (slice(row[f"{per}_start"], row[f"{per}_stop"]) for per in ("box", "object"))
            for name, layout in part_layout(cache.spec).items():
                expected = getattr(targets, name, None)
                if name == "features":
                    start = row["element_start"]
                    assert expected is not None
                    stored = np.concatenate([level.numpy().ravel() for level in expected])
                    assert np.array_equal(arrays[name][start : start + len(stored)], stored)
                elif expected is not None:
                    rows = {"box": boxes, "object": objects}.get(layout.per, number)
                    assert np.array_equal(arrays[name][rows], expected.numpy()), name
            file_name = bytes(arrays["file_names"][row["name_start"] : row["name_stop"]]).decode()
            assert file_name == targets.file_name
    for name, parameter in cache.head().items():
        stored = read(kit.files(path, "head") / name, ALL)
        assert stored.dtype == parameter.numpy().dtype
        assert np.array_equal(stored.reshape(parameter.shape), parameter.numpy())


@pytest.mark.parametrize("library", ["zarr", "tensorstore"])
@pytest.mark.parametrize("codec", CODECS)
def test_other_libraries_check_what_they_read(tmp_path: Path, kit: "type[Kit]", codec: str, library: str) -> None:
    """A changed byte anywhere in a file, be it of a chunk, of its checksum, or of the index, is an error."""
    path = make(tmp_path / "x.zarr", kit, "pyramid", "int8", codec)
    folder, read = kit.files(path, "parts/00000"), LIBRARIES[library]
    choose = np.random.default_rng(0)
    for name in ("features", "boxes", "index"):
        (file,) = (folder / name).glob("c.*")
        data = file.read_bytes()
        read(folder / name, ALL)
        for at in (0, len(data) // 2, len(data) - 1, *choose.integers(len(data), size=20).tolist()):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
            with pytest.raises((ValueError, RuntimeError)):
                read(folder / name, ALL)
        file.write_bytes(data)


@pytest.mark.parametrize("codec", CODECS)
def test_zarrs_checks_whole_shards(tmp_path: Path, codec: str) -> None:
    """It checks chunks only where it reads all rows that a shard has room for; of less it gives wrong values.

    Those of a cache mostly have room for more rows than there are: kdpipe does not read with zarrs.
    """
    values = np.arange(192, dtype=np.float32).reshape(64, 3)
    write_array(WrittenFiles(LocalStore(tmp_path)), "x", array_layout("", (3,), "float32", codec, 16), values)
    file = tmp_path / "x" / "c.0.0"
    data = file.read_bytes()
    for at in range(0, len(data), 7):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(RuntimeError, match="checksum"):
            read_zarrs(tmp_path / "x", ALL)
    file.write_bytes(data)
    assert np.array_equal(read_zarrs(tmp_path / "x", ALL), values)


AGAIN = """
import sys, conftest, zarr
from numcodecs import blosc
zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
blosc.set_nthreads(1)
for codec in ("zstd", "lz4", "none"):
    spec = conftest.Kit.spec(dtype="float16", codec=codec, channels=64, scale=(320, 240))
    conftest.Kit.make(conftest.Path(sys.argv[1]) / codec, spec, count=3)
"""


def test_equal_targets_are_equal_bytes(tmp_path: Path, kit: "type[Kit]", forks: "Forks") -> None:
    """In two processes, and with any number of threads of zarr and blosc."""
    other = forks.start(AGAIN, tmp_path, cwd=tmp_path)
    assert other.wait() == 0, other.err
    for codec in CODECS:
        spec = kit.spec(dtype="float16", codec=codec, channels=64, scale=(320, 240))
        with zarr.config.set({"async.concurrency": 8}):
            here = kit.make(tmp_path / "here" / codec, spec, count=3)
        rows = len(read_zarr(kit.files(here, "parts/00000") / "features", ALL))
        assert rows > 4 * part_layout(spec)["features"].chunk_rows  # there is something to do at once
        assert kit.tree(tmp_path / codec) == kit.tree(here)


def test_the_page_shows_how(
    tmp_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of docs/reference/format.md, as it stands there."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "coco.zarr", kit, "pyramid", "int8", "zstd")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 8
    exec(compile(code, str(PAGE), "exec"), {})
    assert "7 [[ 0.  1.  8. 10.]" in capsys.readouterr().out


def test_the_page_names_every_array_and_column(kit: "type[Kit]") -> None:
    page = PAGE.read_text(encoding="utf-8")
    for tier in ("objects", "pyramid"):
        spec = kit.spec(tier=tier)
        names = [name for name in (*index_columns(spec), *part_layout(spec)) if not name.startswith("level")]
        assert [name for name in names if f"`{name}`" not in page] == []


if __name__ == "__main__":
    from tests.cache.conftest import Kit as Maker

    content = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            content[" ".join(kind)] = digests(make(Path(scratch) / "x.zarr", Maker, *kind), kind[2])
    GOLDEN.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
