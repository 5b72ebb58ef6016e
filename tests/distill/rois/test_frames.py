"""Boxes of views are where they are in the original images."""

from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from kdpipe.cache.views import map_boxes, view_matrix
from kdpipe.distill.rois.frames import FrameError, ImageFrames

BOXES = torch.tensor([[10.0, 20.0, 300.5, 400.25], [0.0, 0.0, 1333.0, 800.0], [7.5, 8.5, 9.5, 10.5]])


def sample(image_id: Any, matrix: Any = None, **info: Any) -> DetDataSample:
    known = {} if matrix is None else {"homography_matrix": np.asarray(matrix, dtype=np.float32)}
    return DetDataSample(metainfo={"img_id": image_id, **known, **info})


def rois(boxes: Tensor, image: int) -> Tensor:
    return torch.cat([torch.full((len(boxes), 1), float(image)), boxes], dim=1)


def test_boxes_of_mirrored_scaled_and_cropped_views() -> None:
    matrices = [view_matrix((800, 1333), size, flip) for size, flip in (((480, 800), False), ((900, 1500), True))]
    matrices.append(np.array([[1.5, 0, -31], [0, 1.5, -17], [0, 0, 1]]))  # a crop
    samples = [sample(5 + 2 * index, matrix) for index, matrix in enumerate(matrices)]
    frames = ImageFrames.of(samples, torch.device("cpu"))
    assert frames.image_ids.tolist() == [5, 7, 9]
    view_rois = torch.cat([rois(map_boxes(BOXES, matrix), index) for index, matrix in enumerate(matrices)])
    order = torch.randperm(len(view_rois))
    with torch.autocast("cpu", torch.bfloat16):
        actual = frames.original_boxes(view_rois[order])
    torch.testing.assert_close(actual, BOXES.repeat(3, 1)[order], rtol=1e-6, atol=1e-3)
    assert frames.original_boxes(torch.zeros(0, 5)).shape == (0, 4)


def test_a_rotated_box_becomes_the_one_around_it() -> None:
    quarter = np.array([[0, -1, 100], [1, 0, 0], [0, 0, 1]])  # (x, y) -> (100 - y, x)
    frames = ImageFrames.of([sample(1, quarter)], torch.device("cpu"))
    actual = frames.original_boxes(torch.tensor([[0.0, 10.0, 20.0, 30.0, 60.0]]))
    torch.testing.assert_close(actual, torch.tensor([[20.0, 70.0, 60.0, 90.0]]))


def test_an_image_that_no_step_moved_is_its_own_frame() -> None:
    unmoved = sample(1, ori_shape=(50, 60), img_shape=(50, 60), flip=False)
    assert torch.equal(ImageFrames.of([unmoved], torch.device("cpu")).original_boxes(rois(BOXES, 0)), BOXES)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (sample("000001", np.eye(3)), "img_id is '000001'"),
        (sample(None, np.eye(3)), "img_id is None"),
        (sample(3, ori_shape=(50, 60), img_shape=(100, 120)), "image 3 was moved"),
        (sample(3, ori_shape=(50, 60), img_shape=(50, 60), flip=True), "homography_matrix"),
    ],
)
def test_what_is_not_recorded_is_named(samples: DetDataSample, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        ImageFrames.of([samples], torch.device("cpu"))
