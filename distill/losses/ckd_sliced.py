"""`ckd_loss` in bounded memory: an acceleration, on every device, that holds some rows of the similarities at a time.

With 4,096 boxes and 40,960 keys in the queue, the similarities of a step are 740 MB, and a cross-entropy by autograd
holds them several times.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Similarities held at a time: 64 MiB of float32, whatever the batch and the queue.
_SLICE_ELEMENTS = 2**24


class Rows(Protocol):
    """A Tensor[N, M] bool, or what makes rows of it when they are asked for."""

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def sliced_ckd_loss(student: Tensor, keys: Tensor, exclude: Rows | None, temperature: float) -> tuple[Tensor, Tensor]:
    """The value and the gradients of `ckd_loss` of rows of length 1, never with all N x (N + K) similarities.

    Differentiable once.

    Args:
        student: Tensor[N, d], rows of length 1.
        keys: Tensor[N + K, d], rows of length 1: first those of the same N boxes, then those of others.
        exclude: Tensor[N, N + K] bool, True where key j is not a negative of student i. The positive always counts.
        temperature: gamma > 0.

    Returns:
        The loss, a scalar; and Tensor[N] bool, whether a box's own key is nearer than every negative.
    """
    loss: Tensor
    loss, is_nearest = _InfoNCE.apply(student / temperature, keys, exclude)
    return loss, is_nearest


class _InfoNCE(torch.autograd.Function):
    """Mean over rows of logsumexp(queries @ keys^T) minus the positive, with its gradient made in the same pass."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, exclude: Rows | None) -> tuple[Tensor, Tensor]:
        num_rows = len(queries)
        query_grad, key_grad = torch.zeros_like(queries), torch.zeros_like(keys)
        is_nearest = torch.zeros(num_rows, dtype=torch.bool, device=queries.device)
        loss = queries.new_zeros(())
        step = max(_SLICE_ELEMENTS // max(len(keys), 1), 1)
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            similarity = queries[rows] @ keys.T  # [n, N + K]; row i has its positive in column start + i
            positive = similarity.diagonal(start).clone()
            if exclude is not None:
                similarity.masked_fill_(exclude[rows], -torch.inf)
                similarity.diagonal(start).copy_(positive)
            is_nearest[rows] = (similarity >= positive[:, None]).sum(dim=1) == 1
            peak = similarity.amax(dim=1, keepdim=True)
            total = similarity.sub_(peak).exp_().sum(dim=1, keepdim=True)
            loss += ((total.log() + peak).squeeze(1) - positive).sum()
            slope = similarity.div_(total)  # softmax, then minus 1 at the positive: d loss / d similarity
            slope.diagonal(start).sub_(1.0)
            query_grad[rows] = slope @ keys
            if ctx.needs_input_grad[1]:
                key_grad += slope.T @ queries[rows]
        count = max(num_rows, 1)
        ctx.save_for_backward(query_grad / count, key_grad / count)
        ctx.mark_non_differentiable(is_nearest)
        return loss / count, is_nearest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        query_grad, key_grad = ctx.saved_tensors
        return grad * query_grad, grad * key_grad, None
