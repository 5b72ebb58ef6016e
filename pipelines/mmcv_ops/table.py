"""mmcv's compiled ops by torchvision's ops and plain torch, with the entry points of ``mmcv._ext``.

mmcv 2.1.0 calls these from its own autograd functions: results go in place into the buffers that it hands over, and
the names, order and keywords of the arguments are those of its C++ sources (``mmcv/ops/csrc/pytorch``). The
arithmetic is done in float32 where mmcv passes a half type, so that mixed precision works on every device.

Everything is deterministic on a CPU. On CUDA the backward passes of RoIAlign and of the deformable convolutions add
up in an order that varies, as mmcv's own do; under `torch.use_deterministic_algorithms` RoIAlign takes torchvision's
deterministic implementation, and torch refuses what has none.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.mmcv_ops.deform import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from kdpipe.pipelines.mmcv_ops.focal import sigmoid_focal_loss_backward, sigmoid_focal_loss_forward
from kdpipe.pipelines.mmcv_ops.nms import nms, softnms
from kdpipe.pipelines.mmcv_ops.roi import roi_align_backward, roi_align_forward

__all__ = ["BRIDGED", "unavailable_op"]


def get_compiler_version() -> str:
    """What mmcv reports as its compiler in a description of the environment."""
    return "none (ops by kdpipe)"


def get_compiling_cuda_version() -> str:
    """What mmcv reports as the CUDA version that it was compiled with."""
    return "none (ops by kdpipe)"


def unavailable_op(name: str) -> Callable[..., NoReturn]:
    """Stands in for an op of mmcv that has no counterpart here, so that mmcv.ops can be imported without it.

    Raises:
        AttributeError: where `name` is private: Python asks modules for such names, mmcv does not.
    """
    if name.startswith("_"):
        raise AttributeError(f"module 'mmcv._ext' has no attribute {name!r}")

    def op(*args: object, **kwargs: object) -> NoReturn:
        raise KdpipeError(
            f"mmcv's op '{name}' exists only in compiled form, and this mmcv has no compiled ops. "
            f"kdpipe brings {', '.join(sorted(BRIDGED))}. Use a config without it, or an environment with a "
            "compiled mmcv >= 2.0, < 2.2 (`mim install mmcv==2.1.0`, for the versions of torch that it has wheels for)."
        )

    op.__name__ = name
    return op


BRIDGED: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        roi_align_forward,
        roi_align_backward,
        nms,
        softnms,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        get_compiler_version,
        get_compiling_cuda_version,
    )
}
