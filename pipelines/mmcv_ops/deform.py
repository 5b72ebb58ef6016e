"""mmcv's deformable convolutions, by torchvision."""

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from kdpipe.distill.losses.numeric import no_autocast
from kdpipe.pipelines.mmcv_ops.precision import computing

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
]


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: int
) -> None:
    """Deformable convolution (Dai et al. 2017): `offset` [N, 2 * groups * kH * kW, H, W] as (dy, dx) per tap.

    Args:
        input: [N, C, h, w].
        weight: [O, C / group, kH, kW].
        offset: [N, 2 * groups * kH * kW, H, W].
        output: [N, O, H, W], is written.
        columns: mmcv's buffer, not used.
        ones: mmcv's buffer, not used.
        geometry: Strides, paddings, dilations and groups, by mmcv's names.
    """
    output.copy_(_deform_conv(input, weight, offset, None, None, _geometry(geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Gradients of `deform_conv_forward` by its input and its offsets."""
    grads = _deform_conv_backward(grad_output, input, weight, offset, None, None, _geometry(geometry))
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])
    # mmcv asks for the weights' gradient next, with the same buffers: computing all of it again would double the cost.
    columns.kdpipe_grad_weight = (grad_output, grads[1])  # type: ignore[attr-defined]


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float,
    **geometry: int,
) -> None:
    """Gradient of `deform_conv_forward` by its weights, times `scale`, added to `grad_weight`."""
    of, grad = columns.__dict__.pop("kdpipe_grad_weight", (None, None))
    if of is not grad_output:
        grad = _deform_conv_backward(grad_output, input, grad_weight, offset, None, None, _geometry(geometry))[1]
    grad_weight.add_(grad.to(grad_weight.dtype), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Modulated deformable convolution (Zhu et al. 2019): as `deform_conv_forward`, each tap times its `mask`."""
    output.copy_(_deform_conv(input, weight, offset, mask, bias if with_bias else None, _modulated_geometry(geometry)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Gradients of `modulated_deform_conv_forward` by all five inputs."""
    conv_bias = bias if with_bias else None
    grads = _deform_conv_backward(grad_output, input, weight, offset, mask, conv_bias, _modulated_geometry(geometry))
    for buffer, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads, strict=False):
        buffer.copy_(grad)
    if with_bias:
        grad_bias.copy_(grads[4])


def _geometry(options: dict[str, int]) -> tuple[int, ...]:
    names = ("dH", "dW", "padH", "padW", "dilationH", "dilationW", "group", "deformable_group")
    return tuple(options[name] for name in names)


def _modulated_geometry(options: dict[str, int]) -> tuple[int, ...]:
    names = ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "group", "deformable_group")
    return tuple(options[name] for name in names)


def _deform_arguments(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[list[Tensor], bool]:
    """torchvision's arguments: a mask and a bias are always given, and the mask may be unused."""
    x = computing(input)
    mask_or_none = x.new_zeros(input.shape[0], 1) if mask is None else mask
    bias_or_zero = x.new_zeros(weight.shape[0]) if bias is None else bias
    return [t.to(x.dtype) for t in (x, weight, offset, mask_or_none, bias_or_zero)], mask is not None


def _deform_conv(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> Tensor:
    tensors, modulated = _deform_arguments(input, weight, offset, mask, bias)
    with no_autocast(input):
        result: Tensor = torch.ops.torchvision.deform_conv2d(*tensors, *geometry, modulated)
    return result


def _deform_conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Gradients by (input, weight, offset, mask, bias)."""
    tensors, modulated = _deform_arguments(input, weight, offset, mask, bias)
    grad = grad_output.to(tensors[0].dtype)
    with no_autocast(input):  # which would round the matrix products inside
        grads: tuple[Tensor, ...] = torch.ops.torchvision._deform_conv2d_backward(grad, *tensors, *geometry, modulated)
    return grads
