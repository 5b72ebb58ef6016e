"""Where a training gets what the teacher says: one interface; the cache is one source, a live teacher another."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from kdpipe.cache.errors import CacheError, present
from kdpipe.cache.read.reader import TeacherCache, open_cache
from kdpipe.cache.views import map_boxes
from kdpipe.distill.methods import missing_levels
from kdpipe.distill.outputs import BatchRois
from kdpipe.distill.pairs import RoiPairs
from kdpipe.distill.students.protocol import StudentStage
from kdpipe.distill.teacher.any_box import apply_teacher_head, read_teacher_view
from kdpipe.distill.teacher.heads.build import FrozenTeacher, frozen_head
from kdpipe.distill.teacher.heads.fc import TeacherHeadError

# A head that is rebuilt rightly gives the logits that are cached but for the storage type, which costs 2 to 3 % (int4)
# or much less (tests/benchmarks/tiers.md).
_HEAD_TOLERANCE = {"int4": 0.2, "int8": 0.1, "float16": 0.1, "float32": 0.1}


class BatchTargets(Protocol):
    """What the teacher says of a batch of images."""

    def pair_with(self, stage: StudentStage) -> RoiPairs:
        """Student and teacher at the same RoIs."""


class ImageTargets(Protocol):
    """What there is of the teacher for one image: `RoiTargets`, or a `TeacherView`."""

    @property
    def view(self) -> str:
        """`exact`, `mirrored` or `skipped`."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """The same on another device."""

    @staticmethod
    def batch(targets: Sequence[Any], teacher: FrozenTeacher) -> BatchTargets:
        """Those of a batch of images, all of this kind."""


class TargetSource(Protocol):
    """Where targets come from."""

    def head_state(self) -> Mapping[str, Tensor]:
        """Weights of the teacher's RPN and RoI head, float32, by their names in its state dict."""

    def targets(self, data: Mapping[str, Any], device: torch.device) -> Sequence[ImageTargets]:
        """What there is of each image of a batch, on a device.

        Args:
            data: The batch as the data loader gives it, its images still as the training pipeline left them.
            device: Where the student is.

        Returns:
            All of one kind: at RoIs that were chosen before, or the means to ask about any.
        """


class CachedTargets:
    """Targets that loader workers read from a cache (`AddTeacherTargets`), and the head that lies in it.

    Args:
        cache: Path of the cache.
    """

    def __init__(self, cache: str) -> None:
        self.cache = cache

    def head_state(self) -> Mapping[str, Tensor]:
        return open_cache(self.cache, allow_partial=True).head()

    def targets(self, data: Mapping[str, Any], device: torch.device) -> Sequence[ImageTargets]:
        return [target.to(device) for target in data.get("targets", ())]


def check_serves_student_rois(cache: TeacherCache) -> None:
    """Make sure that a cache can say what the teacher says of any box: it has pyramid and head, and these agree.

    Raises:
        TeacherHeadError: It cannot; the message says why.
        CacheError: The targets of its first image are damaged.
    """
    spec = cache.spec
    if "features" not in spec.fields:
        raise TeacherHeadError(f"its tier {spec.tier!r} holds no feature pyramid (--targets pyramid does)")
    if missing := missing_levels(spec, spec.head_levels):
        raise TeacherHeadError(f"its pyramid lacks {missing}, which the teacher's RoI head reads (--levels)")
    try:
        head = frozen_head(cache.head(), spec)
    except CacheError as error:
        raise TeacherHeadError(str(error)) from error
    with_boxes = (image_id for image_id in cache.image_ids.tolist() if cache.index(image_id, spec.views[0]).num_rois)
    for image_id in itertools.islice(with_boxes, 1):
        cached = cache.targets(image_id, spec.views[0], fields=("logits",))
        view = read_teacher_view(cache, image_id, cached.matrix, missing_view="mirror")
        boxes = map_boxes(cached.boxes, cached.matrix)
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)  # [R, 5]
        every = torch.ones(len(rois), dtype=torch.bool)
        rebuilt = apply_teacher_head([view], BatchRois(rois, every.long(), every), head, spec, ("logits",)).logits
        logits = present(cached.logits, f"the logits of image {image_id}").float()
        off = float((present(rebuilt, "the logits of the box head") - logits).norm() / logits.norm().clamp(min=1e-12))
        if not off <= _HEAD_TOLERANCE[spec.dtype]:
            raise TeacherHeadError(
                "the box head in it, applied to the pyramid, does not give the logits that it holds "
                f"(image {image_id}: {100 * off:.3g} % off): this teacher's head sees more than its pyramid"
            )
