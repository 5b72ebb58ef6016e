"""Pearson imitation of whole feature maps (PKD)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdpipe.distill.losses.numeric import check_level, full_precision, no_autocast, standardize
from kdpipe.distill.outputs import TeacherMap


def pearson_imitation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """How little feature maps correlate (PKD, arXiv 2207.02039).

    L = sum over levels of 1/2 MSE(norm(S^l), norm(T^l)), with norm to zero mean and unit variance of each channel over
    batch and cells, and the mean over channels and the cells of the mask. That is the sum of 1 - r, with r the mean
    over channels of Pearson's correlation, so that each level has from 0 to 2, whatever the scale of the features.
    Computed in float32 (float64 for float64 input), autocast or not.

    Args:
        student: Per level Tensor[B, C, h, w].
        teacher: Per level Tensor[B, C, h, w]. A constant: it gets no gradient.
        masks: Per level Tensor[B, h, w] of 0 and 1.

    Returns:
        Scalar; 0 where the masks are empty, still part of the graph.

    Raises:
        LossInputError: Shapes that do not fit.
    """
    losses = []
    for level, target, mask in zip(student, teacher, masks, strict=True):
        check_level(level, target, mask)
        with no_autocast(level):
            s, t, inside = full_precision(level, target.detach(), mask.detach()[:, None])  # the mask [B, 1, h, w]
            difference = standardize(s, 1, inside) - standardize(t, 1, inside)
            losses.append(difference.square().sum() / (2 * level.shape[1] * inside.sum().clamp(min=1)))
    return torch.stack(losses).sum()


class PKD(nn.Module):
    """`pearson_imitation_loss` of levels of the same stride.

    Args:
        student_channels: Channels of the student's pyramid. Where the teacher has others, a convolution of 1 x 1 for
            each level adapts them, which PKD does without; it has no bias, which would change nothing.
        teacher_channels: Channels of the teacher's.
        strides: Of the levels that are compared.
    """

    def __init__(self, student_channels: int, teacher_channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        alike = student_channels == teacher_channels
        self.adapt = nn.ModuleList(
            nn.Identity() if alike else nn.Conv2d(student_channels, teacher_channels, 1, bias=False) for _ in strides
        )

    def forward(self, student_maps: Mapping[int, Tensor], teacher_maps: Mapping[int, TeacherMap]) -> Tensor:
        """The loss.

        Args:
            student_maps: By stride Tensor[B, student channels, h, w].
            teacher_maps: By stride, in the student's view. Cells outside of what the teacher saw are left out.

        Returns:
            Scalar.
        """
        adapted = []
        for stride, adapt in zip(self.strides, self.adapt, strict=True):
            with no_autocast(student_maps[stride]):
                adapted.append(adapt(full_precision(student_maps[stride])[0]))
        of_teacher = [teacher_maps[stride] for stride in self.strides]
        return pearson_imitation_loss(adapted, [x.values for x in of_teacher], [x.inside for x in of_teacher])
