"""mmcv's sigmoid focal loss, by plain torch."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kdpipe.pipelines.mmcv_ops.precision import computing

__all__ = ["sigmoid_focal_loss_backward", "sigmoid_focal_loss_forward"]


def _one_hot(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(is this the row's class [N, K], weight of the row's class [N, 1]); rows of no class, the background, weigh 1."""
    classes = torch.arange(input.shape[1], device=target.device)
    hot = target[:, None] == classes
    if not weight.numel():
        return hot, input.new_ones(1)
    return hot, torch.where(hot, weight.to(input.dtype), 0).sum(1, keepdim=True) + ~hot.any(1, keepdim=True)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, *, gamma: float, alpha: float
) -> None:
    """Focal loss (Lin et al. 2017, eq. 5) of logits [N, K] and labels [N]; a label outside [0, K) is background.

    Written with log-sigmoid, so that it is exact where mmcv's own runs into its floor of 1e-38 (logits above 17 in
    float32).

    Args:
        input: [N, K] logits.
        target: [N] labels.
        weight: [K] of the classes, or empty.
        output: [N, K], is written.
        gamma: Exponent of the focus.
        alpha: Weight of positives; that of negatives is 1 - alpha.
    """
    x = computing(input)
    hot, weights = _one_hot(x, target, weight)
    positive = -alpha * torch.sigmoid(-x) ** gamma * F.logsigmoid(x)
    negative = -(1 - alpha) * torch.sigmoid(x) ** gamma * F.logsigmoid(-x)
    output.copy_(torch.where(hot, positive, negative) * weights)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, *, gamma: float, alpha: float
) -> None:
    """Derivative of each element of `sigmoid_focal_loss_forward` by its logit.

    Args:
        input: [N, K] logits.
        target: [N] labels.
        weight: [K] of the classes, or empty.
        grad_input: [N, K], is written.
        gamma: As forward.
        alpha: As forward.
    """
    x = computing(input)
    hot, weights = _one_hot(x, target, weight)
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    positive = -alpha * q**gamma * (q - gamma * p * F.logsigmoid(x))
    negative = (1 - alpha) * p**gamma * (p - gamma * q * F.logsigmoid(-x))
    grad_input.copy_(torch.where(hot, positive, negative) * weights)
