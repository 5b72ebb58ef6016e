"""Whether a student can learn from a teacher: found by building it, before any data is read."""

from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from kdpipe.distill.dense import DenseStudent
from kdpipe.distill.two_stage import TwoStageStudent
from kdpipe.pipelines.building import building
from kdpipe.pipelines.configs import apply_options, set_num_classes

__all__ = ["check_student", "model_options"]


def model_options(options: Sequence[str]) -> list[str]:
    """Those of `KEY=VALUE` overrides that are for the detector."""
    return [option for option in options if option.startswith("model.")]


def check_student(config: Config, options: Sequence[str], num_classes: int) -> None:
    """Refuse a student that cannot be built, or of a family that the losses cannot address.

    Args:
        config: mmdet config of the student.
        options: `KEY=VALUE` overrides of it; those of the model are applied.
        num_classes: Of the teacher.

    Raises:
        KdpipeError: Naming what was found and what was expected.
    """
    register_all_modules(init_default_scope=True)
    model = config.copy().model
    set_num_classes(model, num_classes)
    model = apply_options(Config({"model": model}), model_options(options)).model
    with building("The training"), torch.random.fork_rng(devices=()):
        detector = MODELS.build(model)
    if hasattr(detector, "roi_head"):
        TwoStageStudent(detector)
    else:
        DenseStudent(detector)
