"""What a loss is given of the student's pyramid, against mmdet's own extractor."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor

from kdpipe.distill.outputs import BatchRois, TeacherOutputs
from kdpipe.distill.pairs import RoiPairs

if TYPE_CHECKING:
    from tests.distill.conftest import Pair


def rois(count: int = 40) -> BatchRois:
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=g) * 20
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=g) ** 2 * 420], dim=1)
    images = torch.arange(count)[:, None] % 2
    return BatchRois(torch.cat([images, boxes], dim=1), torch.zeros(count).long(), torch.arange(count) % 3 > 0)


def pairs(pair: "type[Pair]", strides: tuple[int, ...]) -> tuple[RoiPairs, list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    pyramid = [torch.randn(2, 8, 448 // stride, 448 // stride, generator=g) for stride in strides]
    stage: Any = SimpleNamespace(pyramid=pyramid, strides=strides)
    chosen = rois()
    return RoiPairs(stage, pair.spec, chosen, slice(None), None, TeacherOutputs()), pyramid


@pytest.mark.parametrize(
    ("strides", "count", "finest_scale"),
    [
        ((4, 8, 16, 32, 64), 4, 28),  # as the teacher's
        ((8, 16, 32, 64, 128), 3, 56),  # RetinaNet: what would be on P2 is on P3, and nothing above P5
        ((64, 128), 1, 448),  # nothing in common: the nearest
    ],
)
def test_each_box_is_on_the_level_of_the_stride_that_the_teacher_would_read(
    pair: "type[Pair]", strides: tuple[int, ...], count: int, finest_scale: int
) -> None:
    given, pyramid = pairs(pair, strides)
    extractor = MODELS.build(
        {
            "type": "SingleRoIExtractor",
            "roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
            "out_channels": 8,
            "featmap_strides": list(strides[:count]),
            "finest_scale": finest_scale,
        }
    )
    chosen = given.rois.rois[given.rois.positive]
    levels = extractor.map_roi_levels(chosen, count)
    assert set(levels.tolist()) == set(range(count))
    expected = extractor(pyramid[:count], chosen)
    torch.testing.assert_close(given.student_assigned_roi_features, expected, rtol=1e-4, atol=1e-5)
