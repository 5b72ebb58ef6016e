"""Online distillation: a teacher that looks at every batch while a student trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor

from kdpipe.cache.errors import present
from kdpipe.cache.identity import digest_tensors
from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.methods import expand_methods, looks_at_rois, needed_fields
from kdpipe.distill.outputs import BatchRois
from kdpipe.distill.rois.sampling import RoiSampling, sample_rois
from kdpipe.distill.teacher.any_box import TeacherView, apply_teacher_head
from kdpipe.distill.teacher.heads.build import frozen_head
from kdpipe.distill.teacher.heads.fc import TeacherHeadError
from kdpipe.distill.teacher.maps import StoredMaps
from kdpipe.distill.teacher.source import ImageTargets
from kdpipe.distill.teacher.targets import RoiTargets, no_rois
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.find import DataSource, find_data
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.detectors.checkpoints import class_names, load_checkpoint
from kdpipe.pipelines.teacher.class_order import with_right_classes
from kdpipe.pipelines.teacher.options import CacheOptions
from kdpipe.pipelines.teacher.setup import prepare_teacher
from kdpipe.pipelines.teacher.teacher import Teacher, load_teacher, teacher_config

__all__ = ["LiveTeacher", "LiveTeacherInfo", "build_live_teacher", "prepare_live_teacher"]


class LiveTeacher:
    """A teacher source that looks at the images of each batch, in the view that the student sees.

    Backbone and neck where the student chooses the RoIs; the whole detector where the teacher does. One image at a time
    and in full precision, as for a cache: padding to a common size would leak into the features.

    Args:
        teacher: The teacher.
        spec: What it is.
        methods: What is learned from it, for RoIs that it chooses.
        roi_sampling: Options of `RoiSampling`, for a sample of its proposals and of the ground truth. None for RoIs of
            the student.
    """

    def __init__(
        self,
        teacher: Teacher,
        spec: CacheSpec,
        methods: Sequence[str] = (),
        roi_sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.teacher = teacher
        self.spec = spec
        losses = expand_methods(methods)
        self.needs, self.at_rois = needed_fields(losses), looks_at_rois(losses)
        self.roi_sampling = None if roi_sampling is None else RoiSampling(**roi_sampling)

    def head_state(self) -> Mapping[str, Tensor]:
        return self.teacher.head_state()

    @torch.no_grad()
    def targets(self, data: Mapping[str, Any], device: torch.device) -> Sequence[ImageTargets]:
        self.teacher.to(device)
        with torch.autocast(device.type, enabled=False):
            if self.roi_sampling is not None:
                samples = zip(data["inputs"], data["data_samples"], strict=True)
                return [self._at_proposals(image, x.gt_instances, self.roi_sampling) for image, x in samples]
            return [self.view(image) for image in data["inputs"]]

    def view(self, image: Tensor) -> TeacherView:
        """What it sees of an image, Tensor[3, h, w], BGR, 0 to 255."""
        pyramid, _ = self._see(image)
        return TeacherView("exact", np.eye(3), _levels(pyramid), size=(image.shape[1], image.shape[2]))

    def _see(self, image: Tensor) -> tuple[tuple[Tensor, ...], DetDataSample]:
        """As `Teacher.pyramid_of_input`, behind the steps of the teacher's pipeline that follow its resizing."""
        return self.teacher.pyramid_of_input(self.teacher.pixels.of_resized(image), img_shape=tuple(image.shape[1:]))

    def _at_proposals(self, image: Tensor, truth: Any, sampling: RoiSampling) -> RoiTargets:
        """What it says of a sample of its proposals and of the ground truth, as `read_roi_targets` samples a cache."""
        pyramid, image_sample = self._see(image)
        maps = StoredMaps(np.eye(3), _levels(pyramid), None, (image.shape[1], image.shape[2]))
        if not self.at_rois:
            return no_rois(self.spec, self.needs, "exact", maps).to(pyramid[0].device)
        proposals = self.teacher.proposals(pyramid, image_sample)
        gt_boxes = get_box_tensor(truth.bboxes).to(proposals)
        roi_sample = sample_rois(
            torch.cat([proposals, gt_boxes]),
            len(proposals),
            gt_boxes,
            truth.labels.to(proposals.device),
            sampling=sampling,
            num_classes=self.spec.num_classes,
            generator=torch.default_generator,
        )
        count = int(roi_sample.positive.sum())
        outputs, features = self.teacher.box_outputs(pyramid, roi_sample.boxes, image_sample)
        values = {**vars(outputs), "roi_features": features[:count]}
        needed: dict[str, Any] = {name: values[name] for name in self.needs - {"features"}}
        if "features" in self.needs:
            needed["maps"] = maps
        return RoiTargets(roi_sample.boxes, roi_sample.labels, count, "exact", **needed)


