"""Which RoIs the losses look at, and their features: matching, sampling, RoIAlign."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou, roi_align

from kdpipe.distill.losses.numeric import LossInputError, check_dims, check_shape, full_precision, no_autocast
from kdpipe.distill.rois.align_cpu import are_ordinary, roi_align_channels_last

# Overlaps held at a time: 4 MiB of float32, and a few times that while they are computed.
_SLICE_ELEMENTS = 2**20


@dataclass(frozen=True)
class SampledRois:
    """A sample of S boxes; positives first, each part in the order of the boxes that it was taken from.

    Attributes:
        rows: Tensor[S] int64, rows of the boxes that were sampled from.
        labels: Tensor[S] int64, class of the matched ground truth, or the number of classes for background.
        positive: Tensor[S] bool.
        gt_index: Tensor[S] int64, matched ground truth of a positive, -1 for a negative.
        boxes: Tensor[S, 4] (x1, y1, x2, y2), as given.
    """

    rows: Tensor
    labels: Tensor
    positive: Tensor
    gt_index: Tensor
    boxes: Tensor


def sample_rois(
    boxes: Tensor,
    num_proposals: int,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    num: int,
    positive_fraction: float = 0.25,
    positive_iou: float = 0.5,
    num_classes: int,
    generator: torch.Generator,
    eligible: Tensor | None = None,
) -> SampledRois:
    """Match boxes with the ground truth, and draw some without replacement, all equally likely.

    A box is positive when its IoU with some ground truth is at least `positive_iou`; it is matched with the one it
    overlaps most. At most `num * positive_fraction` positives are drawn, negatives fill up to `num`. As mmdet's
    `MaxIoUAssigner` and `RandomSampler` in a box head, except that a cached ground-truth box which matches nothing that
    the student is shown (an annotation that its pipeline dropped) is an object all the same: it is never background.

    Args:
        boxes: Tensor[R, 4] (x1, y1, x2, y2), in the student's view.
        num_proposals: rows [0, num_proposals) may be negatives, the rest are ground-truth boxes kept with them.
        gt_boxes: Tensor[G, 4] (x1, y1, x2, y2), in the student's view.
        gt_labels: Tensor[G] int64 in [0, num_classes).
        num: how many to draw; fewer come back where there are not enough.
        positive_fraction: of `num`, in [0, 1].
        positive_iou: in (0, 1].
        num_classes: K, the label of background.
        generator: source of randomness; the same state gives the same sample.
        eligible: Tensor[R] bool, which boxes may be drawn as positives; the others are negatives or are left out. None
            takes all.

    Returns:
        The sample.

    Raises:
        LossInputError: shapes or numbers that do not fit.
    """
    check_shape("boxes", boxes, (boxes.shape[0], 4), "boxes (x1, y1, x2, y2)")
    check_shape("gt_boxes", gt_boxes, (gt_labels.numel(), 4), f"gt_labels {list(gt_labels.shape)}")
    if (
        not 0 <= num_proposals <= boxes.shape[0]
        or num < 0
        or not 0 <= positive_fraction <= 1
        or not 0 < positive_iou <= 1
    ):
        raise LossInputError(
            f"Cannot sample {num} RoIs with positive_fraction {positive_fraction} and positive_iou {positive_iou} from "
            f"{boxes.shape[0]} boxes of which {num_proposals} are proposals: expected num >= 0, a fraction in [0, 1], "
            "an IoU in (0, 1], and no more proposals than boxes."
        )
    overlap, best = best_overlap(boxes, gt_boxes)
    is_positive = overlap >= positive_iou
    is_proposal = torch.arange(boxes.shape[0], device=boxes.device) < num_proposals
    may_be_drawn = is_positive if eligible is None else is_positive & eligible
    positives = _draw(may_be_drawn, int(num * positive_fraction), generator)
    negatives = _draw(~is_positive & is_proposal, num - positives.numel(), generator)
    rows = torch.cat([positives, negatives])  # [S]
    positive = is_positive[rows]
    gt_index = torch.where(positive, best[rows], -1)
    labels = torch.full_like(rows, num_classes)
    labels[positive] = gt_labels.to(labels)[gt_index[positive]]
    return SampledRois(rows, labels, positive, gt_index, boxes[rows])


def best_overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Largest IoU of each box with any of the others, and with which. The R x M overlaps are never held whole.

    Args:
        boxes: Tensor[R, 4] (x1, y1, x2, y2).
        others: Tensor[M, 4] in the same frame.

    Returns:
        Tensor[R] float32 (float64 for float64 boxes), 0 where there are no others, and Tensor[R] int64.
    """
    boxes, others = full_precision(boxes, others)
    overlap, best = boxes.new_zeros(len(boxes)), torch.zeros_like(boxes[:, 0], dtype=torch.int64)
    if len(others):
        step = max(_SLICE_ELEMENTS // len(others), 1)
        for start in range(0, len(boxes), step):
            rows = slice(start, start + step)
            overlap[rows], best[rows] = box_iou(boxes[rows], others).max(dim=1)
    return overlap, best


def _draw(mask: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Up to `num` rows where `mask` is True, uniformly without replacement, in ascending order."""
    rows = mask.nonzero().squeeze(1)
    order = torch.randperm(rows.numel(), generator=generator, device=generator.device)[:num]
    return rows[order.to(rows.device)].sort().values


def assign_levels(boxes: Tensor, finest_scale: float, num_levels: int) -> Tensor:
    """Pyramid level of each box, by the rule of mmdet's `SingleRoIExtractor.map_roi_levels`.

    floor(log2(sqrt(area) / finest_scale + 1e-6)), clamped to the levels there are.

    Args:
        boxes: Tensor[R, 4] (x1, y1, x2, y2), pixels of the view that the pyramid was made from.
        finest_scale: boxes up to twice this size go to level 0, pixels.
        num_levels: L.

    Returns:
        Tensor[R] int64 in [0, L).
    """
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
        LossInputError: shapes that do not fit, or no sample per cell.
    """
    _check_pyramid(pyramid, strides, rois)
    if sampling_ratio < 1:
        raise LossInputError(f"RoIAlign on every level needs a sampling_ratio of at least 1, found {sampling_ratio}.")
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
        LossInputError: shapes that do not fit, or a RoI is assigned to a level that is None.
    """
    _check_pyramid(pyramid, strides, rois)
    level = assign_levels(rois[:, 1:], finest_scale, len(pyramid))  # [R]
    parts, parts_rows = [], []
    for index, (features, stride) in enumerate(zip(pyramid, strides, strict=True)):
        rows = (level == index).nonzero().squeeze(1)
        if features is not None:
            parts.append(_roi_align(features, stride, rois[rows], size, sampling_ratio, aligned))
            parts_rows.append(rows)
        elif rows.numel():
            raise LossInputError(
                f"{rows.numel()} of {rois.shape[0]} RoIs are assigned to level {index} (stride {stride}) of the "
                "pyramid, which was not given. Read that level of the cache, too."
            )
    return torch.cat(parts)[torch.cat(parts_rows).argsort()]


def _check_pyramid(pyramid: Sequence[Tensor | None], strides: Sequence[int], rois: Tensor) -> None:
    check_shape("rois", rois, (rois.shape[0], 5), "RoIs (index in the batch, x1, y1, x2, y2)")
    given = [features for features in pyramid if features is not None]
    for features in given:
        check_dims("a level of the pyramid", features, "[B, C, h, w]")
    if not given or len(pyramid) != len(strides) or len({features.shape[:2] for features in given}) > 1:
        raise LossInputError(
            "A pyramid needs at least one level, one stride per level, and the same batch and channels on all levels; "
            f"found strides {list(strides)} and levels {[None if x is None else list(x.shape) for x in pyramid]}."
        )


def _roi_align(features: Tensor, stride: int, rois: Tensor, size: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """RoIAlign in full precision: half-precision coordinates would be pixels off."""
    with no_autocast(features):
        (full,) = full_precision(features)
        boxes, scale = rois.detach().to(full), 1.0 / stride
        if not full.is_cuda and are_ordinary(boxes, scale):
            return roi_align_channels_last(full, boxes, scale, (size, size), sampling_ratio, aligned).permute(
                0, 3, 1, 2
            )
        pooled: Tensor = roi_align(full, boxes, size, scale, sampling_ratio, aligned)
    return pooled
