"""mmcv's NMS and soft-NMS, by torchvision and numpy."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from kdpipe.pipelines.mmcv_ops.precision import computing

__all__ = ["nms", "softnms"]

_FloatArray = npt.NDArray[np.floating[Any]]


def nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    """Greedy NMS: positions of the boxes [N, 4] (x1, y1, x2, y2) that are kept, best score first, int64.

    A box goes when its IoU with a better one is above `iou_threshold`; sides are x2 - x1 + `offset`.

    Args:
        boxes: [N, 4] (x1, y1, x2, y2), pixels.
        scores: [N].
        iou_threshold: In [0, 1].
        offset: 0 or 1 pixel.
    """
    corners = computing(boxes)
    if offset:
        corners = torch.cat([corners[:, :2], corners[:, 2:] + offset], dim=1)
    threshold = torch.tensor(iou_threshold, dtype=corners.dtype).item()  # mmcv compares in the type of the boxes
    keep: Tensor = torch.ops.torchvision.nms(corners, scores.to(corners.dtype), threshold)
    return keep


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    *,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al. 2017, with mmcv's order among equal scores) of boxes [N, 4] on the CPU.

    Each box taken lowers the scores of the rest by their IoU with it: `method` 0 to zero from `iou_threshold` on,
    1 by 1 - IoU from `iou_threshold` on, 2 by exp(-IoU^2 / sigma). What falls below `min_score` is dropped.

    Args:
        boxes: [N, 4] (x1, y1, x2, y2), pixels.
        scores: [N].
        dets: [N, 5], is written.
        iou_threshold: In [0, 1].
        sigma: Of `method` 2.
        min_score: The least that is kept.
        method: 0, 1 or 2.
        offset: 0 or 1 pixel, added to the sides of boxes.

    Returns:
        Positions of the boxes taken, int64 [M]; `dets[:M]` gets (x1, y1, x2, y2, score) of each.
    """
    corners = computing(boxes.detach()).numpy().copy()
    worth = computing(scores.detach()).numpy().astype(corners.dtype)
    index = np.arange(len(corners))
    count, taken = len(corners), 0
    while taken < count:
        best = taken + int(np.argmax(worth[taken:count]))
        for values in (corners, worth, index):
            values[[taken, best]] = values[[best, taken]]
        rest = slice(taken + 1, count)
        worth[rest] *= _decay(_overlaps(corners[taken], corners[rest], offset), iou_threshold, sigma, method)
        taken += 1
        low = worth[rest] < min_score
        if low.any():
            order = taken + _fill_holes(~low)
            count = taken + len(order)
            for values in (corners, worth, index):
                values[taken:count] = values[order]
    dets[:count] = torch.from_numpy(np.concatenate([corners[:count], worth[:count, None]], axis=1)).to(dets.dtype)
    return torch.from_numpy(index[:count])


def _overlaps(box: _FloatArray, others: _FloatArray, offset: int) -> _FloatArray:
    """IoU of one box [4] with others [N, 4]."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    inter = np.maximum(high - low + offset, 0).prod(axis=1)
    area = (box[2:] - box[:2] + offset).prod()
    areas = (others[:, 2:] - others[:, :2] + offset).prod(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # boxes without area
        overlaps: _FloatArray = inter / (area + areas - inter)
    return overlaps


def _decay(overlaps: _FloatArray, iou_threshold: float, sigma: float, method: int) -> _FloatArray:
    if method == 2:
        gaussian: _FloatArray = np.exp(-(overlaps * overlaps) / sigma)
        return gaussian
    lowered = np.zeros_like(overlaps) if method == 0 else 1 - overlaps
    return np.where(overlaps >= iou_threshold, lowered, np.ones_like(overlaps))


def _fill_holes(keep: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    """Where the rows that are kept come from when each hole, in turn, is filled with the last row that is kept."""
    count = int(keep.sum())
    order = np.arange(count)
    order[~keep[:count]] = count + np.flatnonzero(keep[count:])[::-1]
    return order
