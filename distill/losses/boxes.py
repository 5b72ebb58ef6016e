"""Distillation of where boxes end up, in place of the deltas that lead there: for students of any kind of box coder."""

import torch
from torch import Tensor

from kdpipe.distill.losses.numeric import (
    LossInputError,
    check_dims,
    check_shape,
    full_precision,
    mean_or_zero,
    no_autocast,
)


def box_kd_loss(student_boxes: Tensor, teacher_boxes: Tensor, teacher_logits: Tensor) -> Tensor:
    """Generalised IoU with the teacher's boxes, weighted by its class probabilities.

    1/N sum_i sum_c p_t^c (1 - GIoU(b_s^c, b_t^c)): eq. 3 of G-DetKD with the loss of GIoU (arXiv 1902.09630) in place
    of L1, inside the sum over the K object classes. p_t is the softmax over all K + 1, so that background weighs
    little. A side with one box for all classes has that box in each.

    Args:
        student_boxes: Tensor[N, K or 1, 4] (x1, y1, x2, y2), x1 <= x2, y1 <= y2, part of the graph.
        teacher_boxes: Tensor[N, K or 1, 4] in the same frame. A constant: it gets no gradient.
        teacher_logits: Tensor[N, K + 1], background last. The same.

    Returns:
        Scalar in [0, 2]; 0 for N = 0, still part of the graph. Computed in float32 (float64 for float64 input).

    Raises:
        LossInputError: shapes that do not fit.
    """
    check_dims("teacher_logits", teacher_logits, "[N, K + 1]")
    num_rois, num_classes = len(teacher_logits), teacher_logits.shape[1] - 1
    if num_classes < 1:
        raise LossInputError(f"teacher_logits has shape {list(teacher_logits.shape)}; expected a class and background.")
    for name, boxes in (("student_boxes", student_boxes), ("teacher_boxes", teacher_boxes)):
        check_dims(name, boxes, "[N, K, 4]")
        expected = (num_rois, 1 if boxes.shape[1] == 1 else num_classes, 4)
        check_shape(name, boxes, expected, f"teacher_logits {list(teacher_logits.shape)}")
    with no_autocast(student_boxes):
        student, teacher, logits = full_precision(student_boxes, teacher_boxes.detach(), teacher_logits.detach())
        weights = logits.softmax(dim=1)[:, :-1]  # [N, K]
        return mean_or_zero((weights * (1 - generalized_iou(student, teacher))).sum(dim=1))


def generalized_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """GIoU of two boxes each, as torchvision's `generalized_box_iou_loss`, which waits for a GPU, computes it.

    Args:
        boxes: Tensor[..., 4] (x1, y1, x2, y2).
        others: Tensor[..., 4], of a shape that broadcasts with it.

    Returns:
        Tensor[...] in [-1, 1].
    """
    least = 1e-7  # square pixels; two boxes without area have an IoU of 0
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    common = _area((high - low).clamp(min=0))
    union = sum(_area(x[..., 2:] - x[..., :2]) for x in (boxes, others)) - common
    low, high = torch.minimum(boxes[..., :2], others[..., :2]), torch.maximum(boxes[..., 2:], others[..., 2:])
    around = _area(high - low)
    return common / (union + least) - (around - union) / (around + least)


def _area(sides: Tensor) -> Tensor:
    """Tensor[...] of Tensor[..., 2]. Not by `prod`, whose gradient asks a GPU whether there are zeros."""
    return sides[..., 0] * sides[..., 1]
