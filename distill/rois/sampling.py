"""Which RoIs the losses look at: matching with the ground truth, sampling."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from kdpipe.distill.losses.numeric import LossInputError, check_shape, full_precision

# Overlaps held at a time: 4 MiB of float32, and a few times that while they are computed.
_SLICE_ELEMENTS = 2**20


@dataclass(frozen=True)
class RoiSampling:
    """How RoIs are drawn from the boxes of an image.

    Attributes:
        num: RoIs per image, at most.
        positive_fraction: Of these, the largest share of positives, in [0, 1]: 1/4 is the paper's 1:3.
        positive_iou: With an annotation, from which on a box is positive, in (0, 1].
    """

    num: int = 512
    positive_fraction: float = 0.25
    positive_iou: float = 0.5


DEFAULT_SAMPLING = RoiSampling()


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
    sampling: RoiSampling,
    num_classes: int,
    generator: torch.Generator,
    eligible: Tensor | None = None,
) -> SampledRois:
    """Match boxes with the ground truth, and draw some without replacement, all equally likely.

    A box is positive when its IoU with some ground truth is at least `positive_iou`; it is matched with the one it
    overlaps most. At most `num * positive_fraction` positives are drawn, negatives fill up to `num`; fewer come back
    where there are not enough. As mmdet's `MaxIoUAssigner` and `RandomSampler` in a box head, except that a cached
    ground-truth box which matches nothing that the student is shown (an annotation that its pipeline dropped) is an
    object all the same: it is never background.

    Args:
        boxes: Tensor[R, 4] (x1, y1, x2, y2), in the student's view.
        num_proposals: rows [0, num_proposals) may be negatives, the rest are ground-truth boxes kept with them.
        gt_boxes: Tensor[G, 4] (x1, y1, x2, y2), in the student's view.
        gt_labels: Tensor[G] int64 in [0, num_classes).
        sampling: how many, and which are positive.
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
    num, positive_fraction, positive_iou = sampling.num, sampling.positive_fraction, sampling.positive_iou
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
    if len(gt_labels):
        labels = torch.where(positive, gt_labels.to(labels)[gt_index.clamp(min=0)], labels)
    return SampledRois(rows, labels, positive, gt_index, boxes[rows])


def best_overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Largest IoU of each box with any of the others, and with which. The R x M overlaps are never held whole.

    Args:
        boxes: Tensor[R, 4] (x1, y1, x2, y2).
        others: Tensor[M, 4] in the same frame.

    Returns:
        Tensor[R] float32 (float64 for float64 boxes), 0 where there are no others, and Tensor[R] int64, of several
        with the same IoU the first. Two boxes without area have an IoU of 0.
    """
    boxes, others = full_precision(boxes, others)
    overlap, best = boxes.new_zeros(len(boxes)), torch.zeros_like(boxes[:, 0], dtype=torch.int64)
    if len(others):
        step = max(_SLICE_ELEMENTS // len(others), 1)
        for start in range(0, len(boxes), step):
            rows = slice(start, start + step)
            overlap[rows], best[rows] = box_iou(boxes[rows], others).nan_to_num_(nan=0.0).max(dim=1)
    return overlap, best


def _draw(mask: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Up to `num` rows where `mask` is True, uniformly without replacement, in ascending order."""
    rows = mask.nonzero().squeeze(1)
    order = torch.randperm(rows.numel(), generator=generator, device=generator.device)[:num]
    return rows[order.to(rows.device, non_blocking=True)].sort().values
