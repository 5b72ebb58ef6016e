"""Whether a detector can be built, and learn from a teacher: found by building it, before any data is read."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from kdpipe.distill.dense import DenseStudent
from kdpipe.distill.two_stage import TwoStageStudent
from kdpipe.pipelines.building import building
from kdpipe.pipelines.configs import apply_options, set_num_classes

__all__ = ["build_detector", "check_student", "model_options"]


def model_options(options: Sequence[str]) -> list[str]:
    """Those of `KEY=VALUE` overrides that are for the detector."""
    return [option for option in options if option.startswith("model.")]


def build_detector(config: Config, options: Sequence[str], num_classes: int | None = None) -> Any:
    """A detector with random weights, built to find what is wrong with its config; it takes no random numbers.

    Args:
        config: mmdet config.
        options: `KEY=VALUE` overrides of it; those of the model are applied.
        num_classes: In place of the config's.

    Raises:
        KdpipeError: It cannot be built.
    """
    register_all_modules(init_default_scope=True)
    model = copy.deepcopy(config.model)
    if num_classes is not None:
        set_num_classes(model, num_classes)
    model = apply_options(Config({"model": model}), model_options(options)).model
    with building("The training"), torch.random.fork_rng(devices=()):
        return MODELS.build(model)


def check_student(config: Config, options: Sequence[str], num_classes: int) -> None:
    """Refuse a student that cannot be built, or of a family that the losses cannot address.

    Args:
        config: mmdet config of the student.
        options: `KEY=VALUE` overrides of it; those of the model are applied.
        num_classes: Of the teacher.

    Raises:
        KdpipeError: Naming what was found and what was expected.
    """
    detector = build_detector(config, options, num_classes)
    if hasattr(detector, "roi_head"):
        TwoStageStudent(detector)
    else:
        DenseStudent(detector)
