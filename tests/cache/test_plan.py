import dataclasses
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.cache import CacheError, ImageInfo, plan_parts, raw_bytes
from kdpipe.cache.plan import level_shapes
from kdpipe.cache.spec import DTYPES, FIELD_OF_ARRAY, MAX_OBJECTS, TIERS
from kdpipe.cache.write.encode import encode_record

if TYPE_CHECKING:
    from tests.cache.conftest import Kit

SIZES = st.lists(st.tuples(st.integers(20, 200), st.integers(20, 200), st.integers(0, 9)), max_size=30)


@settings(max_examples=50)
@given(sizes=SIZES, part_size=st.integers(1, 300_000))
def test_every_image_is_in_exactly_one_part(
    kit: "type[Kit]", sizes: list[tuple[int, int, int]], part_size: int
) -> None:
    images = [ImageInfo(n, f"{n}.jpg", *size) for n, size in enumerate(sizes)]
    spec = kit.spec()
    parts = plan_parts(images, spec, part_size)
    assert [index for part in parts for index in part] == list(range(len(images)))
    for part in parts:
        assert len(part) == 1 or sum(raw_bytes([images[i] for i in part], spec).values()) <= part_size
    for first, second in pairwise(parts):  # as full as they can be
        grown = [images[i] for i in range(first.start, second.start + 1)]
        assert sum(raw_bytes(grown, spec).values()) > part_size
    assert parts == plan_parts(tuple(images), spec, part_size)


def test_a_part_holds_at_most_256_images(kit: "type[Kit]") -> None:
    images = [ImageInfo(n, f"{n}.jpg", 40, 60, 0) for n in range(600)]
    parts = plan_parts(images, kit.spec(tier="predictions"), 1 << 40)
    assert parts == [range(256), range(256, 512), range(512, 600)]
    assert plan_parts(images[:256], kit.spec(), 1 << 40) == [range(256)]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("views", [("identity",), ("identity", "hflip")])
def test_raw_bytes_are_those_of_what_is_stored(kit: "type[Kit]", tier: str, dtype: str, views: tuple[str, ...]) -> None:
    """All boxes are positive, and no more than may have RoI features: then the bound is reached."""
    spec = kit.spec(tier=tier, dtype=dtype, views=views, channels=5)
    images = kit.images()
    expected = dict.fromkeys(spec.fields, 0)
    for image in images:
        for view in views:
            record = kit.record(image, view, spec)
            if image.num_gt:
                record = dataclasses.replace(record, boxes=torch.tensor([[1.0, 1, 9, 9]]).expand(len(record.boxes), 4))
            encoded = encode_record(record, spec)
            arrays = {**encoded.rows, "features": encoded.features, "scale": encoded.scale}
            for name, values in arrays.items():
                if values is not None:
                    expected[FIELD_OF_ARRAY.get(name, name)] += values.nbytes
    bound = raw_bytes(images, spec)
    if tier == "objects":  # images without annotations have no RoI features, and could have had some
        sizes = spec.row_bytes()
        size = sum(size for name, size in sizes.items() if name in spec.object_arrays())
        expected["roi_features"] += sum(size * spec.proposals * len(views) for image in images if not image.num_gt)
    assert bound == expected


def test_raw_bytes_of_rois_are_bounded(kit: "type[Kit]") -> None:
    spec = kit.spec(tier="objects", dtype="float16", proposals=300)
    size = spec.row_bytes()["roi_features"] + 4
    few, many = (raw_bytes([ImageInfo(1, "1.jpg", 48, 64, count)], spec)["roi_features"] for count in (3, 70))
    assert (few, many) == (MAX_OBJECTS * size, 70 * size)


def test_raw_bytes_of_a_coco_image(kit: "type[Kit]") -> None:
    spec = kit.spec(dtype="float16", channels=256, strides=(4, 8, 16, 32, 64), scale=(1333, 800))
    cells = 200 * 272 + 100 * 136 + 50 * 68 + 25 * 34 + 13 * 17  # 800 x 1067, padded to 1088
    assert raw_bytes([ImageInfo(1, "1.jpg", 480, 640, 0)], spec)["features"] == cells * 256 * 2


def test_level_shapes() -> None:
    assert level_shapes((65, 96), (8, 32, 64)) == [(12, 12), (3, 3), (2, 2)]


def test_no_images(kit: "type[Kit]") -> None:
    assert plan_parts([], kit.spec(), 1000) == []
    assert set(raw_bytes([], kit.spec()).values()) == {0}


def test_refusals(kit: "type[Kit]") -> None:
    with pytest.raises(CacheError, match="positive"):
        plan_parts(kit.images(), kit.spec(), 0)
    with pytest.raises(CacheError, match=r"\[1000\]"):
        plan_parts(kit.images(1) * 2, kit.spec(), 1000)


def test_an_image_of_which_nothing_is_left(kit: "type[Kit]") -> None:
    """It can only be skipped, and takes no room for features."""
    images, spec = kit.images(), kit.spec()
    thin = ImageInfo(5, "thin.png", 1, 4000, 0)
    assert raw_bytes([*images, thin], spec)["features"] == raw_bytes(images, spec)["features"]
    assert plan_parts([*images, thin], spec, 1)[-1] == range(len(images), len(images) + 1)
