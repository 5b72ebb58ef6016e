"""What every loss needs: full precision, a mean that keeps the graph, and one error for inputs that do not fit."""

import torch
from torch import Tensor

from kdpipe.cache.errors import KdpipeError

_SHORTEST = 1e-4  # length of a row that still has a direction
_LEAST_VARIANCE = 1e-6  # beside which that of a channel without information vanishes


class LossInputError(KdpipeError):
    """The tensors given to a loss do not fit together."""


def full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that losses are computed in: float64 if any of them is, otherwise float32."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(dtype) for tensor in tensors)


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which the operations on `tensor`'s device keep the types of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def unit_rows(vectors: Tensor) -> Tensor:
    """Rows of length 1, Tensor[N, d], whose products are cosines.

    Rows that are shorter than 1e-4 are divided by that instead: the gradient of a cosine grows with the inverse of the
    length, and would be 1e30 at a row of 1e-30. Rows of zeros stay zero; huge ones do not overflow.
    """
    scale = vectors.detach().abs().amax(dim=1, keepdim=True).clamp(min=_SHORTEST)
    scaled = vectors / scale  # as long as from 1 to sqrt(d), unless it is a short one
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(length < 1, 1.0, length)  # not `clamp`, whose gradient at exactly 1 is 0


def standardize(values: Tensor, channel: int, mask: Tensor | None = None) -> Tensor:
    """Zero mean and unit variance of each channel, over all other dimensions.

    (x - mean) / sqrt(variance + 1e-6), so that a channel that is the same everywhere becomes 0.

    Args:
        values: Tensor[..., C, ...].
        channel: Which dimension is that of the channels.
        mask: 0 or 1, of a shape that `values` has where the channels have 1; all by default.

    Returns:
        Of the shape of `values`; 0 where the mask is.
    """
    others = [dim for dim in range(values.dim()) if dim != channel % values.dim()]
    if mask is None:
        mask = values.new_ones([size if dim in others else 1 for dim, size in enumerate(values.shape)])
    count = mask.sum().clamp(min=1)
    mean = (values * mask).sum(others, keepdim=True) / count
    centred = (values - mean) * mask
    variance = centred.square().sum(others, keepdim=True) / count
    return centred * (variance + _LEAST_VARIANCE).rsqrt()


def mean_or_zero(values: Tensor) -> Tensor:
    """Mean of Tensor[N]; for N = 0 a zero that is still part of the graph, so that every parameter gets a gradient."""
    return values.sum() / max(values.numel(), 1)


def check_shape(what: str, found: Tensor, expected: tuple[int, ...], of: str) -> None:
    """Raise unless a tensor has the shape that another one implies.

    Args:
        what: Name of the tensor.
        found: The tensor.
        expected: Its shape.
        of: What this follows from.

    Raises:
        LossInputError: naming `what`, both shapes and `of`, where the expected shape comes from.
    """
    if tuple(found.shape) != expected:
        raise LossInputError(f"{what} has shape {list(found.shape)}; expected {list(expected)} to fit {of}.")


def check_dims(what: str, found: Tensor, layout: str) -> None:
    """Raise unless a tensor has as many dimensions as it should.

    Args:
        what: Name of the tensor.
        found: The tensor.
        layout: Of its dimensions, such as "[R, L, C, H, W]".

    Raises:
        LossInputError: naming `what`, the shape and the layout.
    """
    if found.dim() != layout.count(",") + 1:
        raise LossInputError(f"{what} has shape {list(found.shape)}; expected {layout}.")


def check_level(student: Tensor, teacher: Tensor, mask: Tensor) -> None:
    """Raise unless feature maps of a level, and the mask that they are compared under, fit together.

    Args:
        student: Should be Tensor[B, C, h, w].
        teacher: The same.
        mask: Should be Tensor[B, h, w].

    Raises:
        LossInputError: naming what does not fit.
    """
    check_dims("a level of the student", student, "[B, C, h, w]")
    fit = f"the student's level {list(student.shape)}"
    check_shape("a level of the teacher", teacher, tuple(student.shape), fit)
    check_shape("a mask", mask, (student.shape[0], *student.shape[2:]), fit)
