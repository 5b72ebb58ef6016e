import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from kdpipe.cache.plan import raw_bytes
from kdpipe.cache.spec import FIELD_OF_ARRAY
from kdpipe.cache.write.encode import encode_record
from kdpipe.cache.write.estimate import as_stored, disk_bytes, padding
from kdpipe.cache.write.head import head_bytes

if TYPE_CHECKING:
    from tests.cache.conftest import Kit


def stored_bytes(path: Path, group: str) -> dict[str, int]:
    """Bytes of the files of each array below a group."""
    sizes: dict[str, int] = {}
    for file in path.glob(f"{group}/*/c.*"):
        sizes[file.parent.name] = sizes.get(file.parent.name, 0) + file.stat().st_size
    return sizes


@pytest.mark.parametrize("tier", ["objects", "pyramid"])
@pytest.mark.parametrize("dtype", ["int4", "int8", "float32"])
@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_every_image_sampled_is_what_is_stored(
    tmp_path: Path, kit: "type[Kit]", tier: str, dtype: str, codec: str
) -> None:
    spec = kit.spec(tier=tier, dtype=dtype, codec=codec)
    images = kit.images(6)
    estimate = disk_bytes([kit.record(image, "identity", spec) for image in images], images, spec)
    assert tuple(estimate) == spec.fields
    kit.fill(kit.writer(tmp_path / "x.zarr", spec, images, part_size=1 << 30))
    stored = dict.fromkeys(spec.fields, 0)
    for array, size in stored_bytes(tmp_path / "x.zarr", "parts/00000/*").items():
        if (field := FIELD_OF_ARRAY.get(array, array)) in stored:
            stored[field] += size
    assert estimate == pytest.approx(stored, rel=1e-4)


def test_a_sample_speaks_for_all(tmp_path: Path, kit: "type[Kit]") -> None:
    spec = kit.spec(tier="pyramid", views=("identity", "hflip"))
    images = kit.images(24)
    estimate = disk_bytes([kit.record(image, "identity", spec) for image in images[8:16]], images, spec)
    kit.fill(kit.writer(tmp_path / "x.zarr", spec, images, part_size=1 << 30))
    assert sum(estimate.values()) == pytest.approx(
        sum(stored_bytes(tmp_path / "x.zarr", "parts/00000/*").values()), rel=0.1
    )


def test_what_a_teacher_pads_to_a_size_counts(tmp_path: Path, kit: "type[Kit]") -> None:
    spec, images = kit.spec(tier="pyramid", dtype="int8", codec="none"), kit.images(6)
    records = [kit.record(image, "identity", spec) for image in images]
    assert padding(records, spec) == 1
    padded = [  # with as much noise in the padding as in the picture
        dataclasses.replace(
            x, features=[torch.randn(*level.shape[:2], 2 * level.shape[2]) for level in x.features or ()]
        )
        for x in records
    ]
    assert padding(padded, spec) == 2
    with kit.writer(tmp_path / "x.zarr", spec, images, part_size=1 << 30).part(0) as part:
        for record in padded:
            part.add(record)
    stored = stored_bytes(tmp_path / "x.zarr", "parts/00000/*")
    estimate = disk_bytes(padded, images, spec)["features"]
    assert estimate == pytest.approx(stored["features"] + stored["scale"], rel=0.1)


def test_images_without_boxes(kit: "type[Kit]") -> None:
    spec = kit.spec()
    (image,) = kit.images(1)
    sizes = disk_bytes([kit.record(image, "identity", spec, rois=0)], [image], spec)
    assert sizes["boxes"] < 50  # the index of a shard
    assert 0 < sizes["features"] < 2 * raw_bytes([image], spec)["features"]


def test_the_first_boxes_of_each_kind_and_all_of_the_ground_truth(kit: "type[Kit]") -> None:
    few = kit.spec(tier="objects", proposals=5, jittered=2)
    image = kit.images()[3]
    record = dataclasses.replace(
        kit.record(image, "identity", kit.spec(tier="objects")), num_proposals=8, num_jittered=4
    )
    cut = as_stored(record, few)
    rows = [*range(5), 8, 9, *range(12, 15)]
    assert (cut.num_proposals, cut.num_jittered, cut.num_gt) == (5, 2, 3)
    for name in ("boxes", "logits", "deltas", "embeddings", "roi_features"):
        assert torch.equal(getattr(cut, name), getattr(record, name)[rows])
    assert len(encode_record(cut, few).rows["boxes"]) == 10
    assert disk_bytes([record], [image], few) == disk_bytes([cut], [image], few)
    assert torch.equal(as_stored(record, dataclasses.replace(few, proposals=9, jittered=9)).boxes, record.boxes)
    assert as_stored(dataclasses.replace(record, embeddings=None), few).embeddings is None


def test_the_head_is_measured_as_it_is_written(tmp_path: Path, kit: "type[Kit]") -> None:
    kit.writer(tmp_path / "x.zarr", kit.spec(), kit.images()).write_head(kit.head())
    stored = sum(file.stat().st_size for file in (tmp_path / "x.zarr").glob("head/*/*/*"))
    assert head_bytes(kit.head(), "zstd") == stored > 0
