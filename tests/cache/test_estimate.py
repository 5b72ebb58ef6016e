"""Estimates of a cache's size, against caches that were written."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kdpipe.cache.plan import raw_bytes
from kdpipe.cache.spec import CODECS, DTYPES
from kdpipe.cache.write.estimate import compression, disk_bytes

if TYPE_CHECKING:
    from tests.cache.conftest import Kit

FOLDERS = {"features": ("features", "scale"), "roi_features": ("roi_features", "roi_scale")}


@pytest.mark.parametrize("tier", ["roi", "pyramid"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", CODECS)
def test_all_images_sampled_give_the_size_of_the_files(
    kit: "type[Kit]", tmp_path: Path, tier: str, dtype: str, codec: str
) -> None:
    spec = kit.spec(tier=tier, dtype=dtype, codec=codec, channels=32, scale=(192, 128))
    images = kit.images(6)
    found = disk_bytes(images, spec, compression([kit.record(image, "identity", spec) for image in images], spec))
    assert set(found) == set(spec.fields)
    kit.fill(kit.writer(tmp_path / "x.zarr", spec, images, part_size=1 << 30))
    for field, estimated in found.items():
        folders = [tmp_path / "x.zarr" / "parts" / "00000" / name for name in FOLDERS.get(field, (field,))]
        stored = sum(file.stat().st_size for folder in folders for file in folder.glob("c*"))
        if codec == "none":  # the last chunk is filled with zeros
            assert raw_bytes(images, spec)[field] == estimated < stored
        else:
            assert estimated == pytest.approx(stored, rel=0.06, abs=400)  # the shard index, and zeros at the end


def test_images_without_boxes(kit: "type[Kit]") -> None:
    spec = kit.spec()
    (image,) = kit.images(1)
    ratios = compression([kit.record(image, "identity", spec, rois=0)], spec)
    assert ratios["boxes"] == 1.0
    assert 0 < ratios["features"] < 1.1
