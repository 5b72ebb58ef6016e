"""int8 with a scale per channel, and back. On the device of the values."""

import torch
from torch import Tensor

INT8_MAX = 127


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per channel: `values` is about `quantized * scale`, off by at most half a scale.

    Args:
        values: [..., C, H, W] float, any device; H and W are positive.

    Returns:
        [..., C, H, W] int8 within -127 .. 127, and [..., C] float32 scale = max|x| / 127. A channel of zeros has
        scale 0 and values 0. A channel that is not finite has a scale that is not finite.
    """
    values = values.detach().float()
    # Without a copy of the values, which is larger than all caches; abs: a zero has no sign.
    largest, smallest = values.amax(dim=(-2, -1)), values.amin(dim=(-2, -1))
    scale = torch.maximum(largest, -smallest).abs() / INT8_MAX
    steps = values / torch.where(scale > 0, scale, 1.0)[..., None, None]
    return steps.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The float values of `quantize`'s result, on the device of `values`.

    Args:
        values: [..., C, H, W] int8.
        scale: [..., C] float32.
        dtype: of the result; the product is taken in float32.

    Returns:
        [..., C, H, W] of `dtype`.
    """
    return values.float().mul_(scale.to(values.device)[..., None, None]).to(dtype)
