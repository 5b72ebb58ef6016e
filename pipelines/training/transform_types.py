"""Which transforms of a training pipeline cached targets can follow: classes whose record of moved pixels is right."""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import mmcv.transforms as mmcv_transforms
import mmdet.datasets.transforms as mmdet_transforms
from mmdet.datasets.transforms.transforms import Corrupt
from mmdet.registry import TRANSFORMS

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.detectors.config_types import resolve_type, type_name

__all__ = [
    "LISTED",
    "RESIZES",
    "WRAPPERS",
    "check_named",
    "check_names",
    "moving_transforms",
    "quote_names",
    "step_name",
    "transform_class",
    "transforms_in",
]

RESIZES = (
    mmdet_transforms.Resize,
    mmdet_transforms.FixScaleResize,
    mmdet_transforms.ResizeShortestEdge,
    mmcv_transforms.RandomResize,
    mmcv_transforms.RandomChoiceResize,
)
_NAME = re.compile(r"""(["']?)([A-Za-z_][\w.]*)\1""")
# Classes themselves, never their subclasses: what a subclass does to pixels is not known.
LISTED = (
    # move pixels, and record where to in homography_matrix
    *RESIZES,
    mmdet_transforms.FixShapeResize,
    mmdet_transforms.RandomFlip,
    mmdet_transforms.RandomCrop,
    mmdet_transforms.TranslateX,
    mmdet_transforms.TranslateY,
    # add pixels on the right and below
    mmdet_transforms.Pad,
    mmcv_transforms.Pad,
    # erase pixels
    mmdet_transforms.CutOut,
    mmdet_transforms.RandomErasing,
    # change colours
    mmdet_transforms.PhotoMetricDistortion,
    mmdet_transforms.YOLOXHSVRandomAug,
    mmdet_transforms.ColorTransform,
    mmdet_transforms.AutoContrast,
    mmdet_transforms.Brightness,
    mmdet_transforms.Color,
    mmdet_transforms.Contrast,
    mmdet_transforms.Equalize,
    mmdet_transforms.Invert,
    mmdet_transforms.Posterize,
    mmdet_transforms.Sharpness,
    mmdet_transforms.Solarize,
    mmdet_transforms.SolarizeAdd,
    Corrupt,
    mmcv_transforms.RandomGrayscale,
    mmcv_transforms.Normalize,
    # read, choose and pack
    mmcv_transforms.LoadImageFromFile,
    mmdet_transforms.LoadAnnotations,
    mmdet_transforms.FilterAnnotations,
    mmdet_transforms.SegRescale,
    mmdet_transforms.PackDetInputs,
)
# Apply other transforms: class -> the argument that holds them.
WRAPPERS = {
    mmcv_transforms.Compose: "transforms",
    mmcv_transforms.RandomApply: "transforms",
    mmcv_transforms.RandomChoice: "transforms",
    mmdet_transforms.RandomOrder: "transforms",
    mmdet_transforms.AutoAugment: "policies",
    mmdet_transforms.RandAugment: "aug_space",
}


def transform_class(step: Any) -> Any:
    """The class of a step of a pipeline; None where it is no config, or of a `type` that the registry does not know."""
    if not isinstance(step, Mapping):
        return None
    kind, scope = step.get("type"), step.get("_scope_")
    return resolve_type(f"{scope}.{kind}" if scope and isinstance(kind, str) else kind, TRANSFORMS)


def quote_names(options: Sequence[str]) -> list[str]:
    """Options of the command line, the names in `distill.transforms=[MyJitter]` quoted."""
    result = []
    for option in options:
        key, equals, text = option.partition("=")
        if key.strip() == "distill.transforms":
            text = _NAME.sub(r"'\2'", text)
        result.append(key + equals + text)
    return result


def check_names(names: Any) -> None:
    """Make sure that the value of `distill.transforms` is a list of names.

    Raises:
        KdpipeError: It is none.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise KdpipeError(f"distill.transforms is {names!r}, expected a list of names, such as [MyJitter].")


def check_named(names: Sequence[str], pipelines: Any) -> None:
    """Make sure that each of some names is that of a transform in a pipeline.

    Raises:
        KdpipeError: There is none.
    """
    steps = list(transforms_in(pipelines))
    if unknown := [name for name in names if not any(name in _names_of(step) for step in steps)]:
        raise KdpipeError(
            f"distill.transforms names {', '.join(unknown)}, which the student's training pipeline does not have. "
            f"There are: {', '.join(dict.fromkeys(map(step_name, steps)))}."
        )


def step_name(step: Any) -> str:
    """As messages call a step: the text of its `type`, or the name of what it is made of."""
    if isinstance(step, Mapping):
        return type_name(step.get("type"))
    return type_name(step if hasattr(step, "__name__") else type(step))


def transforms_in(pipeline: Any) -> Iterator[Any]:
    """Every step of a pipeline, also those inside of other steps, from the outside in.

    Args:
        pipeline: Steps, or one: configs, or what is no config (an object, a function), nested in lists or not.
    """
    for step in [pipeline] if isinstance(pipeline, Mapping) else pipeline:
        if isinstance(step, list | tuple):
            yield from transforms_in(step)
            continue
        yield step
        if not isinstance(step, Mapping):
            continue
        if transform_class(step) is mmdet_transforms.Albu:  # what it holds are names of another library
            continue
        if "resize_type" in step:
            yield {"type": step["resize_type"]}
        wrapped = WRAPPERS.get(transform_class(step))
        if wrapped is not None:
            yield from transforms_in(step[wrapped] if wrapped in step else _default(step, wrapped))
        else:
            yield from (part for value in step.values() for part in _configs_in(value))


def moving_transforms(pipeline: Any, let_through: Collection[str] = ()) -> list[str]:
    """Names of the steps of a pipeline that may move pixels without a record that cached targets can follow.

    Args:
        pipeline: Transforms of an mmdet data set.
        let_through: Names of transforms that the user answers for.
    """
    moving = []
    for step in transforms_in(pipeline):
        kind, name = transform_class(step), step_name(step)
        if _names_of(step) & set(let_through):
            continue
        if kind not in LISTED and kind not in WRAPPERS:
            moving.append(name)
        elif kind in _WRONG_WITH and (option := _WRONG_WITH[kind](step)):
            moving.append(f"{name} with {option}")
    return list(dict.fromkeys(moving))


def _names_of(step: Any) -> set[str]:
    """What a step may be called: as it is written, without a scope or module, and by the name of its class."""
    name = step_name(step)
    return {name, name.rpartition(".")[2], type_name(transform_class(step))}


def _default(step: Any, argument: str) -> Any:
    """The transforms that a wrapper applies where its config names none."""
    default = inspect.signature(transform_class(step)).parameters[argument].default
    return () if default is inspect.Parameter.empty else default


def _configs_in(value: Any) -> Iterator[Any]:
    """Configs of transforms anywhere in an argument of another transform."""
    if isinstance(value, Mapping) and "type" in value:
        yield from transforms_in(value)
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _configs_in(inner)


def _flip(step: Mapping[str, Any]) -> str:
    direction = step.get("direction", "horizontal")
    upright = {direction} if isinstance(direction, str) else set(direction)
    return "" if upright == {"horizontal"} else f"direction={direction!r}"


def _corrupt(step: Mapping[str, Any]) -> str:
    return "corruption='elastic_transform'" if step.get("corruption") == "elastic_transform" else ""


# What a listed class must not be asked to do.
_WRONG_WITH: dict[Any, Callable[[Mapping[str, Any]], str]] = {mmdet_transforms.RandomFlip: _flip, Corrupt: _corrupt}
