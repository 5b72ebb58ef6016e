"""What a loss is given of the student's pyramid, against mmdet's own extractor."""

from dataclasses import replace
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


FPN = (4, 8, 16, 32, 64)


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
    ("teacher_strides", "strides", "read", "finest_scale"),
    [
        (FPN, FPN, slice(0, 4), 28),  # as the teacher's
        (FPN, (8, 16, 32, 64, 128), slice(0, 3), 56),  # RetinaNet: what would be on P2 is on P3, and nothing above P5
        (FPN, (64, 128), slice(0, 1), 448),  # nothing in common: the nearest
        ((16,), FPN, slice(2, 3), 28),  # C4: nothing below
        ((8, 16, 32), FPN, slice(1, 4), 28),
        ((16, 32), (4, 8), slice(1, 2), 14),
    ],
)
def test_each_box_is_on_the_level_of_the_stride_that_the_teacher_would_read(
    pair: "type[Pair]", teacher_strides: tuple[int, ...], strides: tuple[int, ...], read: slice, finest_scale: int
) -> None:
    given, pyramid = pairs(pair, strides)
    levels = min(4, len(teacher_strides))
    spec = replace(pair.spec, strides=teacher_strides, roi_levels=levels, levels=tuple(range(len(teacher_strides))))
    given, count = replace(given, spec=spec), read.stop - read.start
    extractor = MODELS.build(
        {
            "type": "SingleRoIExtractor",
            "roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
            "out_channels": 8,
            "featmap_strides": list(strides[read]),
            "finest_scale": finest_scale,
        }
    )
    chosen = given.rois.rois[given.rois.positive]
    assigned = extractor.map_roi_levels(chosen, count)
    assert set(assigned.tolist()) == set(range(count))
    expected = extractor(pyramid[read], chosen)
    torch.testing.assert_close(given.student_assigned_roi_features, expected, rtol=1e-4, atol=1e-5)
