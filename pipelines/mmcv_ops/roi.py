"""mmcv's RoIAlign, by torchvision and plain torch."""

import torch
import torchvision
from torch import Tensor

from kdpipe.cache.errors import KdpipeError
from kdpipe.distill.rois.align_cpu import are_ordinary, pool, roi_windows, unpool
from kdpipe.distill.rows import on_cpu
from kdpipe.pipelines.mmcv_ops.precision import computing

__all__ = ["roi_align_backward", "roi_align_forward"]

# Where torchvision's RoIAlign on a CPU is the faster one.
_FEWEST_VALUES = 1 << 17  # pooled values that pay for the preparation
_PIXELS_PER_VALUE = 8  # turning the map channels last costs more than it gains where it has more pixels than this


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (Mask R-CNN) with average pooling: input [N, C, H, W], rois [R, 5] as (image, x1, y1, x2, y2) in pixels.

    Args:
        input: [N, C, H, W].
        rois: [R, 5] (image, x1, y1, x2, y2), pixels.
        output: [R, C, aligned_height, aligned_width], is written.
        argmax_y: mmcv's, of the maximum, not used.
        argmax_x: mmcv's, of the maximum, not used.
        aligned_height: Cells.
        aligned_width: Cells.
        spatial_scale: 1 / stride of the input.
        sampling_ratio: Points per cell and side; 0 chooses by the size of the box.
        pool_mode: 1, the mean.
        aligned: Shift boxes by half a cell.

    Raises:
        KdpipeError: for `pool_mode` 0, the maximum, which no model of mmdet uses; or boxes that are not finite on a
            CPU, where torchvision would read anywhere in memory.
    """
    if pool_mode != 1:
        raise KdpipeError(
            "RoIAlign with pool_mode='max' needs mmcv's compiled ops, and this mmcv has none. "
            "Set pool_mode='avg' (mmdet's default) in the config's roi_layer."
        )
    if on_cpu(rois) and not bool(rois.isfinite().all()):
        raise KdpipeError(
            "RoIAlign was given boxes that are not finite: the network that predicts them has diverged. In a training, "
            "use a lower rate (--lr)."
        )
    x = computing(input)
    size = (aligned_height, aligned_width)
    rois = rois.to(x.dtype)
    if _in_windows(x.numel(), output.numel(), rois, spatial_scale):
        windows = roi_windows(rois, spatial_scale, size, x.shape, sampling_ratio, aligned)
        output.copy_(pool(x, windows, len(rois)).permute(0, 3, 1, 2))
    else:
        output.copy_(torch.ops.torchvision.roi_align(x, rois, spatial_scale, *size, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward` by its input; boxes have none.

    Args:
        grad_output: [R, C, aligned_height, aligned_width].
        rois: As forward.
        argmax_y: Not used.
        argmax_x: Not used.
        grad_input: [N, C, H, W], is written.
        aligned_height: As forward.
        aligned_width: As forward.
        spatial_scale: As forward.
        sampling_ratio: As forward.
        pool_mode: As forward.
        aligned: As forward.
    """
    grad = computing(grad_output)
    rois = rois.to(grad.dtype)
    size = (aligned_height, aligned_width)
    if grad.is_cuda and torch.are_deterministic_algorithms_enabled():
        with torch.enable_grad():  # RoIAlign is linear: its gradient is the same at any input
            x = torch.zeros_like(grad_input, dtype=grad.dtype).requires_grad_()
            pooled = torchvision.ops.roi_align(x, rois, size, spatial_scale, sampling_ratio, aligned)
        grad_input.copy_(torch.autograd.grad(pooled, x, grad)[0])
        return
    if _in_windows(grad_input.numel(), grad.numel(), rois, spatial_scale):
        windows = roi_windows(rois, spatial_scale, size, grad_input.shape, sampling_ratio, aligned)
        grad_input.copy_(unpool(grad.permute(0, 2, 3, 1).contiguous(), windows, grad_input.shape))
        return
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    )


def _in_windows(pixels: int, values: int, rois: Tensor, spatial_scale: float) -> bool:
    """Whether to pool window by window: on a CPU, enough pooled `values` for a map of so many `pixels`, sane boxes."""
    if not on_cpu(rois) or values < _FEWEST_VALUES or pixels > _PIXELS_PER_VALUE * values:
        return False
    return are_ordinary(rois, spatial_scale)
