"""No distillation: the detector's own loss at the RoIs of a step, the control for what better RoIs alone are worth."""

import torch
from torch import Tensor
from torch.nn import functional

from kdpipe.distill.losses.numeric import check_dims, check_shape, full_precision, mean_or_zero, no_autocast


def hard_label_loss(student_logits: Tensor, student_deltas: Tensor, labels: Tensor, true_deltas: Tensor) -> Tensor:
    """The loss of a two-stage box head with the annotations, as in mmdet's Faster R-CNN.

    -1/N sum_i log P_s(y_i) + 1/N sum_{i: y_i < K} |d_i(y_i) - d*_i|, a sum over the four coordinates. The teacher says
    nothing here: what such a student gains over a plain one comes from the RoIs.

    Args:
        student_logits: Tensor[N, K + 1], background last.
        student_deltas: Tensor[N, K, 4], or [N, 1, 4] class-agnostic.
        labels: Tensor[N] int64 in [0, K]; K is background.
        true_deltas: Tensor[N, 4], from each RoI to its annotation, in the units of `student_deltas`.

    Returns:
        Scalar; 0 for N = 0, still part of the graph. Computed in float32 (float64 for float64 input).

    Raises:
        LossInputError: shapes that do not fit.
    """
    check_dims("student_logits", student_logits, "[N, K + 1]")
    num_rois, num_classes = len(student_logits), student_logits.shape[1] - 1
    fit = f"student_logits {list(student_logits.shape)}"
    check_shape(
        "student_deltas", student_deltas, (num_rois, 1 if student_deltas.shape[1] == 1 else num_classes, 4), fit
    )
    check_shape("labels", labels, (num_rois,), fit)
    check_shape("true_deltas", true_deltas, (num_rois, 4), fit)
    with no_autocast(student_logits):
        logits, deltas, true = full_precision(student_logits, student_deltas, true_deltas)
        classification = functional.cross_entropy(logits, labels, reduction="none")  # [N]
        of_class = labels.clamp(max=deltas.shape[1] - 1)
        moved = deltas[torch.arange(num_rois, device=deltas.device), of_class]  # [N, 4]
        regression = (moved - true).abs().sum(dim=1)
        return mean_or_zero(classification + torch.where(labels < num_classes, regression, 0.0))
