"""How the pipelines of configs read pictures, and whether a student sees them as its teacher did."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import mmcv.transforms as mmcv_transforms
import mmdet.datasets.transforms as mmdet_transforms

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.decoding import Decoding
from kdpipe.pipelines.training.transform_types import RESIZES, step_name, transform_class, transforms_in

__all__ = ["RESIZE_DEFAULTS", "check_read_alike", "check_seen_alike", "decoding_of", "pipeline_decoding"]

_COLOR_TYPES = ("color", "color_ignore_orientation")
RESIZE_DEFAULTS = {"interpolation": "bilinear", "backend": "cv2"}  # of mmdet's resizing transforms
_BACKENDS = ("cv2", "pillow")
_OTHER_READERS = (
    mmdet_transforms.LoadImageFromNDArray,
    mmdet_transforms.LoadMultiChannelImageFromFiles,
    mmdet_transforms.InferencerLoader,
)


def decoding_of(step: Any, whose: str) -> Decoding:
    """How a step of a pipeline decodes picture files.

    Args:
        step: Its config.
        whose: Names the pipeline in the error.

    Raises:
        KdpipeError: It is not LoadImageFromFile, reads from elsewhere than files, or gives other than three channels.
    """
    if transform_class(step) is not mmcv_transforms.LoadImageFromFile:
        raise KdpipeError(f"{whose} reads images with {step_name(step)}; expected LoadImageFromFile.")
    decoding = Decoding(**{option.name: str(step.get(option.name) or option.default) for option in fields(Decoding)})
    if decoding.color_type not in _COLOR_TYPES or decoding.imdecode_backend not in _BACKENDS:
        raise KdpipeError(
            f"{whose} reads images with LoadImageFromFile({decoding}); expected as color_type "
            f"{' or '.join(_COLOR_TYPES)}, and as imdecode_backend {' or '.join(_BACKENDS)}. Change it in the config."
        )
    for name in ("backend_args", "file_client_args"):
        options = step.get(name) or {}
        if not isinstance(options, Mapping) or options.get("backend", "local") not in ("local", "disk"):
            raise KdpipeError(
                f"{whose} reads images with {name}={options}; expected files of a folder. Take it out of the config."
            )
    return decoding


def pipeline_decoding(pipeline: Sequence[Any]) -> Decoding:
    """How a pipeline decodes picture files; as mmdet does by default where it does not say, or reads otherwise."""
    for step in transforms_in(pipeline):
        if transform_class(step) is mmcv_transforms.LoadImageFromFile:
            backend = step.get("imdecode_backend")
            return Decoding(step.get("color_type", "color"), backend if backend in _BACKENDS else "cv2")
    return Decoding()


def check_read_alike(pipeline: Sequence[Any], teacher: Mapping[str, Any]) -> None:
    """Refuse a student's training pipeline that decodes picture files otherwise than the teacher's.

    Args:
        pipeline: The student's.
        teacher: `pixels` of the teacher's identity, as `PixelPipeline.identity` gives it.

    Raises:
        KdpipeError: Naming both ways.
    """
    teacher_decoding = Decoding(**teacher.get("decoding", {}))
    for step in transforms_in(pipeline):
        if transform_class(step) in (mmcv_transforms.LoadImageFromFile, *_OTHER_READERS):
            decoding = decoding_of(step, "The student's training pipeline")
            if decoding != teacher_decoding:
                raise KdpipeError(
                    f"The student's training pipeline reads images with LoadImageFromFile({decoding}), and the teacher "
                    f"with LoadImageFromFile({teacher_decoding}): they would not see the same pixels. Change it in "
                    "the student's config, or in the teacher's."
                )


def check_seen_alike(pipeline: Sequence[Any], teacher: Mapping[str, Any]) -> None:
    """Refuse a student's training pipeline whose images a live teacher cannot be shown.

    Args:
        pipeline: The student's.
        teacher: As `check_read_alike` takes it.

    Raises:
        KdpipeError: It normalises images, or resizes them otherwise than the teacher's; the step is named.
    """
    check_read_alike(pipeline, teacher)
    teacher_resize = RESIZE_DEFAULTS | teacher.get("resize", {})
    for step in transforms_in(pipeline):
        kind = transform_class(step)
        if kind is mmcv_transforms.Normalize:
            raise KdpipeError(
                "The student's training pipeline has Normalize, and a teacher that runs beside it takes images of 0 to "
                "255. Set mean and std in the student's model.data_preprocessor."
            )
        resize = {name: step.get(name, default) for name, default in RESIZE_DEFAULTS.items()}
        if kind in (*RESIZES, mmdet_transforms.FixShapeResize) and resize != teacher_resize:
            raise KdpipeError(
                f"The student's training pipeline resizes images with {step_name(step)} ({resize}), and the teacher's "
                f"test pipeline with {teacher_resize}: it would see other pixels than it was trained on. Change "
                "it in the student's config, or in the teacher's."
            )
