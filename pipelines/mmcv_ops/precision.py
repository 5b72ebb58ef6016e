"""The type that mmcv's ops compute in."""

import torch
from torch import Tensor

__all__ = ["computing"]


def computing(x: Tensor) -> Tensor:
    """`x` as it is in float32 and float64, else in float32: half types are for storage."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
