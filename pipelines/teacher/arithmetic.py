"""How a GPU computes what a teacher says: float32 in full, and the same bits each time."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch

__all__ = ["full_precision", "in_full_precision"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TensorFloat-32 in convolutions and products, and only algorithms of cuDNN that give equal bits.

    By itself, torch lets cuDNN round the inputs of float32 convolutions to TensorFloat-32, with 10 bits of mantissa. On
    a CPU nothing is changed.

    Args:
        device: Where the teacher runs.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
            _set(stack, cudnn, "benchmark", False)
            _set(stack, cudnn, "deterministic", True)
            if hasattr(cudnn, "conv"):  # from torch 2.9 on, which warns of the other switches
                _set(stack, cudnn.conv, "fp32_precision", "ieee")
                _set(stack, matmul, "fp32_precision", "ieee")
            else:
                _set(stack, cudnn, "allow_tf32", False)
                _set(stack, matmul, "allow_tf32", False)
        yield


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack is closed."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def in_full_precision(method: _Method) -> _Method:
    """A method of what has a `device`, which runs within `full_precision` there."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        with full_precision(self.device):
            return method(self, *args, **options)

    return cast("_Method", run)
