"""mmcv's RoIAlign and RoIPool, by torchvision and plain torch."""

import torch
import torchvision
from torch import Tensor

from kdpipe.cache.errors import KdpipeError
from kdpipe.distill.rois.align_cpu import are_ordinary, pool, roi_windows, unpool
from kdpipe.pipelines.mmcv_ops.precision import computing

__all__ = ["roi_align_backward", "roi_align_forward", "roi_pool_backward", "roi_pool_forward"]

# Where torchvision's RoIAlign on a CPU is the faster one.
_FEWEST_VALUES = 1 << 17  # pooled values that pay for the preparation
_PIXELS_PER_VALUE = 8  # turning the map channels last costs more than it gains where it has more pixels than this
_POOL_BUDGET = 1 << 24  # elements that RoIPool gathers at a time


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

    Raises:
        KdpipeError: for `pool_mode` 0, the maximum, which no model of mmdet uses.
    """
    if pool_mode != 1:
        raise KdpipeError(
            "RoIAlign with pool_mode='max' needs mmcv's compiled ops, and this mmcv has none. "
            "Set pool_mode='avg' (mmdet's default) in the config's roi_layer."
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
    """Gradient of `roi_align_forward` by its input; boxes have none."""
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
    if rois.is_cuda or values < _FEWEST_VALUES or pixels > _PIXELS_PER_VALUE * values:
        return False
    return are_ordinary(rois, spatial_scale)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool (Fast R-CNN) with mmcv's bins, which are not rounded as torchvision's are: the right and the lower edge
    are those of the next pixel, and an RoI with no area gives 0. `argmax` gets the position within H x W, -1 for none;
    among equal values it is the first one.
    """
    x = computing(input)
    height, width = x.shape[-2:]
    corners = rois[:, 1:].to(x.dtype)
    starts = corners[:, :2] * spatial_scale  # [R, 2] as (x, y)
    sizes = (corners[:, 2:] + 1) * spatial_scale - starts
    top, bottom = _pool_edges(starts[:, 1], sizes[:, 1], pooled_height, height)  # [R, PH]
    left, right = _pool_edges(starts[:, 0], sizes[:, 0], pooled_width, width)  # [R, PW]
    bottom = torch.where((sizes > 0).all(dim=1)[:, None], bottom, top)
    tallest = int((bottom - top).amax().clamp(min=1)) if rois.numel() else 1
    widest = int((right - left).amax().clamp(min=1)) if rois.numel() else 1
    per_roi = x.shape[1] * pooled_height * max(tallest * width, pooled_width * widest)
    step = max(1, _POOL_BUDGET // max(per_roi, 1))
    for first in range(0, rois.shape[0], step):
        part = slice(first, first + step)
        images = x[rois[part, 0].long()]  # [r, C, H, W]
        output[part], argmax[part] = _pool(images, top[part], bottom[part], left[part], right[part], tallest, widest)


def _pool_edges(start: Tensor, size: Tensor, bins: int, limit: int) -> tuple[Tensor, Tensor]:
    """First pixel and the one after the last of each bin, [R, bins] int64 each, within [0, limit]."""
    steps = torch.arange(bins + 1, device=start.device, dtype=start.dtype)
    edges = steps * (size / bins)[:, None] + start[:, None]  # [R, bins + 1]
    first = edges[:, :-1].floor().clamp(0, limit)
    return first.long(), edges[:, 1:].ceil().clamp(0, limit).long()


def _pool(
    images: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor, tallest: int, widest: int
) -> tuple[Tensor, Tensor]:
    """Maximum over the rows of each bin, then over its columns: ([r, C, PH, PW], positions of the same shape)."""
    _, channels, height, width = images.shape
    none = height * width
    rows = top[:, :, None] + torch.arange(tallest, device=top.device)  # [r, PH, tallest]
    index = rows.clamp(max=height - 1).flatten(1)[:, None, :, None].expand(-1, channels, -1, width)
    values = images.gather(2, index).reshape(-1, channels, *rows.shape[1:], width)  # [r, C, PH, tallest, W]
    values = values.masked_fill((rows >= bottom[:, :, None])[:, None, :, :, None], -torch.inf)
    best = values.amax(dim=3)  # [r, C, PH, W]
    flat = rows[:, None, :, :, None] * width + torch.arange(width, device=top.device)
    where = torch.where(values == best.unsqueeze(3), flat, none).amin(dim=3)

    columns = left[:, :, None] + torch.arange(widest, device=left.device)  # [r, PW, widest]
    index = columns.clamp(max=width - 1).flatten(1)[:, None, None, :].expand(-1, channels, best.shape[2], -1)
    values = best.gather(3, index).reshape(*best.shape[:3], *columns.shape[1:])  # [r, C, PH, PW, widest]
    values = values.masked_fill((columns >= right[:, :, None])[:, None, None], -torch.inf)
    best = values.amax(dim=4)  # [r, C, PH, PW]
    where = where.gather(3, index).reshape(values.shape)
    where = torch.where(values == best.unsqueeze(4), where, none).amin(dim=4)

    empty = (best == -torch.inf) | (where == none)
    return best.masked_fill(best == -torch.inf, 0.0).to(images.dtype), where.masked_fill(empty, -1).int()


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    *,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of `roi_pool_forward` by its input: each bin's goes to the pixel that it took."""
    _, channels, height, width = grad_input.shape
    planes = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)  # [R, C]
    index = planes[:, :, None, None] * (height * width) + argmax  # [R, C, PH, PW]
    taken = argmax >= 0
    grad = torch.zeros(grad_input.numel(), dtype=computing(grad_output).dtype, device=grad_input.device)
    grad.index_add_(0, index[taken], grad_output[taken].to(grad.dtype))
    grad_input.copy_(grad.view_as(grad_input))
