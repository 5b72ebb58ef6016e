"""The bytes of format version 2, pinned; and plain zarr-python, which opens it as docs/format.md says.

A failure here says that caches that people have can no longer be finished or read as they are: that takes a new format
version, and a file of its own beside `format_v2.json`, which holds what `digests` gives for each tier, type and codec.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zarr

from kdpipe.cache import CacheSpec, ImageInfo, TeacherRecord, open_cache
from kdpipe.cache.codecs import crc32c
from kdpipe.cache.format.root import read_root
from kdpipe.cache.plan import level_shapes
from kdpipe.cache.spec import CODECS, DTYPES
from kdpipe.cache.views import input_size

if TYPE_CHECKING:
    from tests.cache.conftest import Kit

GOLDEN = Path(__file__).with_name("format_v2.json")
PAGE = Path(__file__).parents[2] / "docs" / "format.md"
IMAGES = [ImageInfo(7, "a.jpg", 32, 48, 1), ImageInfo(-3, "ordner/ä.jpg", 48, 32, 0)]
PIPELINES = ("zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs.ZarrsCodecPipeline")


def whole_numbers(*shape: int, start: int = 0) -> torch.Tensor:
    """Values that no storage type rounds, and among them the 127 that makes a scale of int8 exactly 1."""
    values = (torch.arange(int(np.prod(shape))).reshape(shape) + start) % 128
    if len(shape) > 2:
        values[..., 0, 0] = 127
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
    head = {"fc.weight": whole_numbers(3, 2), "fc.count": torch.tensor(17), "empty": torch.zeros(0, 3)}
    writer.write_head(head)
    for index in writer.pending():
        with writer.part(index) as part:
            for view in spec.views:
                part.add(record(writer.images[index], view, spec))
    return path


def digests(path: Path, codec: str) -> dict[str, str]:
    """Of each file; what depends on the version of blosc is left out."""
    found = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if not file.is_file():
            continue
        data = file.read_bytes()
        compressed = codec != "none" or name.startswith("plan/")
        if file.name == "zarr.json":
            data = without_blosc(data, codec)
        elif compressed:
            continue
        found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


def without_blosc(data: bytes, codec: str) -> bytes:
    content = json.loads(data)
    attributes = content["attributes"]
    if codec != "none" and "checksums" in attributes:
        attributes["checksums"] = len(attributes["checksums"])
    elif "kdpipe" in attributes and (codec != "none" or "spec" in attributes["kdpipe"]):
        attributes["kdpipe"]["checksum"] = len(attributes["kdpipe"]["checksum"])
        attributes["kdpipe"]["files"] = list(attributes["kdpipe"]["files"])
    else:
        return data
    return (json.dumps(content, separators=(",", ":"), sort_keys=False) + "\n").encode()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tier", ["pyramid", "roi"])
def test_the_bytes_of_version_2(tmp_path: Path, kit: "type[Kit]", tier: str, dtype: str, codec: str) -> None:
    found = digests(make(tmp_path / "x.zarr", kit, tier, dtype, codec), codec)
    assert found == json.loads(GOLDEN.read_text())[f"{tier} {dtype} {codec}"]


def test_metadata_letter_by_letter(tmp_path: Path, kit: "type[Kit]") -> None:
    path = make(tmp_path / "x.zarr", kit, "roi", "int8", "none")
    assert (path / "parts" / "zarr.json").read_text() == '{"attributes":{},"node_type":"group","zarr_format":3}\n'
    assert (path / "head" / "fc.weight" / "zarr.json").read_text() == (
        '{"attributes":{},"chunk_grid":{"configuration":{"chunk_shape":[3,2]},"name":"regular"},"chunk_key_encoding":'
        '{"configuration":{"separator":"."},"name":"default"},"codecs":[{"configuration":{"endian":"little"},"name":'
        '"bytes"},{"name":"crc32c"}],"data_type":"float32","fill_value":0,"node_type":"array","shape":[3,2],'
        '"zarr_format":3}\n'
    )
    assert (path / "parts" / "00000" / "boxes" / "zarr.json").read_text() == (
        '{"attributes":{"checksums":"' + crc(path / "parts" / "00000" / "boxes" / "c.0.0", 16384) + '"},"chunk_grid":'
        '{"configuration":{"chunk_shape":[1024,4]},"name":"regular"},"chunk_key_encoding":{"configuration":{"separator"'
        ':"."},"name":"default"},"codecs":[{"configuration":{"chunk_shape":[1024,4],"codecs":[{"configuration":'
        '{"endian":"little"},"name":"bytes"}],"index_codecs":[{"configuration":{"endian":"little"},'
        '"name":"bytes"},{"name":"crc32c"}],"index_location":"end"},"name":"sharding_indexed"}],"data_type":"float32",'
        '"fill_value":0,"node_type":"array","shape":[1024,4],"zarr_format":3}\n'
    )
    text = (path / "parts" / "00001" / "zarr.json").read_bytes()
    start = b'{"attributes":{"kdpipe":{"checksum":"'
    assert text.startswith(start)
    blank = start + b"0" * 64 + text[len(start) + 64 :]
    assert hashlib.sha256(blank).hexdigest().encode() == text[len(start) : len(start) + 64]
    root = read_root(path).digest.encode()
    assert text.endswith(
        b'"images":[1,2],"part":1,"rois":24,"root":"%s","rows":2,"skipped":[]}},"node_type":"group","zarr_format":3}\n'
        % root
    )


def crc(file: Path, size: int) -> str:
    return crc32c(file.read_bytes()[:size]).hex()


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_values_are_the_same(tmp_path: Path, kit: "type[Kit]", dtype: str, codec: str) -> None:
    plain = open_cache(make(tmp_path / "plain.zarr", kit, "pyramid", dtype, "none"))
    small = open_cache(make(tmp_path / "small.zarr", kit, "pyramid", dtype, codec))
    for image in IMAGES:
        for view in ("identity", "hflip"):
            for field, wanted in vars(plain.targets(image.image_id, view)).items():
                same(getattr(small.targets(image.image_id, view), field), wanted)
    for name, value in plain.head().items():
        same(small.head()[name], value)


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, tuple) and any(isinstance(item, torch.Tensor) for item in wanted):
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    else:
        assert np.array_equal(found, wanted)


def test_bytes_do_not_depend_on_threads(tmp_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch) -> None:
    trees = []
    for threads in (1, 3):
        monkeypatch.setattr("kdpipe.cache.write.part_writer._ENCODERS", threads)
        trees.append(kit.tree(make(tmp_path / str(threads), kit, "pyramid", "float32", "zstd")))
    assert trees[0] == trees[1]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("codec", CODECS)
def test_plain_zarr_reads_the_same(tmp_path: Path, kit: "type[Kit]", codec: str, pipeline: str) -> None:
    path = make(tmp_path / "x.zarr", kit, "pyramid", "int8", codec)
    cache = open_cache(path)
    if pipeline.startswith("zarrs"):
        pytest.importorskip("zarrs")
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        root: Any = zarr.open_group(path, mode="r")
        assert root["plan/image_ids"][:].tolist() == [7, -3]
        for part in (root["parts/00000"], root["parts/00001"]):
            for values in part["index"][:2]:
                row = dict(zip(part["index"].attrs["columns"], values.tolist(), strict=True))
                targets = cache.targets(row["image_id"], ("identity", "hflip")[row["view"]])
                for name in ("boxes", "logits", "deltas", "embeddings"):
                    rows = part[name][row["row_start"] : row["row_stop"]]
                    assert np.array_equal(rows, getattr(targets, name).numpy())
                start = row["element_start"]
                assert targets.features is not None
                for level, wanted in enumerate(targets.features):
                    assert wanted is not None
                    shape = (6, row[f"level{level}_height"], row[f"level{level}_width"])
                    stop = start + int(np.prod(shape))
                    assert np.array_equal(part["features"][start:stop].reshape(shape), wanted.numpy())
                    start = stop
                name = bytes(part["file_names"][row["name_start"] : row["name_stop"]]).decode()
                assert name == targets.file_name
        assert np.array_equal(root["head/fc.weight"][:], cache.head()["fc.weight"].numpy())


def test_the_page_shows_how(
    tmp_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of docs/format.md, as it stands there."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "coco.zarr", kit, "pyramid", "int8", "zstd")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 5
    exec(compile(code, str(PAGE), "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("7 [[ 0.  1.  8. 10.]")


def test_the_page_names_every_array_and_column(tmp_path: Path, kit: "type[Kit]") -> None:
    page = PAGE.read_text(encoding="utf-8")
    for tier in ("roi", "pyramid"):
        part = make(tmp_path / tier, kit, tier, "int8", "zstd") / "parts" / "00000"
        columns = json.loads((part / "index" / "zarr.json").read_bytes())["attributes"]["columns"]
        arrays = [entry.name for entry in part.iterdir() if entry.is_dir()]
        names = [name for name in (*columns, *arrays) if not name.startswith("level")]
        assert [name for name in names if f"`{name}`" not in page] == []
        shutil.rmtree(tmp_path / tier)
