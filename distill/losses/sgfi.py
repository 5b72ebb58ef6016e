"""Semantic-guided feature imitation: the teacher's RoI feature against a mixture of the student's pyramid levels."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdpipe.distill.losses.numeric import (
    LossInputError,
    check_dims,
    check_shape,
    full_precision,
    mean_or_zero,
    no_autocast,
    standardize,
)
from kdpipe.distill.rois.convolution import RoIConv2d, convolve_rois


def sgfi_loss(
    student_roi_features: Tensor, teacher_roi_features: Tensor, embed: nn.Module, temperature: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Mean square error between the teacher's RoI features and the student's, mixed over levels (G-DetKD, eq. 1).

    For every RoI: keys `embed(S^l)` of each level and `embed(T)`; weights = softmax over the levels of their dot
    products / temperature; the weighted sum of the student's levels is compared with T, as a mean over channels and
    cells, then over RoIs. Computed in float32 (float64 for float64 input), autocast or not.

    Trainings compute the same by `SGFI`, with less arithmetic and memory.

    Args:
        student_roi_features: Tensor[R, L, C, H, W], of every level, already adapted to the teacher's channels.
        teacher_roi_features: Tensor[R, C, H, W], from the level that the teacher assigns. A constant: it gets no
            gradient.
        embed: maps [N, C, H, W] to keys [N, key].
        temperature: tau > 0, a number or a tensor of one element.

    Returns:
        The loss, a scalar (0 for R = 0, still part of the graph), and the level weights Tensor[R, L] in [0, 1].

    Raises:
        LossInputError: shapes that do not fit, or a temperature that is a number and not positive and finite.
    """
    check_dims("student_roi_features", student_roi_features, "[R, L, C, H, W]")
    num_rois, num_levels, *shape = student_roi_features.shape
    fit = f"student_roi_features {list(student_roi_features.shape)} [R, L, ...]"
    check_shape("teacher_roi_features", teacher_roi_features, (num_rois, *shape), fit)
    if num_levels == 0 or (not isinstance(temperature, Tensor) and not 0 < temperature < math.inf):
        raise LossInputError(f"SGFI needs a level and a temperature above 0, found {num_levels} levels, {temperature}.")
    with no_autocast(student_roi_features):
        student, teacher = full_precision(student_roi_features, teacher_roi_features.detach())
        keys, query = embed(student.flatten(0, 1)).unflatten(0, (num_rois, num_levels)), embed(teacher)
        level_weights = (torch.einsum("rlk,rk->rl", keys, query) / temperature).softmax(dim=1)  # [R, L]
        mixed = torch.einsum("rl,rlchw->rchw", level_weights, student)
        loss = mean_or_zero((mixed - teacher).square().flatten(1).mean(dim=1))
    return loss, level_weights


class SGFIResult(NamedTuple):
    """What SGFI gives.

    Attributes:
        loss: Scalar.
        temperature: tau, a scalar.
        level: Tensor[L], how much each of the student's levels is looked at, a mean over the RoIs; 0 for no RoIs.
    """

    loss: Tensor
    temperature: Tensor
    level: Tensor


