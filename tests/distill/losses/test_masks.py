"""Imitation masks against loops over cells, boxes and anchors."""

import math

import pytest
import torch
from torch import Tensor

from kdpipe.distill.losses.masks import anchor_mask, box_mask, gaussian_mask

STRIDE, SHAPE = 8, (7, 9)
BOXES = torch.tensor(
    [[3.0, 5.0, 31.0, 50.0], [20.0, 8.0, 60.0, 30.0], [58.0, 40.0, 61.0, 43.0], [9.0, 9.0, 9.0, 20.0], [60, 44, 90, 80]]
).double()
ANCHORS = [(-16.0, -8.0, 16.0, 8.0), (-10.0, -10.0, 10.0, 10.0), (-5.0, -12.0, 5.0, 12.0)]


def naive_box_mask() -> list[list[float]]:
    mask = [[0.0] * SHAPE[1] for _ in range(SHAPE[0])]
    for i in range(SHAPE[0]):
        for j in range(SHAPE[1]):
            x, y = (j + 0.5) * STRIDE, (i + 0.5) * STRIDE
            for x1, y1, x2, y2 in BOXES.tolist():
                if x1 < x < x2 and y1 < y < y2:
                    mask[i][j] = 1.0
    return mask


def naive_gaussian_mask(sigma: float) -> list[list[float]]:
    mask = [[0.0] * SHAPE[1] for _ in range(SHAPE[0])]
    for i in range(SHAPE[0]):
        for j in range(SHAPE[1]):
            x, y = (j + 0.5) * STRIDE, (i + 0.5) * STRIDE
            for x1, y1, x2, y2 in BOXES.tolist():
                if x1 < x < x2 and y1 < y < y2:
                    dx, dy = x - (x1 + x2) / 2, y - (y1 + y2) / 2
                    exponent = (dx / (sigma * (x2 - x1))) ** 2 + (dy / (sigma * (y2 - y1))) ** 2
                    mask[i][j] = max(mask[i][j], math.exp(-exponent / 2))
    return mask


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    wide, high = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return wide * high / (areas - wide * high)


def naive_anchor_mask() -> list[list[float]]:
    """FGFI: a map of IoUs for each object, whose threshold is half of its largest; the masks of objects are joined."""
    mask = [[0.0] * SHAPE[1] for _ in range(SHAPE[0])]
    for box in BOXES.tolist():
        ious = {
            (i, j, k): iou((j * STRIDE + x1, i * STRIDE + y1, j * STRIDE + x2, i * STRIDE + y2), tuple(box))
            for i in range(SHAPE[0])
            for j in range(SHAPE[1])
            for k, (x1, y1, x2, y2) in enumerate(ANCHORS)
        }
        threshold = 0.5 * max(ious.values())
        for (i, j, _), value in ious.items():
            if value > threshold:
                mask[i][j] = 1.0
    return mask


def check(actual: Tensor, expected: list[list[float]]) -> None:
    assert 0 < sum(x > 0 for row in expected for x in row) < SHAPE[0] * SHAPE[1]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_cells_whose_centre_lies_in_a_box() -> None:
    check(box_mask(BOXES, SHAPE, STRIDE), naive_box_mask())


@pytest.mark.parametrize("sigma", [0.25, 0.6])
def test_a_gaussian_in_each_box(sigma: float) -> None:
    check(gaussian_mask(BOXES, SHAPE, STRIDE, sigma), naive_gaussian_mask(sigma))


def test_cells_with_an_anchor_near_an_object() -> None:
    check(anchor_mask(BOXES, SHAPE, STRIDE, ANCHORS), naive_anchor_mask())


def test_no_boxes_are_no_mask() -> None:
    none = torch.zeros(0, 4)
    masks = [mask(none, SHAPE, STRIDE) for mask in (box_mask, gaussian_mask)]
    for mask in (*masks, anchor_mask(none, SHAPE, STRIDE, ANCHORS)):
        assert mask.shape == SHAPE
        assert not mask.any()


def test_masks_of_the_mirror_image_are_mirrored() -> None:
    width = SHAPE[1] * STRIDE
    x1, y1, x2, y2 = BOXES.unbind(1)
    mirrored = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    for mask in (box_mask, gaussian_mask):
        torch.testing.assert_close(mask(mirrored, SHAPE, STRIDE), mask(BOXES, SHAPE, STRIDE).flip(1))


def test_the_middle_of_an_object_counts_fully_and_its_edge_a_seventh() -> None:
    box = torch.tensor([[4.0, 4.0, 44.0, 44.0]])
    mask = gaussian_mask(box, (6, 6), STRIDE, 0.25)
    assert mask[2, 2].item() == pytest.approx(math.exp(-((4 / 10) ** 2)))  # its centre is 4 pixels from (24, 24)
    assert mask.max().item() < 1
    assert gaussian_mask(box, (48, 48), 1)[24, 4].item() == pytest.approx(math.exp(-2), abs=0.02)


def test_an_object_without_area_gives_no_nan() -> None:
    box = torch.tensor([[20.0, 20.0, 20.0, 20.0]])
    for mask in (box_mask(box, SHAPE, STRIDE), gaussian_mask(box, SHAPE, STRIDE), anchor_mask(box, SHAPE, 8, ANCHORS)):
        assert not mask.any()
