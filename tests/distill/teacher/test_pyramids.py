"""The teacher's pyramids of a batch: images of several sizes, stored in several ways."""

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from mmcv.ops import roi_align
from torch import Tensor

from kdpipe.cache.quantize import dequantize, quantize
from kdpipe.distill.teacher.maps import StoredMaps
from kdpipe.distill.teacher.pyramids import StoredPyramid, TeacherPyramids
from kdpipe.distill.teacher.targets import RoiTargets, teacher_roi_features

if TYPE_CHECKING:
    from tests.distill.conftest import Pair

SIZES = ((64, 48), (32, 64), (64, 48), (64, 48))  # of the images
BOXES = torch.tensor([[4.0, 3.0, 20.0, 25.0], [0.0, 0.0, 31.0, 30.0], [10.0, 2.0, 17.5, 29.0]])


def pyramid(seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    height, width = SIZES[seed]
    return [torch.randn(6, height // stride, width // stride, generator=g) for stride in (4, 8, 16, 32)]


def expected(levels: list[Tensor], boxes: Tensor) -> Tensor:
    """Box by box, each from the level that its size assigns: up to 56 pixels the first."""
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)
    features: Tensor = roi_align(levels[0][None], rois, 7, 0.25, 0, "avg", True)
    return features


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_each_roi_is_of_its_own_image(pair: "type[Pair]", dtype: str) -> None:
    stored: dict[int, StoredPyramid] = {}
    wanted = []
    for image in (0, 1, 3):  # nothing is asked of image 2
        levels = pyramid(image)
        if dtype == "int8":
            values, scales = zip(*(quantize(level) for level in levels), strict=True)
            stored[image] = values, torch.stack(scales)
            levels = [dequantize(value, scale) for value, scale in zip(values, scales, strict=True)]
        else:
            stored[image] = [level.to(getattr(torch, dtype)) for level in levels], None
            levels = [level.to(getattr(torch, dtype)).float() for level in levels]
        wanted.append(expected(levels, BOXES))
    rois = torch.cat([torch.cat([torch.full((3, 1), float(image)), BOXES], dim=1) for image in stored])
    mixed = torch.randperm(len(rois), generator=torch.Generator().manual_seed(0))
    actual = TeacherPyramids(stored, pair.spec).roi_align(rois[mixed])
    torch.testing.assert_close(actual, torch.cat(wanted)[mixed])


def test_images_without_positives_are_left_out(pair: "type[Pair]") -> None:
    """Of such an image no level was read; another one has levels that no RoI needs left out."""

    def target(image: int, boxes: Tensor, features: tuple[Tensor | None, ...]) -> RoiTargets:
        maps = StoredMaps(np.eye(3), features, None, SIZES[image])
        labels = torch.zeros(len(boxes), dtype=torch.int64)
        return RoiTargets(boxes, labels, len(boxes), "exact", maps=maps, teacher_boxes=boxes)

    nothing = (None, None, None, None, None)
    first = (pyramid(0)[0], None, None, None, None)
    none = BOXES[:0]
    positive_features = teacher_roi_features(
        [target(1, none, nothing), target(0, BOXES, first), target(3, none, nothing)], pair.spec
    )
    torch.testing.assert_close(positive_features, expected(pyramid(0), BOXES))
    assert teacher_roi_features([target(1, none, nothing)], pair.spec).shape == (0, pair.channels, 7, 7)