class SGFI(nn.Module):
    """Parameters of SGFI: f_adapt, f_embed and the temperature. Needed in training only.

    f_embed is two 3 x 3 convolutions of stride 2 without padding, each followed by ReLU, of widths C/2 and C/4, which
    takes RoI features of 7 x 7 to 10 x 10 cells to one key of C/4 numbers, and larger ones to a longer key. The
    temperature is the exponential of a parameter, so that it stays positive.

    Args:
        student_channels: channels of the student's pyramid.
        teacher_channels: channels C of the teacher's pyramid.
        kernel_size: of the convolution f_adapt, odd; it is padded so that RoI features keep their size.
        normalize: compare features of zero mean and unit variance per channel: the teacher's over the RoIs of the step,
            the adapted ones of the student over RoIs and levels. The loss and its temperature then do not depend on the
            scale of the teacher's features. Not in the paper; every level is adapted, which takes more memory.

    Raises:
        LossInputError: `kernel_size` is not odd and positive.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, kernel_size: int = 1, normalize: bool = False
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise LossInputError(f"The kernel size of f_adapt must be odd and positive, found {kernel_size}.")
        widths = max(teacher_channels // 2, 1), max(teacher_channels // 4, 1)
        self._padding = kernel_size // 2
        self.normalize = normalize
        self.adapt = RoIConv2d(student_channels, teacher_channels, kernel_size, padding=self._padding)
        self.embed = nn.Sequential(
            RoIConv2d(teacher_channels, widths[0], 3, stride=2),
            nn.ReLU(inplace=True),
            RoIConv2d(widths[0], widths[1], 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )
        self.log_temperature = nn.Parameter(torch.zeros(()))

    @property
    def temperature(self) -> Tensor:
        """tau, a scalar above 0; 1 at the start."""
        return self.log_temperature.exp()

    def forward(self, student_roi_features: Tensor, teacher_roi_features: Tensor) -> SGFIResult:
        """`sgfi_loss` after adapting every level with the same weights.

        The four lines of `sgfi_loss` in another order: f_adapt is affine and the level weights sum to 1, so that the
        mixture is adapted in place of every level. The same loss and gradients (tests/distill/losses/test_sgfi.py) with
        a fraction of the arithmetic and memory (tests/benchmarks/losses.md).

        Args:
            student_roi_features: Tensor[R, L, student channels, H, W], of 7 cells or more per side.
            teacher_roi_features: Tensor[R, teacher channels, H, W]; gets no gradient.

        Returns:
            The loss, and what it says of the levels.

        Raises:
            LossInputError: shapes that do not fit.
        """
        loss, alpha = self._loss_and_weights(student_roi_features, teacher_roi_features)
        level = alpha.detach().sum(dim=0) / max(1, len(alpha))
        return SGFIResult(loss, self.temperature.detach(), level)

    def level_weights(self, student_roi_features: Tensor, teacher_roi_features: Tensor) -> Tensor:
        """How much each of the student's levels is looked at for each RoI, Tensor[R, L]; takes what `forward` takes."""
        return self._loss_and_weights(student_roi_features, teacher_roi_features)[1]

    def _loss_and_weights(self, student_roi_features: Tensor, teacher_roi_features: Tensor) -> tuple[Tensor, Tensor]:
        check_dims("student_roi_features", student_roi_features, "[R, L, C, H, W]")
        num_rois, num_levels, _, *cells = student_roi_features.shape
        expected = (num_rois, num_levels, self.adapt.in_channels, *cells)
        fit = f"an adapter of {self.adapt.in_channels} channels"
        check_shape("student_roi_features", student_roi_features, expected, fit)
        of_teacher = (num_rois, self.adapt.out_channels, *cells)
        check_shape("teacher_roi_features", teacher_roi_features, of_teacher, f"{num_rois} RoIs")
        with no_autocast(student_roi_features):
            features = student_roi_features, teacher_roi_features.detach()
            student, teacher = (x.to(self.adapt.weight.dtype) for x in features)
            mixed_by = self._normalized if self.normalize else self._mixed
            return mixed_by(student, teacher)

    def _normalized(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and level weights Tensor[R, L], of standardised features."""
        adapted = self.adapt(student.flatten(0, 1)).unflatten(0, student.shape[:2])
        return sgfi_loss(standardize(adapted, 2), standardize(teacher, 1), self.embed, self.temperature)

    def _mixed(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and level weights Tensor[R, L]; the mixture is adapted in place of every level."""
        adapted_keys = self._adapted_keys(student.flatten(0, 1)).unflatten(0, student.shape[:2])
        similarity = torch.einsum("rlk,rk->rl", adapted_keys, self.embed(teacher))
        alpha = (similarity / self.temperature).softmax(dim=1)  # [R, L]
        channels_last = student.permute(0, 1, 3, 4, 2)  # as `roi_align_levels` gives them: no copy
        mixture = torch.einsum("rl,rlhwc->rhwc", alpha, channels_last).permute(0, 3, 1, 2)
        loss = mean_or_zero((self.adapt(mixture) - teacher).square().flatten(1).mean(dim=1))
        return loss, alpha

    def _adapted_keys(self, roi_features: Tensor) -> Tensor:
        """Keys Tensor[N, key] of adapted features, out of those of the student, Tensor[N, student channels, H, W].

        f_adapt and the first convolution of f_embed, with nothing between them, are one convolution.
        """
        first: Any = self.embed[0]
        weight = functional.conv2d(
            self.adapt.weight.transpose(0, 1), first.weight.flip(2, 3), padding=first.kernel_size[0] - 1
        ).transpose(0, 1)  # [C / 2, student channels, 3, 3] for an f_adapt of 1 x 1
        bias = first.bias + first.weight.sum(dim=(2, 3)) @ self.adapt.bias
        hidden = convolve_rois(roi_features, weight, bias, first.stride[0], self._padding)
        keys: Tensor = self.embed[1:](hidden)
        return keys
