"""Convolutions of RoI features, of which there are as many in a step as there are positive RoIs."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdpipe.distill.rows import on_cpu


def convolve_rois(
    roi_features: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0
) -> Tensor:
    """A convolution of RoI features, whose number changes from step to step.

    On a GPU by a matrix product over all windows: cuDNN looks for an algorithm whenever a number of RoIs is new to it,
    forward and for either gradient, and the GPU waits meanwhile.

    Args:
        roi_features: Tensor[R, C, H, W], best channels last in memory.
        weight: Tensor[D, C, k, k].
        bias: Tensor[D], or None.
        stride: Cells from one window to the next.
        padding: Cells of zeros around.

    Returns:
        Tensor[R, D, h, w], in memory channels last.
    """
    if on_cpu(roi_features):
        layout = torch.channels_last
        x, weight = roi_features.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
        return functional.conv2d(x, weight, bias, stride, padding)
    x, side = roi_features.permute(0, 2, 3, 1), weight.shape[2]
    if padding:
        x = functional.pad(x, (0, 0, padding, padding, padding, padding))
    if side > 1 or stride > 1:
        x = x.unfold(1, side, stride).unfold(2, side, stride).permute(0, 1, 2, 4, 5, 3)  # [R, h, w, k, k, C]
    convolved = functional.linear(x.flatten(3), weight.permute(0, 2, 3, 1).flatten(1), bias)  # [R, h, w, D]
    return convolved.permute(0, 3, 1, 2)


class RoIConv2d(nn.Conv2d):
    """torch's `Conv2d` of square kernels, for RoI features: by `convolve_rois`."""

    def forward(self, input: Tensor) -> Tensor:
        """Tensor[R, C, H, W] -> Tensor[R, D, h, w]."""
        return convolve_rois(input, self.weight, self.bias, self.stride[0], int(self.padding[0]))
