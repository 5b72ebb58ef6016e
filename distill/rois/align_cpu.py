"""RoIAlign on a CPU by small matrix products: several times as fast as torchvision's loop, forward and backward.

RoIAlign weighs rows and columns separately. So the pixels under a RoI, gathered channels last, are multiplied by the
weights of its rows, then by those of its columns; RoIs of about the same size at a time. Where a fixed number of sample
points lies far apart, only the two rows, or columns, beside each of them are gathered, so that a RoI costs no more than
its sample points, however large it is. Sample points are those of torchvision to the last bit; the sums differ by their
order. Both directions are deterministic.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdpipe.distill.losses.numeric import no_autocast

_CHUNK = 128  # RoIs at a time, at most
_VALUES = 1 << 19  # pixels times channels gathered at a time, where one RoI has not more: what stays in caches
_LARGEST = 1 << 14  # side of a RoI, in pixels of the map, that is still an ordinary one


@dataclass(frozen=True)
class Windows:
    """What some RoIs take of a map: r RoIs, each from `lines` x `columns` pixels.

    Attributes:
        rows: Tensor[r] int64, which RoIs.
        pixels: Tensor[r * lines * columns] int64, places within N * H * W.
        lines: Tensor[r, height, lines], weights along y.
        columns: Tensor[r, width, columns], weights along x.
    """

    rows: Tensor
    pixels: Tensor
    lines: Tensor
    columns: Tensor


def are_ordinary(rois: Tensor, spatial_scale: float) -> bool:
    """Whether boxes, Tensor[R, 5], are finite and of a size for which windows make sense."""
    return bool((rois[:, 1:].abs() * spatial_scale).amax() < _LARGEST) if rois.numel() else True  # false for NaN


def roi_windows(
    rois: Tensor,
    spatial_scale: float,
    size: tuple[int, int],
    shape: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> list[Windows]:
    """What RoIAlign takes of a map.

    Args:
        rois: Tensor[R, 5] (image, x1, y1, x2, y2), pixels of the image, of the type of the map.
        spatial_scale: Pixels of the map per pixel of the image.
        size: (height, width) of the result.
        shape: [N, C, H, W] of the map.
        sampling_ratio: Sample points per bin and axis, 0 for one per pixel of the map.
        aligned: Whether pixel centres lie at half coordinates.
    """
    _, channels, height, width = shape
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    starts, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        sides = sides.clamp(min=1.0)
    across = _axis(starts[:, 0], sides[:, 0], size[1], width, sampling_ratio)
    down = _axis(starts[:, 1], sides[:, 1], size[0], height, sampling_ratio)
    image = rois[:, 0].long()
    windows = []
    for part in _similar(down.length, across.length, channels):
        high, wide = int(down.length[part].amax()), int(across.length[part].amax())
        ys, xs = down.at[part, :high], across.at[part, :wide]  # [r, lines], [r, columns]
        rows = image[part, None] * height + ys.clamp(max=height - 1)
        pixels = rows[:, :, None] * width + xs[:, None].clamp(max=width - 1)  # [r, lines, columns]
        lines, columns = down.weights[part, :, :high], across.weights[part, :, :wide]
        windows.append(Windows(part, pixels.flatten(), lines, columns))
    return windows


@dataclass(frozen=True)
class _Axis:
    """What R RoIs take of a map along one axis.

    Attributes:
        at: Tensor[R, s] int64, rows (or columns) of the map; also some beyond its end, with weight 0.
        weights: Tensor[R, bins, s].
        length: Tensor[R] int64, how many of the s a RoI uses.
    """

    at: Tensor
    weights: Tensor
    length: Tensor


def _axis(start: Tensor, side: Tensor, bins: int, limit: int, sampling_ratio: int) -> _Axis:
    """What RoIs that begin at `start` and are `side` long, both Tensor[R], take of a map that is `limit` long."""
    step = (side / bins)[:, None, None]
    points = step.ceil() if sampling_ratio <= 0 else torch.full_like(step, sampling_ratio)
    number = torch.arange(max(int(points.amax()), 1), dtype=side.dtype, device=side.device)
    at = start[:, None, None] + torch.arange(bins, dtype=side.dtype, device=side.device)[:, None] * step
    at = at + (number + 0.5) * step / points.clamp(min=1)  # [R, bins, points]
    share = ((number < points) & (at >= -1) & (at <= limit)) / points.clamp(min=1)
    at = torch.where(number < points, at, at[..., :1]).clamp(0, limit - 1)
    low = at.floor()
    first = low.amin(dim=(1, 2))
    window = (low.amax(dim=(1, 2)) - first).long() + 2
    beside = 2 * bins * len(number)  # two neighbours of every sample point
    apart, length = window > beside, window.clamp(max=beside)
    slots = torch.arange(0, beside, 2, device=side.device).view(bins, -1)
    taps = torch.where(apart[:, None, None], slots, (low - first[:, None, None]).long())  # [R, bins, points]
    upper = at - low
    weights = at.new_zeros(len(start), bins, int(length.amax()))
    weights.scatter_add_(2, taps, (1 - upper) * share).scatter_add_(2, taps + 1, upper * share)
    lines = first.long()[:, None] + torch.arange(weights.shape[2], device=side.device)
    if apart.any():
        neighbours = torch.stack([low, low + 1], dim=3).long().flatten(1)  # [R, beside]
        lines[apart, :beside] = neighbours[apart]
    return _Axis(lines, weights, length)


def _similar(high: Tensor, wide: Tensor, channels: int) -> Iterator[Tensor]:
    """Indices of RoIs whose pixels, Tensor[R] high and wide, are alike to a factor of two each way."""
    octaves = torch.stack([high, wide]).log2().ceil()  # [2, R]
    kinds = octaves[0] * 64 + octaves[1]
    order = kinds.argsort(stable=True)
    room = (_VALUES / channels / octaves.sum(dim=0).exp2()).clamp(1, _CHUNK)[order].tolist()
    kind = kinds[order].tolist()
    begin = 0
    for end in range(1, len(kind) + 1):
        if end == len(kind) or kind[end] != kind[begin] or end - begin >= int(room[begin]):
            yield order[begin:end]
            begin = end


def pool(x: Tensor, windows: Sequence[Windows], count: int) -> Tensor:
    """RoIAlign with average pooling.

    Args:
        x: Tensor[N, C, H, W] float32 or float64.
        windows: Of all RoIs.
        count: R, how many RoIs there are.

    Returns:
        Tensor[R, height, width, C].
    """
    channels = x.shape[1]
    flat = x.permute(0, 2, 3, 1).reshape(-1, channels)  # [N * H * W, C]
    pooled: Tensor = x.new_empty(count, windows[0].lines.shape[1], windows[0].columns.shape[1], channels)
    with no_autocast(x):
        for window in windows:
            rois, lines, columns = len(window.rows), window.lines.shape[2], window.columns.shape[2]
            pixels = flat.index_select(0, window.pixels).view(rois, lines, columns * channels)
            down = (window.lines @ pixels).unflatten(2, (columns, channels))  # [r, height, columns, C]
            pooled[window.rows] = window.columns[:, None] @ down  # [r, height, width, C]
    return pooled


def unpool(grad: Tensor, windows: Sequence[Windows], shape: Sequence[int]) -> Tensor:
    """Gradient of `pool` by its input.

    Args:
        grad: Tensor[R, height, width, C], by the result.
        windows: Of all RoIs.
        shape: [N, C, H, W] of the input.

    Returns:
        Tensor[N, C, H, W].
    """
    images, channels, height, width = shape
    total: Tensor = grad.new_zeros(images * height * width, channels)
    with no_autocast(grad):
        for window in windows:
            across = window.columns.transpose(1, 2)[:, None] @ grad[window.rows]  # [r, height, columns, C]
            pixels = (window.lines.transpose(1, 2) @ across.flatten(2)).view(-1, channels)
            total.scatter_add_(0, window.pixels[:, None].expand(-1, channels), pixels)
    return total.view(images, height, width, channels).permute(0, 3, 1, 2)


class _RoiAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: list[Windows], count: int) -> Tensor:
        ctx.windows, ctx.shape = windows, x.shape
        return pool(x, windows, count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return unpool(grad, ctx.windows, ctx.shape), None, None


def roi_align_channels_last(
    x: Tensor, rois: Tensor, spatial_scale: float, size: tuple[int, int], sampling_ratio: int, aligned: bool
) -> Tensor:
    """RoIAlign of a map, differentiable once.

    Args:
        x: Tensor[N, C, H, W] float32 or float64, the map.
        rois: Tensor[R, 5] (image, x1, y1, x2, y2), pixels of the image, of the type of the map.
        spatial_scale: Pixels of the map per pixel of the image.
        size: (height, width) of the result.
        sampling_ratio: Sample points per bin and axis, 0 for one per pixel of the map.
        aligned: Whether pixel centres lie at half coordinates.

    Returns:
        Tensor[R, height, width, C].
    """
    if not len(rois):
        return x.new_zeros(0, *size, x.shape[1]) + 0.0 * x.sum()
    windows = roi_windows(rois, spatial_scale, size, x.shape, sampling_ratio, aligned)
    pooled: Tensor = _RoiAlign.apply(x, windows, len(rois))
    return pooled
