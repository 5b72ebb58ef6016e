"""mmdet pipelines: their scale, and the transform that puts cached targets beside an image."""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mmdet.datasets.transforms import FixScaleResize, FixShapeResize, PackDetInputs, Resize
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import get_box_tensor

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.read.reader import open_cache
from kdpipe.distill.methods import expand_methods, looks_at_rois, map_levels, needed_fields
from kdpipe.distill.rois.sampling import RoiSampling
from kdpipe.distill.teacher.any_box import TeacherView, read_teacher_view
from kdpipe.distill.teacher.cached_boxes import read_roi_targets
from kdpipe.distill.teacher.targets import MISSING_VIEWS, ROI_SOURCES, RoiTargets
from kdpipe.pipelines.data.images import ImageError
from kdpipe.pipelines.detectors.mmdet2 import dictionaries
from kdpipe.pipelines.training.transform_types import RESIZES, moving_transforms, step_name, transform_class

__all__ = [
    "AddTeacherTargets",
    "record_places",
    "resizes_to_one_size",
    "resizing_steps",
    "set_scale",
    "with_teacher_targets",
]

# What a resizing step says beside its size; kept where another size is set.
_RESIZE_OPTIONS = ("interpolation", "backend", "clip_object_border")
_NEEDED = ("homography_matrix", "img_id", "img_path", "img_shape", "ori_shape")
_PACKED = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")


def set_scale(
    pipeline: Sequence[Any], scale: tuple[int, int], ratio_range: tuple[float, float] | None = None
) -> list[Any]:
    """The same pipeline with its resizing replaced by `Resize(scale, keep_ratio=True)`, or `RandomResize`.

    Args:
        pipeline: Transforms of an mmdet data set.
        scale: `(w, h)`: the longest edge of the result fits the larger, the shortest the smaller number.
        ratio_range: Multiply the scale by a random factor of this range, per image.

    Raises:
        KdpipeError: The pipeline has not exactly one resizing transform.
    """
    positions = [i for i, step in enumerate(pipeline) if transform_class(step) in RESIZES]
    if len(positions) != 1:
        raise KdpipeError(
            f"A scale was given, but the pipeline of the config has {len(positions)} resizing transforms "
            f"({', '.join(map(step_name, pipeline))}). Expected exactly one; set it in the config itself."
        )
    result = copy.deepcopy(list(pipeline))
    options = {name: value for name, value in result[positions[0]].items() if name in _RESIZE_OPTIONS}
    resize: dict[str, Any] = {"type": "Resize", "scale": tuple(scale), "keep_ratio": True, **options}
    if ratio_range is not None:
        resize = {**resize, "type": "RandomResize", "ratio_range": ratio_range}
    result[positions[0]] = resize
    return result


def resizing_steps(pipelines: Any) -> list[Mapping[str, Any]]:
    """The steps that resize images, wherever in a data set of a config, or in a pipeline, they are.

    Args:
        pipelines: A data set, a pipeline, or several.
    """
    return [step for step in dictionaries(pipelines) if transform_class(step) in (*RESIZES, FixShapeResize)]


def resizes_to_one_size(config: Mapping[str, Any]) -> bool:
    """Whether all pipelines of a config resize images once, to one size with the ratio kept: a scale can replace that.

    Args:
        config: Of a detector.
    """
    loaders = [config.get(f"{name}_dataloader") for name in ("train", "val", "test")]
    pipelines = [part["pipeline"] for loader in loaders for part in dictionaries(loader) if part.get("pipeline")]
    steps = [resizing_steps(pipeline) for pipeline in pipelines]
    return all(
        len(found) == 1 and found[0] in pipeline and _has_one_size(found[0])
        for found, pipeline in zip(steps, pipelines, strict=True)
    )


def _has_one_size(step: Mapping[str, Any]) -> bool:
    kind = transform_class(step)
    return kind in (Resize, FixScaleResize) and bool(step.get("keep_ratio")) and "scale" in step


