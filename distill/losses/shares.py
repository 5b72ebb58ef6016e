"""How much each loss has to say at the pyramid: the figures by which weights of losses are chosen."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdpipe.distill.losses.numeric import no_autocast

SHARE_INTERVAL = 50  # steps from one look to the next
_SCALE = 1024.0  # of gradients, which float16 would round to zero
_LOSS = re.compile("loss_|_?loss")  # mmengine adds up whatever has this in its name


def gradient_shares(losses: Mapping[str, Any], pyramid: Sequence[Tensor]) -> dict[str, Tensor]:
    """The norm of each loss's gradient with respect to the pyramid, as a share of the sum of these norms.

    Costs a backward pass per loss, down to the pyramid only. Gradients of parameters are not touched.

    Args:
        losses: Name -> scalar, or list of scalars, part of the graph; names without `loss` in them are no losses.
        pyramid: Levels that the losses were computed from.

    Returns:
        `share_NAME` without `loss` -> scalar in [0, 1]; nothing where the pyramid learns nothing.
    """
    levels = [level for level in pyramid if level.requires_grad]
    norms: dict[str, Tensor] = {}
    for name, value in losses.items():
        total = torch.stack(list(value)).sum() if isinstance(value, list | tuple) else value
        if "loss" in name and levels and total.requires_grad:
            with no_autocast(total):  # a backward pass takes its types from the forward pass
                gradients = torch.autograd.grad(total.float() * _SCALE, levels, retain_graph=True, allow_unused=True)
            squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
            norms[name] = torch.stack(squares).sum().sqrt() if squares else total.detach().new_zeros(())
    if not norms:
        return {}
    whole = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {f"share_{_LOSS.sub('', name)}": norm / whole for name, norm in norms.items()}
