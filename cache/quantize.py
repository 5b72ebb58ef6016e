"""int8 and int4 with a scale per channel, and back. On the device of the values."""

import torch
from torch import Tensor

INT8_MAX, INT4_MAX = 127, 7

# Shares of the largest magnitude of a channel at which int4 may clip, and cells of a channel that the choice looks at.
_CLIPS = tuple(0.85**step for step in range(10))
_CELLS = 8192
_GOLDEN = 5**0.5 / 2 - 1  # from one half to the golden ratio


def quantize(values: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per channel: `values` is about `quantized * scale`, off by at most half a scale.

    Args:
        values: [..., C, H, W] float, any device; H and W are positive.
        scale_dtype: of the scale; rounded to float16, it may be off by 0.6 of it.

    Returns:
        [..., C, H, W] int8 within -127 .. 127, and [..., C] scale = max|x| / 127. A channel of zeros has scale 0 and
        values 0. A channel that is not finite, or whose scale is too large for its type, has a scale that is not
        finite.
    """
    values = values.detach().float()
    scale = (_largest(values) / INT8_MAX).to(scale_dtype)
    return _steps(values, scale.float(), INT8_MAX).to(torch.int8), scale


def quantize4(values: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Symmetric int4 per channel, two channels to a byte: `values` is about `q * scale`, q within -7 .. 7.

    The scale is the one of a few that makes the square error smallest: large values are clipped where that makes the
    many small ones finer. In channels of more than 16,383 cells the choice looks at evenly spaced ones.

    A byte holds a value of channel c in its lower half and one of channel c + ceil(C / 2) in its upper half, each coded
    as 0, -1, 1, -2, ... = 0, 1, 2, 3, ...: the bits of neighbours in a channel lie side by side once shuffled, and the
    upper ones are rarely set, which compresses best.

    Args:
        values: [..., C, H, W] float, any device; H and W are positive.
        scale_dtype: of the scale.

    Returns:
        [..., ceil(C / 2), H, W] uint8, and [..., C] scale; zeros and what is not finite as `quantize`.
    """
    values = values.detach().float()
    cells = values.flatten(-2)
    cells = cells[..., :: _step(cells.shape[-1], values.shape[-1])]  # [..., C, some]
    largest = (_largest(values) / INT4_MAX).to(scale_dtype).float()
    scale, least = largest, torch.full_like(largest, torch.inf)
    for clip in _CLIPS:
        candidate = (largest * clip).to(scale_dtype).float()
        steps = _steps(cells[..., None], candidate, INT4_MAX)[..., 0]
        error = (steps * candidate[..., None] - cells).square_().sum(-1)  # [..., C]
        scale = torch.where(error < least, candidate, scale)
        least = torch.minimum(error, least)
    steps = _steps(values, scale, INT4_MAX).to(torch.int8)
    codes = ((steps << 1) ^ (steps >> 7)).view(torch.uint8)
    half = -(-codes.shape[-3] // 2)
    packed = codes[..., :half, :, :].clone()
    packed[..., : codes.shape[-3] - half, :, :] |= codes[..., half:, :, :] << 4
    return packed, scale.to(scale_dtype)


def _step(count: int, width: int) -> int:
    """Every which of so many cells in rows of a width is looked at.

    The columns looked at move from row to row by about the golden ratio of a step, so that they leave no gap in which
    an object could lie: with a step that divides the width, they would be the same in every row.
    """
    least = count // _CELLS
    if least < 2:
        return 1
    return min(range(least, least + least // 2 + 1), key=lambda step: abs(abs(width / step % 1 - 0.5) - _GOLDEN))


def dequantize(values: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float values of the result of `quantize` or `quantize4`, or of floats; on the device of `values`.

    Args:
        values: [..., C, H, W] int8, or [..., ceil(C / 2), H, W] uint8; or floats, which have no scale.
        scale: [..., C], or None.
        dtype: of the result; the product is taken in float32.

    Returns:
        [..., C, H, W] of `dtype`.
    """
    if scale is None:
        return values.to(dtype)
    if values.dtype == torch.uint8:
        codes = torch.cat([values & 15, values >> 4], dim=-3)[..., : scale.shape[-1], :, :].to(torch.int8)
        values = (codes >> 1) ^ -(codes & 1)
    return values.float().mul_(scale.to(values.device).float()[..., None, None]).to(dtype)


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize`, with one scale per row: [R, D] float gives [R, D] int8 and [R] float32."""
    steps, scale = quantize(values[:, None])
    return steps[:, 0], scale


def dequantize_rows(values: Tensor, scale: Tensor | None) -> Tensor:
    """The float32 values of `quantize_rows`' result, or of [R, D] floats, which have no scale."""
    return values.float() if scale is None else values.float().mul_(scale[:, None])


def _largest(values: Tensor) -> Tensor:
    """Largest magnitude of each channel, [..., C], without a copy of the values, which is larger than all caches."""
    largest, smallest = values.amax(dim=(-2, -1)), values.amin(dim=(-2, -1))
    return torch.maximum(largest, -smallest).abs()  # a zero has no sign


def _steps(values: Tensor, scale: Tensor, limit: int) -> Tensor:
    """Values in whole steps of their channel's scale, clamped."""
    steps = values / torch.where(scale > 0, scale, 1.0)[..., None, None]
    return steps.round_().clamp_(-limit, limit)
