import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdpipe.cache import CacheError, CacheSpec, TeacherRecord, TeacherTargets, open_cache
from kdpipe.cache.plan import ImageInfo
from kdpipe.cache.quantize import dequantize, quantize4
from kdpipe.cache.views import view_matrix
from kdpipe.cache.write.encode import encode_record

if TYPE_CHECKING:
    from tests.cache.conftest import Kit
    from tests.conftest import Forks


def check(record: TeacherRecord, targets: TeacherTargets, spec: CacheSpec) -> None:
    """All fields are as the teacher gave them, to the precision of the storage type."""
    for name in ("image_id", "view", "file_name", "original_size", "input_size", "num_proposals"):
        assert getattr(targets, name) == getattr(record, name)
    expected = view_matrix(record.original_size, record.input_size, record.view == "hflip")
    np.testing.assert_array_equal(targets.matrix, expected)
    encoded = encode_record(record, spec).rows
    for name in ("boxes", "logits", "deltas", "embeddings", "embedding_scale", "roi_rows", "roi_features", "roi_scale"):
        stored = getattr(targets, name)
        assert (stored is None) == (name not in encoded), name
        if stored is not None:
            np.testing.assert_array_equal(stored.numpy(), encoded[name])
    if "features" in spec.fields:
        assert record.features is not None
        assert targets.features is not None
        for level, level_features in enumerate(record.features):
            if level not in spec.levels:
                assert targets.features[level] is None
                continue
            scale = None if targets.scale is None else targets.scale[level]
            check_values(targets.features[level], scale, targets.pyramid()[level], level_features, spec)
    else:
        assert targets.features is None
        assert targets.scale is None


def check_values(
    stored: torch.Tensor | None,
    scale: torch.Tensor | None,
    floats: torch.Tensor | None,
    written: torch.Tensor,
    spec: CacheSpec,
) -> None:
    assert stored is not None
    assert floats is not None
    assert stored.dtype == getattr(torch, spec.element_dtype)
    if spec.dtype == "int4":
        assert scale is not None
        for array, expected in zip((stored, scale), quantize4(written), strict=True):
            assert torch.equal(array, expected)
        assert torch.equal(floats, dequantize(stored, scale))
    elif spec.dtype == "int8":
        assert scale is not None
        torch.testing.assert_close(scale, written.abs().amax((-2, -1)) / 127)
        assert ((floats - written).abs() <= 0.5001 * scale[..., None, None]).all()
    else:
        torch.testing.assert_close(floats, written.to(stored.dtype).float(), rtol=0, atol=0)


@pytest.mark.parametrize("tier", ["predictions", "embeddings", "objects", "pyramid"])
@pytest.mark.parametrize("dtype", ["int4", "int8", "float16", "float32"])
@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
def test_every_tier_type_and_codec(tmp_path: Path, kit: "type[Kit]", tier: str, dtype: str, codec: str) -> None:
    spec = kit.spec(tier=tier, dtype=dtype, codec=codec, class_agnostic=codec == "lz4")
    path = kit.make(tmp_path / "x.zarr", spec, count=4)
    cache = open_cache(path)
    assert cache.spec == spec
    for image in kit.images(4):
        check(kit.record(image, "identity", spec), cache.targets(image.image_id), spec)


@pytest.mark.parametrize(("dtype", "channels"), [("int4", 5), ("int8", 6), ("float16", 6)])
@pytest.mark.parametrize("levels", [(1, 2, 3), (0, 2), (3,)])
def test_a_part_of_the_levels(
    tmp_path: Path, kit: "type[Kit]", dtype: str, channels: int, levels: tuple[int, ...]
) -> None:
    spec = kit.spec(dtype=dtype, channels=channels, levels=levels)
    cache = open_cache(kit.make(tmp_path / "x.zarr", spec, count=4))
    for image in kit.images(4):
        check(kit.record(image, "identity", spec), cache.targets(image.image_id), spec)
        some = cache.targets(image.image_id, levels=levels[-1:]).features
        assert some is not None
        assert [level is not None for level in some] == [level == levels[-1] for level in range(4)]
    missing = next(level for level in range(4) if level not in levels)
    with pytest.raises(CacheError, match=rf"does not hold P{missing + 3} of the pyramid.*--levels"):
        cache.targets(image.image_id, levels=[missing])


