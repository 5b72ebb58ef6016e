"""Cross-head distillation: the student's RoI features through the teacher's head, against what the teacher says."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from kdpipe.distill.losses.numeric import check_shape, full_precision, mean_or_zero, no_autocast
from kdpipe.distill.losses.prediction import class_aware_regression_kd_loss
from kdpipe.distill.rois.convolution import RoIConv2d
from kdpipe.distill.teacher.heads.build import BoxHead
from kdpipe.distill.teacher.pyramids import TeacherRois


class CrossResult(NamedTuple):
    """What `cross` gives.

    Attributes:
        loss: Scalar.
        cls: Scalar, its part for classes.
        box: Scalar, its part for boxes.
    """

    loss: Tensor
    cls: Tensor
    box: Tensor


def cross_loss(
    cross_logits: Tensor, cross_deltas: Tensor, teacher_logits: Tensor, teacher_deltas: Tensor
) -> CrossResult:
    """Kullback-Leibler divergence of classes, and class-weighted L1 of boxes, of one head on two sides' features.

    1/R sum_i sum_c p_t^c (log p_t^c - log p_x^c) + 1/R sum_i |sum_c p_t^c (reg_t^c - reg_x^c)|, c over all K + 1
    classes in the first sum and over the K object classes in the second (G-DetKD, eq. 3; deltas for all classes at once
    are the same for each). 0 where student and teacher have the same features.

    Args:
        cross_logits: Tensor[R, K + 1], of the teacher's head on the student's features; background last.
        cross_deltas: Tensor[R, K or 1, 4], the same.
        teacher_logits: Tensor[R, K + 1]. A constant: it gets no gradient.
        teacher_deltas: Tensor[R, K or 1, 4]. The same.

    Returns:
        The loss and its parts; 0 for R = 0, still part of the graph. In float32 (float64 for float64 input).

    Raises:
        LossInputError: Shapes that do not fit.
    """
    check_shape("teacher_logits", teacher_logits, tuple(cross_logits.shape), "cross_logits")
    check_shape("teacher_deltas", teacher_deltas, tuple(cross_deltas.shape), "cross_deltas")
    with no_autocast(cross_logits):
        crossed, teacher = full_precision(cross_logits, teacher_logits.detach())
        difference = teacher.log_softmax(dim=1) - crossed.log_softmax(dim=1)  # [R, K + 1]
        classes = mean_or_zero((teacher.softmax(dim=1) * difference).sum(dim=1))
    of_each_class = (-1, cross_logits.shape[1] - 1, -1)
    deltas = cross_deltas.expand(of_each_class), teacher_deltas.expand(of_each_class)
    boxes = class_aware_regression_kd_loss(*deltas, teacher_logits)
    return CrossResult(classes + boxes, classes.detach(), boxes.detach())


class Cross(nn.Module):
    """The parameters of `cross`: f_adapt, a convolution of 1 x 1 from the student's channels to the teacher's.

    The idea is CrossKD's (arXiv 2306.11369), there for dense heads of one family: what the student's features make the
    teacher's head say is compared with what the teacher says, so that the student's own head is taught by annotations
    alone. Here it is the box head that lies in the cache, at RoIs: any student with a pyramid can learn it. The
    teacher's head is a constant; gradients reach f_adapt and the student's pyramid only.

    Args:
        student_channels: Channels of the student's pyramid.
        teacher_channels: Channels of the teacher's.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.adapt = RoIConv2d(student_channels, teacher_channels, 1)

    def forward(
        self, student_rois: TeacherRois, box_head: BoxHead, all_teacher_logits: Tensor, all_teacher_deltas: Tensor
    ) -> CrossResult:
        """The loss.

        Args:
            student_rois: R boxes, with the student's pyramids.
            box_head: The teacher's, frozen.
            all_teacher_logits: Tensor[R, K + 1], of the same boxes.
            all_teacher_deltas: Tensor[R, K or 1, 4], of the same boxes.

        Returns:
            The loss and its parts.
        """
        rois = student_rois
        adapted = TeacherRois(_Adapted(rois.pyramids.roi_align, self.adapt), rois.image_index, rois.boxes, rois.sizes)
        with no_autocast(rois.boxes):
            outputs = box_head(adapted)
        return cross_loss(outputs.logits, outputs.deltas, all_teacher_logits, all_teacher_deltas)


class _Adapted:
    """RoI features in the teacher's channels: `RoiFeatures`."""

    def __init__(self, roi_align: Callable[[Tensor, int | None], Tensor], adapt: nn.Conv2d) -> None:
        self._roi_align, self._adapt = roi_align, adapt

    def roi_align(self, rois: Tensor, size: int | None = None) -> Tensor:
        """Tensor[R, channels of the teacher, size, size] of Tensor[R, 5] (image, x1, y1, x2, y2)."""
        adapted: Tensor = self._adapt(self._roi_align(rois, size).to(self._adapt.weight.dtype))
        return adapted
