"""What a student is shown: RoIs in its own view, and what the teacher said of them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from kdpipe.cache.quantize import dequantize, dequantize_rows
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.views import mirror_features
from kdpipe.distill.losses.numeric import no_autocast
from kdpipe.distill.outputs import BatchRois, TeacherOutputs
from kdpipe.distill.pairs import RoiPairs
from kdpipe.distill.rows import row_numbers
from kdpipe.distill.students.protocol import StudentStage
from kdpipe.distill.teacher.heads.build import FrozenTeacher
from kdpipe.distill.teacher.maps import StoredMaps
from kdpipe.distill.teacher.pyramids import StoredPyramid, TeacherPyramids

MISSING_VIEWS = ("mirror", "skip")
ROI_SOURCES = ("teacher", "student")
_OF_PREDICTION = ("logits", "deltas")


@dataclass(frozen=True)
class RoiTargets:
    """S sampled RoIs of one image, and what the teacher said of them: `ImageTargets`. The P positives come first.

    Attributes:
        boxes: Tensor[S, 4] float32 (x1, y1, x2, y2), pixels of the student's network input.
        labels: Tensor[S] int64, number of classes = background.
        num_positive: P.
        view: `exact`, `mirrored` or `skipped` (S = 0).
        logits: Tensor[S, K + 1] in storage type, or None.
        deltas: Tensor[S, K or 1, 4] in storage type and in the student's view, or None.
        embeddings: Tensor[S, D] in storage type, or None.
        embedding_scale: Tensor[S] float32 of int8 embeddings, or None.
        roi_features: Tensor[P, C, size, size] in storage type, the teacher's of the positives in its own orientation,
            where they are known already.
        roi_scale: Tensor[P, C] of int8 features, or None.
        maps: Levels of the teacher's pyramid: those that its features of the positives come from, where they are not
            known, and those that losses compare.
        teacher_boxes: Tensor[P, 4] float32, pixels of the teacher's network input, or None.
    """

    boxes: Tensor
    labels: Tensor
    num_positive: int
    view: str
    logits: Tensor | None = None
    deltas: Tensor | None = None
    embeddings: Tensor | None = None
    embedding_scale: Tensor | None = None
    roi_features: Tensor | None = None
    roi_scale: Tensor | None = None
    maps: StoredMaps | None = None
    teacher_boxes: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "RoiTargets":
        """The same on another device; stored types stay as they are, int8 included."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "RoiTargets":
        """The same in page-locked memory; torch's DataLoader calls this."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())

    @staticmethod
    def batch(targets: Sequence["RoiTargets"], teacher: FrozenTeacher) -> "RoiTargetsBatch":
        """Those of a batch of images."""
        return RoiTargetsBatch(targets, teacher)


Targets = TypeVar("Targets")


def map_tensors(value: Targets, function: Callable[[Tensor], Tensor]) -> Targets:
    """Apply a function to every tensor of a dataclass, and of the dataclasses and tuples inside it."""
    changed: dict[str, object] = {}
    for field in fields(value):  # type: ignore[arg-type]
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            changed[field.name] = function(item)
        elif isinstance(item, StoredMaps):
            changed[field.name] = map_tensors(item, function)
        elif isinstance(item, tuple) and any(isinstance(part, Tensor) for part in item):
            changed[field.name] = tuple(function(part) if isinstance(part, Tensor) else part for part in item)
    return replace(value, **changed)  # type: ignore[type-var]


def teacher_roi_features(targets: Sequence[RoiTargets], spec: CacheSpec) -> Tensor:
    """The teacher's RoI features of the positives of a batch, in the student's orientation.

    By RoIAlign on the cached pyramids with the teacher's own extractor settings, or as cached in the `objects` tier.

    Args:
        targets: Of each image.
        spec: What the teacher is.

    Returns:
        Tensor[P, C, size, size] float32 on the targets' device.
    """
    stored: dict[int, StoredPyramid] = {}
    rois: dict[int, Tensor] = {}
    for index, target in enumerate(targets):
        maps, boxes = target.maps, target.teacher_boxes
        if target.num_positive and boxes is not None and maps is not None:
            stored[index] = maps.levels, maps.scale
            rois[index] = functional.pad(boxes, (1, 0), value=index)
    none = targets[0].boxes.new_zeros(0, 5)
    pooled = TeacherPyramids(stored, spec).roi_align(torch.cat([none, *rois.values()]))
    of_image = dict(zip(rois, pooled.split([len(boxes) for boxes in rois.values()]), strict=True)) if rois else {}
    parts = []
    for index, target in enumerate(targets):
        if target.roi_features is not None:
            features = dequantize(target.roi_features, target.roi_scale)
        else:
            features = of_image.get(index, pooled[:0])  # none where there is no pyramid
        parts.append(mirror_features(features) if target.view == "mirrored" else features)
    return torch.cat(parts)


def no_rois(spec: CacheSpec, needs: Collection[str], view: str, maps: StoredMaps | None = None) -> RoiTargets:
    """The targets of an image that has no RoIs.

    Args:
        spec: What the teacher is.
        needs: Some of `logits`, `deltas`, `embeddings`, `roi_features`, `features`.
        view: As of `RoiTargets`.
        maps: The same.
    """
    classes = 1 if spec.class_agnostic else spec.num_classes
    return RoiTargets(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        num_positive=0,
        view=view,
        logits=torch.zeros(0, spec.num_classes + 1) if "logits" in needs else None,
        deltas=torch.zeros(0, classes, 4) if "deltas" in needs else None,
        embeddings=torch.zeros(0, spec.embedding_dim) if "embeddings" in needs else None,
        maps=maps,
    )


def join_targets(
    targets: Sequence[RoiTargets], spec: CacheSpec, needs: Collection[str]
) -> tuple[BatchRois, TeacherOutputs]:
    """The RoIs of a batch, and what the teacher said of them.

    Args:
        targets: Of each image.
        spec: Of the cache that they came from.
        needs: Some of `logits`, `deltas`, `embeddings`, `roi_features`.
    """
    image = torch.cat([x.labels.new_full(x.labels.shape, i) for i, x in enumerate(targets)])  # [R]
    boxes = torch.cat([x.boxes for x in targets])  # [R, 4]
    positive = torch.cat([torch.arange(len(x.boxes), device=boxes.device) < x.num_positive for x in targets])
    rois = torch.cat([image[:, None].to(boxes), boxes], dim=1)  # [R, 5]
    with no_autocast(boxes):  # float16 as it is stored: bfloat16 autocast on the CPU refuses that in `cat`
        outputs: dict[str, Tensor] = {
            name: torch.cat([getattr(target, name) for target in targets]) for name in needs if name in _OF_PREDICTION
        }
        if "embeddings" in needs:
            stored = [(x.embeddings, x.embedding_scale) for x in targets if x.embeddings is not None]
            outputs["embeddings"] = torch.cat([dequantize_rows(values, scale) for values, scale in stored])
    if "roi_features" in needs:
        outputs["roi_features"] = teacher_roi_features(targets, spec)  # [P, C, size, size]
    labels, num_positive = torch.cat([x.labels for x in targets]), sum(x.num_positive for x in targets)
    return BatchRois(rois, labels, positive, num_positive), TeacherOutputs(**outputs)


class RoiTargetsBatch:
    """A batch of RoIs that were chosen before the student saw them: the student is asked about these.

    Args:
        targets: Of each image.
        teacher: Who said so.
    """

    def __init__(self, targets: Sequence[RoiTargets], teacher: FrozenTeacher) -> None:
        self._teacher, self._maps = teacher, [target.maps for target in targets]
        self._rois, self._outputs = join_targets(targets, teacher.spec, teacher.needs)

    def pair_with(self, stage: StudentStage) -> RoiPairs:
        """Student and teacher at these RoIs; those of which the student has nothing to say are left to RoI features."""
        rois, outputs = self._rois, self._outputs
        rows, student = stage.outputs_at(rois.rois) if self._teacher.asks_student else (slice(None), None)
        return RoiPairs(stage, self._teacher.spec, rois, row_numbers(rows), student, outputs, maps=self._maps)
