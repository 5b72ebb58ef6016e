"""Rows of tensors by what they belong to, with as little waiting for a GPU as that takes.

How many rows there are, only the device knows: whoever asks, waits until it has computed everything before.
"""

import torch
from torch import Tensor


def on_cpu(tensor: Tensor) -> bool:
    """Whether its values are at hand, so that looking at them costs nothing; and implementations for CPUs serve."""
    return tensor.device.type == "cpu"


def rows_of_each(numbers: Tensor, count: int) -> list[Tensor]:
    """Which rows belong to each of 0 to `count` - 1. Waits for the device once.

    Args:
        numbers: Tensor[N] int64 in [0, count), what each row belongs to.
        count: of what rows belong to.

    Returns:
        `count` Tensor[n] int64, ascending row numbers.
    """
    each = torch.arange(count, device=numbers.device)[:, None]
    sizes = (numbers == each).sum(dim=1).tolist()
    return list(numbers.argsort(stable=True).split(sizes))


def in_order(parts: list[Tensor], rows: list[Tensor]) -> Tensor:
    """What was computed of the rows of each, Tensor[n, ...], as Tensor[N, ...] in the order of the rows."""
    return torch.cat(parts)[torch.cat(rows).argsort()]


def row_numbers(rows: Tensor | slice) -> Tensor | slice:
    """A mask as row numbers, Tensor[n] int64, so that a GPU is waited for once and not at each use; others as given."""
    return rows.nonzero().squeeze(1) if isinstance(rows, Tensor) and rows.dtype == torch.bool else rows
