"""Parameters of a detector, and the arithmetic of one image."""

import math
from dataclasses import dataclass

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch.utils.flop_counter import FlopCounterMode

from kdpipe.pipelines.detectors.building import building

__all__ = ["Complexity", "complexity"]

_DIVISOR = 32  # of the sides of a padded image


@dataclass(frozen=True)
class Complexity:
    """What a detector costs.

    Attributes:
        parameters: Number of its parameters.
        gflops: 1e9 multiply-adds of one image, as mmdet counts them (a multiplication and its addition are one).
        size: (w, h) of that image.
    """

    parameters: int
    gflops: float
    size: tuple[int, int]


def complexity(config: Config, scale: tuple[int, int]) -> Complexity:
    """Parameters and GFLOPs of a detector, untrained, by torch's counter: convolutions and matrix products.

    Args:
        config: mmdet config; weights that it would load are not.
        scale: `(w, h)` of the image.

    Raises:
        KdpipeError: It cannot be built.
    """
    register_all_modules(init_default_scope=True)
    width, height = (math.ceil(side / _DIVISOR) * _DIVISOR for side in scale)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        with building("The student"):
            model = MODELS.build(config.model).eval()
        image = torch.randn(1, 3, height, width)
        size = (height, width)
        shapes = {"img_shape": size, "ori_shape": size, "pad_shape": size, "batch_input_shape": size}
        sample = DetDataSample(metainfo={**shapes, "scale_factor": (1.0, 1.0)})
        with FlopCounterMode(display=False) as counter:
            model(image, [sample], mode="tensor")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Complexity(parameters, counter.get_total_flops() / 2e9, (width, height))  # the counter has two for one