def _levels(pyramid: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Those of the only image, Tensor[C, h_l, w_l]."""
    return tuple(level[0] for level in pyramid)


def build_live_teacher(
    ckpt: str,
    spec: Mapping[str, Any],
    config: str | None = None,
    trust: bool = False,
    methods: Sequence[str] = (),
    roi_sampling: Mapping[str, Any] | None = None,
) -> LiveTeacher:
    """A live teacher from its checkpoint.

    Args:
        ckpt: The checkpoint.
        spec: `CacheSpec.to_json()` of the teacher.
        config: Its config, a name of mmdet's zoo or a file; None takes the checkpoint's own.
        trust: Unpickle the checkpoint even where it holds more than weights.
        methods: As `LiveTeacher` takes them.
        roi_sampling: The same.

    Raises:
        KdpipeError: It cannot be loaded.
    """
    checkpoint, cache_spec = load_checkpoint(Path(ckpt), trust=trust), CacheSpec.from_json(spec)
    cfg = teacher_config(checkpoint, config)
    with torch.random.fork_rng(devices=()):  # the student begins with the weights that it would have without a teacher
        teacher = load_teacher(checkpoint, cfg, proposals=cache_spec.proposals, device=torch.device("cpu"))
    return LiveTeacher(teacher, cache_spec, methods, roi_sampling)


MODELS.register_module(name=LiveTeacher.__name__, module=build_live_teacher)


@dataclass(frozen=True)
class LiveTeacherInfo:
    """What a training has to know of a teacher that it runs beside the student.

    Attributes:
        name: As messages call it.
        spec: What it is; its classes are placeholders before `with_data`.
        identity: Digests of its weights and, after `with_data`, of the data.
        options: Of its `LiveTeacher`, beside `spec`.
        refusal: Why it cannot be asked about boxes that the student chose; empty where it can.
        classes: That its checkpoint names, or None.
        teacher: It; None after `with_data`.
    """

    name: str
    spec: CacheSpec
    identity: dict[str, Any]
    options: dict[str, Any]
    refusal: str
    classes: tuple[str, ...] | None
    teacher: Teacher | None

    def with_data(self, data: DetectionData, say: Callable[[str], None]) -> tuple["LiveTeacherInfo", DetectionData]:
        """The same with the classes and the digest of the images to train on, and these with the teacher's labels.

        Args:
            data: The images.
            say: As `with_right_classes` takes it.

        Raises:
            KdpipeError: It knows other classes.
        """
        teacher = present(self.teacher, "the teacher")
        spec, data = with_right_classes(teacher, self.spec, data, self.classes, self.name, say)
        return replace(self, spec=spec, identity={**self.identity, "data": data.digest()}, teacher=None), data

    def source(self) -> dict[str, Any]:
        """Config of its `LiveTeacher`."""
        return {"type": LiveTeacher.__name__, **self.options, "spec": self.spec.to_json()}


def prepare_live_teacher(
    ckpt: Path,
    config: str | None,
    data: DataOptions,
    *,
    trust: bool,
) -> tuple[LiveTeacherInfo, DataSource]:
    """Load a teacher, and find the images to train on: those named, or those of the teacher's config.

    Args:
        ckpt: The checkpoint.
        config: Its config, a name of mmdet's zoo or a file; None takes the checkpoint's own.
        data: The training images, where they are named.
        trust: Unpickle the checkpoint even where it holds more than weights.

    Returns:
        The teacher, and where the images are; none of them has been read.

    Raises:
        KdpipeError: It cannot be loaded, or there is no data.
    """
    checkpoint = load_checkpoint(ckpt, trust=trust)
    cfg = teacher_config(checkpoint, config)
    source = find_data(cfg, data)
    options = CacheOptions(dtype="float32", codec="none")
    teacher, spec = prepare_teacher(checkpoint, cfg, options, torch.device("cpu"))
    teacher.pixels.check_live()
    info = LiveTeacherInfo(
        name=f"the teacher {ckpt}",
        spec=spec,
        identity={"teacher": {"weights": digest_tensors(teacher.model.state_dict()), **teacher.pixels.identity()}},
        options={"ckpt": str(ckpt.resolve()), "config": config, "trust": trust},
        refusal=_refusal(teacher, spec),
        classes=class_names(checkpoint),
        teacher=teacher,
    )
    return info, source


@torch.no_grad()
def _refusal(teacher: Teacher, spec: CacheSpec) -> str:
    """Why the head that answers for the student's RoIs does not say what the teacher's says; empty where it does."""
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 128, 160), generator=g, dtype=torch.uint8)
    corner = torch.rand(8, 2, generator=g) * 64
    boxes = torch.cat([corner, corner + 16 + torch.rand(8, 2, generator=g) * 48], dim=1)
    every = torch.ones(8, dtype=torch.bool)
    rois = BatchRois(torch.cat([torch.zeros(8, 1), boxes], dim=1), every.long(), every)
    pyramid, sample = teacher.pyramid_of_input(teacher.pixels.of_resized(image), img_shape=tuple(image.shape[1:]))
    outputs, _ = teacher.box_outputs(pyramid, boxes, sample)
    try:
        head = frozen_head(teacher.head_state(), spec)
        logits = apply_teacher_head([LiveTeacher(teacher, spec).view(image)], rois, head, spec, ("logits",)).logits
    except TeacherHeadError as error:
        return str(error)
    right = torch.allclose(present(logits, "the logits of the box head"), outputs.logits, rtol=1e-3, atol=1e-3)
    return "" if right else "The teacher's box head does more than can be rebuilt from its weights."
