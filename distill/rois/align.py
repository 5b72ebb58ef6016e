"""Features of RoIs: which level of a pyramid a box belongs to, and RoIAlign on that level or on all of them."""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torchvision.ops import roi_align

from kdpipe.distill.losses.numeric import LossInputError, check_dims, check_shape, full_precision, no_autocast
from kdpipe.distill.rois.align_cpu import are_ordinary, roi_align_channels_last
from kdpipe.distill.rows import in_order, on_cpu, rows_of_each


def assign_levels(boxes: Tensor, finest_scale: float, num_levels: int) -> Tensor:
    """Pyramid level of each box, by the rule of mmdet's `SingleRoIExtractor.map_roi_levels`.

    floor(log2(sqrt(area) / finest_scale + 1e-6)), clamped to the levels there are.

    Args:
        boxes: Tensor[R, 4] (x1, y1, x2, y2), pixels of the view that the pyramid was made from.
        finest_scale: boxes up to twice this size go to level 0, pixels.
        num_levels: L.

    Returns:
        Tensor[R] int64 in [0, L).

    Raises:
        LossInputError: a box that is not finite or whose corners are in another order, no level, or no scale above 0.
    """
    if num_levels < 1 or not 0 < finest_scale < math.inf:
        raise LossInputError(
            f"Boxes are assigned to levels by a scale above 0, found {finest_scale}, {num_levels} levels."
        )
    check_boxes(boxes)
    return _levels_of(boxes, finest_scale, num_levels)


def _levels_of(boxes: Tensor, finest_scale: float, num_levels: int) -> Tensor:
    (boxes,) = full_precision(boxes)
    scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = (scale / finest_scale + 1e-6).log2().floor()
    return level.clamp(min=0, max=num_levels - 1).long()


def roi_align_levels(
    pyramid: Sequence[Tensor],
    strides: Sequence[int],
    rois: Tensor,
    size: int = 7,
    sampling_ratio: int = 2,
    aligned: bool = True,
) -> Tensor:
    """RoI features from every level of a pyramid.

    Args:
        pyramid: per level Tensor[B, C, h, w].
        strides: pixels per cell of each level.
        rois: Tensor[R, 5] (index in the batch, x1, y1, x2, y2), pixels of the network input.
        size: cells per side of a RoI feature.
        sampling_ratio: samples per side of a cell, at least 1; fixed, so that large RoIs cost no more on fine levels.
        aligned: the half-pixel shift of mmdet's default RoIAlign.

    Returns:
        Tensor[R, L, C, size, size], float32 (float64 for a float64 pyramid), in memory channels last.

    Raises:
        LossInputError: shapes that do not fit, no sample per cell, or a RoI that is none: not finite, with corners in
            another order, or of an image that is not in the batch.
    """
    batch = _check_pyramid(pyramid, strides, rois)
    if sampling_ratio < 1:
        raise LossInputError(f"RoIAlign on every level needs a sampling_ratio of at least 1, found {sampling_ratio}.")
    if not bool(_are_rois(rois, batch).all()):
        _refuse(rois, batch)
    levels = [
        _roi_align(features, stride, rois, size, sampling_ratio, aligned).permute(0, 2, 3, 1)
        for features, stride in zip(pyramid, strides, strict=True)
    ]
    return torch.stack(levels, dim=1).permute(0, 1, 4, 2, 3)


