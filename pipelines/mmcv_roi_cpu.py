"""RoIAlign on a CPU by products with a sparse matrix: several times faster than torchvision's loop.

A bin's value is a weighted sum of pixels, the same for every channel. With channels last, each weight is one
multiplication of whole rows: forward is `torch.nn.functional.embedding_bag`, backward one sparse product. Sample
points are torchvision's to the last bit; the sums differ by their order. Both directions are deterministic for any
number of threads.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["is_faster", "roi_align_cpu", "roi_align_cpu_backward"]

_CHUNK = 64  # RoIs whose taps are made at a time
_ENTRIES = 1 << 23  # of the sparse matrix, before it is applied
_LARGEST = 1 << 14  # side of an RoI, in pixels of the map, that is still an ordinary one
_FEWEST_VALUES = 1 << 17  # pooled values that pay for making the matrix
_PIXELS_PER_VALUE = 8  # turning the map channels last costs more than it gains where it has more pixels than this


def is_faster(pixels: int, values: int, rois: Tensor, spatial_scale: float) -> bool:
    """Whether these functions beat torchvision's: enough pooled `values` for a map of so many `pixels`, sane boxes."""
    if rois.is_cuda or values < _FEWEST_VALUES or pixels > _PIXELS_PER_VALUE * values:
        return False
    return bool((rois[:, 1:].abs() * spatial_scale).amax() < _LARGEST)  # false for NaN


def roi_align_cpu(
    x: Tensor, rois: Tensor, spatial_scale: float, size: tuple[int, int], sampling_ratio: int, aligned: bool
) -> Tensor:
    """RoIAlign with average pooling.

    Args:
        x: [N, C, H, W] float32 or float64.
        rois: [R, 5] (image, x1, y1, x2, y2) in pixels of the image, of the same type.
        spatial_scale: Pixels of the map per pixel of the image.
        size: (height, width) of the result.
        sampling_ratio: Sample points per bin and axis, 0 for one per pixel of the map.
        aligned: Whether pixel centres lie at half coordinates.

    Returns:
        [R, C, height, width].
    """
    channels = x.shape[1]
    flat = x.permute(0, 2, 3, 1).reshape(-1, channels)  # [N * H * W, C]
    pooled = x.new_empty(rois.shape[0], size[0] * size[1], channels)
    for part, index, weights in _taps(rois, spatial_scale, size, x.shape[2:], sampling_ratio, aligned):
        rows = F.embedding_bag(index, flat, per_sample_weights=weights, mode="sum")
        pooled[part] = rows.view(len(part), -1, channels)
    return pooled.transpose(1, 2).reshape(-1, channels, *size)


def roi_align_cpu_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    shape: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Gradient of `roi_align_cpu` by its input, of `shape` [N, C, H, W], for `grad` [R, C, height, width]."""
    images, channels, height, width = shape
    size = (grad.shape[2], grad.shape[3])
    rows = grad.flatten(2).transpose(1, 2).reshape(-1, channels)  # [R * bins, C]
    total = grad.new_zeros(images * height * width, channels)
    pending: list[tuple[Tensor, Tensor, Tensor]] = []
    for part, index, weights in _taps(rois, spatial_scale, size, shape[2:], sampling_ratio, aligned):
        bins = (part[:, None] * (size[0] * size[1]) + torch.arange(size[0] * size[1])).flatten()  # [r * bins]
        used = weights != 0
        pending.append((index[used], bins[:, None].expand_as(index)[used], weights[used]))
        if sum(len(entries[0]) for entries in pending) > _ENTRIES:
            total += _spread(pending, rows, total.shape[0])
            pending = []
    if pending:
        total += _spread(pending, rows, total.shape[0])
    return total.view(images, height, width, channels).permute(0, 3, 1, 2)


def _spread(entries: list[tuple[Tensor, Tensor, Tensor]], rows: Tensor, pixels: int) -> Tensor:
    """Product [pixels, C] of the matrix with these (pixel, bin, weight) and `rows` [R * bins, C]."""
    index, bins, weights = (torch.cat(parts) for parts in zip(*entries, strict=True))
    index, order = index.sort(stable=True)
    positions = torch.stack([index, bins[order]])
    matrix = torch.sparse_coo_tensor(
        positions, weights[order], (pixels, rows.shape[0]), check_invariants=False, is_coalesced=True
    )
    product: Tensor = torch.sparse.mm(matrix, rows)
    return product


def _taps(
    rois: Tensor,
    spatial_scale: float,
    size: tuple[int, int],
    map_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For some RoIs at a time: (which [r], pixels [r * bins, taps] within N * H * W, their weights)."""
    height, width = map_size
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    starts, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        sides = sides.clamp(min=1.0)
    order = sides.prod(dim=1).argsort(stable=True)  # RoIs of a size have as many taps
    for begin in range(0, len(order), _CHUNK):
        part = order[begin : begin + _CHUNK]
        ys, y_weights = _axis_taps(starts[part, 1], sides[part, 1], size[0], height, sampling_ratio)
        xs, x_weights = _axis_taps(starts[part, 0], sides[part, 0], size[1], width, sampling_ratio)
        rows = rois[part, 0].long()[:, None, None] * height + ys  # [r, height, taps]
        index = rows[:, :, None, :, None] * width + xs[:, None, :, None, :]
        weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]
        bins = len(part) * size[0] * size[1]
        yield part, index.reshape(bins, -1), weights.reshape(bins, -1)


def _axis_taps(start: Tensor, side: Tensor, bins: int, limit: int, sampling_ratio: int) -> tuple[Tensor, Tensor]:
    """Bilinear sampling along one axis: pixels [r, bins, taps] in [0, limit) and their weights in the bin's mean."""
    step = (side / bins)[:, None, None]
    points = step.ceil() if sampling_ratio <= 0 else torch.full_like(step, sampling_ratio)
    number = torch.arange(max(int(points.amax()), 1), dtype=side.dtype)
    at = start[:, None, None] + torch.arange(bins, dtype=side.dtype)[:, None] * step
    at = at + (number + 0.5) * step / points.clamp(min=1)  # [r, bins, points]
    valid = (number < points) & (at >= -1) & (at <= limit)
    at = at.clamp(0, limit - 1)
    low = at.long()
    pixels = torch.cat([low, (low + 1).clamp(max=limit - 1)], dim=2)  # [r, bins, 2 * points]
    upper = at - low
    weights = torch.cat([1 - upper, upper], dim=2).masked_fill(~valid.repeat(1, 1, 2), 0.0) / points.clamp(min=1)

    first, last = pixels.amin(dim=2, keepdim=True), pixels.amax(dim=2, keepdim=True)
    span = int((last - first).amax()) + 1
    if span >= pixels.shape[2]:
        return pixels, weights
    merged = weights.new_zeros(*pixels.shape[:2], span).scatter_add_(2, pixels - first, weights)  # neighbours share
    return (first + torch.arange(span)).clamp(max=limit - 1), merged
