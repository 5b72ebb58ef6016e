"""Whether a detector can be built, and learn from a teacher: found by building it, before any data is read."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.engine.hooks import MeanTeacherHook, SetEpochInfoHook, YOLOXModeSwitchHook
from mmdet.registry import HOOKS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from kdpipe.cache.errors import KdpipeError
from kdpipe.distill.students.build import student_of
from kdpipe.distill.students.protocol import Student
from kdpipe.pipelines.detectors.building import building
from kdpipe.pipelines.detectors.config_types import resolve_type, type_name
from kdpipe.pipelines.detectors.configs import apply_options, set_num_classes

__all__ = ["build_detector", "check_hooks", "check_student", "model_options"]

# Hooks of mmdet that change the detector, or what it reads, by its place in the Runner.
_REACHING_IN = (YOLOXModeSwitchHook, SetEpochInfoHook, MeanTeacherHook)


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


def check_student(config: Config, options: Sequence[str], num_classes: int) -> Student:
    """Refuse a student that cannot be built, or of a family that the losses cannot address.

    Args:
        config: mmdet config of the student.
        options: `KEY=VALUE` overrides of it; those of the model are applied.
        num_classes: Of the teacher.

    Returns:
        What the losses see of it.

    Raises:
        KdpipeError: Naming what was found and what was expected.
    """
    return student_of(build_detector(config, options, num_classes))


def check_hooks(config: Config) -> None:
    """Refuse hooks that would not find the detector, which is a part of what a distillation trains.

    Args:
        config: Of the training.

    Raises:
        KdpipeError: Naming them.
    """
    hooks = config.get("custom_hooks") or []
    kinds = {type_name(hook["type"]): resolve_type(hook["type"], HOOKS) for hook in hooks}
    if reaching := [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, _REACHING_IN)]:
        raise KdpipeError(
            f"The config has {', '.join(reaching)} in custom_hooks, which changes the detector where it is trained by "
            "itself; in a distillation it is a part of the model. Take it out of the student's custom_hooks, or train "
            "with --methods none."
        )
