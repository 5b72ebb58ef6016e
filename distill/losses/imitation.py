"""Imitation of whole feature maps under a mask: the baselines of G-DetKD's table 6."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from kdpipe.distill.losses.masks import Anchor, anchor_mask, box_mask, gaussian_mask
from kdpipe.distill.losses.numeric import check_level, full_precision, no_autocast
from kdpipe.distill.outputs import TeacherMap

StudentMaps = Mapping[int, Tensor]  # by stride, Tensor[B, C, h, w]
TeacherMaps = Mapping[int, TeacherMap]  # by stride, of the same shapes but for the channels
Mask = Callable[[int, tuple[int, int]], Tensor]  # stride and shape of a level to Tensor[B, h, w]

_LEAST_COUNT = 1e-6


def masked_imitation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Square error of feature maps where masks are (G-DetKD, section 3, L_feat).

    L = 1 / (2 N_p) sum over levels l, cells ij and channels c of I^l_ij (f_adapt(S^l)_ijc - T^l_ijc)^2, with N_p the
    sum of I over levels, cells, and the images of the batch. Channels are summed, as in the equation: a weight of the
    order of FGFI's 0.01 suits it. Computed in float32 (float64 for float64 input), autocast or not.

    Args:
        student: Per level Tensor[B, C, h, w], already adapted to the teacher's channels.
        teacher: Per level Tensor[B, C, h, w]. A constant: it gets no gradient.
        masks: Per level Tensor[B, h, w], at least 0.

    Returns:
        Scalar; 0 where the masks are empty, still part of the graph.

    Raises:
        LossInputError: Shapes that do not fit.
    """
    errors, counts = [], []
    for adapted, target, mask in zip(student, teacher, masks, strict=True):
        check_level(adapted, target, mask)
        with no_autocast(adapted):
            s, t, weight = full_precision(adapted, target.detach(), mask.detach())
            errors.append(((s - t).square().sum(dim=1) * weight).sum())
            counts.append(weight.sum())
    count = torch.stack(counts).sum()
    # a count of 0 divides 0, whose gradient has to stay finite under any loss scale; one of a Gaussian may be small
    return torch.stack(errors).sum() / (2 * torch.where(count > 0, count.clamp(min=_LEAST_COUNT), 1.0))


class MaskedImitation(nn.Module):
    """`masked_imitation_loss` after f_adapt, a convolution of 3 x 3 for each level.

    Args:
        student_channels: Channels of the student's pyramid.
        teacher_channels: Channels of the teacher's.
        strides: Of the levels that are compared: each with the level of the same stride.
    """

    def __init__(self, student_channels: int, teacher_channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.adapt = nn.ModuleList(nn.Conv2d(student_channels, teacher_channels, 3, padding=1) for _ in strides)

    def forward(self, student_maps: StudentMaps, teacher_maps: TeacherMaps, mask: Mask | None = None) -> Tensor:
        """The loss.

        Args:
            student_maps: By stride Tensor[B, student channels, h, w].
            teacher_maps: By stride, in the student's view. Cells outside of what the teacher saw are in no mask.
            mask: Of a level, Tensor[B, h, w]; all cells by default (I = 1).

        Returns:
            Scalar.
        """
        adapted, masks = [], []
        for stride, adapt in zip(self.strides, self.adapt, strict=True):
            student, inside = student_maps[stride], teacher_maps[stride].inside
            with no_autocast(student):
                adapted.append(adapt(full_precision(student)[0]))
            height, width = student.shape[-2:]
            masks.append(inside if mask is None else inside * mask(stride, (height, width)))
        return masked_imitation_loss(adapted, [teacher_maps[stride].values for stride in self.strides], masks)


class _Imitation(nn.Module):
    def __init__(self, student_channels: int, teacher_channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.imitate = MaskedImitation(student_channels, teacher_channels, strides)


class WholeImitation(_Imitation):
    """Imitation of all cells (Chen et al. 2017), `whole`. Arguments as `MaskedImitation`."""

    def forward(self, student_maps: StudentMaps, teacher_maps: TeacherMaps) -> Tensor:
        """The loss; arguments as of `MaskedImitation`."""
        loss: Tensor = self.imitate(student_maps, teacher_maps)
        return loss


class BoxMaskImitation(_Imitation):
    """Imitation of the cells in annotated boxes (`box_mask`), `gt-mask`. Arguments as `MaskedImitation`."""

    def forward(self, student_maps: StudentMaps, teacher_maps: TeacherMaps, gt_boxes: Sequence[Tensor]) -> Tensor:
        """The loss.

        Args:
            student_maps: As of `MaskedImitation`.
            teacher_maps: The same.
            gt_boxes: Of each image Tensor[G, 4] (x1, y1, x2, y2), pixels of the student's network input.
        """
        loss: Tensor = self.imitate(student_maps, teacher_maps, _of_images(box_mask, gt_boxes))
        return loss


class GaussianMaskImitation(_Imitation):
    """Imitation under a Gaussian in each annotated box (`gaussian_mask`), `gaussian-mask`. Arguments as before."""

    def forward(self, student_maps: StudentMaps, teacher_maps: TeacherMaps, gt_boxes: Sequence[Tensor]) -> Tensor:
        """The loss.

        Args:
            student_maps: As of `MaskedImitation`.
            teacher_maps: The same.
            gt_boxes: As of `BoxMaskImitation`.
        """
        loss: Tensor = self.imitate(student_maps, teacher_maps, _of_images(gaussian_mask, gt_boxes))
        return loss


class AnchorMaskImitation(_Imitation):
    """Imitation of the cells with an anchor near an object (`anchor_mask`), `anchor-mask`. Arguments as before."""

    def forward(
        self,
        student_maps: StudentMaps,
        teacher_maps: TeacherMaps,
        gt_boxes: Sequence[Tensor],
        base_anchors: Mapping[int, Sequence[Anchor]],
    ) -> Tensor:
        """The loss.

        Args:
            student_maps: As of `MaskedImitation`.
            teacher_maps: The same.
            gt_boxes: As of `BoxMaskImitation`.
            base_anchors: By stride, anchors of cell (0, 0) as `anchor_mask` takes them.
        """

        def mask(stride: int, shape: tuple[int, int]) -> Tensor:
            of_level = partial(anchor_mask, anchors=base_anchors[stride])
            return _of_images(of_level, gt_boxes)(stride, shape)

        loss: Tensor = self.imitate(student_maps, teacher_maps, mask)
        return loss


def _of_images(mask: Callable[[Tensor, tuple[int, int], int], Tensor], gt_boxes: Sequence[Tensor]) -> Mask:
    """The masks of a batch, in full precision."""
    return lambda stride, shape: torch.stack([mask(full_precision(boxes)[0], shape, stride) for boxes in gt_boxes])
