"""mmcv's compiled ops by torchvision's ops and plain torch, with the entry points of ``mmcv._ext``."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

from kdpipe.cache.errors import KdpipeError


def _computing(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


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
    x = _computing(input)
    output.copy_(
        torch.ops.torchvision.roi_align(
            x, rois.to(x.dtype), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


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
    grad = _computing(grad_output)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad,
            rois.to(grad.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def nms(boxes: Tensor, scores: Tensor, *, iou_threshold: float, offset: int) -> Tensor:
    corners = _computing(boxes)
    if offset:
        corners = torch.cat([corners[:, :2], corners[:, 2:] + offset], dim=1)
    kept: Tensor = torch.ops.torchvision.nms(corners, scores.to(corners.dtype), iou_threshold)
    return kept


def unavailable_op(name: str) -> Callable[..., NoReturn]:
    if name.startswith("_"):
        raise AttributeError(name)

    def op(*args: Any, **kwargs: Any) -> NoReturn:
        raise KdpipeError(f"mmcv's op '{name}' is not available: install compiled mmcv or use a config without it.")

    return op


BRIDGED: dict[str, Callable[..., Any]] = {op.__name__: op for op in (roi_align_forward, roi_align_backward, nms)}
