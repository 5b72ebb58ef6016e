"""What a student is shown of one image: sampled RoIs in its own view, and what the teacher said of them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from kdpipe.cache.read.reader import TeacherCache
from kdpipe.cache.records import TeacherTargets
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.views import is_flipped, map_boxes, mirror_deltas, mirror_features, visible_boxes
from kdpipe.distill.numeric import no_autocast
from kdpipe.distill.rois import assign_levels, sample_rois
from kdpipe.distill.teacher_pyramids import StoredPyramid, TeacherPyramids

MISSING_VIEWS = ("mirror", "skip")
ROIS = ("teacher", "student")


@dataclass(frozen=True)
class BatchRois:
    """R RoIs of a batch; those of an image lie together, its positives first.

    Attributes:
        rois: Tensor[R, 5] (image in the batch, x1, y1, x2, y2), pixels of the student's network input.
        labels: Tensor[R] int64, number of classes = background.
        positive: Tensor[R] bool.
    """

    rois: Tensor
    labels: Tensor
    positive: Tensor

    def select(self, rows: Tensor) -> "BatchRois":
        """Those of a mask or of row numbers."""
        return BatchRois(self.rois[rows], self.labels[rows], self.positive[rows])


@dataclass(frozen=True)
class HeadOutputs:
    """What a box head says of R RoIs.

    Attributes:
        embeddings: Tensor[R, D], input of the classifier layer.
        logits: Tensor[R, K + 1], background last.
        deltas: Tensor[R, K or 1, 4], normalised by the box coder of that head.
    """

    embeddings: Tensor
    logits: Tensor
    deltas: Tensor

    def select(self, rows: Tensor) -> "HeadOutputs":
        """Those of a mask or of row numbers."""
        return HeadOutputs(self.embeddings[rows], self.logits[rows], self.deltas[rows])


@dataclass(frozen=True)
class Answers:
    """What the teacher says of the RoIs of a batch, in the student's orientation. What no loss asks for is None.

    Attributes:
        features: Tensor[P, C, size, size] float32, RoI features of the positives.
        embeddings: Tensor[R, D].
        logits: Tensor[R, K + 1], background last.
        deltas: Tensor[R, K or 1, 4], normalised by the teacher's box coder.
    """

    features: Tensor | None = None
    embeddings: Tensor | None = None
    logits: Tensor | None = None
    deltas: Tensor | None = None

    def select(self, rows: Tensor) -> "Answers":
        """The features as they are, and the rest at a mask or at row numbers."""
        of_head = {name: getattr(self, name) for name in ("embeddings", "logits", "deltas")}
        return replace(self, **{name: value[rows] for name, value in of_head.items() if value is not None})


@dataclass(frozen=True)
class RoiTargets:
    """S sampled RoIs of one image; the P positives come first.

    Attributes:
        boxes: Tensor[S, 4] float32 (x1, y1, x2, y2), pixels of the student's network input.
        labels: Tensor[S] int64, number of classes = background.
        num_positive: P.
        view: `exact`, `mirrored` or `skipped` (S = 0).
        logits: Tensor[S, K + 1] in storage type, or None.
        deltas: Tensor[S, K or 1, 4] in storage type and in the student's view, or None.
        embeddings: Tensor[S, D] in storage type, or None.
        features: Tensor[P, C, size, size], the teacher's of the positives, where they are known already.
        teacher: What the teacher's features of the positives come from, or None where no loss asks for them.
        teacher_boxes: Tensor[P, 4] float32, pixels of the teacher's network input, or None.
    """

    boxes: Tensor
    labels: Tensor
    num_positive: int
    view: str
    logits: Tensor | None = None
    deltas: Tensor | None = None
    embeddings: Tensor | None = None
    features: Tensor | None = None
    teacher: TeacherTargets | None = None
    teacher_boxes: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "RoiTargets":
        """The same on another device; stored types stay as they are, int8 included."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "RoiTargets":
        """The same in page-locked memory; torch's DataLoader calls this."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())


Targets = TypeVar("Targets")


def map_tensors(value: Targets, function: Callable[[Tensor], Tensor]) -> Targets:
    """Apply a function to every tensor of a dataclass, and of the dataclasses and tuples inside it."""
    changed: dict[str, object] = {}
    for field in fields(value):  # type: ignore[arg-type]
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            changed[field.name] = function(item)
        elif isinstance(item, TeacherTargets):
            changed[field.name] = map_tensors(item, function)
        elif isinstance(item, tuple) and any(isinstance(part, Tensor) for part in item):
            changed[field.name] = tuple(function(part) if isinstance(part, Tensor) else part for part in item)
    return replace(value, **changed)  # type: ignore[type-var]


def cached_view(spec: CacheSpec, matrix: npt.NDArray[np.float64]) -> tuple[str, bool]:
    """Which of the cached views is nearest to what the student sees, and whether it has to be mirrored.

    Raises:
        ViewError: The student's view is rotated, sheared or upside down.
    """
    flipped = is_flipped(matrix)
    view = "hflip" if flipped and "hflip" in spec.views else spec.views[0]
    return view, flipped != (view == "hflip")


def read_roi_targets(
    cache: TeacherCache,
    image_id: int,
    matrix: npt.NDArray[np.float64],
    size: tuple[int, int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    needs: Collection[str],
    num: int,
    positive_fraction: float,
    missing_view: str,
    generator: torch.Generator,
) -> RoiTargets:
    """Sample cached boxes of one image and read what the losses need of them, and nothing else.

    Args:
        cache: The teacher's cache.
        image_id: COCO image id.
        matrix: `[3, 3]` original pixels -> the student's network input.
        size: `(h, w)` of the student's network input without padding.
        gt_boxes: Tensor[G, 4] (x1, y1, x2, y2), pixels of the student's network input.
        gt_labels: Tensor[G] int64.
        needs: Some of `logits`, `deltas`, `embeddings`, `features`.
        num: RoIs to sample.
        positive_fraction: Largest share of positives.
        missing_view: `mirror` or `skip`: what becomes of a flipped image whose flipped view is not cached.
        generator: Source of randomness.

    Raises:
        CacheError: The image is not in the cache, or its data is damaged.
        ViewError: The student's view is rotated, sheared or upside down.
    """
    spec = cache.spec
    view, mirrored = cached_view(spec, matrix)
    if mirrored and missing_view == "skip":
        return _no_rois(spec, needs)

    known = cache.targets(image_id, view, fields=("boxes",))
    boxes = map_boxes(known.boxes, matrix)
    visible = visible_boxes(boxes, size).nonzero().squeeze(1)  # rows that a crop left in the image
    sample = sample_rois(
        boxes[visible],
        int((visible < known.num_proposals).sum()),
        gt_boxes,
        gt_labels,
        num=num,
        positive_fraction=positive_fraction,
        num_classes=spec.num_classes,
        generator=generator,
    )
    rows = visible[sample.rows]
    num_positive = int(sample.positive.sum())
    said = cache.targets(
        image_id, view, fields=[name for name in ("logits", "deltas", "embeddings") if name in needs], rois=rows.numpy()
    )
    deltas = said.deltas
    if deltas is not None and mirrored:
        deltas = mirror_deltas(deltas)
    targets = RoiTargets(
        boxes=sample.boxes,
        labels=sample.labels,
        num_positive=num_positive,
        view="mirrored" if mirrored else "exact",
        logits=said.logits,
        deltas=deltas,
        embeddings=said.embeddings,
    )
    if "features" not in needs:
        return targets
    positives = rows[:num_positive]
    teacher_boxes = map_boxes(known.boxes[positives], known.matrix)
    if "features" in spec.fields:
        levels = sorted(set(assign_levels(teacher_boxes, spec.finest_scale, spec.roi_levels).tolist()))
        teacher = cache.targets(image_id, view, fields=("features",), levels=levels)
    else:
        teacher = cache.targets(image_id, view, fields=("roi_features",), rois=positives.numpy())
    return replace(targets, teacher=teacher, teacher_boxes=teacher_boxes)


def _no_rois(spec: CacheSpec, needs: Collection[str]) -> RoiTargets:
    """The targets of an image that has none."""
    classes = 1 if spec.class_agnostic else spec.num_classes
    return RoiTargets(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        num_positive=0,
        view="skipped",
        logits=torch.zeros(0, spec.num_classes + 1) if "logits" in needs else None,
        deltas=torch.zeros(0, classes, 4) if "deltas" in needs else None,
        embeddings=torch.zeros(0, spec.embedding_dim) if "embeddings" in needs else None,
    )


def teacher_roi_features(targets: Sequence[RoiTargets], spec: CacheSpec) -> Tensor:
    """The teacher's RoI features of the positives of a batch, in the student's orientation.

    By RoIAlign on the cached pyramids with the teacher's own extractor settings, or as cached in the `roi` tier.

    Args:
        targets: Of each image.
        spec: What the teacher is.

    Returns:
        Tensor[P, C, size, size] float32 on the targets' device.
    """
    stored: dict[int, StoredPyramid] = {}
    rois = [targets[0].boxes.new_zeros(0, 5)]
    for index, target in enumerate(targets):
        teacher, boxes = target.teacher, target.teacher_boxes
        if target.num_positive and boxes is not None and teacher is not None and teacher.features is not None:
            stored[index] = teacher.features, teacher.scale
            rois.append(functional.pad(boxes, (1, 0), value=index))
    asked = torch.cat(rois)
    pooled = TeacherPyramids(stored, spec).roi_align(asked)
    parts = []
    for index, target in enumerate(targets):
        if target.features is not None:
            parts.append(target.features)
            continue
        features = pooled[asked[:, 0] == index]  # none where there is no pyramid
        if target.teacher is not None and target.teacher.features is None:
            features = target.teacher.rois()
        parts.append(mirror_features(features) if target.view == "mirrored" else features)
    return torch.cat(parts)


def join_targets(targets: Sequence[RoiTargets], spec: CacheSpec, needs: Collection[str]) -> tuple[BatchRois, Answers]:
    """The RoIs of a batch, and what the teacher said of them.

    Args:
        targets: Of each image.
        spec: Of the cache that they came from.
        needs: Some of `logits`, `deltas`, `embeddings`, `features`.
    """
    image = torch.cat([x.labels.new_full(x.labels.shape, i) for i, x in enumerate(targets)])  # [R]
    boxes = torch.cat([x.boxes for x in targets])  # [R, 4]
    positive = torch.cat([torch.arange(x.boxes.shape[0]) < x.num_positive for x in targets]).to(boxes.device)
    rois = torch.cat([image[:, None].to(boxes), boxes], dim=1)  # [R, 5]
    with no_autocast(boxes):  # float16 as it is stored: bfloat16 autocast on the CPU refuses that in `cat`
        said: dict[str, Tensor] = {
            name: torch.cat([getattr(target, name) for target in targets]) for name in needs if name != "features"
        }
    if "features" in needs:
        said["features"] = teacher_roi_features(targets, spec)  # [P, C, size, size]
    return BatchRois(rois, torch.cat([x.labels for x in targets]), positive), Answers(**said)