def roi_align_assigned(
    pyramid: Sequence[Tensor | None],
    strides: Sequence[int],
    rois: Tensor,
    finest_scale: float,
    size: int = 7,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """RoI features, each from the one level that its size assigns, as mmdet's `SingleRoIExtractor` makes them.

    Every level stays part of the graph, RoIs on it or not.

    Args:
        pyramid: per level of the RoI extractor Tensor[B, C, h, w], or None for a level that no RoI is assigned to.
        strides: pixels per cell of each level.
        rois: Tensor[R, 5] (index in the batch, x1, y1, x2, y2), pixels of the network input that the pyramid is of.
        finest_scale: see `assign_levels`.
        size: cells per side of a RoI feature.
        sampling_ratio: samples per side of a cell; 0 is adaptive, mmdet's default.
        aligned: the half-pixel shift of mmdet's default RoIAlign.

    Returns:
        Tensor[R, C, size, size], float32 (float64 for a float64 pyramid).

    Raises:
        LossInputError: shapes that do not fit, a RoI that is none (see `roi_align_levels`), or one that is assigned to
            a level which is None.
    """
    batch = _check_pyramid(pyramid, strides, rois)
    level = _levels_of(rois[:, 1:], finest_scale, len(pyramid))
    level = torch.where(_are_rois(rois, batch), level, len(pyramid))  # [R]
    *rows_of_levels, wrong = rows_of_each(level, len(pyramid) + 1)
    if len(wrong):
        _refuse(rois, batch)
    parts = []
    for index, (features, stride, rows) in enumerate(zip(pyramid, strides, rows_of_levels, strict=True)):
        if features is not None:
            parts.append(_roi_align(features, stride, rois[rows], size, sampling_ratio, aligned))
        elif len(rows):
            raise LossInputError(
                f"{len(rows)} of {rois.shape[0]} RoIs are assigned to level {index} (stride {stride}) of the "
                "pyramid, which was not given. Read that level of the cache, too."
            )
    return in_order(parts, rows_of_levels)


def _check_pyramid(pyramid: Sequence[Tensor | None], strides: Sequence[int], rois: Tensor) -> int:
    """The number of images B, where the shapes fit."""
    check_shape("rois", rois, (rois.shape[0], 5), "RoIs (index in the batch, x1, y1, x2, y2)")
    given = [features for features in pyramid if features is not None]
    for features in given:
        check_dims("a level of the pyramid", features, "[B, C, h, w]")
    if not given or len(pyramid) != len(strides) or len({features.shape[:2] for features in given}) > 1:
        raise LossInputError(
            "A pyramid needs at least one level, one stride per level, and the same batch and channels on all levels; "
            f"found strides {list(strides)} and levels {[None if x is None else list(x.shape) for x in pyramid]}."
        )
    return given[0].shape[0]


def _are_rois(rois: Tensor, batch: int) -> Tensor:
    """Tensor[R] bool; of what is none, torchvision reads anywhere in memory."""
    return _are_boxes(rois[:, 1:]) & (rois[:, 0] >= 0) & (rois[:, 0] < batch)


def _refuse(rois: Tensor, batch: int) -> NoReturn:
    """Say which of RoIs are none."""
    check_boxes(rois[:, 1:])
    images = rois[:, 0]
    raise LossInputError(
        f"RoIs are of images {float(images.min()):g} to {float(images.max()):g}; expected 0 to {batch - 1}, as "
        "the pyramid has."
    )


def _are_boxes(boxes: Tensor) -> Tensor:
    return boxes.isfinite().all(dim=1) & (boxes[:, :2] <= boxes[:, 2:]).all(dim=1)  # [R]


def check_boxes(boxes: Tensor) -> None:
    """Raise unless boxes, Tensor[R, 4], are finite with x1 <= x2 and y1 <= y2.

    Raises:
        LossInputError: naming the first box that is not.
    """
    is_box = _are_boxes(boxes)
    if not bool(is_box.all()):
        row = int(is_box.int().argmin())
        raise LossInputError(
            f"{int((~is_box).sum())} of {len(boxes)} RoIs are no boxes, the first of them {boxes[row].tolist()}; "
            "expected finite (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2. Boxes that a student predicts become NaN "
            "when its training diverges: use a lower rate (--lr)."
        )


def _roi_align(features: Tensor, stride: int, rois: Tensor, size: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """RoIAlign in full precision: half-precision coordinates would be pixels off."""
    with no_autocast(features):
        (full,) = full_precision(features)
        boxes, scale = rois.detach().to(full), 1.0 / stride
        if on_cpu(full) and are_ordinary(boxes, scale):
            return roi_align_channels_last(full, boxes, scale, (size, size), sampling_ratio, aligned).permute(
                0, 3, 1, 2
            )
        pooled: Tensor
        if full.requires_grad:
            pooled = roi_align(full, boxes, size, scale, sampling_ratio, aligned)
        else:  # without the form of it that makes gradients deterministic, which compiles and takes more memory
            pooled = torch.ops.torchvision.roi_align(full, boxes, scale, size, size, sampling_ratio, aligned)
    return pooled
