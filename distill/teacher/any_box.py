"""The teacher's pyramid of an image, which can be asked about any box of the student's view of that image."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.cache.read.reader import TeacherCache
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.views import map_boxes, mirror_deltas, mirror_features
from kdpipe.distill.losses.numeric import no_autocast
from kdpipe.distill.outputs import BatchRois, TeacherOutputs
from kdpipe.distill.pairs import RoiPairs
from kdpipe.distill.rows import row_numbers
from kdpipe.distill.students.protocol import StudentStage
from kdpipe.distill.teacher.cached_boxes import cached_view, read_maps
from kdpipe.distill.teacher.heads.build import BoxHead, FrozenTeacher
from kdpipe.distill.teacher.maps import StoredMaps
from kdpipe.distill.teacher.pyramids import TeacherPyramids, TeacherRois
from kdpipe.distill.teacher.targets import map_tensors


@dataclass(frozen=True)
class TeacherView:
    """The teacher's pyramid of one image, of which its box head can be asked about any box: `ImageTargets`.

    Attributes:
        view: `exact`, `mirrored` or `skipped` (nothing is asked of it).
        matrix: `[3, 3]` float64, pixels of the student's network input -> pixels of the teacher's.
        pyramid: Per level Tensor[C, h_l, w_l] in storage type; None for one that neither the teacher's RoI head reads
            nor losses compare. The last of these are left out.
        scale: Tensor[L, C] float32 of an int8 pyramid, or None.
        size: (height, width) of the teacher's network input without padding, pixels; a cascade keeps boxes inside.
    """

    view: str
    matrix: npt.NDArray[np.float64]
    pyramid: tuple[Tensor | None, ...] = ()
    scale: Tensor | None = None
    size: tuple[int, int] = (0, 0)

    @property
    def maps(self) -> StoredMaps | None:
        """Its feature maps; None of a skipped one."""
        return StoredMaps(self.matrix, self.pyramid, self.scale, self.size) if self.pyramid else None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "TeacherView":
        """The same on another device; stored types stay as they are, int8 included."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TeacherView":
        """The same in page-locked memory; torch's DataLoader calls this."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())

    @staticmethod
    def batch(targets: Sequence["TeacherView"], teacher: FrozenTeacher) -> "TeacherViewBatch":
        """Those of a batch of images."""
        return TeacherViewBatch(targets, teacher)


def read_teacher_view(
    cache: TeacherCache,
    image_id: int,
    matrix: npt.NDArray[np.float64],
    *,
    missing_view: str,
    levels: Collection[int] | None = None,
) -> TeacherView:
    """Read levels of an image's pyramid, and nothing else.

    Args:
        cache: The teacher's cache, of the `pyramid` tier.
        image_id: COCO image id.
        matrix: `[3, 3]` original pixels -> the student's network input.
        missing_view: `mirror` or `skip`: what becomes of a flipped image whose flipped view is not cached.
        levels: Which; by default those that the teacher's RoI head reads.

    Raises:
        CacheError: The image or its pyramid is not in the cache, or its data is damaged.
        ViewError: The student's view is rotated, sheared or upside down.
    """
    view, mirrored = cached_view(cache.spec, matrix)
    if mirrored and missing_view == "skip":
        return TeacherView("skipped", np.eye(3))
    wanted = sorted(range(cache.spec.head_levels) if levels is None else levels)
    maps = read_maps(cache, image_id, view, matrix, wanted)
    pyramid = maps.levels[: wanted[-1] + 1]
    return TeacherView("mirrored" if mirrored else "exact", maps.matrix, pyramid, maps.scale, maps.size)


@torch.no_grad()
def apply_teacher_head(
    views: Sequence[TeacherView], rois: BatchRois, head: BoxHead, spec: CacheSpec, needs: Collection[str]
) -> TeacherOutputs:
    """What the teacher says of the RoIs of a batch: RoIAlign on its pyramids, then its box head.

    Args:
        views: Of each image of the batch.
        rois: On the device of the views, none of them in a skipped image.
        head: The teacher's box head, as `frozen_head` gives it.
        spec: What the teacher is.
        needs: Some of `logits`, `deltas`, `embeddings`, `roi_features`; no more than these is computed.
    """
    of_head = [name for name in needs if name not in ("roi_features", "features")]
    head_rois = rois if of_head else rois.select(rois.positive_rows)
    with no_autocast(rois.rois):
        teacher_rois = _in_teachers_view(views, head_rois, spec)
        is_mirrored = torch.tensor([view.view == "mirrored" for view in views])
        is_mirrored = is_mirrored.to(rois.rois.device, non_blocking=True)[head_rois.image_index]  # [R or P]
        outputs: dict[str, Tensor] = {}
        if of_head:
            answer = head(teacher_rois)
            outputs = {name: getattr(answer, name) for name in of_head}
        if "deltas" in outputs:
            deltas = outputs["deltas"]
            outputs["deltas"] = torch.where(is_mirrored[:, None, None], mirror_deltas(deltas), deltas)
        if "roi_features" in needs:
            rows = rois.positive_rows if of_head else slice(None)
            features, is_mirrored = teacher_rois.features[rows], is_mirrored[rows]
            mirrored = mirror_features(features)
            outputs["roi_features"] = torch.where(is_mirrored[:, None, None, None], mirrored, features)
    return TeacherOutputs(**outputs)


def _in_teachers_view(views: Sequence[TeacherView], rois: BatchRois, spec: CacheSpec) -> TeacherRois:
    """RoIs where the teacher has them, with the pyramids of the images that they are of."""
    image_index, boxes = rois.image_index, rois.boxes.float()
    for index, view in enumerate(views):
        boxes = torch.where((image_index == index)[:, None], map_boxes(boxes, view.matrix), boxes)
    has_rois = (image_index == torch.arange(len(views), device=boxes.device)[:, None]).any(dim=1).tolist()
    stored = {i: (view.pyramid, view.scale) for i, view in enumerate(views) if has_rois[i]}
    sizes = torch.tensor([view.size[::-1] for view in views], dtype=boxes.dtype).to(boxes.device, non_blocking=True)
    return TeacherRois(TeacherPyramids(stored, spec), image_index, boxes, sizes[image_index])


class TeacherViewBatch:
    """A batch of the teacher's pyramids: the student chooses the RoIs, and the teacher's box head is applied to them.

    Args:
        views: Of each image.
        teacher: Whose views these are.
    """

    def __init__(self, views: Sequence[TeacherView], teacher: FrozenTeacher) -> None:
        self._views, self._teacher = views, teacher

    def pair_with(self, stage: StudentStage) -> RoiPairs:
        """Student and teacher at the RoIs of the student's own sampler; those of skipped images are left out."""
        teacher, maps = self._teacher, [view.maps for view in self._views]
        if not teacher.at_rois:
            none = BatchRois.none(stage.pyramid[0].device)
            return RoiPairs(stage, teacher.spec, none, slice(None), None, TeacherOutputs(), maps=maps)
        rois, rows, outputs = stage.sampled()
        if any(view.view == "skipped" for view in self._views):
            is_kept = torch.tensor([view.view != "skipped" for view in self._views])
            kept = is_kept.to(rois.rois.device, non_blocking=True)[rois.image_index]  # [R]
            outputs = outputs.select(kept[rows])
            rois, rows = rois.select(kept), rows if isinstance(rows, slice) else rows[kept]
        answers = apply_teacher_head(self._views, rois, teacher.head_for(stage.index), teacher.spec, teacher.needs)
        return RoiPairs(stage, teacher.spec, rois, row_numbers(rows), outputs, answers, maps=maps)