@pytest.mark.parametrize("tier", ["objects", "pyramid"])
def test_both_views(tmp_path: Path, kit: "type[Kit]", tier: str) -> None:
    spec = kit.spec(tier=tier, views=("identity", "hflip"))
    cache = open_cache(kit.make(tmp_path / "x.zarr", spec))
    for image in kit.images():
        for view in spec.views:
            check(kit.record(image, view, spec), cache.targets(image.image_id, view), spec)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(30, 120), st.integers(30, 120)), min_size=1, max_size=6),
    tier=st.sampled_from(["objects", "pyramid"]),
    dtype=st.sampled_from(["int8", "float32"]),
    part_size=st.integers(1, 200_000),
)
def test_ragged_sizes(
    tmp_path_factory: pytest.TempPathFactory,
    kit: "type[Kit]",
    sizes: list[tuple[int, int, int]],
    tier: str,
    dtype: str,
    part_size: int,
) -> None:
    spec = kit.spec(tier=tier, dtype=dtype)
    images = [ImageInfo(n, f"{n}.jpg", height, width, 0) for n, (_, height, width) in enumerate(sizes)]
    writer = kit.writer(tmp_path_factory.mktemp("c") / "x.zarr", spec, images, part_size=part_size)
    for index, span in enumerate(writer.parts):
        with writer.part(index) as part:
            for n in span:
                part.add(kit.record(images[n], "identity", spec, rois=sizes[n][0]))
    cache = open_cache(writer.location)
    for image, (rois, _, _) in zip(images, sizes, strict=True):
        check(kit.record(image, "identity", spec, rois=rois), cache.targets(image.image_id), spec)


def test_head_metadata_and_lookup(cache_path: Path, kit: "type[Kit]") -> None:
    cache = open_cache(cache_path)
    head = cache.head()
    assert list(head) == sorted(kit.head())
    for name, values in kit.head().items():
        expected = values.float() if values.is_floating_point() else values
        torch.testing.assert_close(head[name], expected, rtol=0, atol=0)
    assert cache.metadata == {"config": "x = 1"}
    assert cache.identity["options"] == {"device": "cpu"}
    assert cache.image_ids.tolist() == [image.image_id for image in kit.images()]
    assert cache.image_ids.dtype == np.int64
    assert len(cache) == 7
    assert 1000 in cache
    assert np.int64(993) in cache
    assert 1001 not in cache
    assert "1000" not in cache
    assert cache.skipped == []
    image = kit.images()[3]
    index = cache.index(image.image_id)
    record = kit.record(image, "identity", cache.spec)
    assert record.features is not None
    assert index.num_rois == len(record.boxes)
    assert index.level_shapes == tuple(tuple(x.shape[1:]) for x in record.features)
    assert (index.file_name, index.original_size, index.input_size, index.num_proposals, index.file_digest) == (
        image.file_name,
        record.original_size,
        record.input_size,
        record.num_proposals,
        record.file_digest,
    )
    assert index.file_digest < 0


def test_results_are_writable_and_independent(cache_path: Path) -> None:
    cache = open_cache(cache_path)
    first = cache.targets(1000)
    first.boxes.zero_()
    assert first.features is not None
    assert first.features[0] is not None
    first.features[0].zero_()
    again = cache.targets(1000)
    assert again.boxes.abs().sum() > 0
    assert again.features is not None
    assert again.features[0] is not None
    assert again.features[0].abs().sum() > 0


@pytest.mark.parametrize("levels", [[0], [3], [1, 2], [0, 3], [2, 0], []])
def test_some_levels(cache_path: Path, levels: list[int]) -> None:
    cache = open_cache(cache_path)
    everything, some = cache.targets(986), cache.targets(986, levels=levels)
    assert everything.features is not None
    assert some.features is not None
    for level in range(4):
        expected, actual = everything.features[level], some.features[level]
        assert (actual is not None) == (level in levels)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("tier", ["objects", "pyramid"])
