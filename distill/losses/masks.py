"""Imitation masks: which cells of a level of a pyramid matter, and how much, by the annotated boxes of an image.

All are computed one image at a time, so that memory does not grow with the batch: for G boxes, G x h x w numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SIGMA = 0.25  # of the Gaussian mask, in sides of the box: an edge is two standard deviations from the centre
ANCHOR_SHARE = 0.5  # of the largest IoU of an object with any anchor of the level (FGFI's psi)

Anchor = tuple[float, float, float, float]


def box_mask(boxes: Tensor, shape: tuple[int, int], stride: int) -> Tensor:
    """Cells whose centre lies in a box: the ground-truth mask of G-DetKD, table 6.

    Args:
        boxes: Tensor[G, 4] (x1, y1, x2, y2), pixels.
        shape: (h, w) of the level.
        stride: Pixels per cell; the centre of cell (i, j) is ((j + 0.5) * stride, (i + 0.5) * stride).

    Returns:
        Tensor[h, w] of 0 and 1, in the type of the boxes.
    """
    across, down = _inside(boxes, shape, stride)
    return (down[:, :, None] & across[:, None, :]).any(dim=0).to(boxes.dtype)


def gaussian_mask(boxes: Tensor, shape: tuple[int, int], stride: int, sigma: float = SIGMA) -> Tensor:
    """A Gaussian inside each box, 1 at its centre and 0 outside; where boxes overlap, the maximum (after TADF).

    exp(-(dx^2 / (sigma w)^2 + dy^2 / (sigma h)^2) / 2), for a cell whose centre is (dx, dy) from that of a box of
    w x h. The idea is that of TADF (arXiv 2006.13108), whose width could not be looked up: the default is a choice, a
    quarter of the side, so that the mask has fallen to exp(-2) = 0.14 in the middle of an edge.

    Args:
        boxes: Tensor[G, 4] (x1, y1, x2, y2), pixels.
        shape: (h, w) of the level.
        stride: Pixels per cell.
        sigma: Standard deviation, in sides of the box.

    Returns:
        Tensor[h, w] in [0, 1], in the type of the boxes.
    """
    if not len(boxes):
        return boxes.new_zeros(shape)
    values = []
    for inside, centres, low, high in zip(
        _inside(boxes, shape, stride), _centres(boxes, shape, stride), (0, 1), (2, 3), strict=True
    ):
        first, last = boxes[:, low, None], boxes[:, high, None]  # [G, 1]
        distance = (centres - (first + last) / 2) / (sigma * (last - first)).clamp(min=1e-6)
        values.append(torch.exp(-distance.square() / 2) * inside)
    across, down = values  # [G, w], [G, h]
    return (down[:, :, None] * across[:, None, :]).amax(dim=0)


def anchor_mask(boxes: Tensor, shape: tuple[int, int], stride: int, anchors: Sequence[Anchor]) -> Tensor:
    """Cells with an anchor near an object: the mask of FGFI (arXiv 1906.03609).

    A cell is on for an object where any of its anchors has an IoU above half of the largest IoU that the object has
    with any anchor of the level; and on where it is so for any object.

    Args:
        boxes: Tensor[G, 4] (x1, y1, x2, y2), pixels.
        shape: (h, w) of the level.
        stride: Pixels per cell.
        anchors: (x1, y1, x2, y2) of those of cell (0, 0), pixels; those of other cells are shifted by whole strides.

    Returns:
        Tensor[h, w] of 0 and 1, in the type of the boxes.
    """
    if not len(boxes):
        return boxes.new_zeros(shape)
    rows, columns = (torch.arange(size, device=boxes.device, dtype=boxes.dtype) * stride for size in shape)
    x1, y1, x2, y2 = boxes[..., None].unbind(dim=1)  # [G, 1] each
    area = ((x2 - x1) * (y2 - y1))[..., None]  # [G, 1, 1]
    best = boxes.new_zeros(len(boxes), *shape)  # of the anchors of a cell
    for left, top, right, bottom in anchors:
        wide = (torch.minimum(x2, columns + right) - torch.maximum(x1, columns + left)).clamp(min=0)  # [G, w]
        high = (torch.minimum(y2, rows + bottom) - torch.maximum(y1, rows + top)).clamp(min=0)  # [G, h]
        overlap = high[:, :, None] * wide[:, None, :]  # [G, h, w]
        best = torch.maximum(best, overlap / ((right - left) * (bottom - top) + area - overlap))
    largest = best.amax(dim=(1, 2), keepdim=True)
    return (best > ANCHOR_SHARE * largest).any(dim=0).to(boxes.dtype)


def _centres(boxes: Tensor, shape: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """x of the columns' centres, Tensor[w], and y of the rows', Tensor[h]."""
    x, y = ((torch.arange(n, device=boxes.device, dtype=boxes.dtype) + 0.5) * stride for n in shape[::-1])
    return x, y


def _inside(boxes: Tensor, shape: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """Which columns lie in a box, Tensor[G, w] bool, and which rows, Tensor[G, h]; edges do not."""
    x, y = _centres(boxes, shape, stride)
    x1, y1, x2, y2 = boxes[..., None].unbind(dim=1)
    return (x > x1) & (x < x2), (y > y1) & (y < y2)