@TRANSFORMS.register_module()
class AddTeacherTargets:
    """Puts the teacher's cached targets of an image beside the packed sample. The last transform of a pipeline.

    Runs in loader workers. With the teacher's RoIs, cached boxes are sampled there, so that only what the losses need
    is read and moved; with the student's, the pyramid is read.

    Args:
        cache: Path of the cache.
        methods: Those of the `DistilledDetector`, or its losses: they say what is read.
        roi_source: `teacher` or `student`: who chooses the RoIs.
        roi_sampling: Options of `RoiSampling`, for RoIs of the teacher.
        missing_view: `mirror` or `skip`, for flipped images whose flipped view is not cached.
        student_strides: Of the student's pyramid: for losses that compare whole feature maps, only levels of these are
            read. None reads all that the losses can compare.
        allow_partial: Also read a cache some of whose parts are still missing.
    """

    def __init__(
        self,
        cache: str,
        methods: Sequence[str],
        roi_source: str = "teacher",
        roi_sampling: Mapping[str, Any] | None = None,
        missing_view: str = "mirror",
        student_strides: Sequence[int] | None = None,
        allow_partial: bool = False,
    ) -> None:
        if missing_view not in MISSING_VIEWS:
            raise KdpipeError(f"missing_view is {missing_view!r}; expected one of {', '.join(MISSING_VIEWS)}.")
        self.cache = open_cache(cache, allow_partial=allow_partial)
        if roi_source not in ROI_SOURCES:
            raise KdpipeError(f"roi_source is {roi_source!r}; expected one of {', '.join(ROI_SOURCES)}.")
        losses = expand_methods(methods)
        self.needs, self.at_rois, self.roi_source = needed_fields(losses), looks_at_rois(losses), roi_source
        self.map_levels = map_levels(losses, self.cache.spec, student_strides)
        self.roi_sampling, self.missing_view = RoiSampling(**(roi_sampling or {})), missing_view

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        sample = results["data_samples"]
        if missing := [key for key in _NEEDED if key not in sample]:
            raise KdpipeError(
                f"The sample lacks {', '.join(missing)}, by which cached targets are found and placed. Name "
                f"{', '.join(_NEEDED)} in meta_keys of the pipeline's PackDetInputs."
            )
        cached_size = self.cache.index(sample.img_id, self.cache.spec.views[0]).original_size
        if tuple(sample.ori_shape) != cached_size:
            raise ImageError(
                f"image {sample.img_path} is {sample.ori_shape[1]} x {sample.ori_shape[0]} pixels, and was "
                f"{cached_size[1]} x {cached_size[0]} when the teacher saw it. Put the image in place that was cached."
            )
        matrix = np.asarray(sample.homography_matrix, dtype=np.float64)
        read = self._read_view if self.roi_source == "student" else self._read_rois
        results["targets"] = read(sample, matrix)
        return results

    def _read_view(self, sample: Any, matrix: npt.NDArray[np.float64]) -> TeacherView:
        levels = {*(range(self.cache.spec.head_levels) if self.at_rois else ()), *self.map_levels}
        return read_teacher_view(self.cache, sample.img_id, matrix, missing_view=self.missing_view, levels=levels)

    def _read_rois(self, sample: Any, matrix: npt.NDArray[np.float64]) -> RoiTargets:
        truth = sample.gt_instances
        return read_roi_targets(
            self.cache,
            sample.img_id,
            matrix,
            sample.img_shape,
            get_box_tensor(truth.bboxes),
            truth.labels,
            needs=self.needs,
            sampling=self.roi_sampling if self.at_rois else None,
            missing_view=self.missing_view,
            generator=torch.default_generator,
            map_levels=self.map_levels,
        )


def with_teacher_targets(
    pipeline: Sequence[Any], transform: dict[str, Any], let_through: Collection[str] = ()
) -> list[Any]:
    """A training pipeline whose samples carry the teacher's targets.

    Args:
        pipeline: Ends with mmdet's `PackDetInputs`.
        transform: Config of `AddTeacherTargets`.
        let_through: Names of transforms that the user answers for: they move no pixel, or record where to.

    Raises:
        KdpipeError: The pipeline ends otherwise, mixes several images into one, or may move pixels without a record.
    """
    if moving := moving_transforms(pipeline, let_through):
        raise KdpipeError(
            f"The student's training pipeline uses {', '.join(moving)}. Cached targets belong to one image, and find "
            "its pixels by the homography_matrix that transforms record: only those are allowed of which it is known "
            "that they move no pixel, or record a scale, crop or horizontal flip there. Remove it from the student's "
            "config. For a transform of which this holds nevertheless, such as one of your own, say so: "
            "-o distill.transforms=[MyJitter]."
        )
    if not pipeline or transform_class(pipeline[-1]) is not PackDetInputs:
        last = step_name(pipeline[-1]) if pipeline else "nothing"
        raise KdpipeError(f"The training pipeline ends with {last}; expected PackDetInputs.")
    result = copy.deepcopy(list(pipeline))
    record_places(result)
    return [*result, transform]


def record_places(pipeline: Sequence[Any]) -> None:
    """Let the packing step that ends a pipeline, if it does, hand on which image it is and where its pixels came from.

    Args:
        pipeline: Its last step is changed.
    """
    if pipeline and transform_class(pipeline[-1]) is PackDetInputs:
        keys = tuple(pipeline[-1].get("meta_keys", _PACKED))
        pipeline[-1]["meta_keys"] = tuple(dict.fromkeys([*keys, *_NEEDED]))