@pytest.mark.parametrize("rois", [[0, 1, 2], [13, 0, 7, 0], [14], [], list(range(15))])
def test_some_rois(tmp_path: Path, kit: "type[Kit]", tier: str, rois: list[int]) -> None:
    cache = open_cache(kit.make(tmp_path / "x.zarr", kit.spec(tier=tier), count=4))
    image_id = kit.images()[3].image_id  # 12 proposals, 3 ground-truth boxes
    everything, some = cache.targets(image_id), cache.targets(image_id, rows=np.array(rois, dtype=np.int64))
    for name in cache.spec.box_arrays():
        torch.testing.assert_close(getattr(some, name), getattr(everything, name)[rois], rtol=0, atol=0)
    for name in cache.spec.object_arrays():  # of the boxes that they are of, whichever were asked for
        torch.testing.assert_close(getattr(some, name), getattr(everything, name), rtol=0, atol=0)
    assert some.num_proposals == sum(roi < 12 for roi in rois)


def test_only_what_is_asked_for_is_read(cache_path: Path, kit: "type[Kit]") -> None:
    for name in ("features", "deltas", "embeddings", "scale"):
        for file in cache_path.glob(f"parts/*/*/{name}/c.*"):
            kit.flip_bit(file)
    targets = open_cache(cache_path).targets(1000, fields=["logits"])
    assert targets.logits is not None
    assert targets.features is None
    assert targets.scale is None
    assert targets.deltas is None
    assert targets.embeddings is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_id": 5}, "Image 5 is not in the cache .* of 7 images"),
        ({"view": "hflip"}, "views identity, not 'hflip'"),
        ({"fields": ["roi_features"]}, "tier 'pyramid' .* cannot give roi_features"),
        ({"levels": [4]}, "levels 0 to 3"),
        ({"rows": [12]}, "whole numbers from 0 to 11"),
        ({"rows": [-1]}, "whole numbers from 0 to 11"),
        ({"rows": [0.5]}, "whole numbers from 0 to 11"),
    ],
)
def test_wrong_questions(cache_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        open_cache(cache_path).targets(**{"image_id": 1000, **arguments})


SPAWNED = """
import pickle, sys
cache = pickle.load(sys.stdin.buffer)
print(cache.targets(1000).boxes.double().sum().item())
"""


def test_pickled_and_read_in_another_process(cache_path: Path) -> None:
    cache = open_cache(cache_path)
    total = cache.targets(1000).boxes.double().sum().item()  # the parent has open arrays now
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", SPAWNED],
        input=pickle.dumps(cache),
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert float(answer.stdout) == total
    assert answer.stderr == b""


FORKED = """
import os, sys
from kdpipe.cache import open_cache
cache = open_cache(sys.argv[1])
wanted = cache.targets(1000).boxes.tolist()
pid = os.fork()
if pid == 0:
    os._exit(0 if cache.targets(1000).boxes.tolist() == wanted and cache.head() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_forked_after_the_parent_has_read(tmp_path: Path, cache_path: Path, forks: "Forks") -> None:
    process = forks.start(FORKED, cache_path, cwd=tmp_path)
    assert process.wait() == 0, process.err


@pytest.mark.parametrize(("rows", "parts"), [(2, 100), (100, 2)])
def test_many_parts_with_few_kept_in_memory(
    tmp_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch, rows: int, parts: int
) -> None:
    monkeypatch.setattr("kdpipe.cache.read.reader._MAX_INDEX_ROWS", rows)
    monkeypatch.setattr("kdpipe.cache.read.reader._MAX_PARTS", parts)
    spec = kit.spec()
    images = kit.images(9)
    writer = kit.writer(tmp_path / "x.zarr", spec, images, part_size=1)
    kit.fill(writer)
    cache = open_cache(writer.location)
    for image in images + images[::-1]:
        check(kit.record(image, "identity", spec), cache.targets(image.image_id), spec)


def test_float16_overflow_is_refused(tmp_path: Path, kit: "type[Kit]") -> None:
    spec = kit.spec(dtype="float16")
    writer = kit.writer(tmp_path / "x.zarr", spec, kit.images(1))
    record = kit.record(kit.images(1)[0], "identity", spec)
    assert record.features is not None
    loud = dataclasses.replace(record, features=[record.features[0] * 1e6, *record.features[1:]])
    with pytest.raises(CacheError, match=r"features for image 1000 .* not finite as float16"), writer.part(0) as part:
        part.add(loud)
    assert writer.pending() == [0]
